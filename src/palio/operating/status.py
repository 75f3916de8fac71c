"""The state of every entry of a competition, read from files and the SLURM queue: no lock, no Snakemake.

A step is `running` when its last attempt has begun and its process or job is alive, `queued` when SLURM has
its job, `done` when it is not due (`palio.planning`), `failed` when it left a reason, else `waiting`.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from palio.config import Competition
from palio.entries import BrokenEntry
from palio.errors import PalioError, State
from palio.heartbeat import Heartbeat, read_heartbeat
from palio.layout import EntryFolder, HelmFolder, Results, TrainingFolder, stage_named
from palio.operating import slurm
from palio.operating.attempt import Attempt, read_attempts
from palio.pipeline import Step, steps_of
from palio.planning import sources_gone
from palio.records import StepFailure, UsedSeconds, read_record
from palio.settings import EvaluateSettings
from palio.training.ledger import charged, read_ledger
from palio.workflow import Workflow

FILE_CLOCK_SECONDS = 1.0
"""How far the time of a file may be behind the clock of the node that wrote it."""
StepState = Literal["waiting", "queued", "running", "done", "failed", "withdrawn"]
STATES: tuple[StepState, ...] = ("withdrawn", "running", "failed", "queued", "waiting", "done")
"""The first that a step of an entry is in is the entry's."""


@dataclass(frozen=True)
class StepStatus:
    step: str
    state: StepState
    attempt: int = 0
    """Number of attempts so far."""
    reason: str = ""
    """Why it failed, or why it is waiting."""
    wait: str = ""
    """What a waiting step waits for."""
    before: str = ""
    """How the last attempt ended, where another one is under way."""
    obstacle: str = ""
    """Why its SLURM job will not start by itself, and what to do."""
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
        return next((state for state in STATES if state in states), "done")


@dataclass(frozen=True)
class Selection:
    """Which entries are shown, and in which order."""

    states: frozenset[StepState] = frozenset()
    """Entries of which a step is in one of these; empty: all."""
    tracks: frozenset[str] = frozenset()
    team: str = ""
    """Part of the team's name, in whatever case."""
    sort: Literal["track", "state", "seconds"] = "track"
    """`state`: what runs or failed first; `seconds`: the longest attempt of a step that is not done first."""

    def of(self, entries: Sequence[EntryStatus]) -> list[EntryStatus]:
        chosen = [
            entry
            for entry in entries
            if not self.states or self.states & {step.state for step in entry.steps}
            if not self.tracks or entry.track in self.tracks
            if self.team.casefold() in entry.team.casefold()
        ]
        if self.sort == "state":
            return sorted(chosen, key=lambda entry: STATES.index(entry.state))
        if self.sort == "seconds":
            return sorted(chosen, key=lambda entry: -_longest(entry))
        return chosen


def _longest(entry: EntryStatus) -> float:
    return max((step.seconds or 0.0 for step in entry.steps if step.state != "done"), default=0.0)


@dataclass(frozen=True)
class Status:
    competition: str
    title: str
    time: float
    controller: str | None
    entries: list[EntryStatus]
    notes: list[str] = field(default_factory=list)
    """Problems met while reading the state."""
    last_run: str = ""
    """How the last run ended, where none is in progress."""
    selection: Selection = Selection()

    @property
    def shown(self) -> list[EntryStatus]:
        return self.selection.of(self.entries)


def competition_status(
    workflow: Workflow,
    results: Results | None = None,
    controller: str | None = None,
    last_run: str = "",
    plan: Workflow | None = None,
) -> Status:
    """Return the current state of every step of every entry and replicate.

    Args:
        last_run: how the last run ended.
        plan: what the run in progress has planned. An entry that came later waits for the next one.
    """
    competition, results = workflow.competition, results or workflow.results
    notes: list[str] = []
    queue: dict[str, slurm.Job] = {}
    closed: set[str] = set()
    if slurm.available():
        try:
            queue = {job.comment: job for job in slurm.jobs(Path.cwd())}
            if any(job.state == "PENDING" for job in queue.values()):
                closed = slurm.closed_partitions()
        except PalioError as error:
            notes.append(f"SLURM is not responding: {error}")
    unknown = bool(notes)
    now = time.time()
    statuses = []
    all_entries = workflow.entries
    notes += [str(fault) for fault in all_entries.left_out]
    for track_id, entries in all_entries.by_track().items():
        for entry_id, entry in entries.items():
            if isinstance(entry, BrokenEntry):
                notes.append(str(entry.fault))
            folder, withdrawn = results.entry(track_id, entry_id), entry_id in competition.withdrawn
            if not withdrawn and (gone := sources_gone(workflow.planned(entry_id))):
                notes.append(f"{entry_id}: {', '.join(gone)} no longer exists; what was made of it is kept")
            for one in [folder] if withdrawn else [folder, *workflow.replicates(folder)]:
                due = {} if withdrawn else workflow.due_in(one)
                planned = plan.due(one.name) if plan and entry_id in plan.entries else {}
                source = _Source(competition, one, due, queue, closed, unknown, now, planned)
                own = steps_of(entry, replicate=one.replicate is not None)
                steps = [_step(step, source) for step in own]
                if withdrawn:  # what still runs is shown too
                    running = [step for step in steps if step.state in ("running", "queued")]
                    why = competition.withdrawn[entry_id]
                    steps = [StepStatus("check", "withdrawn", reason=why), *running]
                statuses.append(EntryStatus(track_id, one.name, entry.team, steps))
    return Status(competition.competition, competition.title, now, controller, statuses, notes, last_run)


