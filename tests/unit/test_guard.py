"""The guard of a command: nothing that it started outlives whoever started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from palio.guard import guarded

TREE = """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        pathlib.Path(sys.argv[1]).touch()
time.sleep(600)
"""
"""A program that ignores SIGTERM, its child in a session of its own, and a grandchild."""

OWNER = """
import subprocess, sys, time
from palio.guard import guarded
print(subprocess.Popen(guarded(sys.argv[1:]), start_new_session=True).pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    ready = tmp_path / "ready"
    command = [sys.executable, "-c", OWNER, sys.executable, "-c", TREE, str(ready)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
        while not ready.exists():
            time.sleep(0.01)
        yield owner
        owner.kill()


def guard_of(owner: subprocess.Popen[str]) -> psutil.Process:
    assert owner.stdout is not None
    return psutil.Process(int(owner.stdout.readline()))


def test_a_command_tree_ends_with_a_killed_owner(owner: subprocess.Popen[str]) -> None:
    guard = guard_of(owner)
    tree = [guard, *guard.children(recursive=True)]
    assert len(tree) == 4
    owner.kill()
    assert psutil.wait_procs(tree, timeout=5)[1] == []


def test_a_command_tree_ends_with_a_terminated_guard(owner: subprocess.Popen[str]) -> None:
    guard = guard_of(owner)
    tree = guard.children(recursive=True)
    guard.terminate()
    assert psutil.wait_procs(tree, timeout=5)[1] == []


def test_a_killed_guard_takes_its_command_along(owner: subprocess.Popen[str]) -> None:
    guard = guard_of(owner)
    command, *descendants = guard.children(recursive=True)
    guard.kill()
    command.wait(5)
    for process in descendants:
        process.kill()


def test_what_a_finished_command_leaves_running_is_ended(tmp_path: Path) -> None:
    left = tmp_path / "left"
    script = f"sleep 600 & echo $! > {left}; exit 3"
    assert subprocess.run(guarded(["bash", "-c", script]), check=False, timeout=60).returncode == 3
    assert not psutil.pid_exists(int(left.read_text()))


def test_a_command_that_a_signal_ended_has_the_shells_code() -> None:
    command = guarded([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"])
    assert subprocess.run(command, check=False, timeout=60).returncode == 128 + signal.SIGKILL


def test_a_guard_whose_owner_is_gone_starts_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "palio.guard", str(os.getpid() + 1), "touch", str(tmp_path / "started")]
    assert subprocess.run(command, check=False, timeout=60).returncode == 1
    assert not (tmp_path / "started").exists()


STEP = (
    "import sys, time; from palio.guard import end_with; end_with(int(sys.argv[1])); print(); time.sleep(600)"
)


def test_a_step_ends_with_the_snakemake_above_it() -> None:
    with subprocess.Popen(["sleep", "600"]) as controller:
        command = [sys.executable, "-c", STEP, str(controller.pid)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as step:
            assert step.stdout is not None
            step.stdout.readline()
            controller.kill()
            assert step.wait(5) == -signal.SIGTERM


def test_a_step_whose_snakemake_is_gone_does_not_start() -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    step = subprocess.run([sys.executable, "-c", STEP, str(gone.pid)], check=False, timeout=60)
    assert step.returncode == 1
