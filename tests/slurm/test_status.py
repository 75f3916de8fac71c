"""Jobs that will not start by themselves: `palio status` tells of them, and some the controller releases."""

from __future__ import annotations

from pathlib import Path

import pytest

from palio.operating import slurm
from palio.operating.controller import Releases
from tests.slurm import competition
from tests.slurm.cluster import Cluster
from tests.slurm.competition import TRACKS


def test_a_held_job_and_a_drained_partition_are_told_with_what_to_do(
    cluster: Cluster, tiny: Path, tmp_path: Path
) -> None:
    folder = competition.create(tmp_path / "competition", tiny)
    for track in TRACKS:
        competition.add_entry(folder, f"on_{track}", track, tiny)

    def submit(track: str, *options: str) -> str:
        comment = f"--comment=rule_helm_open_wildcards_{track}_on_{track}"
        where = (f"--chdir={folder.path}", f"--partition={track}", "--output=/dev/null", comment)
        return cluster.run("sbatch", "--parsable", *where, *options, "--wrap=true", check=True).stdout.strip()

    nodes = "NodeName=r1,r2"
    cluster.run("scontrol", "update", nodes, "State=DRAIN", "Reason=a broken fan", check=True)
    try:
        held, waits = submit("a100", "--hold"), submit("rtx4090")
        cluster.wait(lambda: len(cluster.jobs("%i %R")) >= 2, "both jobs to be queued")
        status = folder.run("palio", "status", environment=cluster.environment | {"COLUMNS": "240"}).stdout
        cluster.run("scancel", held, waits)
    finally:
        cluster.run("scontrol", "update", nodes, "State=RESUME", check=True)
    assert f"on_a100 open: job {held} is held (JobHeldUser): scontrol release {held}" in status
    drained = f"job {waits}: no node of partition rtx4090 takes jobs: sinfo -R says why"
    assert f"on_rtx4090 open: {drained}" in status


def test_a_job_that_a_node_could_not_start_is_released_and_one_that_a_user_holds_is_not(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)

    def submit(*options: str) -> str:
        where = (f"--chdir={tmp_path}", "--partition=rtx4090", "--output=/dev/null", "--job-name=palio_run")
        return cluster.run("sbatch", "--parsable", *where, *options, "--wrap=true", check=True).stdout.strip()

    def seen(job: str) -> str:
        return next((one.reason for one in slurm.jobs(tmp_path) if one.id == job), "")

    by_user = submit("--hold")
    with cluster.unable_to_start_jobs("r1"):
        job = submit("--nodelist=r1", "--requeue")
        cluster.wait(lambda: seen(job) == slurm.LAUNCH_FAILED, "the launch to fail")
    Releases().look(slurm.jobs(tmp_path), now=0)
    cluster.wait(lambda: not seen(job), "the job to run")
    assert cluster.run("scontrol", "show", "job", job).stdout.count("JobState=COMPLETED") == 1
    assert seen(by_user) == "JobHeldUser"
    cluster.run("scancel", by_user)
