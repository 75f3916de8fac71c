"""Figures as lists of marks, written as SVG or PNG: one description, so that both agree.

Coordinates are CSS pixels from the top left. Colors are names in `PALETTE`: an SVG refers to them as
classes, so that the style sheet of the page or the file gives each a light and a dark value; a PNG uses the
light ones.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from markupsafe import Markup
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Circle as CirclePatch
from matplotlib.patches import PathPatch
from matplotlib.path import Path as MatplotlibPath

from palio.markup import html, terminal

Point = tuple[float, float]
Anchor = Literal["start", "middle", "end"]

PALETTE = {
    "paper": ("#ffffff", "#1a1d23"),
    "ink": ("#1f2328", "#e8e6e1"),
    "muted": ("#5a616b", "#a9b0ba"),
    "rule": ("#dcd8d0", "#3a404a"),
    "open": ("#1f6f8b", "#63b7d6"),
    "closed": ("#a3481f", "#eb9a68"),
    "good": ("#2f7d55", "#6fc497"),
    "dropped": ("#b6aea2", "#6b6f78"),
    "source0": ("#1f6f8b", "#63b7d6"),
    "source1": ("#c2852c", "#e3b562"),
    "source2": ("#6a8f3c", "#a3c974"),
    "source3": ("#8a5a97", "#c596d3"),
    "source4": ("#b8574c", "#ec938a"),
    "source5": ("#6d6a75", "#a5a3ad"),
}
"""Light and dark value by name. Text colors have a contrast of at least 4.5 on `paper` in both."""

HEAT = (
    ("#f7f3ec", "#20242b"),
    ("#e9edec", "#22303a"),
    ("#d6e4e8", "#243a46"),
    ("#bfd8e1", "#264553"),
    ("#a5cad8", "#285161"),
    ("#8bbccd", "#2a5d70"),
    ("#2f7591", "#5fa5bf"),
    ("#266983", "#74b5cd"),
    ("#1d5c75", "#8ac5da"),
    ("#154e65", "#a2d5e7"),
    ("#0e4054", "#bce5f3"),
)
"""Light and dark value for win rates 0, 0.1, … 1. The jump after step 5 keeps the text legible."""
HEAT_INVERTED = 6
"""First step whose text has the paper's color."""

LIGHT = {name: pair[0] for name, pair in PALETTE.items()} | {
    f"heat{step}": pair[0] for step, pair in enumerate(HEAT)
}
POINTS_PER_PIXEL = 0.75  # 72 points and 96 pixels per inch
DEJAVU_SCALE = 0.9  # matplotlib's own font is wider than a browser's
PNG_SCALE = 2

SOURCES = 6
"""Number of colors for sources; the seventh source has the first color again."""


def css() -> str:
    """Return style rules for every color name, as fill (`.f-ink`) and stroke (`.s-ink`), light and dark."""
    named = {**PALETTE, **{f"heat{step}": pair for step, pair in enumerate(HEAT)}}

    def rules(theme: int) -> str:
        return ":root{" + "".join(f"--{name}:{pair[theme]};" for name, pair in named.items()) + "}"

    classes = "".join(f".f-{name}{{fill:var(--{name})}}" for name in named)
    classes += "".join(f".s-{name}{{stroke:var(--{name});fill:none}}" for name in PALETTE)
    classes += "".join(
        f".h{step}{{background:var(--heat{step});color:var(--{'paper' if step >= HEAT_INVERTED else 'ink'})}}"
        for step in range(len(HEAT))
    )
    text = "svg text{font-family:system-ui,-apple-system,'Segoe UI',Roboto,sans-serif}"
    return f"{rules(0)}@media(prefers-color-scheme:dark){{{rules(1)}}}{classes}{text}"


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


@dataclass(frozen=True)
class Shape:
    """A path of absolute SVG commands: M and L with one point, C with three, Z with none."""

    commands: tuple[tuple[str, tuple[Point, ...]], ...]
    fill: str | None = None
    stroke: str | None = None
    width: float = 1.0
    opacity: float = 1.0
    dashed: bool = False
    tip: str = ""

    def svg(self) -> str:
        data = "".join(
            letter + " ".join(f"{_number(x)} {_number(y)}" for x, y in points)
            for letter, points in self.commands
        )
        css_class = f"f-{self.fill}" if self.fill else f"s-{self.stroke}"
        more = f' stroke-width="{_number(self.width)}"' if self.stroke and self.width != 1 else ""
        more += ' stroke-dasharray="3 3"' if self.dashed else ""
        more += f' opacity="{self.opacity:g}"' if self.opacity != 1 else ""
        return _element("path", f'class="{css_class}" d="{data}"{more}', self.tip)

    def paint(self, figure: Figure) -> None:
        vertices: list[Point] = []
        steps: list[np.uint8] = []
        for letter, points in self.commands:
            vertices += points or (vertices[0],)
            steps += [_CODES[letter]] * max(len(points), 1)
        figure.axes[0].add_patch(
            PathPatch(
                MatplotlibPath(vertices, steps),
                facecolor=LIGHT[self.fill] if self.fill else "none",
                edgecolor=LIGHT[self.stroke] if self.stroke else "none",
                linewidth=self.width * POINTS_PER_PIXEL if self.stroke else 0,
                linestyle=(0, (3, 3)) if self.dashed else "solid",
                alpha=self.opacity,
            )
        )


