"""A leaderboard as files and on the terminal: JSON (the record), CSV, Parquet, Markdown, LaTeX.

With an analysis beside it, the tables also say how sure scores and ranks are.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from palio.errors import State
from palio.layout import Boards
from palio.provenance import atomic_path, write_text
from palio.records import (
    Analysis,
    DidNotFinish,
    EntryUncertainty,
    Interval,
    Leaderboard,
    OverfittingEntry,
    Removal,
)
from palio.text import markdown_table


def write_leaderboard(
    board: Leaderboard, boards: Boards, analysis: Analysis | None = None, name: str | None = None
) -> None:
    """Write <name>.{csv,parquet,md,tex} and .analysis.{md,json}, then the record <name>.json.

    Default name: the track's.
    """
    name = name or board.track
    rows = leaderboard_rows(board, analysis)
    write_text(boards.table(name, "csv"), _csv(rows))
    with atomic_path(boards.table(name, "parquet")) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema=_schema(board, analysis)), temporary)
    write_text(boards.table(name, "md"), markdown(board, analysis))
    write_text(boards.table(name, "tex"), latex(board, analysis))
    if analysis is None:
        for stale in ("analysis.md", "analysis.json"):
            boards.table(name, stale).unlink(missing_ok=True)
    else:
        write_text(boards.table(name, "analysis.md"), analysis_markdown(board, analysis))
        analysis.write(boards.analysis(name))
    board.write(boards.leaderboard(name))


def _sureness(analysis: Analysis | None) -> dict[str, EntryUncertainty]:
    return (
        {one.entry: one for one in analysis.uncertainty.entries} if analysis and analysis.uncertainty else {}
    )


# --- one row per entry: CSV and Parquet ------------------------------------------------------------------


def leaderboard_rows(board: Leaderboard, analysis: Analysis | None = None) -> list[dict[str, Any]]:
    """One flat row per entry, those that did not finish last; the same keys in every row."""
    names = _schema(board, analysis).names
    sureness = _sureness(analysis)
    rows = []
    for one in board.entries:
        row: dict[str, Any] = {
            "rank": one.rank,
            "entry": one.entry,
            "team": one.team,
            "state": State.FINISHED.value,
            "final_score": one.final_score,
            **{f"{stage}_score": value for stage, value in one.stage_scores.items()},
        }
        if one.entry in sureness:
            of = sureness[one.entry]
            row |= {
                "final_score_low": of.final_score.low,
                "final_score_high": of.final_score.high,
                "rank_low": int(of.rank.low),
                "rank_high": int(of.rank.high),
                "p_first": of.p_first,
                "p_top3": of.p_top3,
                "group": of.group + 1,
            }
        for column, cell in zip(board.columns, one.cells, strict=True):
            name = f"{column.stage}/{column.scenario}/{column.metric}"
            row |= {name: cell.value, f"{name}/win_rate": cell.win_rate, f"{name}/state": cell.state.value}
        rows.append(row)
    rows += [
        {
            "entry": one.entry,
            "team": one.team,
            "state": one.state.value,
            "step": one.step,
            "reason": one.reason,
        }
        for one in board.did_not_finish
    ]
    return [{name: row.get(name) for name in names} for row in rows]


def _schema(board: Leaderboard, analysis: Analysis | None) -> pa.Schema:
    text, number, whole = pa.string(), pa.float64(), pa.int64()
    fields = [("rank", whole), ("entry", text), ("team", text), ("state", text), ("step", text)]
    fields += [("reason", text), ("final_score", number)]
    fields += [(f"{stage}_score", number) for stage in board.stage_weights]
    if analysis is not None:
        fields += [("final_score_low", number), ("final_score_high", number), ("rank_low", whole)]
        fields += [("rank_high", whole), ("p_first", number), ("p_top3", number), ("group", whole)]
    for column in board.columns:
        name = f"{column.stage}/{column.scenario}/{column.metric}"
        fields += [(name, number), (f"{name}/win_rate", number), (f"{name}/state", text)]
    return pa.schema(fields)


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


# --- the short table: Markdown, LaTeX, terminal ----------------------------------------------------------

SURENESS = ("95 % interval", "rank 95 %", "P(first)", "P(top 3)", "group")
WORDS = {"entry", "team", "state", "reason", "log", "did not finish"} | {
    "without entry",
    "without scenario",
    "who moves",
}
"""Columns that hold words, not numbers: aligned left."""


def _table(board: Leaderboard, analysis: Analysis | None) -> tuple[list[str], list[list[str]], list[str]]:
    """(head, rows, footnotes)."""
    sureness = _sureness(analysis)
    stages = list(board.stage_weights)
    head = ["rank", "entry", "team", "final score", *stages]
    if sureness:
        head += SURENESS
    footnotes: list[str] = []
    body = []
    for one in board.entries:
        marks = []
        for note in one.notes:
            footnotes.append(f"{one.entry}: {note}")
            marks.append(str(len(footnotes)))
        name = one.entry + (f" [{','.join(marks)}]" if marks else "")
        row = [str(one.rank), name, one.team, f"{one.final_score:.4f}"]
        row += [f"{one.stage_scores[stage]:.4f}" for stage in stages]
        if sureness:
            of = sureness[one.entry]
            row += [f"{of.final_score.low:.3f} to {of.final_score.high:.3f}"]
            row += [f"{of.rank.low:.0f} to {of.rank.high:.0f}", f"{of.p_first:.2f}", f"{of.p_top3:.2f}"]
            row += [str(of.group + 1)]
        body.append(row)
    return head, body, footnotes


def _caption(board: Leaderboard) -> str:
    kind = "Leaderboard" if board.final else "Standings (provisional)"
    weights = " + ".join(f"{weight:.4g} {stage}" for stage, weight in board.stage_weights.items())
    return (
        f"{kind} of {board.competition}, track {board.track}: {weights}; win rates by {board.convention} "
        f"(version {board.convention_version}); missing values: {board.missing}; "
        f"{len(board.entries)} entries in the pool"
    )


def _remarks(analysis: Analysis | None) -> list[str]:
    """What the analysis says in words."""
    remarks = []
    if analysis and analysis.robustness:
        remarks += [verdict.text for verdict in analysis.robustness.verdicts]
    if analysis and analysis.overfitting:
        remarks.append(analysis.overfitting.text)
    if analysis and analysis.uncertainty:
        remarks.append(f"Entries of one group cannot be told apart. {analysis.uncertainty.explanation}")
    return remarks


def _stopped(one: DidNotFinish) -> str:
    return f"{one.state.value.replace('_', ' ')}{' at ' + one.step if one.step else ''}"


def markdown(board: Leaderboard, analysis: Analysis | None = None) -> str:
    head, body, footnotes = _table(board, analysis)
    lines = [f"{_caption(board)}.", "", markdown_table(head, body, WORDS)]
    if footnotes:
        lines += ["", *(f"{number}. {note}" for number, note in enumerate(footnotes, 1))]
    if board.did_not_finish:
        rows = [
            [one.entry, one.team, _stopped(one), one.reason, one.log or ""] for one in board.did_not_finish
        ]
        lines += ["", markdown_table(["did not finish", "team", "state", "reason", "log"], rows, WORDS)]
    for remark in _remarks(analysis):
        lines += ["", remark]
    return "\n".join(lines) + "\n"


def analysis_markdown(board: Leaderboard, analysis: Analysis) -> str:
    """The analysis' tables: leave-one-out, every way of scoring side by side, open against closed."""
    lines = [f"# How far this leaderboard can be trusted: {board.competition}, {board.track}", ""]
    lines += [f"- {remark}" for remark in _remarks(analysis)]
    if analysis.robustness:
        for what, removals in (
            ("entry", analysis.robustness.without_entry),
            ("scenario", analysis.robustness.without_scenario),
        ):
            changed = sum(bool(one.moved) for one in removals)
            lines += [
                "",
                f"## Without one {what}: {changed} of {len(removals)} removals reorder the rest",
                "",
            ]
            lines.append(markdown_table([f"without {what}", "who moves"], map(_removed, removals), WORDS))
        schemes = analysis.robustness.schemes
        lines += ["", "## Every way of scoring: ranks", ""]
        rows = [
            [one.entry, *(str(scheme.ranks.get(one.entry, "")) for scheme in schemes)]
            for one in board.entries
        ]
        lines.append(markdown_table(["entry", *(scheme.name for scheme in schemes)], rows, WORDS))
        lines += ["", *(f"- `{scheme.name}`: {scheme.description}" for scheme in schemes)]
    if analysis.overfitting:
        lines += ["", "## Open against closed", ""]
        head = [
            "entry",
            "open",
            "closed",
            "open rank",
            "closed rank",
            "rank drop",
            "seen open",
            "seen closed",
        ]
        rows = [
            [
                one.entry,
                _with_interval(one.open_score, one.open_interval),
                _with_interval(one.closed_score, one.closed_interval),
                str(one.open_rank),
                str(one.closed_rank),
                f"{one.rank_drop:+d}",
                *(_seen(one, stage) for stage in ("open", "closed")),
            ]
            for one in analysis.overfitting.entries
        ]
        lines.append(markdown_table(head, rows, WORDS))
        lines += ["", "*seen*: evaluation instances found in the entry's training data, of all."]
    return "\n".join(lines) + "\n"


