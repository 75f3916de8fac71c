"""A track's figures, each a pure function of records. None where there is nothing to draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from palio.records import Analysis, EntryUncertainty, Leaderboard
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
MOST_BUMPS = 12
"""Entries and removals of the leave-one-out figure: the first ranks."""
PRIZES = 3
CROWD = 40
"""With more dots than this their intervals are drawn fainter."""


@dataclass(frozen=True)
class BudgetUse:
    """What an entry used of the track's limits, in seconds; None where it is not known."""

    entry: str
    used: dict[str, tuple[float, float] | None]
    """finetune and the stages -> (used, limit)."""


def figures_of_track(
    board: Leaderboard, analysis: Analysis | None, used: Sequence[BudgetUse]
) -> dict[str, Drawing]:
    """By file name."""
    drawn = {
        "open-vs-closed": open_against_closed(board, analysis),
        "rank-intervals": rank_intervals(board, analysis),
        "win-rates": win_rate_heat_map(board),
        "leave-one-out": leave_one_out(board, analysis),
        "budget-use": budget_use(board.track, used),
    }
    return {name: drawing for name, drawing in drawn.items() if drawing is not None}


def open_against_closed(board: Leaderboard, analysis: Analysis | None) -> Drawing | None:
    """A dot per entry, open score across, closed score up, with 95 % intervals; None with one stage only."""
    if not board.entries or not {"open", "closed"} <= set(board.stage_weights):
        return None
    side = WIDTH - 56 - 14
    drawing = Drawing(WIDTH, 14 + side + 48, f"Open against closed score of {_entries(board)}, {board.track}")
    axes = Axes(drawing, 56, 14, 56 + side, 14 + side, (0, 1), (0, 1))
    axes.grid(ticks(0, 1), ticks(0, 1))
    axes.titles("open score", "closed score")
    drawing.line([axes.at(0, 0), axes.at(1, 1)], "muted", dashed=True)
    at = axes.at

    sureness = _sureness(analysis)
    faint = "dropped" if len(board.entries) <= CROWD else "rule"
    spots = []
    for one in board.entries:
        x, y = one.stage_scores["open"], one.stage_scores["closed"]
        if of := sureness.get(one.entry):
            across, up = of.stage_scores["open"], of.stage_scores["closed"]
            drawing.line([at(across.low, y), at(across.high, y)], faint)
            drawing.line([at(x, up.low), at(x, up.high)], faint)
        spots.append((*at(x, y), one.entry))
    for one, (x, y, _) in zip(board.entries, spots, strict=True):
        told = f"{one.entry}: open {one.stage_scores['open']:.3f}, closed {one.stage_scores['closed']:.3f}"
        drawing.dot(x, y, 5.5, "closed" if one.rank <= PRIZES else "open", tip=f"{told}, rank {one.rank}")
    for one, label in zip(
        board.entries, place_labels(spots, SMALL, (axes.left, 0, WIDTH, axes.bottom)), strict=True
    ):
        if label:
            x, y, anchor, text = label
            drawing.text(x, y, text, anchor=anchor, size=SMALL, bold=one.rank <= PRIZES)
    return drawing


def rank_intervals(board: Leaderboard, analysis: Analysis | None) -> Drawing | None:
    """A line per entry from its best to its worst plausible rank; None without an analysis."""
    sureness = _sureness(analysis)
    if not sureness:
        return None
    left = _label_width([one.entry for one in board.entries])
    n = len(board.entries)
    drawing = Drawing(
        WIDTH, 34 + n * ROW + 6, f"Ranks of {_entries(board)} with 95 % intervals, {board.track}"
    )

    def at(rank: float) -> float:
        return left + (rank - 1) / max(n - 1, 1) * (WIDTH - left - 24) + 8

    bottom = 34 + n * ROW
    for rank in _rank_ticks(n):
        drawing.line([(at(rank), 26), (at(rank), bottom)], "rule")
        drawing.text(at(rank), 16, f"{rank}", anchor="middle", size=SMALL, fill="muted")
    drawing.text(left - 12, 16, "rank", anchor="end", size=SMALL, fill="muted")
    for place, one in enumerate(board.entries):
        of, y = sureness[one.entry], 34 + (place + 0.5) * ROW
        group = "open" if of.group % 2 == 0 else "closed"
        tip = f"{one.entry}: rank {one.rank}, 95 % interval {of.rank.low:.0f} to {of.rank.high:.0f}"
        drawing.text(left - 12, y + 4, _cut(one.entry), anchor="end", bold=one.rank <= PRIZES)
        drawing.line([(at(of.rank.low), y), (at(of.rank.high), y)], group, width=4, tip=tip)
        drawing.dot(at(one.rank), y, 6, group, tip=tip)
    return drawing


