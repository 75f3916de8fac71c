"""Build the report of a competition: one self-contained page, and its figures as SVG and PNG files.

    <out>/index.html                      leaderboards, their uncertainty, a page per entry
    <out>/figures/<track>-<name>.{svg,png}, and those of an appendix

`build_report` reads a competition's results; `write_report` takes tracks from any source, so that any
leaderboard can have a report.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from palio.config import Competition, Entry
from palio.entries import AnyEntry, Entries
from palio.layout import STAGES, Boards, EntryFolder, ReportFolder, Resources, Results
from palio.pipeline import LIMITED
from palio.provenance import atomic_path, fingerprint, write_text
from palio.records import Analysis, Decision, Leaderboard, StageInstances, read_record
from palio.report.drawing import Plate
from palio.report.figures import BudgetUse
from palio.report.files import read_entry, seconds_used
from palio.report.page import EntryReport, TrackReport, page

MAX_LISTED = 16_000
"""Dropped rows listed on the page in all: every one of the demo, 20 per operation of 200 entries."""
TYPICAL_OPERATIONS = 4


def build_report(
    competition: Competition,
    *,
    results: Results,
    leaderboards: Boards,
    out: Path,
    answers: Mapping[str, Collection[str]] | None = None,
) -> Path:
    """Write a report on leaderboards or standings and return the page's path.

    Args:
        answers: by track, the entries with a page of answers beside the report (`palio.answers.pages`).

    Raises:
        BadInput: a track has no leaderboard in `leaderboards`.
    """
    entries = Entries(competition)
    tracks = [
        track_report(competition, track, entries, results, leaderboards, (answers or {}).get(track, ()))
        for track in competition.tracks
    ]
    return write_report(competition.title, tracks, out, asked=prepared_stages(competition))


def track_report(
    competition: Competition,
    track: str,
    entries: Entries,
    results: Results,
    leaderboards: Boards,
    with_answers: Collection[str],
) -> TrackReport:
    """Return a track with all that its entries left.

    Raises:
        BadInput: it has no leaderboard in `leaderboards`.
    """
    listed = max(5, MAX_LISTED // (TYPICAL_OPERATIONS * max(len(entries), 1)))
    board, analysis = read_board(leaderboards, track)
    decision = read_decision(leaderboards, board)
    reports = [
        entry_report(competition, report, entries.get(report.id), results.entry(track, report.id), listed)
        for report in entry_reports(board)
    ]
    reports = [replace(report, answers=report.id in with_answers) for report in reports]
    return TrackReport(track, competition.tracks[track].title, board, analysis, reports, decision)


def prepared_stages(competition: Competition) -> list[StageInstances]:
    """Return the records of the stages that are prepared for this competition."""
    paths = [Resources().stage_record(stage) for stage in STAGES]
    records = [read_record(StageInstances, path) for path in paths if path.exists()]
    return [record for record in records if record.competition == competition.competition]


def with_leaderboard(track: str, *folders: Boards) -> Boards | None:
    """Return the first folder that has a leaderboard of the track."""
    return next((boards for boards in folders if boards.leaderboard(track).exists()), None)


def read_board(boards: Boards, track: str) -> tuple[Leaderboard, Analysis | None]:
    """Read a leaderboard, and the analysis beside it if it belongs to this leaderboard."""
    board = read_record(Leaderboard, boards.leaderboard(track))
    return board, _read_beside(Analysis, boards.analysis(track), board)


def read_decision(boards: Boards, board: Leaderboard) -> Decision | None:
    """Read the decision on the prizes beside a leaderboard if it belongs to this leaderboard."""
    return _read_beside(Decision, boards.decision(board.track), board)


Beside = TypeVar("Beside", Analysis, Decision)


def _read_beside(kind: type[Beside], path: Path, board: Leaderboard) -> Beside | None:
    found = read_record(kind, path) if path.exists() else None
    made_on = found and found.leaderboard_fingerprint
    return found if made_on == fingerprint(board.model_dump(mode="json")) else None


def entry_reports(board: Leaderboard) -> list[EntryReport]:
    """Return a report without files for every entry, those that did not finish last."""
    return [EntryReport(scored.entry, scored.team, score=scored) for scored in board.entries] + [
        EntryReport(stopped.entry, stopped.team, stopped=stopped) for stopped in board.did_not_finish
    ]


def entry_report(
    competition: Competition, report: EntryReport, entry: AnyEntry | None, folder: EntryFolder, listed: int
) -> EntryReport:
    """Return a report with what lies in the entry's folder, at most `listed` dropped rows an operation."""
    valid = entry if isinstance(entry, Entry) else None
    if report.stopped:
        step = report.stopped.step
        why_missing = f"the entry stopped at {step}" if step else report.stopped.reason
    elif valid and valid.server and not valid.trained:
        why_missing = "the team's own server, built elsewhere"
    elif valid and not valid.trained:
        why_missing = "the base model unchanged: no training data, no fine-tuning"
    else:
        why_missing = "the step left no record"
    files = read_entry(folder, why_missing, listed)
    used: dict[str, tuple[float, float] | None] = {}
    for limited in LIMITED:
        seconds = seconds_used(files.runs[limited.name])
        limit = limited.limit(competition, folder.track_id).seconds if limited.limit else 0
        used[limited.name] = None if seconds is None else (float(seconds), float(limit))
    return replace(report, title=valid.title if valid else "", files=files, used=BudgetUse(report.id, used))


# --- writing ---------------------------------------------------------------------------------------------


def write_report(
    title: str,
    tracks: Sequence[TrackReport],
    out: Path,
    appendix: Sequence[Plate] = (),
    asked: Sequence[StageInstances] = (),
) -> Path:
    """Write the figures, then the page, with what the stages of `asked` ask.

    Figures of an earlier report that are not in this one are deleted.
    """
    drawings = {plate.name: plate.drawing for plate in appendix}
    for track in tracks:
        drawings |= {f"{track.id}-{name}": drawing for name, drawing in track.figures.items()}
    folder = ReportFolder(out)
    for name, drawing in drawings.items():
        write_text(folder.figures / f"{name}.svg", drawing.svg_file)
        with atomic_path(folder.figures / f"{name}.png") as temporary:
            temporary.write_bytes(drawing.png())
    for path in folder.figures.glob("*"):
        if path.stem not in drawings:
            path.unlink()
    write_text(folder.page, page(title, tracks, appendix, asked))
    return folder.page
