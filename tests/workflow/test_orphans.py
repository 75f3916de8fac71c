"""What is left of a workflow on one machine when its Snakemake is killed: nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

from tests.support.folder import WorkingFolder

PALIO = """#!{python}
import os, pathlib, time
import palio.base_model

def fetch(*arguments, **options):
    pathlib.Path("pid").write_text(f"{{os.getpid()}}\\n")
    time.sleep(600)

palio.base_model.fetch_base_model = fetch
from palio.cli import main
main()
"""
"""`palio` whose first step takes forever."""


def test_a_step_ends_with_a_killed_snakemake(folder: WorkingFolder, tmp_path: Path) -> None:
    program = tmp_path / "bin" / "palio"
    program.parent.mkdir()
    program.write_text(PALIO.format(python=sys.executable))
    program.chmod(0o755)
    environment = {"PATH": f"{program.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
    pid = folder.path / "pid"
    with subprocess.Popen(
        ["snakemake", "--profile", "local"], cwd=folder.path, env=os.environ | environment
    ) as snakemake:
        deadline = time.monotonic() + 240
        while not (pid.exists() and pid.read_text().endswith("\n")) and time.monotonic() < deadline:
            time.sleep(0.1)
        step = psutil.Process(int(pid.read_text()))
        snakemake.kill()
    assert psutil.wait_procs([step], timeout=60)[1] == []
