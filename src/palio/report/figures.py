"""A track's figures, each a pure function of records. None if there is nothing to draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from palio.records import Analysis, Leaderboard
from palio.report.drawing import (
    HEAT,
    HEAT_INVERTED,
    SOURCES,
    Axes,
    Drawing,
    Point,
    place_labels,
    text_width,
    ticks,
)
from palio.text import duration

WIDTH = 640.0
SMALL = 11.0
ROW = 24.0
BASELINE = ROW / 2 + 4
"""From the top of a row to its text's baseline."""
MAX_BUMPS = 12
"""Number of entries in the leave-one-out figure: the first ranks."""
PRIZES = 3
CROWD = 40
"""With more dots than this, their intervals are drawn fainter."""
MAX_LABEL = 26


@dataclass(frozen=True)
class BudgetUse:
    """An entry's use of the track's limits."""

    entry: str
    used: dict[str, tuple[float, float] | None]
    """(seconds used, limit in seconds) of fine-tuning and the stages; None if unknown."""


def figures_of_track(
    board: Leaderboard, analysis: Analysis | None, used: Sequence[BudgetUse]
) -> dict[str, Drawing]:
    """Return the figures by file name."""
    drawings = {
        "open-vs-closed": open_against_closed(board, analysis),
        "rank-intervals": rank_intervals(board, analysis),
        "win-rates": win_rate_heat_map(board),
        "leave-one-out": leave_one_out(board, analysis),
        "budget-use": budget_use(board.track, used),
    }
    return {name: drawing for name, drawing in drawings.items() if drawing is not None}


def open_against_closed(board: Leaderboard, analysis: Analysis | None) -> Drawing | None:
    """Draw a dot per entry, open score across, closed score up, with 95 % intervals."""
    if not board.entries or not {"open", "closed"} <= set(board.stage_weights):
        return None
    side = WIDTH - 56 - 14
    drawing = Drawing(WIDTH, 14 + side + 48, f"Open against closed score of {_entries(board)}, {board.track}")
    axes = Axes(drawing, 56, 14, 56 + side, 14 + side, (0, 1), (0, 1))
    axes.grid(ticks(0, 1), ticks(0, 1))
    axes.titles("open score", "closed score")
    drawing.line([axes.at(0, 0), axes.at(1, 1)], "muted", dashed=True)
    uncertainty = analysis.entry_uncertainty if analysis else {}
    faint = "dropped" if len(board.entries) <= CROWD else "rule"
    dots = []
    for scored in board.entries:
        x, y = scored.stage_scores["open"], scored.stage_scores["closed"]
        if limits := uncertainty.get(scored.entry):
            across, up = limits.stage_scores["open"], limits.stage_scores["closed"]
            drawing.line([axes.at(across.low, y), axes.at(across.high, y)], faint)
            drawing.line([axes.at(x, up.low), axes.at(x, up.high)], faint)
        dots.append((*axes.at(x, y), scored.entry))
    for scored, (x, y, _) in zip(board.entries, dots, strict=True):
        scores = f"open {scored.stage_scores['open']:.3f}, closed {scored.stage_scores['closed']:.3f}"
        tip = f"{scored.entry}: {scores}, rank {scored.rank}"
        drawing.dot(x, y, 5.5, "closed" if scored.rank <= PRIZES else "open", tip=tip)
    labels = place_labels(dots, SMALL, (axes.left, 0, WIDTH, axes.bottom))
    for scored, label in zip(board.entries, labels, strict=True):
        if label:
            x, y, anchor = label
            drawing.text(x, y, scored.entry, anchor=anchor, size=SMALL, bold=scored.rank <= PRIZES)
    return drawing


