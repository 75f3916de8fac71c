"""A copy of the workflow to run Snakemake in, and what its plan says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
DEMO_ENTRIES = "config/entries/demo"


@dataclass(frozen=True)
class WorkingFolder:
    """A folder as a fresh clone has it, without the code (which is installed)."""

    path: Path

    @classmethod
    def create(cls, path: Path) -> WorkingFolder:
        path.mkdir(parents=True)
        shutil.copy(ROOT / "Snakefile", path)
        for name in ("rules", "config", "profiles", "envs"):
            shutil.copytree(ROOT / name, path / name)
        for name in ("local", "slurm"):
            (path / name).symlink_to(f"profiles/{name}")
        return cls(path)

    def run(
        self,
        *command: str,
        timeout: float = 900,
        environment: dict[str, str] | None = None,
        given: str | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program of the environment in the folder, `given` on its stdin; never raises for its exit
        code."""
        program, *arguments = command
        environment = dict(environment or os.environ)
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
        return subprocess.run(
            [str(Path(sys.executable).with_name(program)), *arguments],
            cwd=self.path,
            env=environment,
            input=given,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def snakemake(self, *arguments: str, timeout: float = 900) -> subprocess.CompletedProcess[str]:
        return self.run("snakemake", "--profile", "local", *arguments, timeout=timeout)

    def plan(self, *arguments: str, profile: str = "local") -> set[tuple[str, str]]:
        """(rule, entry, replicate of one, or "") of every job that a dry run lists."""
        done = self.run("snakemake", "--profile", profile, "--dry-run", *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        jobs = set()
        for block in re.split(r"\n(?=(?:local)?rule )", done.stdout + done.stderr):
            if rule := re.match(r"(?:local)?rule (\w+):", block):
                entry = re.search(r"wildcards:.*\bentry=([\w/-]+)", block)
                jobs.add((rule[1], entry[1] if entry else ""))
        return jobs

    def edit_yaml(self, file: str, change: Callable[[Any], None]) -> None:
        path = self.path / file
        content = yaml.safe_load(path.read_text())
        change(content)
        path.write_text(yaml.safe_dump(content, sort_keys=False))

    def edit_entry(self, entry: str, change: Callable[[Any], None]) -> None:
        self.edit_yaml(f"{DEMO_ENTRIES}/{entry}.yaml", change)
