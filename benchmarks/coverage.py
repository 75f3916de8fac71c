"""Whether intervals cover the truth, and prizes go to the right ones: `python benchmarks/coverage.py`.

200 simulated competitions whose truth is known: 12 entries, two stages of two scenarios of 120 questions.
An entry's answer to a question is right with a probability that depends on its skill, on the question, and on
how its training turned out. Its true score is what the formula makes of its expected values, over all
questions and all trainings. The same competition is analyzed

    as before       one training of each entry, intervals that cover the questions only
    lent            three trainings of the three best; their noise is lent to the others
    replicated      three trainings of every entry
    assumed         one training of each entry, with the true standard deviation as an assumption

and so are competitions in which training has no noise, where `as before` is right; in which trainings differ
in all scenarios alike, or in each on its own; in which one entry is far better than the others; and in which
all are equally good, where every prize for one entry is false. It ends with 1 if the intervals that cover
training hold less than 93 % or more than 97 % of the true scores of entries and trainings that differ, or if
more prizes are false than alpha (5 %) allows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from palio.config import Prizes
from palio.records import Cell, Column, Decision, Leaderboard, Replicate, Uncertainty
from palio.scoring.conventions import Array
from palio.scoring.decision import decide
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
GOAL = (0.93, 0.97)
PRIZES = Prizes()
ALLOWED = PRIZES.alpha + 0.03
"""Share of worlds with a false prize: alpha, and two standard errors of 200 worlds."""
NEW = ("lent", "replicated", "assumed")
NODES, NODE_WEIGHTS = np.polynomial.hermite_e.hermegauss(40)


@dataclass(frozen=True)
class World:
    """A competition whose truth is known; arrays by entry, scenario."""

    answers: NDArray[np.float32]
    """Shape (trainings, entries, scenarios, questions), 0 or 1."""
    expected: Array
    """Shape (entries, scenarios): the share of right answers over all questions and trainings."""
    deviation: float
    """Standard deviation of such a share from one training to the next."""


@dataclass(frozen=True)
class Kind:
    """How the worlds of one kind are drawn, on the logit scale."""

    spread: float = 0.6
    """Standard deviation of the entries' skills."""
    training: float = 0.25
    """Of the effects of trainings."""
    heterogeneity: float = 0.3
    """Of the logarithm of that, among entries."""
    common: float = 0.5
    """Share of the variance of the effects of trainings that is common to all scenarios."""
    advantage: float = 0.0
    """Of the first entry."""


