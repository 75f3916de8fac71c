"""What it would take to separate entries: printed by `palio plan-questions --json`."""

from __future__ import annotations

from typing import Literal

from palio.records.common import Part, TrackRecord


class Way(Part):
    """One way to separate two entries."""

    kind: Literal["questions", "one_scenario", "seeds", "both"]
    """questions: of whatever scenarios are worth their price. one_scenario: of one alone. seeds: trainings
    alone. both: the mix that costs least, if it costs less than any of these."""
    questions: dict[str, int]
    """How many more questions, by stage/scenario; empty for none."""
    seeds: int | None
    """Trainings of each of the two, their own included; None: as many as now."""
    gpu_hours: float | None
    """What it costs at the measured price of a question and of a training; None if that was not measured."""


class Separating(Part):
    """Two entries, and what would separate them."""

    better: str
    """Entry id of the one with the higher score."""
    worse: str
    """Entry id of the other."""
    difference: float
    """Between their final scores, of the means over all trainings."""
    standard_error: float
    """Of the difference."""
    largest_error: float
    """Standard error at which the difference would be separated, at this level and with this power."""
    level: float
    """Level of the two-sided test."""
    variance: dict[str, float]
    """Squared standard error by where it comes from: stage/scenario, HELM runs, training of the two, training
    of others. No number of questions or seeds removes what HELM runs and the training of others bring."""
    ways: list[Way]
    """Cheapest first; empty if they are separated, or cannot be."""
    limits: list[str]
    """What cannot separate them at any number, and why."""
    config: str
    """Lines to change in the competition's file for the first way; empty without one, or without a file."""


class QuestionPlan(TrackRecord):
    """How many more questions or seeds separate entries of a track."""

    leaderboard_fingerprint: str
    """Fingerprint of the leaderboard."""
    power: float
    """Probability of separating them, if the difference seen is the true one."""
    pairs: list[Separating]
    """The two that were named, or those at each place with a prize that could not be decided."""
    assumptions: list[str]
    """What the numbers assume."""
