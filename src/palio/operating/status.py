"""Where every entry of a competition is, read from files and the SLURM queue: no lock, no Snakemake.

A step is `done` when its record is there, `failed` when it left a reason, `running` when its last attempt
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

from palio.config import Competition, Entry, entry_files, expand, load_entry
from palio.errors import BadInput, PalioError
from palio.heartbeat import Heartbeat, heartbeat_file, read_heartbeat
from palio.operating import slurm
from palio.operating.attempt import Attempt, read_attempts
from palio.training.ledger import charged, read_ledger

StepState = Literal["waiting", "queued", "running", "done", "failed", "withdrawn"]


@dataclass(frozen=True)
class Step:
    rule: str
    """Snakemake's rule, as SLURM's job comments name it."""
    record: str
    """In the entry's folder; its existence means done."""


STEPS = {
    "check": Step("check_entry", "check.json"),
    "curate": Step("curate_dataset", "dataset/manifest.json"),
    "contamination": Step("measure_contamination", "contamination.json"),
    "finetune": Step("finetune", "adapter.json"),
    "package": Step("build_package", "package.json"),
    "open": Step("helm_open", "open.json"),
    "closed": Step("helm_closed", "closed.json"),
}
"""In the order of an entry's life."""


@dataclass(frozen=True)
class StepStatus:
    step: str
    state: StepState
    attempt: int = 0
    """Of how many attempts this is the last."""
    reason: str = ""
    """Why it failed, or what it waits for in the queue."""
    log: str = ""
    node: str = ""
    job: str | None = None
    started: float | None = None
    """Seconds since 1970, as `ends` and `heard`."""
    seconds: float | None = None
    """Of the last attempt, so far or in all."""
    used: float | None = None
    """Seconds of the budget or limit that are used, over all attempts."""
    budget: float | None = None
    ends: float | None = None
    """When a running step is expected to end; at the latest, if it says nothing of its progress yet."""
    heard: float | None = None
    """When its log last grew."""


@dataclass(frozen=True)
class EntryStatus:
    track: str
    entry: str
    team: str
    steps: list[StepStatus]

    @property
    def state(self) -> StepState:
        """Of the entry as a whole: the state of the step that decides it."""
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
    """What could not be found out."""


def competition_status(
    competition: Competition, results: Path = Path("results"), controller: str | None = None
) -> Status:
    """The state of every step of every entry, now."""
    notes: list[str] = []
    queue: dict[str, slurm.Job] = {}
    if slurm.available():
        try:
            queue = {job.comment: job for job in slurm.jobs(Path.cwd())}
        except PalioError as error:
            notes.append(f"SLURM does not answer: {error}")
    now = time.time()
    first = next(iter(competition.tracks))
    entries = []
    for name, path in entry_files(competition).items():
        entry: Entry | None = None
        try:
            entry = load_entry(path)
        except BadInput as fault:
            notes.append(str(fault))
        track = entry.track if entry and entry.track in competition.tracks else first
        at = _Place(competition, results / track / name, track, name, queue, bool(notes), now)
        if name in competition.withdrawn:
            steps = [StepStatus("check", "withdrawn", reason=competition.withdrawn[name])]
        else:
            steps = [_step(step, at) for step in steps_of(entry)]
        entries.append(EntryStatus(track, name, entry.team if entry else "", steps))
    order = {track: number for number, track in enumerate(competition.tracks)}
    entries.sort(key=lambda one: (order[one.track], one.entry))
    return Status(competition.competition, competition.title, now, controller, entries, notes)


def steps_of(entry: Entry | None) -> list[str]:
    """The steps of an entry's life; of a broken file, what is known to come."""
    if entry is None:
        return ["check"]
    left_out = set()
    if entry.dataset is None:
        left_out |= {"curate", "contamination"}
    if not entry.trained:
        left_out.add("finetune")
    return [step for step in STEPS if step not in left_out]


@dataclass(frozen=True)
class _Place:
    """What the state of a step is read from."""

    competition: Competition
    folder: Path
    track: str
    entry: str
    queue: Mapping[str, slurm.Job]
    """My jobs in SLURM by comment."""
    queue_unknown: bool
    now: float

    def queued(self, step: str) -> slurm.Job | None:
        # the executor writes wildcards in the order of the rule's output, joined by "_"
        return self.queue.get(f"rule_{STEPS[step].rule}_wildcards_{self.track}_{self.entry}")

    def log(self, step: str) -> Path:
        return self.folder / "logs" / f"{step}.log"


