"""Uncertainty of scores and ranks: how they vary with the choice of evaluation instances and the training.

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

Training. An entry that was trained several times counts by the mean of its trainings, question by question,
and every draw adds to each column's value the effect of a training (`palio.scoring.training_noise`), divided
by the square root of their number. Without replicates and without an assumption, nothing is added.

Cost: entries x instances x replicates multiplications per column, done as matrix products, and a sort of
entries x replicates values per column. Memory does not grow with the number of columns.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from palio.records import EntryUncertainty, Interval, Leaderboard, ScoredEntry, Separation, Uncertainty
from palio.scoring.conventions import TIE, Array
from palio.scoring.formula import Formula, Scores, ranks, scores, scores_of_win_rates
from palio.scoring.pool import Pool, formula_of, pool_of
from palio.scoring.selection import selections
from palio.scoring.training_noise import TrainingEffects, training_effects
from palio.scoring.training_noise import explanation as training_noise_in_words

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
Question = tuple[str, str]
"""(HELM run, instance id)."""


@dataclass(frozen=True)
class ScenarioAnswers:
    """Every entry's value on every question of one scenario."""

    runs: NDArray[np.int64]
    """Shape (questions,): number of each question's HELM run, from 0, ascending."""
    columns: Sequence[Answers | None]
    """One array of shape (entries, questions) per column of the scenario, entries by id, NaN where a value
    is missing; None for a column without instance values. Of an entry with replicates the means over them."""
    interactions: Sequence[Array | None] = ()
    """By column, of shape (entries,): see `interaction`. Empty without replicates."""
    questions: Sequence[Question] = ()
    """Which they are; empty if that is not known."""


AnswersByScenario = Mapping[tuple[str, str], ScenarioAnswers]
"""By (stage, scenario)."""


def uncertainty(
    board: Leaderboard,
    answers: AnswersByScenario,
    *,
    replicates: int = REPLICATES,
    seed: int = 0,
    remark: str = "",
    training_noise: float | None = None,
) -> Uncertainty | None:
    """Return intervals of scores and ranks, groups, and what separates the first two; None without entries.

    Args:
        answers: may be empty: every column is then drawn parametrically.
        training_noise: assumed standard deviation of a value between trainings, if no entry has replicates.
        remark: a sentence to add to the explanation.
    """
    if not board.entries:
        return None
    drawn = draw(board, answers, replicates=replicates, seed=seed, training_noise=training_noise)
    return uncertainty_of(board, drawn, remark)


def uncertainty_of(board: Leaderboard, drawn: Draws, remark: str = "") -> Uncertainty:
    """Return what the draws of a leaderboard with at least one entry say; see `uncertainty`."""
    pool, usable, final = drawn.pool, drawn.usable, drawn.all.final
    replicates = len(final)
    rank, estimated_rank = ranks(final), ranks(drawn.estimate.final)
    groups = _groups(final)
    group_of = {index: number for number, group in enumerate(groups) for index in group}
    entries = [
        EntryUncertainty(
            entry=scored.entry,
            final_score=_score_interval(final[:, index], float(drawn.estimate.final[index])),
            stage_scores={
                stage: _score_interval(scores[:, index], float(drawn.estimate.stages[stage][index]))
                for stage, scores in drawn.all.stages.items()
            },
            rank=_rank_interval(rank[:, index], int(estimated_rank[index])),
            p_first=float(np.mean(rank[:, index] == 1)),
            p_top3=float(np.mean(rank[:, index] <= 3)),
            p_above_next=_p_above_next(rank, index) if index + 1 < len(board.entries) else None,
            group=group_of[index],
            **_of_training(drawn, scored, index),
        )
        for index, scored in enumerate(board.entries)
    ]
    parametric = [
        str(column) for column, answers_ in zip(pool.columns, usable.columns, strict=True) if answers_ is None
    ]
    sampled = len(pool.columns) - len(parametric)
    return Uncertainty(
        method="bootstrap" if not parametric else "mixed" if sampled else "parametric",
        explanation=_explanation(len(parametric), sampled, replicates, remark, drawn.effects),
        level=LEVEL,
        replicates=replicates,
        seed=drawn.seed,
        instances=sum(len(usable.scenarios[key].runs) for key in usable.sampled),
        parametric_columns=parametric,
        entries=entries,
        groups=[[board.entries[index].entry for index in group] for group in groups],
        neighbours=_neighbours(board, drawn),
        training=drawn.effects.record if drawn.effects else None,
        selections=selections(board, drawn.estimate.final, final),
    )


