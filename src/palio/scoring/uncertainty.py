"""How sure scores and ranks are: what another draw of evaluation instances would have changed.

Paired bootstrap. A replicate draws the questions of every scenario again, the same ones for all entries
and for all columns of the scenario, recomputes every column's value, and from there on everything as
the leaderboard does: win rates, scenario means, stages, final score, rank.

What is drawn: HELM runs are the clusters (an MMLU subject, a BIG-bench task: their instances share a
source). A scenario whose columns are means over at least `ENOUGH_RUNS` runs is drawn by whole runs, the
usual cluster bootstrap; with fewer, the runs stay and each run's instances are drawn, because a handful
of clusters says nothing about others.

A column without usable instance values (only aggregates exist, or HELM's aggregate is no mean over
instances, as for worst-case and bias metrics) is drawn parametrically: Binomial(n, value)/n, alone for
every entry and column. That ignores that all entries answer the same questions and makes differences
look less sure than they are; the result says which columns were drawn so.

Cost: entries x instances x replicates multiplications per column, done as matrix products, and a sort of
entries x replicates values per column. Memory does not grow with the number of columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from palio.records import (
    Column,
    EntryUncertainty,
    Interval,
    Leaderboard,
    Separation,
    Uncertainty,
)
from palio.scoring.conventions import Array, column_win_rates
from palio.scoring.formula import Formula, Scores, ranks, scores_of_win_rates
from palio.scoring.pool import Pool, formula_of, pool_of

LEVEL = 0.95
REPLICATES = 1000
ENOUGH_RUNS = 10
"""From so many HELM runs on, a scenario is drawn by whole runs."""
BLOCK = 128
"""Replicates at a time: what a column needs then stays in the processor's cache."""
VALUE_DIGITS = 6
"""Values drawn that agree to so many digits are a tie; float32 sums differ beyond it."""
AGREEMENT = 1e-4
"""A column's mean over instances may differ from the leaderboard's value by so much."""

Answers = NDArray[np.float32]


@dataclass(frozen=True)
class ScenarioAnswers:
    """Every entry's value on every question of one scenario."""

    runs: NDArray[np.int64]
    """Shape (questions,): number of the HELM run a question belongs to, from 0, ascending."""
    columns: Sequence[Answers | None]
    """One array of shape (entries, questions) per column of the scenario, entries by id, NaN where there
    is no value; None for a column without instance values."""


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
    """Intervals of scores and ranks, groups, and what would separate the first two; None without entries.

    Args:
        answers: may be empty: every column is drawn parametrically then.
        remark: a sentence for the explanation, on where the numbers of instances come from for example.
    """
    if not board.entries:
        return None
    pool = pool_of(board)
    usable = usable_answers(pool, answers)
    drawn = draw_scores(pool, usable, formula_of(board), replicates, seed)
    # From here on in the order of the leaderboard.
    order = [pool.entries.index(one.entry) for one in board.entries]
    final, rank = drawn.final[:, order], ranks(drawn.final)[:, order]
    stages = {stage: of[:, order] for stage, of in drawn.stages.items()}
    groups = _groups(final)
    number = {place: group for group, places in enumerate(groups) for place in places}
    entries = [
        EntryUncertainty(
            entry=one.entry,
            final_score=_score_interval(final[:, place], one.final_score),
            stage_scores={
                stage: _score_interval(of[:, place], one.stage_scores[stage]) for stage, of in stages.items()
            },
            rank=_rank_interval(rank[:, place], one.rank),
            p_first=float(np.mean(rank[:, place] == 1)),
            p_top3=float(np.mean(rank[:, place] <= 3)),
            p_above_next=_p_above(final, place) if place + 1 < len(order) else None,
            group=number[place],
        )
        for place, one in enumerate(board.entries)
    ]
    parametric = [
        "/".join((column.stage, column.scenario, column.metric))
        for column, of in zip(pool.columns, usable.columns, strict=True)
        if of is None
    ]
    sampled = len(pool.columns) - len(parametric)
    instances = sum(len(usable.scenarios[key].runs) for key in usable.sampled)
    return Uncertainty(
        method="bootstrap" if not parametric else "mixed" if sampled else "parametric",
        explanation=_explanation(len(parametric), sampled, replicates, remark),
        level=LEVEL,
        replicates=replicates,
        seed=seed,
        instances=instances,
        parametric_columns=parametric,
        entries=entries,
        groups=[[board.entries[place].entry for place in places] for places in groups],
        separation=_separation(board, final, pool, usable),
    )


# --- what is drawn from --------------------------------------------------------------------------------


@dataclass(frozen=True)
class UsableAnswers:
    scenarios: AnswersByScenario
    columns: Sequence[Answers | None]
    """Per column of the pool; None: parametric."""
    sampled: Sequence[tuple[str, str]]
    """Scenarios with at least one column of instance values."""


