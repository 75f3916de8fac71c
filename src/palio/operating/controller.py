"""The controller: the one Snakemake that runs in a folder, from its start to its end.

Its lock is a flock on `.snakemake/palio.lock`, which the kernel releases when the process ends, however it
ends. So a killed controller needs no unlocking: the next one first cancels the SLURM jobs that it left queued
or running, which would otherwise write beside the same steps submitted again. Their work is in the entries'
work/ folders, and is resumed.
"""

from __future__ import annotations

import atexit
import fcntl
import json
import os
import platform
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from palio.config import Competition
from palio.errors import PalioError
from palio.guard import CONTROLLER_VARIABLE
from palio.layout import ENDED, LOCK
from palio.operating import slurm
from palio.operating.attempt import RUN_VARIABLE
from palio.operating.kept import keep, let_go, put_back
from palio.operating.status import EntryStatus, competition_status
from palio.workflow import Workflow

RUN_NAME = "palio_"
"""How names of our SLURM jobs begin: the profile's slurm-jobname-prefix."""
WATCH_SECONDS = 60.0
NOTIFY_SECONDS = 60.0
RELEASES = 4
"""Of one job: SLURM by itself lets no job be requeued more often than five times (MaxBatchRequeue)."""
RELEASE_SECONDS = 60.0
"""From the first release of a job to its second at least; twice that to the third, and so on."""

DEFAULT_LIMIT = 100, 1.0
"""Snakemake's default --max-jobs-per-timespan: jobs, seconds."""

_lock: IO[str] | None = None
"""Held until the process ends."""


def lift_default_limit(snakemake: Any) -> None:
    """Lift Snakemake's default limit on submissions; any other is the organizer's and stays.

    Under a limit, Snakemake 9.27 starts a timer whenever it looks at the ready jobs, and the timer makes it
    look again. Every job that ends adds one such chain, so the work is quadratic in the jobs, and Snakemake
    exits only after the last timer. Without a limit it still submits one job at a time.
    """
    limit = snakemake.scheduling_settings.max_jobs_per_timespan
    if limit is not None and (limit.max_jobs, limit.timespan) == DEFAULT_LIMIT:
        snakemake.scheduler.job_rate_limiter = None


def take_over(*, on_slurm: bool) -> str:
    """Become the folder's controller; return the id of its run. Raises `PalioError` if another is alive."""
    global _lock  # noqa: PLW0603 (a lock lives as long as its process)
    LOCK.parent.mkdir(exist_ok=True)
    lock = LOCK.open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise PalioError(
            f"another Snakemake is running in this folder: {running() or 'just starting'}"
        ) from None
    run = uuid.uuid4().hex[:12]
    _lock = lock
    _write_facts(host=platform.node(), pid=os.getpid(), started=time.time(), run=run)
    os.environ[RUN_VARIABLE] = run
    if on_slurm:
        cancel_orphans()
    else:
        os.environ[CONTROLLER_VARIABLE] = str(os.getpid())
    return run


def mark_end() -> None:
    """Tell the controller that the Snakemake of a job is over. It asks SLURM then, see `hooks`."""
    with suppress(OSError):  # then the controller sees the end later
        ENDED.touch()


def begin(workflow: Workflow, *, on_slurm: bool) -> None:
    """Become the controller, keep what is about to be made again, write the plan down for the jobs, and watch
    how the run goes. Raises `PalioError` if another controller is alive."""
    from palio.operating import hooks  # imports Snakemake

    run = take_over(on_slurm=on_slurm)
    put_back_all(workflow)  # what the orphans' Snakemakes have deleted as they were cancelled
    for folder, step in workflow.due_steps():
        with suppress(OSError):  # a folder that cannot be written has nothing to lose
            keep(step, folder)
    workflow.save(run)
    hooks.install(workflow, run)
    watch(workflow, on_slurm=on_slurm)
    atexit.register(crash, workflow)


def end(workflow: Workflow, event: str, message: str) -> None:
    """Tell the organizer and `palio status` how this process's run has ended; only the first call counts."""
    if _lock is not None:
        put_back_all(workflow)
        for folder in workflow.folders():
            with suppress(OSError):
                let_go(folder)
        _free(workflow, event, message)


def crash(workflow: Workflow) -> None:
    """The same for a run that ends otherwise: its jobs may still be at work, so the next one puts back."""
    _free(workflow, "failure", "the run ended by an exception; Snakemake's log says which")


def _free(workflow: Workflow, event: str, message: str) -> None:
    """Free the folder for the next run now, not once the organizer's command and Snakemake's own end are
    over."""
    global _lock  # noqa: PLW0603
    if _lock is None:
        return
    _write_facts(**_facts(), ended=time.time(), outcome=message)
    fcntl.flock(_lock, fcntl.LOCK_UN)  # closing is not enough: a forked process may hold it too
    _lock.close()
    _lock = None
    notify(workflow.competition, event, message)


def put_back_all(workflow: Workflow) -> None:
    """Put back what steps have made and Snakemake has deleted."""
    for folder in workflow.folders():
        with suppress(OSError):
            put_back(folder)


def _write_facts(**facts: Any) -> None:
    assert _lock is not None
    _lock.truncate(0)
    json.dump(facts, _lock)
    _lock.flush()


def _facts() -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(LOCK.read_text())
    except (OSError, json.JSONDecodeError):
        return {}
    return found


