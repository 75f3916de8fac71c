"""A model server as a process of its own: started, watched, and ended with all it started."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

from palio.errors import Crashed, OutOfMemory
from palio.text import last_lines

READY_SECONDS = 1800.0
"""Loading a large model from a slow disk."""
STOP_SECONDS = 10.0
POLL_SECONDS = 0.1
OWNER = "PALIO_SERVER_OWNER"
"""Environment variable: the process that a server ends with."""


class ServerProcess:
    """`palio serve PACKAGE` on loopback and a free port, while the context lasts.

    Enter it in a thread that outlives it: the server ends with that thread. Entering waits until it takes
    requests. The server's output is appended to `log`, which never holds a prompt. Without `gpu_memory_gb`
    it runs on the CPU, whatever the node has.

    Raises:
        Crashed, OutOfMemory: it died or did not get ready; with the last lines of its log.
    """

    def __init__(
        self,
        package: Path,
        *,
        log: Path,
        threads: int | None = None,
        gpu_memory_gb: float | None = None,
        cache_gb: float | None = None,
        engine: str = "transformers",
        ready_seconds: float = READY_SECONDS,
    ) -> None:
        self._log = log
        self._ready_seconds = ready_seconds
        self._command = [
            *(sys.executable, "-m", "palio.cli", "serve", str(package), "--port", "0", "--engine", engine),
            *(["--threads", str(threads)] if threads else []),
            *("--device", "cuda" if gpu_memory_gb else "cpu"),
            *(["--gpu-memory-gb", str(gpu_memory_gb)] if gpu_memory_gb else []),
            *(["--cache-gb", str(cache_gb)] if cache_gb else []),
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
        begin = self._log.stat().st_size if self._log.exists() else 0
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
            self.base_url = self._wait(begin)
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
        return self._process is not None and self._process.poll() is None

    def _wait(self, begin: int) -> str:
        """The address the server prints when it is ready."""
        assert self._process is not None
        deadline = time.monotonic() + self._ready_seconds
        while time.monotonic() < deadline:
            text = self._said(begin)
            if ready := re.search(r"^palio serves on (\S+)\n", text, re.M):
                return ready[1]
            if (code := self._process.poll()) is not None:
                raise self._death(code, self._said(begin))
            time.sleep(POLL_SECONDS)
        raise Crashed(
            f"the model server was not ready after {self._ready_seconds:.0f} s; "
            f"see {self._log}: {last_lines(self._said(begin))}"
        )

    def _said(self, begin: int) -> str:
        with self._log.open("rb") as stream:
            stream.seek(begin)
            return stream.read().decode(errors="replace")

    def _death(self, code: int, text: str) -> Crashed | OutOfMemory:
        what = f"the model server ended with code {code} before it was ready; {self._log}: {last_lines(text)}"
        # SIGKILL that is not ours comes from the kernel's or the batch system's memory limit.
        killed = code in (-signal.SIGKILL, 128 + signal.SIGKILL)
        return OutOfMemory(what) if killed or code == OutOfMemory.exit_code else Crashed(what)

    def _stop(self) -> None:
        """SIGTERM, then SIGKILL, to the whole group: also to what outlived the server itself."""
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
    """In a server: end when the process that started it does, also by SIGKILL. Does nothing elsewhere."""
    if (owner := os.environ.get(OWNER)) and sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
        if os.getppid() != int(owner):  # it ended before
            sys.exit(1)
