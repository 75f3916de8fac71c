"""What a change re-runs in a finished competition, whose steps have only left their records.

Snakemake remembers nothing of it, as after a controller that died: the records alone decide. One test has
Snakemake's memory too, and it changes nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import zipfile
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest

from palio.workflow import Workflow
from tests.support.folder import DEMO_ENTRIES, WorkingFolder
from tests.support.records import leave_all_records

FINISH = {("score", ""), ("report", ""), ("all", "")}
TRAINED = ("curated", "open_only", "raw")
ENTRIES = (*TRAINED, "untuned")


def touch_all(folder: WorkingFolder) -> None:
    """Every output of the workflow, in the order of the rules."""
    done = folder.run("snakemake", "--profile", "local", "--summary")
    for line in done.stdout.splitlines()[1:]:
        path = folder.path / line.split("\t")[0]
        (path.parent if path.suffix else path).mkdir(parents=True, exist_ok=True)
        if path.suffix:
            path.touch()
    with chdir(folder.path):
        leave_all_records(Workflow(Path("config/config.yaml")))
    accepted = folder.snakemake("--touch", "--forceall")
    assert accepted.returncode == 0, accepted.stderr


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> WorkingFolder:
    made = WorkingFolder.create(tmp_path_factory.mktemp("finished") / "competition")
    touch_all(made)
    assert made.plan() == set()
    return made


def forget(folder: WorkingFolder) -> WorkingFolder:
    """What is left of Snakemake's memory when a controller dies before a job has ended: nothing."""
    shutil.rmtree(folder.path / ".snakemake/metadata")
    return folder


@pytest.fixture
def finished(template: WorkingFolder, tmp_path: Path) -> Iterator[WorkingFolder]:
    shutil.copytree(template.path, tmp_path / "competition", symlinks=True)
    yield forget(WorkingFolder(tmp_path / "competition"))


def test_a_failed_step_runs_again_with_what_depends_on_it(finished: WorkingFolder) -> None:
    """| a step without a result: failed, or lost | it, and what reads its record; score, report |"""
    (finished.path / "results/laptop/raw/closed.json").unlink()
    for made_after in ("leaderboard", "report"):  # the run in which the step failed had none
        shutil.rmtree(finished.path / "results" / made_after)
    assert finished.plan() == {("helm_closed", "raw")} | FINISH


def test_a_new_entry_runs_its_own_chain_and_the_scoring(finished: WorkingFolder) -> None:
    """| a new entry file | its own chain; score, report |"""
    entries = finished.path / DEMO_ENTRIES
    text = (entries / "untuned.yaml").read_text()
    (entries / "late.yaml").write_text(text.replace("Tartuca", "Giraffa"))
    plan = finished.plan()
    assert {entry for _, entry in plan if entry} == {"late"}
    assert {(rule, entry) for rule, entry in plan if not entry} == FINISH


def test_a_scenario_of_the_closed_stage_re_evaluates_closed_only(finished: WorkingFolder) -> None:
    """
    | a stage's run entries or instance budget | `prepare_stage`, that stage of every entry (with more
      questions, it asks only these), overlap; score, report |
    """

    def more(config: dict[str, Any]) -> None:
        config["stages"]["closed"]["scenarios"]["parity"]["max_eval_instances"] = 41

    finished.edit_yaml("config/config.yaml", more)
    closed = {("helm_closed", entry) for entry in ENTRIES}
    contamination = {("measure_contamination", entry) for entry in TRAINED}
    assert finished.plan() == closed | contamination | {("prepare_stage", "")} | FINISH


def test_a_limit_starts_nothing_that_is_complete(finished: WorkingFolder) -> None:
    """| a limit of a stage or a track | score, report |"""

    def longer(config: dict[str, Any]) -> None:
        config["stages"]["open"].update(time_limit="11m", threads=3)
        config["tracks"]["laptop"].update(training_budget="20m", ram_gb=8, title="Another title")

    finished.edit_yaml("config/config.yaml", longer)
    assert finished.plan() == FINISH


def test_a_limit_re_runs_what_stopped_at_it(finished: WorkingFolder) -> None:
    """| the same, where a step had stopped at it | that step too |"""
    record = finished.path / "results/laptop/raw/open.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"state": "time_limit"}))
    assert finished.plan() == FINISH
    finished.edit_yaml("config/config.yaml", lambda config: config["stages"]["open"].update(time_limit="11m"))
    assert finished.plan() == {("helm_open", "raw")} | FINISH


