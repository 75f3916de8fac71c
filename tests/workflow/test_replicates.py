"""What Snakemake plans for entries that are trained again with other seeds: by the rules of the entry."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest

from palio.errors import BadInput
from palio.layout import CONFIG
from palio.settings import FinetuneSettings
from palio.workflow import Workflow
from tests.support.folder import WorkingFolder
from tests.support.records import leave_all_records

OWN = {"finetune", "build_package", "helm_open", "helm_closed"}
FINISH = {("score", ""), ("report", ""), ("all", "")}


def replicated(folder: WorkingFolder, **replicates: Any) -> None:
    folder.edit_yaml("config/config.yaml", lambda config: config.update(replicates=replicates))


def due_names(folder: WorkingFolder) -> set[str]:
    """Entries and replicates with a step that is due."""
    with chdir(folder.path):
        return {of.name for of, _ in Workflow(CONFIG).due_steps()}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> WorkingFolder:
    """A finished competition without replicates."""
    made = WorkingFolder.create(tmp_path_factory.mktemp("replicated") / "competition")
    with chdir(made.path):
        leave_all_records(Workflow(CONFIG))
    for suffix in ("csv", "parquet", "md", "tex", "analysis.json"):
        (made.path / f"results/leaderboard/laptop.{suffix}").touch()
    (made.path / "results/report/figures").mkdir(parents=True)
    (made.path / "results/report/index.html").touch()
    return made


@pytest.fixture
def finished(template: WorkingFolder, tmp_path: Path) -> Iterator[WorkingFolder]:
    shutil.copytree(template.path, tmp_path / "competition", symlinks=True)
    yield WorkingFolder(tmp_path / "competition")


def test_replicates_of_a_finished_competition_train_and_evaluate_on_the_entrys_dataset(
    finished: WorkingFolder,
) -> None:
    """| `replicates` | the trainings that it adds, their packages and stages; score, report |"""
    replicated(finished, entries=["raw"], seeds=3)
    added = {(rule, f"raw/replicates/{number}") for rule in OWN for number in (2, 3)}
    assert finished.plan() == added | FINISH


def test_a_dataset_that_was_deleted_is_made_again_for_a_replicate(finished: WorkingFolder) -> None:
    shutil.rmtree(finished.path / "results/laptop/raw/dataset")
    replicated(finished, entries=["raw"], seeds=2)
    plan = finished.plan()
    assert ("curate_dataset", "raw") in plan
    assert {rule for rule, entry in plan if entry == "raw"} == {"curate_dataset"}


def test_only_the_seed_of_a_replicate_differs_from_its_entry(finished: WorkingFolder) -> None:
    replicated(finished, entries="all", seeds=3)
    with chdir(finished.path):
        workflow = Workflow(CONFIG)
        own, second, third = (
            FinetuneSettings.of(workflow.planned(name), "finetune").decisive
            for name in ("raw", "raw/replicates/2", "raw/replicates/3")
        )
    assert [one["recipe"].pop("seed") for one in (own, second, third)] == [1, 2, 3]
    assert own == second == third


def test_all_entries_that_are_trained_here_have_replicates(finished: WorkingFolder) -> None:
    replicated(finished, entries="all", seeds=2)
    assert due_names(finished) == {f"{entry}/replicates/2" for entry in ("curated", "open_only", "raw")}


def test_a_change_of_the_recipe_trains_entry_and_replicates_again(finished: WorkingFolder) -> None:
    replicated(finished, entries=["raw"], seeds=2)
    with chdir(finished.path):
        leave_all_records(workflow := Workflow(CONFIG))
        assert workflow.due_steps() == []
    finished.edit_entry("raw", lambda entry: entry["finetune"].update(learning_rate=5e-4))
    with chdir(finished.path):
        again = {(folder.name, step.rule) for folder, step in Workflow(CONFIG).due_steps()}
    assert again == {(name, rule) for name in ("raw", "raw/replicates/2") for rule in OWN}


def test_finalists_are_the_first_of_the_leaderboard_and_none_before_there_is_one(
    finished: WorkingFolder,
) -> None:
    replicated(finished, entries="finalists", finalists=1, seeds=2)
    board = finished.path / "results/leaderboard/laptop.json"
    board.unlink()
    assert due_names(finished) == set()
    scored = {"team": "t", "final_score": 0.5, "stage_scores": {}, "scenario_win_rates": {}, "cells": []}
    board.write_text(
        json.dumps(
            {
                **{"competition": "demo", "track": "laptop", "final": True, "convention": "midrank"},
                **{"convention_version": "2", "missing": "worst", "stage_weights": {}, "columns": []},
                "entries": [
                    scored | {"entry": entry, "rank": rank} for rank, entry in ((1, "curated"), (2, "raw"))
                ],
                **{"did_not_finish": [], "inputs": {}},
            }
        )
    )
    assert due_names(finished) == {"curated/replicates/2"}


def test_a_grant_of_a_fresh_start_to_a_replicate_is_its_own(finished: WorkingFolder) -> None:
    replicated(finished, entries=["raw"], seeds=2)
    with chdir(finished.path):
        leave_all_records(Workflow(CONFIG))
    granted = finished.run("palio", "retry", "raw/replicates/2", "--step", "finetune")
    assert granted.returncode == 0, granted.stderr
    assert due_names(finished) == {"raw/replicates/2"}


def test_a_replicate_of_no_entry_is_refused_in_one_line(finished: WorkingFolder) -> None:
    replicated(finished, entries=["rawe"], seeds=2)
    with pytest.raises(
        BadInput, match=r"replicates\.entries\.rawe: no entry has this id; correct or remove it"
    ):
        due_names(finished)
    replicated(finished, entries=["raw"], seeds=1)
    with pytest.raises(BadInput, match=r"replicates\.seeds is 1"):
        due_names(finished)


def test_status_has_a_line_for_each_replicate(finished: WorkingFolder) -> None:
    replicated(finished, entries=["raw"], seeds=2)
    done = finished.run("palio", "status", "--json")
    (replicate,) = [one for one in json.loads(done.stdout)["entries"] if one["entry"] == "raw/replicates/2"]
    assert [step["step"] for step in replicate["steps"]] == ["finetune", "package", "open", "closed"]
