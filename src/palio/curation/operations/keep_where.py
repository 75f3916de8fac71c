"""Keeping rows by a field of the record that they were read from."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from palio.config import Pattern
from palio.curation.operations import OperationContext, Reasons, RowOperation, Verdict
from palio.curation.rows import Batch
from palio.errors import InvalidValue
from palio.limits import bounded

Value = str | bool | int | float


class FieldOperation(RowOperation):
    """Judges rows by one condition on a field of their record."""

    field: Annotated[str, Field(min_length=1, max_length=200)]
    """Key of the records; of a record inside one the keys with dots, e.g. `labels.quality`. Of a list one
    item has to fulfill the condition."""
    equals: Value | Annotated[tuple[Value, ...], Field(min_length=1)] | None = None
    """Value, or a list of values in which it is. A text that spells a number, true or false equals it."""
    matches: Pattern | None = None
    """Python regular expression that matches somewhere in it, ignoring case."""
    min: float | None = None
    """Smallest number."""
    max: float | None = None
    """Largest number."""

    @field_validator("equals", mode="before")
    @classmethod
    def _values(cls, value: object) -> object:
        values = value if isinstance(value, list | tuple) else [value]
        kinds = {type(one) for one in values}
        if bool in kinds and str in kinds:
            fix = 'put quotes around texts that YAML takes for these: "no", "yes", "on", "off"'
            raise InvalidValue(why="has true or false beside texts", fix=fix)
        endless = any(isinstance(one, float) and not math.isfinite(one) for one in values)
        if value is not None and (endless or not kinds or kinds - {str, bool, int, float}):
            fix = "give a text, a number, true or false, or a list of them"
            raise InvalidValue(why="is not a value to compare with", fix=fix)
        return value

    @model_validator(mode="after")
    def _one_condition(self) -> FieldOperation:
        in_range = self.min is not None or self.max is not None
        if (self.equals is not None) + (self.matches is not None) + in_range != 1:
            raise InvalidValue(why="needs one condition", fix="give equals, or matches, or min and max")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise InvalidValue(why=f"min is {self.min:g}, above max, {self.max:g}", fix="swap them")
        return self

    @property
    def metadata_fields(self) -> tuple[str, ...]:
        return (self.field,)

    def judged(self, batch: Batch) -> list[tuple[Any, bool]]:
        """Return the field's value in each row, None where it is missing, and whether it fulfills the
        condition."""
        fulfills = self._condition()
        found = []
        with bounded() as watched:
            for metadata in watched(batch.metadata):
                value = metadata.get(self.field)
                items = value if isinstance(value, list) else [value]
                found.append((value, any(fulfills(item) for item in items if item is not None)))
        return found

    def _condition(self) -> Callable[[Any], bool]:
        if self.matches is not None:
            search = re.compile(self.matches, re.IGNORECASE).search
            return lambda value: search(_text(value)) is not None
        if self.equals is not None:
            wanted = self.equals if isinstance(self.equals, tuple) else (self.equals,)
            return lambda value: any(_equal(value, one) for one in wanted)
        low = -math.inf if self.min is None else self.min
        high = math.inf if self.max is None else self.max
        return lambda value: (number := _number(value)) is not None and low <= number <= high


class KeepWhere(FieldOperation):
    """Keep rows whose record fulfills a condition on one of its fields, e.g. its language or score. A field
    that no row has is an error, which names those there are."""

    op: Literal["keep_where"]
    missing: Literal["drop", "keep"] = "drop"
    """What becomes of rows without the field, such as those of other sources."""

    def apply(self, batch: Batch, context: OperationContext) -> Verdict:
        keeps_missing = self.missing == "keep"
        reasons: Reasons = [
            None if fulfilled or (value is None and keeps_missing) else said(self.field, value)
            for value, fulfilled in self.judged(batch)
        ]
        return Verdict(reasons)


def said(field: str, value: Any) -> str:
    """Return what a record says in a field, as a reason."""
    return f"{field} is missing" if value is None else f"{field} is {value!r:.200}"


def _equal(value: Any, wanted: Value) -> bool:
    if isinstance(wanted, bool):
        return _text(value).lower() == _text(wanted)
    return value == wanted if isinstance(wanted, str) else _number(value) == wanted


def _number(value: Any) -> int | float | None:
    """Return a value as a number: CSV files have texts only. None if it is none."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    for kind in (int, float) if isinstance(value, str) else ():
        try:
            return kind(value)
        except ValueError:
            continue
    return None


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
