"""The fine-tuning step, shared by every way to train: base model and dataset in, adapter out.

Training happens in a folder named by the fingerprint of everything that decides its result:

    work/train/<fingerprint[:16]>/
        ledger.jsonl      seconds of the budget used, over all attempts
        adapter/          the finished adapter
        train.parquet     its telemetry
        training.json     device and duration, for finetune.run.json
        adapter.json      its manifest, written last
    adapter/, train.parquet, adapter.json    hard links to (copies of) those in the work folder

Going back to an earlier recipe therefore restores its adapter in seconds, and a run that ended at its
budget trains on only if the budget is raised.
"""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from palio.config import Isolation, Track
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
    """One entry's fine-tuning: its folder, settings and base model."""

    folder: EntryFolder
    settings: FinetuneSettings
    options: RunOptions
    base_model: BaseModelFolder

    @property
    def track(self) -> Track:
        return self.settings.track

    @property
    def isolation(self) -> Isolation:
        return self.settings.isolation or Isolation()


@dataclass(frozen=True)
class Trained:
    """Result of a training besides adapter/ and train.parquet in its work folder."""

    manifest: dict[str, Any]
    """Fields of the AdapterManifest that training decides."""
    seconds: float
    """Seconds of the budget used over all attempts."""
    facts: dict[str, Any]
    """Other values of the TrainingFacts."""


def adapter_of(
    step: TrainingStep, recipe: dict[str, Any], version: str, train: Callable[[TrainingFolder, str], Trained]
) -> AdapterManifest:
    """Train, resume or restore; writes adapter/, train.parquet and adapter.json into the entry's folder.

    `recipe` and `version` decide the result together with base model and dataset. `train` takes the work
    folder and the base model's id, and resumes from whatever an earlier attempt left there.
    """
    folder = step.folder
    model = read_record(BaseModelManifest, step.base_model.manifest)
    model.require_supported()
    data = read_record(DatasetManifest, folder.dataset.manifest)
    given = {"recipe": recipe, "recipe_version": version}
    key = fingerprint(given | {"base_model": model.fingerprint, "dataset": data.sha256})
    _refuse_to_replace(folder.adapter_manifest, key)
    work = folder.training(key[:16])
    with timed_run(folder.run_facts("finetune"), FinetuneRun()) as run, sole_process(work.path):
        run.restored = _ended(work, step.track)
        if not run.restored:
            work.manifest.unlink(missing_ok=True)  # from a run with a smaller budget
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
                "base_model": model.id,
                "base_model_fingerprint": model.fingerprint,
                "dataset_sha256": data.sha256,
                "rows": data.rows,
                "code": fingerprint(model.code) if model.code else "",
                "files": folder_sha256(work.adapter),
            }
            AdapterManifest(**given | manifest | trained.manifest).write(work.manifest)
            if trained.manifest["state"] == "finished":
                shutil.rmtree(work.checkpoints, ignore_errors=True)
        run.training = read_record(TrainingFacts, work.facts)
        price = step.options.telemetry.usd_per_hour.get(folder.track_id)
        run.cost_usd = price and round(price * run.training.training_seconds / 3600, 4)
        return _publish(work, folder)


def _refuse_to_replace(file: Path, key: str) -> None:
    """Keep hours of training from being overwritten by accident; Snakemake itself removes old outputs."""
    if file.is_file() and (existing := read_record(AdapterManifest, file).fingerprint) != key:
        why, fix = "was trained with another recipe, dataset or base model", "remove this file to replace it"
        raise BadInput(file, "fingerprint", existing[:16], why=why, fix=fix)


def _ended(work: TrainingFolder, track: Track) -> bool:
    """Return True if `work` holds the final adapter, not one that ended at a smaller budget than today's."""
    if not work.manifest.is_file():
        return False
    budgets = [line["budget"] for line in read_ledger(work.ledger) if line["event"] == "start"]
    state = read_record(AdapterManifest, work.manifest).state
    return state == "finished" or max(budgets) >= track.training_budget


def _publish(work: TrainingFolder, folder: EntryFolder) -> AdapterManifest:
    """Link the finished adapter and its telemetry into the entry's folder; write the manifest last."""
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


@contextmanager
def caught_signals() -> Iterator[set[int]]:
    """Yield the signals received so far: SIGTERM (save and stop) and SIGUSR1 (SLURM's early warning)."""
    caught: set[int] = set()

    def note(number: int, frame: FrameType | None) -> None:
        caught.add(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