def last_run() -> str:
    """Say how the last run in this folder ended; empty if there was none."""
    if not (facts := _facts()):
        return ""
    if "ended" in facts:
        return f"last run ended {_minute(facts['ended'])}: {facts['outcome']}"
    return (
        f"last run was killed: process {facts['pid']} on {facts['host']}, begun {_minute(facts['started'])}"
    )


def _minute(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def running() -> str | None:
    """Describe the running controller of this folder; None if there is none. Takes no lock of its own."""
    try:
        with LOCK.open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None
    except FileNotFoundError:
        return None
    except BlockingIOError:
        pass
    if not (facts := _facts()):
        return None
    return f"process {facts['pid']} on {facts['host']} since {_minute(facts['started'])}"


def plan() -> Workflow | None:
    """Return what the run in progress has planned; None without one, or if it is another user's."""
    try:
        return Workflow.planned_by(_facts().get("run")) if running() else None
    except (AttributeError, ImportError, TypeError):  # planned by another version of Palio
        return None


def cancel_orphans() -> list[slurm.Job]:
    """Cancel the jobs of earlier controllers of this folder; only the holder of its lock may."""
    orphans = [job for job in slurm.jobs(Path.cwd()) if job.name.startswith(RUN_NAME)]
    for job in orphans:
        print(
            f"cancelling job {job.id} ({job.comment}, {job.state.lower()}) of an earlier run", file=sys.stderr
        )
    slurm.cancel(job.id for job in orphans)
    return orphans


# --- notifications ---------------------------------------------------------------------------------


def notify(competition: Competition, event: str, message: str) -> None:
    """Run the organizer's command with PALIO_EVENT and PALIO_MESSAGE set; its failure is only reported."""
    if competition.notify is None:
        return
    variables = {"PALIO_EVENT": event, "PALIO_MESSAGE": message, "PALIO_COMPETITION": competition.competition}
    try:
        subprocess.run(  # noqa: S602 (the organizer's own shell line)
            competition.notify, shell=True, env=os.environ | variables, timeout=NOTIFY_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        print(f"notify: {competition.notify}: {error}", file=sys.stderr)


class Watch:
    """Steps that failed, stalled, or whose job cannot start, since the last look; each is reported once."""

    def __init__(self, stalled_after: float) -> None:
        self.stalled_after = stalled_after
        self._reported: set[tuple[str, ...]] = set()

    def look(self, entries: list[EntryStatus], now: float) -> list[tuple[str, str]]:
        """Return the new (event, message) pairs; `now` in seconds since 1970."""
        news = []
        for entry in entries:
            for step in entry.steps:
                key = (entry.track, entry.entry, step.step, str(step.attempt), step.state, step.obstacle)
                heard = step.heard if step.state == "running" else None
                silent = now - heard if heard is not None else 0.0
                if key in self._reported:
                    continue
                if step.state == "failed":
                    text = f"{step.reason} (log: {step.log})"
                    news.append(("failure", f"{entry.entry}: {step.step}: {text}"))
                elif step.obstacle:
                    news.append(("stall", f"{entry.entry}: {step.step}: {step.obstacle}"))
                elif silent > self.stalled_after:
                    text = f"no output for {silent / 60:.0f} min on {step.node} (log: {step.log})"
                    news.append(("stall", f"{entry.entry}: {step.step}: {text}"))
                else:
                    continue
                self._reported.add(key)
        return news


class Releases:
    """Jobs that a node could not start. SLURM 22.05 requeues such a job and holds it for good, though another
    node could have it, or the same one once it is mended."""

    def __init__(self) -> None:
        self._times: Counter[str] = Counter()
        self._next: dict[str, float] = {}

    def look(self, jobs: Iterable[slurm.Job], now: float) -> None:
        """Release those that are due for it at `now`, in seconds since 1970. A job that is held more than
        `RELEASES` times is the organizer's. Raises `PalioError` if SLURM refuses."""
        for job in jobs:
            if (
                job.launch_failed
                and job.name.startswith(RUN_NAME)
                and self._times[job.id] < RELEASES
                and now >= self._next.get(job.id, now)
            ):
                self._next[job.id] = now + RELEASE_SECONDS * 2 ** self._times[job.id]
                self._times[job.id] += 1
                slurm.release(job.id)
                print(f"released job {job.id} ({job.comment}): a node could not start it", file=sys.stderr)


def watch(workflow: Workflow, *, on_slurm: bool) -> None:
    """Watch a running workflow in a thread: release jobs that SLURM holds because a node could not start
    them, and tell the organizer, if `notify` is set, what has failed or stalled. Ends with the process."""
    competition = workflow.competition
    told = competition.notify is not None
    if not (told or on_slurm):
        return
    watching, releases = Watch(competition.stalled_after), Releases()
    if told:
        watching.look(competition_status(workflow).entries, time.time())  # earlier failures are not news

    def loop() -> None:
        while True:
            time.sleep(WATCH_SECONDS)
            if on_slurm:
                with suppress(PalioError):  # SLURM does not answer, or refuses: the stall is told
                    releases.look(slurm.jobs(Path.cwd()), time.time())
            if not told:
                continue
            try:
                news = watching.look(competition_status(workflow).entries, time.time())
            except (PalioError, OSError) as error:
                news = [("stall", f"the state of the competition cannot be read: {error}")]
            for event, message in news:
                notify(competition, event, message)

    threading.Thread(target=loop, daemon=True, name="palio-watch").start()