@dataclass(frozen=True)
class Dot:
    x: float
    y: float
    radius: float
    fill: str
    tip: str = ""

    def svg(self) -> str:
        center = f'cx="{_number(self.x)}" cy="{_number(self.y)}" r="{_number(self.radius)}"'
        return _element("circle", f'class="f-{self.fill}" {center}', self.tip)

    def paint(self, figure: Figure) -> None:
        circle = CirclePatch((self.x, self.y), self.radius, facecolor=LIGHT[self.fill], edgecolor="none")
        figure.axes[0].add_patch(circle)


@dataclass(frozen=True)
class Label:
    x: float
    y: float
    """Position of the baseline."""
    text: str
    anchor: Anchor = "start"
    size: float = 12
    fill: str = "ink"
    bold: bool = False
    upright: bool = False
    """Rotated by 90 degrees, to be read from bottom to top."""

    def svg(self) -> str:
        x, y = _number(self.x), _number(self.y)
        more = f' text-anchor="{self.anchor}"' if self.anchor != "start" else ""
        more += ' font-weight="600"' if self.bold else ""
        more += f' transform="rotate(-90 {x} {y})"' if self.upright else ""
        attributes = f'class="f-{self.fill}" x="{x}" y="{y}" font-size="{_number(self.size)}"{more}'
        return f"<text {attributes}>{html(self.text)}</text>"

    def paint(self, figure: Figure) -> None:
        figure.axes[0].text(
            self.x,
            self.y,
            terminal(self.text),
            ha={"start": "left", "middle": "center", "end": "right"}[self.anchor],
            va="baseline",
            rotation=90 if self.upright else 0,
            rotation_mode="anchor",
            fontsize=self.size * POINTS_PER_PIXEL * DEJAVU_SCALE,
            fontweight="bold" if self.bold else "normal",
            color=LIGHT[self.fill],
            parse_math=False,  # "$x^2$" is a name, not a formula
        )


Mark = Shape | Dot | Label

_CODES = {
    "M": MatplotlibPath.MOVETO,
    "L": MatplotlibPath.LINETO,
    "C": MatplotlibPath.CURVE4,
    "Z": MatplotlibPath.CLOSEPOLY,
}


def _element(name: str, attributes: str, tip: str) -> str:
    if not tip:
        return f"<{name} {attributes}/>"
    return f"<{name} {attributes}><title>{html(tip)}</title></{name}>"


@dataclass
class Drawing:
    """A figure of `width` x `height` pixels with `title` as its text alternative."""

    width: float
    height: float
    title: str
    marks: list[Mark] = field(default_factory=list)

    def line(
        self, points: Sequence[Point], stroke: str, *, width: float = 1, dashed: bool = False, tip: str = ""
    ) -> None:
        commands = (("M", (points[0],)), *(("L", (point,)) for point in points[1:]))
        self.marks.append(Shape(commands, stroke=stroke, width=width, dashed=dashed, tip=tip))

    def rectangle(self, x: float, y: float, width: float, height: float, fill: str, *, tip: str = "") -> None:
        corners = ((x + width, y), (x + width, y + height), (x, y + height))
        commands = (("M", ((x, y),)), *(("L", (corner,)) for corner in corners), ("Z", ()))
        self.marks.append(Shape(commands, fill=fill, tip=tip))

    def ribbon(
        self, start: Point, end: Point, width: float, fill: str, *, opacity: float = 0.6, tip: str = ""
    ) -> None:
        """Add a band of constant width from `start` down to `end`, its left corners."""
        (x0, y0), (x1, y1) = start, end
        middle = (y0 + y1) / 2
        commands: tuple[tuple[str, tuple[Point, ...]], ...] = (
            ("M", (start,)),
            ("C", ((x0, middle), (x1, middle), end)),
            ("L", ((x1 + width, y1),)),
            ("C", ((x1 + width, middle), (x0 + width, middle), (x0 + width, y0))),
            ("Z", ()),
        )
        self.marks.append(Shape(commands, fill=fill, opacity=opacity, tip=tip))

    def dot(self, x: float, y: float, radius: float, fill: str, *, tip: str = "") -> None:
        self.marks.append(Dot(x, y, radius, fill, tip))

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        anchor: Anchor = "start",
        size: float = 12,
        fill: str = "ink",
        bold: bool = False,
        upright: bool = False,
    ) -> None:
        self.marks.append(Label(x, y, text, anchor, size, fill, bold, upright))

    @property
    def svg(self) -> Markup:
        """The figure as an element of a page with the rules of `css()`."""
        return self._svg("")

    @property
    def svg_file(self) -> str:
        """The figure as a file, with namespace, style sheet and background."""
        background = f'<rect class="f-paper" width="{_number(self.width)}" height="{_number(self.height)}"/>'
        return str(self._svg(f"<style>{css()}</style>{background}", ' xmlns="http://www.w3.org/2000/svg"'))

    def _svg(self, head: str, attributes: str = "") -> Markup:
        wide, high = _number(self.width), _number(self.height)
        attributes += f' width="{wide}" height="{high}" viewBox="0 0 {wide} {high}"'
        body = "".join(mark.svg() for mark in self.marks)
        # Safe: all text went through html(); the rest is from this module.
        return Markup(  # noqa: S704
            f'<svg{attributes} role="img" aria-label="{html(self.title)}">{head}{body}</svg>'
        )

    def png(self) -> bytes:
        figure = Figure(figsize=(self.width / 96, self.height / 96), dpi=96 * PNG_SCALE)
        FigureCanvasAgg(figure)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set_xlim(0, self.width)
        axes.set_ylim(self.height, 0)
        for mark in self.marks:
            mark.paint(figure)
        stream = io.BytesIO()
        figure.savefig(stream, format="png", metadata={"Title": terminal(self.title), "Software": None})
        return stream.getvalue()


