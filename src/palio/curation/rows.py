"""The one schema that all sources become, and what an operation sees of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

ROW = pa.schema(
    [
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("completion", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("id", pa.string(), nullable=False),
        pa.field("licence", pa.string(), nullable=False),
        pa.field("generator", pa.string()),
    ]
)
DROPPED = ROW.append(pa.field("operation", pa.string(), nullable=False)).append(
    pa.field("reason", pa.string(), nullable=False)
)
BATCH_ROWS = 8192
"""Rows in memory at a time; texts of a few kilobytes make a batch some tens of megabytes."""


@dataclass(frozen=True)
class Batch:
    """Columns of up to `BATCH_ROWS` rows."""

    prompts: list[str]
    completions: list[str]
    sources: list[str]
    ids: list[str]


@dataclass(frozen=True)
class Verdict:
    """What an operation says about the rows of one batch, in their order."""

    reasons: list[str | None]
    """Why a row is dropped; None keeps it."""
    prompts: list[str] | None = None
    completions: list[str] | None = None
    """The rewritten texts, of an operation that rewrites."""


Batches = Callable[[], Iterator[Batch]]
"""All rows in order, as often as an operation needs to see them."""


@dataclass(frozen=True)
class Surroundings:
    """What an operation may use besides the rows."""

    base_model: Path
    """Model folder of the entry's base model, for its tokenizer."""
    base: Path
    """Folder that paths in the recipe are relative to."""
    seed: int


def same_text(text: str) -> str:
    """Equal for texts that differ in case and white space only."""
    return " ".join(text.casefold().split())


def shortened(text: str, length: int = 80) -> str:
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"
