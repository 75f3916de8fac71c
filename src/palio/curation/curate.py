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
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.ipc
import pyarrow.parquet as pq

from palio.config import DatasetRecipe, DataSource, Decontaminate, Operation, TokenLength
from palio.curation.card import card
from palio.curation.operations import JUDGES
from palio.curation.rows import BATCH_ROWS, DROPPED, ROW, Batch, Surroundings, Verdict, shortened
from palio.curation.source import Quarantined, SourceRow, read_source
from palio.errors import BadInput
from palio.provenance import atomic_path, canonical_json, file_sha256, fingerprint, write_json, write_text
from palio.records import DatasetManifest, OperationReport, SourceReport

RECIPE_VERSION = "1"
"""Raised when equal recipes give other rows than before."""
EXAMPLES = 3


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
) -> DatasetManifest:
    """Curate the dataset of one entry into the folder `out`.

    Args:
        base_model: model folder of the entry's base model, for its tokenizer.
        base: folder that paths in the recipe are relative to.
        work: folder of the intermediate files, kept for reruns; default: work/curate beside `out`.
        limit: rows to read of each source, for a preview; omit to read all.

    Raises:
        BadInput: a source is absent or broken, too much of it is malformed, or no row is left.
    """
    work = work or out.parent / "work" / "curate"
    around = Surroundings(base_model=base_model, base=base, seed=recipe.seed)
    sources, steps = _read_sources(recipe, base, work, limit), []
    rows = sources.folder
    key = sources.key
    for place, operation in enumerate(recipe.operations):
        key = fingerprint([key, recipe.seed, operation.model_dump(mode="json"), _content(operation, around)])
        step = _apply(operation, place, key, rows, work, around)
        if step.report.rows_out == 0:
            fix = f"dropped the last of {step.report.rows_in} rows; loosen it or add sources"
            raise BadInput(f"entry {entry}", f"dataset.operations.{place}", operation.op, fix)
        steps.append(step)
        rows = step.folder
    _remove_others(work, {sources.folder, *(step.folder for step in steps)})

    write_text(out / "quarantine.jsonl", (sources.folder / "quarantine.jsonl").read_text(encoding="utf-8"))
    _write_dropped(steps, out / "dropped.parquet")
    table = _shuffled(rows / "rows.arrow", recipe.seed)
    with atomic_path(out / "train.parquet") as temporary:
        pq.write_table(table, temporary, compression="zstd", row_group_size=BATCH_ROWS)
    manifest = DatasetManifest(
        competition=competition,
        track=track,
        entry=entry,
        recipe_version=RECIPE_VERSION,
        seed=recipe.seed,
        rows=table.num_rows,
        sha256=file_sha256(out / "train.parquet"),
        sources=sources.reports,
        operations=[step.report for step in steps],
        rows_by_source=_by_source(table["source"].to_pylist()),
        characters={name: _length_histogram(table[name]) for name in ("prompt", "completion")},
    )
    write_text(out / "card.md", card(manifest, table.slice(0, EXAMPLES).to_pylist()))
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
    """Results of earlier recipes."""
    for folder in work.iterdir():
        if folder not in kept:
            shutil.rmtree(folder)


