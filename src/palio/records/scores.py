"""Records of scoring: the leaderboard of a track, and the reference panel for teams."""

from __future__ import annotations

from typing import Literal

from palio.errors import State
from palio.records.common import Made, Part, TrackRecord


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
    missing: Literal["worst", "exclude"] | None = None
    """How a missing value of this column counts, unless the convention has a rule of its own; None: as the
    leaderboard says."""

    @property
    def scenario_key(self) -> tuple[str, str]:
        """(stage, scenario)."""
        return self.stage, self.scenario

    def __str__(self) -> str:
        return f"{self.stage}/{self.scenario}/{self.metric}"


class Cell(Part):
    """One entry's value in one column, or the state that explains why there is none."""

    value: float | None
    """Mean of the metric; None if it is missing."""
    state: State = State.FINISHED
    """Why the value is missing."""
    reason: str = ""
    """Why the value is missing, in words."""
    n: int = 0
    """Number of instances behind the value."""
    win_rate: float | None = None
    """Win rate in the column; None if the value is missing and the policy excludes it."""


class Replicate(Part):
    """The results of an entry trained again with another seed."""

    number: int
    """2 for the first: the entry's own training is 1."""
    cells: list[Cell]
    """In the order of the leaderboard's columns, without win rates."""


class ScoredEntry(Part):
    """One entry on the leaderboard, by its own training."""

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
    """Footnotes: missing values and their effect, the cause of a stage score of 0, replicates without a
    result."""
    trained: bool = True
    """False for a base model as it is, whose score owes nothing to a training."""
    replicates: list[Replicate] = []
    """The same entry trained again: they decide no rank, but how certain it is."""


class DidNotFinish(Part):
    """An entry without a score."""

    entry: str
    """Entry id."""
    team: str
    """Name of its team."""
    step: str
    """The first step without a result; empty if the entry was withdrawn."""
    state: State
    """How that step ended."""
    reason: str
    """Why there is no result, in words."""
    log: str | None = None
    """Path of the step's log."""


class Leaderboard(TrackRecord):
    """The ranking of a track, with everything that it was computed from."""

    final: bool
    """False for standings: provisional, over the entries that have finished."""
    convention: str
    """Name of the win-rate convention."""
    convention_version: str
    """Version of the convention."""
    missing: str
    """Policy for missing values."""
    stage_weights: dict[str, float]
    """Weight of each stage's score in the final score."""
    columns: list[Column]
    """All scored columns."""
    entries: list[ScoredEntry]
    """By rank; entries with equal scores share the better rank, in the order of their ids."""
    did_not_finish: list[DidNotFinish]
    """By entry id."""
    inputs: dict[str, str]
    """sha256 of each stage record and table that was scored, by path."""
    made: Made | None = None
    """The settings that it was made with; None outside the workflow."""

    @property
    def stages(self) -> list[str]:
        """Every scored stage, in the order of the columns: the weights' own is lost in JSON."""
        return list(dict.fromkeys(column.stage for column in self.columns))

    @property
    def scenario_keys(self) -> list[tuple[str, str]]:
        """(stage, scenario) of every scored scenario, in the order of the columns."""
        return list(dict.fromkeys(column.scenario_key for column in self.columns))


class PanelEntry(Part):
    """One member of the panel."""

    entry: str
    """Entry id."""
    values: list[float | None]
    """In the order of the panel's columns; None where it is missing."""
    instances: list[int]
    """Number of instances behind each value."""


class Panel(TrackRecord):
    """Open-stage values of some entries, published by the organizers for teams to compare with."""

    columns: list[Column]
    """Columns of the open stage."""
    entries: list[PanelEntry]
    """The members of the panel."""
