"""Reading sources: records become rows, malformed ones are set aside with a reason."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from palio.config import DataSource
from palio.curation.files import Numbered, file_records, hub_records
from palio.curation.formats import format_of, is_missing
from palio.curation.metadata import field_names, metadata_of
from palio.curation.rows import Malformed, Record, Turns
from palio.errors import BadInput
from palio.incoming import Incoming
from palio.provenance import fingerprint

LOOKED_AT = 100
"""Records whose fields are named where a recipe names another."""


class SourceRow(NamedTuple):  # made faster than a dataclass, and there are millions
    line: int
    """Where its record begins, from 1; of arrays, Parquet and datasets the record."""
    turns: Turns
    id: str
    score: float | None
    metadata: Mapping[str, Any]
    """Fields of the record that were asked for and are there."""


@dataclass(frozen=True)
class Quarantined:
    line: int
    reason: str
    excerpt: str


def source_digest(source: DataSource, team_folders: Sequence[Path]) -> str:
    """Return what the source's rows depend on: content of its files, or the address of a pinned hub dataset.

    Raises:
        BadInput: there is no such file.
        RuleViolation: it is not a plain file or folder below one of `team_folders`.
    """
    if source.path is None:
        return fingerprint([source.hub, source.config, source.split])
    try:
        return Incoming.locate(Path(source.path), team_folders).sha256()
    except (FileNotFoundError, NotADirectoryError):
        raise BadInput(
            source.path, why="no such file", fix="correct dataset.sources, or fetch it again"
        ) from None


def source_records(source: DataSource, team_folders: Sequence[Path]) -> Iterator[Numbered]:
    """Yield the records of a source as it has them.

    Raises:
        BadInput: the source is absent, of an unknown type, or broken as a whole.
        RuleViolation: it is not a plain file or folder below one of `team_folders`.
    """
    if source.path is None:
        return hub_records(source)
    return file_records(Incoming.locate(Path(source.path), team_folders))


def read_source(
    source: DataSource, team_folders: Sequence[Path], fields: Sequence[str] = ()
) -> Iterator[SourceRow | Quarantined]:
    """Yield every record of the source as a row (of some formats as several) or, with the reason, as a
    quarantined one. Rows have the `fields` of their record as metadata.

    Raises:
        BadInput, RuleViolation: as `source_records`.
    """
    rows_of, gather = format_of(source)
    may_be_blank = ("prompt",) if source.format == "text" else ()
    records = source_records(source, team_folders)
    seen: set[bytes] = set()
    for line, record in gather(records) if gather else records:
        if isinstance(record, Malformed):
            yield Quarantined(line, str(record), "")
            continue
        try:
            found = rows_of(record)
            score = _score(record, source.score)
            metadata = metadata_of(record, fields) if fields else {}
            name = _id(record, source.id) or f"{source.label}:{line}"
            rows = [
                SourceRow(line, turns, name if len(found) == 1 else f"{name}.{number}", score, metadata)
                for number, turns in enumerate(found, start=1)
            ]
            digests = [_checked(row, seen, may_be_blank) for row in rows]
        except Malformed as fault:
            yield Quarantined(line, str(fault), json.dumps(record, ensure_ascii=True, default=str)[:200])
        except UnicodeEncodeError:
            yield Quarantined(line, "has half a surrogate pair, which is no text", "")
        else:
            seen.update(digests)
            yield from rows


def known_fields(source: DataSource, team_folders: Sequence[Path]) -> list[str]:
    """Return the names of the fields that the first `LOOKED_AT` records have. Raises as `source_records`."""
    gather = format_of(source).gather
    records = source_records(source, team_folders)
    first = islice(gather(records) if gather else records, LOOKED_AT)
    found = [field_names(record) for _, record in first if not isinstance(record, Malformed)]
    return list(dict.fromkeys(name for names in found for name in names))


def _id(record: Record, key: str) -> str:
    """Return the record's id; empty if it has none, or one that is blank."""
    value = record.get(key) if key else None
    return "" if is_missing(value) or not str(value).strip() else str(value)


def _checked(row: SourceRow, seen: set[bytes], may_be_blank: Sequence[str]) -> bytes:
    """Return the digest of a row's id. Raises Malformed or UnicodeEncodeError for what is no row."""
    digest = blake2b(row.id.encode(), digest_size=16).digest()
    if digest in seen:
        raise Malformed(f'duplicate id {row.id!r}; if it is no id, set id: "" for the source')
    for place, text in enumerate(row.turns):
        side = ("prompt", "completion")[place % 2]
        if not text.strip() and side not in may_be_blank:
            raise Malformed(f"{side} is empty")
        text.encode()
    return digest


def _score(record: Record, key: str | None) -> float | None:
    value = record.get(key) if key else None
    if key is None or (isinstance(value, int | float) and math.isfinite(value)):
        return value
    raise Malformed(f"{key} is no number")
