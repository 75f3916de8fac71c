"""The budget ledger: wall-clock training time over all attempts, which no crash or restart can reset.

`ledger.jsonl` is append-only and fsynced. An attempt writes a `start` line, a `beat` every interval from
a thread of its own, and an `end`. Its length is measured on the monotonic clock, so setting the system
clock changes nothing. A killed attempt has no `end`: it is charged up to its last beat plus one interval,
so that dying never pays.

    with sole_process(work), Ledger(work / "ledger.jsonl", budget) as ledger:
        while ledger.left() > reserve: ...
        ledger.outcome = "finished"
"""

from __future__ import annotations

import fcntl
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from palio.errors import Interrupted
from palio.files import append_json_line, read_json_lines


def beat_interval(budget: float) -> float:
    """Return the seconds between beats: half a second for short budgets, 5 s for a day."""
    return min(5.0, max(0.5, budget / 5000))


def charged(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Return the seconds charged to each attempt, by its id."""
    seconds: dict[str, float] = {}
    unended: dict[str, float] = {}
    for line in lines:
        attempt = line["attempt"]
        seconds[attempt] = max(seconds.get(attempt, 0.0), line.get("seconds", 0.0))
        if line["event"] == "start":
            unended[attempt] = line["interval"]
        elif line["event"] == "end":
            unended.pop(attempt, None)
    return {attempt: value + unended.get(attempt, 0.0) for attempt, value in seconds.items()}


def read_ledger(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a ledger; none if it does not exist."""
    return read_json_lines(path)


def joules(lines: list[dict[str, Any]]) -> float | None:
    """Return the energy of all attempts (a killed one up to its last beat); None if none was metered."""
    energy = {line["attempt"]: line["joules"] for line in lines if "joules" in line}
    return round(sum(energy.values()), 1) if energy else None


@contextmanager
def sole_process(work: Path) -> Iterator[None]:
    """Hold the run's lock: a second process, say a killed controller's orphan, would spoil its checkpoints.

    Raises Interrupted if another process holds it.
    """
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Interrupted(f"another process is training in {work}; wait for it or stop it") from None
        yield


class Ledger:
    """Clock of one attempt; it runs inside the `with` block."""

    def __init__(
        self, path: Path, budget: float, *, meter: Callable[[], float | None] | None = None, **facts: Any
    ) -> None:
        """Take the budget in seconds, `facts` (device, GPU) for the start line, and a reader of a counter of
        joules, which returns None where the device has none."""
        self.path, self.budget, self.meter, self.facts = path, budget, meter, facts
        before = charged(read_ledger(path))
        self.before = sum(before.values())
        self.attempt = f"{len(before) + 1}-{os.getpid()}"
        self.interval = beat_interval(budget)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._lost: OSError | None = None
        self.outcome = "crashed"

    def used(self) -> float:
        """Return the seconds of the budget used by all attempts so far.

        Raises Interrupted if the ledger cannot be written: unrecorded time must not be used.
        """
        if self._lost is not None:
            raise Interrupted(
                f"the budget ledger {self.path} cannot be written ({self._lost}); make room and start again"
            )
        return self.before + time.monotonic() - self._started

    def left(self) -> float:
        """Return the seconds left, negative once the budget is overdrawn. Raises as `used` does."""
        return self.budget - self.used()

    def __enter__(self) -> Ledger:
        self._started = time.monotonic()
        self._joules = self.meter() if self.meter else None
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
        with suppress(OSError):  # without an end the attempt is only charged a little more
            self._write("end", **self._measured(), outcome=self.outcome)

    def _measured(self) -> dict[str, float]:
        values = {"seconds": round(time.monotonic() - self._started, 3)}
        now = self.meter() if self.meter else None
        if now is not None and self._joules is not None:
            values["joules"] = round(now - self._joules, 1)
        return values

    def _beat(self) -> None:
        while not self._stop.wait(self.interval):
            try:
                self._write("beat", **self._measured())
            except OSError as error:
                self._lost = error
                return

    def _write(self, event: str, **values: Any) -> None:
        append_json_line(self.path, {"event": event, "attempt": self.attempt, **values})