def _start(folder: Path) -> None:
    """An empty folder, whatever a killed run left in it."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _write_rows(path: Path, schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> None:
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with atomic_path(path) as temporary, pa.ipc.new_file(temporary, schema, options=options) as writer:
        for batch in batches:
            writer.write_batch(batch)


def _read_batches(path: Path) -> Iterator[pa.RecordBatch]:
    with pa.memory_map(str(path)) as file, pa.ipc.open_file(file) as reader:
        for number in range(reader.num_record_batches):
            yield reader.get_batch(number)


# --- sources --------------------------------------------------------------------------------------


def _read_sources(recipe: DatasetRecipe, base: Path, work: Path, limit: int | None) -> _Sources:
    paths = [base / source.path for source in recipe.sources]
    for path in paths:
        if not path.is_file():
            raise BadInput(path, "", None, "no such file; correct dataset.sources, or fetch it again")
    digests = [file_sha256(path) for path in paths]
    described = [
        source.model_dump(mode="json", exclude={"path"}) | {"label": source.label}
        for source in recipe.sources
    ]
    key = fingerprint([RECIPE_VERSION, digests, described, recipe.max_quarantined, limit])
    folder = work / f"sources-{key[:16]}"
    report = folder / "report.json"
    if not report.exists():
        _start(folder)
        reading = _Reading(limit)
        batches = reading.batches(recipe.sources, paths, digests, recipe.max_quarantined)
        _write_rows(folder / "rows.arrow", ROW, batches)
        text = "".join(canonical_json(line) + "\n" for line in reading.quarantine)
        write_text(folder / "quarantine.jsonl", text)
        write_json(report, [source.model_dump(mode="json") for source in reading.reports])
    reports = [
        SourceReport.model_validate(source) for source in json.loads(report.read_text(encoding="utf-8"))
    ]
    if not any(source.rows for source in reports):
        raise BadInput(paths[0], "", None, "the sources hold no row; add rows or other sources")
    return _Sources(folder, key, reports)


@dataclass
class _Reading:
    """Rows of all sources in batches, and what was set aside on the way."""

    limit: int | None
    reports: list[SourceReport] = field(default_factory=list)
    quarantine: list[dict[str, Any]] = field(default_factory=list)

    def batches(
        self, sources: Sequence[DataSource], paths: Sequence[Path], digests: Sequence[str], most: float
    ) -> Iterator[pa.RecordBatch]:
        for source, path, digest in zip(sources, paths, digests, strict=True):
            rows = quarantined = 0
            batch: list[SourceRow] = []
            for record in read_source(source, path):
                if isinstance(record, Quarantined):
                    quarantined += 1
                    self.quarantine.append({"source": source.label, **record.__dict__})
                    continue
                if rows == self.limit:
                    break
                rows += 1
                batch.append(record)
                if len(batch) == BATCH_ROWS:
                    yield _record_batch(source, batch)
                    batch = []
            if batch:
                yield _record_batch(source, batch)
            if quarantined > most * (rows + quarantined):
                first = next(line for line in self.quarantine if line["source"] == source.label)
                share = f"{quarantined} of {rows + quarantined} lines are malformed"
                limit = f"more than max_quarantined = {most:g}"
                fix = f"{first['reason']}; {share}, {limit}: correct the file or its format"
                raise BadInput(path, f"line {first['line']}", None, fix)
            self.reports.append(
                SourceReport(
                    name=source.label,
                    sha256=digest,
                    licence=source.licence,
                    generator=source.generator,
                    rows=rows,
                    quarantined=quarantined,
                )
            )


def _record_batch(source: DataSource, rows: Sequence[SourceRow]) -> pa.RecordBatch:
    count = len(rows)
    columns = [
        [row.prompt for row in rows],
        [row.completion for row in rows],
        [source.label] * count,
        [row.id for row in rows],
        [source.licence] * count,
        [source.generator] * count,
    ]
    arrays = [pa.array(column, type=field.type) for column, field in zip(columns, ROW, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=ROW)


# --- operations -----------------------------------------------------------------------------------


def _content(operation: Operation, around: Surroundings) -> str | None:
    """Digest of a file that decides the operation's result beside its settings."""
    if isinstance(operation, Decontaminate):
        path = around.base / operation.instances
        if not path.is_file():
            raise BadInput(path, "", None, "no such table of instances; prepare the open stage first")
        return file_sha256(path)
    if isinstance(operation, TokenLength):
        return fingerprint(
            {path.name: file_sha256(path) for path in sorted(around.base_model.glob("token*"))}
        )
    return None


