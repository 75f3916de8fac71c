"""Build the site in a folder beside its own, search it for what must not get out, and put it in place.

    <out>/index.html                        leaderboards, their uncertainty, history, downloads
    <out>/entries/<track>/<entry>.html      one page for each entry, also for those that did not finish
    <out>/answers/<track>.html, …           answers of the open stage (`palio.answers.pages`)
    <out>/downloads/<track>.{csv,parquet,json}, and <track>.v<number>.… of `palio rescore`
    <out>/history/<track>/…                 every leaderboard that was published (`palio.site.history`)

Other files in the folder, such as a web server's own, are left alone. Equal results give equal pages.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from palio.answers.pages import write_pages
from palio.config import Competition
from palio.entries import Entries
from palio.errors import BadInput
from palio.layout import Boards, Results, SiteFolder
from palio.provenance import write_text
from palio.records import Leaderboard
from palio.release.gather import closed_lines, search_for_leaks
from palio.report.build import prepared_stages, track_report, with_leaderboard
from palio.report.files import open_only
from palio.report.page import ENTRY_FIGURES, EntryReport, Links, TrackReport, overview
from palio.report.rendering import render
from palio.scoring.overfitting import without_closed_counts
from palio.scoring.versions import read_leaderboard
from palio.site.history import History, add_published, history, rescored_names

DOWNLOADS = ("csv", "parquet", "json")
INDEX = Links(entries="entries/{track}/{entry}.html")
ENTRY = Links(overview="../../index.html", answer_pages="../../answers/{track}.html")


def publish_site(
    competition: Competition, *, results: Results, leaderboards: Boards, out: Path, now: datetime
) -> SiteFolder:
    """Make or update the site in `out`, from the leaderboards, or of tracks without one the standings.

    Raises:
        BadInput: a track has neither, or `out` has files by these names that are not a site's of Palio.
        Leak: a file would have held a text of the closed stage or a credential; nothing is published.
    """
    out = out.absolute()  # `.` has no name
    site = SiteFolder(out)
    others = [part for part in site.parts if os.path.lexists(part)]
    if others and not site.mark.is_file():
        raise BadInput(
            others[0], why="is not a site of Palio, and would be replaced", fix="name another folder"
        )
    boards = {track: _boards(track, leaderboards, results) for track in competition.tracks}
    out.parent.mkdir(parents=True, exist_ok=True)
    with (
        _alone(out.with_name(f".{out.name}.lock")),
        tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as name,
    ):
        building = SiteFolder(Path(name))
        if site.history.is_dir():
            shutil.copytree(site.history, building.history)
        _build(competition, results, boards, building, now)
        search_for_leaks(building.path, closed_lines(competition))
        out.mkdir(exist_ok=True)
        site.mark.touch()
        for part, made in zip(site.parts, building.parts, strict=True):
            if part.is_dir():
                shutil.rmtree(part)
            if made.exists():
                made.replace(part)
    return site


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold a lock; entries that finish at once are published one after the other."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _boards(track: str, leaderboards: Boards, results: Results) -> Boards:
    if boards := with_leaderboard(track, leaderboards, results.standings):
        return boards
    fix = "run the workflow to its end, or `palio standings` for what has finished"
    raise BadInput(leaderboards.leaderboard(track), why="no such leaderboard", fix=fix)


def _build(
    competition: Competition, results: Results, boards: dict[str, Boards], site: SiteFolder, now: datetime
) -> None:
    answers = write_pages(competition, results, site.answers)
    entries = Entries(competition)
    tracks, histories, downloads = [], {}, {}
    for track_id, folder in boards.items():
        track = track_report(competition, track_id, entries, results, folder, answers.get(track_id, ()))
        track = _public(track)
        add_published(site.published(track_id), _public_board(track.board), now)
        histories[track_id] = _linked(history(site.published(track_id), folder, track.board), site)
        downloads[track_id] = _copy_downloads(folder, track_id, site)
        for report in track.entries:
            write_text(site.entry(track_id, report.id), _entry_page(competition.title, track, report))
        tracks.append(track)
    content = overview(competition.title, tracks, asked=prepared_stages(competition), links=INDEX)
    page = render("site.html.j2", "page.js", histories=histories, downloads=downloads, **content)
    write_text(site.page, page)


def _public(track: TrackReport) -> TrackReport:
    """Leave out what is the organizers': logs, and all of the closed stage but the scores."""
    analysis = track.analysis
    if analysis and analysis.overfitting:
        shown = without_closed_counts(analysis.overfitting)
        analysis = analysis.model_copy(update={"overfitting": shown})
    return replace(track, analysis=analysis, entries=[_public_entry(report) for report in track.entries])


def _public_board(board: Leaderboard) -> Leaderboard:
    """Return a leaderboard without the places of logs."""
    unfinished = [one.model_copy(update={"log": None}) for one in board.did_not_finish]
    return board.model_copy(update={"did_not_finish": unfinished})


def _public_entry(report: EntryReport) -> EntryReport:
    stopped = report.stopped and report.stopped.model_copy(update={"log": None})
    return replace(report, stopped=stopped, files=report.files and open_only(report.files))


def _entry_page(title: str, track: TrackReport, report: EntryReport) -> str:
    return render(
        "site_entry.html.j2",
        "page.js",
        title=title,
        track=track,
        report=report,
        links=ENTRY,
        **ENTRY_FIGURES,
    )


def _linked(found: History, site: SiteFolder) -> History:
    """Replace the paths of versions by their links from the page."""
    return replace(
        found,
        published=[replace(one, path=one.path.relative_to(site.path)) for one in found.published],
        rescored=[
            replace(one, path=site.downloads.table(one.path.stem, "json").relative_to(site.path))
            for one in found.rescored
        ],
    )


def _copy_downloads(boards: Boards, track: str, site: SiteFolder) -> list[tuple[str, str]]:
    """Copy a track's leaderboard, and its other versions, as tables; return kind and link of the first."""
    site.downloads.path.mkdir(parents=True, exist_ok=True)
    links = []
    for suffix in DOWNLOADS:
        copy = site.downloads.table(track, suffix)
        _copy_board(boards.table(track, suffix), copy)
        links.append((suffix.upper() if suffix != "parquet" else "Parquet", str(copy.relative_to(site.path))))
        for _, name in rescored_names(boards, track):
            _copy_board(boards.versions.table(name, suffix), site.downloads.table(name, suffix))
    return links


def _copy_board(table: Path, copy: Path) -> None:
    if table.suffix == ".json":
        _public_board(read_leaderboard(table)).write(copy)
    else:
        shutil.copyfile(table, copy)
