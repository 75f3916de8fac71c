"""The results of one entry. What does not exist is `Missing`, with a reason."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from palio.errors import BadInput
from palio.layout import STAGES, EntryFolder
from palio.pipeline import STEPS
from palio.records import (
    AdapterManifest,
    AnyRecord,
    Check,
    Contamination,
    DatasetManifest,
    FinetuneRun,
    PackageManifest,
    ProbeReport,
    RunFacts,
    StageRecord,
    StageRun,
    read_record,
)

MAX_TEXT = 240
"""Characters shown of a row's prompt or completion."""


@dataclass(frozen=True)
class Missing:
    """Why there is nothing to show."""

    reason: str


@dataclass
class Reason:
    """Rows dropped for one reason. For duplicates that is one cluster: the reason names the row kept."""

    reason: str
    listed: int
    """Number of rows in `ids` once they are read."""
    source: str = ""
    prompt: str = ""
    completion: str = ""
    """Source and shortened texts of the first row."""
    ids: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Dropped:
    """Rows that one operation dropped."""

    rows: int
    reasons: list[Reason]
    """The most frequent ones, in that order; all of them in a small dataset."""

    @property
    def listed(self) -> int:
        return sum(reason.listed for reason in self.reasons)


@dataclass(frozen=True)
class Telemetry:
    """Columns of the training's table, one value per optimizer step."""

    step: list[int]
    loss: list[float]
    elapsed_seconds: list[float]
    memory_bytes: list[int]
    validation_loss: list[float | None]


@dataclass(frozen=True)
class EntryFiles:
    """Records and tables of one entry."""

    check: Check | Missing
    dataset: DatasetManifest | Missing
    dropped: dict[str, Dropped]
    """By operation, such as "2 drop_refusals"."""
    contamination: Contamination | Missing
    adapter: AdapterManifest | Missing
    telemetry: Telemetry | Missing
    package: PackageManifest | Missing
    probe: ProbeReport | Missing
    stages: dict[str, StageRecord | Missing]
    runs: dict[str, RunFacts | Missing]
    """The sidecars: time, memory and cost, by step."""


def read_entry(folder: EntryFolder, why_missing: str, listed: int) -> EntryFiles:
    """Read an entry's folder.

    Args:
        why_missing: the reason for everything that does not exist.
        listed: maximum number of dropped rows to list, per operation.
    """

    def record(model: type[AnyRecord], path: Path) -> AnyRecord | Missing:
        if not path.exists():
            return Missing(why_missing)
        try:
            return read_record(model, path)
        except BadInput as error:
            return Missing(str(error))

    return EntryFiles(
        check=record(Check, folder.check),
        dataset=record(DatasetManifest, folder.dataset.manifest),
        dropped=dropped_rows(folder.dataset.dropped, listed),
        contamination=record(Contamination, folder.contamination),
        adapter=record(AdapterManifest, folder.adapter_manifest),
        telemetry=_telemetry(folder.telemetry) or Missing(why_missing),
        package=record(PackageManifest, folder.package_manifest),
        probe=record(ProbeReport, folder.probe),
        stages={stage: record(StageRecord, folder.stage_record(stage)) for stage in STAGES},
        runs={step.name: record(step.facts, folder.run_facts(step.name)) for step in STEPS if step.facts},
    )


def open_only(files: EntryFiles) -> EntryFiles:
    """Leave out the closed stage: its record and sidecar, and how many of its questions are in the data."""
    contamination = files.contamination
    if not isinstance(contamination, Missing):
        contamination = contamination.model_copy(
            update={
                "instances": {"open": contamination.instances["open"]},
                "contaminated": {"open": contamination.contaminated["open"]},
            }
        )
    return replace(
        files,
        contamination=contamination,
        stages={stage: record for stage, record in files.stages.items() if stage == "open"},
        runs={step: run for step, run in files.runs.items() if step != "closed"},
    )


def _telemetry(path: Path) -> Telemetry | Missing | None:
    columns = list(Telemetry.__dataclass_fields__)
    try:
        table = pq.read_table(path, columns=columns)
    except FileNotFoundError:
        return None
    except pa.ArrowInvalid as error:
        return Missing(f"{path} is not readable: {error}")
    return Telemetry(**{name: table[name].to_pylist() for name in columns})


def seconds_used(run: RunFacts | Missing) -> float | None:
    """Return the seconds used of the training budget or the stage's limit; None for a step without one."""
    if isinstance(run, FinetuneRun):
        return run.training.training_seconds if run.training else None
    return run.used_seconds if isinstance(run, StageRun) else None


def dropped_rows(path: Path, listed: int) -> dict[str, Dropped]:
    """Return every operation's dropped rows by reason, most frequent first, at most `listed` with their ids.

    Operations and reasons of all rows are held in memory, but the texts of one batch only.
    """
    if not path.exists():
        return {}
    reasons = pq.read_table(path, columns=["operation", "reason"])
    # One thread keeps the order of the rows, and sorting is stable: equal files give equal pages.
    counts = reasons.group_by(["operation", "reason"], use_threads=False).aggregate([([], "count_all")])
    counts = counts.sort_by([("count_all", "descending")])
    dropped = {}
    for operation in pc.unique(reasons["operation"]).to_pylist():
        of_operation = counts.filter(pc.field("operation") == operation)
        frequent: list[Reason] = []
        remaining = listed
        for row in of_operation.slice(0, listed).to_pylist():
            if remaining > 0:
                frequent.append(Reason(row["reason"], min(row["count_all"], remaining)))
                remaining -= frequent[-1].listed
        dropped[operation] = Dropped(pc.sum(of_operation["count_all"]).as_py(), frequent)
    _read_rows(path, {(name, reason.reason): reason for name, of in dropped.items() for reason in of.reasons})
    return dropped


def _read_rows(path: Path, reasons: dict[tuple[str, str], Reason]) -> None:
    """Fill in ids and first texts, by (operation, reason)."""
    missing = sum(reason.listed for reason in reasons.values())
    for batch in pq.ParquetFile(path).iter_batches():
        for row in batch.to_pylist():
            reason = reasons.get((row["operation"], row["reason"]))
            if reason is None or len(reason.ids) == reason.listed:
                continue
            if not reason.ids:
                reason.source = row["source"]
                reason.prompt = _shortened("\n".join([*row["history"], row["prompt"]]))
                reason.completion = _shortened(row["completion"])
            reason.ids.append(row["id"])
            missing -= 1
        if missing == 0:
            return


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"