def _removed(removal: Removal) -> list[str]:
    moves = ", ".join(f"{move.entry} {move.before} → {move.after}" for move in removal.moved)
    return [removal.removed, moves or "nobody"]


def _with_interval(score: float, interval: Interval | None) -> str:
    return f"{score:.3f}" + (f" ({interval.low:.3f} to {interval.high:.3f})" if interval else "")


def _seen(one: OverfittingEntry, stage: str) -> str:
    if one.contamination is None:
        return one.contamination_reason
    counts = one.contamination[stage]
    return f"{counts.contaminated} of {counts.instances}"


_TEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}


def latex(board: Leaderboard, analysis: Analysis | None = None) -> str:
    """A `tabular` with the rules of booktabs, footnotes below it as plain paragraphs."""

    def line(cells: Sequence[str]) -> str:
        return " & ".join(_tex(cell) for cell in cells) + r" \\"

    head, body, footnotes = _table(board, analysis)
    lines = [
        f"% {_caption(board)}",
        r"\begin{tabular}{" + "".join("l" if name in WORDS else "r" for name in head) + "}",
        r"\toprule",
        line(head),
        r"\midrule",
        *(line(row) for row in body),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    lines += [rf"\par\noindent {number}. {_tex(note)}" for number, note in enumerate(footnotes, 1)]
    return "\n".join(lines) + "\n"


def _tex(text: str) -> str:
    return "".join(_TEX.get(sign, sign) for sign in text)


def print_leaderboard(
    board: Leaderboard, analysis: Analysis | None = None, console: Console | None = None
) -> None:
    """Scores, footnotes, how sure they are, who did not finish and what the analysis says."""
    out = console or Console()
    head, body, footnotes = _table(board, None)
    out.print(_shown(_caption(board), head, body))
    for number, note in enumerate(footnotes, 1):
        out.print(f"{number}. {note}", markup=False, highlight=False)
    if _sureness(analysis):
        # A table of its own: both side by side are too wide for a terminal of 80 columns.
        head, body, _ = _table(board, analysis)
        keep = [0, 1, *range(len(head) - len(SURENESS), len(head))]
        names = [one.entry for one in board.entries]
        rows = [[row[0], name, *row[-len(SURENESS) :]] for row, name in zip(body, names, strict=True)]
        out.print(_shown("How sure", [head[place] for place in keep], rows))
    if board.did_not_finish:
        rows = [[one.entry, one.team, _stopped(one), one.reason] for one in board.did_not_finish]
        out.print(_shown("Did not finish", ["entry", "team", "state", "reason"], rows))
    for remark in _remarks(analysis):
        out.print(remark, markup=False, highlight=False)


def _shown(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in head:
        table.add_column(name, justify="left" if name in WORDS else "right", overflow="fold")
    for row in rows:
        table.add_row(*(cell.replace("[", r"\[") for cell in row))
    return table