def _of_training(drawn: Draws, scored: ScoredEntry, index: int) -> dict[str, Any]:
    """Return the fields that say how much of an entry's interval is the training's."""
    if drawn.effects is None:
        return {}
    estimate, total = float(drawn.estimate.final[index]), drawn.all.final[:, index]
    questions = drawn.questions.final[:, index]
    share = 1 - float(np.var(questions) / np.var(total)) if np.var(total) > 0 else 0.0
    return {
        "trainings": 1 + len(scored.replicates),
        "mean_score": estimate if scored.replicates else None,
        "questions_only": _score_interval(questions, estimate),
        "training_share": min(1.0, max(0.0, share)),
    }


# --- draws of a leaderboard ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Draws:
    """Scores in the order of the leaderboard: estimated, and drawn."""

    estimate: Scores
    """Shape (entries,), from the means over all trainings."""
    all: Scores
    """Shape (replicates, entries): questions and training drawn."""
    questions: Scores
    """The same with the questions drawn alone."""
    pool: Pool
    usable: UsableAnswers
    effects: TrainingEffects | None
    seed: int
    """Of the draws."""


def draw(
    board: Leaderboard,
    answers: AnswersByScenario,
    *,
    replicates: int = REPLICATES,
    seed: int = 0,
    training_noise: float | None = None,
) -> Draws:
    """Draw the scores of a leaderboard with at least one entry; for the arguments see `uncertainty`."""
    pool, formula = pool_of(board, all_trainings=True), formula_of(board)
    usable = usable_answers(pool, answers)
    effects = training_effects(board, usable.interactions, training_noise)
    questions = draw_scores(pool, usable, formula, replicates, seed)
    everything = questions
    if effects is not None:
        everything = draw_scores(pool, usable, formula, replicates, seed, effects)
    order = [pool.entries.index(scored.entry) for scored in board.entries]
    estimate = scores(pool.columns, pool.values.T, formula)
    return Draws(
        _ordered(estimate, order),
        _ordered(everything, order),
        _ordered(questions, order),
        pool,
        usable,
        effects,
        seed,
    )


def _ordered(drawn: Scores, order: Sequence[int]) -> Scores:
    return Scores(
        {
            stage: {name: values[..., order] for name, values in scenarios.items()}
            for stage, scenarios in drawn.scenarios.items()
        },
        {stage: values[..., order] for stage, values in drawn.stages.items()},
        drawn.final[..., order],
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
    interactions: Sequence[Array | None]
    """By column of the pool; see `interaction`."""


def usable_answers(pool: Pool, answers: AnswersByScenario) -> UsableAnswers:
    """Keep the columns whose mean over instances is the leaderboard's value, for every entry that has one."""
    columns: list[Answers | None] = []
    interactions: list[Array | None] = []
    sampled: list[tuple[str, str]] = []
    rank_in_scenario: Counter[tuple[str, str]] = Counter()
    for index, column in enumerate(pool.columns):
        key = column.scenario_key
        place = rank_in_scenario[key]
        candidate = answers[key].columns[place] if key in answers else None
        known = answers[key].interactions if key in answers else ()
        rank_in_scenario[key] += 1
        if candidate is not None and _agrees(candidate, answers[key].runs, pool.values[:, index]):
            columns.append(candidate)
            interactions.append(known[place] if known else None)
            sampled.append(key)
        else:
            columns.append(None)
            interactions.append(None)
    return UsableAnswers(answers, columns, list(dict.fromkeys(sampled)), interactions)


def mean_of_trainings(trainings: Answers) -> Answers:
    """Return each question's mean answer over the trainings that have one, from (trainings, questions)."""
    present = ~np.isnan(trainings)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(present, trainings, 0).sum(axis=0) / present.sum(axis=0), dtype=np.float32)


