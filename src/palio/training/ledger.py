"""The budget ledger: training wall-clock over all attempts, which no crash or restart can reset.

`ledger.jsonl` is append-only and fsynced. An attempt writes a `start` line, a `beat` every interval from
a thread of its own, and an `end`; its length is measured on the monotonic clock, so a moved system clock
changes nothing. An attempt that was killed has no end: it is charged its last beat and one interval more,
so that dying never pays.
"""

from __future__ import annotations

import json
import os
import platform
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from palio.errors import Crashed


def beat_interval(budget: float) -> float:
    """Seconds between beats: half a second for short budgets, 5 s for a day."""
    return min(5.0, max(0.5, budget / 5000))


def charged(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds charged to each attempt, by its id."""
    seconds: dict[str, float] = {}
    ended: set[str] = set()
    interval: dict[str, float] = {}
    for line in lines:
        attempt = line["attempt"]
        seconds[attempt] = max(seconds.get(attempt, 0.0), line.get("seconds", 0.0))
        if line["event"] == "start":
            interval[attempt] = line["interval"]
        elif line["event"] == "end":
            ended.add(attempt)
    return {
        attempt: value + (0.0 if attempt in ended else interval.get(attempt, 0.0))
        for attempt, value in seconds.items()
    }


def read_ledger(path: Path) -> list[dict[str, Any]]:
    """The ledger's lines; one that a crash tore is left out."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


class Ledger:
    """One attempt's clock: `with Ledger(path, budget) as ledger: ... ledger.used()`."""

    def __init__(self, path: Path, budget: float, **facts: Any) -> None:
        """`facts` (device, GPU) stand in the start line beside host, process and SLURM job."""
        self.path, self.budget, self.facts = path, budget, facts
        before = charged(read_ledger(path))
        self.before = sum(before.values())
        self.attempt = f"{len(before) + 1}-{os.getpid()}"
        self.interval = beat_interval(budget)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._lost: OSError | None = None
        self.outcome = "crashed"

    def used(self) -> float:
        """Seconds of the budget used by all attempts up to now.

        Raises Crashed if the ledger cannot be written: time that is not on record must not be used.
        """
        if self._lost is not None:
            raise Crashed(
                f"the budget ledger {self.path} cannot be written ({self._lost}); make room, start again"
            )
        return self.before + time.monotonic() - self._started

    def __enter__(self) -> Ledger:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # A torn last line is closed, so that this attempt's first line stands alone.
        if self.path.exists() and not self.path.read_bytes().endswith(b"\n"):
            self._append("\n")
        self._started = time.monotonic()
        self._write(
            "start",
            interval=self.interval,
            budget=self.budget,
            time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            host=platform.node(),
            pid=os.getpid(),
            slurm_job_id=os.environ.get("SLURM_JOB_ID"),
            **self.facts,
        )
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        with suppress(OSError):  # an attempt without an end is charged a little more, that is all
            self._write("end", seconds=self._seconds(), outcome=self.outcome)

    def _seconds(self) -> float:
        return round(time.monotonic() - self._started, 3)

    def _beat(self) -> None:
        while not self._stop.wait(self.interval):
            try:
                self._write("beat", seconds=self._seconds())
            except OSError as error:
                self._lost = error
                return

    def _write(self, event: str, **values: Any) -> None:
        self._append(json.dumps({"event": event, "attempt": self.attempt, **values}) + "\n")

    def _append(self, text: str) -> None:
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, text.encode())
            os.fsync(handle)
        finally:
            os.close(handle)
