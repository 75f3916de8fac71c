"""The report of a competition: one self-contained page, and its figures as SVG and PNG files.

    <out>/index.html                      leaderboards, how sure they are, a page per entry
    <out>/figures/<track>-<name>.{svg,png}, and those of an appendix

`build_report` reads a competition's results; `write_report` writes the tracks it is given, so that any
leaderboard can have a report.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from palio.config import Competition, Entry
from palio.entries import AnyEntry, Entries
from palio.layout import Boards, EntryFolder, Results
from palio.pipeline import LIMITED
from palio.provenance import atomic_path, fingerprint, write_text
from palio.records import Analysis, Leaderboard, read_record
from palio.report.drawing import Plate
from palio.report.figures import BudgetUse
from palio.report.files import read_entry, seconds_used
from palio.report.page import EntryReport, TrackReport, page

ROWS_LISTED = 16_000
"""Dropped rows named on the page, over all entries and operations: the demo's all, 20 each of 200 entries."""
TYPICAL_OPERATIONS = 4


def build_report(competition: Competition, *, results: Results, leaderboards: Boards, out: Path) -> Path:
    """Report on leaderboards or standings; the page's path.

    Raises:
        BadInput: a track has no leaderboard there.
    """
    entries = Entries(competition)
    listed = max(5, ROWS_LISTED // (TYPICAL_OPERATIONS * max(len(entries), 1)))
    tracks = []
    for track, settings in competition.tracks.items():
        board, analysis = read_board(leaderboards, track)
        limits = {step.name: step.limit(competition, track).seconds for step in LIMITED if step.limit}
        of = [
            _with_files(one, entries.get(one.id), results.entry(track, one.id), limits, listed)
            for one in entry_reports(board)
        ]
        tracks.append(TrackReport(track, settings.title, board, analysis, of))
    return write_report(competition.title, tracks, out)


def read_board(boards: Boards, track: str) -> tuple[Leaderboard, Analysis | None]:
    """A leaderboard and the analysis beside it, if there is one of just this leaderboard."""
    board = read_record(Leaderboard, boards.leaderboard(track))
    beside = boards.analysis(track)
    analysis = read_record(Analysis, beside) if beside.exists() else None
    if analysis and analysis.leaderboard_fingerprint != fingerprint(board.model_dump(mode="json")):
        analysis = None
    return board, analysis


def entry_reports(board: Leaderboard) -> list[EntryReport]:
    return [EntryReport(one.entry, one.team, score=one) for one in board.entries] + [
        EntryReport(one.entry, one.team, stopped=one) for one in board.did_not_finish
    ]


def _with_files(
    one: EntryReport, entry: AnyEntry | None, folder: EntryFolder, limits: Mapping[str, int], listed: int
) -> EntryReport:
    if not isinstance(entry, Entry):
        entry = None
    if one.stopped:
        why = f"the entry stopped at {one.stopped.step}" if one.stopped.step else one.stopped.reason
    elif entry and entry.server:
        why = "the team's own server, made elsewhere"
    elif entry and not entry.trained:
        why = "the base model as it is: no training data, no fine-tuning"
    else:
        why = "the step left no record"
    files = read_entry(folder, why, listed)
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
) -> Path:
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
    file = out / "index.html"
    write_text(file, page(title, tracks, appendix))
    return file
