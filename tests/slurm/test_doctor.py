"""`palio doctor --slurm` on a real cluster: a good site, and the line to fix for each thing that is wrong."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.slurm import competition
from tests.slurm.cluster import Cluster
from tests.support.folder import WorkingFolder


@pytest.fixture
def folder(tmp_path: Path, tiny: Path) -> WorkingFolder:
    made = competition.create(tmp_path / "competition", tiny)
    competition.add_entry(made, "plain", "a100", tiny)
    return made


def test_a_site_that_fits_is_told_so_down_to_the_nodes(folder: WorkingFolder, cluster: Cluster) -> None:
    done = folder.run("palio", "doctor", "--slurm", environment=cluster.environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FIX" not in done.stdout
    for partition in ("cpu", "a100", "rtx4090"):
        assert f"ok   a node of {partition} sees the working folder" in done.stdout
        assert f"ok   a node of {partition} runs Palio" in done.stdout


def wrong_partition(folder: WorkingFolder) -> None:
    folder.edit_yaml(
        "profiles/slurm/config.yaml",
        lambda profile: profile["set-resources"]["finetune"].update(slurm_partition="gppu"),
    )


def wrong_gpu(folder: WorkingFolder) -> None:
    folder.edit_yaml("config/config.yaml", lambda config: config["tracks"]["a100"].update(gpu_model="h100"))


def too_long(folder: WorkingFolder) -> None:
    folder.edit_yaml(
        "config/config.yaml", lambda config: config["tracks"]["a100"].update(training_budget="3d")
    )


def too_large(folder: WorkingFolder) -> None:
    folder.edit_yaml("config/config.yaml", lambda config: config["tracks"]["a100"].update(ram_gb=4096))


def no_accounting(folder: WorkingFolder) -> None:
    folder.edit_yaml(
        "profiles/slurm/config.yaml", lambda profile: profile.update({"slurm-status-command": "sacct"})
    )


def not_shared(folder: WorkingFolder) -> None:
    folder.edit_yaml(
        "config/config.yaml", lambda config: config.update(closed_store="/proc/nobody-can-write")
    )


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (wrong_partition, "set-resources.finetune.slurm_partition: no such partition; use one of a100, cpu"),
        (wrong_gpu, "it has a100; correct tracks.a100.gpu_model"),
        (too_long, "its limit is 2880 min"),
        (too_large, "no node has them; lower tracks.a100.ram_gb"),
        (no_accounting, "slurm-status-command: squeue"),
        (not_shared, "closed_store: give a folder on the shared file system"),
    ],
)
def test_what_does_not_fit_is_named_with_its_line(
    folder: WorkingFolder, cluster: Cluster, spoil: Callable[[WorkingFolder], Any], line: str
) -> None:
    spoil(folder)
    done = folder.run("palio", "doctor", "--slurm", environment=cluster.environment)
    assert done.returncode == 1, done.stdout + done.stderr
    (found, *_) = [one for one in done.stdout.splitlines() if one.startswith("FIX")]
    assert line in found


def test_a_machine_without_slurm_is_told_where_to_go(folder: WorkingFolder, tmp_path: Path) -> None:
    done = folder.run("palio", "doctor", "--slurm", environment=os.environ | {"PATH": str(tmp_path)})
    assert done.returncode == 1
    assert "run on a login node" in done.stdout
