"""The figures of the competition's paper (arXiv 2503.13507), drawn from the recomputed data.

Figure 7 is identified by its correlations. The others follow the paper's analysis: the hidden against the
final round, single scenarios in the final against an earlier round, and the finalists by scenario.
"""

from __future__ import annotations

from collections.abc import Sequence

from palio.neurips2023.figure_data import FinalistPoint, PublishedFigures
from palio.neurips2023.tables import RoundName
from palio.report.drawing import SOURCES, Axes, Drawing, Plate, Point, text_width, ticks

PAIRS: tuple[tuple[RoundName, RoundName], ...] = (("hidden", "open"), ("hidden", "final"))
SCENARIOS = ("MMLU", "TruthfulQA", "ethics_justice", "BIG-bench")
NOT_MAIN = ("Robustness", "Fairness", "race", "gender")
"""Words in the names of columns that are not a scenario's main metric."""

Spots = dict[str, list[tuple[float, float, str]]]
"""(x, y, entry) of the dots of a scatter plot, by track."""


def paper_figures(data: PublishedFigures) -> list[Plate]:
    """Draw the figures for which there are data."""
    plates = [plate for x, y in PAIRS if (plate := _rounds(data, x, y))]
    if data.columns:
        plates.append(_columns(data))
    for track in sorted({point.track for point in data.finalists}):
        plates.append(_finalists(track, [point for point in data.finalists if point.track == track]))
    return plates


def _rounds(data: PublishedFigures, x: RoundName, y: RoundName) -> Plate | None:
    """Plot the mean win rate of every entry that is in both rounds."""
    spots: Spots = {}
    rates = {(point.track, point.entry, point.round): point.mean_win_rate for point in data.points}
    for (track, entry, round_), rate in rates.items():
        if round_ == x and (track, entry, y) in rates:
            spots.setdefault(track, []).append((rate, rates[track, entry, y], entry))
    if not spots:
        return None
    drawing = Drawing(520, 430, f"Mean win rates: {x} against {y} round")
    axes = Axes(drawing, 56, 34, 506, 376, *_ranges(spots))
    _scatter(axes, spots)
    axes.titles(f"{x} round, mean win rate", f"{y} round, mean win rate")
    _legend(drawing, sorted(spots))
    agreement = [f"{pair.track}: {pair.pearson}" for pair in data.pairs if {pair.x, pair.y} == {x, y}]
    caption = f"Entries in both the {x} and the {y} round. Pearson correlation, {'; '.join(agreement)}."
    return Plate(f"{x}-vs-{y}", drawing, f"Figure 7 of the paper. {caption}" if y == "open" else caption)


def _columns(data: PublishedFigures) -> Plate:
    """Draw one panel per scenario: value in the final round across, in the earlier round up."""
    drawing = Drawing(640, 560, "Values in the final round against the round before, by scenario")
    for number, scenario in enumerate(SCENARIOS):
        spots: Spots = {}
        for point in data.columns:
            if point.column == f"{scenario} - EM" and min(point.final, point.earlier) > 0:
                spots.setdefault(point.track, []).append((point.final, point.earlier, point.entry))
        left, top = 44 + 320 * (number % 2), 60 + 270 * (number // 2)
        drawing.text(left, top - 12, f"{scenario} (EM)", bold=True)
        if spots:
            _scatter(Axes(drawing, left, top, left + 260, top + 190, *_ranges(spots)), spots)
    drawing.text(320, 552, "final round", anchor="middle")
    drawing.text(12, 280, "open or hidden round", anchor="middle", upright=True)
    _legend(drawing, sorted({point.track for point in data.columns}))
    return Plate("scenarios", drawing, "The same entries' values in the final round and in the one before.")


def _finalists(track: str, points: Sequence[FinalistPoint]) -> Plate:
    """Draw a line per finalist over the scenarios, in the order of the best one's win rates."""
    rates: dict[str, dict[str, float]] = {}
    for point in points:
        rates.setdefault(point.entry, {})[point.column] = point.win_rate
    means = {entry: sum(columns.values()) / len(columns) for entry, columns in rates.items()}
    entries = sorted(means, key=lambda entry: (-means[entry], entry))
    main = [column for column in rates[entries[0]] if not any(word in column for word in NOT_MAIN)]
    columns = sorted(main, key=lambda column: -rates[entries[0]][column])
    legend = 266 + max(text_width(_short(column), 11) for column in columns)
    drawing = Drawing(640, legend + 18 * len(entries), f"Finalists' win rates by scenario, {track} track")
    axes = Axes(drawing, 44, 16, 626, 236, (-0.5, len(columns) - 0.5), (0, 1))
    axes.grid([], ticks(0, 1))
    for index, column in enumerate(columns):
        x, _ = axes.at(index, 0)
        drawing.text(x + 4, axes.bottom + 10, _short(column), anchor="end", size=11, upright=True)
    for number, entry in enumerate(entries):
        color, dashed = f"source{number % SOURCES}", number >= SOURCES
        line: list[Point] = [axes.at(index, rates[entry][column]) for index, column in enumerate(columns)]
        drawing.line(line, color, width=2, dashed=dashed, tip=entry)
        for (x, y), column in zip(line, columns, strict=True):
            drawing.dot(x, y, 3.5, color, tip=f"{entry}, {column}: {rates[entry][column]:.2f}")
        y = legend + 18 * number + 10
        drawing.line([(44, y - 4), (70, y - 4)], color, width=2, dashed=dashed)
        drawing.text(78, y, entry, size=11)
    return Plate(
        f"finalists-{track}",
        drawing,
        f"Finalists of the {track} track: share of the values of all rounds and tracks that theirs exceed.",
    )


def _short(column: str) -> str:
    return column.partition(" - ")[0].partition(" (")[0].replace("_", " ")


def _ranges(spots: Spots) -> tuple[Point, Point]:
    """Return the ranges of both axes, from 0."""
    dots = [spot for of_track in spots.values() for spot in of_track]
    highest_x, highest_y = max(x for x, _, _ in dots), max(y for _, y, _ in dots)
    return (0.0, ticks(0, highest_x, 4)[-1]), (0.0, ticks(0, highest_y, 4)[-1])


def _scatter(axes: Axes, spots: Spots) -> None:
    axes.grid(ticks(0, axes.x[1], 4), ticks(0, axes.y[1], 4))
    for number, track in enumerate(sorted(spots)):
        for x, y, entry in spots[track]:
            axes.drawing.dot(*axes.at(x, y), 4.5, _color(number), tip=f"{entry}, {track}: {x:.3f}, {y:.3f}")


def _legend(drawing: Drawing, tracks: Sequence[str]) -> None:
    for number, track in enumerate(tracks):
        x = 60 + 90 * number
        drawing.dot(x, 14, 4.5, _color(number))
        drawing.text(x + 10, 18, track, size=11)


def _color(number: int) -> str:
    return ("open", "closed")[number % 2]
