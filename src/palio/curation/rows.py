"""The one schema that all sources become, and what an operation sees of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeVar

import pyarrow as pa

ROW = pa.schema(
    [
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("completion", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("id", pa.string(), nullable=False),
        pa.field("licence", pa.string(), nullable=False),
        pa.field("generator", pa.string()),
        pa.field("score", pa.float64()),
    ]
)
DROPPED = ROW.append(pa.field("operation", pa.string(), nullable=False)).append(
    pa.field("reason", pa.string(), nullable=False)
)
Seen = TypeVar("Seen")
BATCH_ROWS = 8192
BATCH_CHARACTERS = 32 << 20
"""Rows in memory at a time: so many, or fewer long ones."""


class Batch:
    """Up to `BATCH_ROWS` rows; columns as lists of Python texts are made when asked for."""

    def __init__(self, table: pa.RecordBatch) -> None:
        self.table = table

    def __len__(self) -> int:
        return self.table.num_rows  # type: ignore[no-any-return]

    @cached_property
    def prompts(self) -> list[str]:
        return self._column("prompt")

    @cached_property
    def completions(self) -> list[str]:
        return self._column("completion")

    @cached_property
    def sources(self) -> list[str]:
        return self._column("source")

    @cached_property
    def ids(self) -> list[str]:
        return self._column("id")

    @cached_property
    def scores(self) -> list[float | None]:
        return self._column("score")

    def _column(self, name: str) -> list[Any]:
        return self.table[name].to_pylist()  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Verdict:
    """What an operation says about the rows of one batch, in their order."""

    reasons: list[str | None]
    """Why a row is dropped; None keeps it."""
    prompts: list[str] | None = None
    completions: list[str] | None = None
    """The rewritten texts, of an operation that rewrites."""


class Rows(Protocol):
    """All rows in order, as often as an operation needs to see them."""

    def __iter__(self) -> Iterator[Batch]: ...

    def map(self, look: Callable[..., Seen], *beside: Iterable[Any]) -> Iterator[Seen]:
        """`look` at every batch, in other processes where there are; results in the order of the batches.

        As the builtin, with one item of each iterable `beside` the batch. `look` is a function of a
        module, or a `partial` of one with small arguments.
        """


@dataclass(frozen=True)
class Surroundings:
    """What an operation may use besides the rows."""

    base_model: Path
    """Model folder of the entry's base model, for its tokenizer."""
    base: Path
    """Folder that paths in the recipe are relative to."""
    seed: int
    scratch: Path
    """Folder for files that go with the operation."""


def same_text(text: str) -> str:
    """Equal for texts that differ in case and white space only."""
    return " ".join(text.casefold().split())


def shortened(text: str, length: int = 80) -> str:
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"
