"""The figures of the competition's paper (arXiv 2503.13507), drawn from the recomputed data.

Figure 7 is known by its correlations; the others are those of the paper's analysis: the hidden against the
final round, single scenarios in the final against an earlier round, and the finalists by scenario.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from palio.neurips2023.figure_data import FinalistPoint, PublishedFigures
from palio.neurips2023.tables import RoundName
from palio.report.drawing import SOURCES, Axes, Drawing, Plate, Point, text_width, ticks

PAIRS: tuple[tuple[RoundName, RoundName], ...] = (("hidden", "open"), ("hidden", "final"))
SCENARIOS = ("MMLU", "TruthfulQA", "ethics_justice", "BIG-bench")
NOT_PLAIN = ("Robustness", "Fairness", "race", "gender")
"""Words in the names of columns that are no scenario's main metric."""


def paper_figures(found: PublishedFigures) -> list[Plate]:
    plates = [plate for x, y in PAIRS if (plate := _rounds(found, x, y))]
    if found.columns:
        plates.append(_columns(found))
    for track in sorted({point.track for point in found.finalists}):
        plates.append(_finalists(track, [point for point in found.finalists if point.track == track]))
    return plates


def _rounds(found: PublishedFigures, x: RoundName, y: RoundName) -> Plate | None:
    """Mean win rate of every entry that stands in both rounds."""
    spots: dict[str, list[tuple[float, float, str]]] = {}
    rate = {(point.track, point.entry, point.round): point.mean_win_rate for point in found.points}
    for track, entry, round_ in rate:
        if round_ == x and (track, entry, y) in rate:
            spots.setdefault(track, []).append((rate[track, entry, x], rate[track, entry, y], entry))
    if not spots:
        return None
    drawing = Drawing(520, 430, f"Mean win rates: {x} against {y} round")
    axes = Axes(drawing, 56, 34, 506, 376, *_ranges(spot for of in spots.values() for spot in of))
    _scatter(axes, spots)
    axes.titles(f"{x} round, mean win rate", f"{y} round, mean win rate")
    _legend(drawing, sorted(spots))
    agreement = [f"{pair.track}: {pair.pearson}" for pair in found.pairs if {pair.x, pair.y} == {x, y}]
    told = f"Entries in both the {x} and the {y} round. Pearson's correlation, {'; '.join(agreement)}."
    return Plate(f"{x}-vs-{y}", drawing, f"Figure 7 of the paper. {told}" if y == "open" else told)


def _columns(found: PublishedFigures) -> Plate:
    """One panel per scenario: value in the final round across, in the earlier round up."""
    drawing = Drawing(640, 560, "Values in the final round against the round before, by scenario")
    for number, scenario in enumerate(SCENARIOS):
        spots: dict[str, list[tuple[float, float, str]]] = {}
        for point in found.columns:
            if point.column == f"{scenario} - EM" and min(point.final, point.earlier) > 0:
                spots.setdefault(point.track, []).append((point.final, point.earlier, point.entry))
        left, top = 44 + 320 * (number % 2), 60 + 270 * (number // 2)
        drawing.text(left, top - 12, f"{scenario} (EM)", bold=True)
        if spots:
            ranges = _ranges(spot for of in spots.values() for spot in of)
            _scatter(Axes(drawing, left, top, left + 260, top + 190, *ranges), spots)
    drawing.text(320, 552, "final round", anchor="middle")
    drawing.text(12, 280, "open or hidden round", anchor="middle", upright=True)
    _legend(drawing, sorted({point.track for point in found.columns}))
    return Plate("scenarios", drawing, "The same entries' values in the final round and in the one before.")


def _finalists(track: str, points: Sequence[FinalistPoint]) -> Plate:
    """A line per finalist over the scenarios, in the order of the best one's win rates."""
    plain = [point for point in points if not any(word in point.column for word in NOT_PLAIN)]
    mean = {
        entry: sum(rates) / len(rates)
        for entry in {point.entry for point in points}
        if (rates := [point.win_rate for point in points if point.entry == entry])
    }
    entries = sorted(mean, key=lambda entry: (-mean[entry], entry))
    best = [point for point in plain if point.entry == entries[0]]
    columns = [point.column for point in sorted(best, key=lambda point: -point.win_rate)]
    legend = 266 + max(text_width(_short(column), 11) for column in columns)
    drawing = Drawing(640, legend + 18 * len(entries), f"Finalists' win rates by scenario, {track} track")
    axes = Axes(drawing, 44, 16, 626, 236, (-0.5, len(columns) - 0.5), (0, 1))
    axes.grid([], ticks(0, 1))
    for place, column in enumerate(columns):
        x, _ = axes.at(place, 0)
        drawing.text(x + 4, axes.bottom + 10, _short(column), anchor="end", size=11, upright=True)
    rate = {(point.entry, point.column): point.win_rate for point in plain}
    for number, entry in enumerate(entries):
        colour = f"source{number % SOURCES}"
        line: list[Point] = [axes.at(place, rate[entry, column]) for place, column in enumerate(columns)]
        drawing.line(line, colour, width=2, dashed=number >= SOURCES, tip=entry)
        for (x, y), column in zip(line, columns, strict=True):
            drawing.dot(x, y, 3.5, colour, tip=f"{entry}, {column}: {rate[entry, column]:.2f}")
        y = legend + 18 * number + 10
        drawing.line([(44, y - 4), (70, y - 4)], colour, width=2, dashed=number >= SOURCES)
        drawing.text(78, y, entry, size=11)
    return Plate(
        f"finalists-{track}",
        drawing,
        f"Finalists of the {track} track: share of all rounds' and tracks' values that theirs exceed.",
    )


def _short(column: str) -> str:
    return column.partition(" - ")[0].partition(" (")[0].replace("_", " ")


def _ranges(spots: Iterable[tuple[float, float, str]]) -> tuple[Point, Point]:
    of = list(spots)
    return (0.0, ticks(0, max(x for x, _, _ in of), 4)[-1]), (0.0, ticks(0, max(y for _, y, _ in of), 4)[-1])


def _scatter(axes: Axes, spots: dict[str, list[tuple[float, float, str]]]) -> None:
    axes.grid(ticks(0, axes.x[1], 4), ticks(0, axes.y[1], 4))
    for number, track in enumerate(sorted(spots)):
        for x, y, entry in spots[track]:
            axes.drawing.dot(*axes.at(x, y), 4.5, _colour(number), tip=f"{entry}, {track}: {x:.3f}, {y:.3f}")


def _legend(drawing: Drawing, tracks: Sequence[str]) -> None:
    for number, track in enumerate(tracks):
        x = 60 + 90 * number
        drawing.dot(x, 14, 4.5, _colour(number))
        drawing.text(x + 10, 18, track, size=11)


def _colour(number: int) -> str:
    return ("open", "closed")[number % 2]
