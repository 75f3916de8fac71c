"""Curation from the command line, as a participant uses it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from palio.curation.rows import ROW
from palio.demo.data import write_demo_sources
from palio.layout import Resources
from palio.provenance import file_sha256

ROOT = Path(__file__).parents[2]
CURATED = "config/entries/demo/curated.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with the demo's config and sources."""
    path = tmp_path_factory.mktemp("work")
    (path / "config").symlink_to(ROOT / "config")
    write_demo_sources(path / Resources().demo_sources, seed=7)
    return path


def palio(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "palio.cli", *arguments],
        cwd=folder,
        env={**os.environ, "PAGER": "cat"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_participant_previews_a_recipe_and_looks_at_what_it_drops(folder: Path) -> None:
    done = palio(folder, "curate", CURATED, "--out", "preview", "--limit", "50")
    assert done.returncode == 0, done.stderr
    assert "200 → 200" in done.stdout
    kept = palio(folder, "inspect", "preview", "--limit", "3")
    assert kept.stdout.count(">>>") == 3
    dropped = palio(folder, "inspect", "preview", "--operation", "drop_refusals")
    assert "the answer refuses" in dropped.stdout
    assert "the answer refuses" not in kept.stdout


def test_the_workflows_form_gives_the_bytes_of_the_participants(folder: Path) -> None:
    from palio.config import load_entry
    from palio.workflow import slice_of

    entry = load_entry(ROOT / CURATED)
    assert entry.dataset is not None
    assert palio(folder, "curate", CURATED, "--out", "whole").returncode == 0
    entry_dir = "results/laptop/curated"
    arguments = (slice_of(entry.dataset), "--entry-dir", entry_dir, "--base-model", "none")
    assert palio(folder, "curate", *arguments).returncode == 0
    train = "train.parquet"
    assert file_sha256(folder / entry_dir / "dataset" / train) == file_sha256(folder / "whole" / train)


@pytest.mark.parametrize("stage", ["open", "closed"])
def test_contamination_is_counted_and_pairs_are_of_the_open_stage_alone(
    stage: str, folder: Path, tmp_path: Path
) -> None:
    question = "In which year did the contrada of the owl win the race on the second of July after a wait?"
    config = _competition(tmp_path)
    stores = {
        "open": folder / "resources/stages/open/store",
        "closed": tmp_path / "closed" / str(config["competition"]) / "stage",
    }
    stores[stage].mkdir(parents=True)
    row = {"scenario": "quiz", "run": "quiz", "instance": "id7", "text": question, "reference": "2009"}
    pq.write_table(pa.Table.from_pylist([row]), stores[stage] / "instances.parquet")
    train = {
        "prompt": question.upper(),
        "completion": "2009",
        "history": [],
        "source": "mine",
        "id": "mine:1",
        "licence": "CC0-1.0",
    }
    pq.write_table(pa.Table.from_pylist([train], ROW), tmp_path / "train.parquet")
    done = palio(
        folder, "contamination", str(tmp_path), "--stage", stage, "--competition", json.dumps(config)
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "quiz: 1 of 1 instances"
    assert ("quiz id7 in mine mine:1: IN WHICH YEAR" in done.stdout) == (stage == "open")
    assert ("CONTRADA" in done.stdout + done.stderr) == (stage == "open")


def _competition(folder: Path) -> dict[str, object]:
    import yaml

    config: dict[str, object] = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    return {**config, "closed_store": str(folder / "closed")}


def test_a_mistake_ends_in_one_line(folder: Path) -> None:
    done = palio(folder, "curate", "config/entries/demo/untuned.yaml", "--out", "none")
    assert done.returncode == 2
    assert done.stderr == (
        "error: config/entries/demo/untuned.yaml: dataset: the entry has none; there is nothing to curate\n"
    )
