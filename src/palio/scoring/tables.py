"""A leaderboard as files and on the terminal: JSON (the record), CSV, Parquet, Markdown, LaTeX.

With an analysis, the tables also show how certain scores and ranks are.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

from palio import markup
from palio.errors import State
from palio.layout import Boards
from palio.provenance import atomic_path, write_text
from palio.records import (
    Analysis,
    DidNotFinish,
    Interval,
    Leaderboard,
    Overfitting,
    OverfittingEntry,
    Robustness,
    TrainingNoise,
    Uncertainty,
)
from palio.scoring.selection import in_words
from palio.text import markdown_table


def write_leaderboard(
    board: Leaderboard, boards: Boards, analysis: Analysis | None = None, name: str | None = None
) -> None:
    """Write <name>.{csv,parquet,md,tex} and .analysis.{md,json}, then the record <name>.json.

    The default name is the track's.
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


# --- one row per entry: CSV and Parquet ------------------------------------------------------------------


def leaderboard_rows(board: Leaderboard, analysis: Analysis | None = None) -> list[dict[str, Any]]:
    """Return one flat row per entry, those that did not finish last; every row has the same keys."""
    uncertainty = analysis.entry_uncertainty if analysis else {}
    rows: list[dict[str, Any]] = []
    for scored in board.entries:
        row: dict[str, Any] = {
            "rank": scored.rank,
            "entry": scored.entry,
            "team": scored.team,
            "state": State.FINISHED.value,
            "final_score": scored.final_score,
            **{f"{stage}_score": value for stage, value in scored.stage_scores.items()},
        }
        if limits := uncertainty.get(scored.entry):
            row |= {
                "final_score_low": limits.final_score.low,
                "final_score_high": limits.final_score.high,
                "rank_low": int(limits.rank.low),
                "rank_high": int(limits.rank.high),
                "p_first": limits.p_first,
                "p_top3": limits.p_top3,
                "group": limits.group + 1,
            }
        for column, cell in zip(board.columns, scored.cells, strict=True):
            row |= {f"{column}": cell.value, f"{column}/win_rate": cell.win_rate}
            row[f"{column}/state"] = cell.state.value
        rows.append(row)
    for stopped in board.did_not_finish:
        rows.append(stopped.model_dump(mode="json", include={"entry", "team", "state", "step", "reason"}))
    names = _schema(board, analysis).names
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
        fields += [(f"{column}", number), (f"{column}/win_rate", number), (f"{column}/state", text)]
    return pa.schema(fields)


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        safe = {
            key: markup.csv_cell(value) if isinstance(value, str) else value for key, value in row.items()
        }
        writer.writerow(safe)
    return text.getvalue()


# --- the short table: Markdown, LaTeX, terminal ----------------------------------------------------------

TEXT_COLUMNS = frozenset(
    {"entry", "team", "column", "state", "reason", "log", "did not finish"}
    | {"without entry", "without scenario", "who moves"}
)
"""Columns of text, aligned left; all others are numbers."""


@dataclass(frozen=True)
class _Table:
    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def beside(self, other: _Table) -> _Table:
        rows = [[*left, *right] for left, right in zip(self.rows, other.rows, strict=True)]
        return _Table([*self.head, *other.head], rows)


def _scores(board: Leaderboard) -> tuple[_Table, list[str]]:
    """Return scores by entry, and the footnotes they refer to."""
    footnotes: list[str] = []
    rows = []
    for scored in board.entries:
        numbers = [str(len(footnotes) + number) for number in range(1, len(scored.notes) + 1)]
        footnotes += [f"{scored.entry}: {note}" for note in scored.notes]
        name = f"{scored.entry} [{','.join(numbers)}]" if numbers else scored.entry
        stages = [f"{scored.stage_scores[stage]:.4f}" for stage in board.stage_weights]
        rows.append([str(scored.rank), name, scored.team, f"{scored.final_score:.4f}", *stages])
    return _Table(["rank", "entry", "team", "final score", *board.stage_weights], rows), footnotes


