"""A model server that breaks for good in the middle of a stage, whatever its engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import pytest

from palio.errors import Crashed
from palio.records import StageRecord, UsedSeconds, read_record
from palio.serving.process import ServerProcess
from palio.settings import StageRuns
from tests.support.entry import serve_stage
from tests.support.serving import metric

ANSWERED = 10
"""Requests, before it breaks."""


@dataclass(frozen=True)
class Broken:
    alive: float
    """Seconds from the server's start to its break."""
    over_after: float
    """Seconds from the break to the end of the stage."""
    used: float
    """Seconds on record as the entry's."""
    asked_again: int
    """Requests that the next start sent."""
    whole: StageRecord


def break_in_mid_stage(
    stage: StageRuns,
    record: Path,
    entry_dir: Path,
    start: Callable[[Path], ServerProcess],
    break_it: Callable[[ServerProcess], None],
) -> Broken:
    """Ask a stage of a server that breaks after ANSWERED answers and is not started again, then the same
    stage of a healthy one."""
    began, broke, asked = [], [], []

    def wait_and_break(server: ServerProcess) -> None:
        while metric(server, "requests_answered_total") < ANSWERED:
            time.sleep(0.02)
        broke.append(time.monotonic())
        break_it(server)

    @contextmanager
    def breaking(log: Path) -> Iterator[ServerProcess]:
        with ThreadPoolExecutor(1) as pool, start(log) as server:
            began.append(time.monotonic())
            done = pool.submit(wait_and_break, server)
            yield server
            done.result(60)

    @contextmanager
    def healthy(log: Path) -> Iterator[ServerProcess]:
        with start(log) as server:
            yield server
            asked.append(int(metric(server, "requests_total")))

    died = pytest.raises(Crashed, match="the model server died")
    with died, patch("palio.evaluation.evaluate.MAX_RESTARTS", 0):
        serve_stage(stage, record, entry_dir, breaking, threads=2)
    over_after = time.monotonic() - broke[0]
    (used,) = entry_dir.glob("work/helm/open/*/used_seconds.json")
    seconds = read_record(UsedSeconds, used).seconds
    whole = serve_stage(stage, record, entry_dir, healthy, threads=2)
    return Broken(broke[0] - began[0], over_after, seconds, asked[0], whole)