def interaction(trainings: Answers, runs: NDArray[np.int64]) -> float:
    """Return the variance of one training's value in a column that more questions would remove.

    It is what is left of the answers of an entry's trainings, shape (trainings, questions), once the mean of
    each training and of each question is taken out; or of the means of HELM runs, where these are drawn. NaN
    with a single training, or a single question.
    """
    runs_of_column = list(_runs_of_column(trainings, runs))
    if len(runs_of_column) >= MIN_CLUSTERS:
        values = _run_means(trainings, runs)
        weights = np.full(values.shape[1], 1 / values.shape[1])
    else:
        positions = np.concatenate(runs_of_column) if runs_of_column else np.empty(0, dtype=np.int64)
        values = trainings[:, positions].astype(float)
        sizes = [len(of_run) for of_run in runs_of_column]
        weights = np.repeat([1 / (len(sizes) * size) for size in sizes], sizes)
    complete = ~np.isnan(values).any(axis=0)
    values, weights = values[:, complete], weights[complete]
    count, questions = values.shape
    if count < 2 or questions < 2:
        return float("nan")
    rest = values - values.mean(axis=0) - (values.mean(axis=1, keepdims=True) - values.mean())
    variance = (rest**2).sum(axis=0) / (count - 1) * questions / (questions - 1)
    return float(weights**2 @ variance)


def _agrees(answers: Answers, runs: NDArray[np.int64], values: Array) -> bool:
    means = _run_means(answers, runs).mean(axis=1)
    known = ~np.isnan(values)
    return bool((np.abs(means[known] - values[known]) <= AGREEMENT).all())  # a NaN does not agree