def win_rate_heat_map(board: Leaderboard) -> Drawing | None:
    """Mean win rate of every entry in every scenario; None without entries."""
    if not board.entries:
        return None
    scenarios = scenarios_of(board)
    left = _label_width([one.entry for one in board.entries])
    cell = max(44.0, (WIDTH - left) / len(scenarios))
    top = 34 + max(text_width(name, SMALL) for _, name in scenarios)
    width = left + cell * len(scenarios)
    drawing = Drawing(width, top + len(board.entries) * ROW, f"Win rates of {_entries(board)}, {board.track}")
    for place, (stage, name) in enumerate(scenarios):
        x = left + place * cell
        if place == 0 or scenarios[place - 1][0] != stage:
            drawing.text(x + 2, 14, stage, bold=True, fill=stage if stage in ("open", "closed") else "ink")
        drawing.text(x + cell / 2 + 4, top - 8, name, size=SMALL, fill="muted", upright=True)
    for row, one in enumerate(board.entries):
        y = top + row * ROW
        drawing.text(left - 10, y + ROW / 2 + 4, _cut(one.entry), anchor="end", bold=one.rank <= PRIZES)
        for place, (stage, name) in enumerate(scenarios):
            rate = one.scenario_win_rates[stage].get(name)
            x = left + place * cell
            tip = f"{one.entry}, {name}: {'no value' if rate is None else format(rate, '.3f')}"
            if rate is None:
                drawing.text(x + cell / 2, y + ROW / 2 + 4, "–", anchor="middle", fill="muted")
                continue
            step = heat_step(rate)
            drawing.rectangle(x + 1, y + 1, cell - 2, ROW - 2, f"heat{step}", tip=tip)
            ink = "paper" if step >= HEAT_INVERTED else "ink"
            drawing.text(x + cell / 2, y + ROW / 2 + 4, f"{rate:.2f}", anchor="middle", size=SMALL, fill=ink)
    return drawing


def heat_step(rate: float) -> int:
    return round(rate * (len(HEAT) - 1))


def stages_of(board: Leaderboard) -> list[str]:
    """In the order of the columns."""
    return list(dict.fromkeys(column.stage for column in board.columns))


def scenarios_of(board: Leaderboard) -> list[tuple[str, str]]:
    """(stage, scenario) in the order of the columns."""
    return list(dict.fromkeys((column.stage, column.scenario) for column in board.columns))


