"""What a step costs on SLURM besides its own work, from the records of the runs in a folder.

    make slurm-demo                    ends with it
    python benchmarks/chain.py         on a cluster, in the working folder

While squeue still knows its jobs (MinJobAge). Mean seconds for each rule:

    queued      from sbatch until SLURM starts the job: no node free, SLURM's own rounds
    starting    until the step begins: two Snakemakes, one after the other, parse the rules; Palio's imports
    step        the step's own work
    ending      until the job has ended: the same two take note of the outputs
    unseen      until the controller asks SLURM again (slurm-init-seconds-before-status-checks and more)

SLURM and Snakemake tell whole seconds.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from statistics import mean

from palio.layout import EntryFolder
from palio.operating.attempt import Attempt, read_attempts
from palio.pipeline import BY_NAME, STEPS

PARTS = ("queued", "starting", "step", "ending", "unseen")


@dataclass(frozen=True)
class Job:
    """Seconds since 1970."""

    submitted: float
    started: float
    ended: float


def slurm_jobs() -> dict[str, Job]:
    """Every job that SLURM still knows, by id."""
    fields = "%i|%V|%S|%e"
    command = ("squeue", "--noheader", "--me", "--states=COMPLETED", f"--format={fields}")
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    except (FileNotFoundError, subprocess.CalledProcessError):
        sys.exit("squeue does not answer here; run it where SLURM is, in the folder of a run")
    found = {}
    for line in lines:
        job, *times = line.split("|")
        found[job] = Job(*(datetime.fromisoformat(time).timestamp() for time in times))
    return found


def seen(log: str) -> dict[str, float]:
    """When the controller took note of each SLURM job's end, from the log of one run."""
    slurm_job = dict(re.findall(r"Job (\d+) has been submitted with SLURM jobid (\d+)", log))
    ends = re.findall(r"\[(.+)\]\nFinished jobid: (\d+)", log)
    return {
        slurm_job[job]: datetime.strptime(time, "%a %b %d %H:%M:%S %Y").timestamp()
        for time, job in ends
        if job in slurm_job
    }


def parts(attempt: Attempt, job: Job, noticed: float) -> dict[str, float]:
    times = (job.submitted, job.started, attempt.started, attempt.ended or 0.0, job.ended, noticed)
    return {part: times[at + 1] - times[at] for at, part in enumerate(PARTS)}


def shared_gpus(attempts: list[Attempt]) -> list[tuple[str, str]]:
    """Node and CUDA_VISIBLE_DEVICES of each GPU that two steps had at the same time."""
    by_gpu: defaultdict[tuple[str, str], list[Attempt]] = defaultdict(list)
    for one in attempts:
        if one.gpu is not None:
            by_gpu[one.node, one.gpu].append(one)
    return [
        gpu
        for gpu, steps in by_gpu.items()
        for before, after in pairwise(sorted(steps, key=lambda one: one.started))
        if before.ended is None or before.ended > after.started
    ]


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    jobs = slurm_jobs()
    logs = sorted(Path(".snakemake/log").glob("*.log"), key=lambda path: path.stat().st_mtime)
    noticed = {job: time for log in logs for job, time in seen(log.read_text(encoding="utf-8")).items()}
    by_rule: defaultdict[str, list[dict[str, float]]] = defaultdict(list)
    attempts = [
        one for folder in Path("results").glob("*/*") for one in read_attempts(EntryFolder.at(folder))
    ]
    for one in attempts:
        if one.ended and one.job in jobs and one.job in noticed:
            by_rule[BY_NAME[one.step].rule].append(parts(one, jobs[one.job], noticed[one.job]))
    if not by_rule:
        print("SLURM knows no finished job of this folder any more: nothing to measure")
        return
    print(f"| rule | jobs | {' | '.join(PARTS)} | all but queue and step |")
    print("|---|---|---|---|---|---|---|---|")
    total = 0.0
    for rule in (step.rule for step in STEPS if step.rule in by_rule):
        means = {part: mean(one[part] for one in by_rule[rule]) for part in PARTS}
        overhead = means["starting"] + means["ending"] + means["unseen"]
        total += overhead
        cells = " | ".join(f"{means[part]:.0f}" for part in PARTS)
        print(f"| {rule} | {len(by_rule[rule])} | {cells} | {overhead:.0f} |")
    print(f"\n{total:.0f} s for the {len(by_rule)} steps of an entry, {total / len(by_rule):.0f} s a step")
    print("two at once on one GPU: " + (", ".join(map(":".join, shared_gpus(attempts))) or "never"))


if __name__ == "__main__":
    main()
