"""How much results vary from one training to the next: a random effect of every training of an entry.

The values of an entry's trainings, all on the same questions, differ by the training itself and by how it
meets these questions. The covariance of their deviations from the entry's mean is pooled over all entries
that have several. Each column then keeps the part that more questions would not remove: the two-way analysis
of variance of trainings and questions. (arXiv 2411.00640 takes the same parts apart for sampled answers;
2103.03098 shows what it costs to leave the seed out.)

An entry's own variance, relative to the pooled one, is shrunk towards it with `PRIOR_DEGREES` degrees of
freedom (empirical Bayes, as Smyth, 2004), since two or three trainings say little about a variance. Entries
without replicates are lent the pooled one. How little is known about both is drawn too: as in a t
distribution, the fewer trainings, the wider the intervals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from palio.records import Column, Leaderboard, TrainingNoise
from palio.scoring.conventions import Array
from palio.scoring.pool import values_of

PRIOR_DEGREES = 8.0
"""Degrees of freedom that the pooled variance counts for in an entry's own: benchmarks/coverage.py holds with
it though its entries differ in their noise."""
ASSUMED_COMMON = 0.5
"""Share of an assumed variance that moves all scenarios together; the rest moves each on its own. With none
in common, effects would average out over the scenarios, and intervals be too narrow wherever a training is
better or worse as a whole."""


@dataclass(frozen=True)
class TrainingEffects:
    """What draws of training effects need. Entries in the order of their ids."""

    factor: Array
    """Shape (columns, r): factor @ factor.T is the covariance of one training's effects on the columns."""
    scale: Array
    """Shape (entries,): variance of an entry's effects relative to that; 0 for a base model as it is."""
    degrees: Array
    """Shape (entries,): degrees of freedom of `scale`; infinite if it is assumed."""
    pooled_degrees: float
    """Degrees of freedom of the covariance; infinite if it is assumed."""
    trainings: NDArray[np.int64]
    """Shape (entries,): trainings whose mean an entry's values are."""
    record: TrainingNoise

    def draw(self, replicates: int, generator: np.random.Generator) -> NDArray[np.float32]:
        """Return independent effects of shape (replicates, entries, r), to be multiplied by `factor`."""
        shape = (replicates, len(self.scale))
        variance = self.scale / self.trainings / _relative_chi_square(generator, self.degrees, shape)
        variance = variance / _relative_chi_square(generator, self.pooled_degrees, (replicates, 1))
        effects = generator.standard_normal((*shape, self.factor.shape[1]), dtype=np.float32)
        effects *= np.sqrt(variance).astype(np.float32)[:, :, None]
        return effects


def _relative_chi_square(
    generator: np.random.Generator, degrees: Array | float, shape: tuple[int, ...]
) -> Array:
    """Draw chi-squares over their degrees of freedom; 1 where these are infinite."""
    known = np.broadcast_to(np.isinf(degrees), shape)
    finite = np.where(np.isinf(degrees), 1.0, degrees)
    return np.where(known, 1.0, generator.chisquare(finite, size=shape) / finite)


def training_effects(
    board: Leaderboard, interactions: Sequence[Array | None], assumed: float | None = None
) -> TrainingEffects | None:
    """Estimate the effects from a leaderboard's replicates, or assume them; None if there is neither.

    Args:
        interactions: for each column, by entry, the variance of one training's value that more questions
            would remove, NaN where it is unknown; None for a column without instance values. What is unknown
            counts as training noise.
        assumed: standard deviation of a value from one training to the next, if no entry has replicates. It
            moves all columns of a scenario together, and `ASSUMED_COMMON` of its variance all scenarios.
    """
    entries = sorted(board.entries, key=lambda scored: scored.entry)
    trained = np.array([scored.trained for scored in entries])
    groups = [values_of([scored.cells, *(one.cells for one in scored.replicates)]) for scored in entries]
    trainings = np.array([len(values) for values in groups])
    replicated = [index for index, count in enumerate(trainings) if count > 1]
    if not replicated:
        return _assumed(board.columns, trained, assumed) if assumed is not None else None
    deviations = [_deviations(groups[index]) for index in replicated]
    degrees = trainings[replicated] - 1
    pooled = int(degrees.sum())
    scatter = np.concatenate(deviations)
    covariance = scatter.T @ scatter / pooled
    variance = np.diag(covariance)
    kept = _kept(variance, [None if of is None else of[replicated] for of in interactions], degrees)
    ratios = np.array([_ratio(*one, variance) for one in zip(deviations, degrees, strict=True)])
    scale, own = np.ones(len(entries)), np.zeros(len(entries))
    own[replicated] = degrees
    scale[replicated] = (PRIOR_DEGREES + degrees * ratios) / (PRIOR_DEGREES + degrees)
    damped = np.sqrt(kept)
    return TrainingEffects(
        factor=_factor(covariance * np.outer(damped, damped)),
        scale=np.where(trained, scale, 0.0),
        degrees=PRIOR_DEGREES + own,
        pooled_degrees=float(pooled),
        trainings=trainings,
        record=TrainingNoise(
            source="replicates",
            replicated=[entries[index].entry for index in replicated],
            degrees=pooled,
            standard_deviation=_by_column(board.columns, np.sqrt(variance * kept)),
        ),
    )


