"""Both editions through the whole workflow, as an organizer types it, with the budgets scaled down."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from palio.config import Competition, load_competition
from palio.records import Leaderboard, read_record
from palio.scoring.columns import scored_metrics
from tests.support.folder import ROOT, WorkingFolder
from tests.support.stages import competition_of_2023, data_of_2023, needs_data
from tests.support.training import tiny_base_model

# test_editions.py asks both editions in small, without the workflow.
pytestmark = [needs_data, pytest.mark.slow]
EDITIONS = ("neurips2023", "neurips2023_fair")
SCALE = 0.003
ENTRIES = {"untuned", "tuned"}


@dataclass(frozen=True)
class Run:
    folder: WorkingFolder
    competition: Competition

    @property
    def leaderboard(self) -> Leaderboard:
        return read_record(Leaderboard, self.folder.path / "results/leaderboard/laptop.json")


@pytest.fixture(scope="module", params=EDITIONS)
def finished(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, base_model: Path
) -> Iterator[Run]:
    folder = WorkingFolder.create(tmp_path_factory.mktemp(request.param) / "competition")
    base = tiny_base_model(tmp_path_factory.mktemp("base"), base_model) / "model"
    edition = competition_of_2023(folder.path, SCALE, request.param)
    content = edition.model_dump(mode="json", exclude_none=True)
    demo = load_competition(ROOT / "config/config.yaml").model_dump(mode="json", exclude_none=True)
    content |= {"tracks": demo["tracks"], "rules": demo["rules"], "entries": ["config/entries/tiny"]}
    content["closed_store"] = str(folder.path.parent / "closed")
    (folder.path / "config/config.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    folder.edit_yaml(
        "config/rulesets/demo.yaml", lambda rules: rules["base_models"][0]["sources"].append(f"path:{base}")
    )
    write_entries(folder.path / "config/entries/tiny", base)
    source = str(data_of_2023(folder.path))
    for stage in ("open", "closed"):
        fetched = folder.run("palio", "fetch-data", "--stage", stage, "--source", source)
        assert fetched.returncode == 0, fetched.stderr
    done = folder.snakemake(timeout=2400)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    yield Run(folder, load_competition(content))


def write_entries(folder: Path, base: Path) -> None:
    """Random weights as they are, and after two steps on one of the demo's tasks."""
    folder.mkdir()
    source = {
        "path": "resources/demo_sources/pattern_match.jsonl",
        "licence": "CC0-1.0",
        "generator": "palio demo-data",
    }
    trained: dict[str, Any] = {
        "dataset": {"sources": [source]},
        "finetune": {"learning_rate": 1e-3, "batch_size": 4, "max_steps": 2},
    }
    for name, recipe in {"untuned": {}, "tuned": trained}.items():
        entry = {"team": f"Contrada {name}", "track": "laptop", "base_model": {"path": str(base)}, **recipe}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(entry))


def test_both_entries_are_ranked_and_every_column_has_a_value_or_the_reason(finished: Run) -> None:
    board = finished.leaderboard
    assert board.final
    assert not board.did_not_finish
    assert {row.entry for row in board.entries} == ENTRIES
    expected = [
        (stage, of.scenario, of.column.metric)
        for stage in ("open", "closed")
        for of in scored_metrics(finished.competition, stage)
    ]
    assert [(column.stage, column.scenario, column.metric) for column in board.columns] == expected
    for row in board.entries:
        assert len(row.cells) == len(expected)
        assert all(cell.value is not None or cell.reason for cell in row.cells)


def test_every_question_of_both_stages_is_answered(finished: Run) -> None:
    for entry in ENTRIES:
        folder = finished.folder.path / "results/laptop" / entry
        for stage in ("open", "closed"):
            record = yaml.safe_load((folder / f"{stage}.json").read_text())
            assert record["state"] == "finished"
            assert all(run["answered"] == run["instances"] > 0 for run in record["runs"])


def test_the_organizer_reads_the_prompts_of_each_scenario(finished: Run) -> None:
    for scenario in finished.competition.stages.closed.scenarios:
        shown = finished.folder.run("palio", "prompts", "--stage", "closed", "--scenario", scenario)
        assert shown.returncode == 0, shown.stderr
        assert shown.stdout.startswith("--- ")
