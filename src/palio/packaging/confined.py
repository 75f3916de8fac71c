"""Packaging of a model with code of its own: merged in one room, tried in another.

What the rooms leave is taken like a team's files.
"""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from palio.config import Isolation, Program
from palio.errors import Crashed
from palio.layout import BaseModelFolder, EntryFolder, RoomFolder
from palio.records import AdapterManifest
from palio.sandbox.handed_in import take_weights
from palio.sandbox.model_room import ADAPTER, BASE_MODEL, PACKAGE, Call, code_of, run, temporary_room
from palio.sandbox.process import Confined
from palio.sandbox.room import GIB, Limits, Room

SPARE = 8 * GIB
"""Memory besides the weights: libraries, and the logits of probe texts."""
COPIES = 10
"""Of weights stored in 2 bytes, that a merge in fp32 may hold: plain, quantized, merged and as saved."""


def merge_confined(
    folder: EntryFolder,
    base_model: BaseModelFolder,
    trained: AdapterManifest,
    target: Path,
    threads: int | None,
) -> tuple[float | None, float | None]:
    """Merge an adapter in a room and write weights and config into `target`; see `write_tuned`.

    Raises PalioError as `write_tuned` does, RuleViolation or Crashed for what the room did or left.
    """
    given = {"trained": trained.model_dump(mode="json"), "threads": threads}
    inputs = {BASE_MODEL: base_model.model, ADAPTER: folder.adapter}
    call, limits = Call("merge", given, code_of(base_model), inputs), _limits(base_model.model, threads)
    with _emptied(folder.room("merge")) as work:
        found = run(call, call.room(limits, work.output), work.log)
        take_weights(work.model, target, base_model=base_model.model, limit=limits.output)
    match found:
        case [float() | None as difference, float() | None as divergence]:
            return difference, divergence
    raise Crashed("the process with the model's own code did not report the merge")


def serving_of_confined(
    folder: EntryFolder, package: Path, code: Mapping[str, str], threads: int | None
) -> tuple[str, int]:
    """Return how a package is served, and its context, as tried in a room. Raises as `merge_confined`."""
    call = Call("serving_of", {"threads": threads}, code, {PACKAGE: package}, model=PACKAGE)
    with _emptied(folder.room("serve")) as work:
        found = run(call, call.room(_limits(package, threads), work.output), work.log)
    match found:
        case [str() as way, int() as context] if context > 0:
            return way[:100], context
    raise Crashed("the process with the model's own code did not report how it is served")


def same_answers_confined(
    package: Path, base_model: BaseModelFolder, adapter: Path, trained: AdapterManifest
) -> str:
    """Compare a package with base plus adapter, as `same_answers` does, in a room. Raises as `run` does."""
    inputs = {PACKAGE: package, BASE_MODEL: base_model.model, ADAPTER: adapter}
    call = Call("same_answers", {"trained": trained.model_dump(mode="json")}, code_of(base_model), inputs)
    with temporary_room() as room:
        return str(run(call, call.room(_limits(package, None), room.output), room.log))[:200]


def output_confined(line: tuple[str, ...], package: Path, seconds: float) -> tuple[int | None, str]:
    """Return exit code (None: ended by us) and output of a program that sees a package in a room."""
    with tempfile.TemporaryDirectory() as work:
        room, log = Room(_limits(package, None), inputs={PACKAGE: package}), RoomFolder(Path(work)).log
        with Confined(Program(run=line, files=str(package)), room, log) as running:
            code = running.wait(seconds)
            running.end()
            running.finish_log()
        return (None if running.broken else code), log.read_text(encoding="utf-8", errors="replace")


@contextmanager
def _emptied(work: RoomFolder) -> Iterator[RoomFolder]:
    """Provide an empty output folder; afterwards the log alone is left."""
    shutil.rmtree(work.path, ignore_errors=True)
    work.output.mkdir(parents=True)
    try:
        yield work
    finally:
        shutil.rmtree(work.output, ignore_errors=True)


def _limits(model: Path, threads: int | None) -> Limits:
    weights = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    memory = COPIES * weights + SPARE
    return Limits(
        memory=memory if hard == resource.RLIM_INFINITY else min(memory, hard),
        processes=Isolation().processes,
        scratch=GIB,
        output=2 * weights + GIB,
        cpus=threads or os.cpu_count() or 1,
    )
