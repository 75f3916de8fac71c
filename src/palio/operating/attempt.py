"""One try at one step of an entry: what it leaves behind, and whether another may follow.

    results/<track>/<entry>/work/attempts.jsonl            a line at the start and at the end of every attempt
    results/<track>/<entry>/work/logs/<step>.<n>.log       each attempt's log: Snakemake deletes the last one
    results/<track>/<entry>/work/failures/<step>.json      why the step has no result

A profile may let Snakemake try again. Only what the machine did to an entry deserves that: an attempt
whose predecessor in the same run of the workflow failed by its own fault ends at once with the same
reason, and no GPU hour is spent. A predecessor that died without a word (a lost node, a kernel's kill) is
judged by what SLURM says of its job.
"""

from __future__ import annotations

import errno
import json
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
from palio.operating import slurm
from palio.records import StepFailure

RUN_VARIABLE = "PALIO_RUN"
"""One run of Snakemake; the controller sets it, its jobs inherit it."""
SIGTERM_EXIT_CODE = 128 + signal.SIGTERM
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EROFS)
NEAR_LIMIT_SECONDS = 240.0
"""A SIGTERM with less left than this is the time limit's: SLURM warns up to a minute early, the profile
asks for the warning two minutes before the end."""
KILLS_ALLOWED = 2
"""Deaths without a word in one run, before they count as the entry's own."""


@dataclass(frozen=True)
class Attempt:
    """One attempt, as its two lines tell it."""

    step: str
    number: int
    """Counted for the step, from 1."""
    started: float
    """Seconds since 1970, as `ended`."""
    node: str
    pid: int
    run: str
    job: str | None
    gpu: str | None
    """CUDA_VISIBLE_DEVICES: the GPU that SLURM gave to the job."""
    ended: float | None = None
    state: State | None = None
    """None: it runs, or died without a word."""
    reason: str = ""


def read_attempts(entry_dir: Path) -> list[Attempt]:
    """All attempts of an entry in the order they began; a line that a crash tore is left out."""
    path = entry_dir / "work" / "attempts.jsonl"
    attempts: list[Attempt] = []
    if not path.exists():
        return attempts
    for line in path.read_text(encoding="utf-8").splitlines():
        with suppress(json.JSONDecodeError):
            values = json.loads(line)
            if values.pop("event") == "start":
                attempts.append(Attempt(**values))
                continue
            for index, one in enumerate(attempts):
                if (one.step, one.number) == (values["step"], values["number"]):
                    ended = {**vars(one), **values, "state": State(values["state"])}
                    attempts[index] = Attempt(**ended)
    return attempts


def refusal(earlier: list[Attempt], run: str, job: str | None, job_state: str) -> tuple[State, str] | None:
    """Why the next attempt in `run` may not start, or None.

    `earlier` are the step's attempts so far, `job` is ours, `job_state` what SLURM says of the last one's.
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
    if job_state == "OUT_OF_MEMORY":
        return State.OUT_OF_MEMORY, f"SLURM ended job {last.job}: more memory than the track's ram_gb"
    if job_state in ("TIMEOUT", "DEADLINE"):
        return State.TIME_LIMIT, f"SLURM ended job {last.job} at its time limit"
    if job_state in ("NODE_FAIL", "BOOT_FAIL", "PREEMPTED"):
        return None
    killed = sum(attempt.state is None for attempt in mine)
    if killed >= KILLS_ALLOWED:
        return State.CRASHED, f"killed {killed} times without a word: out of memory, or a node in trouble"
    return None


def set_aside(work: Path, grant: int) -> None:
    """Move a step's work out of the way, once for each fresh start that the organizer granted."""
    kept = work.with_name(f"{work.name}.before-{grant}")
    if kept.exists():
        return  # this grant's fresh start has been made, and was interrupted
    if work.exists():
        work.rename(kept)
    else:
        kept.mkdir(parents=True)


