"""The state of every entry of a competition, read from files and the SLURM queue: no lock, no Snakemake.

A step is `done` when its record exists, `failed` when it left a reason, `running` when its last attempt
has begun and its process or job is alive, `queued` when SLURM has its job, else `waiting` for other steps.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from palio.config import Competition
from palio.entries import BrokenEntry, Entries
from palio.errors import PalioError
from palio.heartbeat import Heartbeat, read_heartbeat
from palio.layout import EntryFolder, HelmFolder, Results, TrainingFolder, stage_named
from palio.operating import slurm
from palio.operating.attempt import Attempt, read_attempts
from palio.pipeline import Step, steps_of
from palio.records import StepFailure, UsedSeconds, read_record
from palio.settings import EvaluateSettings
from palio.training.ledger import charged, read_ledger

StepState = Literal["waiting", "queued", "running", "done", "failed", "withdrawn"]


@dataclass(frozen=True)
class StepStatus:
    step: str
    state: StepState
    attempt: int = 0
    """Number of attempts so far."""
    reason: str = ""
    """Why it failed, or why it is waiting."""
    log: str = ""
    node: str = ""
    job: str | None = None
    started: float | None = None
    """Seconds since 1970, as `ends` and `heard`."""
    seconds: float | None = None
    """Duration of the last attempt so far."""
    used: float | None = None
    """Seconds used of the budget or limit, over all attempts."""
    budget: float | None = None
    ends: float | None = None
    """Expected end of a running step; the latest possible one until it reports progress."""
    heard: float | None = None
    """Last write to its log."""


@dataclass(frozen=True)
class EntryStatus:
    track: str
    entry: str
    team: str
    steps: list[StepStatus]

    @property
    def state(self) -> StepState:
        """State of the step that decides the whole entry."""
        states = [step.state for step in self.steps]
        order: tuple[StepState, ...] = ("withdrawn", "running", "failed", "queued", "waiting")
        return next((state for state in order if state in states), "done")


@dataclass(frozen=True)
class Status:
    competition: str
    title: str
    time: float
    controller: str | None
    entries: list[EntryStatus]
    notes: list[str] = field(default_factory=list)
    """Problems met while reading the state."""


def competition_status(competition: Competition, results: Results, controller: str | None = None) -> Status:
    """Return the current state of every step of every entry."""
    notes: list[str] = []
    queue: dict[str, slurm.Job] = {}
    if slurm.available():
        try:
            queue = {job.comment: job for job in slurm.jobs(Path.cwd())}
        except PalioError as error:
            notes.append(f"SLURM is not responding: {error}")
    now = time.time()
    statuses = []
    for track_id, entries in Entries(competition).by_track().items():
        for entry_id, entry in entries.items():
            if isinstance(entry, BrokenEntry):
                notes.append(str(entry.fault))
            source = _Source(competition, results.entry(track_id, entry_id), queue, bool(notes), now)
            if entry_id in competition.withdrawn:
                steps = [StepStatus("check", "withdrawn", reason=competition.withdrawn[entry_id])]
            else:
                steps = [_step(step, source) for step in steps_of(entry)]
            statuses.append(EntryStatus(track_id, entry_id, entry.team, steps))
    return Status(competition.competition, competition.title, now, controller, statuses, notes)


@dataclass(frozen=True)
class _Source:
    """Everything that the state of an entry's steps is read from."""

    competition: Competition
    folder: EntryFolder
    queue: Mapping[str, slurm.Job]
    """This user's SLURM jobs by comment."""
    queue_unknown: bool
    now: float

    def queued(self, step: Step) -> slurm.Job | None:
        # the executor writes wildcards in the order of the rule's output, joined by "_"
        return self.queue.get(f"rule_{step.rule}_wildcards_{self.folder.track_id}_{self.folder.entry_id}")


def _step(step: Step, source: _Source) -> StepStatus:
    name, folder = step.name, source.folder
    attempts = [attempt for attempt in read_attempts(folder) if attempt.step == name]
    last = attempts[-1] if attempts else None
    job, log = source.queued(step), folder.log(name)
    used, budget = _used(step, source)
    known = StepStatus(name, "waiting", attempt=len(attempts), log=str(log), used=used, budget=budget)
    if last:
        seconds = (last.ended or source.now) - last.started
        known = replace(known, node=last.node, job=last.job, started=last.started, seconds=seconds)
    if last and last.state is None and _alive(last, job, source):
        heard = log.stat().st_mtime if log.exists() else last.started
        heartbeat = read_heartbeat(folder.heartbeat(name), since=last.started)
        return replace(known, state="running", ends=_end(heartbeat, source.now, used, budget), heard=heard)
    ending = job is not None and last is not None and last.job == job.id and last.state is not None
    if job and not ending:
        why = job.reason if job.state == "PENDING" else f"starting on {job.reason}"
        return replace(known, state="queued", job=job.id, reason=why)
    if (record := step.record(folder)).exists():
        return replace(known, state="done", reason=_note(step, record))
    failure = folder.failure(name)
    if failure.exists():
        end = read_record(StepFailure, failure)
        return replace(known, state="failed", reason=f"{end.state}: {end.reason}")
    if last and last.state is None:
        return replace(known, reason=f"lost on {last.node}; will run again")
    return replace(known, reason=_shards_done(folder)) if name == "curate" else known


def _shards_done(folder: EntryFolder) -> str:
    """Return the progress of the jobs that share a curation; empty if one job does it all."""
    done = [path.name.split(".") for path in folder.shards.glob("*.*-of-*")]
    if not done:
        return ""
    phase, shard = max(done, key=lambda name: int(name[0]))
    finished = sum(name[0] == phase for name in done)
    return f"{finished} of {shard.rpartition('-')[2]} shards of phase {phase} done"


def _alive(last: Attempt, job: slurm.Job | None, source: _Source) -> bool:
    if last.job is not None:
        known = job is not None and job.id == last.job and job.state != "PENDING"
        return known or source.queue_unknown
    if last.node != platform.node():
        return False
    try:
        os.kill(last.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _note(step: Step, record: Path) -> str:
    """Return what a stage's record says about unanswered questions."""
    if step.settings is not EvaluateSettings:
        return ""
    try:
        return str(json.loads(record.read_text(encoding="utf-8"))["reason"])
    except (OSError, ValueError, KeyError):
        return ""


def _used(step: Step, source: _Source) -> tuple[float | None, float | None]:
    """Return the seconds used of the step's budget, and the budget; None without a budget or a start."""
    if step.limit is None:
        return None, None
    budget = float(step.limit(source.competition, source.folder.track_id).seconds)
    if step.name == "finetune":
        ledger = _newest(source.folder.trainings, TrainingFolder.ledger.name)
        return (sum(charged(read_ledger(ledger)).values()) if ledger else None), budget
    clock = _newest(source.folder.helm_runs(stage_named(step.name)), HelmFolder.used_seconds.name)
    return (read_record(UsedSeconds, clock).seconds if clock else None), budget


def _newest(folder: Path, name: str) -> Path | None:
    """Return the most recent file of this name in the subfolders of `folder`."""
    return max(folder.glob(f"*/{name}"), key=lambda path: path.stat().st_mtime, default=None)


def _end(heartbeat: Heartbeat | None, now: float, used: float | None, budget: float | None) -> float | None:
    """When a running step ends at its own rate, at the latest with its budget."""
    if budget is None:
        return None
    latest = now + max(0.0, budget - (used or 0.0))
    expected = heartbeat.expected_end if heartbeat else None
    return latest if expected is None else min(latest, max(now, expected))
