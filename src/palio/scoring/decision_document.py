"""The decision on the prizes of a track as a document: <track>.decision.md, and the record beside it."""

from __future__ import annotations

from collections.abc import Iterator

from palio import markup
from palio.config import Competition, Prizes
from palio.layout import Boards, Results
from palio.provenance import write_text
from palio.records import Decision, Leaderboard
from palio.records.decision_words import Table, award_table, decision_sections
from palio.scoring.analysis import has_instances, read_answers
from palio.scoring.decision import decide
from palio.text import markdown_table


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


def decision_markdown(decision: Decision) -> str:
    """Return the decision as a document: awards, and the sections."""
    blocks = [f"# Prizes of {markup.markdown(f'{decision.competition}, {decision.track}')}"]
    if not decision.final:
        blocks.append("The standings are provisional, and so is this.")
    blocks.append(_part_markdown(award_table(decision)))
    for section in decision_sections(decision):
        blocks += [f"## {section.title}", *(_part_markdown(part) for part in section.parts)]
    return "\n\n".join(blocks) + "\n"


def _part_markdown(part: str | list[str] | Table) -> str:
    if isinstance(part, Table):
        return markdown_table(part.head, part.rows, part.text_columns, markup.markdown)
    if isinstance(part, list):
        return "\n".join(f"- {markup.markdown(line)}" for line in part)
    return markup.markdown(part)
