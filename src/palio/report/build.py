"""The report of a competition: one self-contained page, and its figures as SVG and PNG files.

    <out>/index.html                      leaderboards, how sure they are, a page per entry
    <out>/figures/<track>-<name>.{svg,png}

`build_report` reads a competition's results; `write_report` writes what it is given, so that any
leaderboard (the published ones of 2023 too) has a report. The page works without scripts: they sort and
search. Its content policy admits nothing but its own style sheet and script, by hash.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from palio import __version__
from palio.config import STAGES, Competition, Entry, entry_files, load_entry
from palio.errors import BadInput
from palio.provenance import atomic_path, write_text
from palio.records import Analysis, DidNotFinish, Leaderboard, ScoredEntry, read_record
from palio.report import drawing, figures
from palio.report.drawing import Drawing
from palio.report.figures import BudgetUse
from palio.report.files import EntryFiles, Missing, read_entry

ROWS_LISTED = 4000
"""Dropped rows named on the page, over all entries and operations."""
TYPICAL_OPERATIONS = 4


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


@dataclass(frozen=True)
class TrackReport:
    """One track on the page."""

    id: str
    title: str
    board: Leaderboard
    analysis: Analysis | None
    entries: list[EntryReport]
    """In the order of the leaderboard, then those that did not finish."""
    used: list[BudgetUse] = field(default_factory=list)
    figures: dict[str, Drawing] = field(default_factory=dict)


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
        of = [
            _with_files(one, entries.get(one.id), results / track / one.id, listed)
            for one in entry_reports(board)
        ]
        limits = {
            "training": ("finetune", "training_seconds", settings.training_budget),
            **{stage: (stage, "used_seconds", competition.stage(stage).time_limit) for stage in STAGES},
        }
        used = [BudgetUse(one.id, _used(one.files, limits)) for one in of if one.files]
        tracks.append(TrackReport(track, settings.title, board, analysis, of, used))
    write_report(competition.title, tracks, out)


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
    return board, analysis


def entry_reports(board: Leaderboard) -> list[EntryReport]:
    return [EntryReport(one.entry, one.team, score=one) for one in board.entries] + [
        EntryReport(one.entry, one.team, stopped=one) for one in board.did_not_finish
    ]


def _with_files(one: EntryReport, entry: Entry | None, folder: Path, listed: int) -> EntryReport:
    if one.stopped:
        why = f"the entry stopped at {one.stopped.step}" if one.stopped.step else one.stopped.reason
    elif entry and entry.dataset is None:
        why = "the base model as it is: no training data, no fine-tuning"
    else:
        why = "the step left no record"
    files = read_entry(folder, STAGES, why, listed)
    return EntryReport(one.id, one.team, entry.title if entry else "", one.score, one.stopped, files)


def _used(
    files: EntryFiles, limits: Mapping[str, tuple[str, str, int]]
) -> dict[str, tuple[float, float] | None]:
    found: dict[str, tuple[float, float] | None] = {}
    for name, (step, key, limit) in limits.items():
        run = files.runs[step]
        seconds = None if isinstance(run, Missing) else run.get(key)
        found[name] = None if seconds is None else (float(seconds), float(limit))
    return found


# --- writing ---------------------------------------------------------------------------------------------


def write_report(title: str, tracks: Sequence[TrackReport], out: Path) -> None:
    """Write the figures, then the page."""
    folder = out / "figures"
    for track in tracks:
        track.figures.update(figures.figures_of_track(track.board, track.analysis, track.used))
        for name, drawn in track.figures.items():
            write_text(folder / f"{track.id}-{name}.svg", drawn.svg_file)
            with atomic_path(folder / f"{track.id}-{name}.png") as temporary:
                temporary.write_bytes(drawn.png())
    write_text(out / "index.html", page(title, tracks))


def page(title: str, tracks: Sequence[TrackReport]) -> str:
    """The whole page."""
    environment = Environment(
        loader=PackageLoader("palio.report", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests["missing"] = lambda value: isinstance(value, Missing)
    environment.filters |= {"duration": figures.duration, "bytes": _bytes, "count": _count}
    environment.globals |= {
        "heat_step": figures.heat_step,
        "stages_of": figures.stages_of,
        "scenarios_of": figures.scenarios_of,
        "training_curve": figures.training_curve,
        "row_flow": figures.row_flow,
        "length_histogram": figures.length_histogram,
    }
    style = drawing.css() + _asset("style.css")
    script = _asset("page.js")
    return environment.get_template("index.html.j2").render(
        title=title,
        tracks=tracks,
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


def _count(number: Any) -> str:
    return f"{number:,}".replace(",", "\u202f")
