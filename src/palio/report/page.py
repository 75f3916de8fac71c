"""The page of the report: its content, and its HTML from the templates in `templates/`.

It works without scripts, which only sort and search. Its content policy allows nothing but its own style
sheet and script, by hash.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from palio import __version__
from palio.markup import html, visible
from palio.records import Analysis, DidNotFinish, Leaderboard, ScoredEntry, StageInstances
from palio.report import entry_figures, figures
from palio.report.drawing import Drawing, Plate, css
from palio.report.figures import BudgetUse
from palio.report.files import EntryFiles, Missing
from palio.text import duration


@dataclass(frozen=True)
class EntryReport:
    """One entry on the page."""

    id: str
    team: str
    title: str = ""
    score: ScoredEntry | None = None
    """None if it did not finish."""
    stopped: DidNotFinish | None = None
    files: EntryFiles | None = None
    """None if there are only published values."""
    used: BudgetUse | None = None


@dataclass(frozen=True)
class TrackReport:
    """One track on the page."""

    id: str
    title: str
    board: Leaderboard
    analysis: Analysis | None
    entries: list[EntryReport]
    """In the order of the leaderboard, then those that did not finish."""

    @cached_property
    def figures(self) -> dict[str, Drawing]:
        used = [entry.used for entry in self.entries if entry.used]
        return figures.figures_of_track(self.board, self.analysis, used)


def page(
    title: str,
    tracks: Sequence[TrackReport],
    appendix: Sequence[Plate] = (),
    asked: Sequence[StageInstances] = (),
) -> str:
    """Return the page as HTML."""
    environment = Environment(
        loader=PackageLoader("palio.report", "templates"),
        autoescape=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests["missing"] = lambda value: isinstance(value, Missing)
    environment.filters |= {
        "duration": duration,
        "bytes": _bytes,
        "count": _count,
        "breakable": _breakable,
    }
    environment.globals |= {
        "heat_step": figures.heat_step,
        "training_curve": entry_figures.training_curve,
        "row_flow": entry_figures.row_flow,
        "length_histogram": entry_figures.length_histogram,
    }
    style = css() + _asset("style.css")
    script = _asset("page.js")
    return environment.get_template("index.html.j2").render(
        title=title,
        tracks=tracks,
        appendix=appendix,
        asked=[record for record in asked if record.counts],
        final=all(track.board.final for track in tracks),
        version=__version__,
        # Our own files, allowed by hash: a script that an entry smuggles into a text does not run.
        style=Markup(style),  # noqa: S704
        script=Markup(script),  # noqa: S704
        style_hash=_hash(style),
        script_hash=_hash(script),
    )


def _asset(name: str) -> str:
    return (resources.files("palio.report") / "templates" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _bytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def _breakable(text: str) -> Markup:
    """Let a long id wrap after each underscore and slash."""
    return Markup("<wbr>").join(html(part) for part in re.split(r"(?<=[_/])", text))


def _count(number: Any) -> str:
    return f"{number:,}".replace(",", "\u202f")