def _step(step: str, at: _Place) -> StepStatus:
    attempts = [one for one in read_attempts(at.folder) if one.step == step]
    last = attempts[-1] if attempts else None
    job, log = at.queued(step), at.log(step)
    used, budget = _used(step, at)
    known = StepStatus(step, "waiting", attempt=len(attempts), log=str(log), used=used, budget=budget)
    if last:
        seconds = (last.ended or at.now) - last.started
        known = replace(known, node=last.node, job=last.job, started=last.started, seconds=seconds)
    if last and last.state is None and _alive(last, job, at):
        heard = log.stat().st_mtime if log.exists() else last.started
        heartbeat = read_heartbeat(heartbeat_file(at.folder, step), since=last.started)
        return replace(known, state="running", ends=_end(heartbeat, at.now, used, budget), heard=heard)
    ending = job is not None and last is not None and last.job == job.id and last.state is not None
    if job and not ending:
        why = job.reason if job.state == "PENDING" else f"starting on {job.reason}"
        return replace(known, state="queued", job=job.id, reason=why)
    if (at.folder / STEPS[step].record).exists():
        return replace(known, state="done", reason=_note(step, at))
    failure = at.folder / "work" / "failures" / f"{step}.json"
    if failure.exists():
        found = json.loads(failure.read_text(encoding="utf-8"))
        return replace(known, state="failed", reason=f"{found['state']}: {found['reason']}")
    if last and last.state is None:
        return replace(known, reason=f"lost on {last.node}; runs again")
    return replace(known, reason=_shards_done(at.folder)) if step == "curate" else known


def _shards_done(entry_dir: Path) -> str:
    """How far the jobs are that share a curation; empty where there are none."""
    done = [path.name.split(".") for path in (entry_dir / "work/shards").glob("*.*-of-*")]
    if not done:
        return ""
    phase, shard = max(done, key=lambda name: int(name[0]))
    finished = sum(name[0] == phase for name in done)
    return f"{finished} of {shard.rpartition('-')[2]} shards of phase {phase} are done"


def _alive(last: Attempt, job: slurm.Job | None, at: _Place) -> bool:
    if last.job is not None:
        known = job is not None and job.id == last.job and job.state != "PENDING"
        return known or at.queue_unknown
    if last.node != platform.node():
        return False
    try:
        os.kill(last.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _note(step: str, at: _Place) -> str:
    if step not in ("open", "closed"):
        return ""
    try:
        return str(json.loads((at.folder / f"{step}.json").read_text(encoding="utf-8"))["reason"])
    except (OSError, ValueError, KeyError):
        return ""


def _used(step: str, at: _Place) -> tuple[float | None, float | None]:
    """Seconds used of the step's budget, and the budget; None where it has none or has not begun."""
    if step == "finetune":
        budget = float(at.competition.tracks[at.track].training_budget)
        ledger = _newest(at.folder / "work" / "train", "*/ledger.jsonl")
        return (sum(charged(read_ledger(ledger)).values()) if ledger else None), budget
    if step in ("open", "closed"):
        work = at.folder / "work" / "helm" / "open"
        if step == "closed":
            store = expand(at.competition.closed_store) / at.competition.competition
            work = store / "runs" / at.track / at.entry
        clock = _newest(work, "*/used_seconds.json")
        used = float(json.loads(clock.read_text(encoding="utf-8"))["seconds"]) if clock else None
        return used, float(at.competition.stage(step).time_limit)
    return None, None


def _newest(folder: Path, pattern: str) -> Path | None:
    return max(folder.glob(pattern), key=lambda path: path.stat().st_mtime, default=None)


def _end(heartbeat: Heartbeat | None, now: float, used: float | None, budget: float | None) -> float | None:
    """When a running step ends at its own rate, at the latest with its budget."""
    if budget is None:
        return None
    latest = now + max(0.0, budget - (used or 0.0))
    expected = heartbeat.expected_end if heartbeat else None
    return latest if expected is None else min(latest, max(now, expected))
