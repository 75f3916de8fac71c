"""SLURM's own commands, their output as plain values. Nothing here is called on a machine without SLURM."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from palio.errors import PalioError
from palio.layout import EntryFolder

ACTIVE = ("PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "COMPLETING", "REQUEUED", "STOPPED")
NO_JOBS = ("down", "drain", "fail", "maint", "inval", "unknown")
"""How states of nodes begin that start no job."""
COMMAND_SECONDS = 30.0
"""A restarting slurmctld answers late."""
LAUNCH_FAILED = "launch failed requeued held"
"""SLURM's reason of a job that a node could not start: it stays held when the node is mended, too."""


@dataclass(frozen=True)
class Job:
    """One line of squeue."""

    id: str
    name: str
    """Snakemake's run id: the same for all jobs of one controller."""
    state: str
    folder: Path
    reason: str
    """Why it is waiting, or the node it runs on."""
    comment: str
    """The rule and its wildcards, as the executor writes them."""
    partition: str = ""

    @property
    def launch_failed(self) -> bool:
        return self.state == "PENDING" and self.reason.replace("_", " ") == LAUNCH_FAILED

    def obstacle(self, closed: Collection[str]) -> str:
        """Return why a pending job will not start by itself, and what to do; `closed` are partitions that
        start nothing."""
        if self.state != "PENDING":
            return ""
        if "held" in self.reason.lower():
            return f"job {self.id} is held ({self.reason}): scontrol release {self.id}"
        if set(self.partition.split(",")) <= set(closed):
            return f"job {self.id}: no node of partition {self.partition} takes jobs: sinfo -R says why"
        return ""


def available() -> bool:
    return shutil.which("squeue") is not None


def ask(*command: str, seconds: float = COMMAND_SECONDS) -> str:
    """Return a SLURM command's output. Raises `PalioError` with its error message if it fails."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=seconds,
            stdin=subprocess.DEVNULL,
        )
    except FileNotFoundError:
        raise PalioError(f"{command[0]} is not installed here; run on a login node of the cluster") from None
    except subprocess.TimeoutExpired:
        raise PalioError(
            f"{command[0]} did not respond within {seconds:g} s; is slurmctld running?"
        ) from None
    if done.returncode != 0:
        error = " ".join((done.stderr or done.stdout).split())
        raise PalioError(f"{' '.join(command[:2])}: {error}")
    return done.stdout


def jobs(folder: Path) -> list[Job]:
    """Return this user's queued and running jobs that were submitted in `folder`."""
    fields = "%i|%j|%T|%R|%k|%P|%Z"
    found = ask("squeue", "--noheader", "--me", f"--states={','.join(ACTIVE)}", f"--format={fields}")
    here = folder.resolve()
    listed = []
    for line in found.splitlines():
        identity, name, state, reason, comment, partition, at = line.split("|", 6)
        if Path(at).resolve() == here:
            listed.append(Job(identity, name, state, Path(at), reason.strip("()"), comment, partition))
    return listed


def closed_partitions() -> set[str]:
    """Return the partitions that start no job: themselves not up, or each of their nodes drained or down."""
    open_ones: dict[str, bool] = {}
    for line in ask("sinfo", "--noheader", "--format=%R|%a|%T").splitlines():
        name, available, node = line.strip().split("|")
        takes = available == "up" and not node.startswith(NO_JOBS)
        open_ones[name] = open_ones.get(name, False) or takes
    return {name for name, takes in open_ones.items() if not takes}


def wildcards(folder: EntryFolder) -> str:
    """Return how the executor writes an entry's wildcards: in the order of the rule's output, joined by _."""
    return f"{folder.track_id}_{folder.name.replace('/', '_')}"


def cancel(ids: Iterable[str], seconds: float = 180) -> None:
    """Cancel jobs and wait until their processes are gone."""
    left = list(ids)
    if not left:
        return
    ask("scancel", *left)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        active = ask("squeue", "--noheader", "--me", f"--states={','.join(ACTIVE)}", "--format=%i").split()
        left = [job for job in left if job in active]
        if not left:
            return
        time.sleep(1)
    raise PalioError(f"jobs {', '.join(left)} do not end; see scontrol show job {left[0]}")


def release(job: str) -> None:
    """Let a held job wait for a node again. Raises `PalioError` if SLURM refuses."""
    ask("scontrol", "release", job)


def state(job: str) -> str:
    """Return SLURM's state of a job, such as NODE_FAIL, even after its end; empty if it is forgotten."""
    try:
        if known := ask("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T").split():
            return known[0]
    except PalioError:
        pass  # squeue forgets a job after MinJobAge; sacct, given accounting, does not
    try:
        found = ask("sacct", "-X", "--noheader", "--parsable2", f"--jobs={job}", "--format=State").split()
    except PalioError:
        return ""
    return found[0] if found else ""


def seconds_left(job: str) -> float | None:
    """Return the seconds until the job's time limit; None if it has none or SLURM does not say."""
    try:
        left = ask("squeue", "--noheader", f"--jobs={job}", "--format=%L").strip()
    except PalioError:
        return None
    days, _, clock = left.rpartition("-")
    parts = clock.split(":")
    if not all(part.isdigit() for part in parts):
        return None
    seconds = 0
    for part in parts:
        seconds = 60 * seconds + int(part)
    return float(seconds + 86400 * int(days or 0))


def own_job() -> str | None:
    """Return the job that this process runs in."""
    return os.environ.get("SLURM_JOB_ID")
