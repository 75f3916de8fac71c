"""From a recipe to a dataset: read the sources, apply the operations in order, shuffle, account.

    <out>/quarantine.jsonl   malformed lines of the sources, with line and reason
    <out>/dropped.parquet    every row that an operation dropped, with operation and reason
    <out>/train.parquet      the dataset, shuffled
    <out>/card.md            what a reader needs to know of it
    <out>/manifest.json      DatasetManifest, written last

Between two operations the rows lie in a file of the work folder, named by the hash of everything that
decides its content. So an operation holds a batch of rows in memory, and a rerun (after a crash, or with
another last operation) starts behind the last operation whose result is there.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc

from palio.config import (
    DatasetRecipe,
    DataSource,
    Decontaminate,
    DropSemanticDuplicates,
    Operation,
    TokenLength,
)
from palio.curation.card import card
from palio.curation.dataset import EXAMPLES, write_dropped, write_shuffled
from palio.curation.operations import JUDGES
from palio.curation.rows import (
    BATCH_CHARACTERS,
    BATCH_ROWS,
    DROPPED,
    ROW,
    Batch,
    Surroundings,
    Verdict,
    asked,
    columns_of,
    shortened,
    texts_of,
)
from palio.curation.source import Quarantined, SourceRow, read_source, source_digest
from palio.curation.store import Pool, StoredRows, Tick, pool, write_batches
from palio.errors import BadInput
from palio.provenance import (
    atomic_path,
    canonical_json,
    file_sha256,
    fingerprint,
    folder_sha256,
    write_json,
    write_text,
)
from palio.records import DatasetManifest, OperationReport, SourceReport

RECIPE_VERSION = "3"
"""Raised when equal recipes give other rows than before."""


class Progress(Protocol):
    def __call__(self, step: str, total: int | None, rows: int, /) -> None: ...


def _silent(step: str, total: int | None, rows: int, /) -> None: ...


def curate_dataset(
    recipe: DatasetRecipe,
    *,
    base_model: Path,
    competition: str,
    track: str,
    entry: str,
    out: Path,
    base: Path = Path(),
    work: Path | None = None,
    limit: int | None = None,
    workers: int = 1,
    progress: Progress = _silent,
) -> DatasetManifest:
    """Curate the dataset of one entry into the folder `out`.

    Args:
        base_model: model folder of the entry's base model, for its tokenizer.
        base: folder that paths in the recipe are relative to.
        work: folder of the intermediate files, kept for reruns; default: work/curate beside `out`.
        limit: rows to read of each source, for a preview; omit to read all.
        workers: processes that look at rows; no part of the result.
        progress: called with the operation under way, rows in all where known, and rows just seen.

    Raises:
        BadInput: a source is absent or broken, too much of it is malformed, or no row is left.
    """
    work = work or out.parent / "work" / "curate"
    around = Surroundings(base_model=base_model, base=base, seed=recipe.seed, scratch=work)
    sources, steps = _read_sources(recipe, base, work, limit, progress), []
    rows, count = sources.folder, sum(source.rows for source in sources.reports)
    key = sources.key
    with pool(workers) as processes:
        for place, operation in enumerate(recipe.operations):
            key = fingerprint(
                [key, recipe.seed, operation.model_dump(mode="json"), _content(operation, around)]
            )
            tick = partial(progress, f"{place + 1} {operation.op}", count)
            step = _apply(operation, place, key, rows, work, around, processes, tick)
            if step.report.rows_out == 0:
                fix = f"dropped the last of {step.report.rows_in} rows; loosen it or add sources"
                raise BadInput(f"entry {entry}", f"dataset.operations.{place}", operation.op, fix)
            steps.append(step)
            rows, count = step.folder, step.report.rows_out
    _remove_others(work, {sources.folder, *(step.folder for step in steps)})

    write_text(out / "quarantine.jsonl", (sources.folder / "quarantine.jsonl").read_text(encoding="utf-8"))
    write_dropped([step.folder / "dropped.arrow" for step in steps], out / "dropped.parquet")
    written = write_shuffled(rows / "rows.arrow", out / "train.parquet", recipe.seed, scratch=work)
    manifest = DatasetManifest(
        competition=competition,
        track=track,
        entry=entry,
        recipe_version=RECIPE_VERSION,
        seed=recipe.seed,
        rows=written.rows,
        sha256=file_sha256(out / "train.parquet"),
        sources=sources.reports,
        operations=[step.report for step in steps],
        rows_by_source=dict(sorted(written.by_source.items())),
        characters=written.characters(),
    )
    write_text(out / "card.md", card(manifest, written.examples))
    manifest.write(out / "manifest.json")
    return manifest


# --- the work folder ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sources:
    folder: Path
    key: str
    reports: list[SourceReport]


@dataclass(frozen=True)
class _Step:
    folder: Path
    report: OperationReport


def _remove_others(work: Path, kept: set[Path]) -> None:
    """Results of earlier recipes, and nothing else that may lie there."""
    for folder in work.iterdir():
        if folder not in kept and re.fullmatch(r"(sources|\d\d-\w+)-[0-9a-f]{16}", folder.name):
            shutil.rmtree(folder)


def _start(folder: Path) -> None:
    """An empty folder, whatever a killed run left in it."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


