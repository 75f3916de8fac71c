"""The one schema that all sources become, and what an operation sees of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

ROW = pa.schema(
    [
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("completion", pa.string(), nullable=False),
        # Of a conversation the turns before the last question: user, model, user, model …
        pa.field("history", pa.list_(pa.string()), nullable=False),
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
BATCH_ROWS = 8192
BATCH_CHARACTERS = 32 << 20
"""Rows in memory at a time: so many, or fewer long ones."""
Turns = Sequence[str]
"""What is said in a row: user, model, user, model …; of most rows a prompt and a completion."""
FIELDS = {"prompt": slice(0, None, 2), "completion": slice(1, None, 2), "both": slice(None)}
"""Which turns of a row an operation's `field` means."""


class Batch:
    """Up to `BATCH_ROWS` rows; columns as lists of Python texts are made when asked for."""

    def __init__(self, table: pa.RecordBatch) -> None:
        self.table = table

    def __len__(self) -> int:
        return self.table.num_rows  # type: ignore[no-any-return]

    @cached_property
    def turns(self) -> list[Turns]:
        pairs = zip(*(self.table[name].to_pylist() for name in ("prompt", "completion")), strict=True)
        if len(self.table["history"].flatten()) == 0:  # most batches; making lists costs more than texts
            return list(pairs)
        return [
            (*before, *pair) for before, pair in zip(self.table["history"].to_pylist(), pairs, strict=True)
        ]

    def rewritten(self, turns: Sequence[Turns]) -> pa.RecordBatch:
        """The rows with other texts."""
        table = self.table
        for name, texts in columns_of(turns).items():
            table = table.set_column(ROW.get_field_index(name), ROW.field(name), texts)
        return table


Notes = Iterable[pa.RecordBatch]
"""What an operation noted of each batch, a line for each row; may be gone through more than once."""
Reasons = list[str | None]
"""Why each row of a batch is dropped; None keeps it."""


@dataclass(frozen=True)
class Verdict:
    """What an operation says about the rows of one batch, in their order."""

    reasons: Reasons
    rewritten: pa.RecordBatch | None = None
    """All rows with their new texts, of an operation that rewrites."""


@dataclass(frozen=True)
class Surroundings:
    """What an operation may use besides the rows."""

    base_model: Path
    """Model folder of the entry's base model, for its tokenizer."""
    team_folders: Sequence[Path]
    """Folders below which the team's files lie."""
    seed: int
    scratch: Path
    """Folder for files that go with the operation."""


def columns_of(turns: Sequence[Turns]) -> dict[str, pa.Array]:
    """The columns of texts."""
    texts = {
        "prompt": [said[-2] for said in turns],
        "completion": [said[-1] for said in turns],
        "history": [said[:-2] for said in turns],
    }
    return {name: pa.array(column, ROW.field(name).type) for name, column in texts.items()}


def texts_of(rows: pa.RecordBatch) -> pa.Array:
    """Of each row all that is said in it, turn after turn."""
    said = pc.binary_join(rows["history"], " ")
    return pc.binary_join_element_wise(said, rows["prompt"], rows["completion"], " ")


def asked(row: Mapping[str, Any]) -> str:
    """All that stands before a row's last answer."""
    return "\n".join([*row["history"], row["prompt"]])


def same_text(text: str) -> str:
    """Equal for texts that differ in case and white space only."""
    return " ".join(text.casefold().split())


def shortened(text: str, length: int = 80) -> str:
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"
