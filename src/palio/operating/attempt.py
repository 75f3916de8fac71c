"""One attempt at one step of an entry: the traces it leaves, and whether another may follow.

    results/<track>/<entry>/work/attempts.jsonl            a line at the start and at the end of every attempt
    results/<track>/<entry>/work/logs/<step>.<n>.log       each attempt's log: Snakemake deletes the last one
    results/<track>/<entry>/work/failures/<step>.json      why the step has no result

A profile may let Snakemake try again. Only faults of the machine deserve that: an attempt whose predecessor
in the same run of the workflow failed through the entry's own fault ends at once with the same reason, and
no GPU hour is spent. A predecessor that died without reporting an error (a lost node, the kernel's OOM
killer) is judged by SLURM's state of its job.
"""

from __future__ import annotations

import errno
import os
import platform
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from palio.errors import Interrupted, NotRetried, PalioError, State
from palio.files import append_json_line, read_json_lines
from palio.layout import EntryFolder
from palio.operating import slurm
from palio.records import StepFailure

RUN_VARIABLE = "PALIO_RUN"
"""One run of Snakemake; the controller sets it, its jobs inherit it."""
SIGTERM_EXIT_CODE = 128 + signal.SIGTERM
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EROFS)
NEAR_LIMIT_SECONDS = 240.0
"""A SIGTERM with less time left than this means the time limit: SLURM warns up to a minute early, and the
profile asks for the warning two minutes before the end."""
NODE_STATES = ("NODE_FAIL", "BOOT_FAIL", "PREEMPTED")
KILLS_ALLOWED = 2
"""Unexplained deaths in one run, before they count as the entry's own fault."""


@dataclass(frozen=True)
class Attempt:
    """One attempt, from its two lines."""

    step: str
    number: int
    """Counts the step's attempts, from 1."""
    started: float
    """Seconds since 1970, as `ended`."""
    node: str
    pid: int
    run: str
    job: str | None
    gpu: str | None
    """CUDA_VISIBLE_DEVICES: the GPU that SLURM gave the job."""
    ended: float | None = None
    state: State | None = None
    """None: it is running, or died without reporting an error."""
    reason: str = ""


def read_attempts(folder: EntryFolder) -> list[Attempt]:
    """Return all attempts of an entry in the order they began; a line torn by a crash is skipped."""
    attempts: list[Attempt] = []
    for values in read_json_lines(folder.attempts):
        if values.pop("event") == "start":
            attempts.append(Attempt(**values))
            continue
        for index, one in enumerate(attempts):
            if (one.step, one.number) == (values["step"], values["number"]):
                ended = {**vars(one), **values, "state": State(values["state"])}
                attempts[index] = Attempt(**ended)
    return attempts


def refusal(earlier: list[Attempt], run: str, job: str | None, job_state: str) -> tuple[State, str] | None:
    """Return why the next attempt in `run` must not start, or None.

    `earlier` are the step's attempts so far, `job` is ours, `job_state` SLURM's state of the last one's.
    """
    mine = [attempt for attempt in earlier if attempt.run == run]
    if not run or not mine:
        return None
    last = mine[-1]
    if last.state is not None:
        own_fault = last.state not in (State.FINISHED, State.INTERRUPTED)
        return (last.state, last.reason) if own_fault else None
    if job is not None and last.job == job:
        return None  # SLURM itself started the job again: its node was lost
    ended_by_slurm = {
        "OUT_OF_MEMORY": (State.OUT_OF_MEMORY, f"job {last.job} used more memory than the track's ram_gb"),
        "TIMEOUT": (State.TIME_LIMIT, f"the time limit of job {last.job} ran out"),
    }
    killed = sum(attempt.state is None for attempt in mine)
    if job_state in NODE_STATES or (killed < KILLS_ALLOWED and job_state not in ended_by_slurm):
        return None
    times = {1: "once", 2: "twice"}.get(killed, f"{killed} times")
    unknown = f"killed {times}, no error reported: out of memory, or a faulty node"
    return ended_by_slurm.get(job_state, (State.CRASHED, unknown))


def is_refused(step: str, folder: EntryFolder, run: str) -> bool:
    """Return whether the next attempt in `run` must not start. What a killed one died of goes on record: no
    attempt follows that would write it.

    Raises OSError where the entry's folder cannot be read or written.
    """
    record = _Record(step, folder, "", run)
    found = refusal(record.earlier, run, None, "")
    if found is not None and not record.failure.exists():
        last = record.earlier[-1]
        told = slurm.state(last.job) if last.job else ""
        record.fail(*(refusal(record.earlier, run, None, told) or found))
    return found is not None


def set_aside(work: Path, grant: int) -> None:
    """Move a step's work out of the way, once for each fresh start that the organizer has granted."""
    kept = work.with_name(f"{work.name}.before-{grant}")
    if kept.exists():
        return  # this grant's fresh start was made earlier, and interrupted
    if work.exists():
        work.rename(kept)
    else:
        kept.mkdir(parents=True)


