"""Run a command so that none of its processes outlives the process that started it.

    python -m palio.guard OWNER COMMAND...

The guard ends the command and all its descendants when the command ends, when it gets SIGTERM, and when its
parent, the process OWNER, ends in any way. It exits with the command's code. Start it as a group leader and
kill that group to be rid of everything, even if the guard itself was killed.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress

import psutil

GRACE_SECONDS = 2.0
"""Between SIGTERM and SIGKILL."""
CONTROLLER_VARIABLE = "PALIO_CONTROLLER"
"""Environment variable: process id of the local Snakemake that a step ends with."""
SET_PDEATHSIG, SET_CHILD_SUBREAPER = 1, 36
"""Operations of Linux's prctl."""


def guarded(command: Sequence[str]) -> list[str]:
    """Return the command line that runs a command under a guard owned by this process."""
    return [sys.executable, "-m", "palio.guard", str(os.getpid()), *command]


def end_with_parent(parent: int, signum: int) -> None:
    """Get a signal when the thread that started this process ends; exit if `parent` has already ended."""
    _prctl(SET_PDEATHSIG, signum)
    if os.getppid() != parent:
        os._exit(1)


def end_with(ancestor: int) -> None:
    """Get SIGTERM when a process ends that is not the parent, e.g. the Snakemake above a job."""
    if sys.platform != "linux":
        return
    try:
        descriptor = os.pidfd_open(ancestor)
    except ProcessLookupError:
        sys.exit(f"process {ancestor}, which started this step, has ended")

    def wait() -> None:
        select.select([descriptor], [], [])
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def _prctl(operation: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(operation, value)


def main() -> None:
    owner, command, guard = int(sys.argv[1]), sys.argv[2:], os.getpid()
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))
    end_with_parent(owner, signal.SIGTERM)
    _prctl(SET_CHILD_SUBREAPER, 1)  # descendants whose parent ends become children of the guard
    # preexec_fn is safe here: the guard has one thread.
    process = subprocess.Popen(command, preexec_fn=lambda: end_with_parent(guard, signal.SIGKILL))  # noqa: PLW1509
    try:
        code = process.wait()
        sys.exit(code if code >= 0 else 128 - code)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
        while children := psutil.Process().children():
            for child in children:
                child.kill()
            psutil.wait_procs(children)


if __name__ == "__main__":
    main()
