"""Work with a model that brings code of its own: one function of `palio.inside`, in a room, with the folders
that it needs and no network. It is confined even where `isolation.unconfined` is set.

The code shares its process with Palio's own trainer or server, so what comes back is untrusted: a report of
bounded size, whose values the caller checks, and files that are taken like a team's.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import palio
from palio.config import ServerProgram
from palio.errors import BadInput, Crashed, Interrupted, OutOfMemory, PalioError, RuleViolation, TimeLimit
from palio.incoming import Incoming
from palio.layout import BaseModelFolder, RoomFolder
from palio.records import BaseModelManifest, read_record
from palio.sandbox.process import Confined
from palio.sandbox.room import GIB, Limits, Room
from palio.text import last_lines

BASE_MODEL, ADAPTER, PACKAGE = "/base_model", "/adapter", "/package"
"""Places of the room."""
JOB = "/job.json"
"""What to call, read-only: an argument could not be as long as an entry file may be."""
REPORT = "report.json"
POLL_SECONDS = 0.2
SECONDS = 3600.0
META_LIMITS = Limits(memory=16 * GIB, processes=512, scratch=GIB, output=GIB, cpus=2)
"""For a look at a model on the meta device, which has no weights."""
_PLAIN = {kind.__name__: kind for kind in (Crashed, Interrupted, OutOfMemory, PalioError, TimeLimit)}
_TEXT = 1000
"""Characters of an error's part."""


@dataclass(frozen=True)
class Call:
    """A call of a function of `palio.inside`."""

    function: str
    given: Mapping[str, Any]
    code: Mapping[str, str]
    """sha256 by name of the model's Python files."""
    inputs: Mapping[str, Path]
    """Folder of the host by its place in the room."""
    model: str = BASE_MODEL
    """The place of the folder with the code."""
    variables: Mapping[str, str] = field(default_factory=dict)

    def program(self) -> ServerProgram:
        # SIGUSR1, SLURM's warning, is for a trainer that has begun: earlier it would end the process.
        run = ("env", "--ignore-signal=USR1", sys.executable, "-P", "-m", "palio.inside")
        return ServerProgram(run=run, files=str(self._palio))

    def room(self, limits: Limits, output: Path | None = None, visible: tuple[str, ...] = ()) -> Room:
        variables = {"PYTHONPATH": "/entry", "HF_HUB_DISABLE_TELEMETRY": "1", **self.variables}
        job = {"function": self.function, "given": self.given, "code": self.code, "model": self.model}
        texts = {JOB: json.dumps(job)}
        return Room(limits, self._palio, self.inputs, output, variables, visible=visible, texts=texts)

    @property
    def _palio(self) -> Path:
        """The folder that Palio is imported from, which the room has at /entry."""
        return Path(palio.__file__).parents[1]


def run(
    call: Call,
    room: Room,
    log: Path,
    *,
    seconds: float = SECONDS,
    watch: Callable[[Confined], None] = lambda running: None,
) -> Any:
    """Call a function in a room that has an output folder, and return what it reports.

    `watch` is called a few times a second; it may ask the room to stop.

    Raises:
        PalioError: the one that the function raised, or this machine cannot confine it.
        TimeLimit: it took more than `seconds`.
        OutOfMemory, Crashed: it broke another limit, or died.
    """
    assert room.output is not None
    with suppress(OSError):  # a folder by this name is refused below
        (room.output / REPORT).unlink()
    deadline = time.monotonic() + seconds
    with Confined(call.program(), room, log) as running:
        while (code := running.wait(POLL_SECONDS)) is None and time.monotonic() < deadline:
            watch(running)
        running.end()
        running.finish_log()
    if running.broken is not None:
        raise running.broken
    if code is None:
        raise TimeLimit(f"the process with the model's own code was stopped after {seconds:.0f} s")
    try:
        report = json.loads((Incoming(room.output) / REPORT).read())
        return report["result"] if "result" in report else _raise(report["error"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        last = last_lines(log.read_bytes()[-4096:].decode(errors="replace"), 1) or "it printed nothing"
        died = Crashed(f"the process with the model's own code ended with code {code}: {last}")
        died.log = log
        raise died from None


def look(function: str, model: Path, code: Mapping[str, str], **given: Any) -> Any:
    """Call a function of `palio.inside` that looks at a model without its weights. Raises as `run` does."""
    call = Call(function, given, code, {BASE_MODEL: model})
    with temporary_room() as room:
        return run(call, call.room(META_LIMITS, room.output), room.log)


@contextmanager
def temporary_room() -> Iterator[RoomFolder]:
    """Provide a room's folder that is gone afterwards, with its log: no error names that."""
    with tempfile.TemporaryDirectory() as work:
        room = RoomFolder(Path(work))
        room.output.mkdir()
        try:
            yield room
        except PalioError as error:
            error.log = None
            raise


def code_of(base_model: BaseModelFolder) -> dict[str, str]:
    """Return the approved code of a fetched base model; empty if it has none."""
    return read_record(BaseModelManifest, base_model.manifest).code


def described(error: PalioError) -> dict[str, Any]:
    """Return an error as the report has it."""
    if isinstance(error, BadInput):
        parts = [str(error.file), error.key, None if error.value is None else str(error.value)]
        return {"kind": "BadInput", "parts": parts, "why": error.why, "fix": error.fix}
    if isinstance(error, RuleViolation):
        return {"kind": "RuleViolation", "why": error.why, "fix": error.fix}
    return {"kind": type(error).__name__, "why": str(error)}


def _raise(error: Any) -> Any:
    """Raise what a report describes. Raises ValueError, TypeError or KeyError if it describes nothing."""
    kind, why, fix = error["kind"], str(error["why"])[:_TEXT], str(error.get("fix", ""))[:_TEXT]
    if kind == "BadInput":
        file, key, value = error["parts"]
        raise BadInput(str(file)[:_TEXT], str(key)[:_TEXT], value and str(value)[:_TEXT], why=why, fix=fix)
    if kind == "RuleViolation":
        raise RuleViolation(why, fix)
    raise _PLAIN[kind](why)
