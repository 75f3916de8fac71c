"""Everything Palio raises on purpose, and the exit code each ends the command line with.

    PalioError            1   something went wrong; the message is one line for the user
    ├── BadInput          2   a file, key or value is wrong: names it and the fix
    ├── RuleViolation     3   the entry breaks a rule of the competition
    ├── TimeLimit         4   a budget or limit ran out
    ├── OutOfMemory       5   the memory of the track was not enough
    ├── Crashed           6   a program of the entry, or one we started for it, died
    ├── Interrupted       7   the machine's fault: a signal, a full disk, a lost node; start again
    ├── NotRetried        8   it failed before in this run of the workflow, by its own fault
    ├── ServerBroken      9   `palio serve`: the model or its device is broken; start the server again
    └── Withdrawn        10   the entry was withdrawn while the step waited

Each class carries the `State` that the standings show for it. Anything else that is raised is a bug
of ours: it keeps its traceback, exits with 70 and counts as `crashed`.
"""

from __future__ import annotations

import re
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any


class State(StrEnum):
    """How a step, a HELM run or an entry ended. Missing is one of these, never a zero."""

    FINISHED = "finished"
    TIME_LIMIT = "time_limit"
    OUT_OF_MEMORY = "out_of_memory"
    CRASHED = "crashed"
    INTERRUPTED = "interrupted"  # by the machine or the organizer; the entry did nothing wrong
    RULE_VIOLATION = "rule_violation"
    NOT_RUN = "not_run"
    NO_MENTION = "no_mention"  # a bias metric whose groups no completion mentions
    WITHDRAWN = "withdrawn"


class PalioError(Exception):
    """Base of every error with a one-line message for the user; its notes go on that line."""

    exit_code = 1
    state = State.CRASHED
    log: Path | None = None
    """The log that says most about it, if that is not the step's own."""

    def __str__(self) -> str:
        line = re.sub(r"\s*\n\s*", " ", "; ".join([super().__str__(), *getattr(self, "__notes__", ())]))
        # a team's text may be in it: no character reaches a terminal as a command
        return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in line)


class BadInput(PalioError):
    """A wrong value at the edge. The message is one line: file, key, value, why it is wrong and the fix."""

    exit_code = 2
    state = State.RULE_VIOLATION

    def __init__(
        self, file: str | Path, key: str = "", value: object = None, *, why: str = "", fix: str = ""
    ) -> None:
        self.file, self.key, self.value, self.why, self.fix = file, key, value, why, fix
        where = f"{file}: {key}" if key else f"{file}"
        shown = "" if value is None else f" is {value!r}"
        super().__init__(f"{where}{shown}: {_sentence(why, fix)}")

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle so that it comes back from another process as what it is."""
        return partial(type(self), why=self.why, fix=self.fix), (self.file, self.key, self.value)


class InvalidValue(ValueError):
    """A validator's finding; reading the file makes a `BadInput` of it, which names file and key."""

    def __init__(self, *, why: str, fix: str) -> None:
        super().__init__(_sentence(why, fix))
        self.why, self.fix = why, fix


def _sentence(why: str, fix: str) -> str:
    return "; ".join(part for part in (why, fix) if part)


class RuleViolation(PalioError):
    exit_code = 3
    state = State.RULE_VIOLATION

    def __init__(self, why: str, fix: str = "") -> None:
        super().__init__(_sentence(why, fix))
        self.why, self.fix = why, fix


class TimeLimit(PalioError):
    exit_code = 4
    state = State.TIME_LIMIT


class OutOfMemory(PalioError):
    exit_code = 5
    state = State.OUT_OF_MEMORY


class Crashed(PalioError):
    exit_code = 6
    state = State.CRASHED


class Interrupted(PalioError):
    exit_code = 7
    state = State.INTERRUPTED


class NotRetried(PalioError):
    """Raised before a step begins; what it failed of is already on record."""

    exit_code = 8


class ServerBroken(PalioError):
    exit_code = 9


class Withdrawn(PalioError):
    exit_code = 10
    state = State.WITHDRAWN