# --- sources --------------------------------------------------------------------------------------


def _read_sources(
    recipe: DatasetRecipe, base: Path, work: Path, limit: int | None, progress: Progress
) -> _Sources:
    digests = [source_digest(source, base) for source in recipe.sources]
    described = [
        source.model_dump(mode="json", exclude={"path"}) | {"label": source.label}
        for source in recipe.sources
    ]
    key = fingerprint([RECIPE_VERSION, digests, described, recipe.max_quarantined, limit])
    folder = work / f"sources-{key[:16]}"
    report = folder / "report.json"
    if not report.exists():
        _start(folder)
        reading = _Reading(limit, progress)
        batches = reading.batches(recipe.sources, digests, base, recipe.max_quarantined)
        write_batches(folder / "rows.arrow", ROW, batches)
        text = "".join(canonical_json(line) + "\n" for line in reading.quarantine)
        write_text(folder / "quarantine.jsonl", text)
        write_json(report, [source.model_dump(mode="json") for source in reading.reports])
    reports = [
        SourceReport.model_validate(source) for source in json.loads(report.read_text(encoding="utf-8"))
    ]
    if not any(source.rows for source in reports):
        fix = "the sources hold no row; add rows or other sources"
        raise BadInput(recipe.sources[0].address, "", None, fix)
    return _Sources(folder, key, reports)


@dataclass
class _Reading:
    """Rows of all sources in batches, and what was set aside on the way."""

    limit: int | None
    progress: Progress
    reports: list[SourceReport] = field(default_factory=list)
    quarantine: list[dict[str, Any]] = field(default_factory=list)

    def batches(
        self, sources: Sequence[DataSource], digests: Sequence[str], base: Path, most: float
    ) -> Iterator[pa.RecordBatch]:
        for source, digest in zip(sources, digests, strict=True):
            rows = quarantined = size = 0
            batch: list[SourceRow] = []
            for record in read_source(source, base):
                if isinstance(record, Quarantined):
                    quarantined += 1
                    self.quarantine.append({"source": source.label, **record.__dict__})
                    continue
                if rows == self.limit:
                    break
                rows += 1
                batch.append(record)
                size += sum(map(len, record.turns))
                if len(batch) == BATCH_ROWS or size > BATCH_CHARACTERS:
                    yield _record_batch(source, batch)
                    self.progress(f"0 read {source.label}", None, len(batch))
                    batch, size = [], 0
            if batch:
                yield _record_batch(source, batch)
            if quarantined > most * (rows + quarantined):
                first = next(line for line in self.quarantine if line["source"] == source.label)
                share = f"{quarantined} of {rows + quarantined} lines are malformed"
                limit = f"more than max_quarantined = {most:g}"
                fix = f"{first['reason']}; {share}, {limit}: correct the file or its format"
                raise BadInput(source.address, f"line {first['line']}", None, fix)
            self.reports.append(
                SourceReport(
                    name=source.label,
                    sha256=digest,
                    revision=source.revision,
                    licence=source.licence,
                    generator=source.generator,
                    rows=rows,
                    quarantined=quarantined,
                )
            )


def _record_batch(source: DataSource, rows: Sequence[SourceRow]) -> pa.RecordBatch:
    count = len(rows)
    columns = {
        **columns_of([row.turns for row in rows]),
        "source": [source.label] * count,
        "id": [row.id for row in rows],
        "licence": [source.licence] * count,
        "generator": [source.generator] * count,
        "score": [row.score for row in rows],
    }
    return pa.RecordBatch.from_pydict(columns, schema=ROW)


