"""The controller: the one Snakemake that runs in a folder, from its start to its end.

Its lock is a flock on `.snakemake/palio.lock`, which the kernel releases when the process ends, however it
ends. So a killed controller needs no unlocking: the next one first cancels the SLURM jobs that it left queued
or running, which would otherwise write beside the same steps submitted again. Their work is in the entries'
work/ folders, and is resumed.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import IO

from palio.config import Competition
from palio.errors import PalioError
from palio.guard import CONTROLLER_VARIABLE
from palio.layout import LOCK, Results
from palio.operating import slurm
from palio.operating.attempt import RUN_VARIABLE
from palio.operating.status import EntryStatus, competition_status

RUN_NAME = "palio_"
"""How names of our SLURM jobs begin: the profile's slurm-jobname-prefix."""
WATCH_SECONDS = 60.0
NOTIFY_SECONDS = 60.0

_lock: IO[str] | None = None
"""Held until the process ends."""


def take_over(*, on_slurm: bool) -> str:
    """Become the folder's controller; return the id of its run. Raises `PalioError` if another one is alive."""
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
    lock.truncate(0)
    json.dump({"host": platform.node(), "pid": os.getpid(), "started": time.time(), "run": run}, lock)
    lock.flush()
    _lock = lock
    os.environ[RUN_VARIABLE] = run
    if on_slurm:
        cancel_orphans()
    else:
        os.environ[CONTROLLER_VARIABLE] = str(os.getpid())
    return run


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
    try:
        facts = json.loads(LOCK.read_text())
    except json.JSONDecodeError:
        return None
    since = time.strftime("%Y-%m-%d %H:%M", time.localtime(facts["started"]))
    return f"process {facts['pid']} on {facts['host']} since {since}"


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
    """Steps that failed or stalled since the last look; each is reported once."""

    def __init__(self, stalled_after: float) -> None:
        self.stalled_after = stalled_after
        self._reported: set[tuple[str, ...]] = set()

    def look(self, entries: list[EntryStatus], now: float) -> list[tuple[str, str]]:
        """Return the new (event, message) pairs; `now` in seconds since 1970."""
        news = []
        for entry in entries:
            for step in entry.steps:
                key = (entry.track, entry.entry, step.step, str(step.attempt), step.state)
                heard = step.heard if step.state == "running" else None
                silent = now - heard if heard is not None else 0.0
                if key in self._reported:
                    continue
                if step.state == "failed":
                    text = f"{step.reason} (log: {step.log})"
                    news.append(("failure", f"{entry.entry}: {step.step}: {text}"))
                elif silent > self.stalled_after:
                    text = f"no output for {silent / 60:.0f} min on {step.node} (log: {step.log})"
                    news.append(("stall", f"{entry.entry}: {step.step}: {text}"))
                else:
                    continue
                self._reported.add(key)
        return news


def watch(competition: Competition) -> None:
    """Watch a running workflow in a thread, if the organizer has set `notify`. Ends with the process."""
    if competition.notify is None:
        return
    watching, results = Watch(competition.stalled_after), Results(store=competition.store)
    watching.look(
        competition_status(competition, results).entries, time.time()
    )  # earlier failures are not news

    def loop() -> None:
        while True:
            time.sleep(WATCH_SECONDS)
            try:
                news = watching.look(competition_status(competition, results).entries, time.time())
            except (PalioError, OSError) as error:
                news = [("stall", f"the state of the competition cannot be read: {error}")]
            for event, message in news:
                notify(competition, event, message)

    threading.Thread(target=loop, daemon=True, name="palio-watch").start()
