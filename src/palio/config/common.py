"""Types that several sections share, and the strict model that all of them are."""

from __future__ import annotations

import os
import re
from fractions import Fraction
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer

ID_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
REVISION_PATTERN = re.compile(r"[0-9a-f]{40}")
STAGES = ("open", "closed")

_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|min|h|d)")
_SECONDS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}


class Strict(BaseModel):
    """A frozen section of a file: unknown keys, infinite numbers and NaN are errors.

    The docstring below a field is its description in the JSON schema and in config/README.md.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


def _seconds(value: object) -> object:
    """Convert `90s`, `10m`, `24h` or `1d`; refuse a bare number, whose unit would be a guess."""
    if isinstance(value, str) and (match := _DURATION.fullmatch(value.strip())):
        return round(float(match[1]) * _SECONDS[match[2]])
    raise ValueError("give a duration with its unit, such as 90s, 10m or 24h")


def _fraction(value: object) -> object:
    """Convert `1/3`, written as the rules state it, not as 0.3333."""
    return float(Fraction(value)) if isinstance(value, str) else value


def _expression(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"{value!r} is not a regular expression: {error}") from None
    return value


Seconds = Annotated[
    int,
    BeforeValidator(
        _seconds, json_schema_input_type=Annotated[str, Field(pattern=rf"^\s*{_DURATION.pattern}\s*$")]
    ),
    Field(gt=0),
    PlainSerializer(
        lambda seconds: f"{seconds}s", return_type=str, when_used="json"
    ),  # reads back as written
]
"""A duration, written with its unit."""
Weight = Annotated[float, BeforeValidator(_fraction, json_schema_input_type=float | str), Field(gt=0, le=1)]
"""A share, written as a number or as a fraction such as 1/3."""
Pattern = Annotated[str, AfterValidator(_expression)]
"""A regular expression of Python's `re`."""
Share = Annotated[float, Field(ge=0, le=1)]


def expand(path: str) -> Path:
    """Return the path with `~` and `$VARIABLES` expanded."""
    return Path(os.path.expandvars(path)).expanduser()
