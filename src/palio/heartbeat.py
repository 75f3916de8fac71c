"""How far a running step is: written by the step now and then, read by `palio status`.

work/heartbeats/<step>.json in the entry's folder    Heartbeat; numbers only, of the closed stage too
"""

from __future__ import annotations

import math
import time
from contextlib import suppress
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from palio.records import Record

Unit = Literal["steps", "requests"]
INTERVAL_SECONDS = 1.0
"""At least so long between two writes."""


class Heartbeat(Record):
    step: str
    done: int
    total: int
    unit: Unit
    """What `done` and `total` count."""
    used_seconds: float
    """Of the step's budget or limit, over all attempts."""
    time: float
    """Seconds since 1970, when this was written."""

    @property
    def expected_end(self) -> float | None:
        """Seconds since 1970, if what is left takes as long per unit as what is done; None before any is."""
        if not self.done:
            return None
        return self.time + self.used_seconds * (self.total - self.done) / self.done


def read_heartbeat(path: Path, *, since: float) -> Heartbeat | None:
    """Read a step's last heartbeat; None where there is none of this attempt, which began at `since`."""
    try:
        heartbeat = Heartbeat.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):  # ValidationError: another version of Palio wrote it
        return None
    return heartbeat if heartbeat.time >= since else None


class HeartbeatWriter:
    """Writes a step's heartbeat, at most once in INTERVAL_SECONDS. A failed write never hurts the step."""

    def __init__(self, path: Path, total: int, unit: Unit) -> None:
        self.path, self.total, self.unit = path, total, unit
        self._written = -math.inf

    def beat(self, done: int, used_seconds: float) -> None:
        """Say that `done` of `total` are done, after `used_seconds` of the step's budget."""
        now = time.monotonic()
        if now - self._written < INTERVAL_SECONDS:
            return
        self._written = now
        heartbeat = Heartbeat(
            step=self.path.stem,
            done=done,
            total=self.total,
            unit=self.unit,
            used_seconds=used_seconds,
            time=time.time(),
        )
        # Not `provenance.atomic_path`: losing one in a power cut is harmless, syncing the disk is not cheap.
        temporary = self.path.with_suffix(".tmp")
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(heartbeat.model_dump_json(), encoding="utf-8")
            temporary.replace(self.path)
