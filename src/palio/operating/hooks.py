"""What Snakemake 9.27 has no setting for, changed in the controller's own process.

- A job that failed by its entry's own fault, or whose entry was withdrawn, is not submitted again.
- An entry's folder that cannot be read or written (no quota, a stale handle) fails that entry's job.
Snakemake would end the whole run: it takes only its own exceptions for a job's.
- SLURM is asked for its jobs soon after one has ended, and no sooner than the profile says after the last
time. The executor waits ten seconds longer whenever nothing has ended, up to three minutes; so it still does
while nothing ends.
- A job of SLURM has one Snakemake, in its step, instead of two (`jobstep`); but where the profile asks for
job arrays, whose tasks the first of the two tells apart.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from snakemake.exceptions import WorkflowError
from snakemake.executors.local import Executor
from snakemake.jobs import Job
from snakemake.logging import logger
from snakemake_executor_plugin_slurm import Executor as SlurmExecutor  # type: ignore[import-untyped]
from snakemake_executor_plugin_slurm_jobstep import (  # type: ignore[import-untyped]
    get_cpu_setting,
    get_gpu_setting,
    get_node_setting,
)
from snakemake_interface_executor_plugins.executors.base import (  # type: ignore[import-untyped]
    SubmittedJobInfo,
)

from palio.config import load_overrides
from palio.layout import ENDED, entry_and_replicate
from palio.operating import jobstep
from palio.operating.attempt import is_refused
from palio.pipeline import BY_RULE
from palio.workflow import Workflow

ENDING_SECONDS = 4.0
"""From the end of a job's Snakemake until SLURM has completed it; who asks too early waits for ten more."""
GLANCE_SECONDS = 1.0
"""Between looks at the file that a job's Snakemake touches."""


def install(workflow: Workflow, run: str) -> None:
    """Change Snakemake's classes for the rest of this process."""
    of_rule, postprocess, run_job = Job.restart_times, Job.postprocess, Executor.run_job
    command, arguments = SlurmExecutor.format_job_exec, SlurmExecutor.additional_general_args

    def restart_times(job: Any) -> int:
        try:
            return 0 if is_final(job, workflow, run) else int(of_rule.fget(job))
        except OSError as fault:
            logger.error(f"{job} is not tried again, its records cannot be read or written: {fault}")
            return 0

    async def contained(job: Any, *args: Any, error: bool = False, **options: Any) -> None:
        try:
            await postprocess(job, *args, error=error, **options)
        except OSError as fault:
            if not error:
                raise WorkflowError(f"{job}: {fault}") from fault
            logger.error(f"{job} has failed, and its files cannot be tidied up: {fault}")

    def started(executor: Any, job: Any) -> None:
        try:
            run_job(executor, job)
        except OSError as fault:
            logger.error(f"{job} cannot start: {fault}")
            executor.report_job_error(SubmittedJobInfo(job=job))

    Job.restart_times = property(restart_times)
    Job.postprocess = contained
    Executor.run_job = started
    SlurmExecutor.sleep = until_a_job_ends
    SlurmExecutor.additional_general_args = lambda self: arguments(self) if self.array_jobs else ""
    SlurmExecutor.format_job_exec = lambda self, job: (
        command(self, job)
        if self.array_jobs
        else as_one_step(command(self, job), self.get_python_executable(), job)
    )


def as_one_step(command: str, python: str, job: Any) -> str:
    """Return a job's command, which starts a Snakemake with `python`, with this one in the job's step."""
    before, snakemake, arguments = command.partition(f"{python} -m snakemake ")
    if not snakemake:
        raise WorkflowError(f"{job}: its command starts no Snakemake of {python}: {command}")
    gpu = bool(job.resources.get("gpu"))
    options = (get_cpu_setting(job, gpu), get_gpu_setting(job), get_node_setting(job))
    step = (python, "-m", jobstep.__name__, *filter(None, options))
    return f"{before}{' '.join(step)} {snakemake}{arguments}"


def is_final(job: Any, workflow: Workflow, run: str) -> bool:
    """Whether another attempt at a failed job would end as this one has."""
    step = BY_RULE.get(job.rule.name)
    if step is None:
        return False
    entry_id, _ = entry_and_replicate(job.wildcards.entry)
    if entry_id in load_overrides(workflow.competition.competition).withdrawn:
        return True
    return is_refused(step.name, workflow.folder(job.wildcards), run)


async def until_a_job_ends(executor: Any) -> None:
    """Sleep until SLURM is to be asked: when it is due, or after the last mark of an end."""
    slept = now = time.monotonic()
    soonest = slept + (executor.workflow.executor_settings.init_seconds_before_status_checks or 0)
    # the executor leaves our 0 as it is where SLURM did not answer
    latest = due = max(soonest, slept + executor.next_seconds_between_status_checks)
    while now < due:
        before, executor.last_end = getattr(executor, "last_end", None), last_end()
        if executor.last_end != before:
            executor.next_seconds_between_status_checks = 0  # the executor adds ten if no job has ended yet
            due = min(latest, max(soonest, now + ENDING_SECONDS))
        await asyncio.sleep(min(GLANCE_SECONDS, due - now))
        now = time.monotonic()


def last_end() -> int | None:
    """Return when the last mark was made, in nanoseconds."""
    try:
        return ENDED.stat().st_mtime_ns
    except OSError:
        return None
