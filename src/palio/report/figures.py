"""A track's figures, each a pure function of records. None if there is nothing to draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from palio.records import Analysis, Leaderboard
from palio.report.drawing import (
    HEAT,
    HEAT_INVERTED,
    SOURCES,
    Anchor,
    Axes,
    Drawing,
    Point,
    place_labels,
    text_width,
    ticks,
)
from palio.text import duration

SMALL = 11.0
ROW = 24.0
BASELINE = ROW / 2 + 4
"""From the top of a row to its text's baseline."""
MAX_BUMPS = 12
"""Number of entries in the leave-one-out figure: the first ranks."""
PRIZES = 3
CROWD = 40
"""With more dots than this, their intervals are drawn fainter."""


@dataclass(frozen=True)
class Size:
    """Room for a figure."""

    width: float
    """In CSS pixels."""
    label: int
    """Characters of an entry's id that are shown beside its row."""
    upright: float
    """Least distance of upright labels."""
    number: float
    """Room beside a bar for its number."""


WIDE = Size(640, 26, 34, 58)
NARROW = Size(340, 14, 0, 36)
"""A telephone's, where letters must not be shrunk with the figure."""


@dataclass(frozen=True)
class BudgetUse:
    """An entry's use of the track's limits."""

    entry: str
    used: dict[str, tuple[float, float] | None]
    """(seconds used, limit in seconds) of fine-tuning and the stages; None if unknown."""


@dataclass(frozen=True)
class Effort:
    """What an entry took, by measure; None if it is unknown."""

    entry: str
    values: dict[str, float | None]


def figures_of_track(
    board: Leaderboard,
    analysis: Analysis | None,
    used: Sequence[BudgetUse],
    efforts: Sequence[Effort],
    size: Size = WIDE,
) -> dict[str, Drawing]:
    """Return the figures by file name; the map of win rates, which is a table on the page, in `WIDE` only."""
    drawings = {
        "open-vs-closed": open_against_closed(board, analysis, size),
        "rank-intervals": rank_intervals(board, analysis, size),
        "win-rates": win_rate_heat_map(board) if size is WIDE else None,
        "leave-one-out": leave_one_out(board, analysis, size),
        "efficiency": efficiency(board, efforts, size),
        "budget-use": budget_use(board.track, used, size),
    }
    return {name: drawing for name, drawing in drawings.items() if drawing is not None}


def open_against_closed(board: Leaderboard, analysis: Analysis | None, size: Size = WIDE) -> Drawing | None:
    """Draw a dot per entry, open score across, closed score up, with 95 % intervals."""
    if not board.entries or not {"open", "closed"} <= set(board.stage_weights):
        return None
    side = size.width - 56 - 14
    drawing = Drawing(
        size.width, 14 + side + 48, f"Open against closed score of {_entries(board)}, {board.track}"
    )
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
    labels = place_labels(dots, SMALL, (axes.left, 0, size.width, axes.bottom))
    for scored, label in zip(board.entries, labels, strict=True):
        if label:
            x, y, anchor = label
            drawing.text(x, y, scored.entry, anchor=anchor, size=SMALL, bold=scored.rank <= PRIZES)
    return drawing


def rank_intervals(board: Leaderboard, analysis: Analysis | None, size: Size = WIDE) -> Drawing | None:
    """Draw a line per entry across the interval of its rank."""
    uncertainty = analysis.entry_uncertainty if analysis else {}
    if not uncertainty:
        return None
    left, top, n = _label_width([scored.entry for scored in board.entries], size), 34, len(board.entries)
    bottom = top + n * ROW
    drawing = Drawing(
        size.width, bottom + 6, f"Ranks of {_entries(board)} with 95 % intervals, {board.track}"
    )

    def at(rank: float) -> float:
        return left + (rank - 1) / max(n - 1, 1) * (size.width - left - 24) + 8

    for rank in _rank_ticks(n):
        drawing.line([(at(rank), 26), (at(rank), bottom)], "rule")
        drawing.text(at(rank), 16, f"{rank}", anchor="middle", size=SMALL, fill="muted")
    drawing.text(left - 12, 16, "rank", anchor="end", size=SMALL, fill="muted")
    for row, scored in enumerate(board.entries):
        limits, y = uncertainty[scored.entry], top + (row + 0.5) * ROW
        low, high = limits.rank.low, limits.rank.high
        group = "open" if limits.group % 2 == 0 else "closed"
        tip = f"{scored.entry}: rank {scored.rank}, 95 % interval {low:.0f} to {high:.0f}"
        _row_label(drawing, left, y + 4, scored.entry, size, bold=scored.rank <= PRIZES)
        drawing.line([(at(low), y), (at(high), y)], group, width=4, tip=tip)
        drawing.dot(at(scored.rank), y, 6, group, tip=tip)
    return drawing


