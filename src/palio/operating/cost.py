"""What a competition has taken so far, from every attempt at every step: `palio cost`."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from palio.errors import State
from palio.layout import EntryFolder, Results
from palio.operating.attempt import Attempt, read_attempts
from palio.operating.status import competition_status
from palio.pipeline import STEPS
from palio.text import markdown_table
from palio.workflow import Workflow

LIMITED = frozenset(step.name for step in STEPS if step.limit)
"""Steps that have a GPU for themselves, on a track with one."""


@dataclass
class Cost:
    """Hours of all attempts of one step, entry, team, track or node."""

    of: str
    attempts: int = 0
    cpu_hours: float = 0.0
    """Wall-clock hours of jobs that have no GPU."""
    gpu_hours: float = 0.0
    """Wall-clock hours of jobs that have a GPU."""
    lost_gpu_hours: float = 0.0
    """Of these, hours of attempts that did not finish. A training goes on from its checkpoint, so it may have
    kept most of them."""
    usd: float | None = None
    """Hours of these steps, on whatever they ran, at `telemetry.usd_per_hour` of their track; None where a
    track has no price."""

    def add(self, hours: float, *, lost: bool, on_gpu: bool) -> None:
        self.attempts += 1
        if on_gpu:
            self.gpu_hours += hours
            self.lost_gpu_hours += hours if lost else 0.0
        else:
            self.cpu_hours += hours

    def pay(self, hours: float, price: float | None) -> None:
        self.usd = None if self.usd is None or price is None else self.usd + hours * price


def costs(workflow: Workflow, results: Results, by: str) -> list[Cost]:
    """Return a row for each `by` (step, entry, team, track, node), the dearest first, and their sum.

    An attempt that died without reporting an end counts until the step's next one or, without any, until the
    last line of its log.
    """
    prices, tracks = workflow.competition.telemetry.usd_per_hour, workflow.competition.tracks
    rows: dict[str, Cost] = defaultdict(lambda: Cost("", usd=0.0))
    for entry in competition_status(workflow, results).entries:
        folder = results.entry(entry.track, entry.entry)
        on_gpu = tracks[entry.track].gpu_memory_gb is not None
        running = {step.step for step in entry.steps if step.state == "running"}
        for attempt, seconds, lost in _attempts(folder, running):
            step = attempt.step.partition(".")[0]  # a shard's
            of = {"step": step, "entry": entry.entry, "team": entry.team, "track": entry.track}
            for name in (of.get(by, attempt.node), ""):
                row, hours, limited = rows[name], seconds / 3600, step in LIMITED
                row.add(hours, lost=lost, on_gpu=limited and on_gpu)
                if limited:
                    row.pay(hours, prices.get(entry.track))
    total = rows.pop("", Cost("", usd=0.0))
    for name, row in rows.items():
        row.of = name
    total.of = "in all"
    return [*sorted(rows.values(), key=lambda row: (-row.gpu_hours, -row.cpu_hours, row.of)), total]


def _attempts(folder: EntryFolder, running: set[str]) -> Iterator[tuple[Attempt, float, bool]]:
    """Yield each attempt with its seconds, and whether they led to nothing."""
    last: dict[str, Attempt] = {}
    for attempt in reversed(read_attempts(folder)):
        after = last.get(attempt.step)
        runs = after is None and attempt.ended is None and attempt.step in running
        died_by = after.started if after else _last_sign(folder, attempt)
        end = attempt.ended or (time.time() if runs else died_by)
        lost = not runs and attempt.state is not State.FINISHED
        yield attempt, max(0.0, end - attempt.started), lost
        last[attempt.step] = attempt


def _last_sign(folder: EntryFolder, attempt: Attempt) -> float:
    log = folder.attempt_log(attempt.step, attempt.number)
    return log.stat().st_mtime if log.exists() else attempt.started


def cost_table(rows: list[Cost], by: str) -> str:
    """Return the rows as a Markdown table; the price only where every track has one."""
    priced = all(row.usd is not None for row in rows) and any(row.usd for row in rows)
    head = [by, "attempts", "CPU h", "GPU h", "of them without a result", *(["USD"] if priced else [])]
    lines = [
        (
            row.of,
            row.attempts,
            f"{row.cpu_hours:,.2f}",
            f"{row.gpu_hours:,.2f}",
            f"{row.lost_gpu_hours:,.2f}",
            *([f"{row.usd:,.2f}"] if priced else []),
        )
        for row in rows
    ]
    return markdown_table(head, lines, left=[by])
