"""Pickled weights of a base model become safetensors, in a sandbox.

torch's restricted unpickler (`weights_only`) makes tensors and plain containers, and runs no code of the
file. Should that fail one day, the process has no network and sees nothing but the weights. What it leaves is
read like a team's: safetensors by their headers, links refused, the index written here.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from palio.config import Program
from palio.errors import Crashed, PalioError, RuleViolation
from palio.files import link_or_copy
from palio.incoming import Incoming, copy_files
from palio.provenance import write_json
from palio.sandbox import unpickle
from palio.sandbox.model_files import tensors
from palio.sandbox.process import Confined
from palio.sandbox.room import FILES, GIB, OUTPUT, Limits, Room
from palio.text import last_lines

SPARE = 4 * GIB
"""Memory besides the largest file: torch, and a part as it is written."""
SECONDS = 3600.0
WEIGHTS = "/base_model"


def convert(files: Sequence[Path], target: Path) -> None:
    """Write the tensors of pickled weight files and their index into the folder `target`.

    Raises RuleViolation if they hold anything else, Crashed if this machine cannot confine the process.
    """
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        given, program, output = (Path(work, name) for name in ("given", "program", "converted"))
        for folder in (given, program, output):
            folder.mkdir()
        for file in files:  # they may be links out of a snapshot of the hub
            link_or_copy(file.resolve(), given / file.name)
        script = Path(unpickle.__file__)
        link_or_copy(script, program / script.name)
        line = [sys.executable, "-I", f"{FILES}/{script.name}", OUTPUT]
        line += [f"{WEIGHTS}/{file.name}" for file in files]
        room = Room(_limits(files), files=program, inputs={WEIGHTS: given}, output=output)
        _run(Program(run=tuple(line), files=str(program)), room, Path(work, "log"))
        _take(Incoming(output), target, room.limits.output)


def _limits(files: Sequence[Path]) -> Limits:
    sizes = [file.stat().st_size for file in files]
    memory, output = max(sizes) + SPARE, 2 * sum(sizes) + GIB
    return Limits(memory=memory, processes=64, scratch=GIB, output=output, cpus=1)


def _run(program: Program, room: Room, log: Path) -> None:
    try:
        with Confined(program, room, log) as running:
            code = running.wait(SECONDS)
            running.end()
            running.finish_log()
    except PalioError as error:
        raise Crashed(f"pickled weights are converted in a sandbox only: {error}") from error
    if running.broken is not None:
        raise running.broken
    if code is None:
        raise Crashed(f"pickled weights were not converted in {SECONDS:.0f} s")
    if code != 0:
        last = last_lines(log.read_bytes()[-4096:].decode(errors="replace"), 1)
        raise RuleViolation(last or f"the conversion ended with code {code}", "give a safetensors model")


def _take(left: Incoming, target: Path, limit: int) -> None:
    names = left.names()
    copy_files([left / name for name in names], target, limit)
    files = {tensor: name for name in names for tensor in tensors(target / name)}
    index = {"metadata": {}, "weight_map": dict(sorted(files.items()))}
    write_json(target / "model.safetensors.index.json", index)
