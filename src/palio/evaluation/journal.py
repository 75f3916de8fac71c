"""What the HELM client tells the evaluation: every answer, and why a request has none.

answers.jsonl holds one `Answer` a line. It shows completions and lies where HELM's output lies. The reason
of an unanswered request goes through HELM's scenario_state.json, see `RunFolder.unanswered`.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

LIMIT = "the stage's limit ran out"
BROKEN = "connection broken"
"""Begins the reason where more than that one request failed."""


@dataclass(frozen=True)
class Answer:
    key: str
    """sha256 of the request."""
    cut: bool
    """The server went on behind a stop sequence, and the completion was cut there."""
    reply: dict[str, Any]
    """The server's own, before any cut: `text`, `tokens`, `logprob` and `request_time`, nothing else."""


class JournalReader:
    """Reads a journal that may still grow, every line once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = 0
        """Bytes read so far: the end of the last complete line."""

    def answers(self) -> Iterator[Answer]:
        """Answers since the last call; none where there is no journal.

        A last line without its end is left for later: it is being written, or a kill tore it.
        """
        if not self.path.exists():
            return
        with self.path.open("rb") as lines:
            lines.seek(self.offset)
            for line in lines:
                if not line.endswith(b"\n"):
                    return
                self.offset += len(line)
                yield Answer(**json.loads(line))


class Journal:
    """Keeps answers on disk, safe against threads of this process and a kill at any time. In memory is only
    where each of them lies."""

    _opened: ClassVar[dict[Path, Journal]] = {}
    _opening: ClassVar[threading.Lock] = threading.Lock()

    @classmethod
    def at(cls, path: Path) -> Journal:
        """Return the process's one journal at a path.

        HELM 0.5.16 makes several clients if its first requests come in parallel. With a journal each, the
        later ones would cut off lines that the earlier ones had just written, and misplace their own.
        """
        with cls._opening:
            if path not in cls._opened:
                cls._opened[path] = cls(path)
            return cls._opened[path]

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = threading.Lock()
        self.places: dict[str, int] = {}
        """First byte of the line of each answer, by its key."""
        reader = JournalReader(path)
        before = 0
        for answer in reader.answers():
            self.places[answer.key] = before
            before = reader.offset
        with path.open("ab") as lines:
            lines.truncate(reader.offset)  # a line torn by a kill never happened

    def reply(self, key: str) -> dict[str, Any] | None:
        with self.lock:
            place = self.places.get(key)
        if place is None:
            return None
        with self.path.open("rb") as lines:
            lines.seek(place)
            return Answer(**json.loads(lines.readline())).reply

    def add(self, answer: Answer) -> None:
        line = json.dumps(vars(answer)) + "\n"
        with self.lock, self.path.open("ab") as lines:
            lines.seek(0, os.SEEK_END)
            self.places[answer.key] = lines.tell()
            lines.write(line.encode())
