"""What re-runs training, on a tiny model in a real workflow."""

from __future__ import annotations

from pathlib import Path

import pytest

from palio.records import AdapterManifest, read_record
from tests.support.folder import WorkingFolder
from tests.support.training import tiny_base_model

ADAPTER = "results/laptop/curated/adapter.json"


@pytest.fixture
def folder(tmp_path: Path, base_model: Path) -> WorkingFolder:
    """The demo, whose entry starts from a tiny model and trains for two steps."""
    base = str(tiny_base_model(tmp_path / "base", base_model) / "model")
    folder = WorkingFolder.create(tmp_path / "competition")
    folder.edit_yaml(
        "config/rulesets/demo.yaml", lambda rules: rules["base_models"][0]["sources"].append(f"path:{base}")
    )
    folder.edit_entry("curated", lambda entry: entry.update(base_model={"path": base}))
    folder.edit_entry("curated", lambda entry: entry["finetune"].update(max_steps=2))
    return folder


def train(folder: WorkingFolder) -> AdapterManifest:
    done = folder.snakemake(ADAPTER)
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
    assert folder.plan(ADAPTER) == set()
    folder.edit_entry("curated", lambda entry: entry["finetune"].update(learning_rate=3e-3))
    second = train(folder)
    assert second.files != first.files
    assert '"cost_usd": 0.' in (folder.path / "results/laptop/curated/finetune.run.json").read_text()
    assert (folder.path / "results/laptop/curated/work/dashboards/tensorboard").is_dir()
