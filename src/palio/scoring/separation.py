"""What it would take to separate two entries: more questions of which scenario, or more trainings.

The variance of the difference of two final scores is taken apart by drawing its sources one at a time: the
questions of each scenario, the training of either entry, the training of the others. Scaled to add up to
that of all drawn together, a part that belongs to n questions, or to k trainings, is n/(n + more), or
k/(k + more), of itself after more of them. A scenario that is drawn by whole HELM runs keeps what differs
between these: more questions of the same runs do not remove it.

Least cost: the questions that bring the variance down to what the test allows, by the allocation of Neyman
(1934), in proportion to √(variance · questions / price), for every number of trainings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
from scipy import optimize, stats

from palio.records import Leaderboard, Way
from palio.scoring.conventions import TIE, Array
from palio.scoring.formula import Scores
from palio.scoring.pool import formula_of
from palio.scoring.uncertainty import AnswersByScenario, Draws, draw, draw_scores, drawn_by_runs, questions_of

DRAWS = 1000
MOST_SEEDS = 100
"""Trainings of an entry beyond which nobody plans."""
MOST_QUESTIONS = 1_000_000
"""More questions of a scenario that nobody asks."""
CHEAPEST = 1e-9
"""Least price of a question, in GPU hours."""

ScenarioKey = tuple[str, str]
Kind = Literal["questions", "one_scenario", "seeds", "both"]


@dataclass(frozen=True)
class ErrorParts:
    """Where the variance of the difference of two final scores comes from."""

    better: str
    worse: str
    difference: float
    scenarios: Sequence[ScenarioKey]
    questions: Array
    """Shape (scenarios,): questions now."""
    of_questions: Array
    """Shape (scenarios,): variance that falls with their number."""
    of_runs: float
    """Variance between HELM runs, which stays."""
    training: Array
    """Shape (2,): variance due to the training of either, which falls with the number of its trainings."""
    trainings: Array
    """Shape (2,): their trainings now."""
    of_others: float
    """Variance due to the training of all others, which stays."""
    covers_training: bool

    @property
    def variance(self) -> float:
        return self.error(np.ones(len(self.questions)), 1)

    def budget(self, allowed: float) -> float:
        """Return the variance that questions and the training of the two may leave."""
        return allowed**2 - self.of_runs - self.of_others

    def trained(self, seeds: int) -> float:
        """Return the variance of training left with so many trainings of each."""
        return float((self.training * self.trainings / np.maximum(self.trainings, seeds)).sum())

    def error(self, times: Array, seeds: int) -> float:
        """Return the variance with `times` as many questions by scenario, and so many trainings of each."""
        return float((self.of_questions / times).sum()) + self.of_runs + self.trained(seeds) + self.of_others


@dataclass(frozen=True)
class Retrained:
    """An entry that is trained again if seeds are added, and its prices in GPU hours."""

    trainings: int
    """Trainings now."""
    training: float
    """Of a training."""
    question: Array
    """Shape (scenarios,): of a question to it."""


@dataclass(frozen=True)
class Prices:
    """Prices in GPU hours."""

    question: Array
    """Shape (scenarios,): of one more question, to all trainings of all entries on the leaderboard."""
    retrained: Sequence[Retrained]
    """All entries that have replicates, and the two."""


def largest_error(difference: float, level: float, power: float) -> float:
    """Return the standard error at which a two-sided test separates a difference with this power."""
    return abs(difference) / float(stats.norm.ppf(1 - level / 2) + stats.norm.ppf(power))


# --- where the variance comes from -----------------------------------------------------------------------


def error_parts(
    board: Leaderboard,
    answers: AnswersByScenario,
    pairs: Sequence[tuple[str, str]],
    *,
    training_noise: float | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> list[ErrorParts]:
    """Take apart the differences of pairs of entries; in each the one with the higher score comes first.

    Args:
        answers, training_noise: as for `palio.scoring.uncertainty.uncertainty`.
    """
    drawn = draw(board, answers, replicates=draws, seed=seed, training_noise=training_noise)
    usable = drawn.usable
    alone = partial(draw_scores, drawn.pool, usable, formula_of(board), draws, seed)
    of_scenario, within_runs = [], []
    for key in board.scenario_keys:
        of_scenario.append(alone(vary=[key]).final)
        by_runs = key in usable.sampled and drawn_by_runs(usable.scenarios[key])
        within_runs.append(alone(vary=[key], within_runs=True).final if by_runs else of_scenario[-1])
    sources = _Sources(board, drawn, alone, of_scenario, within_runs)
    return [sources.parts(*pair) for pair in pairs]


@dataclass(frozen=True)
class _Sources:
    """Final scores of shape (draws, entries), entries by id, with one source drawn at a time."""

    board: Leaderboard
    drawn: Draws
    alone: Callable[..., Scores]
    """`draw_scores` of this leaderboard."""
    of_scenario: Sequence[Array]
    """With the questions of each scenario drawn."""
    within_runs: Sequence[Array]
    """The same, with no HELM run drawn as a whole."""

    def parts(self, *pair: str) -> ErrorParts:
        board, drawn = self.board, self.drawn
        place = {scored.entry: index for index, scored in enumerate(board.entries)}
        better, worse = sorted(pair, key=lambda name: (-drawn.estimate.final[place[name]], name))
        at, columns = [
            [of.index(name) for name in (better, worse)] for of in (list(place), drawn.pool.entries)
        ]
        whole = np.array([_variance(final, *columns) for final in self.of_scenario])
        within = np.minimum(whole, [_variance(final, *columns) for final in self.within_runs])
        of_all = _variance(drawn.questions.final, *at)
        scale = of_all / whole.sum() if whole.sum() > 0 else 0.0
        training = self._training(columns, _variance(drawn.all.final, *at) - of_all)
        questions = [questions_of(drawn.pool, drawn.usable, key) for key in board.scenario_keys]
        return ErrorParts(
            better=better,
            worse=worse,
            difference=float(drawn.estimate.final[at[0]] - drawn.estimate.final[at[1]]),
            scenarios=board.scenario_keys,
            questions=np.array(questions, dtype=float),
            of_questions=within * scale,
            of_runs=float((whole - within).sum() * scale),
            training=training[:2],
            trainings=np.array([1 + len(board.entries[index].replicates) for index in at], dtype=float),
            of_others=float(training[2]),
            covers_training=drawn.effects is not None,
        )

    def _training(self, columns: Sequence[int], total: float) -> Array:
        """Return the variance due to the training of either entry and of all others, of `total` together."""
        effects = self.drawn.effects
        if effects is None:
            return np.zeros(3)
        either = [np.arange(len(effects.scale)) == column for column in columns]
        found = []
        for mask in (*either, ~(either[0] | either[1])):
            only = replace(effects, scale=np.where(mask, effects.scale, 0.0))
            found.append(_variance(self.alone(vary=[], effects=only).final, *columns))
        return np.array(found) * (max(0.0, total) / sum(found) if sum(found) > 0 else 0.0)


def _variance(final: Array, first: int, second: int) -> float:
    return float(np.var(final[:, first] - final[:, second], ddof=1))


# --- how many more ---------------------------------------------------------------------------------------


def ways(parts: ErrorParts, allowed: float, prices: Prices | None) -> list[Way]:
    """Return every way to bring the standard error down to `allowed`, the cheapest first; none with more than
    `MOST_QUESTIONS` of a scenario.

    Without prices, all questions cost the same, and a mix of questions and seeds cannot be weighed.
    """
    if abs(parts.difference) <= TIE or parts.variance <= allowed**2:
        return []
    found = sorted(filter(_can_be_asked, _alone(parts, allowed, prices)), key=_cost)
    mix = min(filter(_can_be_asked, _mixes(parts, allowed, prices)), key=_cost, default=None)
    return [mix, *found] if mix and (not found or _cost(mix) < _cost(found[0])) else found


def _most(way: Way) -> int:
    return max(way.questions.values(), default=0)


def _can_be_asked(way: Way) -> bool:
    return _most(way) <= MOST_QUESTIONS


def _alone(parts: ErrorParts, allowed: float, prices: Prices | None) -> list[Way]:
    """Return every way of questions or of seeds alone."""
    none, now = np.ones(len(parts.questions)), int(parts.trainings.min())
    budget = parts.budget(allowed)
    found = []
    spread = _allocation(parts, budget - parts.trained(now), _question_price(parts, prices, now))
    if spread is not None:
        found.append(_way("questions", parts, spread, now, prices))
    for scenario in range(len(none)):
        others = float(np.delete(parts.of_questions, scenario).sum())
        left = budget - parts.trained(now) - others
        if left > 0 and parts.of_questions[scenario] > 0:
            times = none.copy()
            times[scenario] = parts.of_questions[scenario] / left
            found.append(_way("one_scenario", parts, times, now, prices))
    if seeds := _seeds(parts, allowed):
        found.append(_way("seeds", parts, none, seeds, prices))
    return _distinct(found)


def _cost(way: Way) -> tuple[float, int, str]:
    return way.gpu_hours or 0.0, sum(way.questions.values()), way.kind


def _distinct(found: list[Way]) -> list[Way]:
    """Leave out what an earlier way says already, such as all questions from one scenario."""
    said: list[Way] = []
    for way in found:
        if not any((way.questions, way.seeds) == (other.questions, other.seeds) for other in said):
            said.append(way)
    return said


def _question_price(parts: ErrorParts, prices: Prices | None, seeds: int) -> Array:
    """Return the price of one more question by scenario, asked of the added trainings too."""
    if prices is None:
        return np.ones(len(parts.questions))
    added = sum(max(0, seeds - one.trainings) * one.question for one in prices.retrained)
    return np.maximum(prices.question + added, CHEAPEST)


def _allocation(parts: ErrorParts, budget: float, price: Array) -> Array | None:
    """Return how many times as many questions of each scenario leave the variance `budget` at the least cost;
    None if no number does."""
    variance, weight = parts.of_questions, price * parts.questions
    if variance.sum() <= budget:
        return np.ones(len(variance))
    if budget <= 0:
        return None

    def times(multiplier: float) -> Array:
        return np.maximum(1.0, np.sqrt(multiplier * variance / weight))

    low = float((weight[variance > 0] / variance[variance > 0]).min())
    high = float((np.sqrt(variance * weight).sum() / budget) ** 2)
    solved = optimize.brentq(
        lambda log: (variance / times(math.exp(log))).sum() - budget, math.log(low) - 1, math.log(high) + 1
    )
    return times(math.exp(solved))


def _seeds(parts: ErrorParts, allowed: float) -> int | None:
    """Return the fewest trainings of each that suffice alone."""
    none = np.ones(len(parts.questions))
    more = range(int(parts.trainings.min()) + 1, MOST_SEEDS + 1)
    return next((seeds for seeds in more if parts.error(none, seeds) <= allowed**2), None)


def _mixes(parts: ErrorParts, allowed: float, prices: Prices | None) -> list[Way]:
    """Return the cheapest way of more questions at every number of more seeds."""
    if not prices or not parts.training.any():
        return []
    found, budget = [], parts.budget(allowed)
    for seeds in range(int(parts.trainings.min()) + 1, MOST_SEEDS + 1):
        times = _allocation(parts, budget - parts.trained(seeds), _question_price(parts, prices, seeds))
        if times is None:
            continue
        found.append(_way("both", parts, times, seeds, prices))
    return [way for way in found if way.questions]


def _way(kind: Kind, parts: ErrorParts, times: Array, seeds: int, prices: Prices | None) -> Way:
    more = np.ceil(np.round(parts.questions * (times - 1), 6))
    hours = None
    if prices:
        hours = float(prices.question @ more)
        for one in prices.retrained:
            hours += max(0, seeds - one.trainings) * (
                one.training + float(one.question @ (parts.questions + more))
            )
    return Way(
        kind=kind,
        questions={
            "/".join(key): int(count) for key, count in zip(parts.scenarios, more, strict=True) if count
        },
        seeds=seeds if seeds > parts.trainings.min() else None,
        gpu_hours=hours,
    )


def limits(parts: ErrorParts, allowed: float, prices: Prices | None = None) -> list[str]:
    """Say what does not separate two entries at any number, or at none that can be asked."""
    if abs(parts.difference) <= TIE:
        return ["Nothing separates them: they have the same score."]
    if parts.variance <= allowed**2:
        return []
    said, target = [], allowed**2
    questions = float(parts.of_questions.sum())
    staying = parts.of_runs + parts.of_others
    if target <= staying:
        return [
            f"No number of questions and seeds of the two separates them: {_causes(parts)} leave a "
            f"standard error of {math.sqrt(staying):.4f}, and {allowed:.4f} is allowed."
        ]
    floor = staying + parts.trained(1)
    if target <= floor:
        count = int(parts.trainings.min())
        said.append(
            f"No number of questions alone separates them: with {count} training{'s' * (count > 1)} of "
            f"each, the noise of training leaves a standard error of {math.sqrt(floor):.4f} whatever is "
            f"asked, and {allowed:.4f} is allowed."
        )
    if parts.covers_training and target <= staying + questions:
        said.append(
            "No number of seeds alone separates them: these questions leave a standard error of "
            f"{math.sqrt(staying + questions):.4f}, and {allowed:.4f} is allowed."
        )
    if len(said) == 2:
        said.append("More of both does.")
    said += _too_many(parts, allowed, prices)
    if not parts.covers_training:
        said.append(
            "What the noise of training would leave is not known, as no entry was trained more than once: "
            "these numbers separate the two trainings that were run, not the two entries."
        )
    return said


def _causes(parts: ErrorParts) -> str:
    """Name what leaves an error that neither questions nor seeds of the two lower."""
    causes = {
        "the choice of HELM runs (more run entries of the same scenarios lower it)": parts.of_runs,
        "the training of the others (`replicates` of all entries lower it)": parts.of_others,
    }
    return " and ".join(cause for cause, variance in causes.items() if variance > 0)


def _too_many(parts: ErrorParts, allowed: float, prices: Prices | None) -> list[str]:
    """Say how many questions the ways take that `ways` leaves out for their number."""
    mixes = sorted(_mixes(parts, allowed, prices), key=_most)[:1]
    over = [way for way in (*_alone(parts, allowed, prices), *mixes) if not _can_be_asked(way)]
    if not over:
        return []
    fewest = min(over, key=_most)
    name = max(fewest.questions, key=fewest.questions.__getitem__)
    left_out = "One way is" if len(over) == 1 else f"{len(over)} ways are"
    return [
        f"{left_out} not proposed, for more than {MOST_QUESTIONS:,} questions more of a scenario: "
        f"{name} +{fewest.questions[name]:,}{', and more' if len(over) > 1 else ''}."
    ]
