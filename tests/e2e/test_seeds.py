"""The demo with three seeds for two of its entries, config/demo_seeds.yaml, down to decision and report.

With a few steps and a few questions, of a tiny model and of the demo's own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from palio.records import Analysis, Decision, Leaderboard, QuestionPlan, read_record
from tests.support.folder import DEMO_ENTRIES, WorkingFolder
from tests.support.training import tiny_base_model

pytestmark = pytest.mark.slow  # six trainings and twelve stages; tests/workflow/test_replicates.py plans them
SEEDS = ("--configfile", "config/demo_seeds.yaml")
NAMES = ("curated", "raw")


def shrink(folder: WorkingFolder, questions: int, base: Path | None) -> None:
    """The two entries, a few steps and questions; in each stage one scenario."""

    def competition(config: dict[str, Any]) -> None:
        for stage in config["stages"].values():
            name, scenario = next(iter(stage["scenarios"].items()))
            stage["scenarios"] = {name: scenario | {"max_eval_instances": questions}}

    def entry(content: dict[str, Any]) -> None:
        content["finetune"].update(max_steps=3, batch_size=4)
        if base:
            content["base_model"] = {"path": str(base)}

    folder.edit_yaml("config/config.yaml", competition)
    for name in ("untuned", "open_only"):
        (folder.path / DEMO_ENTRIES / f"{name}.yaml").unlink()
    for name in NAMES:
        folder.edit_entry(name, entry)
    if base:
        folder.edit_yaml(
            "config/rulesets/demo.yaml",
            lambda rules: rules["base_models"][0]["sources"].append(f"path:{base}"),
        )


@pytest.fixture(scope="module", params=["tiny", "demo"])
def finished(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, base_model: Path
) -> Iterator[WorkingFolder]:
    folder = WorkingFolder.create(tmp_path_factory.mktemp(request.param) / "competition")
    tiny = request.param == "tiny"
    base = tiny_base_model(tmp_path_factory.mktemp("base"), base_model) / "model" if tiny else None
    shrink(folder, 4 if tiny else 8, base)
    done = folder.snakemake(*SEEDS, timeout=2400)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    yield folder


@pytest.fixture
def board(finished: WorkingFolder) -> Leaderboard:
    return read_record(Leaderboard, finished.path / "results/leaderboard/laptop.json")


def test_both_entries_have_three_trainings_that_differ(finished: WorkingFolder, board: Leaderboard) -> None:
    assert {one.entry: [of.number for of in one.replicates] for one in board.entries} == {
        name: [2, 3] for name in NAMES
    }
    assert all(not one.notes or "Training" not in " ".join(one.notes) for one in board.entries)
    for name in NAMES:
        own = finished.path / "results/laptop" / name
        files = [
            json.loads((folder / "adapter.json").read_text())["files"]["adapter_model.safetensors"]
            for folder in (own, own / "replicates/2", own / "replicates/3")
        ]
        assert len(set(files)) == 3


def test_intervals_cover_the_training_and_leaderboard_and_report_say_how_much_it_is(
    finished: WorkingFolder,
) -> None:
    analysis = read_record(Analysis, finished.path / "results/leaderboard/laptop.analysis.json")
    assert analysis.uncertainty is not None
    assert analysis.uncertainty.training is not None
    assert (analysis.uncertainty.training.source, analysis.uncertainty.training.degrees) == ("replicates", 4)
    assert [entry.trainings for entry in analysis.uncertainty.entries] == [3, 3]
    text = (finished.path / "results/leaderboard/laptop.md").read_text()
    assert "| trainings | of it training |" in text
    page = (finished.path / "results/report/index.html").read_text()
    assert "The noise of training is estimated from 2 entries trained again with other seeds" in page


def test_the_decision_is_written_with_the_leaderboard_and_decided_again_by_hand(
    finished: WorkingFolder,
) -> None:
    path = finished.path / "results/leaderboard/laptop.decision.json"
    decision = read_record(Decision, path)
    assert decision.places == 2
    assert {name for award in decision.awards for name in award.entries} == set(NAMES)
    assert "4 trainings beyond the first" in decision.covers
    path.unlink()
    done = finished.run("palio", "decide", "results/leaderboard/laptop.json")
    assert done.returncode == 0, done.stderr
    assert read_record(Decision, path) == decision
    document = (finished.path / "results/leaderboard/laptop.decision.md").read_text()
    assert "# Prizes of demo, laptop" in document
    assert "## What would change it" in document


def test_what_would_separate_them_is_planned_at_measured_prices(finished: WorkingFolder) -> None:
    done = finished.run("palio", "plan-questions", "results/leaderboard/laptop.json", *NAMES, "--json")
    assert done.returncode == 0, done.stderr
    (pair,) = QuestionPlan.model_validate_json(done.stdout).pairs
    assert {pair.better, pair.worse} == set(NAMES)
    assert pair.ways or pair.limits or pair.standard_error <= pair.largest_error
    assert all(way.gpu_hours is not None for way in pair.ways)


def test_a_second_run_has_nothing_to_do(finished: WorkingFolder) -> None:
    assert finished.plan(*SEEDS) == set()
