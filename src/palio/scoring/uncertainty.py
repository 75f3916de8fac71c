"""Uncertainty of scores and ranks: how they vary with the choice of evaluation instances.

Paired bootstrap (Efron, 1979). A replicate draws the questions of every scenario again, the same ones for
all entries and for all columns of the scenario, recomputes every column's value, and from there everything
as the leaderboard does: win rates, scenario means, stages, final score, rank.

HELM runs are the clusters (an MMLU subject, a BIG-bench task: their instances share a source). A scenario
whose columns are means over at least `MIN_CLUSTERS` runs is drawn by whole runs, the usual cluster
bootstrap; with fewer, the runs are kept and each run's instances are drawn, because a handful of clusters
says nothing about others.

A column without usable instance values (only aggregates exist, or HELM's aggregate is not a mean over
instances, as for worst-case and bias metrics) is drawn parametrically: Binomial(n, value)/n, independently
for every entry and column. That ignores that all entries answer the same questions, and so understates how
clearly entries differ; the result lists these columns.

Cost: entries x instances x replicates multiplications per column, done as matrix products, and a sort of
entries x replicates values per column. Memory does not grow with the number of columns.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from palio.records import EntryUncertainty, Interval, Leaderboard, ScoredEntry, Separation, Uncertainty
from palio.scoring.conventions import TIE, Array
from palio.scoring.formula import Formula, Scores, ranks, scores_of_win_rates
from palio.scoring.pool import Pool, formula_of, pool_of

LEVEL = 0.95
REPLICATES = 1000
PRIZES = 3
"""Ranks that are held against the next."""
MIN_CLUSTERS = 10
"""A scenario with at least this many HELM runs is drawn by whole runs."""
BLOCK = 128
"""Replicates per block: a column's intermediate arrays then fit in the processor's cache."""
VALUE_DIGITS = 6
"""Resampled values that agree to this many decimals tie; float32 sums differ beyond it."""
AGREEMENT = 1e-4
"""Largest difference between a column's mean over instances and the leaderboard's value."""

Answers = NDArray[np.float32]


@dataclass(frozen=True)
class ScenarioAnswers:
    """Every entry's value on every question of one scenario."""

    runs: NDArray[np.int64]
    """Shape (questions,): number of each question's HELM run, from 0, ascending."""
    columns: Sequence[Answers | None]
    """One array of shape (entries, questions) per column of the scenario, entries by id, NaN where a value
    is missing; None for a column without instance values."""


AnswersByScenario = Mapping[tuple[str, str], ScenarioAnswers]
"""By (stage, scenario)."""


def uncertainty(
    board: Leaderboard,
    answers: AnswersByScenario,
    *,
    replicates: int = REPLICATES,
    seed: int = 0,
    remark: str = "",
) -> Uncertainty | None:
    """Return intervals of scores and ranks, groups, and what separates the first two; None without entries.

    Args:
        answers: may be empty: every column is then drawn parametrically.
        remark: a sentence to add to the explanation.
    """
    if not board.entries:
        return None
    pool = pool_of(board)
    usable = usable_answers(pool, answers)
    drawn = draw_scores(pool, usable, formula_of(board), replicates, seed)
    # From here on in the order of the leaderboard.
    order = [pool.entries.index(scored.entry) for scored in board.entries]
    final, rank = drawn.final[:, order], ranks(drawn.final)[:, order]
    stages = {stage: scores[:, order] for stage, scores in drawn.stages.items()}
    groups = _groups(final)
    group_of = {index: number for number, group in enumerate(groups) for index in group}
    entries = [
        EntryUncertainty(
            entry=scored.entry,
            final_score=_score_interval(final[:, index], scored.final_score),
            stage_scores={
                stage: _score_interval(scores[:, index], scored.stage_scores[stage])
                for stage, scores in stages.items()
            },
            rank=_rank_interval(rank[:, index], scored.rank),
            p_first=float(np.mean(rank[:, index] == 1)),
            p_top3=float(np.mean(rank[:, index] <= 3)),
            p_above_next=_p_above_next(rank, index) if index + 1 < len(order) else None,
            group=group_of[index],
        )
        for index, scored in enumerate(board.entries)
    ]
    parametric = [
        str(column) for column, answers_ in zip(pool.columns, usable.columns, strict=True) if answers_ is None
    ]
    sampled = len(pool.columns) - len(parametric)
    return Uncertainty(
        method="bootstrap" if not parametric else "mixed" if sampled else "parametric",
        explanation=_explanation(len(parametric), sampled, replicates, remark),
        level=LEVEL,
        replicates=replicates,
        seed=seed,
        instances=sum(len(usable.scenarios[key].runs) for key in usable.sampled),
        parametric_columns=parametric,
        entries=entries,
        groups=[[board.entries[index].entry for index in group] for group in groups],
        neighbours=_neighbours(board, final, pool, usable),
    )


