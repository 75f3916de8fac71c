"""Operations of curation: how a recipe names them, and how their classes are found.

An operation is one class in one module: its fields are its settings, its docstrings its reference, its
methods what it does. Palio's own are the modules of `palio.curation.operations`, each named for its `op`.
Other packages add theirs as entry points of the group `palio.operations`, also named for their `op`: see
CONTRIBUTING.md. Only the modules of operations that a recipe names are imported, and only when it is read.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, get_args

from pydantic import GetJsonSchemaHandler, GetPydanticSchema
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from palio.config.common import Strict
from palio.errors import InvalidValue

BUILT_IN = "palio.curation.operations"
"""The package of Palio's own operations."""
GROUP = "palio.operations"
"""The entry point group of other packages' operations."""


class Input(NamedTuple):
    """Data that decides an operation's result beside its settings."""

    kind: Literal["open_stage", "model_folder", "tokenizer"]
    """`open_stage`: the table of the open stage's instances; `model_folder`: a model that the team brings;
    `tokenizer`: the base model's."""
    key: str = ""
    """The setting that holds the path; empty for the tokenizer."""
    path: str = ""


class Operation(Strict):
    """The settings of an operation; `RowOperation` and `TableOperation` say what it does."""

    op: str
    """Name of the operation."""

    needs_all_rows: ClassVar[bool] = False
    """True if it must have seen every row before it can drop one."""

    @property
    def inputs(self) -> tuple[Input, ...]:
        return ()

    @property
    def metadata_fields(self) -> tuple[str, ...]:
        """Fields of the sources' records that it looks at beside the texts: `Batch.metadata` has them."""
        return ()

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Register the class under its `op`, a `Literal`; base classes have none."""
        for op in get_args(cls.model_fields["op"].annotation):
            if op in _CLASSES:
                raise TypeError(f"operation {op} is already defined in {_CLASSES[op].__module__}")
            _CLASSES[op] = cls


_CLASSES: dict[str, type[Operation]] = {}


def operation_names() -> list[str]:
    """Return the `op` of every operation that is installed, Palio's own first."""
    return [*_built_in(), *sorted(_entry_points().keys() - _built_in())]


def operation_class(op: str) -> type[Operation]:
    """Import the class of an operation.

    Raises:
        ValueError: there is no such operation, or its package is broken.
    """
    if op in _built_in():
        import_module(f"{BUILT_IN}.{op}")
    elif point := _entry_points().get(op):
        try:
            point.load()
        except Exception as error:  # whatever a package does when it is imported
            raise InvalidValue(
                why=f"{point.value} cannot be imported: {error}", fix="fix or remove its package"
            ) from error
    else:
        raise InvalidValue(why="unknown operation", fix=f"use one of {', '.join(operation_names())}")
    if op not in _CLASSES:
        raise InvalidValue(
            why=f"{_entry_points()[op].value} does not define it", fix="fix or remove its package"
        )
    return _CLASSES[op]


@cache
def _built_in() -> dict[str, None]:
    spec = find_spec(BUILT_IN)
    assert spec is not None
    return {module.name: None for module in pkgutil.iter_modules(spec.submodule_search_locations)}


@cache
def _entry_points() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


def _validate(value: object) -> Operation:
    if isinstance(value, Operation):
        return value
    op = value.get("op") if isinstance(value, Mapping) else None
    if not isinstance(op, str):
        raise ValueError("write an operation as op: <name> and its settings")
    return operation_class(op).model_validate(value)


def _json_schema(schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
    classes = map(operation_class, operation_names())
    return {"oneOf": [handler(model.__pydantic_core_schema__) for model in classes]}


AnyOperation = Annotated[
    Operation,
    GetPydanticSchema(lambda *_: core_schema.no_info_plain_validator_function(_validate), _json_schema),
]
"""An operation of the class that its `op` names."""