def _uncertainty(uncertainty: Uncertainty) -> _Table:
    rows = [
        [
            _limits(entry.final_score),
            f"{entry.rank.low:.0f} to {entry.rank.high:.0f}",
            f"{entry.p_first:.2f}",
            f"{entry.p_top3:.2f}",
            f"{entry.group + 1}",
        ]
        for entry in uncertainty.entries
    ]
    table = _Table(["95 % interval", "rank 95 %", "P(first)", "P(top 3)", "group"], rows)
    return table.beside(_training(uncertainty)) if uncertainty.training else table


def _training(uncertainty: Uncertainty) -> _Table:
    """Return how often entries were trained, and how much of the variance of their scores training is."""
    rows = [[str(entry.trainings), _share(entry.training_share)] for entry in uncertainty.entries]
    return _Table(["trainings", "of it training"], rows)


def _share(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def _scores_and_uncertainty(board: Leaderboard, analysis: Analysis | None) -> tuple[_Table, list[str]]:
    table, footnotes = _scores(board)
    if analysis and analysis.uncertainty:
        table = table.beside(_uncertainty(analysis.uncertainty))
    return table, footnotes


def _caption(board: Leaderboard) -> str:
    kind = "Leaderboard" if board.final else "Standings (provisional)"
    return (
        f"{kind} of {board.competition}, track {board.track}: {weights_text(board)}; win rates by "
        f"{board.convention} (version {board.convention_version}); missing values: {board.missing}; "
        f"{len(board.entries)} entries in the pool"
    )


def weights_text(board: Leaderboard) -> str:
    """Return the stage weights as a sum, such as "0.3333 open + 0.6667 closed"."""
    return " + ".join(f"{weight:.4g} {stage}" for stage, weight in board.stage_weights.items())


def _remarks(analysis: Analysis | None) -> list[str]:
    """Return the findings of the analysis that are in words."""
    remarks = []
    if analysis and analysis.robustness:
        remarks += [verdict.text for verdict in analysis.robustness.verdicts]
    if analysis and analysis.overfitting:
        remarks.append(analysis.overfitting.text)
    if analysis and analysis.uncertainty:
        remarks += [in_words(selection) for selection in analysis.uncertainty.selections]
        remarks.append(f"Entries in one group cannot be told apart. {analysis.uncertainty.explanation}")
    return remarks


def _outcome(stopped: DidNotFinish) -> str:
    return f"{stopped.state.value.replace('_', ' ')}{' at ' + stopped.step if stopped.step else ''}"


# --- Markdown ----------------------------------------------------------------------------------------------


def _markdown_table(table: _Table) -> str:
    return markdown_table(table.head, table.rows, TEXT_COLUMNS, markup.markdown)


def markdown(board: Leaderboard, analysis: Analysis | None = None) -> str:
    """Return the leaderboard with footnotes, the entries that did not finish, and the analysis' findings."""
    table, footnotes = _scores_and_uncertainty(board, analysis)
    lines = [f"{markup.markdown(_caption(board))}.", "", _markdown_table(table)]
    if footnotes:
        lines += ["", *(f"{number}. {markup.markdown(note)}" for number, note in enumerate(footnotes, 1))]
    if board.did_not_finish:
        rows = [
            [stopped.entry, stopped.team, _outcome(stopped), stopped.reason, stopped.log or ""]
            for stopped in board.did_not_finish
        ]
        lines += ["", _markdown_table(_Table(["did not finish", "team", "state", "reason", "log"], rows))]
    for remark in _remarks(analysis):
        lines += ["", markup.markdown(remark)]
    return "\n".join(lines) + "\n"


def analysis_markdown(board: Leaderboard, analysis: Analysis) -> str:
    """Return the tables of the analysis: leave-one-out, schemes side by side, open against closed."""
    name = markup.markdown(f"{board.competition}, {board.track}")
    lines = [f"# How far this leaderboard can be trusted: {name}", ""]
    lines += [f"- {markup.markdown(remark)}" for remark in _remarks(analysis)]
    if analysis.uncertainty and analysis.uncertainty.training:
        lines += _training_markdown(board, analysis.uncertainty, analysis.uncertainty.training)
    if analysis.robustness:
        lines += _robustness_markdown(board, analysis.robustness)
    if analysis.overfitting:
        lines += _overfitting_markdown(analysis.overfitting)
    return "\n".join(lines) + "\n"


def _training_markdown(board: Leaderboard, uncertainty: Uncertainty, noise: TrainingNoise) -> list[str]:
    head = ["entry", "trainings", "score", "mean over trainings", "95 % interval", "questions only"]
    rows = [
        [
            entry.entry,
            str(entry.trainings),
            f"{scored.final_score:.4f}",
            "" if entry.mean_score is None else f"{entry.mean_score:.4f}",
            _limits(entry.final_score),
            _limits(entry.questions_only) if entry.questions_only else "",
            _share(entry.training_share),
        ]
        for scored, entry in zip(board.entries, uncertainty.entries, strict=True)
    ]
    of_columns = [[name, f"{value:.4f}"] for name, value in noise.standard_deviation.items()]
    legend = (
        "*Share*: of the variance of the final score, what is due to the training of the entry and its "
        "rivals. Below: how much a value varies from one training to the next (standard deviation)."
    )
    measured = "measured" if noise.source == "replicates" else "assumed, not measured"
    return [
        *("", f"## Noise of training ({measured})", ""),
        *(_markdown_table(_Table([*head, "share"], rows)), "", legend, ""),
        _markdown_table(_Table(["column", "from training to training"], of_columns)),
    ]


def _limits(interval: Interval) -> str:
    return f"{interval.low:.3f} to {interval.high:.3f}"


def _robustness_markdown(board: Leaderboard, robustness: Robustness) -> list[str]:
    lines: list[str] = []
    for kind, removals in (("entry", robustness.without_entry), ("scenario", robustness.without_scenario)):
        changed = sum(bool(removal.moved) for removal in removals)
        rows = [
            [
                removal.removed,
                ", ".join(f"{m.entry} {m.before} → {m.after}" for m in removal.moved) or "nobody",
            ]
            for removal in removals
        ]
        lines += ["", f"## Without one {kind}: {changed} of {len(removals)} removals reorder the rest", ""]
        lines.append(_markdown_table(_Table([f"without {kind}", "who moves"], rows)))
    schemes = [*robustness.schemes, *robustness.views]
    rows = [
        [scored.entry, *(str(scheme.ranks.get(scored.entry, "")) for scheme in schemes)]
        for scored in board.entries
    ]
    lines += ["", "## Ranks under every scoring rule", ""]
    lines.append(_markdown_table(_Table(["entry", *(scheme.name for scheme in schemes)], rows)))
    return [*lines, "", *(f"- `{scheme.name}`: {markup.markdown(scheme.description)}" for scheme in schemes)]


def _overfitting_markdown(overfitting: Overfitting) -> list[str]:
    head = ["entry", "open", "closed", "open rank", "closed rank", "rank drop", "seen open", "seen closed"]
    rows = [
        [
            entry.entry,
            _with_interval(entry.open_score, entry.open_interval),
            _with_interval(entry.closed_score, entry.closed_interval),
            str(entry.open_rank),
            str(entry.closed_rank),
            f"{entry.rank_drop:+d}",
            *(_seen(entry, stage) for stage in ("open", "closed")),
        ]
        for entry in overfitting.entries
    ]
    legend = "*seen*: evaluation instances in the entry's training data, of all."
    table = ["", "## Open against closed", "", _markdown_table(_Table(head, rows)), "", legend]
    return [*table, *_falls_markdown(overfitting)]


def _falls_markdown(overfitting: Overfitting) -> list[str]:
    """Return the falls taken apart; nothing where they are not."""
    rows = [
        [
            entry.entry,
            f"{fall.value:+.3f} ± {fall.standard_error:.3f}",
            _share(fall.of_questions),
            ": ".join(filter(None, ["not known", fall.contamination_reason]))
            if fall.contamination is None
            else f"{fall.contamination:+.3f}",
            f"{fall.noise:+.3f}",
            f"{fall.rest:+.3f}",
        ]
        for entry in overfitting.entries
        if (fall := entry.fall)
    ]
    if not rows:
        return []
    head = ["entry", "fall", "of it questions", "contamination", "noise", "rest"]
    legend = (
        "*Fall*: open minus closed score, of the mean over trainings, with its standard error (and how much "
        "of its square the questions are, if training is covered). *Contamination*: lost without the open "
        "questions in its data. *Noise*: expected to come back in another draw of questions and trainings. "
        "They add up."
    )
    return ["", "### What the falls are made of", "", _markdown_table(_Table(head, rows)), "", legend]


def _with_interval(score: float, interval: Interval | None) -> str:
    return f"{score:.3f}" + (f" ({_limits(interval)})" if interval else "")


def _seen(entry: OverfittingEntry, stage: str) -> str:
    if entry.contamination is None:
        return entry.contamination_reason
    count = entry.contamination[stage]
    return f"{count.contaminated} of {count.instances}"


# --- LaTeX -------------------------------------------------------------------------------------------------


def latex(board: Leaderboard, analysis: Analysis | None = None) -> str:
    """Return a `tabular` with the rules of booktabs, and its footnotes as plain paragraphs."""

    def line(cells: Sequence[str]) -> str:
        return " & ".join(map(markup.latex, cells)) + r" \\"

    table, footnotes = _scores_and_uncertainty(board, analysis)
    lines = [
        f"% {markup.latex(_caption(board))}",
        r"\begin{tabular}{" + "".join("l" if name in TEXT_COLUMNS else "r" for name in table.head) + "}",
        r"\toprule",
        line(table.head),
        r"\midrule",
        *(line(row) for row in table.rows),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    lines += [rf"\par\noindent {number}. {markup.latex(note)}" for number, note in enumerate(footnotes, 1)]
    return "\n".join(lines) + "\n"


# --- terminal ----------------------------------------------------------------------------------------------


def print_leaderboard(
    board: Leaderboard, analysis: Analysis | None = None, console: Console | None = None
) -> None:
    """Print scores, footnotes, their uncertainty, who did not finish, and the analysis' findings."""
    out = console or Console()
    table, footnotes = _scores(board)
    out.print(_rich_table(_caption(board), table))
    for number, note in enumerate(footnotes, 1):
        out.print(_text(f"{number}. {note}"))
    if analysis and analysis.uncertainty:
        # A table of its own: both side by side are too wide for a terminal of 80 columns.
        names = [[str(scored.rank), scored.entry] for scored in board.entries]
        table = _Table(["rank", "entry"], names).beside(_uncertainty(analysis.uncertainty))
        out.print(_rich_table("Uncertainty", table))
    if board.did_not_finish:
        rows = [
            [stopped.entry, stopped.team, _outcome(stopped), stopped.reason]
            for stopped in board.did_not_finish
        ]
        out.print(_rich_table("Did not finish", _Table(["entry", "team", "state", "reason"], rows)))
    for remark in _remarks(analysis):
        out.print(_text(remark))


def _rich_table(title: str, table: _Table) -> Table:
    rich_table = Table(title=_text(title), title_justify="left")
    for name in table.head:
        justify: JustifyMethod = "left" if name in TEXT_COLUMNS else "right"
        rich_table.add_column(name, justify=justify, overflow="fold")
    for row in table.rows:
        rich_table.add_row(*map(_text, row))
    return rich_table


def _text(text: str) -> Text:
    return Text(markup.terminal(text))
