"""How long a competition takes on so many GPUs, by the order in which SLURM starts ready jobs.

    python benchmarks/fanout.py                  200 entries on 8 to 64 GPUs
    python benchmarks/fanout.py --entries 60

Each entry is a chain: curate (CPU), fine-tune (GPU), package (CPU), open stage (GPU), closed stage (GPU). A
step becomes ready when the controller has seen the end of the one before, up to 3 minutes later (the
executor's longest poll). Two sets of durations: every GPU step at its limit (24 h, 5 h, 10 h), and as in
2023: trainings mostly 15 to 20 h of 24 (arXiv 2503.13507), evaluations a fifth to all of their limits.

Orders:
    fifo       as they became ready: SLURM's default
    evaluate   evaluations before trainings: the profile's `--nice` on fine-tuning
    longest    the job with the most work left in its chain first

The lower bound is max(all GPU hours / GPUs, the longest chain). What a makespan has above it is GPU time
that nobody used: after the last moment at which all GPUs were busy (tail: fewer chains are left than GPUs),
and before it (waits: the first curation, polls).
"""

from __future__ import annotations

import argparse
import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass

POLL_HOURS = 180 / 3600
CPU_HOURS = {"curate": 0.5, "package": 0.3}
GPU_STEPS = ("finetune", "open", "closed")


@dataclass(frozen=True)
class Entry:
    finetune: float
    """Hours, as the others."""
    open: float
    closed: float

    def hours(self, step: str) -> float:
        return float(getattr(self, step))

    @property
    def work(self) -> float:
        return self.finetune + self.open + self.closed

    def left(self, step: str) -> float:
        """GPU hours of the chain from `step` on."""
        return sum(self.hours(other) for other in GPU_STEPS[GPU_STEPS.index(step) :])


@dataclass(frozen=True)
class Ready:
    """A job that waits for a GPU."""

    at: float
    number: int
    step: str
    entry: Entry


ORDERS: dict[str, Callable[[Ready], tuple[float, ...]]] = {
    "fifo": lambda job: (job.at, job.number),
    "evaluate": lambda job: (job.step == "finetune", job.at, job.number),
    "longest": lambda job: (-job.entry.left(job.step), job.at, job.number),
}


def at_the_limit(entries: int) -> list[Entry]:
    return [Entry(24, 5, 10)] * entries


def as_in_2023(entries: int, seed: int = 0) -> list[Entry]:
    draw = random.Random(seed)
    return [
        Entry(min(24, draw.triangular(8, 24, 17.5)), draw.uniform(1, 5), draw.uniform(2, 10))
        for _ in range(entries)
    ]


@dataclass(frozen=True)
class Outcome:
    makespan: float
    bound: float
    tail: float
    """GPU hours idle after the last moment at which all GPUs were busy."""
    waits: float
    """GPU hours idle before."""
    half: float
    """Hours until half of the entries are finished."""
    first: float
    """Hours until the first one is."""


def simulate(entries: list[Entry], gpus: int, order: str, poll: float = POLL_HOURS, seed: int = 0) -> Outcome:
    """List scheduling of the chains on identical GPUs."""
    draw = random.Random(seed)
    key = ORDERS[order]
    ready_later = [(CPU_HOURS["curate"], number, "finetune") for number in range(len(entries))]
    heapq.heapify(ready_later)
    waiting: list[tuple[tuple[float, ...], int, Ready]] = []
    running: list[tuple[float, int, str]] = []
    ends: list[float] = []
    now = last_full = 0.0
    spent: list[tuple[float, float]] = []
    while ready_later or waiting or running:
        while ready_later and ready_later[0][0] <= now:
            at, number, step = heapq.heappop(ready_later)
            job = Ready(at, number, step, entries[number])
            heapq.heappush(waiting, (key(job), number, job))
        while waiting and len(running) < gpus:
            _, number, job = heapq.heappop(waiting)
            end = now + job.entry.hours(job.step)
            heapq.heappush(running, (end, number, job.step))
            spent.append((now, end))
        upcoming = [queue[0][0] for queue in (running, ready_later) if queue]
        if not upcoming:
            break
        now = max(now, min(upcoming))
        if len(running) == gpus:
            last_full = now
        while running and running[0][0] <= now:
            end, number, step = heapq.heappop(running)
            seen = end + draw.uniform(0, poll)
            if step == "finetune":
                heapq.heappush(
                    ready_later, (seen + CPU_HOURS["package"] + draw.uniform(0, poll), number, "open")
                )
            elif step == "open":
                heapq.heappush(ready_later, (seen, number, "closed"))
            else:
                ends.append(end)
    ends.sort()
    makespan = ends[-1]
    used = sum(end - start for start, end in spent)
    used_before = sum(min(end, last_full) - start for start, end in spent if start < last_full)
    waits = gpus * last_full - used_before
    return Outcome(
        makespan=makespan,
        bound=max(used / gpus, *(entry.work for entry in entries)),
        tail=gpus * makespan - used - waits,
        waits=waits,
        half=ends[len(ends) // 2],
        first=ends[0],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--entries", type=int, default=200)
    parser.add_argument("--gpus", type=int, nargs="*", default=[8, 16, 32, 64])
    asked = parser.parse_args()
    kinds = {"at the limit": at_the_limit(asked.entries), "as in 2023": as_in_2023(asked.entries)}
    columns = ("durations", "GPUs", "order", "makespan, days", "above the bound", "idle: tail", "idle: waits")
    print("| " + " | ".join((*columns, "half done, days", "first")) + " |")
    print("|---" * (len(columns) + 2) + "|")
    for kind, entries in kinds.items():
        for gpus in asked.gpus:
            for order in ORDERS:
                found = simulate(entries, gpus, order)
                total = gpus * found.makespan
                print(
                    f"| {kind} | {gpus} | {order} | {found.makespan / 24:.1f} "
                    f"| {100 * (found.makespan / found.bound - 1):.1f} % "
                    f"| {100 * found.tail / total:.1f} % | {100 * found.waits / total:.1f} % "
                    f"| {found.half / 24:.1f} | {found.first / 24:.1f} |"
                )


if __name__ == "__main__":
    main()
