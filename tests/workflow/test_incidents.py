"""What goes wrong in the night, played by the real Snakemake on steps that only write records.

In the morning the same command is typed again, and what ran is what the config says.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest

from palio.layout import CONFIG, EntryFolder
from palio.operating.attempt import read_attempts
from palio.pipeline import steps_of
from palio.planning import made_of
from palio.provenance import fingerprint
from palio.workflow import Workflow
from tests.support.folder import DEMO_ENTRIES, WorkingFolder
from tests.support.quick import program, ran


class Competition(WorkingFolder):
    """A competition whose steps take no time."""

    environment: dict[str, str]

    def start(self, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        command = ["snakemake", "--profile", "local", "--cores", "4", *arguments]
        environment = self.environment | variables
        with (self.path / "snakemake.log").open("a") as log:
            return subprocess.Popen(
                command, cwd=self.path, env=environment, stdout=log, stderr=log, text=True
            )

    def live(self, *arguments: str, **variables: str) -> int:
        return self.start(*arguments, **variables).wait(1200)

    def log(self) -> str:
        return (self.path / "snakemake.log").read_text()

    def wait_for(self, controller: subprocess.Popen[str], *steps: tuple[str, str]) -> None:
        while not all(self.begun(*step) for step in steps):
            assert controller.poll() is None, self.log()[-3000:]
            time.sleep(0.1)

    def begun(self, entry: str, step: str) -> bool:
        return (self.path / "ran.jsonl").exists() and (entry, step) in ran(self.path)

    def assert_what_ran_is_what_the_config_says(self) -> None:
        with chdir(self.path):
            workflow = Workflow(CONFIG)
            for track, entries in workflow.active.items():
                for entry_id, entry in entries.items():
                    folder, planned = workflow.results.entry(track, entry_id), workflow.planned(entry_id)
                    for step in steps_of(entry):
                        made = made_of(step.record(folder))
                        assert made is not None, (entry_id, step.name)
                        wanted = fingerprint(step.settings.of(planned, step.name).decisive)
                        assert made.settings[step.name] == wanted, (entry_id, step.name)
            assert workflow.score_again(type("W", (), {"track": "laptop"})) == []


@pytest.fixture
def competition(tmp_path: Path) -> Competition:
    made = Competition.create(tmp_path / "competition")
    assert isinstance(made, Competition)
    object.__setattr__(made, "environment", program(tmp_path / "bin"))
    for entry in ("curated", "open_only"):
        (made.path / DEMO_ENTRIES / f"{entry}.yaml").unlink()
    return made


def faster(entry: dict[str, Any]) -> None:
    entry["finetune"]["learning_rate"] = 7e-4


def test_after_a_killed_controller_a_changed_recipe_is_trained_and_nothing_else_runs_twice(
    competition: Competition,
) -> None:
    """
    | kill the controller | its jobs on this machine end; `palio status` says that it was killed | SLURM
      jobs that it left are cancelled, and what is missing runs |
    """
    controller = competition.start(PALIO_SLOW="raw open 60")
    competition.wait_for(controller, ("raw", "open"), ("untuned", "closed"))
    controller.kill()
    controller.wait()
    before = Counter(ran(competition.path))
    status = competition.run("palio", "status", environment=competition.environment).stdout
    assert "last run was killed: process" in " ".join(status.split())
    competition.edit_entry("raw", faster)
    assert competition.live() == 0, competition.log()[-3000:]
    competition.assert_what_ran_is_what_the_config_says()
    again = set((Counter(ran(competition.path)) - before).elements())
    assert again >= {("raw", step) for step in ("finetune", "package", "open", "closed")}
    assert not again & {("raw", "check"), ("raw", "curate"), ("untuned", "package"), ("untuned", "open")}


def test_an_edit_in_mid_run_waits_for_the_next_start(competition: Competition) -> None:
    """
    | edit an entry, a rule set, a stage, a metric | nothing, queued jobs included; `palio status` shows
      what no longer holds | what the change makes due |
    """
    controller = competition.start(PALIO_SLOW="raw curate 5")
    competition.wait_for(controller, ("raw", "curate"))
    competition.edit_entry("raw", faster)
    assert controller.wait(1200) == 0
    status = competition.run("palio", "status", environment=competition.environment | {"COLUMNS": "240"})
    assert "made with recipe.learning_rate 0.002, the config says 0.0007" in status.stdout
    assert competition.live() == 0
    competition.assert_what_ran_is_what_the_config_says()
    assert Counter(ran(competition.path))["untuned", "open"] == 1


@pytest.mark.slow
def test_a_late_entry_a_removed_one_and_a_source_that_is_gone_wait_for_the_next_start(
    competition: Competition,
) -> None:
    """
    | add an entry file | nothing; the entry waits for the next run | its own chain |
    | remove an entry file | nothing: its jobs go on, and it is scored as planned | scored without it;
      its results stay |
    | remove a source that has been read | nothing; `palio status` warns | nothing, until its dataset
      must be made again: then `interrupted` |
    """
    entries = competition.path / DEMO_ENTRIES
    source = "resources/teams/rows.jsonl"
    (competition.path / source).parent.mkdir(parents=True)
    (competition.path / source).write_text('{"prompt": "1 + 1 =", "completion": "2"}\n')
    handed_in = {"path": source, "licence": "CC0-1.0", "generator": "palio demo-data"}
    competition.edit_entry("raw", lambda entry: entry["dataset"].update(sources=[handed_in]))
    controller = competition.start(PALIO_SLOW="raw finetune 15")
    competition.wait_for(controller, ("raw", "finetune"))
    text = (entries / "untuned.yaml").read_text()
    (entries / "late.yaml").write_text(text.replace("Tartuca", "Giraffa"))
    (entries / "untuned.yaml").unlink()
    (competition.path / source).unlink()
    status = competition.run(
        "palio", "status", environment=competition.environment | {"COLUMNS": "80"}
    ).stdout
    assert "late  0/4  check: waiting for the next run" in status
    assert f"raw: {source} no longer exists; what was made of it is kept" in " ".join(status.split())
    assert controller.wait(1200) == 0, competition.log()[-3000:]
    board = competition.path / "results/leaderboard/laptop.json"
    assert set(json.loads(board.read_text())["entries"]) == {"raw", "untuned"}
    before = Counter(ran(competition.path))
    assert competition.live() == 0, competition.log()[-3000:]
    again = set((Counter(ran(competition.path)) - before).elements())
    assert {entry for entry, _ in again} == {"late"}
    assert set(json.loads(board.read_text())["entries"]) == {"raw", "late"}
    assert (competition.path / "results/laptop/untuned/closed.json").exists()


def test_a_grant_takes_effect_on_the_next_start(competition: Competition) -> None:
    """
    | `palio retry ENTRY` | nothing | a fresh start of the step, always |
    """
    assert competition.live() == 0
    shutil.rmtree(competition.path / ".snakemake")
    before = Counter(ran(competition.path))
    competition.run("palio", "retry", "raw", "--step", "open", environment=competition.environment)
    assert competition.live() == 0
    assert set((Counter(ran(competition.path)) - before).elements()) == {("raw", "open")}


def test_a_rule_violation_costs_one_job(competition: Competition) -> None:
    assert competition.live("--retries", "2", PALIO_FAULTY="raw check") != 0
    folder = EntryFolder.at(competition.path / "results/laptop/raw")
    assert len(read_attempts(folder)) == 1
    assert "Trying to restart" not in competition.log()
    assert competition.begun("untuned", "closed")


@pytest.mark.slow
def test_a_broken_folder_of_one_entry_harms_nobody(competition: Competition) -> None:
    """
    | an entry's folder cannot be read or written | its job fails, the others go on | the entry is left
      out, with the reason, until the folder is mended |
    """
    controller = competition.start(PALIO_SLOW="raw curate 4")
    competition.wait_for(controller, ("raw", "curate"))
    folder = competition.path / "results/laptop/raw"
    shutil.move(folder, competition.path / "raw.away")
    folder.symlink_to("/proc/sys/kernel")  # nobody can write there
    assert controller.wait(1200) != 0
    assert competition.begun("untuned", "closed")
    (competition.path / "snakemake.log").unlink()
    assert competition.live() != 0
    assert "raw: its folder cannot be used" in competition.log()
    assert "Traceback" not in competition.log()
    folder.unlink()
    shutil.move(competition.path / "raw.away", folder)
    assert competition.live() == 0, competition.log()[-3000:]
    competition.assert_what_ran_is_what_the_config_says()


def test_a_failure_that_cannot_be_recorded_ends_nothing_but_its_entry(competition: Competition) -> None:
    """Killed twice, as where memory is short, and the disk of its folder is full."""
    folder = EntryFolder.at(competition.path / "results/laptop/raw")
    folder.work.mkdir(parents=True)
    folder.failures.symlink_to("/proc/sys/kernel")  # nobody can write there
    controller = competition.start("--retries", "2", PALIO_SLOW="raw finetune 60")
    for number in (1, 2):
        while len(trained := [one for one in read_attempts(folder) if one.step == "finetune"]) < number:
            assert controller.poll() is None, competition.log()[-3000:]
            time.sleep(0.1)
        os.kill(trained[-1].pid, signal.SIGKILL)
    assert controller.wait(1200) != 0
    assert competition.begun("untuned", "closed")
    assert "is not tried again, its records cannot be read or written" in competition.log()
    assert "Traceback" not in competition.log()


@pytest.mark.slow
def test_a_withdrawn_entry_ends_with_its_own_code_and_the_others_go_on(competition: Competition) -> None:
    """
    | `palio withdraw ENTRY` | cancels its SLURM jobs; prints how to end a step on this machine; its
      later steps end with code 10 | scored without it |
    """
    controller = competition.start("--retries", "2", PALIO_SLOW="raw curate 40")
    competition.wait_for(controller, ("raw", "curate"))
    command = ("palio", "withdraw", "raw", "--why", "asked to")
    said = competition.run(*command, environment=competition.environment).stdout
    assert "curate still runs; to end it: kill" in said
    assert controller.wait(1200) != 0
    assert not competition.begun("raw", "finetune")
    assert "raw was withdrawn: asked to" in competition.log()
    assert competition.begun("untuned", "closed")
    assert competition.live() == 0
    competition.assert_what_ran_is_what_the_config_says()


def test_what_a_failed_step_had_made_before_is_put_back(competition: Competition) -> None:
    assert competition.live() == 0
    record = competition.path / "results/laptop/raw/adapter.json"
    before = json.loads(record.read_text())
    original = (competition.path / "config/entries/demo/raw.yaml").read_text()
    competition.edit_entry("raw", faster)
    assert competition.live(PALIO_FAULTY="raw finetune") != 0
    assert json.loads(record.read_text()) == before
    (competition.path / "config/entries/demo/raw.yaml").write_text(original)
    assert competition.plan() == set(), "the change is taken back, and all holds"