def rank_intervals(board: Leaderboard, analysis: Analysis | None) -> Drawing | None:
    """Draw a line per entry across the interval of its rank."""
    uncertainty = analysis.entry_uncertainty if analysis else {}
    if not uncertainty:
        return None
    left, top, n = _label_width([scored.entry for scored in board.entries]), 34, len(board.entries)
    bottom = top + n * ROW
    drawing = Drawing(WIDTH, bottom + 6, f"Ranks of {_entries(board)} with 95 % intervals, {board.track}")

    def at(rank: float) -> float:
        return left + (rank - 1) / max(n - 1, 1) * (WIDTH - left - 24) + 8

    for rank in _rank_ticks(n):
        drawing.line([(at(rank), 26), (at(rank), bottom)], "rule")
        drawing.text(at(rank), 16, f"{rank}", anchor="middle", size=SMALL, fill="muted")
    drawing.text(left - 12, 16, "rank", anchor="end", size=SMALL, fill="muted")
    for row, scored in enumerate(board.entries):
        limits, y = uncertainty[scored.entry], top + (row + 0.5) * ROW
        low, high = limits.rank.low, limits.rank.high
        group = "open" if limits.group % 2 == 0 else "closed"
        tip = f"{scored.entry}: rank {scored.rank}, 95 % interval {low:.0f} to {high:.0f}"
        _row_label(drawing, left, y + 4, scored.entry, bold=scored.rank <= PRIZES)
        drawing.line([(at(low), y), (at(high), y)], group, width=4, tip=tip)
        drawing.dot(at(scored.rank), y, 6, group, tip=tip)
    return drawing


def win_rate_heat_map(board: Leaderboard) -> Drawing | None:
    """Draw the mean win rate of every entry in every scenario."""
    if not board.entries:
        return None
    scenarios = board.scenario_keys
    left = _label_width([scored.entry for scored in board.entries])
    cell = max(44.0, (WIDTH - left) / len(scenarios))
    top = 34 + max(text_width(name, SMALL) for _, name in scenarios)
    width = left + cell * len(scenarios)
    drawing = Drawing(width, top + len(board.entries) * ROW, f"Win rates of {_entries(board)}, {board.track}")
    for index, (stage, name) in enumerate(scenarios):
        x = left + index * cell
        if index == 0 or scenarios[index - 1][0] != stage:
            drawing.text(x + 2, 14, stage, bold=True, fill=stage if stage in ("open", "closed") else "ink")
        drawing.text(x + cell / 2 + 4, top - 8, name, size=SMALL, fill="muted", upright=True)
    for row, scored in enumerate(board.entries):
        y = top + row * ROW
        _row_label(drawing, left, y + BASELINE, scored.entry, bold=scored.rank <= PRIZES)
        for index, (stage, name) in enumerate(scenarios):
            rate = scored.scenario_win_rates[stage].get(name)
            x = left + index * cell
            if rate is None:
                drawing.text(x + cell / 2, y + BASELINE, "–", anchor="middle", fill="muted")
                continue
            step = heat_step(rate)
            tip = f"{scored.entry}, {name}: {rate:.3f}"
            drawing.rectangle(x + 1, y + 1, cell - 2, ROW - 2, f"heat{step}", tip=tip)
            ink = "paper" if step >= HEAT_INVERTED else "ink"
            drawing.text(x + cell / 2, y + BASELINE, f"{rate:.2f}", anchor="middle", size=SMALL, fill=ink)
    return drawing


def heat_step(rate: float) -> int:
    """Return the index in `HEAT` of a win rate's color."""
    return round(rate * (len(HEAT) - 1))


