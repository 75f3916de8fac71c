"""The sources of a recipe, read once into batches of rows.

    <folder>/00007.arrow        batch 7
    <folder>/quarantine.jsonl   malformed records, with line and reason
    <folder>/sources.json       what was read; written last

The folder's name is the hash of what decides the rows: content of the sources' files, and how they are read.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, Protocol

import pyarrow as pa

from palio.config import DatasetRecipe, DataSource
from palio.curation.rows import BATCH_CHARACTERS, BATCH_ROWS, METADATA, ROW, columns_of, shortened
from palio.curation.source import Quarantined, SourceRow, known_fields, read_source, source_digest
from palio.curation.store import batch_file, write_batches
from palio.errors import BadInput
from palio.layout import DatasetFolder
from palio.limits import TooMuch, bounded
from palio.provenance import canonical_json, fingerprint, write_json, write_text
from palio.records import SourceReport

MANY_MALFORMED = 100_000
"""Malformed lines, each kept with its reason, after which a source that has too many is given up."""


class Progress(Protocol):
    def __call__(self, step: str, total: int | None, rows: int, /) -> None: ...


@dataclass(frozen=True)
class Sources:
    folder: Path
    key: str
    """Digest of everything that decides the rows."""
    reports: list[SourceReport]
    batches: range
    """Numbers of the batches."""


def read_sources(
    recipe: DatasetRecipe,
    team_folders: Sequence[Path],
    work: Path,
    limit: int | None,
    version: str,
    progress: Progress,
) -> Sources:
    """Read the sources into a folder of `work`, unless they have been."""
    digests = [source_digest(source, team_folders) for source in recipe.sources]
    key = fingerprint([digests, _how(recipe, limit, version)])
    folder = work / f"sources-{key[:16]}"
    if not (folder / "sources.json").exists():
        stamp = _stamp(recipe, limit, version)
        reading = _Reading(recipe.metadata_fields, limit, progress)
        batches = 0
        for batch in reading.batches(recipe.sources, digests, team_folders, recipe.max_quarantined):
            write_batches(batch_file(folder, batches), batch.schema, [batch])
            batches += 1
        if batches:
            _check_fields(recipe, reading, team_folders)
        text = "".join(canonical_json(line) + "\n" for line in reading.quarantine)
        write_text(DatasetFolder(folder).quarantine, text)
        reports = [report.model_dump(mode="json") for report in reading.reports]
        record = {"key": key, "stamp": stamp, "batches": batches, "sources": reports}
        write_json(folder / "sources.json", record)
    sources = _sources(folder)
    if not sources.batches:
        raise BadInput(
            recipe.sources[0].address, why="the sources hold no row", fix="add rows or other sources"
        )
    return sources


def find_sources(recipe: DatasetRecipe, work: Path, version: str) -> Sources | None:
    """The sources if a job has read them whole, known by sizes and times of their files: a job that only
    works ahead need not hash them all again."""
    stamp = _stamp(recipe, None, version)
    records = ((path, json.loads(path.read_text(encoding="utf-8"))) for path in work.glob("*/sources.json"))
    return next((_sources(path.parent) for path, record in records if record["stamp"] == stamp), None)


def _check_fields(recipe: DatasetRecipe, reading: _Reading, team_folders: Sequence[Path]) -> None:
    """Refuse a field that no row has; where `limit` left rows unread, say so only."""
    for index, operation in enumerate(recipe.operations):
        for name in operation.metadata_fields:
            if name in reading.seen:
                continue
            key = f"operations.{index}.field"
            if reading.limited:
                rows = sum(report.rows for report in reading.reports)
                print(f"notice: {key} is {name!r}: none of the {rows} rows read has it", file=sys.stderr)
                continue
            known = {field for source in recipe.sources for field in known_fields(source, team_folders)}
            fix = f"name one of {shortened(', '.join(sorted(known)), 1000)}"
            raise BadInput("dataset", key, name, why="no row has it", fix=fix)


def _sources(folder: Path) -> Sources:
    record = json.loads((folder / "sources.json").read_text(encoding="utf-8"))
    reports = [SourceReport.model_validate(source) for source in record["sources"]]
    return Sources(folder, record["key"], reports, range(record["batches"]))


def _how(recipe: DatasetRecipe, limit: int | None, version: str) -> Any:
    described = [
        source.model_dump(mode="json", exclude={"path"}) | {"label": source.label}
        for source in recipe.sources
    ]
    fields = [recipe.metadata_fields] if recipe.metadata_fields else []
    return [version, described, recipe.max_quarantined, limit, *fields]


def _stamp(recipe: DatasetRecipe, limit: int | None, version: str) -> str:
    files = [
        [str(file), file.stat().st_size, file.stat().st_mtime_ns]
        for source in recipe.sources
        if source.path
        for file in sorted([Path(source.path), *Path(source.path).rglob("*")])
        if file.is_file()
    ]
    return fingerprint([files, _how(recipe, limit, version)])


@dataclass
class _Reading:
    """Rows of all sources in batches, and what was set aside on the way."""

    fields: Sequence[str]
    """Of the records, to keep."""
    limit: int | None
    progress: Progress
    seen: set[str] = field(default_factory=set)
    """Those of the fields that a row has."""
    limited: bool = False
    """True if a source has more rows than were read."""
    reports: list[SourceReport] = field(default_factory=list)
    quarantine: list[dict[str, Any]] = field(default_factory=list)

    def batches(
        self,
        sources: Sequence[DataSource],
        digests: Sequence[str],
        team_folders: Sequence[Path],
        most: float,
    ) -> Iterator[pa.RecordBatch]:
        for source, digest in zip(sources, digests, strict=True):
            rows = quarantined = size = 0
            batch: list[SourceRow] = []
            metadata: list[str] = []
            for record in _within_limits(source, team_folders, self.fields):
                if isinstance(record, Quarantined):
                    quarantined += 1
                    self.quarantine.append({"source": source.label, **record.__dict__})
                    if quarantined % MANY_MALFORMED == 0 and quarantined > most * (rows + quarantined):
                        break  # a file of nothing else is not read to its end
                    continue
                if rows == self.limit:
                    self.limited = True
                    break
                rows += 1
                batch.append(record)
                size += sum(map(len, record.turns)) + len(record.id)
                if self.fields:
                    metadata.append(self._metadata(record))
                    size += len(metadata[-1])
                if len(batch) == BATCH_ROWS or size > BATCH_CHARACTERS:
                    yield _record_batch(source, batch, metadata)
                    self.progress(f"0 read {source.label}", None, len(batch))
                    batch, metadata, size = [], [], 0
            if batch:
                yield _record_batch(source, batch, metadata)
            if quarantined > most * (rows + quarantined):
                share = f"{quarantined} of {rows + quarantined} lines are malformed"
                self._refuse(source, f"{share}, more than max_quarantined = {most:g}")
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

    def _metadata(self, record: SourceRow) -> str:
        self.seen.update(record.metadata)
        return json.dumps(record.metadata)

    def _refuse(self, source: DataSource, why: str) -> NoReturn:
        first = next(line for line in self.quarantine if line["source"] == source.label)
        fix = f"{why}: correct the file or its format"
        raise BadInput(source.address, f"line {first['line']}", why=first["reason"], fix=fix)


def _within_limits(
    source: DataSource, team_folders: Sequence[Path], fields: Sequence[str]
) -> Iterator[SourceRow | Quarantined]:
    """Read a source. Raises BadInput for a record, or its template, that takes too much time or memory."""
    line = 0
    try:
        with bounded(total=math.inf) as watched:
            for record in watched(read_source(source, team_folders, fields)):
                line = record.line
                yield record
    except TooMuch as error:
        key = "template" if source.template else f"record {line + 1}"
        fix = "correct the template" if source.template else "split the file into smaller records"
        raise BadInput(source.address, key, why=f"takes too much: {error}", fix=fix) from None


def _record_batch(source: DataSource, rows: Sequence[SourceRow], metadata: Sequence[str]) -> pa.RecordBatch:
    """Return rows as a batch, with a column of their metadata if there is any to keep."""
    count = len(rows)
    columns = {
        **columns_of([row.turns for row in rows]),
        "source": [source.label] * count,
        "id": [row.id for row in rows],
        "licence": [source.licence] * count,
        "generator": [source.generator] * count,
        "score": [row.score for row in rows],
    }
    if not metadata:
        return pa.RecordBatch.from_pydict(columns, schema=ROW)
    columns[METADATA.name] = metadata
    return pa.RecordBatch.from_pydict(columns, schema=ROW.append(METADATA))