def win_rate_heat_map(board: Leaderboard) -> Drawing | None:
    """Draw the mean win rate of every entry in every scenario."""
    if not board.entries:
        return None
    scenarios = board.scenario_keys
    left = _label_width([scored.entry for scored in board.entries], WIDE)
    cell = max(44.0, (WIDE.width - left) / len(scenarios))
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
        _row_label(drawing, left, y + BASELINE, scored.entry, WIDE, bold=scored.rank <= PRIZES)
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


def leave_one_out(board: Leaderboard, analysis: Analysis | None, size: Size = WIDE) -> Drawing | None:
    """Draw how the order changes when one entry leaves: a level line is a rank that does not depend on it.

    Each column leaves out one entry; the others move up or down among the remaining rows of the full ranking.
    """
    robustness = analysis.robustness if analysis else None
    if robustness is None or len(board.entries) < 3:
        return None
    full = [scored.entry for scored in board.entries]
    shown = full[:MAX_BUMPS]
    removals = [removal for removal in robustness.without_entry if removal.removed in shown]
    removed = ["", *(removal.removed for removal in removals)]
    left = _label_width(shown, size)
    top = 30 + max(text_width(_cut(name, size), SMALL) for name in shown)
    step = max(size.upright, (size.width - left - 20) / (len(removals) + 1))
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
        ink, name = "closed" if removal.moved else "muted", _cut(removal.removed, size)
        bold = bool(removal.moved)
        drawing.text(x + 4, top - 8, name, size=SMALL, fill=ink, bold=bold, upright=True)
        drawing.text(x, y + 4, "×", anchor="middle", fill="muted")
    for row, name in enumerate(shown):
        color = f"source{row % SOURCES}"
        _row_label(drawing, left, at(0, row)[1] + 4, name, size, bold=row < PRIZES)
        segments = _ranks_of(name, columns, removed, len(shown))
        for segment in segments:
            if len(segment) > 1:
                drawing.line([at(*place) for place in segment], color, width=2, tip=name)
        for column, rank in chain.from_iterable(segments):
            moved = "" if rank == row else f", without {removed[column]}: {rank + 1}"
            drawing.dot(*at(column, rank), 4.5, color, tip=f"{name}: rank {row + 1}{moved}")
    return drawing


def _ranks_of(
    name: str, columns: Sequence[Sequence[str]], removed: Sequence[str], most: int
) -> list[list[tuple[int, int]]]:
    """Return (column, rank) of an entry, in pieces: it is missing where it is left out, or below the last row
    that is shown."""
    segments: list[list[tuple[int, int]]] = [[]]
    for column, order in enumerate(columns):
        rank = order.index(name)
        if rank >= most or removed[column] == name:
            segments.append([])
        else:
            segments[-1].append((column, rank))
    return segments


def budget_use(track: str, used: Sequence[BudgetUse], size: Size = WIDE) -> Drawing | None:
    """Draw the share of each limit that every entry used."""
    if not any(use is not None for entry in used for use in entry.used.values()):
        return None
    steps = list(used[0].used)
    left = _label_width([entry.entry for entry in used], size)
    width = (size.width - left) / len(steps)
    drawing = Drawing(size.width, 30 + len(used) * ROW, f"Use of the limits, {track}")
    for index, step in enumerate(steps):
        drawing.text(left + index * width, 14, step, size=SMALL, fill="muted")
    for row, entry in enumerate(used):
        y = 26 + row * ROW
        _row_label(drawing, left, y + BASELINE, entry.entry, size)
        for index, step in enumerate(steps):
            x, bar = left + index * width, width - size.number
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


