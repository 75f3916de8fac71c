"""Sidecars of steps: times, hosts, durations and energy, which are facts about a run and not content.

results/<track>/<entry>/<step>.run.json     RunFacts, or one of its subclasses (`palio.pipeline`)
work/train/<fingerprint>/training.json      TrainingFacts, part of finetune.run.json
work/helm/<stage>/<key>/used_seconds.json   UsedSeconds
work/helm/<stage>/<key>/asked.json          AskedQuestions

What is unknown, or was not reached because the step failed, is None.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from pydantic import ConfigDict

from palio.provenance import code_sha256
from palio.records.common import Record


class RunFacts(Record):
    """When, where, how long and with which code a step last ran. A step fills it in while it runs."""

    model_config = ConfigDict(frozen=False, validate_assignment=True)

    code_sha256: str | None = None
    """Digest of Palio's own code."""
    host: str | None = None
    """Name of the machine."""
    slurm_job_id: str | None = None
    """Job that ran the step."""
    visible_gpus: str | None = None
    """CUDA_VISIBLE_DEVICES."""
    started: str | None = None
    """UTC, ISO 8601."""
    seconds: float | None = None
    """Wall-clock time of the step."""


class CurateRun(RunFacts):
    """curate.run.json"""

    shards: int | None = None
    """Jobs that shared it; 0: one job did it all."""


class TrainingFacts(Record):
    """Who trained an adapter, and what it took, over all attempts."""

    training_seconds: float
    """Seconds of the budget used."""
    energy_joules: float | None
    """Energy drawn by the GPU; None where no attempt was metered."""
    memory_cap_gb: float | None
    """Cap on GPU memory; None without a GPU."""
    device: str
    """Name of the GPU, or cpu."""
    gpu_uuid: str | None = None
    """Identity of the GPU."""
    driver: str | None = None
    """Version of its driver."""
    cuda: str | None = None
    """Version of CUDA. None, like what follows, where a team's own program trained."""
    versions: dict[str, str] | None = None
    """Versions of the libraries that decide a result."""
    threads: int | None = None
    """CPU threads."""
    tokens: int | None = None
    """Tokens trained on."""
    peak_memory_bytes: int | None = None
    """Peak memory of the device."""


class FinetuneRun(RunFacts):
    """finetune.run.json"""

    restored: bool | None = None
    """Whether the adapter had been trained before and was only put back in place."""
    training: TrainingFacts | None = None
    """The training that made the adapter."""
    cost_usd: float | None = None
    """Price of the training; None for a track without a price per hour."""


class StageRun(RunFacts):
    """open.run.json and closed.run.json"""

    limit_seconds: float | None = None
    """Limit of the stage."""
    used_seconds: float | None = None
    """Seconds of the limit used, over all attempts."""
    requests: int | None = None
    """Requests of the whole stage."""
    answered: int | None = None
    """Instances with an answer to every request."""


class UsedSeconds(Record):
    """Seconds of a stage's limit that an entry has used, over all attempts."""

    seconds: float
    """Seconds used."""


class AskedQuestions(Record):
    """What one package is asked in one stage."""

    answering: str
    """Fingerprint of the package, of what serves it, and of how answers are taken."""
    questions: dict[str, int]
    """Questions by run entry, of which the number is left out."""
    data: dict[str, str]
    """sha256 of the data files that they are made from."""


AnyRun = TypeVar("AnyRun", bound=RunFacts)


@contextmanager
def timed_run(path: Path, run: AnyRun) -> Iterator[AnyRun]:
    """Time the block and write `run`, to which the block adds what it measures, even if the block fails."""
    started, clock = time.time(), time.monotonic()
    run.code_sha256 = code_sha256()
    run.host = platform.node()
    run.slurm_job_id = os.environ.get("SLURM_JOB_ID")
    run.visible_gpus = os.environ.get("CUDA_VISIBLE_DEVICES")
    run.started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started))
    try:
        yield run
    finally:
        run.seconds = round(time.monotonic() - clock, 3)
        run.write(path)
