"""What re-runs training, on a tiny model in a real workflow."""

from __future__ import annotations

from pathlib import Path

import pytest

from palio.config import load_entry
from palio.records import AdapterManifest, Check, read_record
from tests.support.folder import DEMO_ENTRIES, WorkingFolder
from tests.support.training import Entry, tiny_base_model

ADAPTER = "results/laptop/curated/adapter.json"


@pytest.fixture
def folder(tmp_path: Path, base_model: Path) -> WorkingFolder:
    """The demo with all that `finetune` of one entry needs, as if the steps before were finished."""
    folder = WorkingFolder.create(tmp_path / "competition")
    folder.edit_entry("curated", lambda entry: entry["finetune"].update(max_steps=2))
    model = load_entry(folder.path / DEMO_ENTRIES / "curated.yaml").base_model
    base = tiny_base_model(folder.path / "resources" / "base_models" / model.id, base_model)
    entry = folder.path / "results" / "laptop" / "curated"
    Entry.create(entry, base)
    Check(
        competition="demo", track="laptop", entry="curated", rules_version="1", base_model_family="x"
    ).write(entry / "check.json")
    return folder


def train(folder: WorkingFolder) -> AdapterManifest:
    done = folder.snakemake(ADAPTER, "--allowed-rules", "finetune")
    assert done.returncode == 0, done.stdout + done.stderr
    return read_record(AdapterManifest, folder.path / ADAPTER)


def test_a_changed_recipe_retrains_and_a_changed_dashboard_or_price_does_not(folder: WorkingFolder) -> None:
    first = train(folder)
    folder.edit_yaml(
        "config/config.yaml",
        lambda config: config.update(
            telemetry={"report_to": ["tensorboard"], "usd_per_hour": {"laptop": 0.5}}
        ),
    )
    assert folder.plan(ADAPTER, "--allowed-rules", "finetune") == set()
    folder.edit_entry("curated", lambda entry: entry["finetune"].update(learning_rate=3e-3))
    second = train(folder)
    assert second.files != first.files
    assert '"cost_usd": 0.' in (folder.path / "results/laptop/curated/finetune.run.json").read_text()
    assert (folder.path / "results/laptop/curated/work/dashboards/tensorboard").is_dir()
