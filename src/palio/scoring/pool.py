"""A leaderboard's entries as arrays: the input of every analysis."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from palio.records import Cell, Column, Leaderboard, ScoredEntry
from palio.scoring.conventions import CONVENTIONS, Array, Missing
from palio.scoring.formula import Formula


def values_of(rows: Sequence[Sequence[Cell]]) -> Array:
    """Return the values of the entries' cells, shape (entries, columns), NaN where missing."""
    return np.array(
        [[np.nan if cell.value is None else cell.value for cell in cells] for cells in rows], dtype=float
    )


@dataclass(frozen=True)
class Pool:
    """Entries in the order of their ids, A..Z."""

    entries: tuple[str, ...]
    columns: tuple[Column, ...]
    values: Array
    """Shape (entries, columns), NaN where missing."""
    instances: NDArray[np.int64]
    """Shape (entries, columns): number of instances behind each value."""

    def only(self, entries: Collection[str]) -> Pool:
        keep = [row for row, entry in enumerate(self.entries) if entry in entries]
        kept = tuple(self.entries[row] for row in keep)
        return Pool(kept, self.columns, self.values[keep], self.instances[keep])

    def without(self, entry: str) -> Pool:
        return self.only(set(self.entries) - {entry})

    def without_scenario(self, key: tuple[str, str]) -> Pool:
        keep = [index for index, column in enumerate(self.columns) if column.scenario_key != key]
        columns = tuple(self.columns[index] for index in keep)
        return Pool(self.entries, columns, self.values[:, keep], self.instances[:, keep])


def mean_over_trainings(scored: ScoredEntry) -> Array:
    """Return the values of an entry's cells as means over its trainings that have one, shape (columns,).

    A value that the entry's own training lacks stays missing: the leaderboard has none.
    """
    values = values_of([scored.cells, *(replicate.cells for replicate in scored.replicates)])
    present = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        means = np.where(present, values, 0).sum(axis=0) / present.sum(axis=0)
    return np.where(present[0], means, np.nan) if scored.replicates else values[0]


def pool_of(board: Leaderboard, *, all_trainings: bool = False) -> Pool:
    """Return the scored entries of a leaderboard, with the values of their own training, or the means over
    all trainings."""
    entries = sorted(board.entries, key=lambda scored: scored.entry)
    cells = [scored.cells for scored in entries]
    shape = (len(entries), len(board.columns))
    values = [mean_over_trainings(scored) for scored in entries] if all_trainings else values_of(cells)
    return Pool(
        tuple(scored.entry for scored in entries),
        tuple(board.columns),
        np.asarray(values, dtype=float).reshape(shape),
        np.array([[cell.n for cell in row] for row in cells], dtype=np.int64).reshape(shape),
    )


def formula_of(board: Leaderboard) -> Formula:
    """Return the formula that scored a leaderboard."""
    convention = CONVENTIONS[board.convention]
    missing = board.missing if convention.fills_missing is None else "worst"
    return Formula(convention, cast(Missing, missing), board.stage_weights)
