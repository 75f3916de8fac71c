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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from palio.config import Track
from palio.errors import BadInput, Crashed
from palio.files import link_or_copy
from palio.layout import BaseModelFolder, EntryFolder, TrainingFolder
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
from palio.settings import FinetuneSettings, RunOptions
from palio.training.ledger import joules, read_ledger, sole_process


@dataclass(frozen=True)
class TrainingStep:
    """Whose training, with which settings, on which base model."""

    folder: EntryFolder
    settings: FinetuneSettings
    options: RunOptions
    base_model: BaseModelFolder

    @property
    def track(self) -> Track:
        return self.settings.track


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
    step: TrainingStep, recipe: dict[str, Any], version: str, train: Callable[[TrainingFolder, str], Trained]
) -> AdapterManifest:
    """Train, go on or restore; leaves adapter/, train.parquet and adapter.json in the entry's folder.

    `recipe` and `version` are what decides the result besides base model and dataset. `train` is given the
    work folder and the base model's id, and goes on from what an earlier attempt left there.
    """
    folder = step.folder
    model = read_record(BaseModelManifest, step.base_model.manifest)
    data = read_record(DatasetManifest, folder.dataset.manifest)
    key = fingerprint(
        {
            "recipe": recipe,
            "recipe_version": version,
            "base_model": model.fingerprint,
            "dataset": data.sha256,
        }
    )
    _refuse_to_replace(folder.adapter_manifest, key)
    work = folder.training(key[:16])
    with timed_run(folder.run_facts("finetune"), FinetuneRun()) as run, sole_process(work.path):
        run.restored = _ended(work, step.track)
        if not run.restored:
            work.manifest.unlink(missing_ok=True)  # of a smaller budget
            trained = train(work, model.id)
            TrainingFacts(
                training_seconds=round(trained.seconds, 3),
                energy_joules=joules(read_ledger(work.ledger)),
                memory_cap_gb=step.track.gpu_memory_gb,
                **trained.facts,
            ).write(work.facts)
            manifest = {
                "competition": step.settings.competition_id,
                "track": folder.track_id,
                "entry": folder.entry_id,
                "fingerprint": key,
                "recipe_version": version,
                "base_model": model.id,
                "base_model_fingerprint": model.fingerprint,
                "dataset_sha256": data.sha256,
                "recipe": recipe,
                "rows": data.rows,
                "files": folder_sha256(work.adapter),
            }
            AdapterManifest(**manifest | trained.manifest).write(work.manifest)
            if trained.manifest["state"] == "finished":
                shutil.rmtree(work.checkpoints, ignore_errors=True)
        run.training = read_record(TrainingFacts, work.facts)
        price = step.options.telemetry.usd_per_hour.get(folder.track_id)
        run.cost_usd = price and round(price * run.training.training_seconds / 3600, 4)
        return _publish(work, folder)


def _refuse_to_replace(file: Path, key: str) -> None:
    """Hours of training are not overwritten by accident. Snakemake removes what a rule is to make anew."""
    if file.is_file() and (kept := read_record(AdapterManifest, file).fingerprint) != key:
        why, fix = "was trained with another recipe, dataset or base model", "remove this file to replace it"
        raise BadInput(file, "fingerprint", kept[:16], why=why, fix=fix)


def _ended(work: TrainingFolder, track: Track) -> bool:
    """Whether `work` holds the adapter; one that ended at a smaller budget than today's is trained on."""
    if not work.manifest.is_file():
        return False
    budgets = [line["budget"] for line in read_ledger(work.ledger) if line["event"] == "start"]
    state = read_record(AdapterManifest, work.manifest).state
    return state == "finished" or max(budgets) >= track.training_budget


def _publish(work: TrainingFolder, folder: EntryFolder) -> AdapterManifest:
    """Hard links to (copies of) the adapter, its telemetry and its manifest, which comes last."""
    manifest = read_record(AdapterManifest, work.manifest)
    if folder_sha256(work.adapter) != manifest.files:
        raise Crashed(f"the finished adapter in {work.path} was changed; delete that folder to train again")
    building = folder.unfinished("adapter")
    shutil.rmtree(building, ignore_errors=True)
    shutil.copytree(work.adapter, building, copy_function=link_or_copy)
    folder.adapter_manifest.unlink(missing_ok=True)
    shutil.rmtree(folder.adapter, ignore_errors=True)
    building.rename(folder.adapter)
    with atomic_path(folder.telemetry) as temporary:
        shutil.copyfile(work.telemetry, temporary)
    manifest.write(folder.adapter_manifest)
    return manifest
