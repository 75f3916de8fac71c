"""What the workflow left of one entry. Whatever is not there is a `Missing` with the reason."""

from __future__ import annotations

from dataclasses import dataclass, field
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

LONGEST_TEXT = 240
"""Characters shown of a row's prompt or completion."""


@dataclass(frozen=True)
class Missing:
    """Why there is nothing to show."""

    reason: str


@dataclass
class Reason:
    """Rows dropped for one reason. Of duplicates one cluster: the reason names the row that was kept."""

    reason: str
    listed: int
    """How many of them `ids` holds."""
    source: str = ""
    prompt: str = ""
    completion: str = ""
    """Of the first of them, shortened."""
    ids: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Dropped:
    """What one operation dropped."""

    rows: int
    reasons: list[Reason]
    """Most frequent first; of a large dataset only those."""

    @property
    def listed(self) -> int:
        return sum(one.listed for one in self.reasons)


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
    check: Check | Missing
    dataset: DatasetManifest | Missing
    dropped: dict[str, Dropped]
    """By operation ("2 drop_refusals")."""
    contamination: Contamination | Missing
    adapter: AdapterManifest | Missing
    telemetry: Telemetry | Missing
    package: PackageManifest | Missing
    probe: ProbeReport | Missing
    stages: dict[str, StageRecord | Missing]
    runs: dict[str, RunFacts | Missing]
    """The sidecars: what each step took."""


def read_entry(folder: EntryFolder, why_missing: str, listed: int) -> EntryFiles:
    """Read an entry's folder.

    Args:
        why_missing: the reason for what is not there.
        listed: dropped rows to name, per operation.
    """
    found = _Reader(folder, why_missing)
    return EntryFiles(
        check=found.record(Check, folder.check),
        dataset=found.record(DatasetManifest, folder.dataset.manifest),
        dropped=dropped_rows(folder.dataset.dropped, listed),
        contamination=found.record(Contamination, folder.contamination),
        adapter=found.record(AdapterManifest, folder.adapter_manifest),
        telemetry=found.telemetry(),
        package=found.record(PackageManifest, folder.package_manifest),
        probe=found.record(ProbeReport, folder.probe),
        stages={stage: found.record(StageRecord, folder.stage_record(stage)) for stage in STAGES},
        runs={
            step.name: found.record(step.facts, folder.run_facts(step.name)) for step in STEPS if step.facts
        },
    )


@dataclass(frozen=True)
class _Reader:
    folder: EntryFolder
    why_missing: str

    def record(self, model: type[AnyRecord], path: Path) -> AnyRecord | Missing:
        if not path.exists():
            return Missing(self.why_missing)
        try:
            return read_record(model, path)
        except BadInput as error:
            return Missing(str(error))

    def telemetry(self) -> Telemetry | Missing:
        path = self.folder.telemetry
        columns = list(Telemetry.__dataclass_fields__)
        try:
            table = pq.read_table(path, columns=columns)
        except FileNotFoundError:
            return Missing(self.why_missing)
        except pa.ArrowInvalid as error:
            return Missing(f"{path} is not readable: {error}")
        return Telemetry(**{name: table[name].to_pylist() for name in columns})


def seconds_used(run: RunFacts | Missing) -> float | None:
    """Return the seconds used of the training budget or the stage's limit; None for a step without one."""
    if isinstance(run, FinetuneRun):
        return run.training.training_seconds if run.training else None
    return run.used_seconds if isinstance(run, StageRun) else None


def dropped_rows(path: Path, listed: int) -> dict[str, Dropped]:
    """Every operation's dropped rows by reason, most frequent first; beyond `listed` rows only counted.

    In memory are the operations and reasons of all rows, and the texts of a batch.
    """
    if not path.exists():
        return {}
    reasons = pq.read_table(path, columns=["operation", "reason"])
    # One thread keeps the order of the rows, and sorting is stable: equal files give equal pages.
    counts = reasons.group_by(["operation", "reason"], use_threads=False).aggregate([([], "count_all")])
    counts = counts.sort_by([("count_all", "descending")])
    found = {}
    for operation in pc.unique(reasons["operation"]).to_pylist():
        of = counts.filter(pc.field("operation") == operation)
        kept: list[Reason] = []
        left = listed
        for reason, count in zip(
            of["reason"].to_pylist()[:listed], of["count_all"].to_pylist(), strict=False
        ):
            if left > 0:
                kept.append(Reason(reason, min(count, left)))
                left -= kept[-1].listed
        found[operation] = Dropped(pc.sum(of["count_all"]).as_py(), kept)
    _fill(path, {(operation, one.reason): one for operation, of in found.items() for one in of.reasons})
    return found


def _fill(path: Path, wanted: dict[tuple[str, str], Reason]) -> None:
    missing = sum(one.listed for one in wanted.values())
    for batch in pq.ParquetFile(path).iter_batches():
        for row in batch.to_pylist():
            one = wanted.get((row["operation"], row["reason"]))
            if one is None or len(one.ids) == one.listed:
                continue
            if not one.ids:
                one.source = row["source"]
                one.prompt = _shortened("\n".join([*row["history"], row["prompt"]]))
                one.completion = _shortened(row["completion"])
            one.ids.append(row["id"])
            missing -= 1
        if missing == 0:
            return


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - 1] + "…"
