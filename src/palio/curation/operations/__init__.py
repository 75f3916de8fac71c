"""What an operation does to the rows: the two kinds there are, and what they exchange with curation.

A `RowOperation` turns a batch of rows into a verdict. A `TableOperation` has to see all rows: it reduces
each batch to a sketch, such as hashes of its rows, and then decides on all rows from the sketches alone.
Verdicts and sketches depend on one batch only, so they can be made on any machine, in any order.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pyarrow as pa

from palio.config import Operation
from palio.curation.rows import Batch

Reasons = list[str | None]
"""Why each row of a batch is dropped; None keeps it."""
Sketches = Iterable[pa.RecordBatch]
"""The sketch of each batch, one line per row; can be iterated over more than once."""


@dataclass(frozen=True)
class Verdict:
    """What becomes of the rows of a batch, in their order."""

    reasons: Reasons
    rewritten: pa.RecordBatch | None = None
    """All rows with their new texts, from an operation that rewrites."""


@dataclass(frozen=True)
class OperationContext:
    """What an operation may use besides the rows."""

    base_model: Path
    """Model folder of the entry's base model, for its tokenizer."""
    team_folders: Sequence[Path]
    """Folders below which the team's files lie."""
    seed: int
    """Seed of the recipe."""
    scratch: Path
    """Folder for temporary files."""
    models: Mapping[str, Path] = field(default_factory=dict)
    """Copies of the model folders that operations name, by their path in the recipe: a team can replace its
    own at any time."""


class RowOperation(Operation):
    """An operation that judges each row on its own."""

    @abstractmethod
    def apply(self, batch: Batch, context: OperationContext) -> Verdict:
        """Return the verdict on a batch."""


class TableOperation(Operation):
    """An operation that judges a row by all the others."""

    needs_all_rows: ClassVar[bool] = True

    @abstractmethod
    def sketch(self, batch: Batch, context: OperationContext) -> pa.RecordBatch:
        """Return what `decide` needs to know of a batch, one line per row."""

    @abstractmethod
    def decide(self, sketches: Sketches, context: OperationContext) -> Iterator[Reasons]:
        """Yield the reasons for each batch, in the order of the sketches."""