# --- operations -----------------------------------------------------------------------------------


def _content(operation: Operation, around: Surroundings) -> str | None:
    """Digest of a file that decides the operation's result beside its settings."""
    if isinstance(operation, Decontaminate):
        path = around.base / operation.instances
        if not path.is_file():
            raise BadInput(path, "", None, "no such table of instances; prepare the open stage first")
        return file_sha256(path)
    if isinstance(operation, DropSemanticDuplicates):
        return fingerprint(folder_sha256(around.base / operation.model))
    if isinstance(operation, TokenLength):
        files = sorted(around.base_model.glob("token*"))
        if not files:
            fix = "no tokenizer there for token_length; fetch the base model first"
            raise BadInput(around.base_model, "", None, fix)
        return fingerprint({path.name: file_sha256(path) for path in files})
    return None


def _apply(
    operation: Operation,
    place: int,
    key: str,
    rows: Path,
    work: Path,
    around: Surroundings,
    processes: Pool,
    tick: Tick,
) -> _Step:
    """Apply one operation to the rows of the folder `rows`, unless its result is there already."""
    folder = work / f"{place:02}-{operation.op}-{key[:16]}"
    report = folder / "report.json"
    if report.exists():
        return _Step(folder, OperationReport.model_validate_json(report.read_text(encoding="utf-8")))
    stored = StoredRows(rows / "rows.arrow", processes, tick)
    verdicts = JUDGES[operation.op](operation, stored, around)
    _start(folder)
    with atomic_path(folder / "dropped.arrow") as temporary, pa.ipc.new_file(temporary, DROPPED) as writer:
        account = _Account(operation, place, writer)
        write_batches(folder / "rows.arrow", ROW, account.kept(zip(stored, verdicts, strict=True)))
    write_json(report, account.report().model_dump(mode="json"))
    return _Step(folder, account.report())


@dataclass
class _Account:
    """Carries an operation's verdicts out and counts them."""

    operation: Operation
    place: int
    dropped: pa.ipc.RecordBatchFileWriter
    rows_in: int = 0
    rows_out: int = 0
    changed: int = 0
    by_source: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def kept(self, judged: Iterator[tuple[Batch, Verdict]]) -> Iterator[pa.RecordBatch]:
        for batch, verdict in judged:
            before, after = batch.table, verdict.rewritten or batch.table
            self.rows_in += before.num_rows
            reasons = [reason for reason in verdict.reasons if reason is not None]
            if reasons:
                drop = pa.array([reason is not None for reason in verdict.reasons])
                self._drop(before.filter(drop), reasons)
                keep = pc.invert(drop)
                before, after = before.filter(keep), after.filter(keep)
            if verdict.rewritten:
                self._count_changed(before, after)
            self.rows_out += after.num_rows
            if after.num_rows:
                yield after

    def _drop(self, rows: pa.RecordBatch, reasons: list[str]) -> None:
        """Dropped rows are kept as they came in."""
        self.by_source.update(rows["source"].to_pylist())
        name = pa.array([f"{self.place + 1} {self.operation.op}"] * rows.num_rows)
        self.dropped.write_batch(
            pa.RecordBatch.from_arrays([*rows.columns, name, pa.array(reasons)], schema=DROPPED)
        )
        shown = rows.slice(0, EXAMPLES - len(self.examples)).to_pylist()
        for row, why in zip(shown, reasons, strict=False):
            self.examples.append(f"{why}: {shortened(asked(row))} → {shortened(row['completion'], 40)}")

    def _count_changed(self, before: pa.RecordBatch, after: pa.RecordBatch) -> None:
        differs = pc.not_equal(texts_of(before), texts_of(after))
        self.changed += pc.sum(differs).as_py() or 0
        old, new = (
            Batch(rows.filter(differs).slice(0, EXAMPLES - len(self.examples))).turns
            for rows in (before, after)
        )
        for pairs in map(zip, old, new):
            one, other = next((one, other) for one, other in pairs if one != other)
            self.examples.append(f"{ascii(one)[:80]} → {ascii(other)[:80]}")

    def report(self) -> OperationReport:
        return OperationReport(
            op=self.operation.op,
            settings=self.operation.model_dump(mode="json", exclude={"op"}),
            rows_in=self.rows_in,
            rows_out=self.rows_out,
            changed=self.changed,
            dropped_by_source=dict(sorted(self.by_source.items())),
            examples=self.examples,
        )
