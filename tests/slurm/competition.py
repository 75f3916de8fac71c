"""A competition on two tracks that is real in every step and costs seconds: a model of random weights."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from tests.slurm.cluster import Cluster
from tests.support.folder import DEMO_ENTRIES, WorkingFolder

TRACKS = ("a100", "rtx4090")


def create(path: Path, tiny: Path) -> WorkingFolder:
    """Two tracks without entries yet; one scenario of two questions in each stage."""
    folder = WorkingFolder.create(path)
    for entry in (folder.path / DEMO_ENTRIES).glob("*.yaml"):
        entry.unlink()

    def small(config: dict[str, Any]) -> None:
        track = {**config["tracks"].pop("laptop"), "ram_gb": 4, "training_budget": "5m"}
        for name in TRACKS:
            config["tracks"][name] = {**track, "title": name, "gpu_model": name}
        for stage in config["stages"].values():
            for name in list(stage["scenarios"])[1:]:
                del stage["scenarios"][name]
            for scenario in stage["scenarios"].values():
                scenario["max_eval_instances"] = 2

    folder.edit_yaml("config/config.yaml", small)
    rule = {"family": "tiny", "sources": [f"path:{tiny}"], "licences": ["apache-2.0"]}
    folder.edit_yaml("config/rulesets/demo.yaml", lambda rules: rules["base_models"].append(rule))

    def impatient(profile: dict[str, Any]) -> None:
        profile["slurm-init-seconds-before-status-checks"] = 3
        profile["latency-wait"] = 5

    folder.edit_yaml("profiles/slurm/config.yaml", impatient)
    return folder


def add_entry(folder: WorkingFolder, name: str, track: str, tiny: Path, **recipe: Any) -> None:
    """An entry that trains for some steps, or with no recipe the untuned model."""
    entry: dict[str, Any] = {"team": f"Contrada {name}", "track": track, "base_model": {"path": str(tiny)}}
    if recipe:
        source = {
            "path": "resources/demo_sources/pattern_match.jsonl",
            "licence": "CC0-1.0",
            "generator": "palio demo-data",
        }
        entry["dataset"] = {"sources": [source]}
        entry["finetune"] = {"learning_rate": 1e-3, "batch_size": 4, **recipe}
    (folder.path / DEMO_ENTRIES / f"{name}.yaml").write_text(yaml.safe_dump(entry))


@contextmanager
def controller(
    folder: WorkingFolder, cluster: Cluster, *arguments: str, under: Sequence[str] = (), **variables: str
) -> Iterator[subprocess.Popen[bytes]]:
    """`snakemake --profile slurm`, as typed, running; killed at the end if it still does. `variables` are of
    its environment, `under` a command that runs it in its own place."""
    command = [
        *under, str(Path(sys.executable).with_name("snakemake")), "--profile", "slurm", *arguments,
    ]  # fmt: skip
    with (folder.path / "snakemake.log").open("ab") as log:
        environment = cluster.environment | variables
        process = subprocess.Popen(command, cwd=folder.path, env=environment, stdout=log, stderr=log)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def output(folder: WorkingFolder) -> str:
    return (folder.path / "snakemake.log").read_text()


def copy(folder: WorkingFolder, path: Path) -> WorkingFolder:
    """A copy of a competition with all it has made, to go on with."""
    shutil.copytree(folder.path, path, symlinks=True)
    (path / "snakemake.log").unlink(missing_ok=True)
    return WorkingFolder(path)


def prepare_datasets(folder: WorkingFolder) -> None:
    """Check and curate every entry on this machine: not what is tested here, and a job costs more."""
    entries = {path.stem: yaml.safe_load(path.read_text()) for path in (folder.path / DEMO_ENTRIES).iterdir()}
    targets = [
        f"results/{entry['track']}/{name}/dataset/manifest.json"
        for name, entry in entries.items()
        if "dataset" in entry
    ]
    done = folder.snakemake(*targets)
    assert done.returncode == 0, done.stderr


def ended(cluster: Cluster, job: str | None) -> float:
    """When SLURM says that a job ended, in seconds since 1970."""
    times = dict(line.split("|") for line in cluster.jobs("%i|%e"))
    return datetime.fromisoformat(times[job or ""]).timestamp()


def fault_row(fault: str, lost: str, reran: str, seconds: float | None) -> None:
    """A line of the table in docs/slurm.md, into the file that PALIO_FAULT_TABLE names. `seconds` is from the
    fault, or from the next start where it needs one, until the step runs again."""
    if table := os.environ.get("PALIO_FAULT_TABLE"):
        back = "–" if seconds is None else f"{seconds:.0f} s"
        with Path(table).open("a", encoding="utf-8") as file:
            file.write(f"| {fault} | {lost} | {reran} | {back} |\n")
