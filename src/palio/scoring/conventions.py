"""Conventions that turn a column of values into win rates: named, versioned, each a pure function.

All functions work on arrays of shape (..., n): any batch of columns, n entries in the order of their
ids (A..Z), NaN where a value is missing. They return an array of the same shape, in [0, 1], NaN where
the entry is left out. Notation: `worse` is the number of entries strictly worse, `k` the number of
entries with the same value (1 without a tie), n the number of entries.

    midrank     (worse + (k-1)/2) / (n-1)            ties share; a column's win rates average 1/2
    helm2023    position after sorting by (value, id), over (n-1); the alphabet breaks ties
    hidden2023  (worse + (k-1)/k) / n
    final2023   (worse + (1/k if k > 1 else 0)) / n

The last three reproduce the published tables of NeurIPS 2023. They exist for that and are not recommended;
docs/scoring.md explains why.

Equal results are ties. In floating point the mean of 0.1 and 0.2 is 0.15000000000000002 and that of 0 and 0.3
is 0.15, so `palio.scoring.columns` makes the values of equal results equal, for every convention. `midrank`
also ignores differences up to `TIE` in values from elsewhere. The conventions of 2023 do not, because the
published tables do not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Missing = Literal["worst", "exclude", "block"]


TIE = 1e-12
"""Largest relative difference between equal results: what the order of floating-point additions can cause."""


@dataclass(frozen=True)
class Convention:
    """A named rule."""

    name: str
    version: str
    """Changes when any win rate does."""
    formula: str
    """For table captions."""
    win_rates: Callable[[Array, bool], Array]
    """(values of shape (..., n) without NaN, higher_is_better) -> win rates of the same shape."""
    fills_missing: tuple[float, float] | None = None
    """The value that replaces a missing one (if higher is better, if lower is better). None: the
    competition's policy decides."""


def tie_groups(values: Array, tolerance: float = TIE) -> tuple[Array, Array]:
    """Return (number of strictly smaller values, size of the tie), both in the shape of `values`.

    Neighbors in ascending order tie if they differ by at most `tolerance`, relative to the smaller one.
    Unlike rounding, this cannot separate equal results on either side of a rounding boundary.
    """
    n = values.shape[-1]
    order = np.argsort(values, axis=-1)
    ascending = np.take_along_axis(values, order, axis=-1)
    lower, upper = ascending[..., :-1], ascending[..., 1:]
    starts = np.ones(values.shape, dtype=bool)
    with np.errstate(invalid="ignore"):  # inf - inf is NaN, and so a tie
        np.greater(upper - lower, tolerance * np.minimum(np.abs(lower), np.abs(upper)), out=starts[..., 1:])
    position = np.arange(n)
    first = np.maximum.accumulate(np.where(starts, position, 0), axis=-1)
    ends = np.ones(values.shape, dtype=bool)
    ends[..., :-1] = starts[..., 1:]
    last = np.minimum.accumulate(np.where(ends, position, n)[..., ::-1], axis=-1)[..., ::-1]
    smaller = np.empty(values.shape)
    size = np.empty(values.shape)
    np.put_along_axis(smaller, order, first.astype(float), axis=-1)
    np.put_along_axis(size, order, (last - first + 1).astype(float), axis=-1)
    return smaller, size


def _midrank(values: Array, higher_is_better: bool) -> Array:
    n = values.shape[-1]
    if n == 1:
        return np.full(values.shape, 0.5)  # no rival: the average of any pool
    worse, ties = tie_groups(values if higher_is_better else -values)
    return np.asarray((worse + (ties - 1) / 2) / (n - 1))


def _helm2023(values: Array, higher_is_better: bool) -> Array:
    n = values.shape[-1]
    if n == 1:
        return np.full(values.shape, 0.5)  # no rival; HELM leaves the cell empty
    # HELM sorts (value, id) pairs, and reverses the whole order if lower is better.
    order = np.argsort(values, axis=-1, kind="stable")
    ascending = np.broadcast_to(np.arange(n, dtype=float), values.shape)
    positions = np.empty(values.shape)
    np.put_along_axis(positions, order, ascending if higher_is_better else ascending[..., ::-1], axis=-1)
    return np.asarray(positions / (n - 1))


def _hidden2023(values: Array, higher_is_better: bool) -> Array:
    worse, ties = tie_groups(values if higher_is_better else -values, tolerance=0)
    return np.asarray((worse + (ties - 1) / ties) / values.shape[-1])


def _final2023(values: Array, higher_is_better: bool) -> Array:
    worse, ties = tie_groups(values if higher_is_better else -values, tolerance=0)
    return np.asarray((worse + np.where(ties > 1, 1 / ties, 0.0)) / values.shape[-1])


CONVENTIONS = {
    convention.name: convention
    for convention in (
        Convention("midrank", "2", "(strictly worse + (ties - 1)/2) / (n - 1)", _midrank),
        Convention("helm2023", "1", "position by (value, id) / (n - 1)", _helm2023, (0.0, 0.0)),
        Convention("hidden2023", "1", "(strictly worse + (k - 1)/k) / n", _hidden2023, (0.0, 1.0)),
        Convention("final2023", "1", "(strictly worse + 1/k if k > 1) / n", _final2023, (0.0, 1.0)),
    )
}


def column_win_rates(
    values: Array, higher_is_better: bool, convention: Convention, missing: Missing = "worst"
) -> Array:
    """Return the win rates of one column, or of a batch of shape (..., n).

    `missing` applies only if the convention has no rule of its own: under `worst` missing values tie with
    each other and lose to all others; under `exclude` only entries with a value are compared and the rest
    get NaN. (Under `block` there is no leaderboard with missing values.)
    """
    absent = np.isnan(values)
    if not absent.any():
        return convention.win_rates(values, higher_is_better)
    if convention.fills_missing is None and missing == "exclude":
        return _win_rates_of_present(values, absent, higher_is_better, convention)
    higher_fill, lower_fill = convention.fills_missing or (-np.inf, np.inf)
    fill = higher_fill if higher_is_better else lower_fill
    return convention.win_rates(np.where(absent, fill, values), higher_is_better)


def _win_rates_of_present(
    values: Array, absent: NDArray[np.bool_], higher_is_better: bool, convention: Convention
) -> Array:
    rates = np.full(values.shape, np.nan)
    for index in np.ndindex(values.shape[:-1]):
        present = ~absent[index]
        if present.any():
            rates[index][present] = convention.win_rates(values[index][present], higher_is_better)
    return rates