# --- the values to draw from ---------------------------------------------------------------------------


@dataclass(frozen=True)
class UsableAnswers:
    """Instance values, by column of the pool."""

    scenarios: AnswersByScenario
    columns: Sequence[Answers | None]
    """None: the column is drawn parametrically."""
    sampled: Sequence[tuple[str, str]]
    """(stage, scenario) of the scenarios with at least one column of instance values."""


def usable_answers(pool: Pool, answers: AnswersByScenario) -> UsableAnswers:
    """Keep the columns whose mean over instances is the leaderboard's value, for every entry that has one."""
    columns: list[Answers | None] = []
    sampled: list[tuple[str, str]] = []
    rank_in_scenario: Counter[tuple[str, str]] = Counter()
    for index, column in enumerate(pool.columns):
        key = column.scenario_key
        candidate = answers[key].columns[rank_in_scenario[key]] if key in answers else None
        rank_in_scenario[key] += 1
        if candidate is not None and _agrees(candidate, answers[key].runs, pool.values[:, index]):
            columns.append(candidate)
            sampled.append(key)
        else:
            columns.append(None)
    return UsableAnswers(answers, columns, list(dict.fromkeys(sampled)))


def _agrees(answers: Answers, runs: NDArray[np.int64], values: Array) -> bool:
    means = _run_means(answers, runs).mean(axis=1)
    known = ~np.isnan(values)
    return bool((np.abs(means[known] - values[known]) <= AGREEMENT).all())  # a NaN does not agree


