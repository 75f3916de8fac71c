"""A leaderboard's entries as arrays: what every analysis computes on."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from palio.records import Column, Leaderboard
from palio.scoring.conventions import CONVENTIONS, Array, Missing
from palio.scoring.formula import Formula


@dataclass(frozen=True)
class Pool:
    """Entries by id, A..Z."""

    entries: tuple[str, ...]
    teams: tuple[str, ...]
    columns: tuple[Column, ...]
    values: Array
    """Shape (entries, columns), NaN where missing."""
    instances: NDArray[np.int64]
    """Shape (entries, columns): instances behind each value."""

    def only(self, entries: Collection[str]) -> Pool:
        keep = [place for place, entry in enumerate(self.entries) if entry in entries]
        return Pool(
            tuple(self.entries[place] for place in keep),
            tuple(self.teams[place] for place in keep),
            self.columns,
            self.values[keep],
            self.instances[keep],
        )

    def without(self, entry: str) -> Pool:
        return self.only([one for one in self.entries if one != entry])

    def without_scenario(self, stage: str, scenario: str) -> Pool:
        keep = [
            place
            for place, column in enumerate(self.columns)
            if (column.stage, column.scenario) != (stage, scenario)
        ]
        columns = tuple(self.columns[place] for place in keep)
        return Pool(self.entries, self.teams, columns, self.values[:, keep], self.instances[:, keep])


def pool_of(board: Leaderboard) -> Pool:
    entries = sorted(board.entries, key=lambda one: one.entry)
    shape = (len(entries), len(board.columns))
    values = [[np.nan if cell.value is None else cell.value for cell in one.cells] for one in entries]
    instances = [[cell.n for cell in one.cells] for one in entries]
    return Pool(
        tuple(one.entry for one in entries),
        tuple(one.team for one in entries),
        tuple(board.columns),
        np.array(values, dtype=float).reshape(shape),
        np.array(instances, dtype=np.int64).reshape(shape),
    )


def formula_of(board: Leaderboard) -> Formula:
    convention = CONVENTIONS[board.convention]
    missing = board.missing if convention.fills_missing is None else "worst"
    return Formula(convention, cast(Missing, missing), board.stage_weights)
