"""The report of a competition: one self-contained page, and its figures as SVG and PNG files.

    <out>/index.html                      leaderboards, how sure they are, a page per entry
    <out>/figures/<track>-<name>.{svg,png}, and those of an appendix

`build_report` reads a competition's results; `write_report` writes what it is given, so that any
leaderboard (the published ones of 2023 too) has a report. The page works without scripts: they sort and
search. Its content policy admits nothing but its own style sheet and script, by hash.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from palio import __version__
from palio.config import STAGES, Competition, Entry, entry_files, load_entry
from palio.errors import BadInput
from palio.provenance import atomic_path, fingerprint, write_text
from palio.records import Analysis, DidNotFinish, Leaderboard, PublishedFigures, ScoredEntry, read_record
from palio.report import figures
from palio.report.drawing import Drawing, css
from palio.report.figures import BudgetUse, figures_of_track
from palio.report.files import EntryFiles, Missing, read_entry, seconds_used
from palio.report.paper import Plate, paper_figures

ROWS_LISTED = 4000
"""Dropped rows named on the page, over all entries and operations."""
TYPICAL_OPERATIONS = 4
ROUND_TITLES = {
    "final": "final round",
    "hidden": "hidden round",
    "open": "open round",
    "rounds": "open and hidden rounds paired",
}
"""Of the published leaderboards, in the order of the page."""


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
    """None where there are only published values."""
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
        used = [one.used for one in self.entries if one.used]
        return figures_of_track(self.board, self.analysis, used)


def build_report(competition: Competition, *, results: Path, leaderboards: Path, out: Path) -> None:
    """Report on the leaderboards (or standings) in the folder `leaderboards`.

    Raises:
        BadInput: a track has no leaderboard there.
    """
    entries = _entries_of(competition)
    listed = max(5, ROWS_LISTED // (TYPICAL_OPERATIONS * max(len(entries), 1)))
    tracks = []
    for track, settings in competition.tracks.items():
        board, analysis = read_board(leaderboards / f"{track}.json")
        limits = {
            "finetune": settings.training_budget,
            **{stage: competition.stage(stage).time_limit for stage in STAGES},
        }
        of = [
            _with_files(one, entries.get(one.id), results / track / one.id, limits, listed)
            for one in entry_reports(board)
        ]
        tracks.append(TrackReport(track, settings.title, board, analysis, of))
    write_report(competition.title, tracks, out)


def published_report(
    boards: Sequence[tuple[Leaderboard, Analysis]], paper: PublishedFigures, out: Path
) -> None:
    """Report on the published tables of NeurIPS 2023, with the paper's figures."""
    tracks = []
    for name, told in ROUND_TITLES.items():
        for board, analysis in boards:
            track, _, round_ = board.track.rpartition("_")
            if round_ == name:
                title = f"{track}, {told}"
                tracks.append(TrackReport(board.track, title, board, analysis, entry_reports(board)))
    write_report("NeurIPS 2023, recomputed", tracks, out, paper_figures(paper))


def _entries_of(competition: Competition) -> dict[str, Entry | None]:
    found: dict[str, Entry | None] = {}
    for name, path in entry_files(competition).items():
        try:
            found[name] = load_entry(path)
        except BadInput:
            found[name] = None
    return found


def read_board(path: Path) -> tuple[Leaderboard, Analysis | None]:
    """A leaderboard and the analysis beside it, if there is one of just this leaderboard."""
    board = read_record(Leaderboard, path)
    beside = path.with_suffix(".analysis.json")
    analysis = read_record(Analysis, beside) if beside.exists() else None
    if analysis and analysis.leaderboard_fingerprint != fingerprint(board.model_dump(mode="json")):
        analysis = None
    return board, analysis


def entry_reports(board: Leaderboard) -> list[EntryReport]:
    return [EntryReport(one.entry, one.team, score=one) for one in board.entries] + [
        EntryReport(one.entry, one.team, stopped=one) for one in board.did_not_finish
    ]


def _with_files(
    one: EntryReport, entry: Entry | None, folder: Path, limits: Mapping[str, int], listed: int
) -> EntryReport:
    if one.stopped:
        why = f"the entry stopped at {one.stopped.step}" if one.stopped.step else one.stopped.reason
    elif entry and entry.server:
        why = "the team's own server, made elsewhere"
    elif entry and not entry.trained:
        why = "the base model as it is: no training data, no fine-tuning"
    else:
        why = "the step left no record"
    files = read_entry(folder, STAGES, why, listed)
    used = {
        step: (float(seconds), float(limit))
        if (seconds := seconds_used(files.runs[step])) is not None
        else None
        for step, limit in limits.items()
    }
    title = entry.title if entry else ""
    return replace(one, title=title, files=files, used=BudgetUse(one.id, used))


# --- writing ---------------------------------------------------------------------------------------------


def write_report(
    title: str, tracks: Sequence[TrackReport], out: Path, appendix: Sequence[Plate] = ()
) -> None:
    """Write the figures, then the page. Figures of an earlier report that this one has not are removed."""
    drawn = {plate.name: plate.drawing for plate in appendix}
    for track in tracks:
        drawn |= {f"{track.id}-{name}": drawing for name, drawing in track.figures.items()}
    for name, drawing in drawn.items():
        write_text(out / "figures" / f"{name}.svg", drawing.svg_file)
        with atomic_path(out / "figures" / f"{name}.png") as temporary:
            temporary.write_bytes(drawing.png())
    for path in (out / "figures").glob("*"):
        if path.stem not in drawn:
            path.unlink()
    write_text(out / "index.html", page(title, tracks, appendix))


def page(title: str, tracks: Sequence[TrackReport], appendix: Sequence[Plate] = ()) -> str:
    """The whole page."""
    environment = Environment(
        loader=PackageLoader("palio.report", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests["missing"] = lambda value: isinstance(value, Missing)
    environment.filters |= {
        "duration": figures.duration,
        "bytes": _bytes,
        "count": _count,
        "breakable": _breakable,
    }
    environment.globals |= {
        "heat_step": figures.heat_step,
        "stages_of": figures.stages_of,
        "scenarios_of": figures.scenarios_of,
        "training_curve": figures.training_curve,
        "row_flow": figures.row_flow,
        "length_histogram": figures.length_histogram,
    }
    style = css() + _asset("style.css")
    script = _asset("page.js")
    return environment.get_template("index.html.j2").render(
        title=title,
        tracks=tracks,
        appendix=appendix,
        final=all(track.board.final for track in tracks),
        version=__version__,
        # Ours alone, and in the policy by hash: whatever an entry smuggles into a text does not run.
        style=Markup(style),  # noqa: S704
        script=Markup(script),  # noqa: S704
        style_hash=_hash(style),
        script_hash=_hash(script),
    )


def _asset(name: str) -> str:
    return (resources.files("palio.report") / "page" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _bytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def _breakable(text: str) -> Markup:
    """A long id may wrap after each underscore and slash."""
    return Markup("<wbr>").join(escape(part) for part in re.split(r"(?<=[_/])", text))


def _count(number: Any) -> str:
    return f"{number:,}".replace(",", "\u202f")
