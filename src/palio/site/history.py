"""The leaderboards of a site: those that were published on it, and the same scored by other conventions.

history/<track>/<number>-<time>.json     every published leaderboard, a record that `palio diff` reads
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from palio.errors import BadInput
from palio.layout import Boards
from palio.records import Leaderboard
from palio.scoring.versions import Difference, difference, read_leaderboard

SHOWN = 30
"""Published versions on the page; all of them are in the folder."""
TIME = "%Y%m%dT%H%M%SZ"
_NAME = re.compile(r"(\d+)-(\d{8}T\d{6}Z)\.json")


@dataclass(frozen=True)
class Version:
    """One leaderboard of a track."""

    number: int
    board: Leaderboard
    path: Path
    at: str = ""
    """When it was published."""
    difference: Difference | str | None = None
    """From the version before, or why it cannot be told; None: there is none before."""


@dataclass(frozen=True)
class History:
    """All leaderboards of a track."""

    published: list[Version]
    """The newest first, at most `SHOWN`."""
    older: int
    """Published versions that are left out of them."""
    rescored: list[Version]
    """Made by `palio rescore`; their difference is from the current leaderboard."""


def add_published(folder: Path, board: Leaderboard, now: datetime) -> None:
    """Put a leaderboard into a track's folder of published ones, unless the newest says the same."""
    paths = _published(folder)
    if paths and _shown(read_leaderboard(paths[-1])) == _shown(board):
        return
    number = _number(paths[-1]) + 1 if paths else 1
    board.write(folder / f"{number:04}-{now.strftime(TIME)}.json")


def history(folder: Path, boards: Boards, board: Leaderboard) -> History:
    """Read a track's published leaderboards, and those of `boards` that were scored otherwise."""
    paths = _published(folder)
    shown = paths[-SHOWN - 1 :]
    versions: list[Version] = []
    for path in shown:
        current = read_leaderboard(path)
        changed = explained(versions[-1].board, current) if versions else None
        at = datetime.strptime(path.stem.partition("-")[2], TIME).strftime("%Y-%m-%d %H:%M UTC")
        versions.append(Version(_number(path), current, path, at, changed))
    published = versions[-SHOWN:][::-1]
    rescored = [
        Version(number, other, boards.versions.leaderboard(name), difference=explained(board, other))
        for number, name in rescored_names(boards, board.track)
        if (other := read_leaderboard(boards.versions.leaderboard(name)))
    ]
    return History(published, len(paths) - len(published), rescored)


def rescored_names(boards: Boards, track: str) -> Sequence[tuple[int, str]]:
    """Return number and name of the versions that `palio rescore` has left of a track."""
    found = (
        re.fullmatch(re.escape(track) + r"\.v(\d+)\.json", path.name)
        for path in boards.versions.path.glob(f"{track}.v*.json")
    )
    return sorted((int(match[1]), match[0].removesuffix(".json")) for match in found if match)


def explained(before: Leaderboard, after: Leaderboard) -> Difference | str:
    """Return what `palio diff` says, or why it cannot."""
    try:
        return difference(before, after)
    except BadInput as error:
        return str(error)


def _published(folder: Path) -> list[Path]:
    return sorted((path for path in folder.glob("*.json") if _NAME.fullmatch(path.name)), key=_number)


def _number(path: Path) -> int:
    return int(path.name.partition("-")[0])


def _shown(board: Leaderboard) -> Leaderboard:
    """Return it without what changes while everything that a reader sees stays."""
    return board.model_copy(update={"made": None, "inputs": {}})
