"""The decision on the prizes of a track in words, for any format: <track>.decision.md and the report."""

from __future__ import annotations

from dataclasses import dataclass

from palio.records.decision import Decision

TEXT_COLUMNS = frozenset({"place", "entry", "outcome", "who", "better", "worse"})


@dataclass(frozen=True)
class Table:
    """Rows of plain text."""

    title: str
    """What it lists."""
    head: list[str]
    rows: list[list[str]]
    text_columns: frozenset[str] = TEXT_COLUMNS
    """Those not aligned right."""


@dataclass(frozen=True)
class Section:
    """A part of the document under a heading."""

    title: str
    parts: list[str | list[str] | Table]
    """Paragraphs, lists and tables, in plain text."""


TESTED = (
    "Below each place with a prize: whether every entry above is better than every entry below. The p value "
    "of such a boundary is that of its weakest comparison, two-sided, by {draws} draws. The boundaries are "
    "corrected for each other (Holm): the probability that any of them is claimed and does not exist is at "
    "most {alpha:g}."
)
IN_CONTENTION = (
    "Who is in contention for places without such a boundary is decided by all {pairs} pairs of the entries, "
    "corrected for each other by the largest difference in the draws, step by step (Romano and Wolf, 2005). "
    "The probability that any of these differences is claimed and does not exist is at most {alpha:g}. Each "
    "entry may have every rank that they leave it (Mogstad et al., 2024)."
)


SCORES = (
    "Score: of the mean over an entry's trainings. P: share of the draws of questions and trainings in "
    "which it has the place, alone or shared. Possible ranks: those that the comparisons of all pairs leave "
    "it."
)
PLAN = "palio plan-questions says of which scenarios, at what price, and with what certainty."


def decision_sections(decision: Decision) -> list[Section]:
    """Return what a decision rests on: chances, what was tested, what would change it."""
    known = {"draws": decision.draws, "pairs": decision.pairs, "alpha": decision.alpha}
    return [
        Section("How likely", [_chances(decision), SCORES]),
        Section(
            "What was tested",
            [
                TESTED.format(**known),
                _boundaries(decision),
                IN_CONTENTION.format(**known),
                _comparisons(decision),
                decision.covers,
            ],
        ),
        Section("What would change it", _remedies(decision)),
    ]


def award_table(decision: Decision) -> Table:
    """Return who gets what."""
    rows = [
        [award.title, award.outcome.replace("_", " "), ", ".join(award.entries)] for award in decision.awards
    ]
    return Table("Prizes", ["place", "outcome", "who"], rows)


def _chances(decision: Decision) -> Table:
    head = ["entry", "score", *(f"P({place})" for place in range(1, decision.places + 1)), "possible ranks"]
    rows = [
        [
            chance.entry,
            f"{chance.score:.4f}",
            *(f"{share:.3f}" for share in chance.places),
            f"{chance.best_rank} to {chance.worst_rank}",
        ]
        for chance in decision.chances
    ]
    return Table("Chances", head, rows)


def _boundaries(decision: Decision) -> Table:
    rows = [
        [
            str(one.place),
            one.better,
            one.worse,
            f"{one.p:.2g}",
            f"{one.level:.2g}",
            "yes" if one.stands else "no",
        ]
        for one in decision.boundaries
    ]
    return Table("Boundaries", ["below place", "better", "worse", "p", "at most", "stands"], rows)


def _comparisons(decision: Decision) -> Table:
    head = ["better", "worse", "difference", "standard error", "of it questions"]
    rows = [
        [
            one.better,
            one.worse,
            f"{one.difference:.4f}",
            f"{one.standard_error:.4f}",
            f"{one.of_questions:.0%}",
            f"{one.p:.2g}",
            f"{one.p_corrected:.2g}",
            "yes" if one.separated else "no",
        ]
        for one in decision.comparisons
    ]
    return Table("Comparisons", [*head, "p", "p corrected", "separated"], rows)


def _remedies(decision: Decision) -> list[str | list[str] | Table]:
    lines = [
        f"Below place {one.place}: {one.remedy.text} ({one.better} against {one.worse})."
        for one in decision.boundaries
        if one.remedy
    ]
    return [lines, PLAN] if lines else ["Other results only: every place is decided."]
