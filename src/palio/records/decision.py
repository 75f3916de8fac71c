"""The decision on the prizes of a track: results/leaderboard/<track>.decision.json."""

from __future__ import annotations

from typing import Literal

from palio.records.common import Part, TrackRecord


class Chance(Part):
    """How likely an entry's places are, given these questions and trainings."""

    entry: str
    """Entry id."""
    score: float
    """Final score of the mean over its trainings."""
    places: list[float]
    """Share of draws in which it has place 1, 2, …, alone or shared."""
    best_rank: int
    """Best rank that the comparisons of all pairs leave it."""
    worst_rank: int
    """Worst rank that they leave it."""


class Comparison(Part):
    """A comparison of two entries."""

    better: str
    """Entry id of the one with the higher score."""
    worse: str
    """Entry id of the other."""
    difference: float
    """Between their final scores."""
    standard_error: float
    """Of the difference."""
    of_questions: float
    """Share of the squared standard error that is due to the choice of questions; the rest is training."""
    p: float
    """Two-sided p value of this comparison alone."""
    p_corrected: float
    """The same, corrected for the comparisons of all pairs of entries."""
    separated: bool
    """Whether the corrected p value is at most alpha."""


class Remedy(Part):
    """About how much more it would take to separate two entries at the difference seen."""

    times_questions: float | None
    """How many times as many questions, with the same trainings; None if no number suffices."""
    times_trainings: float | None
    """How many times as many trainings of both, with the same questions; None if no number suffices, or if
    the tests do not cover training."""
    text: str
    """The same in words."""


class Boundary(Part):
    """Whether every entry above the end of a place is better than every entry below it."""

    place: int
    """The boundary is below this place."""
    better: str
    """Entry id of the better one in the weakest of these comparisons."""
    worse: str
    """Entry id of the other."""
    p: float
    """Their two-sided p value, and so the boundary's."""
    level: float
    """What it must not exceed: alpha, corrected for the boundaries of all places (Holm)."""
    stands: bool
    """Whether it and all with a smaller p value hold."""
    remedy: Remedy | None
    """What would make it stand; None if it does."""


class Award(Part):
    """Places that are decided together, and who gets them."""

    places: list[int]
    """One place, or several that cannot be told apart."""
    entries: list[str]
    """Entry ids, by score: one, or all that are in contention for these places."""
    outcome: Literal["awarded", "shared", "more_questions", "more_seeds"]
    """awarded: to one entry. shared: among all in contention. Otherwise what the rules ask for first."""
    text: str
    """The award in words."""

    @property
    def title(self) -> str:
        """The places: 1, or 1 to 3."""
        return str(self.places[0]) if len(self.places) == 1 else f"{self.places[0]} to {self.places[-1]}"


class Decision(TrackRecord):
    """Who gets the prizes of a track, and how sure that is."""

    final: bool
    """The leaderboard's `final`: prizes of standings are provisional."""
    leaderboard_fingerprint: str
    """Fingerprint of the leaderboard that was decided on."""
    places: int
    """Number of places with a prize."""
    alpha: float
    """Largest probability that any boundary is claimed that does not exist, and, in its turn, that any entry
    is wrongly left out of contention."""
    not_separable: Literal["share", "more_questions", "more_seeds"]
    """What the rules say about places that cannot be told apart."""
    awards: list[Award]
    """By place."""
    chances: list[Chance]
    """Every entry, by score."""
    boundaries: list[Boundary]
    """By place."""
    comparisons: list[Comparison]
    """Of each of the first entries, as many as there are places, with every entry below it."""
    pairs: int
    """Number of pairs of entries."""
    draws: int
    """Number of draws of questions and trainings."""
    seed: int
    """Seed of the draws."""
    covers: str
    """What noise the tests cover, in words."""

    def chances_in(self, award: Award) -> dict[str, list[float]]:
        """Return, by entry of an award, the probabilities of its places."""
        return {
            chance.entry: [chance.places[place - 1] for place in award.places]
            for chance in self.chances
            if chance.entry in award.entries
        }