def _runs_of_column(answers: Answers, runs: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Yield, for each run in which the column has any value, the positions of its questions."""
    has_value = ~np.isnan(answers).all(axis=0)
    for run in np.unique(runs[has_value]):
        yield np.flatnonzero((runs == run) & has_value)


def values_without(answers: Answers, runs: NDArray[np.int64], left_out: NDArray[np.bool_]) -> Array:
    """Return a column's values on the questions that are not left out, shape (entries,); NaN without any."""
    means = _run_means(answers[:, ~left_out], runs[~left_out]).mean(axis=1)
    return np.asarray(np.round(means, VALUE_DIGITS))


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


def draw_scores(
    pool: Pool,
    usable: UsableAnswers,
    formula: Formula,
    replicates: int,
    seed: int,
    effects: TrainingEffects | None = None,
    *,
    vary: Collection[tuple[str, str]] | None = None,
    within_runs: bool = False,
) -> Scores:
    """Return the scores of every replicate, shape (replicates, entries), entries by id.

    They depend on the seed, the questions and the values, but not on the order of the entries or on `BLOCK`.
    With `effects`, the same questions are drawn, and a training of every entry besides.

    Args:
        vary: (stage, scenario) of the scenarios whose questions are drawn; the others keep their values.
            Default: all.
        within_runs: draw no scenario by whole HELM runs.
    """
    keys = list(dict.fromkeys(column.scenario_key for column in pool.columns))
    streams = dict(zip(keys, np.random.SeedSequence(seed).spawn(len(keys)), strict=True))
    draws = {
        key: draw_questions(usable.scenarios[key], replicates, streams[key], within_runs=within_runs)
        for key in usable.sampled
        if vary is None or key in vary
    }
    trainings = None
    if effects is not None:
        stream = np.random.SeedSequence(seed, spawn_key=(len(keys), len(pool.columns)))
        trainings = effects.draw(replicates, np.random.default_rng(stream))

    def win_rates() -> Iterator[Array]:
        for index, (column, answers) in enumerate(zip(pool.columns, usable.columns, strict=True)):
            key, observed = column.scenario_key, pool.values[:, index]
            if vary is not None and key not in vary:
                values = observed[None, :]
            elif answers is None:
                stream = np.random.SeedSequence(seed, spawn_key=(len(keys), index))
                values = _parametric(pool, index, replicates, stream)
            else:
                values = resampled_values(answers, usable.scenarios[key].runs, draws[key])
            # A draw without any value of an entry is uninformative: the observed value is kept. A value
            # that is missing on the leaderboard stays missing.
            if effects is not None and trainings is not None:
                values = _with_training(
                    values, trainings @ effects.factor[index].astype(np.float32), observed
                )
            values = np.where(np.isnan(values) | np.isnan(observed), observed, values)
            rates = np.empty(values.shape)
            for start in range(0, len(values), BLOCK):
                block = slice(start, start + BLOCK)
                rates[block] = formula.win_rates(column, values[block])
            yield np.broadcast_to(rates, (replicates, len(observed)))

    return scores_of_win_rates(pool.columns, win_rates(), formula)


def _with_training(values: Array, effect: NDArray[np.float32], observed: Array) -> Array:
    """Add effects of the training to a column's drawn values; those of a share stay in [0, 1]."""
    is_share = np.nanmin(observed, initial=0) >= 0 and np.nanmax(observed, initial=0) <= 1
    moved = values + effect
    return np.clip(moved, 0, 1) if is_share else moved


@dataclass(frozen=True)
class Draw:
    """The draws of all replicates from one scenario."""

    counts: NDArray[np.float32]
    """Times drawn: shape (replicates, runs) if whole runs are drawn, else (replicates, questions)."""
    whole_runs: bool


def drawn_by_runs(scenario: ScenarioAnswers) -> bool:
    """Return whether every column of a scenario is a mean over enough HELM runs to draw whole ones."""
    columns = [answers for answers in scenario.columns if answers is not None]
    clusters = [len(list(_runs_of_column(answers, scenario.runs))) for answers in columns]
    return min(clusters, default=0) >= MIN_CLUSTERS


def draw_questions(
    scenario: ScenarioAnswers,
    replicates: int,
    stream: np.random.SeedSequence,
    *,
    within_runs: bool = False,
) -> Draw:
    """Draw whole runs if there are enough of them, unless `within_runs`; else instances."""
    generator = np.random.default_rng(stream)
    sizes = np.bincount(scenario.runs)
    if not within_runs and drawn_by_runs(scenario):
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


def _neighbours(board: Leaderboard, drawn: Draws) -> list[Separation]:
    """Hold each of the prize ranks against the next."""
    instances = _instances(board, drawn.pool, drawn.usable)
    estimate, final = drawn.estimate.final, drawn.all.final
    pairs = list(pairwise(board.entries))[:PRIZES]
    return [
        _separation(
            first,
            second,
            float(estimate[place] - estimate[place + 1]),
            final[:, place] - final[:, place + 1],
            instances,
            enough=drawn.effects is None,
        )
        for place, (first, second) in enumerate(pairs)
    ]


def _instances(board: Leaderboard, pool: Pool, usable: UsableAnswers) -> int:
    """Return the number of distinct questions behind the scores."""
    return sum(questions_of(pool, usable, key) for key in board.scenario_keys)


def questions_of(pool: Pool, usable: UsableAnswers, key: tuple[str, str]) -> int:
    """Return the number of distinct questions of a scenario; of its largest column if it has only values."""
    if key in usable.sampled:
        return len(usable.scenarios[key].runs)
    indexes = [index for index, column in enumerate(pool.columns) if column.scenario_key == key]
    return int(pool.instances[:, indexes].max())


def _separation(
    first: ScoredEntry, second: ScoredEntry, observed: float, leads: Array, instances: int, *, enough: bool
) -> Separation:
    """Return what tells two entries apart.

    `leads` is the difference of their final scores in every draw; `enough` is whether more questions would
    do: they narrow nothing of the training noise.
    """
    interval = _interval(leads, observed)
    needed = None
    if observed > TIE and enough:
        needed = max(1, math.ceil(instances * ((observed - interval.low) / observed) ** 2))
    return Separation(
        first=first.entry,
        second=second.entry,
        difference=interval,
        separated=interval.low > TIE,
        instances=instances,
        instances_needed=needed,
    )


def _explanation(
    parametric: int, sampled: int, replicates: int, remark: str, effects: TrainingEffects | None
) -> str:
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
    sentences.append(training_noise_in_words(effects.record if effects else None))
    return " ".join(sentences)
