"""How often Snakemake's scheduler looks at the jobs that are ready."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support import quick
from tests.support.folder import WorkingFolder

TIMERS = """\
import sys, threading
from pathlib import Path

start = threading.Timer.start

def counted(timer):
    if Path(sys.argv[0]).name == "snakemake":
        with open("timers", "a") as file:
            file.write(f"{timer.interval}\\n")
    start(timer)

threading.Timer.start = counted
"""
"""A sitecustomize.py that logs each timer that Snakemake starts."""


@pytest.mark.parametrize(
    ("limit", "timers"),
    [
        pytest.param((), set(), id="none"),
        pytest.param(("--max-jobs-per-timespan", "50/1s"), {"1.0"}, id="given", marks=pytest.mark.slow),
    ],
)
def test_a_run_looks_again_only_when_a_job_has_ended_unless_a_limit_on_submissions_is_given(
    folder: WorkingFolder, tmp_path: Path, limit: tuple[str, ...], timers: set[str]
) -> None:
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(TIMERS)
    environment = quick.program(tmp_path / "bin") | {
        "PYTHONPATH": f"{hook}:{os.environ.get('PYTHONPATH', '')}"
    }
    command = ("snakemake", "--profile", "local", "--until", "check_entry", *limit)
    done = folder.run(*command, environment=environment)
    assert done.returncode == 0, done.stderr
    started = folder.path / "timers"
    assert set(started.read_text().split() if started.exists() else ()) == timers