def world(kind: Kind, number: int, entries: int, questions: int) -> World:
    generator = np.random.default_rng([number, entries])
    shape = (entries, len(SCENARIOS))
    skill = kind.spread * (generator.normal(size=(entries, 1)) + 0.5 * generator.normal(size=shape))
    if kind.advantage:
        skill[0] = skill[1:].max(axis=0) + kind.advantage
    difficulty = generator.normal(size=(len(SCENARIOS), questions))
    common = generator.normal(size=(SEEDS, entries, 1))
    training_of = kind.training * np.exp(kind.heterogeneity * generator.normal(size=(entries, 1)))
    own = generator.normal(size=(SEEDS, *shape))
    effect = training_of * (np.sqrt(kind.common) * common + np.sqrt(1 - kind.common) * own)
    logits = (skill + effect)[..., None] - difficulty
    answers = generator.random(logits.shape) < 1 / (1 + np.exp(-logits))

    def mean(variance: Array | float, centre: Array) -> Array:
        at = centre[..., None] + np.sqrt(variance) * NODES
        average: Array = (NODE_WEIGHTS / (1 + np.exp(-at))).sum(axis=-1) / NODE_WEIGHTS.sum()
        return average

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
    worlds: int = 0
    false: int = 0
    """Worlds in which an entry was given a place that is not its own, or left out of its own."""
    first: int = 0
    """Worlds in which the first place went to one entry."""

    luck: float = 0.0
    """Sum over worlds of the first entry's score minus its true one."""
    luck_left: float = 0.0
    """The same of its score without the luck of the selected."""

    @property
    def coverage(self) -> float:
        return self.covered / self.intervals

    def __str__(self) -> str:
        false, first = self.false / self.worlds, self.first / self.worlds
        prizes = f"false prizes {false:.3f}, first place decided {first:.3f}"
        luck = (
            f"luck of the first {self.luck / self.worlds:+.3f}, corrected {self.luck_left / self.worlds:+.3f}"
        )
        covered = f"scores covered {self.coverage:.3f}, ranks {self.ranks_covered / self.intervals:.3f}"
        return f"{covered}, width {self.width / self.intervals:.3f}; {prizes}; {luck}"

    def add_decision(self, decision: Decision, truth: Array) -> None:
        """Count a decision; a claim about entries that are equal in truth is false."""
        self.worlds += 1
        wrong = False
        better = (truth[None, :] > truth[:, None] + 1e-12).sum(axis=1)
        not_worse = (truth[None, :] > truth[:, None] - 1e-12).sum(axis=1)
        for award in decision.awards:
            self.first += award.places[0] == 1 and award.outcome == "awarded"
            inside = [int(name.removeprefix("entry")) for name in award.entries]
            if award.outcome == "awarded":  # it alone has that rank in truth
                wrong |= better[inside[0]] != award.places[0] - 1 or not_worse[inside[0]] != award.places[0]
            for place in award.places:  # who has it in truth is among them
                wrong |= not any(better[one] < place <= not_worse[one] for one in inside)
        self.false += bool(wrong)

    def add(self, board: Leaderboard, found: Uncertainty, truth: Array) -> None:
        true_rank = ranks(truth)
        selection = found.selections[0]
        first = truth[int(selection.entry.removeprefix("entry"))]
        self.luck += selection.score - first
        self.luck_left += selection.corrected_score - first
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
    parser.add_argument("--entries", type=int, default=12)
    parser.add_argument("--questions", type=int, default=120)
    parser.add_argument("--replicates", type=int, default=400)
    options = parser.parse_args()
    print(f"{options.worlds} worlds of {options.entries} entries")
    kinds = {
        "Entries and trainings differ": Kind(),
        "Trainings do not differ": Kind(training=1e-6),
        "Trainings differ in all scenarios alike": Kind(common=1.0),
        "Trainings differ in each scenario on its own": Kind(common=0.0),
        "One entry is far better": Kind(advantage=1.0),
        "Entries are equal": Kind(spread=0.0, heterogeneity=0.0),
    }
    found = {title: simulate(kind, options) for title, kind in kinds.items()}
    for title, tallies in found.items():
        print_tallies(title, tallies)
    usual = found["Entries and trainings differ"]
    covered = all(GOAL[0] <= usual[name].coverage <= GOAL[1] for name in NEW)
    held = all(of[name].false <= ALLOWED * of[name].worlds for of in found.values() for name in NEW)
    return 0 if covered and held else 1


def simulate(kind: Kind, options: argparse.Namespace) -> dict[str, Tally]:
    tallies: dict[str, Tally] = {}
    for number in range(options.worlds):
        simulated = world(kind, number, options.entries, options.questions)
        for name, (trainings, assumed) in designs(simulated).items():
            board, answers = board_of(simulated, trainings), answers_of(simulated, trainings)
            truth = scores(COLUMNS, simulated.expected.T, formula_of(board)).final
            tally = tallies.setdefault(name, Tally())
            found = uncertainty(
                board, answers, replicates=options.replicates, seed=number, training_noise=assumed
            )
            assert found is not None
            tally.add(board, found, truth)
            decision = decide(
                board, answers, PRIZES, draws=options.replicates, seed=number, training_noise=assumed
            )
            assert decision is not None
            tally.add_decision(decision, truth)
    return tallies


def print_tallies(title: str, tallies: dict[str, Tally]) -> None:
    print(f"{title}:")
    for name, tally in tallies.items():
        print(f"  {name:12} {tally}")


if __name__ == "__main__":
    sys.exit(main())
