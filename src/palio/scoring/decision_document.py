"""The decision on the prizes of a track as a document: <track>.decision.md, and the record beside it."""

from __future__ import annotations

from collections.abc import Iterator

from palio import markup
from palio.config import Competition, Prizes
from palio.layout import Boards, Results
from palio.provenance import write_text
from palio.records import Decision, Leaderboard
from palio.scoring.analysis import has_instances, read_answers
from palio.scoring.decision import decide
from palio.text import markdown_table

TEXT_COLUMNS = frozenset({"place", "entry", "outcome", "who", "better", "worse"})


def decide_track(
    competition: Competition,
    board: Leaderboard,
    results: Results,
    prizes: Prizes,
    boards: Boards,
    *,
    name: str | None = None,
    training_noise: float | None = None,
    remark: str = "",
) -> Iterator[str]:
    """Decide a leaderboard's prizes, write the document and the record beside it, and yield the awards.

    A leaderboard without instances tables, such as a published one, is decided from its values alone.

    Raises:
        BadInput: a table is not the one that was scored.
    """
    answers = read_answers(competition, board, results) if has_instances(board, results) else {}
    decision = decide(board, answers, prizes, training_noise=training_noise, remark=remark)
    if decision is None:
        return
    write_decision(decision, boards, name or board.track)
    yield from (award.text for award in decision.awards)


def write_decision(decision: Decision, boards: Boards, name: str) -> None:
    """Write <name>.decision.md, then the record <name>.decision.json."""
    write_text(boards.table(name, "decision.md"), decision_markdown(decision))
    decision.write(boards.decision(name))


def remove_decision(boards: Boards, name: str) -> None:
    """Remove a decision, and the document on it."""
    for path in (boards.table(name, "decision.md"), boards.decision(name)):
        path.unlink(missing_ok=True)


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


def decision_markdown(decision: Decision) -> str:
    """Return the decision as a document: awards, chances, what was tested, what would change it."""
    title = markup.markdown(f"{decision.competition}, {decision.track}")
    known = {"draws": decision.draws, "pairs": decision.pairs, "alpha": decision.alpha}
    lines = [
        *(f"# Prizes of {title}", ""),
        *([] if decision.final else ["The standings are provisional, and so is this.", ""]),
        *(_awards(decision), "", "## How likely", "", _chances(decision), ""),
        "*Score*: of the mean over an entry's trainings. *P*: share of the draws of questions and trainings "
        "in which it has the place, alone or shared. *Possible ranks*: those that the comparisons of all "
        "pairs leave it.",
        *("", "## What was tested", "", TESTED.format(**known), "", _boundaries(decision), ""),
        *(IN_CONTENTION.format(**known), "", _comparisons(decision), ""),
        markup.markdown(decision.covers),
        *("", "## What would change it", "", *_remedies(decision)),
    ]
    return "\n".join(lines) + "\n"


def _awards(decision: Decision) -> str:
    rows = [
        [_places(award.places), award.outcome.replace("_", " "), ", ".join(award.entries)]
        for award in decision.awards
    ]
    return _table(["place", "outcome", "who"], rows)


def _table(head: list[str], rows: list[list[str]]) -> str:
    return markdown_table(head, rows, TEXT_COLUMNS, markup.markdown)


def _places(places: list[int]) -> str:
    return str(places[0]) if len(places) == 1 else f"{places[0]} to {places[-1]}"


def _chances(decision: Decision) -> str:
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
    return _table(head, rows)


def _boundaries(decision: Decision) -> str:
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
    return _table(["below place", "better", "worse", "p", "at most", "stands"], rows)


def _comparisons(decision: Decision) -> str:
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
    return _table([*head, "p", "p corrected", "separated"], rows)


def _remedies(decision: Decision) -> list[str]:
    if all(boundary.stands for boundary in decision.boundaries):
        return ["Other results only: every place is decided."]
    return [
        *(
            f"- Below place {one.place}: {one.remedy.text} "
            f"({markup.markdown(f'{one.better} against {one.worse}')})."
            for one in decision.boundaries
            if one.remedy
        ),
        "",
        "`palio plan-questions` says of which scenarios, at what price, and with what certainty.",
    ]
