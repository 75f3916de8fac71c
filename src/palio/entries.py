"""The entries of a competition: every entry file is found here, and read once.

A file that cannot be read, is not valid, or names an unknown track is a `BrokenEntry`. It is shown in the
track that it names if there is one, otherwise in the competition's first; it stops nobody else, and its own
check says what is wrong.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from palio.config import ID_PATTERN, Competition, Entry, load_entry, team_and_track
from palio.errors import BadInput

UNKNOWN_TEAM = "unknown"


@dataclass(frozen=True)
class BrokenEntry:
    """An entry file that is not an entry of the competition."""

    track: str
    """The track that shows it."""
    fault: BadInput
    team: str = UNKNOWN_TEAM


AnyEntry = Entry | BrokenEntry


def entry_files(
    folders: Iterable[str], file: str | Path = "config"
) -> tuple[dict[str, Path], list[BadInput]]:
    """Find the path of every entry file by entry id, sorted by id, and the files that are left out.

    A file whose name is not an id, or whose id is taken, stops nobody: it is left out, with its fault.

    Raises:
        BadInput: a folder does not exist; `file` is the config that names the folders.
    """
    paths: dict[str, Path] = {}
    taken: dict[str, Path] = {}
    """By the id without case: on some disks, and to a reader, Acme and acme are one."""
    left_out: list[BadInput] = []
    for folder in folders:
        if not Path(folder).is_dir():
            raise BadInput(file, "entries", folder, why="no such folder", fix="create it or correct the path")
        for path in sorted(Path(folder).glob("*.y*ml")):
            if not ID_PATTERN.fullmatch(path.stem) or path.suffix != ".yaml":
                fix = "rename it to <id>.yaml, the id of letters, digits, - and _"
                left_out.append(BadInput(ascii(str(path)).strip("'"), fix=fix))
            elif other := taken.get(path.stem.casefold()):
                left_out.append(
                    BadInput(path, "id", path.stem, why=f"is taken by {other}", fix="rename one of them")
                )
            else:
                paths[path.stem] = taken[path.stem.casefold()] = path
    return dict(sorted(paths.items())), left_out


class Entries(Mapping[str, AnyEntry]):
    """Entries by id, sorted; withdrawn ones included. A file is read when it is first asked for: a job of
    one entry reads no other's."""

    def __init__(self, competition: Competition, file: str | Path = "config") -> None:
        """Find the files.

        Raises:
            BadInput: as `entry_files`; no entry at all; or `withdrawn`, `shards` or `replicates` names an
                unknown one.
        """
        self._track_ids = tuple(competition.tracks)
        self._read: dict[str, AnyEntry] = {}
        self.files, self.left_out = entry_files(competition.entries, file)
        chosen = competition.replicates.entries if competition.replicates else ()
        named: dict[str, Iterable[str]] = {
            "withdrawn": competition.withdrawn,
            "shards": competition.shards,
            "replicates.entries": () if isinstance(chosen, str) else chosen,
        }
        for key, entry_id in ((key, entry_id) for key, ids in named.items() for entry_id in ids):
            if entry_id not in self.files:
                raise BadInput(
                    file, f"{key}.{entry_id}", why="no entry has this id", fix="correct or remove it"
                )
        if not self.files:
            raise BadInput(file, "entries", why="no entry file in these folders", fix="add <id>.yaml")

    def __getitem__(self, entry_id: str) -> AnyEntry:
        if entry_id not in self._read:
            self._read[entry_id] = self._load(entry_id)
        return self._read[entry_id]

    def _load(self, entry_id: str) -> AnyEntry:
        path = self.files[entry_id]
        first = self._track_ids[0]
        try:
            entry = load_entry(path)
        except BadInput as fault:
            team, track = team_and_track(path)
            shown_in = track if track in self._track_ids else first
            return BrokenEntry(shown_in, fault, team or UNKNOWN_TEAM)
        if entry.track not in self._track_ids:
            return BrokenEntry(
                first,
                BadInput(path, "track", entry.track, fix=f"use one of {', '.join(self._track_ids)}"),
                entry.team,
            )
        return entry

    def known(self, entry_id: str) -> str:
        """Return the id of an entry as it was given by hand.

        Raises:
            BadInput: no entry has it.
        """
        if entry_id in self.files:
            return entry_id
        near = difflib.get_close_matches(entry_id, self.files, 1)
        fix = f"did you mean {near[0]}?" if near else f"use one of {', '.join(self.files)}"
        raise BadInput("ENTRY", "", entry_id, why="no entry has this id", fix=fix)

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def by_track(self) -> dict[str, dict[str, AnyEntry]]:
        """Return track id -> entry id -> entry."""
        tracks: dict[str, dict[str, AnyEntry]] = {track_id: {} for track_id in self._track_ids}
        for entry_id, entry in self.items():
            tracks[entry.track][entry_id] = entry
        return tracks
