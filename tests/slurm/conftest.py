"""One cluster for all tests here, and a competition that ran on it."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.slurm import competition
from tests.slurm.cluster import Cluster, missing_programs
from tests.support.folder import WorkingFolder
from tests.support.training import tiny_base_model


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if missing := missing_programs():
        pytest.skip(f"{', '.join(missing)} not installed: apt-get install slurm-wlm munge")
    with Cluster(tmp_path_factory.mktemp("cluster")) as running:
        yield running


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, base_model: Path) -> Path:
    """A model folder of random weights that a second trains and serves."""
    made = tiny_base_model(tmp_path_factory.mktemp("base"), base_model)
    return Path(shutil.move(made / "model", made / "tiny"))


@dataclass(frozen=True)
class Finished:
    """A competition after `snakemake --profile slurm`."""

    folder: WorkingFolder
    exit_code: int
    jobs: dict[str, tuple[str, str, str]]
    """SLURM job -> state, partition, rule with wildcards."""
    statuses: list[str]
    """What `palio status` printed in between."""
    seconds: float


@pytest.fixture(scope="session")
def finished(cluster: Cluster, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Three entries on two tracks, every step a SLURM job."""
    folder = competition.create(tmp_path_factory.mktemp("finished") / "competition", tiny)
    competition.add_entry(folder, "tuned", "a100", tiny, max_steps=4)
    competition.add_entry(folder, "plain", "a100", tiny)
    competition.add_entry(folder, "other", "rtx4090", tiny, max_steps=4)
    statuses = []
    started = time.monotonic()
    with competition.controller(folder, cluster) as snakemake:
        while snakemake.poll() is None:
            assert time.monotonic() - started < 1800, competition.output(folder)
            with suppress(subprocess.TimeoutExpired):
                snakemake.wait(20)
            wide = cluster.environment | {"COLUMNS": "240"}
            statuses.append(folder.run("palio", "status", environment=wide).stdout)
    seconds = time.monotonic() - started
    lines = [line.split("|") for line in cluster.jobs("%i|%T|%P|%k")]
    jobs = {job: (state, partition, rule) for job, state, partition, rule in lines}
    return Finished(folder, snakemake.returncode, jobs, statuses, seconds)