def test_a_rule_set_checks_every_entry_again_and_starts_nothing_else(finished: WorkingFolder) -> None:
    """| the rules of the competition | every check; score, report |"""
    finished.edit_yaml("config/rulesets/demo.yaml", lambda rules: rules.update(max_length=1024))
    assert finished.plan() == {("check_entry", entry) for entry in ENTRIES} | FINISH


def test_a_metric_is_scored_again_and_nothing_is_evaluated(finished: WorkingFolder) -> None:
    """| weights, conventions, metrics of the open stage | score, report |"""

    def reweigh(config: dict[str, Any]) -> None:
        config["scoring"] = {**config.get("scoring", {}), "convention": "hidden2023"}

    finished.edit_yaml("config/config.yaml", reweigh)
    assert finished.plan() == FINISH


def test_a_metric_that_has_not_left_the_closed_stage_is_fetched_from_it(finished: WorkingFolder) -> None:
    """
    | a HELM metric new to the closed stage | that stage's jobs, which find HELM's runs complete; score,
      report |
    """

    def other(config: dict[str, Any]) -> None:
        scenario = config["stages"]["closed"]["scenarios"]["parity"]
        scenario["metrics"]["quasi-exact match"] = {"metric": "quasi_exact_match"}

    finished.edit_yaml("config/config.yaml", other)
    assert finished.plan() == {("helm_closed", entry) for entry in ENTRIES} | FINISH


def test_a_team_or_a_title_is_shown_and_nothing_is_run(finished: WorkingFolder) -> None:
    """| titles of entries, tracks and stages | score, report |"""
    finished.edit_entry("raw", lambda entry: entry.update(title="As it comes"))
    finished.edit_yaml("config/config.yaml", lambda config: config["stages"]["open"].update(title="First"))
    assert finished.plan() == FINISH


def test_another_base_model_runs_the_whole_chain(finished: WorkingFolder) -> None:
    """| an entry's `base_model` | its whole chain; score, report |"""
    another = {"path": "resources/teams/another_model"}
    finished.edit_yaml(
        "config/rulesets/demo.yaml",
        lambda rules: rules["base_models"][0]["sources"].append(f"path:{another['path']}"),
    )
    with_the_rules = finished.plan() - {("check_entry", entry) for entry in ENTRIES}
    assert with_the_rules == FINISH
    finished.edit_entry("raw", lambda entry: entry.update(base_model=another))
    plan = finished.plan()
    rules = {rule for rule, entry in plan if entry == "raw"}
    assert rules >= {"check_entry", "curate_dataset", "finetune", "build_package", "helm_open", "helm_closed"}
    assert {entry for rule, entry in plan if rule != "check_entry"} == {"raw", ""}


def test_a_removed_entry_file_costs_scoring_only_and_its_results_stay(finished: WorkingFolder) -> None:
    """| a removed entry file | score, report; its results stay, and hold if the file comes back |"""
    file = finished.path / DEMO_ENTRIES / "raw.yaml"
    text = file.read_text()
    file.unlink()
    assert finished.plan() == FINISH
    assert (finished.path / "results/laptop/raw/closed.json").exists()
    file.write_text(text)
    assert finished.plan() == set()


def test_what_was_deleted_after_its_use_is_not_made_again(finished: WorkingFolder) -> None:
    """| a dataset, adapter, package or source deleted after its use | nothing |"""
    entry = finished.path / "results/laptop/raw"
    for folder in ("dataset", "adapter", "package"):
        shutil.rmtree(entry / folder, ignore_errors=True)
    shutil.rmtree(finished.path / "resources/demo_sources")
    assert finished.plan() == set()


def test_what_was_deleted_is_made_again_where_a_change_needs_it(finished: WorkingFolder) -> None:
    """| the same, where a change needs it | it is made again first |"""
    shutil.rmtree(finished.path / "results/laptop/raw/dataset")
    finished.edit_entry("raw", lambda entry: entry["finetune"].update(learning_rate=5e-4))
    rules = {
        "curate_dataset",
        "measure_contamination",
        "finetune",
        "build_package",
        "helm_open",
        "helm_closed",
    }
    assert finished.plan() == {(rule, "raw") for rule in rules} | FINISH


def test_results_deleted_under_a_leaderboard_are_made_again(finished: WorkingFolder) -> None:
    """| all results of an entry deleted | all its steps; score, report |"""
    shutil.rmtree(finished.path / "results/laptop/untuned")
    rules = {"check_entry", "build_package", "helm_open", "helm_closed"}
    assert finished.plan() == {(rule, "untuned") for rule in rules} | FINISH


