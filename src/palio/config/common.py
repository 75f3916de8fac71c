"""Types that several sections share, and the strict model that all of them are."""

from __future__ import annotations

import ast
import inspect
import itertools
import os
import re
import textwrap
import unicodedata
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    PlainSerializer,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from palio.errors import InvalidValue

ID_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
REVISION_PATTERN = re.compile(r"[0-9a-f]{40}")

_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|min|h|d)")
_SECONDS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}


class Strict(BaseModel):
    """A frozen section of a file: unknown keys, infinite numbers and NaN are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """Describe each field by the docstring below it. Only a JSON schema needs these, and pydantic's own
        option would read all source files on import: 0.1 s in every job."""
        described = handler(schema)
        for name, text in _field_docstrings(cls).items():
            handler.resolve_ref_schema(described)["properties"][name]["description"] = text
        return described


def _field_docstrings(model: type[BaseModel]) -> dict[str, str]:
    docstrings = {}
    for base in reversed(model.__mro__[: model.__mro__.index(Strict)]):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(definition, ast.ClassDef)
        for field, text in itertools.pairwise(definition.body):
            match field, text:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(value))):
                    docstrings[name] = " ".join(value.split())
    return {name: text for name, text in docstrings.items() if name in model.model_fields}


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
    Field(gt=0),
    BeforeValidator(_seconds, json_schema_input_type=Annotated[str, Field(pattern=f"^{_DURATION.pattern}$")]),
    PlainSerializer(
        lambda seconds: f"{seconds}s", return_type=str, when_used="json"
    ),  # reads back as written
]
"""A duration, written with its unit."""


def seconds(default: str) -> Any:
    """Declare a field of `Seconds` with this default."""
    return Field(default=_seconds(default), json_schema_extra={"default": default})


Weight = Annotated[float, Field(ge=0, le=1), BeforeValidator(_fraction, json_schema_input_type=float | str)]
"""A share, written as a number or as a fraction such as 1/3."""
Pattern = Annotated[str, AfterValidator(_expression)]
"""A regular expression of Python's `re`."""
Share = Annotated[float, Field(ge=0, le=1)]


def _plain(value: str) -> str:
    """Refuse characters that a terminal, a table or a page could take for something else than text.

    Cc: control characters; Cf: invisible and right-to-left marks; Co, Cn, Cs: no characters at all.
    """
    odd = next((char for char in value if unicodedata.category(char) in ("Cc", "Cf", "Co", "Cn", "Cs")), None)
    if odd is not None:
        raise InvalidValue(
            why=f"contains the invisible character U+{ord(odd):04X}", fix="write it as plain text"
        )
    return unicodedata.normalize("NFKC", value).strip()


def _plain_path(value: str) -> str:
    if any(char in value for char in "{}") or not value.isprintable():
        fix = "rename the file without braces and control characters"
        raise InvalidValue(why="is a path that Snakemake would misread", fix=fix)
    return value


PlainText = Annotated[str, Field(max_length=200), AfterValidator(_plain)]
"""A line of visible text, in Unicode's compatibility form (NFKC): equal names are equal strings."""
PlainPath = Annotated[str, Field(max_length=1000), AfterValidator(_plain_path)]
"""A path without braces, which Snakemake takes for wildcards, and without control characters."""


def expand(path: str) -> Path:
    """Return the path with `~` and `$VARIABLES` expanded."""
    return Path(os.path.expandvars(path)).expanduser()
