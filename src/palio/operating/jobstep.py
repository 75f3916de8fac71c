"""Run a job's Snakemake as the job's one SLURM step:

    python -m palio.operating.jobstep --nodes=1 --cpus-per-task=2 --gpus=1 python -m snakemake …

Snakemake's SLURM executor starts a Snakemake in the job for this, which starts a second one in the step. It
costs a job as much CPU time and memory as the one that does the work. srun gets the options and the
environment that the executor would give it, and SLURM_CONF, which the executor drops.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

KEPT = {
    "SLURM_JOB_ID",
    "SLURM_JOBID",
    "SLURM_CLUSTER_NAME",
    "SLURM_CONF",
    "SLURM_SUBMIT_DIR",
    "SLURM_SUBMIT_HOST",
}
"""What srun needs to find cluster and job."""


def step_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return a job's environment without what SLURM and the site set for srun: it is the job's, and may
    contradict the step's options."""
    return {
        name: value
        for name, value in environment.items()
        if name in KEPT or not name.startswith(("SLURM_", "SRUN_", "SBATCH_"))
    }


def main(arguments: Sequence[str]) -> None:
    """Become srun. Raises FileNotFoundError where the node has none."""
    os.execvpe("srun", ["srun", "--ntasks=1", "--cpu-bind=q", *arguments], step_environment(os.environ))


if __name__ == "__main__":
    main(sys.argv[1:])