@contextmanager
def attempt(step: str, entry_dir: Path) -> Iterator[None]:
    """Run a step's body as one attempt. Whatever ends it is on record for the standings.

    Raises NotRetried without running it, if it failed in this run of the workflow by its own fault.
    """
    earlier = [one for one in read_attempts(entry_dir) if one.step == step]
    number = len(earlier) + 1
    failure = entry_dir / "work" / "failures" / f"{step}.json"
    run, job = os.environ.get(RUN_VARIABLE, ""), slurm.own_job()

    def record(state: State, reason: str) -> None:
        StepFailure(step=step, state=state, reason=reason, log=_log(entry_dir, step)).write(failure)

    last_job = earlier[-1].job if earlier and earlier[-1].state is None else None
    if found := refusal(earlier, run, job, slurm.state(last_job) if run and last_job else ""):
        state, reason = found
        if not failure.exists():
            record(state, reason)
        raise NotRetried(f"not tried again in this run of the workflow: {reason}")

    failure.unlink(missing_ok=True)
    _keep_log(entry_dir, step, number)
    at = {"step": step, "number": number}
    _append(
        entry_dir,
        event="start",
        **at,
        started=round(time.time(), 3),
        node=os.environ.get("SLURMD_NODENAME") or platform.node(),
        pid=os.getpid(),
        run=run,
        job=job,
        gpu=os.environ.get("CUDA_VISIBLE_DEVICES"),
    )

    def end(state: State, reason: str = "") -> None:
        with suppress(OSError):  # what ended the step may be a full disk
            if state is not State.FINISHED:
                record(state, reason)
            _append(entry_dir, event="end", **at, ended=round(time.time(), 3), state=state, reason=reason)

    def stop(signum: int, frame: object) -> NoReturn:
        sys.exit(SIGTERM_EXIT_CODE)

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except Interrupted as error:
        end(*_interruption(job, str(error)))
        raise
    except PalioError as error:
        end(error.state, str(error))
        raise
    except KeyboardInterrupt:
        end(State.INTERRUPTED, "interrupted")
        raise
    except SystemExit as error:
        if error.code != SIGTERM_EXIT_CODE:
            raise
        end(*_interruption(job, "stopped by SIGTERM"))
        raise Interrupted("stopped by SIGTERM; start again to go on") from None
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            end(State.CRASHED, _bug(error))
            raise
        reason = f"the disk failed ({error}); make room and start again"
        end(State.INTERRUPTED, reason)
        raise Interrupted(reason) from error
    except Exception as error:
        end(State.CRASHED, _bug(error))
        raise
    else:
        end(State.FINISHED)


def _bug(error: Exception) -> str:
    return f"{type(error).__name__}: a bug in Palio; its traceback is in the log"


def _interruption(job: str | None, reason: str) -> tuple[State, str]:
    """A stop from outside: by the time limit, which is the entry's, or by somebody or something else."""
    if job is None:
        return State.INTERRUPTED, reason
    left, state = slurm.seconds_left(job), slurm.state(job)
    if state in ("TIMEOUT", "DEADLINE") or (
        left is not None and left < NEAR_LIMIT_SECONDS and state != "CANCELLED"
    ):
        return State.TIME_LIMIT, "the job's time limit ran out"
    return State.INTERRUPTED, f"{reason}, in SLURM job {job}"


def _append(entry_dir: Path, **line: Any) -> None:
    path = entry_dir / "work" / "attempts.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, (json.dumps(line) + "\n").encode())
        os.fsync(handle)
    finally:
        os.close(handle)


def _log(entry_dir: Path, step: str) -> str:
    return str(entry_dir / "logs" / f"{step}.log")


def _keep_log(entry_dir: Path, step: str, number: int) -> None:
    """A second name for the log that the rule has just opened: it stays when Snakemake deletes the first."""
    log, kept = Path(_log(entry_dir, step)), entry_dir / "work" / "logs" / f"{step}.{number}.log"
    if log.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with suppress(OSError):  # a file system without hard links: the last log is the only one then
            os.link(log, kept)