def _runs_of_column(answers: Answers, runs: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Yield, for each run in which the column has any value, the positions of its questions."""
    has_value = ~np.isnan(answers).all(axis=0)
    for run in np.unique(runs[has_value]):
        yield np.flatnonzero((runs == run) & has_value)


def _run_means(answers: Answers, runs: NDArray[np.int64]) -> Array:
    """Return means over each run's instances, shape (entries, runs of the column), NaN without a value."""
    means = []
    for positions in _runs_of_column(answers, runs):
        values = answers[:, positions]
        present = ~np.isnan(values)
        with np.errstate(invalid="ignore"):
            means.append(np.where(present, values, 0).sum(axis=1, dtype=float) / present.sum(axis=1))
    return np.stack(means, axis=1) if means else np.full((len(answers), 1), np.nan)


# --- drawing -------------------------------------------------------------------------------------------


def draw_scores(pool: Pool, usable: UsableAnswers, formula: Formula, replicates: int, seed: int) -> Scores:
    """Return the scores of every replicate, shape (replicates, entries), entries by id.

    They depend on the seed, the questions and the values, but not on the order of the entries or on `BLOCK`.
    """
    keys = list(dict.fromkeys(column.scenario_key for column in pool.columns))
    streams = dict(zip(keys, np.random.SeedSequence(seed).spawn(len(keys)), strict=True))
    draws = {key: draw_questions(usable.scenarios[key], replicates, streams[key]) for key in usable.sampled}

    def win_rates() -> Iterator[Array]:
        for index, (column, answers) in enumerate(zip(pool.columns, usable.columns, strict=True)):
            key = column.scenario_key
            if answers is None:
                stream = np.random.SeedSequence(seed, spawn_key=(len(keys), index))
                values = _parametric(pool, index, replicates, stream)
            else:
                values = resampled_values(answers, usable.scenarios[key].runs, draws[key])
            # A draw without any value of an entry is uninformative: the observed value is kept. A value
            # that is missing on the leaderboard stays missing.
            observed = pool.values[:, index]
            values = np.where(np.isnan(values) | np.isnan(observed), observed, values)
            rates = np.empty(values.shape)
            for start in range(0, replicates, BLOCK):
                block = slice(start, start + BLOCK)
                rates[block] = formula.win_rates(column, values[block])
            yield rates

    return scores_of_win_rates(pool.columns, win_rates(), formula)


@dataclass(frozen=True)
class Draw:
    """The draws of all replicates from one scenario."""

    counts: NDArray[np.float32]
    """Times drawn: shape (replicates, runs) if whole runs are drawn, else (replicates, questions)."""
    whole_runs: bool


def draw_questions(scenario: ScenarioAnswers, replicates: int, stream: np.random.SeedSequence) -> Draw:
    """Draw whole runs if every column of the scenario is a mean over enough of them, else instances."""
    generator = np.random.default_rng(stream)
    sizes = np.bincount(scenario.runs)
    columns = [answers for answers in scenario.columns if answers is not None]
    clusters = [len(list(_runs_of_column(answers, scenario.runs))) for answers in columns]
    if min(clusters, default=0) >= MIN_CLUSTERS:
        n = len(sizes)
        drawn = generator.multinomial(n, np.full(n, 1 / n), size=replicates)
        return Draw(drawn.astype(np.float32), whole_runs=True)
    counts = np.empty((replicates, len(scenario.runs)), dtype=np.float32)
    for run, size in enumerate(sizes):
        drawn = generator.multinomial(size, np.full(size, 1 / size), size=replicates)
        counts[:, scenario.runs == run] = drawn
    return Draw(counts, whole_runs=False)


def resampled_values(answers: Answers, runs: NDArray[np.int64], draw: Draw) -> Array:
    """Return one column's values, shape (replicates, entries); NaN where a draw has no value of an entry."""
    with np.errstate(invalid="ignore", divide="ignore"):  # 0/0 is that NaN
        if draw.whole_runs:
            clusters = [int(runs[positions[0]]) for positions in _runs_of_column(answers, runs)]
            counts = draw.counts[:, clusters].astype(float)
            means = (counts @ _run_means(answers, runs).T) / counts.sum(axis=1, keepdims=True)
            return np.asarray(np.round(means, VALUE_DIGITS))
        total = np.zeros((len(draw.counts), len(answers)))
        n_runs = 0
        for positions in _runs_of_column(answers, runs):
            values, times = answers[:, positions], draw.counts[:, positions]
            absent = np.isnan(values)
            if absent.any():
                counts = times @ np.ascontiguousarray((~absent).astype(np.float32).T)
            else:
                counts = times.sum(axis=1, keepdims=True)
            total += (times @ np.ascontiguousarray(np.where(absent, np.float32(0), values).T)) / counts
            n_runs += 1
        return np.asarray(np.round(total / n_runs, VALUE_DIGITS))


def _parametric(pool: Pool, index: int, replicates: int, stream: np.random.SeedSequence) -> Array:
    """Draw binomially around the values of a column; one outside [0, 1] or without instances is constant."""
    generator = np.random.default_rng(stream)
    values, instances = pool.values[:, index], pool.instances[:, index]
    varied = (values >= 0) & (values <= 1) & (instances > 0)
    drawn = np.broadcast_to(values, (replicates, len(values))).copy()
    n = instances[varied]
    drawn[:, varied] = generator.binomial(n, values[varied], size=(replicates, len(n))) / n
    return drawn


# --- from draws to intervals and groups ----------------------------------------------------------------

TAILS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)