def usable_answers(pool: Pool, answers: AnswersByScenario) -> UsableAnswers:
    """Instance values whose mean is the leaderboard's value, for every entry that has one."""
    place: dict[tuple[str, str], int] = {}
    columns: list[Answers | None] = []
    sampled: dict[tuple[str, str], None] = {}
    for number, column in enumerate(pool.columns):
        key = (column.stage, column.scenario)
        position = place.get(key, 0)
        place[key] = position + 1
        of = answers[key].columns[position] if key in answers else None
        if of is not None:
            told = pool.values[:, number]
            means = _run_means(of, answers[key].runs).mean(axis=1)
            known = ~np.isnan(told)
            if not (np.abs(means[known] - told[known]) <= AGREEMENT).all():  # NaN does not agree either
                of = None
        if of is not None:
            sampled[key] = None
        columns.append(of)
    return UsableAnswers(answers, columns, list(sampled))


def _runs_of_column(answers: Answers, runs: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Positions of the questions of each run in which the column has any value."""
    has_value = ~np.isnan(answers).all(axis=0)
    for run in np.unique(runs[has_value]):
        yield np.flatnonzero((runs == run) & has_value)


def _run_means(answers: Answers, runs: NDArray[np.int64]) -> Array:
    """Shape (entries, runs of the column): mean over a run's instances, NaN where an entry has none."""
    means = []
    for positions in _runs_of_column(answers, runs):
        of_run = answers[:, positions]
        present = ~np.isnan(of_run)
        with np.errstate(invalid="ignore"):
            means.append(np.where(present, of_run, 0).sum(axis=1, dtype=float) / present.sum(axis=1))
    return np.stack(means, axis=1) if means else np.full((len(answers), 1), np.nan)


# --- drawing -------------------------------------------------------------------------------------------


def draw_scores(pool: Pool, usable: UsableAnswers, formula: Formula, replicates: int, seed: int) -> Scores:
    """Scores of every replicate: arrays of shape (replicates, entries), entries by id.

    Depends on the seed, the questions and the values, not on the order of entries or on their number
    in a block.
    """
    keys = list(dict.fromkeys((column.stage, column.scenario) for column in pool.columns))
    streams = dict(zip(keys, np.random.SeedSequence(seed).spawn(len(keys)), strict=True))
    draws = {key: draw_questions(usable.scenarios[key], replicates, streams[key]) for key in usable.sampled}

    def win_rates() -> Iterator[Array]:
        for number, (column, answers) in enumerate(zip(pool.columns, usable.columns, strict=True)):
            key = (column.stage, column.scenario)
            if answers is None:
                stream = np.random.SeedSequence(seed, spawn_key=(len(keys), number))
                values = _parametric(pool, number, replicates, stream)
            else:
                values = resampled_values(answers, usable.scenarios[key].runs, draws[key])
            # A draw without a value of an entry says nothing: what was observed stands. And a value that
            # the leaderboard does not have is not drawn either.
            observed = pool.values[:, number]
            values = np.where(np.isnan(values) | np.isnan(observed), observed, values)
            rates = np.empty(values.shape)
            for start in range(0, replicates, BLOCK):
                block = slice(start, start + BLOCK)
                rates[block] = column_win_rates(
                    values[block], column.higher_is_better, formula.convention, formula.missing
                )
            yield rates

    return scores_of_win_rates(pool.columns, win_rates(), formula)


@dataclass(frozen=True)
class Draw:
    """What each replicate draws of one scenario."""

    counts: NDArray[np.float32]
    """How often: shape (replicates, runs) if whole runs are drawn, else (replicates, questions)."""
    whole_runs: bool


def draw_questions(scenario: ScenarioAnswers, replicates: int, stream: np.random.SeedSequence) -> Draw:
    """Whole runs if every column of the scenario is a mean over enough of them, else instances."""
    generator = np.random.default_rng(stream)
    sizes = np.bincount(scenario.runs)
    over = [len(list(_runs_of_column(of, scenario.runs))) for of in scenario.columns if of is not None]
    if min(over, default=0) >= ENOUGH_RUNS:
        n = len(sizes)
        drawn = generator.multinomial(n, np.full(n, 1 / n), size=replicates)
        return Draw(drawn.astype(np.float32), whole_runs=True)
    counts = np.empty((replicates, len(scenario.runs)), dtype=np.float32)
    for run, size in enumerate(sizes):
        drawn = generator.multinomial(size, np.full(size, 1 / size), size=replicates)
        counts[:, scenario.runs == run] = drawn
    return Draw(counts, whole_runs=False)


def resampled_values(answers: Answers, runs: NDArray[np.int64], draw: Draw) -> Array:
    """Values of one column, shape (replicates, entries); NaN where a draw holds no value of an entry."""
    with np.errstate(invalid="ignore", divide="ignore"):  # 0/0 is that NaN
        if draw.whole_runs:
            of_column = [int(runs[positions[0]]) for positions in _runs_of_column(answers, runs)]
            counts = draw.counts[:, of_column].astype(float)
            drawn = (counts @ _run_means(answers, runs).T) / counts.sum(axis=1, keepdims=True)
            return np.asarray(np.round(drawn, VALUE_DIGITS))
        total = np.zeros((len(draw.counts), len(answers)))
        number = 0
        for positions in _runs_of_column(answers, runs):
            of_run, times = answers[:, positions], draw.counts[:, positions]
            gaps = np.isnan(of_run)
            if gaps.any():
                present = np.ascontiguousarray((~gaps).astype(np.float32).T)
                counts = times @ present
            else:
                counts = times.sum(axis=1, keepdims=True)
            known = np.ascontiguousarray(np.where(gaps, np.float32(0), of_run).T)
            total += (times @ known) / counts
            number += 1
        return np.asarray(np.round(total / number, VALUE_DIGITS))


def _parametric(pool: Pool, number: int, replicates: int, stream: np.random.SeedSequence) -> Array:
    """Binomial draws around the values; a value outside [0, 1] or without instances is not varied."""
    generator = np.random.default_rng(stream)
    values = pool.values[:, number]
    instances = pool.instances[:, number]
    varied = (values >= 0) & (values <= 1) & (instances > 0)
    drawn = np.broadcast_to(values, (replicates, len(values))).copy()
    n = instances[varied]
    drawn[:, varied] = generator.binomial(n, values[varied], size=(replicates, len(n))) / n
    return drawn


# --- what the draws say --------------------------------------------------------------------------------

TAILS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)


