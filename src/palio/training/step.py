"""The fine-tuning step, whatever trains: base model and dataset in, adapter out, inside the track's budget.

All training happens in a folder named by the fingerprint of what decides its result:

    work/train/<fingerprint[:16]>/
        ledger.jsonl      seconds of the budget used, over all attempts
        adapter/          the finished adapter
        train.parquet     its telemetry
        training.json     what trained it, and how long: goes into finetune.run.json
        adapter.json      its manifest, written last
    adapter/, train.parquet, adapter.json    hard links to (copies of) the recipe's own

so going back to an earlier recipe restores its adapter in seconds, and a run that ended at its budget
stays ended unless the budget is raised.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from palio.config import Telemetry, Track
from palio.errors import BadInput, Crashed
from palio.files import link_or_copy
from palio.provenance import atomic_path, fingerprint, folder_sha256
from palio.records import (
    AdapterManifest,
    BaseModelManifest,
    DatasetManifest,
    FinetuneRun,
    TrainingFacts,
    read_record,
    timed_run,
)
from palio.training.ledger import joules, read_ledger, sole_process


@dataclass(frozen=True)
class TrainingStep:
    """Whose training, on what, and inside which limits."""

    competition: str
    track_id: str
    entry: str
    track: Track
    base_model: Path
    """Folder with a manifest.json, as `dataset`."""
    dataset: Path
    entry_dir: Path
    threads: int | None = None
    """CPU threads; None: as many as there are."""
    telemetry: Telemetry = field(default_factory=Telemetry)
    retrain: bool = False
    """Whether the adapter in `entry_dir` may be replaced by one of another fingerprint."""


@dataclass(frozen=True)
class Trained:
    """What training leaves besides adapter/ and train.parquet in its work folder."""

    manifest: dict[str, Any]
    """Values of the AdapterManifest that training decides."""
    seconds: float
    """Of the budget, over all attempts."""
    facts: dict[str, Any]
    """Other values of the TrainingFacts."""


def adapter_of(
    step: TrainingStep, recipe: dict[str, Any], version: str, train: Callable[[Path, str], Trained]
) -> AdapterManifest:
    """Train, go on or restore; leaves adapter/, train.parquet and adapter.json in the entry's folder.

    `recipe` and `version` are what decides the result besides base model and dataset. `train` is given the
    work folder and the base model's id, and goes on from what an earlier attempt left there.
    """
    model = read_record(BaseModelManifest, step.base_model / "manifest.json")
    data = read_record(DatasetManifest, step.dataset / "manifest.json")
    key = fingerprint(
        {
            "recipe": recipe,
            "recipe_version": version,
            "base_model": model.fingerprint,
            "dataset": data.sha256,
        }
    )
    if not step.retrain:
        _refuse_to_replace(step.entry_dir / "adapter.json", key)
    work = step.entry_dir / "work" / "train" / key[:16]
    with timed_run(step.entry_dir / "finetune.run.json", FinetuneRun()) as run, sole_process(work):
        run.restored = _ended(work, step.track)
        if not run.restored:
            (work / "adapter.json").unlink(missing_ok=True)  # of a smaller budget
            trained = train(work, model.id)
            TrainingFacts(
                training_seconds=round(trained.seconds, 3),
                energy_joules=joules(read_ledger(work / "ledger.jsonl")),
                memory_cap_gb=step.track.gpu_memory_gb,
                **trained.facts,
            ).write(work / "training.json")
            manifest = {
                "competition": step.competition,
                "track": step.track_id,
                "entry": step.entry,
                "fingerprint": key,
                "recipe_version": version,
                "base_model": model.id,
                "base_model_fingerprint": model.fingerprint,
                "dataset_sha256": data.sha256,
                "recipe": recipe,
                "rows": data.rows,
                "files": folder_sha256(work / "adapter"),
            }
            AdapterManifest(**manifest | trained.manifest).write(work / "adapter.json")
            if trained.manifest["state"] == "finished":
                shutil.rmtree(work / "checkpoints", ignore_errors=True)
        run.training = read_record(TrainingFacts, work / "training.json")
        price = step.telemetry.usd_per_hour.get(step.track_id)
        run.cost_usd = price and round(price * run.training.training_seconds / 3600, 4)
        return _publish(work, step.entry_dir)


def _refuse_to_replace(file: Path, key: str) -> None:
    """Hours of training are not overwritten by the way. Snakemake removes what a rule is to make anew."""
    if file.is_file() and (kept := read_record(AdapterManifest, file).fingerprint) != key:
        fix = "was trained with another recipe, dataset or base model; give --retrain to replace it"
        raise BadInput(file, "fingerprint", kept[:16], fix)


def _ended(work: Path, track: Track) -> bool:
    """Whether `work` holds the adapter; one that ended at a smaller budget than today's is trained on."""
    if not (work / "adapter.json").is_file():
        return False
    budgets = [line["budget"] for line in read_ledger(work / "ledger.jsonl") if line["event"] == "start"]
    state = read_record(AdapterManifest, work / "adapter.json").state
    return state == "finished" or max(budgets) >= track.training_budget


def _publish(work: Path, entry_dir: Path) -> AdapterManifest:
    """Hard links to (copies of) adapter/, train.parquet and adapter.json of `work`, the manifest last."""
    manifest = read_record(AdapterManifest, work / "adapter.json")
    if folder_sha256(work / "adapter") != manifest.files:
        raise Crashed(f"the finished adapter in {work} was changed; delete that folder to train again")
    building = entry_dir / "work" / "adapter.tmp"
    shutil.rmtree(building, ignore_errors=True)
    shutil.copytree(work / "adapter", building, copy_function=link_or_copy)
    (entry_dir / "adapter.json").unlink(missing_ok=True)
    shutil.rmtree(entry_dir / "adapter", ignore_errors=True)
    building.rename(entry_dir / "adapter")
    with atomic_path(entry_dir / "train.parquet") as temporary:
        shutil.copyfile(work / "train.parquet", temporary)
    manifest.write(entry_dir / "adapter.json")
    return manifest