def efficiency(board: Leaderboard, efforts: Sequence[Effort], size: Size = WIDE) -> Drawing | None:
    """Draw a dot per entry, what it took across, its final score up, a panel for each measure; the stairs are
    the frontier: nobody got as much for less."""
    scores = {scored.entry: scored.final_score for scored in board.entries}
    panels: dict[str, list[tuple[float, float, str]]] = {}
    for effort in efforts:
        for measure, value in effort.values.items():
            if value is not None and effort.entry in scores:
                panels.setdefault(measure, []).append((value, scores[effort.entry], effort.entry))
    panels = {measure: points for measure, points in panels.items() if len(points) > 1}
    if not panels:
        return None
    across = 2 if size is WIDE and len(panels) > 1 else 1
    width, height = size.width / across, 250.0
    rows = -(-len(panels) // across)
    title = f"Final score against what it took, {_entries(board)}, {board.track}"
    drawing = Drawing(size.width, rows * height, title)
    for place, (measure, points) in enumerate(panels.items()):
        left, top = place % across * width, place // across * height
        _effort_panel(drawing, (left + 56, top + 14, left + width - 16, top + height - 52), measure, points)
    return drawing


def _effort_panel(
    drawing: Drawing,
    box: tuple[float, float, float, float],
    measure: str,
    points: Sequence[tuple[float, float, str]],
) -> None:
    scale = ticks(0, max(value for value, _, _ in points), 4)
    axes = Axes(drawing, *box, (0, scale[-1]), (0, 1))
    axes.grid(scale, ticks(0, 1))
    axes.titles(measure, "final score")
    best = frontier([(value, score) for value, score, _ in points])
    stairs = [axes.at(*points[best[0]][:2])]
    for index in best[1:]:
        x, y = axes.at(*points[index][:2])
        stairs += [(x, stairs[-1][1]), (x, y)]
    drawing.line([*stairs, (axes.right, stairs[-1][1])], "closed", width=1.5)
    dots = [(*axes.at(value, score), entry) for value, score, entry in points]
    for index, (x, y, entry) in enumerate(dots):
        value, score, _ = points[index]
        tip = f"{entry}: {value:.4g} {measure}, final score {score:.4f}"
        drawing.dot(x, y, 4.5, "closed" if index in best else "open", tip=tip)
    below = axes.bottom + SMALL
    for x, y, entry in (dots[index] for index in best):
        if below - y < SMALL:
            continue  # it would be on the label before
        # Above and to the left of a point on the frontier there is nobody.
        name, below = _cut(entry, NARROW), y
        left = x - 6 - text_width(name, SMALL) > axes.left
        at: tuple[float, Anchor] = (x - 6, "end") if left else (x, "start")
        drawing.text(at[0], y - 7, name, anchor=at[1], size=SMALL, bold=True)


def frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indexes of the points (cost, score) that no other point beats: by costing less without a
    lower score, or by a higher score at no more cost. In the order of their cost."""
    kept: list[int] = []
    order = sorted(range(len(points)), key=lambda index: (points[index][0], -points[index][1]))
    for index in order:
        if not kept or points[index][1] > points[kept[-1]][1] or points[index] == points[kept[-1]]:
            kept.append(index)
    return kept


# --- parts -----------------------------------------------------------------------------------------------


def _entries(board: Leaderboard) -> str:
    return f"{len(board.entries)} entries" if len(board.entries) != 1 else "one entry"


def _cut(text: str, size: Size) -> str:
    return text if len(text) <= size.label else text[: size.label - 1] + "…"


def _label_width(names: Sequence[str], size: Size) -> float:
    return max((text_width(_cut(name, size), 13) for name in names), default=0) + 20  # 12, bold


def _row_label(drawing: Drawing, left: float, y: float, name: str, size: Size, *, bold: bool = False) -> None:
    drawing.text(left - 12, y, _cut(name, size), anchor="end", bold=bold)


def _rank_ticks(n: int) -> list[int]:
    step = 1 if n <= 12 else 5 if n <= 60 else 50 if n <= 500 else 100
    return [1, *range(step, n + 1, step)] if step > 1 else list(range(1, n + 1))
