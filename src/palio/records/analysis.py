"""The analysis of a leaderboard: results/leaderboard/<track>.analysis.json."""

from __future__ import annotations

from typing import Literal

from palio.records.common import Part, TrackRecord


class Interval(Part):
    """An interval at the analysis' confidence level (95 %)."""

    low: float
    """Lower limit."""
    high: float
    """Upper limit."""


class EntryUncertainty(Part):
    """Uncertainty of one entry's score and rank."""

    entry: str
    """Entry id."""
    final_score: Interval
    """Interval of the final score."""
    stage_scores: dict[str, Interval]
    """Interval of the score, by stage."""
    rank: Interval
    """Interval of the rank: whole numbers, 1 is best."""
    p_first: float
    """Share of replicates in which the entry has rank 1, alone or shared."""
    p_top3: float
    """Share of replicates in which its rank is 3 or better."""
    p_above_next: float | None
    """Share of replicates in which it ranks above the next entry on the leaderboard (a tie counts one
    half); None for the last entry."""
    group: int
    """Index of its group in `Uncertainty.groups`."""
    trainings: int = 1
    """Trainings behind the interval: the entry's own, and its replicates."""
    mean_score: float | None = None
    """Final score of the mean over its trainings, which the interval is about; None without replicates: then
    it is the leaderboard's."""
    questions_only: Interval | None = None
    """Interval of the final score that covers the choice of questions alone; None if `final_score` does."""
    training_share: float | None = None
    """Share of the variance of the final score that is due to the training of this entry and its rivals; None
    if training is not covered."""


class Separation(Part):
    """The difference between two neighbours on the leaderboard, and what it would take to confirm it."""

    first: str
    """Entry id of the better one."""
    second: str
    """Entry id of the next."""
    difference: Interval
    """Paired interval of the difference between their final scores, first minus second."""
    separated: bool
    """Whether the interval of the difference excludes 0."""
    instances: int
    """Distinct evaluation instances behind the two scores now, over all columns."""
    instances_needed: int | None
    """Instances that would separate them at the observed difference, assuming that the interval shrinks with
    the square root of their number: more than now unless they are separated. None if they are tied, or if
    the interval covers the training too, which no number of instances narrows."""


class TrainingNoise(Part):
    """How much results vary from one training of an entry to the next."""

    source: Literal["replicates", "assumption"]
    """replicates: estimated from entries that were trained several times, and lent to the others. assumption:
    the competition's `scoring.training_noise`."""
    replicated: list[str]
    """Entries with replicates, by id."""
    degrees: int | None
    """Degrees of freedom of the estimate: trainings beyond the first, over all entries; None if assumed."""
    standard_deviation: dict[str, float]
    """By stage/scenario/metric: of the value from one training to the next, the questions' part removed."""


class Selection(Part):
    """An entry that was selected by its score, and what is left of the score without the luck of that."""

    entry: str
    """Entry id."""
    selected_as: str
    """Among whom it was selected, in words."""
    score: float
    """Final score of the mean over its trainings."""
    corrected_score: float
    """The same without the mean luck of whoever is selected so."""


class Uncertainty(Part):
    """How scores and ranks vary with the choice of evaluation instances, and with the training."""

    method: Literal["bootstrap", "parametric", "mixed"]
    """bootstrap: instances are resampled, the same ones for all entries. parametric: without instance values,
    each value is drawn around the observed one, independently by entry. mixed: some columns each way."""
    explanation: str
    """One paragraph for readers: method, assumptions, and what the intervals do not cover."""
    level: float
    """Confidence level of the intervals."""
    replicates: int
    """Number of replicates."""
    seed: int
    """Seed of the random draws."""
    instances: int
    """Distinct evaluation instances that are resampled (0 if parametric)."""
    parametric_columns: list[str]
    """stage/scenario/metric of the columns without instance values."""
    entries: list[EntryUncertainty]
    """In the order of the leaderboard."""
    groups: list[list[str]]
    """Entries that cannot be told apart from the best of their group, by rank."""
    neighbours: list[Separation]
    """The prize ranks and the next: first and second, second and third, third and fourth, where there are
    so many entries."""
    training: TrainingNoise | None = None
    """The training noise that the intervals cover; None if they cover the choice of questions only."""
    selections: list[Selection] = []
    """The first of all entries, and the best of each team's that has several."""

    @property
    def separation(self) -> Separation | None:
        """The first two entries; None with fewer than two entries."""
        return self.neighbours[0] if self.neighbours else None


class RankMove(Part):
    """An entry's rank in two rankings, counted among the entries in both."""

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
    """Entries whose rank **relative to the other remaining entries** changed; empty if none did."""


class Scheme(Part):
    """One way to turn the same values into a ranking."""

    name: str
    """midrank/geometric and the like, or borda, bradley_terry, one_per_team, reference_panel."""
    description: str
    """The scheme in words."""
    ranks: dict[str, int]
    """Rank by entry, without entries outside the scheme's pool."""
    scores: dict[str, float]
    """Final score by entry, on the scheme's own scale."""
    moved: list[RankMove]
    """Entries whose rank differs from the leaderboard's."""


class PrizeVerdict(Part):
    """What one of the prize ranks depends on."""

    rank: int
    """1, 2 or 3."""
    entry: str
    """Entry id of the holder."""
    stable: bool
    """True if no removal and no scheme gives this rank to another entry."""
    depends_on_entries: list[str]
    """Entries whose removal gives this rank to another entry."""
    depends_on_scenarios: list[str]
    """stage/scenario of the scenarios whose removal gives it to another entry."""
    depends_on_schemes: list[str]
    """Names of the schemes that give it to another entry."""
    text: str
    """The verdict in words."""