def leave_one_out(board: Leaderboard, analysis: Analysis | None) -> Drawing | None:
    """Draw how the order changes when one entry leaves: a level line is a rank that does not depend on it.

    Each column leaves out one entry; the others move up or down among the remaining rows of the full ranking.
    """
    robustness = analysis.robustness if analysis else None
    if robustness is None or len(board.entries) < 3:
        return None
    full = [scored.entry for scored in board.entries]
    shown = full[:MAX_BUMPS]
    removals = [removal for removal in robustness.without_entry if removal.removed in shown]
    left, top = _label_width(shown), 30 + max(text_width(_cut(name), SMALL) for name in shown)
    step = max(34.0, (WIDTH - left - 20) / (len(removals) + 1))
    height = top + len(shown) * ROW + 8
    drawing = Drawing(left + step * (len(removals) + 1), height, f"Ranks without one entry, {board.track}")

    def at(column: int, row: int) -> Point:
        return left + step * (column + 0.5), top + (row + 0.5) * ROW

    drawing.text(left - 12, top - 8, "without", anchor="end", size=SMALL, fill="muted")
    drawing.text(at(0, 0)[0] + 4, top - 8, "nobody", size=SMALL, fill="muted", upright=True)
    columns = [full]
    for column, removal in enumerate(removals, 1):
        vacant = full.index(removal.removed)
        columns.append([*removal.order[:vacant], removal.removed, *removal.order[vacant:]])
        x, y = at(column, vacant)
        ink, name = "closed" if removal.moved else "muted", _cut(removal.removed)
        bold = bool(removal.moved)
        drawing.text(x + 4, top - 8, name, size=SMALL, fill=ink, bold=bold, upright=True)
        drawing.text(x, y + 4, "×", anchor="middle", fill="muted")
    for row, name in enumerate(shown):
        color = f"source{row % SOURCES}"
        _row_label(drawing, left, at(0, row)[1] + 4, name, bold=row < PRIZES)
        dots: list[tuple[Point, str]] = []
        segments: list[list[Point]] = [[]]
        for column, order in enumerate(columns):
            rank = order.index(name)
            if rank >= len(shown) or (column and removals[column - 1].removed == name):
                segments.append([])
                continue
            moved = "" if rank == row else f", without {removals[column - 1].removed}: {rank + 1}"
            dots.append((at(column, rank), f"{name}: rank {row + 1}{moved}"))
            segments[-1].append(at(column, rank))
        for segment in segments:
            if len(segment) > 1:
                drawing.line(segment, color, width=2, tip=name)
        for point, tip in dots:
            drawing.dot(*point, 4.5, color, tip=tip)
    return drawing


def budget_use(track: str, used: Sequence[BudgetUse]) -> Drawing | None:
    """Draw the share of each limit that every entry used."""
    if not any(use is not None for entry in used for use in entry.used.values()):
        return None
    steps = list(used[0].used)
    left = _label_width([entry.entry for entry in used])
    width = (WIDTH - left) / len(steps)
    drawing = Drawing(WIDTH, 30 + len(used) * ROW, f"Use of the limits, {track}")
    for index, step in enumerate(steps):
        drawing.text(left + index * width, 14, step, size=SMALL, fill="muted")
    for row, entry in enumerate(used):
        y = 26 + row * ROW
        _row_label(drawing, left, y + BASELINE, entry.entry)
        for index, step in enumerate(steps):
            x, bar = left + index * width, width - 58
            use = entry.used[step]
            if use is None:
                drawing.text(x, y + BASELINE, "–", fill="muted")
                continue
            share = use[0] / use[1]
            drawing.rectangle(x, y + 6, bar, ROW - 12, "rule")
            tip = f"{entry.entry}, {step}: {duration(use[0])} of {duration(use[1])}"
            fill = "good" if share < 0.9 else "closed"
            drawing.rectangle(x, y + 6, bar * min(share, 1), ROW - 12, fill, tip=tip)
            drawing.text(x + bar + 6, y + BASELINE, f"{share:.0%}", size=SMALL, fill="muted")
    return drawing


# --- parts -----------------------------------------------------------------------------------------------


def _entries(board: Leaderboard) -> str:
    return f"{len(board.entries)} entries" if len(board.entries) != 1 else "one entry"


def _cut(text: str) -> str:
    return text if len(text) <= MAX_LABEL else text[: MAX_LABEL - 1] + "…"


def _label_width(names: Sequence[str]) -> float:
    return max((text_width(_cut(name), 13) for name in names), default=0) + 20  # 12, bold


def _row_label(drawing: Drawing, left: float, y: float, name: str, *, bold: bool = False) -> None:
    drawing.text(left - 12, y, _cut(name), anchor="end", bold=bold)


def _rank_ticks(n: int) -> list[int]:
    step = 1 if n <= 12 else 5 if n <= 60 else 50 if n <= 500 else 100
    return [1, *range(step, n + 1, step)] if step > 1 else list(range(1, n + 1))
