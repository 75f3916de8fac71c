"""Records of scoring: the leaderboard of a track, and the reference panel for teams."""

from __future__ import annotations

from palio.errors import State
from palio.records.common import Part, TrackRecord


class Column(Part):
    """One scored column: a metric of a scenario of a stage."""

    stage: str
    """open or closed."""
    scenario: str
    """Scenario, as the competition names it."""
    metric: str
    """Metric, as the competition names it."""
    higher_is_better: bool = True
    """Direction of the metric."""


class Cell(Part):
    """One entry's value in one column, or the state that explains why there is none."""

    value: float | None
    """Mean of the metric."""
    state: State = State.FINISHED
    """Why there is no value."""
    reason: str = ""
    """The same in words."""
    n: int = 0
    """Instances behind the value."""
    win_rate: float | None = None
    """None where the value is missing and the policy excludes it."""


class ScoredEntry(Part):
    """One entry on the leaderboard."""

    entry: str
    """Entry id."""
    team: str
    """Name of its team."""
    rank: int
    """1 is best; equal scores share a rank."""
    final_score: float
    """Weighted mean of the stage scores."""
    stage_scores: dict[str, float]
    """Score by stage."""
    scenario_win_rates: dict[str, dict[str, float]]
    """stage -> scenario -> mean win rate over the scenario's columns."""
    cells: list[Cell]
    """In the order of the leaderboard's columns."""
    notes: list[str] = []
    """Footnotes: missing values and what they cost, a stage score of 0 and why."""


class DidNotFinish(Part):
    """One entry that has no score."""

    entry: str
    """Entry id."""
    team: str
    """Name of its team."""
    step: str
    """The step that has no result."""
    state: State
    """How that step ended."""
    reason: str
    """The same in words."""
    log: str | None = None
    """Path of the step's log."""


class Leaderboard(TrackRecord):
    """The ranking of a track, with everything it was computed from."""

    final: bool
    """False for standings: provisional, on whatever is finished."""
    convention: str
    """Name of the win-rate convention."""
    convention_version: str
    """Its version."""
    missing: str
    """Policy for missing values."""
    stage_weights: dict[str, float]
    """Weight of each stage's score in the final score."""
    columns: list[Column]
    """All scored columns."""
    entries: list[ScoredEntry]
    """By rank; entries of equal score share the better rank, in the order of their ids."""
    did_not_finish: list[DidNotFinish]
    """By entry id."""
    inputs: dict[str, str]
    """sha256 of each stage record and table that went in, by path."""


class PanelEntry(Part):
    """One entry of the panel."""

    entry: str
    """Entry id."""
    values: list[float | None]
    """In the order of the panel's columns; None where it has none."""
    instances: list[int]
    """Instances behind each value."""


class Panel(TrackRecord):
    """The open values of some entries, published by the organizers for teams to compare with."""

    columns: list[Column]
    """Columns of the open stage."""
    entries: list[PanelEntry]
    """The entries to compare with."""
