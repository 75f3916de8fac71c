"""The competition's formula: win rates -> scenario means -> stage scores -> final scores -> ranks.

    scenario = mean of the win rates of its columns
    stage    = geometric mean of its scenarios
    final    = weighted sum of the stages (1/3 open + 2/3 closed in 2023)

Arrays have the shape (..., n): any batch (bootstrap replicates, for instance) of n entries. Columns
are consumed one at a time, so memory does not grow with their number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from palio.records import Column
from palio.scoring.conventions import Array, Convention, Missing, column_win_rates, tie_groups

SCORE_DIGITS = 12
"""Scores that agree to so many digits are equal: the rest is the order in which floats were added."""

Aggregate = Callable[[Array], Array]
"""(scenarios, ..., n) with NaN where a scenario is left out -> (..., n)."""


def geometric_mean(scenarios: Array) -> Array:
    """Over the first axis, ignoring NaN; 0 if any scenario is 0."""
    with np.errstate(divide="ignore"):
        return np.exp(_mean(np.log(scenarios)))


def arithmetic_mean(scenarios: Array) -> Array:
    return _mean(scenarios)


def floored_geometric_mean(scenarios: Array) -> Array:
    """Geometric mean with every scenario at least 1/(2n): half a win over nobody, so no zero collapses."""
    return geometric_mean(np.maximum(scenarios, 1 / (2 * scenarios.shape[-1])))


def _mean(values: Array) -> Array:
    present = ~np.isnan(values)
    counts = present.sum(axis=0)
    total = np.where(present, values, 0.0).sum(axis=0)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(counts > 0, total / np.maximum(counts, 1), np.nan), dtype=float)


@dataclass(frozen=True)
class Formula:
    """All that decides a score besides the values."""

    convention: Convention
    missing: Missing
    stage_weights: Mapping[str, float]
    aggregate: Aggregate = geometric_mean


@dataclass(frozen=True)
class Scores:
    """Every array has the shape (..., n); NaN where an entry has no value at all."""

    scenarios: dict[str, dict[str, Array]]
    """stage -> scenario -> mean win rate."""
    stages: dict[str, Array]
    final: Array


def scores(columns: Sequence[Column], values: Iterable[Array], formula: Formula) -> Scores:
    """Scores from one array of values of shape (..., n) per column, in the order of `columns`."""
    rates = (
        column_win_rates(of_column, column.higher_is_better, formula.convention, formula.missing)
        for column, of_column in zip(columns, values, strict=True)
    )
    return scores_of_win_rates(columns, rates, formula)


def scores_of_win_rates(columns: Sequence[Column], rates: Iterable[Array], formula: Formula) -> Scores:
    total: dict[tuple[str, str], Array] = {}
    count: dict[tuple[str, str], Array] = {}
    for column, rate in zip(columns, rates, strict=True):
        key = (column.stage, column.scenario)
        absent = np.isnan(rate)
        present = (~absent).astype(float)
        known = np.where(absent, 0.0, rate) if absent.any() else rate
        total[key] = total[key] + known if key in total else known
        count[key] = count[key] + present if key in count else present
    scenarios: dict[str, dict[str, Array]] = {}
    for (stage, scenario), summed in total.items():
        with np.errstate(invalid="ignore"):
            mean = summed / count[stage, scenario]
        scenarios.setdefault(stage, {})[scenario] = mean
    stages = {stage: formula.aggregate(np.stack(list(of.values()))) for stage, of in scenarios.items()}
    weights = {stage: formula.stage_weights[stage] for stage in stages}
    whole = sum(weights.values())  # 1, unless only one stage is looked at
    final = sum(
        (weights[stage] / whole * score for stage, score in stages.items()),
        start=np.zeros(np.shape(next(iter(stages.values())))),
    )
    return Scores(scenarios, stages, np.asarray(final))


def ranks(final: Array) -> Array:
    """Rank 1 is the highest score; equal scores share the better rank. Shape (..., n), NaN last."""
    known: Array = np.where(np.isnan(final), -np.inf, final)
    rounded: Array = np.round(known, SCORE_DIGITS)
    better, _ = tie_groups(-rounded)
    return np.asarray(better + 1.0)
