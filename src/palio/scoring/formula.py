"""The competition's formula: win rates -> scenario means -> stage scores -> final scores -> ranks.

    scenario = mean of the win rates of its columns
    stage    = geometric mean of its scenarios
    final    = weighted sum of the stages (1/3 open + 2/3 closed in 2023)

Arrays have the shape (..., n): any batch of n entries, such as bootstrap replicates. Columns are consumed
one at a time, so memory does not grow with their number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from palio.records import Column
from palio.scoring.conventions import Array, Convention, Missing, column_win_rates, tie_groups

Aggregate = Callable[[Array], Array]
"""(scenarios, ..., n), NaN where a scenario is left out -> (..., n)."""


def geometric_mean(scenarios: Array) -> Array:
    """Return the geometric mean over the first axis, ignoring NaN; 0 if any scenario is 0."""
    with np.errstate(divide="ignore"):
        return np.exp(arithmetic_mean(np.log(scenarios)))


def floored_geometric_mean(scenarios: Array) -> Array:
    """Return the geometric mean with every scenario at least 1/(2n), so that one zero does not decide all."""
    return geometric_mean(np.maximum(scenarios, 1 / (2 * scenarios.shape[-1])))


def arithmetic_mean(scenarios: Array) -> Array:
    """Return the mean over the first axis, ignoring NaN; NaN if there is nothing else."""
    present = ~np.isnan(scenarios)
    counts = present.sum(axis=0)
    total = np.where(present, scenarios, 0.0).sum(axis=0)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(counts > 0, total / np.maximum(counts, 1), np.nan), dtype=float)


@dataclass(frozen=True)
class Formula:
    """Everything besides the values that decides a score."""

    convention: Convention
    missing: Missing
    stage_weights: Mapping[str, float]
    aggregate: Aggregate = geometric_mean

    def missing_in(self, column: Column) -> Missing:
        """Return how a missing value of a column counts."""
        return column.missing or self.missing

    def win_rates(self, column: Column, values: Array) -> Array:
        """Return the win rates of one column, NaN where an entry is left out."""
        missing = self.missing_in(column)
        return column_win_rates(values, column.higher_is_better, self.convention, missing)


@dataclass(frozen=True)
class Scores:
    """Arrays of shape (..., n), NaN where an entry has no value at all."""

    scenarios: dict[str, dict[str, Array]]
    """stage -> scenario -> mean win rate."""
    stages: dict[str, Array]
    final: Array


def scores(columns: Sequence[Column], values: Iterable[Array], formula: Formula) -> Scores:
    """Return the scores from one array of values of shape (..., n) per column, in the order of `columns`."""
    rates = (
        formula.win_rates(column, column_values)
        for column, column_values in zip(columns, values, strict=True)
    )
    return scores_of_win_rates(columns, rates, formula)


def scores_of_win_rates(columns: Sequence[Column], rates: Iterable[Array], formula: Formula) -> Scores:
    """Return the scores from one array of win rates of shape (..., n) per column, NaN where left out."""
    total: dict[tuple[str, str], Array] = {}
    count: dict[tuple[str, str], Array] = {}
    for column, rate in zip(columns, rates, strict=True):
        key = column.scenario_key
        present = ~np.isnan(rate)
        total[key] = total.get(key, 0.0) + np.where(present, rate, 0.0)
        count[key] = count.get(key, 0.0) + present.astype(float)
    scenarios: dict[str, dict[str, Array]] = {}
    for (stage, scenario), summed in total.items():
        with np.errstate(invalid="ignore"):  # 0/0 where every column is left out
            scenarios.setdefault(stage, {})[scenario] = summed / count[stage, scenario]
    stages = {stage: formula.aggregate(np.stack(list(means.values()))) for stage, means in scenarios.items()}
    weights = {stage: formula.stage_weights[stage] for stage in stages}
    total_weight = sum(weights.values())  # below 1 if only one stage is scored
    final = sum(
        (weights[stage] / total_weight * score for stage, score in stages.items()),
        start=np.zeros(np.shape(next(iter(stages.values())))),
    )
    return Scores(scenarios, stages, np.asarray(final))


def ranks(final: Array) -> Array:
    """Return the ranks of scores of shape (..., n): 1 for the highest, ties share the better, NaN last."""
    known: Array = np.where(np.isnan(final), -np.inf, final)
    better, _ = tie_groups(-known)
    return np.asarray(better + 1.0)