def leave_one_out(board: Leaderboard, analysis: Analysis | None) -> Drawing | None:
    """How the order changes when one entry leaves: lines that stay level are ranks that do not depend on it.

    Each column leaves out one entry; the others keep the places of the full ranking, its own stays empty.
    """
    robustness = analysis.robustness if analysis else None
    if robustness is None or len(board.entries) < 3:
        return None
    full = [one.entry for one in board.entries]
    shown = full[:MOST_BUMPS]
    removals = [one for one in robustness.without_entry if one.removed in shown]
    left, top = _label_width(shown), 30 + max(text_width(_cut(name), SMALL) for name in shown)
    step = max(34.0, (WIDTH - left - 20) / (len(removals) + 1))
    height = top + len(shown) * ROW + 8
    drawing = Drawing(left + step * (len(removals) + 1), height, f"Ranks without one entry, {board.track}")

    def at(column: int, place: int) -> Point:
        return left + step * (column + 0.5), top + (place + 0.5) * ROW

    columns = [full]
    for removal in removals:
        free = [place for place, name in enumerate(full) if name != removal.removed]
        order: list[str] = [""] * len(full)
        for place, name in zip(free, removal.order, strict=True):
            order[place] = name
        columns.append(order)
    drawing.text(left - 12, top - 8, "without", anchor="end", size=SMALL, fill="muted")
    drawing.text(at(0, 0)[0] + 4, top - 8, "nobody", size=SMALL, fill="muted", upright=True)
    for column, removal in enumerate(removals, 1):
        ink = "closed" if removal.moved else "muted"
        name = _cut(removal.removed)
        drawing.text(
            at(column, 0)[0] + 4, top - 8, name, size=SMALL, fill=ink, bold=bool(removal.moved), upright=True
        )
        drawing.text(
            at(column, 0)[0], at(0, full.index(removal.removed))[1] + 4, "×", anchor="middle", fill="muted"
        )
    for place, name in enumerate(shown):
        drawing.text(left - 12, at(0, place)[1] + 4, _cut(name), anchor="end", bold=place < PRIZES)
        here: list[Point] = []
        for column, order in enumerate(columns):
            if name in order and order.index(name) < len(shown):
                here.append(at(column, order.index(name)))
            elif len(here) > 1:
                drawing.line(here, _series(place), width=2, tip=name)
                here = []
            else:
                here = []
        if len(here) > 1:
            drawing.line(here, _series(place), width=2, tip=name)
        for column, order in enumerate(columns):
            if name in order and order.index(name) < len(shown):
                spot = order.index(name)
                moved = "" if spot == place else f", without {removals[column - 1].removed}: {spot + 1}"
                drawing.dot(*at(column, spot), 4.5, _series(place), tip=f"{name}: rank {place + 1}{moved}")
    return drawing


def budget_use(track: str, used: Sequence[BudgetUse]) -> Drawing | None:
    """Share of each limit that every entry used; None where nothing is known."""
    if not any(of is not None for one in used for of in one.used.values()):
        return None
    steps = list(used[0].used)
    left = _label_width([one.entry for one in used])
    wide = (WIDTH - left) / len(steps)
    drawing = Drawing(WIDTH, 30 + len(used) * ROW, f"Use of the limits, {track}")
    for place, step in enumerate(steps):
        drawing.text(left + place * wide, 14, step, size=SMALL, fill="muted")
    for row, one in enumerate(used):
        y = 26 + row * ROW
        drawing.text(left - 12, y + ROW / 2 + 4, _cut(one.entry), anchor="end")
        for place, step in enumerate(steps):
            x, bar = left + place * wide, wide - 58
            of = one.used[step]
            if of is None:
                drawing.text(x, y + ROW / 2 + 4, "–", fill="muted")
                continue
            share = of[0] / of[1]
            drawing.rectangle(x, y + 6, bar, ROW - 12, "rule")
            tip = f"{one.entry}, {step}: {duration(of[0])} of {duration(of[1])}"
            drawing.rectangle(
                x, y + 6, bar * min(share, 1), ROW - 12, "good" if share < 0.9 else "closed", tip=tip
            )
            drawing.text(x + bar + 6, y + ROW / 2 + 4, f"{share:.0%}", size=SMALL, fill="muted")
    return drawing


# --- parts -----------------------------------------------------------------------------------------------


def _sureness(analysis: Analysis | None) -> dict[str, EntryUncertainty]:
    found = analysis.uncertainty if analysis else None
    return {one.entry: one for one in found.entries} if found else {}


def _entries(board: Leaderboard) -> str:
    return f"{len(board.entries)} entries" if len(board.entries) != 1 else "one entry"


LONGEST_LABEL = 26


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_LABEL else text[: LONGEST_LABEL - 1] + "…"


def _label_width(names: Sequence[str]) -> float:
    return max((text_width(_cut(name), 13) for name in names), default=0) + 20  # 12, bold


def _series(place: int) -> str:
    return f"source{place % SOURCES}"


def _rank_ticks(n: int) -> list[int]:
    step = 1 if n <= 12 else 5 if n <= 60 else 50 if n <= 500 else 100
    return [1, *range(step, n + 1, step)] if step > 1 else list(range(1, n + 1))
