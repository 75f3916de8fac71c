"""The variants of the SLURM profile, each with a GPU job on the cluster."""

from __future__ import annotations

import shutil
from contextlib import ExitStack

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.competition import controller, output
from tests.support.folder import ROOT, WorkingFolder

# A rule of a name that the profile knows, with the resources that the real one asks for.
SNAKEFILE = """
rule finetune:
    output: "{track}.txt"
    resources: gpu=1, gpu_model="a100", mem_mb=500, runtime=5
    shell: "echo $CUDA_VISIBLE_DEVICES $SLURMD_NODENAME > {output}"
"""
IMPATIENT = ("--slurm-init-seconds-before-status-checks", "2", "--latency-wait", "5")
VARIANTS = {
    "gres": (),
    "one_gpu_type": (),
    "cloud": (),
    # the test cluster has no accounting: the account is kept, the status is asked of squeue
    "accounting": ("--slurm-status-command", "squeue"),
}


@pytest.fixture(scope="module")
def jobs(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """GPU and node that a job of each variant got; all four run at once."""
    folders = {variant: WorkingFolder(tmp_path_factory.mktemp(variant)) for variant in VARIANTS}
    with ExitStack() as running:
        started = []
        for variant, folder in folders.items():
            shutil.copytree(ROOT / "profiles", folder.path / "profiles")
            (folder.path / "slurm").symlink_to("profiles/slurm")
            (folder.path / "Snakefile").write_text(SNAKEFILE)
            more = ("--workflow-profile", f"profiles/variants/{variant}", *IMPATIENT, *VARIANTS[variant])
            started.append(running.enter_context(controller(folder, cluster, *more, "a100.txt")))
        for snakemake, folder in zip(started, folders.values(), strict=True):
            assert snakemake.wait(1500) == 0, output(folder)
    return {variant: (folder.path / "a100.txt").read_text() for variant, folder in folders.items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_gives_a_job_one_gpu(variant: str, jobs: dict[str, str]) -> None:
    gpu, node = jobs[variant].split()
    assert gpu in ("0", "1")
    assert variant == "one_gpu_type" or node in ("a1", "a2")