def _interval(draws: Array, observed: float) -> Interval:
    """Percentiles of the draws, together with the same percentiles moved by twice the draws' pull.

    Noise pulls win rates towards 1/2: the observed score once, against an endless test, and every draw
    once more, against the observed score. How much shows in the mean of the draws. Percentiles alone
    hold the true score in only 85 to 89 % of simulated pools, moved ones in 74 to 90 %, both together in
    91 to 96 % (docs/scoring.md).
    """
    low, high = np.quantile(draws, TAILS)
    pull = 2 * (observed - float(np.mean(draws)))
    return Interval(
        low=min(float(low), float(low) + pull, observed), high=max(float(high), float(high) + pull, observed)
    )


def _score_interval(draws: Array, observed: float) -> Interval:
    """As `_interval`, of a score: it lies between 0 and 1."""
    wide = _interval(draws, observed)
    return Interval(low=max(0.0, wide.low), high=min(1.0, wide.high))


def _rank_interval(draws: Array, observed: int) -> Interval:
    low, high = np.quantile(draws, TAILS, method="inverted_cdf")
    return Interval(low=min(float(low), observed), high=max(float(high), observed))


def _p_above(final: Array, place: int) -> float:
    own, other = final[:, place], final[:, place + 1]
    return float(np.mean(own > other) + np.mean(own == other) / 2)


def _groups(final: Array) -> list[list[int]]:
    """Places in the leaderboard's order, cut where the difference to the group's best leaves out 0."""
    groups: list[list[int]] = []
    for place in range(final.shape[1]):
        if groups:
            difference = final[:, groups[-1][0]] - final[:, place]
            if np.quantile(difference, TAILS[0]) <= 0:
                groups[-1].append(place)
                continue
        groups.append([place])
    return groups


def _separation(board: Leaderboard, final: Array, pool: Pool, usable: UsableAnswers) -> Separation | None:
    if len(board.entries) < 2:
        return None
    first, second = board.entries[:2]
    observed = first.final_score - second.final_score
    draws = final[:, 0] - final[:, 1]
    interval = _interval(draws, observed)
    instances = sum(
        len(usable.scenarios[key].runs) if key in usable.sampled else _instances(pool, key)
        for key in dict.fromkeys((column.stage, column.scenario) for column in pool.columns)
    )
    needed = None
    if observed > 0:
        needed = max(1, math.ceil(instances * ((observed - interval.low) / observed) ** 2))
    return Separation(
        first=first.entry,
        second=second.entry,
        difference=interval,
        separated=interval.low > 0,
        instances=instances,
        instances_needed=needed,
    )


def _instances(pool: Pool, key: tuple[str, str]) -> int:
    """Questions of a scenario without instance values: those of its largest column."""
    places = [number for number, column in enumerate(pool.columns) if _key(column) == key]
    return int(pool.instances[:, places].max())


def _key(column: Column) -> tuple[str, str]:
    return column.stage, column.scenario


def _explanation(parametric: int, sampled: int, replicates: int, remark: str) -> str:
    parts = []
    if sampled:
        parts.append(
            f"Paired bootstrap, {replicates} replicates: each draws the evaluation instances again, the "
            f"same for all entries, by whole HELM runs where a scenario has at least {ENOUGH_RUNS} of them, "
            "within each run otherwise, and computes every score and rank from them."
        )
    if parametric:
        which = f"{parametric} of {parametric + sampled} columns" if sampled else "All columns"
        parts.append(
            f"{which} are parametric, for want of usable instance values: they are drawn from a binomial "
            f"distribution around the observed one ({replicates} replicates), independently for every entry "
            "and column. This ignores that entries answer the same questions, so differences between "
            "entries are shown less sure than they are."
        )
    if remark:
        parts.append(remark)
    parts.append(
        "The intervals cover the choice of questions only: not another training run, another seed, another "
        "pool of entries or another choice of scenarios."
    )
    return " ".join(parts)
