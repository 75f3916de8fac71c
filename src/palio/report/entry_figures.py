"""An entry's figures, each a pure function of its records and tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from palio.records import DatasetManifest, OperationReport
from palio.report.drawing import SOURCES, Axes, Drawing, Point, ticks
from palio.report.files import Telemetry

WIDTH = 420.0
SMALL = 11.0
LEFT, RIGHT, BAND, GAP = 4.0, 250.0, 10.0, 46.0
"""Of the rows' flow: its sides, the height of a band, and between two."""
MAX_POINTS = 400
"""Points of a line: the figure is about as many pixels wide."""


def training_curve(telemetry: Telemetry) -> Drawing:
    """Draw training loss by step, and validation loss if rows were held out; there is at least one step."""
    drawing = Drawing(WIDTH, 240, f"Training loss over {telemetry.step[-1]} steps")
    validation = [
        (step, loss)
        for step, loss in zip(telemetry.step, telemetry.validation_loss, strict=True)
        if loss is not None
    ]
    last = float(telemetry.step[-1])
    scale = ticks(0, max([*telemetry.loss, *(loss for _, loss in validation)]))
    axes = Axes(drawing, 46, 12, WIDTH - 10, 196, (0, last), (0, scale[-1]))
    axes.grid([tick for tick in ticks(0, last) if tick <= last], scale, upright=False)
    axes.titles("optimizer step")
    points = [axes.at(step, loss) for step, loss in zip(telemetry.step, telemetry.loss, strict=True)]
    drawing.line(_thinned(points), "open", width=1.5, tip="training loss")
    baseline = axes.top + 10
    if validation:
        drawing.line([axes.at(*point) for point in validation], "closed", width=1.5, tip="validation loss")
        for step, loss in validation:
            drawing.dot(*axes.at(step, loss), 3, "closed", tip=f"step {step}: validation loss {loss:.3f}")
        drawing.text(axes.right, baseline, "validation loss", anchor="end", size=SMALL, fill="closed")
        baseline += 14
    drawing.text(axes.right, baseline, "training loss", anchor="end", size=SMALL, fill="open")
    return drawing


def _thinned(points: Sequence[Point]) -> list[Point]:
    """Return at most `MAX_POINTS`, each the mean of as many neighbors."""
    size = math.ceil(len(points) / MAX_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [
        (sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups
    ]


def row_flow(manifest: DatasetManifest) -> Drawing | None:
    """Draw a Sankey diagram from the sources (top) through the operations to the dataset (bottom)."""
    total = sum(source.rows for source in manifest.sources)
    if total == 0:
        return None
    height = 66 + BAND + len(manifest.operations) * (GAP + BAND)
    drawing = Drawing(WIDTH, height, f"Rows of {manifest.entry} through the operations")
    rows = {source.name: source.rows for source in manifest.sources}
    color = {name: f"source{index % SOURCES}" for index, name in enumerate(rows)}
    flow = _Flow(drawing, rows, color, (RIGHT - LEFT) / total)
    y = 30.0
    drawing.text(LEFT, 18, f"{total:,} rows read".replace(",", " "), size=SMALL, bold=True)
    flow.draw_bands(y)
    for number, operation in enumerate(manifest.operations, 1):
        flow.draw_ribbons(operation, y + BAND)
        middle = y + BAND + GAP / 2
        drawing.text(RIGHT + 14, middle - 2, f"{number} {operation.op}", size=SMALL, bold=True)
        lost = operation.rows_in - operation.rows_out
        rewritten = f"{operation.changed} rewritten" if operation.changed else "no effect"
        effect = f"−{lost} rows" if lost else rewritten
        drawing.text(RIGHT + 14, middle + 13, effect, size=SMALL, fill="muted")
        y += BAND + GAP
        flow.draw_bands(y)
    text = f"{sum(flow.rows.values()):,} rows to train on".replace(",", " ")
    drawing.text(LEFT, y + BAND + 18, text, size=SMALL, bold=True)
    return drawing


@dataclass
class _Flow:
    """The rows of each source, on their way down through the operations."""

    drawing: Drawing
    rows: dict[str, int]
    color: Mapping[str, str]
    per_row: float
    """Width."""

    def draw_bands(self, y: float) -> None:
        x = LEFT
        for name, count in self.rows.items():
            self.drawing.rectangle(
                x, y, count * self.per_row, BAND, self.color[name], tip=f"{name}: {count} rows"
            )
            x += count * self.per_row

    def draw_ribbons(self, operation: OperationReport, start: float) -> None:
        """Lead what an operation keeps down, and what it drops aside."""
        end, per_row, ribbon = start + GAP, self.per_row, self.drawing.ribbon
        x_before = x_after = LEFT
        x_lost = LEFT + operation.rows_out * per_row + 6
        for name, count in self.rows.items():
            gone = operation.dropped_by_source.get(name, 0)
            kept, width = count - gone, (count - gone) * per_row
            tip = f"{name}: {kept} of {count} kept by {operation.op}"
            ribbon((x_before, start), (x_after, end), width, self.color[name], opacity=0.45, tip=tip)
            if gone:
                tip = f"{name}: {gone} dropped by {operation.op}"
                origin = (x_before + width, start)
                ribbon(origin, (x_lost, end - 8), gone * per_row, "dropped", tip=tip)
                x_lost += gone * per_row
            self.rows[name] = kept
            x_before, x_after = x_before + count * per_row, x_after + width


def length_histogram(manifest: DatasetManifest, part: str) -> Drawing | None:
    """Draw a histogram of the lengths of prompts or completions, in bins of powers of two characters."""
    counts = manifest.characters.get(part, [])
    first = next((index for index, count in enumerate(counts) if count), None)
    if first is None:
        return None
    shown = list(enumerate(counts))[first:]
    bar = min(40.0, 200.0 / len(shown))
    drawing = Drawing(max(150, bar * len(shown) + 10), 122, f"Lengths of {part}s of {manifest.entry}")
    drawing.text(0, 12, f"{part}, characters", size=SMALL, fill="muted")
    for index, (power, count) in enumerate(shown):
        height = 70 * count / max(counts)
        low, top = (0, 0) if power == 0 else (2 ** (power - 1), 2**power - 1)
        tip = f"{low} to {top} characters: {count} rows"
        drawing.rectangle(index * bar, 96 - height, bar - 2, height, "open", tip=tip)
        drawing.text(index * bar + bar / 2, 112, f"{low}", anchor="middle", size=9, fill="muted")
    return drawing
