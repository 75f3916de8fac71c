"""The schema that all sources are converted to, and a batch of its rows as an operation sees it."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

ROW = pa.schema(
    [
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("completion", pa.string(), nullable=False),
        # Turns of a conversation before its last question: user, model, user, model …
        pa.field("history", pa.list_(pa.string()), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("id", pa.string(), nullable=False),
        pa.field("licence", pa.string(), nullable=False),
        pa.field("generator", pa.string()),
        pa.field("score", pa.float64()),
    ]
)
METADATA = pa.field("metadata", pa.string(), nullable=False)
"""A column between operations, where one looks at it: the record's fields that it names, as a JSON object."""
DROPPED = ROW.append(pa.field("operation", pa.string(), nullable=False)).append(
    pa.field("reason", pa.string(), nullable=False)
)
BATCH_ROWS = 8192
BATCH_CHARACTERS = 32 << 20
"""Limits of a batch, which is in memory at once; the latter counts texts, ids and metadata."""
Record = Mapping[str, Any]
"""A record of a source, as its file has it."""


class Malformed(ValueError):
    """A record that is not a row; the message is the reason shown in the quarantine."""


Turns = Sequence[str]
"""Turns of a row: user, model, user, model …; for most rows a prompt and a completion. Text without a prompt
has an empty prompt."""
Side = Literal["prompt", "completion", "both"]
"""Which side of a row an operation looks at: what the user says, what the model says."""
FIELDS = {"prompt": slice(0, None, 2), "completion": slice(1, None, 2), "both": slice(None)}
"""Turns of each `Side`."""


class Batch:
    """Up to `BATCH_ROWS` rows; texts become Python objects on first use."""

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

    @cached_property
    def metadata(self) -> list[dict[str, Any]]:
        """Of each row the `metadata_fields` that operations of the recipe name and its record has."""
        return [json.loads(fields) for fields in self.table[METADATA.name].to_pylist()]

    def rewritten(self, turns: Sequence[Turns]) -> pa.RecordBatch:
        """Return the rows with other texts."""
        table = self.table
        for name, texts in columns_of(turns).items():
            table = table.set_column(ROW.get_field_index(name), ROW.field(name), texts)
        return table


def columns_of(turns: Sequence[Turns]) -> dict[str, pa.Array]:
    """Return the text columns of these rows."""
    texts = {
        "prompt": [said[-2] for said in turns],
        "completion": [said[-1] for said in turns],
        "history": [said[:-2] for said in turns],
    }
    return {name: pa.array(column, ROW.field(name).type) for name, column in texts.items()}


def texts_of(rows: pa.RecordBatch) -> pa.Array:
    """Return all turns of each row, joined by blanks."""
    said = pc.binary_join(rows["history"], " ")
    return pc.binary_join_element_wise(said, rows["prompt"], rows["completion"], " ")


def asked(row: Mapping[str, Any]) -> str:
    """Return everything before a row's last answer."""
    return "\n".join([*row["history"], row["prompt"]])


def same_text(text: str) -> str:
    """Return the text without differences of case, white space and composed or decomposed accents (NFC)."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def shortened(text: str, length: int = 80) -> str:
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"