def _interval(draws: Array, observed: float) -> Interval:
    """Return the percentiles of the draws, widened to include the same percentiles corrected for bias.

    Noise pulls win rates towards 1/2: the observed score once, relative to an infinite test, and every draw
    once more, relative to the observed score. The second pull is the mean draw minus the observed score; the
    correction moves the percentiles back by twice that. In simulated pools, plain percentiles cover the true
    score in only 85 to 89 % of cases, corrected ones in 74 to 90 %, both together in 91 to 96 %
    (docs/scoring.md).
    """
    low, high = (float(limit) for limit in np.quantile(draws, TAILS))
    shift = 2 * (observed - float(np.mean(draws)))
    return Interval(low=min(low, low + shift, observed), high=max(high, high + shift, observed))


def _score_interval(draws: Array, observed: float) -> Interval:
    """Return the interval of a score, which lies in [0, 1]."""
    interval = _interval(draws, observed)
    return Interval(low=max(0.0, interval.low), high=min(1.0, interval.high))


def _rank_interval(draws: Array, observed: int) -> Interval:
    low, high = np.quantile(draws, TAILS, method="inverted_cdf")
    return Interval(low=min(float(low), observed), high=max(float(high), observed))


def _p_above_next(rank: Array, index: int) -> float:
    own, following = rank[:, index], rank[:, index + 1]
    return float(np.mean(own < following) + np.mean(own == following) / 2)


def _groups(final: Array) -> list[list[int]]:
    """Return indexes by group; a new one begins where the difference to the group's best excludes 0."""
    groups: list[list[int]] = []
    for index in range(final.shape[1]):
        if groups and np.quantile(final[:, groups[-1][0]] - final[:, index], TAILS[0]) <= TIE:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def _neighbours(board: Leaderboard, final: Array, pool: Pool, usable: UsableAnswers) -> list[Separation]:
    """Hold each of the prize ranks against the next; `final` is in the order of the leaderboard."""
    instances = _instances(board, pool, usable)
    pairs = list(pairwise(board.entries))[:PRIZES]
    return [
        _separation(first, second, final[:, place] - final[:, place + 1], instances)
        for place, (first, second) in enumerate(pairs)
    ]


def _instances(board: Leaderboard, pool: Pool, usable: UsableAnswers) -> int:
    """Return the number of distinct questions behind the scores."""
    instances = 0
    for key in board.scenario_keys:
        if key in usable.sampled:
            instances += len(usable.scenarios[key].runs)
        else:  # those of its largest column
            indexes = [index for index, column in enumerate(pool.columns) if column.scenario_key == key]
            instances += int(pool.instances[:, indexes].max())
    return instances


def _separation(first: ScoredEntry, second: ScoredEntry, leads: Array, instances: int) -> Separation:
    """Return what tells two entries apart; `leads` is the difference of their final scores in every draw."""
    observed = first.final_score - second.final_score
    interval = _interval(leads, observed)
    needed = None
    if first.rank < second.rank:
        needed = max(1, math.ceil(instances * ((observed - interval.low) / observed) ** 2))
    return Separation(
        first=first.entry,
        second=second.entry,
        difference=interval,
        separated=interval.low > TIE,
        instances=instances,
        instances_needed=needed,
    )


def _explanation(parametric: int, sampled: int, replicates: int, remark: str) -> str:
    sentences = []
    if sampled:
        sentences.append(
            f"Paired bootstrap, {replicates} replicates: each draws the evaluation instances again, the "
            f"same for all entries, by whole HELM runs if a scenario has at least {MIN_CLUSTERS} of them, "
            "within each run otherwise, and recomputes every score and rank."
        )
    if parametric:
        which = f"{parametric} of {parametric + sampled} columns" if sampled else "All columns"
        sentences.append(
            f"{which} are parametric because usable instance values are missing: they are drawn from a "
            f"binomial distribution around the observed value ({replicates} replicates), independently for "
            "every entry and column. This ignores that entries answer the same questions, and so understates "
            "how clearly entries differ."
        )
    if remark:
        sentences.append(remark)
    sentences.append(
        "The intervals cover the choice of questions only: not another training run, another seed, another "
        "pool of entries or another choice of scenarios."
    )
    return " ".join(sentences)