class Robustness(Part):
    """Sensitivity of the ranking to the pool, the scenarios, and the scoring rule."""

    without_entry: list[Removal]
    """One per entry, by rank."""
    without_scenario: list[Removal]
    """One per scenario, in the order of the columns."""
    schemes: list[Scheme]
    """The leaderboard's own first."""
    views: list[Scheme] = []
    """performance_profile and item_response, to look at: no verdict counts them."""
    verdicts: list[PrizeVerdict]
    """For the first three entries, or as many as there are."""


class Correlation(Part):
    """Correlation between open and closed scores over the entries of a track."""

    value: float | None
    """The coefficient; None if it is undefined."""
    low: float | None
    """Lower limit of its 95 % interval."""
    high: float | None
    """Upper limit of the interval."""
    n: int
    """Number of entries."""
    reason: str = ""
    """Why there is no value."""

    def __str__(self) -> str:
        if self.value is None or self.low is None or self.high is None:
            return f"no correlation: {self.reason}"
        return f"{self.value:.2f}, 95 % interval {self.low:.2f} to {self.high:.2f}, {self.n} entries"


class ContaminationCount(Part):
    """Contamination of an entry's training data with the instances of one stage."""

    instances: int
    """Number of the stage's evaluation instances."""
    contaminated: int
    """How many of them are in the entry's training data."""
    by_scenario: dict[str, int]
    """Contaminated instances by scenario."""


class Fall(Part):
    """By how much an entry's open score is above its closed one, of the means over its trainings, and why as
    far as that can be told. `contamination`, `noise` and `rest` add up to `value`."""

    value: float
    """Open score minus closed score."""
    standard_error: float
    """Of the value, by the draws of questions and, where it is covered, training."""
    of_questions: float | None
    """Share of its square that is due to the choice of questions; None if training is not covered."""
    contamination: float | None
    """What the open score loses on the questions that are not in the entry's training data. None if that is
    not known: it is then part of the rest."""
    contamination_reason: str = ""
    """Why it is not known."""
    noise: float
    """Expected part of the noise of questions and training: how far the fall, contamination taken off, would
    come back to the mean of all entries' in another draw of both."""
    rest: float
    """What is neither: that the stages ask for different things, and tuning to the open one."""


class FallShares(Part):
    """Of the variance of the falls between entries; they add up to 1."""

    contamination: float
    """Share that is gone once known contamination is taken off; negative if that sets them further apart."""
    noise: float
    """Share that the noise of questions and training makes by itself."""
    rest: float
    """What is left."""


class OverfittingEntry(Part):
    """One entry's open and closed results side by side."""

    entry: str
    """Entry id."""
    open_score: float
    """Score of the open stage."""
    closed_score: float
    """Score of the closed stage."""
    open_interval: Interval | None
    """Interval of the open score; None if no uncertainty was computed."""
    closed_interval: Interval | None
    """Interval of the closed score; None if no uncertainty was computed."""
    open_rank: int
    """Rank by open score."""
    closed_rank: int
    """Rank by closed score."""
    rank_drop: int
    """closed_rank - open_rank: positive if the entry did worse on the closed stage."""
    contamination: dict[str, ContaminationCount] | None
    """By stage; None if the entry has no contamination report."""
    contamination_reason: str
    """Why there is no report: no training data, or not measured yet."""
    fall: Fall | None = None
    """The fall from open to closed taken apart; None with too few entries to tell noise from the rest."""


class Overfitting(Part):
    """How well open scores predict closed scores."""

    entries: list[OverfittingEntry]
    """By rank."""
    pearson: Correlation
    """Pearson correlation between open and closed scores."""
    spearman: Correlation
    """Spearman correlation between open and closed scores."""
    shares: FallShares | None = None
    """What the differences between the entries' falls are made of; None with too few entries, or without
    differences."""
    text: str
    """One paragraph for readers."""


class Analysis(TrackRecord):
    """How far a leaderboard can be trusted."""

    final: bool
    """The leaderboard's `final`."""
    convention: str
    """The leaderboard's win-rate convention."""
    convention_version: str
    """Version of the convention."""
    leaderboard_fingerprint: str
    """Fingerprint of the analyzed leaderboard: fingerprint(leaderboard.model_dump(mode="json"))."""
    uncertainty: Uncertainty | None
    """How scores and ranks vary with the choice of instances; None without scored entries."""
    robustness: Robustness | None
    """What else the ranking depends on; None without scored entries."""
    overfitting: Overfitting | None
    """Open against closed; None without scored entries, or if only one stage is scored."""

    def neighbours_of(self, entry: str) -> list[Separation]:
        """Return how well an entry with a prize rank can be told apart from the entries next to it."""
        pairs = self.uncertainty.neighbours if self.uncertainty else []
        return [pair for pair in pairs if entry in (pair.first, pair.second)]

    def holds(self, verdict: PrizeVerdict) -> bool:
        """Return whether a prize rank depends on no choice, and its holder can be told apart from the entries
        next to it."""
        known = self.uncertainty is not None
        return known and verdict.stable and all(pair.separated for pair in self.neighbours_of(verdict.entry))

    @property
    def entry_uncertainty(self) -> dict[str, EntryUncertainty]:
        """Uncertainty by entry id; empty without scored entries."""
        return {entry.entry: entry for entry in self.uncertainty.entries} if self.uncertainty else {}
