"""Other ways to weigh the same results, to look at: they are no scoring rules, and no verdict counts them.

Performance profiles (Dolan and Moré, 2002), as AlgoPerf scores by them (arXiv 2306.07179): how often an
entry is within a factor of the best. Item-response weights: questions that tell the good entries from the
others count more, by the discrimination that a normal-ogive model has for their correlation with the rest of
the test (Lord and Novick, 1968).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from palio.records import Column
from palio.scoring.conventions import Array
from palio.scoring.formula import Formula, scores
from palio.scoring.pool import Pool
from palio.scoring.uncertainty import VALUE_DIGITS, Answers, UsableAnswers

MAX_RATIO = 4.0
"""Factor at which a profile ends, as in AlgoPerf."""
MIN_ENTRIES = 10
"""Fewer say nothing about what a question tells."""
LARGEST_CORRELATION = 0.95


def performance_profile(pool: Pool, formula: Formula, weights: Array) -> Array | None:
    """Return, by entry, the mean height of its performance profile between the factors 1 and 4.

    A profile is the share of the columns, by their `weights`, in which the best value is at most so many
    times the entry's. A share of which less is better counts as what it leaves of 1; columns of other values
    have no ratios and are left out. A missing value is beyond every factor, unless it is excluded. None
    without columns.
    """
    total, weight = np.zeros(len(pool.entries)), np.zeros(len(pool.entries))
    for column, values, share in zip(pool.columns, pool.values.T, weights, strict=True):
        gains = _gains(column, values)
        if gains is None:
            continue
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.nanmax(gains) / gains
        ratio = np.where(np.isnan(gains), np.inf, np.where(np.isnan(ratio), 1.0, ratio))  # 0/0: all have 0
        counts = ~np.isnan(values) | (formula.missing_in(column) != "exclude")
        total += share * counts * np.maximum(0.0, MAX_RATIO - ratio) / (MAX_RATIO - 1)
        weight += share * counts
    if not weight.any():
        return None
    with np.errstate(invalid="ignore"):
        return np.asarray(total / weight)


def _gains(column: Column, values: Array) -> Array | None:
    """Return values of which more is better and none is negative; None if the column has no such values."""
    gains = values if column.higher_is_better else 1 - values
    return gains if (~np.isnan(gains)).any() and np.nanmin(gains) >= 0 else None


def item_response(pool: Pool, formula: Formula, usable: UsableAnswers) -> Array | None:
    """Return the final scores by values in which questions weigh by what they tell about the entries.

    None with too few entries, or without instance values. Columns without them keep their values.
    """
    if len(pool.entries) < MIN_ENTRIES or all(answers is None for answers in usable.columns):
        return None
    values = pool.values.copy()
    for index, (column, answers) in enumerate(zip(pool.columns, usable.columns, strict=True)):
        if answers is not None:
            weighted = weighted_values(answers, usable.scenarios[column.scenario_key].runs)
            values[:, index] = np.where(np.isnan(values[:, index]), np.nan, weighted)
    return scores(pool.columns, values.T, formula).final


def weighted_values(answers: Answers, runs: NDArray[np.int64]) -> Array:
    """Return means over questions weighted by their discrimination, HELM runs equally, shape (entries,).

    A question that everybody answers alike, or that the better entries answer worse, weighs nothing; if all
    do, they weigh the same.
    """
    present = ~np.isnan(answers)
    known = np.where(present, answers, 0.0).astype(float)
    sizes = np.bincount(runs)[runs]
    weights = discrimination(known, present) / sizes
    if not weights.any():
        weights = 1 / sizes
    total = (present * weights).sum(axis=1)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.round((known * weights).sum(axis=1) / total, VALUE_DIGITS))


def discrimination(answers: Array, present: NDArray[np.bool_]) -> Array:
    """Return r/√(1 - r²) by question, 0 for r < 0: r is its correlation with the mean of all other questions.

    Args:
        answers: shape (entries, questions), 0 where not present.
    """
    count = present.sum(axis=1, keepdims=True) - present
    rest = np.divide(
        answers.sum(axis=1, keepdims=True) - answers, count, out=np.zeros(answers.shape), where=count > 0
    )
    entries = np.maximum(present.sum(axis=0), 1)

    def centred(values: Array) -> Array:
        mean = (values * present).sum(axis=0) / entries
        return np.asarray((values - mean) * present)

    x, y = centred(answers), centred(rest)
    size = np.sqrt((x**2).sum(axis=0) * (y**2).sum(axis=0))
    r = np.divide((x * y).sum(axis=0), size, out=np.zeros(len(size)), where=size > 1e-9)
    r = np.clip(r, 0, LARGEST_CORRELATION)
    return np.asarray(r / np.sqrt(1 - r**2))