@dataclass(frozen=True)
class _Source:
    """Everything that the state of an entry's steps is read from."""

    competition: Competition
    folder: EntryFolder
    due: Mapping[str, str]
    """Step -> why it is due."""
    queue: Mapping[str, slurm.Job]
    """This user's SLURM jobs by comment."""
    closed: Collection[str]
    """SLURM partitions that start nothing."""
    queue_unknown: bool
    now: float
    planned: Collection[str]
    """Steps that the run in progress will submit."""

    def queued(self, step: Step) -> slurm.Job | None:
        return self.queue.get(f"rule_{step.rule}_wildcards_{slurm.wildcards(self.folder)}")


def _step(step: Step, source: _Source) -> StepStatus:
    name, folder = step.name, source.folder
    attempts = [attempt for attempt in read_attempts(folder) if attempt.step == name]
    last = attempts[-1] if attempts else None
    job, log = source.queued(step), folder.log(name)
    used, budget = _used(step, source, last)
    known = StepStatus(name, "waiting", attempt=len(attempts), log=str(log), used=used, budget=budget)
    if last:
        seconds = (last.ended or source.now) - last.started
        known = replace(known, node=last.node, job=last.job, started=last.started, seconds=seconds)
    if last and last.state is None and _alive(last, job, source):
        heard = log.stat().st_mtime if log.exists() else last.started
        heartbeat = read_heartbeat(folder.heartbeat(name), since=last.started)
        ends = _end(heartbeat, source.now, used, budget)
        return replace(known, state="running", ends=ends, heard=heard, before=_before(attempts[:-1]))
    ending = job is not None and last is not None and last.job == job.id and last.state is not None
    if job and not ending:
        why = job.reason if job.state == "PENDING" else f"starting on {job.reason}"
        obstacle = job.obstacle(source.closed)
        before = _before(attempts)
        return replace(known, state="queued", job=job.id, reason=why, obstacle=obstacle, before=before)
    if name not in source.due:
        took = sum(one.ended - one.started for one in attempts if one.ended) or None
        return replace(known, state="done", reason=_note(step, step.record(folder)), seconds=took)
    failure = folder.failure(name)
    if failure.exists():
        end = read_record(StepFailure, failure)
        return replace(known, state="failed", reason=f"{end.state}: {end.reason}", log=end.log or known.log)
    return _waiting(replace(known, wait=_wait(step, source)), step, source, last)


def _before(attempts: list[Attempt]) -> str:
    """Say how the last of these attempts ended, if it did not finish."""
    if not attempts or (last := attempts[-1]).state is State.FINISHED:
        return ""
    how = f"{last.state}: {last.reason}" if last.state else f"lost on {last.node}"
    return f"attempt {last.number} ended, and it is tried again: {how}"


def _waiting(known: StepStatus, step: Step, source: _Source, last: Attempt | None) -> StepStatus:
    if step.record(source.folder).exists():  # of other settings, so their time is not this one's
        return replace(known, used=None, reason=source.due[step.name])
    if last and last.state is None:
        return replace(known, reason=f"lost on {last.node}; will run again")
    return replace(known, reason=_shards_done(source.folder)) if step.name == "curate" else known


def _wait(step: Step, source: _Source) -> str:
    """Say what a step waits for that neither runs nor has failed nor is in SLURM's queue."""
    behind = next(iter(source.due))
    if behind != step.name:
        return f"behind {behind}"
    return "to be submitted" if step.name in source.planned else "for the next run"


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


def _used(step: Step, source: _Source, last: Attempt | None) -> tuple[float | None, float | None]:
    """Return the seconds used of the step's budget, and the budget; None without a budget, or while the last
    attempt has used none: a changed recipe has a budget of its own."""
    if step.limit is None:
        return None, None
    budget = float(step.limit(source.competition, source.folder.track_id).seconds)
    since = last.started - FILE_CLOCK_SECONDS if last else source.now
    if step.name == "finetune":
        ledger = _newest(source.folder.trainings, TrainingFolder.ledger.name, since)
        return (sum(charged(read_ledger(ledger)).values()) if ledger else None), budget
    clock = _newest(source.folder.helm_runs(stage_named(step.name)), HelmFolder.used_seconds.name, since)
    return (read_record(UsedSeconds, clock).seconds if clock else None), budget


def _newest(folder: Path, name: str, since: float) -> Path | None:
    """Return the most recent file of this name in the subfolders of `folder`; None if it is older than
    `since`, in seconds since 1970."""
    files = [path for path in folder.glob(f"*/{name}") if path.stat().st_mtime >= since]
    return max(files, key=lambda path: path.stat().st_mtime, default=None)


def _end(heartbeat: Heartbeat | None, now: float, used: float | None, budget: float | None) -> float | None:
    """When a running step ends at its own rate, at the latest with its budget."""
    if budget is None:
        return None
    latest = now + max(0.0, budget - (used or 0.0))
    expected = heartbeat.expected_end if heartbeat else None
    return latest if expected is None else min(latest, max(now, expected))