def _deviations(values: Array) -> Array:
    """Return the deviations of an entry's trainings from their mean, 0 for a missing value."""
    present = ~np.isnan(values)
    means = np.where(present, values, 0).sum(axis=0) / np.maximum(present.sum(axis=0), 1)
    return np.asarray(np.where(present, values - means, 0.0))


def _kept(variance: Array, interactions: Sequence[Array | None], degrees: NDArray[np.int64]) -> Array:
    """Return the share of each column's variance between trainings that more questions would not remove."""
    removed = [0.0 if of is None else degrees @ np.nan_to_num(of) / degrees.sum() for of in interactions]
    share = np.divide(np.array(removed), variance, out=np.ones(len(variance)), where=variance > 0)
    return np.asarray(np.clip(1 - share, 0, 1))


def _ratio(deviations: Array, degrees: int, variance: Array) -> float:
    """Return an entry's variance relative to the pooled one, as a mean over columns; 1 if nothing varies."""
    varies = variance > 0
    if not varies.any():
        return 1.0
    return float(((deviations**2).sum(axis=0)[varies] / degrees / variance[varies]).mean())


def _factor(covariance: Array) -> Array:
    """Return F with F @ F.T = covariance, without the directions that have no variance."""
    values, vectors = np.linalg.eigh(covariance)
    kept = values > 1e-12 * max(1e-12, float(values.max(initial=0.0)))
    return np.asarray(vectors[:, kept] * np.sqrt(values[kept]))


def _assumed(columns: Sequence[Column], trained: NDArray[np.bool_], deviation: float) -> TrainingEffects:
    keys = list(dict.fromkeys(column.scenario_key for column in columns))
    factor = np.zeros((len(columns), 1 + len(keys)))
    for index, column in enumerate(columns):
        better = deviation if column.higher_is_better else -deviation
        factor[index, 0] = better * np.sqrt(ASSUMED_COMMON)
        factor[index, 1 + keys.index(column.scenario_key)] = better * np.sqrt(1 - ASSUMED_COMMON)
    infinite = np.full(len(trained), np.inf)
    return TrainingEffects(
        factor=factor,
        scale=trained.astype(float),
        degrees=infinite,
        pooled_degrees=np.inf,
        trainings=np.ones(len(trained), dtype=np.int64),
        record=TrainingNoise(
            source="assumption",
            replicated=[],
            degrees=None,
            standard_deviation=_by_column(columns, np.full(len(columns), deviation)),
        ),
    )


def _by_column(columns: Sequence[Column], values: Array) -> dict[str, float]:
    return {str(column): float(value) for column, value in zip(columns, values, strict=True)}


def explanation(noise: TrainingNoise | None) -> str:
    """Say in words what the intervals cover of the training."""
    rest = "another pool of entries or another choice of scenarios."
    if noise is None:
        covers = "The intervals cover the choice of questions only: not another training run, another seed"
        return f"{covers}, {rest}"
    if noise.source == "assumption":
        how = (
            "No entry was trained more than once, so the noise of training is not measured but assumed: a "
            f"standard deviation of {max(noise.standard_deviation.values()):g} of every value between "
            f"trainings, the same for all entries, {ASSUMED_COMMON:.0%} of its variance common to all "
            "scenarios"
        )
    else:
        count = len(noise.replicated)
        how = (
            f"The noise of training is estimated from {count} entr{'y' if count == 1 else 'ies'} trained "
            f"again with other seeds ({noise.degrees} trainings beyond the first) as a random effect of each "
            "training, shrunk across entries, and lent to the entries that were trained once"
        )
    return f"{how}. The intervals cover it and the choice of questions: not {rest}"