def test_what_was_made_from_another_dataset_is_made_again(finished: WorkingFolder) -> None:
    """
    | a record made from another one than the one that is there | it, and what follows; score, report |
    """
    record = finished.path / "results/laptop/raw/dataset/manifest.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"sha256": "of other rows"}))
    plan = finished.plan()
    assert {entry for _, entry in plan if entry} == {"raw"}
    assert ("finetune", "raw") in plan
    assert ("curate_dataset", "raw") not in plan


@pytest.mark.parametrize(
    ("recipe", "value", "first"), [("finetune", 5e-4, "finetune"), ("dataset", 5, "curate_dataset")]
)
@pytest.mark.parametrize("remembered", [False, True])
def test_a_recipe_re_runs_from_its_own_step_on(
    template: WorkingFolder, tmp_path: Path, recipe: str, value: float, first: str, *, remembered: bool
) -> None:
    """
    | an entry's `finetune` | its fine-tuning, package, both stages; score, report |
    | an entry's `dataset` | the same, from curation on, and its overlap |
    """
    shutil.copytree(template.path, tmp_path / "competition", symlinks=True)
    finished = WorkingFolder(tmp_path / "competition")
    if not remembered:
        forget(finished)
    key = "learning_rate" if recipe == "finetune" else "seed"
    finished.edit_entry("raw", lambda entry: entry[recipe].update({key: value}))
    plan = finished.plan()
    assert {entry for _, entry in plan if entry} == {"raw"}
    assert (first, "raw") in plan
    assert ("check_entry", "raw") not in plan
    assert (("curate_dataset", "raw") in plan) == (first == "curate_dataset")


def test_a_grant_of_a_fresh_start_re_runs_that_step(finished: WorkingFolder) -> None:
    """| a grant of `palio retry` | that step, and what reads its record; score, report |"""
    granted = finished.run("palio", "retry", "raw", "--step", "closed")
    assert granted.returncode == 0, granted.stderr
    assert finished.plan() == {("helm_closed", "raw")} | FINISH


def test_a_withdrawn_entry_costs_scoring_only(finished: WorkingFolder) -> None:
    """| `palio withdraw` | score, report |"""
    finished.run("palio", "withdraw", "raw", "--why", "asked to")
    assert finished.plan() == FINISH


def test_what_changes_no_content_re_runs_nothing(finished: WorkingFolder) -> None:
    """| comments, key order, profiles, `notify`, `shards`, times of files | nothing |"""
    rows = finished.path / "results/laptop/curated/dataset/train.parquet"
    os.utime(rows, (time.time() + 60, time.time() + 60))
    finished.edit_yaml("config/config.yaml", lambda config: config.update(notify="true", stalled_after="2h"))
    finished.edit_yaml("profiles/local/config.yaml", lambda profile: profile.update(cores=1))
    entry = finished.path / DEMO_ENTRIES / "curated.yaml"
    entry.write_text("# a comment\n" + entry.read_text())
    assert finished.plan() == set()


def test_a_site_is_published_and_nothing_else_is_made(finished: WorkingFolder) -> None:
    """| `site` | it is published |"""
    finished.edit_yaml("config/config.yaml", lambda config: config.update(site="public"))
    entries = ("curated", "open_only", "raw", "untuned")
    published = {("publish_standings", entry) for entry in entries} | {("publish_leaderboards", "")}
    assert finished.plan() == published | {("all", "")}


def test_snakemakes_own_report_has_leaderboards_figures_and_the_report(
    template: WorkingFolder, tmp_path: Path
) -> None:
    shutil.copytree(template.path, tmp_path / "competition", symlinks=True)
    done = WorkingFolder(tmp_path / "competition")
    (done.path / "results/leaderboard/laptop.csv").write_text("rank,entry\n1,curated\n")
    (done.path / "results/report/figures/laptop-open-vs-closed.svg").write_text("<svg/>")
    (done.path / "results/report/index.html").write_text("<p>the report</p>")
    made = done.snakemake("--report", "report.zip")
    assert made.returncode == 0, made.stderr
    with zipfile.ZipFile(done.path / "report.zip") as archive:
        names = {Path(name).name for name in archive.namelist()}
        assert names == {"report.html", "laptop.csv", "laptop-open-vs-closed.svg", "index.html"}
        (page,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith("report.html"))
    for category in ("Leaderboards", "Figures", "Report"):
        assert f'"{category}"' in page