@contextmanager
def attempt(step: str, folder: EntryFolder, part: str = "") -> Iterator[None]:
    """Run a step's body as one attempt, and record how it ends for the standings.

    A `part` of a step that several jobs share has attempts of its own; its failure is the step's.

    Raises:
        NotRetried: the step already failed in this run of the workflow through the entry's own fault.
    """
    record = _Record(step, folder, part, os.environ.get(RUN_VARIABLE, ""))
    record.refuse_what_failed()
    record.begin()

    def stop(signum: int, frame: object) -> NoReturn:
        sys.exit(SIGTERM_EXIT_CODE)

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except Interrupted as error:
        record.end(*_interruption(str(error)))
        raise
    except PalioError as error:
        record.end(error.state, str(error), error.log)
        raise
    except KeyboardInterrupt:
        record.end(State.INTERRUPTED, "interrupted")
        raise
    except SystemExit as error:
        if error.code != SIGTERM_EXIT_CODE:
            raise
        record.end(*_interruption("stopped by SIGTERM"))
        raise Interrupted("stopped by SIGTERM; start again to continue") from None
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            record.end(State.CRASHED, _bug(error))
            raise
        reason = f"the disk failed ({error}); make room and start again"
        record.end(State.INTERRUPTED, reason)
        raise Interrupted(reason) from error
    except Exception as error:
        record.end(State.CRASHED, _bug(error))
        raise
    else:
        record.end(State.FINISHED)


def _bug(error: Exception) -> str:
    return f"{type(error).__name__}: a bug in Palio; its traceback is in the log"


def _interruption(reason: str) -> tuple[State, str]:
    """Tell the time limit, which is the entry's own, from any other interruption."""
    job = slurm.own_job()
    if job is None:
        return State.INTERRUPTED, reason
    left = slurm.seconds_left(job)
    if left is not None and left < NEAR_LIMIT_SECONDS:
        return State.TIME_LIMIT, "the job's time limit ran out"
    return State.INTERRUPTED, f"{reason} (SLURM job {job})"


class _Record:
    """The files that record an attempt."""

    def __init__(self, step: str, folder: EntryFolder, part: str, run: str) -> None:
        self.step, self.folder, self.failure = step, folder, folder.failure(step)
        self.name = f"{step}.{part}" if part else step
        self.log = folder.log(self.name)
        if part and not self.log.exists():  # a shard's has the phase in its name
            logs = sorted(self.log.parent.glob(f"{step}.*.{part}.log"), key=lambda path: path.stat().st_mtime)
            self.log = logs[-1] if logs else self.log
        everything = read_attempts(folder)
        self.earlier = [one for one in everything if one.step == self.name]
        self.number = len(self.earlier) + 1
        self.run, self.job = run, slurm.own_job()
        # Another part may have failed in this run; the whole step starts only once all are done.
        others = (one for one in everything if one.step.startswith(f"{step}."))
        self.keeps_failure = bool(part and self.run) and any(one.run == self.run for one in others)

    def refuse_what_failed(self) -> None:
        last = self.earlier[-1] if self.earlier else None
        died = last is not None and last.state is None and last.job is not None and self.run
        state_of_job = slurm.state(last.job) if last and last.job and died else ""
        if found := refusal(self.earlier, self.run, self.job, state_of_job):
            state, reason = found
            if not self.failure.exists():
                self.fail(state, reason)
            raise NotRetried(f"not tried again in this run of the workflow: {reason}")

    def begin(self) -> None:
        if not self.keeps_failure:
            self.failure.unlink(missing_ok=True)
        self._keep_log()
        self._append(
            event="start",
            started=round(time.time(), 3),
            node=os.environ.get("SLURMD_NODENAME") or platform.node(),
            pid=os.getpid(),
            run=self.run,
            job=self.job,
            gpu=os.environ.get("CUDA_VISIBLE_DEVICES"),
        )

    def end(self, state: State, reason: str = "", log: Path | None = None) -> None:
        with suppress(OSError):  # a full disk may have ended the step
            if state is not State.FINISHED:
                self.fail(state, reason, log)
            self._append(event="end", ended=round(time.time(), 3), state=state, reason=reason)

    def fail(self, state: State, reason: str, log: Path | None = None) -> None:
        StepFailure(step=self.step, state=state, reason=reason, log=str(log or self.log)).write(self.failure)

    def _append(self, **line: Any) -> None:
        append_json_line(self.folder.attempts, {"step": self.name, "number": self.number, **line})

    def _keep_log(self) -> None:
        """Hard-link the log that the rule has just opened: Snakemake deletes the first name."""
        if self.log.exists():
            kept = self.folder.attempt_log(self.name, self.number)
            kept.parent.mkdir(parents=True, exist_ok=True)
            with suppress(OSError):  # a file system without hard links keeps only the last log
                os.link(self.log, kept)
