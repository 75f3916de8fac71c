"""A model server as a child process: started, monitored, and stopped with everything it started."""

from __future__ import annotations

import http.client
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

from palio.cpu import CpuDtype
from palio.errors import Crashed, OutOfMemory
from palio.guard import end_with_parent
from palio.text import last_lines

READY = "palio serves on "
"""What a server prints, followed by its address, once it takes requests."""
READY_SECONDS = 1800.0
"""Enough to load a large model from a slow disk."""
STOP_SECONDS = 10.0
HEALTH_SECONDS = 2.0
POLL_SECONDS = 0.1
OWNER = "PALIO_SERVER_OWNER"
"""Environment variable: id of the process that a server ends with."""


class ServerProcess:
    """`palio serve PACKAGE` on loopback and a free port, as a context manager.

    Entering waits until the server takes requests. Enter it in a thread that outlives the context: the server
    ends with that thread. Its output is appended to `log`, which never contains a prompt. Without
    `gpu_memory_gb` it runs on the CPU, even on a node with a GPU.

    Raises:
        Crashed, OutOfMemory: the server ended or did not get ready; with the last lines of its log.
    """

    def __init__(
        self,
        package: Path,
        *,
        log: Path,
        threads: int | None = None,
        gpu_memory_gb: float | None = None,
        cache_gb: float | None = None,
        max_context: int | None = None,
        engine: str = "transformers",
        cpu_dtype: CpuDtype = "float32",
    ) -> None:
        self._log = log
        self._command = [
            *(sys.executable, "-m", "palio.cli", "serve", str(package), "--port", "0", "--engine", engine),
            *(["--threads", str(threads)] if threads else []),
            *("--device", "cuda" if gpu_memory_gb else "cpu"),
            *("--cpu-dtype", cpu_dtype),
            *(["--gpu-memory-gb", str(gpu_memory_gb)] if gpu_memory_gb else []),
            *(["--cache-gb", str(cache_gb)] if cache_gb else []),
            *(["--max-context", str(max_context)] if max_context else []),
        ]
        self._environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "PYTHONUNBUFFERED": "1",
            "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",  # prefixes have all lengths
            OWNER: str(os.getpid()),
        }
        if threads:
            self._environment["OMP_NUM_THREADS"] = str(threads)
        self._process: subprocess.Popen[bytes] | None = None
        self.base_url = ""

    def __enter__(self) -> ServerProcess:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        start = self._log.stat().st_size if self._log.exists() else 0
        with self._log.open("ab") as stream:
            self._process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self.base_url = self._wait(start)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def alive(self) -> bool:
        """Return whether the process runs and its /health does not say that it is broken."""
        if self._process is None or self._process.poll() is not None:
            return False
        connection = http.client.HTTPConnection(self.base_url.removeprefix("http://"), timeout=HEALTH_SECONDS)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status != 503
        except (OSError, http.client.HTTPException):  # busy, or about to end
            return True
        finally:
            connection.close()

    def exit_code(self) -> int | None:
        return self._process.poll() if self._process else None

    def _wait(self, start: int) -> str:
        """Wait for the address that the server prints to its log, looking from byte `start` on."""
        assert self._process is not None
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline:
            code = self._process.poll()
            output = self._log.read_bytes()[start:].decode(errors="replace")
            if ready := re.search(rf"^{READY}(\S+)\n", output, re.M):
                return ready[1]
            if code is not None:
                raise self._death(code, output)
            time.sleep(POLL_SECONDS)
        late = Crashed(
            f"the model server was not ready in {READY_SECONDS:.0f} s, its last lines: {last_lines(output)}"
        )
        late.log = self._log
        raise late

    def _death(self, code: int, output: str) -> Crashed | OutOfMemory:
        ended = f"the model server ended with code {code} before it was ready"
        what = f"{ended}, its last lines: {last_lines(output)}"
        # A SIGKILL that is not ours comes from the kernel's or the batch system's memory limit.
        killed = code in (-signal.SIGKILL, 128 + signal.SIGKILL)
        death = OutOfMemory(what) if killed or code == OutOfMemory.exit_code else Crashed(what)
        death.log = self._log
        return death

    def _stop(self) -> None:
        """Send SIGTERM, then SIGKILL, to the whole group, including what outlived the server itself."""
        assert self._process is not None
        for signum in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self._process.pid, signum)
            except ProcessLookupError:
                break
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                continue
        self._process.wait()


def end_with_owner() -> None:
    """In a server that a `ServerProcess` started: end when that process ends, even by SIGKILL."""
    if owner := os.environ.get(OWNER):
        end_with_parent(int(owner), signal.SIGTERM)
