"""Whether intervals cover the truth, and prizes go to the right ones: `python benchmarks/coverage.py`.

200 simulated competitions whose truth is known: 8 entries, two stages of two scenarios of 120 questions each.
An entry's answer to a question is right with a probability that depends on its skill, on the question, and
on how its training turned out. Its true score is what the formula makes of its expected values, over all
questions and all trainings. The same competition is analyzed

    as before       one training of each entry, intervals that cover the questions only
    lent            three trainings of the three best; their noise is lent to the others
    replicated      three trainings of every entry
    assumed         one training of each entry, with the true standard deviation as an assumption

and once more without any noise of training (`--quiet-training`), where `as before` is right.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from palio.records import Cell, Column, Leaderboard, Replicate
from palio.scoring.formula import ranks, scores
from palio.scoring.leaderboard import Candidate, score
from palio.scoring.pool import formula_of
from palio.scoring.uncertainty import (
    ScenarioAnswers,
    interaction,
    mean_of_trainings,
    uncertainty,
)

SCENARIOS = (("open", "a"), ("open", "b"), ("closed", "c"), ("closed", "d"))
COLUMNS = [Column(stage=stage, scenario=name, metric="EM") for stage, name in SCENARIOS]
WEIGHTS = {"open": 1 / 3, "closed": 2 / 3}
SEEDS = 3
HETEROGENEITY = 0.3
GOAL = (0.93, 0.97)
NODES, NODE_WEIGHTS = np.polynomial.hermite_e.hermegauss(40)


@dataclass(frozen=True)
class World:
    """A competition whose truth is known; arrays by entry, scenario."""

    answers: np.ndarray
    """Shape (trainings, entries, scenarios, questions), 0 or 1."""
    expected: np.ndarray
    """Shape (entries, scenarios): the share of right answers over all questions and trainings."""
    deviation: float
    """Standard deviation of such a share from one training to the next."""


def world(number: int, entries: int, questions: int, spread: float, training: float) -> World:
    """Skills of standard deviation `spread`, effects of trainings of about `training`, on the logit scale.

    Half of an effect's variance is common to all scenarios. Entries differ in their noise: its standard
    deviation is lognormal among them.
    """
    generator = np.random.default_rng([number, entries])
    shape = (entries, len(SCENARIOS))
    skill = spread * (generator.normal(size=(entries, 1)) + 0.5 * generator.normal(size=shape))
    difficulty = generator.normal(size=(len(SCENARIOS), questions))
    common = generator.normal(size=(SEEDS, entries, 1))
    training_of = training * np.exp(HETEROGENEITY * generator.normal(size=(entries, 1)))
    effect = training_of * (common + generator.normal(size=(SEEDS, *shape))) / np.sqrt(2)
    logits = (skill + effect)[..., None] - difficulty
    answers = generator.random(logits.shape) < 1 / (1 + np.exp(-logits))

    def mean(variance: np.ndarray | float, centre: np.ndarray) -> np.ndarray:
        at = centre[..., None] + np.sqrt(variance) * NODES
        return (NODE_WEIGHTS / (1 + np.exp(-at))).sum(axis=-1) / NODE_WEIGHTS.sum()

    expected = mean((1 + training_of**2)[..., None], skill)
    at = mean(1.0, skill[..., None] + training_of[..., None] * NODES)
    spread_of_shares = ((at - expected[..., None]) ** 2 * NODE_WEIGHTS).sum(axis=-1) / NODE_WEIGHTS.sum()
    return World(answers.astype(np.float32), expected, float(np.sqrt(spread_of_shares.mean())))


def board_of(simulated: World, trainings: Sequence[int]) -> Leaderboard:
    """The leaderboard of first trainings, with so many trainings of each entry."""
    values = simulated.answers.mean(axis=-1)
    n = simulated.answers.shape[-1]

    def cells(training: int, entry: int) -> list[Cell]:
        return [Cell(value=float(value), n=n) for value in values[training, entry]]

    candidates = [
        Candidate(
            f"entry{entry:03}",
            f"team{entry}",
            cells(0, entry),
            replicates=[
                Replicate(number=number, cells=cells(number - 1, entry)) for number in range(2, count + 1)
            ],
        )
        for entry, count in enumerate(trainings)
    ]
    return score(
        competition="simulated",
        track="t",
        columns=COLUMNS,
        candidates=candidates,
        stage_weights=WEIGHTS,
        final=True,
    )


def answers_of(simulated: World, trainings: Sequence[int]) -> dict[tuple[str, str], ScenarioAnswers]:
    questions = simulated.answers.shape[-1]
    runs = (np.arange(questions) * 4 // questions).astype(np.int64)
    found = {}
    for scenario, key in enumerate(SCENARIOS):
        each = [simulated.answers[:count, entry, scenario] for entry, count in enumerate(trainings)]
        mean = np.stack([mean_of_trainings(one) for one in each])
        of_questions = np.array([interaction(one, runs) for one in each])
        found[key] = ScenarioAnswers(runs, [mean], [of_questions])
    return found


@dataclass
class Tally:
    """Counts over worlds."""

    intervals: int = 0
    covered: int = 0
    ranks_covered: int = 0
    width: float = 0.0

    def __str__(self) -> str:
        share, of_ranks = self.covered / self.intervals, self.ranks_covered / self.intervals
        return f"score {share:.3f}, rank {of_ranks:.3f}, mean width {self.width / self.intervals:.3f}"

    def add(self, board: Leaderboard, found, truth: np.ndarray) -> None:
        true_rank = ranks(truth)
        for of_entry in found.entries:
            entry = int(of_entry.entry.removeprefix("entry"))
            interval = of_entry.final_score
            self.intervals += 1
            self.covered += interval.low <= truth[entry] <= interval.high
            self.ranks_covered += of_entry.rank.low <= true_rank[entry] <= of_entry.rank.high
            self.width += interval.high - interval.low


def designs(simulated: World) -> dict[str, tuple[list[int], float | None]]:
    """Trainings of each entry and an assumption, by name."""
    entries = simulated.answers.shape[1]
    once = [1] * entries
    best = {int(one.entry.removeprefix("entry")) for one in board_of(simulated, once).entries[:3]}
    lent = [SEEDS if entry in best else 1 for entry in range(entries)]
    return {
        "as before": (once, None),
        "lent": (lent, None),
        "replicated": ([SEEDS] * entries, None),
        "assumed": (once, simulated.deviation),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worlds", type=int, default=200)
    parser.add_argument("--entries", type=int, default=8)
    parser.add_argument("--questions", type=int, default=120)
    parser.add_argument("--replicates", type=int, default=400)
    parser.add_argument("--training", type=float, default=0.25)
    options = parser.parse_args()
    tallies: dict[str, Tally] = {}
    for number in range(options.worlds):
        simulated = world(number, options.entries, options.questions, 0.6, options.training)
        for name, (trainings, assumed) in designs(simulated).items():
            board = board_of(simulated, trainings)
            found = uncertainty(
                board,
                answers_of(simulated, trainings),
                replicates=options.replicates,
                seed=number,
                training_noise=assumed,
            )
            truth = scores(COLUMNS, simulated.expected.T, formula_of(board)).final
            tallies.setdefault(name, Tally()).add(board, found, truth)
    for name, tally in tallies.items():
        print(f"{name:12} {tally}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