@dataclass(frozen=True)
class Plate:
    """A figure with its file name and caption."""

    name: str
    drawing: Drawing
    caption: str


@dataclass(frozen=True)
class Axes:
    """The area of a plot inside a drawing, and its scales."""

    drawing: Drawing
    left: float
    top: float
    right: float
    bottom: float
    x: Point
    y: Point
    """`x`: values at the left and right edge, `y`: at the bottom and top edge."""

    def at(self, x: float, y: float) -> Point:
        """Return the position of a value in the drawing."""
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return self.left + across * (self.right - self.left), self.bottom - up * (self.bottom - self.top)

    def grid(self, x: Sequence[float], y: Sequence[float], *, upright: bool = True) -> None:
        """Draw lines and numbers at these values, vertical lines only if `upright`."""
        for tick in x:
            across, _ = self.at(tick, self.y[0])
            if upright:
                self.drawing.line([(across, self.top), (across, self.bottom)], "rule")
            self.drawing.text(across, self.bottom + 16, f"{tick:g}", anchor="middle", size=11, fill="muted")
        for tick in y:
            _, up = self.at(self.x[0], tick)
            self.drawing.line([(self.left, up), (self.right, up)], "rule")
            self.drawing.text(self.left - 6, up + 4, f"{tick:g}", anchor="end", size=11, fill="muted")

    def titles(self, x: str, y: str = "") -> None:
        self.drawing.text((self.left + self.right) / 2, self.bottom + 36, x, anchor="middle")
        if y:
            middle = (self.top + self.bottom) / 2
            self.drawing.text(self.left - 40, middle, y, anchor="middle", upright=True)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Return round numbers from `low` to at least `high`."""
    raw = max(high - low, 1e-9) / about
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw)
    return [low + step * number for number in range(math.ceil((high - low) / step - 1e-9) + 1)]


def text_width(text: str, size: float) -> float:
    """Return the estimated width of `text` in pixels, on the wide side because fonts differ."""
    return len(text) * size * 0.63


def place_labels(
    points: Sequence[tuple[float, float, str]], size: float, box: tuple[float, float, float, float]
) -> list[tuple[float, float, Anchor] | None]:
    """Return where each point's label can go without touching a point or an earlier label, or None.

    `points` are (x, y, text), the most important first; `box` is (left, top, right, bottom).
    """
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y, _ in points]
    placed: list[tuple[float, float, Anchor] | None] = []
    for x, y, text in points:
        width = text_width(text, size)
        candidates: tuple[tuple[float, float, Anchor], ...] = (
            (x + 8, y + size / 3, "start"),
            (x - 8, y + size / 3, "end"),
            (x, y - 9, "middle"),
            (x, y + size + 6, "middle"),
            (x + 6, y - 7, "start"),
            (x - 6, y - 7, "end"),
            (x + 6, y + size + 3, "start"),
            (x - 6, y + size + 3, "end"),
        )
        placed.append(None)
        for at, baseline, anchor in candidates:
            left = at - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
            area = (left, baseline - size * 0.8, left + width, baseline + size * 0.2)
            inside = box[0] <= area[0] and box[1] <= area[1] and area[2] <= box[2] and area[3] <= box[3]
            if inside and not any(_overlap(area, other) for other in taken):
                taken.append(area)
                placed[-1] = (at, baseline, anchor)
                break
    return placed


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
