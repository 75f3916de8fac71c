"""Fields of the records that outlive reading: those that an operation of the recipe looks at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from palio.curation.formats import is_missing
from palio.curation.rows import Record

DEPTH = 4
"""Records inside records whose fields are named."""


def metadata_of(record: Record, fields: Sequence[str]) -> dict[str, Any]:
    """Return the values of these fields: texts, numbers, true and false, and lists of them. Missing ones are
    left out."""
    values = {field: _plain(_value(record, field)) for field in fields}
    return {field: value for field, value in values.items() if not is_missing(value)}


def field_names(record: Record, prefix: str = "") -> Iterator[str]:
    """Yield the names of a record's fields, of records inside with dots."""
    for key, value in record.items():
        if not isinstance(value, Mapping):
            yield f"{prefix}{key}"
        elif prefix.count(".") < DEPTH:
            yield from field_names(value, f"{prefix}{key}.")


def _value(record: Any, field: str) -> Any:
    """Return the value under a key or, along dots, under keys of records inside; None if there is none."""
    if not isinstance(record, Mapping):
        return None
    if field in record:
        return record[field]
    head, _, rest = field.partition(".")
    return _value(record.get(head), rest) if rest else None


def _plain(value: Any) -> Any:
    """Return a value as JSON has it, a date for example as text; None for a record."""
    if isinstance(value, list):
        items = (_plain(item) for item in value if not isinstance(item, list))
        return [item for item in items if not is_missing(item)]
    if value is None or isinstance(value, Mapping):
        return None
    return value if isinstance(value, str | int | float) else str(value)