def _apply(operation: Operation, place: int, key: str, rows: Path, work: Path, around: Surroundings) -> _Step:
    """Apply one operation to the rows of the folder `rows`, unless its result is there already."""
    folder = work / f"{place:02}-{operation.op}-{key[:16]}"
    report = folder / "report.json"
    if report.exists():
        return _Step(folder, OperationReport.model_validate_json(report.read_text(encoding="utf-8")))

    def batches() -> Iterator[Batch]:
        for batch in _read_batches(rows / "rows.arrow"):
            texts = (batch.column(name).to_pylist() for name in ("prompt", "completion", "source", "id"))
            yield Batch(*texts)

    account = _Account(operation, place)
    verdicts = JUDGES[operation.op](operation, batches, around)
    judged = account.kept(zip(_read_batches(rows / "rows.arrow"), verdicts, strict=True))
    _start(folder)
    with atomic_path(folder / "dropped.arrow") as temporary, pa.ipc.new_file(temporary, DROPPED) as writer:
        account.dropped = writer
        _write_rows(folder / "rows.arrow", ROW, judged)
    write_json(report, account.report().model_dump(mode="json"))
    return _Step(folder, account.report())


@dataclass
class _Account:
    """Carries an operation's verdicts out and counts them."""

    operation: Operation
    place: int
    dropped: pa.ipc.RecordBatchFileWriter | None = None
    rows_in: int = 0
    rows_out: int = 0
    changed: int = 0
    by_source: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def kept(self, judged: Iterator[tuple[pa.RecordBatch, Verdict]]) -> Iterator[pa.RecordBatch]:
        for before, verdict in judged:
            after = before
            for name, texts in (("prompt", verdict.prompts), ("completion", verdict.completions)):
                if texts is not None:
                    after = after.set_column(ROW.get_field_index(name), ROW.field(name), pa.array(texts))
            keep = pa.array([reason is None for reason in verdict.reasons])
            self.changed += self._rewritten(before.filter(keep), after.filter(keep))
            self._drop(before.filter(pa.compute.invert(keep)), verdict)
            left = after.filter(keep)
            self.rows_in += before.num_rows
            self.rows_out += left.num_rows
            if left.num_rows:
                yield left

    def _drop(self, rows: pa.RecordBatch, verdict: Verdict) -> None:
        """Dropped rows are kept as they came in."""
        if not rows.num_rows:
            return
        assert self.dropped is not None
        reasons = [reason for reason in verdict.reasons if reason is not None]
        self.by_source.update(rows["source"].to_pylist())
        name = pa.array([f"{self.place + 1} {self.operation.op}"] * rows.num_rows)
        self.dropped.write_batch(
            pa.RecordBatch.from_arrays([*rows.columns, name, pa.array(reasons)], schema=DROPPED)
        )
        for prompt, completion, why in zip(rows["prompt"], rows["completion"], reasons, strict=False):
            self._example(f"{why}: {shortened(str(prompt))} → {shortened(str(completion), 40)}")

    def _rewritten(self, before: pa.RecordBatch, after: pa.RecordBatch) -> int:
        columns = [(before[name].to_pylist(), after[name].to_pylist()) for name in ("prompt", "completion")]
        changed = set()
        for old, new in columns:
            for row, (one, other) in enumerate(zip(old, new, strict=True)):
                if one != other:
                    changed.add(row)
                    self._example(f"{ascii(one)[:80]} → {ascii(other)[:80]}")
        return len(changed)

    def _example(self, text: str) -> None:
        if len(self.examples) < EXAMPLES:
            self.examples.append(text)

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


# --- results --------------------------------------------------------------------------------------


def _write_dropped(steps: Sequence[_Step], path: Path) -> None:
    with atomic_path(path) as temporary, pq.ParquetWriter(temporary, DROPPED, compression="zstd") as writer:
        for step in steps:
            for batch in _read_batches(step.folder / "dropped.arrow"):
                writer.write_batch(batch)


def _shuffled(path: Path, seed: int) -> pa.Table:
    table = pa.Table.from_batches(_read_batches(path), schema=ROW)
    order = np.random.default_rng(seed).permutation(table.num_rows)
    return table.take(pa.array(order)).combine_chunks()


def _by_source(names: Sequence[str]) -> dict[str, int]:
    return dict(sorted(Counter(names).items()))


def _length_histogram(texts: pa.ChunkedArray) -> list[int]:
    """Counts of lengths of 0, 1, 2-3, 4-7, … characters."""
    bins = Counter(length.bit_length() for length in pa.compute.utf8_length(texts).to_pylist())
    return [bins[number] for number in range(max(bins, default=0) + 1)]
