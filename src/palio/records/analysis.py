"""The analysis of a leaderboard: results/leaderboard/<track>.analysis.json."""

from __future__ import annotations

from typing import Literal

from palio.records.common import Part, TrackRecord


class Interval(Part):
    """Limits between which a quantity lies at the analysis' level (95 %)."""

    low: float
    """Lower limit."""
    high: float
    """Upper limit."""


class EntryUncertainty(Part):
    """How sure one entry's score and rank are."""

    entry: str
    """Entry id."""
    final_score: Interval
    """Interval of the final score."""
    stage_scores: dict[str, Interval]
    """Interval of the score, by stage."""
    rank: Interval
    """Interval of the rank: whole numbers, 1 is best."""
    p_first: float
    """Share of the replicates in which the entry has rank 1, alone or shared."""
    p_top3: float
    """Share of the replicates in which its rank is 3 or better."""
    p_above_next: float | None
    """Share of the replicates in which it scores higher than the next entry of the leaderboard (a tie
    counts one half); None for the last."""
    group: int
    """Index of its group in `Uncertainty.groups`."""


class Separation(Part):
    """What it would take to tell the first two entries apart."""

    first: str
    """Entry id of the first."""
    second: str
    """Entry id of the second."""
    difference: Interval
    """Interval of the difference of their final scores, first minus second, paired."""
    separated: bool
    """Whether the interval of the difference excludes 0."""
    instances: int
    """Distinct evaluation instances behind the two scores now, over all columns."""
    instances_needed: int | None
    """Instances that would separate them at the observed difference, if its interval shrinks with the square
    root of their number: no fewer than now unless the two are separated. None if the difference is 0."""


class Uncertainty(Part):
    """What another draw of evaluation instances would have changed."""

    method: Literal["bootstrap", "parametric", "mixed"]
    """bootstrap: instances are resampled, the same for all entries. parametric: there are no instance values,
    so each value is drawn around the observed one, independently by entry. mixed: both, by column."""
    explanation: str
    """One paragraph for readers: method, assumptions, and what the intervals do not cover."""
    level: float
    """Coverage of the intervals."""
    replicates: int
    """Number of draws."""
    seed: int
    """Seed of the draws."""
    instances: int
    """Distinct evaluation instances drawn from (0 if parametric)."""
    parametric_columns: list[str]
    """stage/scenario/metric of the columns without instance values."""
    entries: list[EntryUncertainty]
    """In the order of the leaderboard."""
    groups: list[list[str]]
    """Entries that cannot be told apart from the best of their group, by rank."""
    separation: Separation | None
    """The first two entries; None with fewer than two."""


class RankMove(Part):
    """An entry's rank in two rankings, among the entries that both contain."""

    entry: str
    """Entry id."""
    before: int
    """Rank in the leaderboard."""
    after: int
    """Rank in the other ranking."""


class Removal(Part):
    """The ranking without one entry or one scenario."""

    removed: str
    """Entry id, or stage/scenario."""
    order: list[str]
    """The remaining entries by rank."""
    moved: list[RankMove]
    """Entries whose rank **relative to the other remaining ones** changed; empty if the order is the same."""


class Scheme(Part):
    """One way to turn the same values into a ranking."""

    name: str
    """midrank/geometric and the like, or borda, bradley_terry, one_per_team, reference_panel."""
    description: str
    """What the scheme does, in words."""
    ranks: dict[str, int]
    """Rank by entry; entries outside the scheme's pool are absent."""
    scores: dict[str, float]
    """Final score by entry, on the scheme's own scale."""
    moved: list[RankMove]
    """Entries whose rank differs from the leaderboard's."""


class PrizeVerdict(Part):
    """What one of the first ranks depends on."""

    rank: int
    """1, 2 or 3."""
    entry: str
    """Entry id of its holder."""
    stable: bool
    """Whether no removal and no scheme gives this rank to another entry."""
    depends_on_entries: list[str]
    """Entries whose removal gives this rank to another entry."""
    depends_on_scenarios: list[str]
    """stage/scenario whose removal does."""
    depends_on_schemes: list[str]
    """Names of the schemes that do."""
    text: str
    """The verdict in words."""


class Robustness(Part):
    """What the ranking depends on besides the entries' answers."""

    without_entry: list[Removal]
    """One per entry, by rank."""
    without_scenario: list[Removal]
    """One per scenario, in the order of the columns."""
    schemes: list[Scheme]
    """The leaderboard's own first."""
    verdicts: list[PrizeVerdict]
    """For ranks 1 to 3, as far as there are entries."""


class Correlation(Part):
    """Correlation between open and closed scores over the entries of a track; None where it is undefined."""

    value: float | None
    """The coefficient."""
    low: float | None
    """Lower limit of its 95 % interval."""
    high: float | None
    """Upper limit."""
    n: int
    """Number of entries."""
    reason: str = ""
    """Why there is no value."""

    def __str__(self) -> str:
        if self.value is None or self.low is None or self.high is None:
            return f"no correlation: {self.reason}"
        return f"{self.value:.2f}, 95 % interval {self.low:.2f} to {self.high:.2f}, {self.n} entries"


class ContaminationCount(Part):
    """Contamination of an entry's training data with one stage."""

    instances: int
    """Evaluation instances of the stage."""
    contaminated: int
    """Of these, found in the entry's training data."""
    by_scenario: dict[str, int]
    """Contaminated instances by scenario."""


class OverfittingEntry(Part):
    """One entry's open and closed results side by side."""

    entry: str
    """Entry id."""
    open_score: float
    """Score of the open stage."""
    closed_score: float
    """Score of the closed stage."""
    open_interval: Interval | None
    """Interval of the open score; None where no uncertainty was computed."""
    closed_interval: Interval | None
    """Interval of the closed score, likewise."""
    open_rank: int
    """Rank by open score."""
    closed_rank: int
    """Rank by closed score."""
    rank_drop: int
    """closed_rank - open_rank: positive if the entry did worse on unseen questions."""
    contamination: dict[str, ContaminationCount] | None
    """By stage; None if the entry has no report."""
    contamination_reason: str
    """Why there is no report: no training data, or not measured."""


class Overfitting(Part):
    """How well the open stage predicted the closed one."""

    entries: list[OverfittingEntry]
    """By rank."""
    pearson: Correlation
    """Pearson's correlation between open and closed scores."""
    spearman: Correlation
    """Spearman's."""
    text: str
    """One paragraph for readers."""


class Analysis(TrackRecord):
    """How far a leaderboard can be trusted."""

    final: bool
    """As in the leaderboard."""
    convention: str
    """As in the leaderboard."""
    convention_version: str
    """As in the leaderboard."""
    leaderboard_fingerprint: str
    """Fingerprint of the leaderboard that was analyzed: fingerprint(leaderboard.model_dump(mode="json"))."""
    uncertainty: Uncertainty | None
    """What another draw of instances would have changed; None without scored entries."""
    robustness: Robustness | None
    """What else the ranking depends on; None without scored entries."""
    overfitting: Overfitting | None
    """Open against closed; None without scored entries, or where only one stage is scored."""
