"""Programs that attack, in a room with small limits. Their loops are bounded, so that an attack that got
through would fail its test and not harm the machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from palio.config import Program
from palio.errors import PalioError
from palio.sandbox.process import Confined, alive
from palio.sandbox.room import Limits, Room

MB = 1 << 20
LIMITS = Limits(memory=256 * MB, processes=64, scratch=16 * MB, output=64 * MB, cpus=1)


@dataclass
class Outcome:
    code: int | None
    broken: PalioError | None
    """The limit the program broke."""
    log: str
    output: Path
    lived: list[int]
    """Processes of the program that were left after the end."""

    @property
    def said(self) -> list[str]:
        return self.log.splitlines()


Attack = Callable[..., Outcome]


@pytest.fixture
def attack(tmp_path: Path) -> Attack:
    """Run Python code as a team's program and see what came of it."""

    def run(code: str, *, seconds: float = 20, limits: Limits = LIMITS) -> Outcome:
        files, output, log = tmp_path / "files", tmp_path / "output", tmp_path / "log"
        files.mkdir(exist_ok=True)
        output.mkdir(exist_ok=True)
        (files / "main.py").write_text(code)
        program = Program(run="python -I -S main.py", files=str(files))
        with Confined(program, Room(limits, files=files, output=output), log) as running:
            mine = [running._first, *running._first.children(recursive=True)]
            code_of_exit = running.wait(seconds)
            mine += running._first.children(recursive=True) if running._first.is_running() else []
        lived = [process.pid for process in mine if alive(process)]
        return Outcome(code_of_exit, running.broken, log.read_text(errors="replace"), output, lived)

    return run
