"""The controller is killed with -9 while jobs run and wait, and the same command is typed again."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from palio.layout import EntryFolder
from palio.operating.attempt import Attempt, read_attempts
from palio.records import AdapterManifest, read_record
from palio.training.ledger import charged, read_ledger
from tests.slurm import competition
from tests.slurm.cluster import Cluster
from tests.slurm.competition import controller, fault_row, output
from tests.support.folder import WorkingFolder

pytestmark = pytest.mark.slow  # the night kills its controller, too, on steps that only write their records
ENTRIES = ("w1", "w2", "w3")
"""One more than the track has GPUs."""
BUDGET = 80
"""Seconds; trainings must still be running when the second controller starts, even on a busy machine."""


@dataclass
class Restart:
    folder: WorkingFolder
    queued: list[str]
    """State of each job when the controller was killed."""
    second: str
    """What a second controller said beside the first."""
    exit_code: int
    log: str
    """Of the run after the kill."""
    done_before: list[Attempt]
    """Attempts of the entry that was finished before."""
    seconds_to_cancel: float

    def attempts(self, entry: str, track: str = "rtx4090") -> list[Attempt]:
        attempts = read_attempts(EntryFolder.at(self.folder.path / "results" / track / entry))
        return [one for one in attempts if one.step == "finetune"]


@pytest.fixture(scope="module")
def restart(finished: Any, cluster: Cluster, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Restart:
    folder = competition.copy(finished.folder, tmp_path_factory.mktemp("restart") / "competition")
    folder.edit_yaml(
        "config/config.yaml",
        lambda config: config["tracks"]["rtx4090"].update(training_budget=f"{BUDGET}s"),
    )
    for entry in ENTRIES:
        competition.add_entry(folder, entry, "rtx4090", tiny, max_steps=100_000, save_steps=5)
    competition.prepare_datasets(folder)
    targets = [f"results/rtx4090/{entry}/adapter.json" for entry in ENTRIES]
    logs = [folder.path / "results" / "rtx4090" / entry / "logs" / "finetune.log" for entry in ENTRIES]

    def in_training() -> int:
        return sum(log.exists() and "step " in log.read_text() for log in logs)

    known = set(cluster.jobs("%i"))

    def mine() -> list[str]:
        lines = [line.split("|") for line in cluster.jobs("%i|%T|%k")]
        return [
            state for job, state, rule in lines if job not in known and "finetune_wildcards_rtx4090" in rule
        ]

    with controller(folder, cluster, *targets, "results/a100/tuned/adapter.json") as snakemake:
        cluster.wait(lambda: len(mine()) == 3, "two jobs and a queue", 1200)
        beside = folder.run("snakemake", "--profile", "slurm", *targets, environment=cluster.environment)
        cluster.wait(lambda: in_training() == 2, "two trainings", 1200)
        queued = mine()
        snakemake.kill()
        snakemake.wait()
    (folder.path / "snakemake.log").unlink()
    started = time.monotonic()
    with controller(folder, cluster, *targets, "results/a100/tuned/adapter.json") as snakemake:
        cluster.wait(lambda: "Execute " in output(folder), "the next run to submit", 1200)
        seconds = time.monotonic() - started
        exit_code = snakemake.wait(1500)
    done = [
        one
        for one in read_attempts(EntryFolder.at(folder.path / "results/a100/tuned"))
        if one.step == "finetune"
    ]
    assert beside.returncode != 0
    return Restart(folder, queued, beside.stderr, exit_code, output(folder), done, seconds)


def test_a_second_controller_beside_a_living_one_is_refused_by_name(restart: Restart) -> None:
    assert "another Snakemake is running in this folder: process" in restart.second
    again = "nothing: the second is refused, with the first one's host and process"
    fault_row("two controllers in one folder", "nothing", again, None)


def test_what_the_killed_controller_left_is_cancelled_before_anything_is_submitted(restart: Restart) -> None:
    assert sorted(restart.queued) == ["PENDING", "RUNNING", "RUNNING"]
    assert restart.exit_code == 0, restart.log[-5000:]
    assert restart.log.count("cancelling job") == 3
    assert restart.log.index("cancelling job") < restart.log.index("has been submitted")
    lost = "steps since the last checkpoint: none, the orphans were told to stop and saved"
    reran = "what ran or waited, inside its budget; finished steps stayed"
    fault = "controller killed with -9 while two jobs ran and one waited, same command typed again"
    fault_row(fault, lost, reran, restart.seconds_to_cancel)


def test_no_training_is_doubled_and_none_gets_a_second_budget(restart: Restart) -> None:
    twice = 0
    for entry in ENTRIES:
        attempts = restart.attempts(entry)
        twice += len(attempts) == 2
        for before, after in pairwise(attempts):
            assert before.run != after.run
            assert before.ended is not None, "the orphan was told to stop, and saved"
            assert before.ended <= after.started
        folder = restart.folder.path / "results" / "rtx4090" / entry
        (ledger,) = (folder / "work" / "train").glob("*/ledger.jsonl")
        used = charged(read_ledger(ledger))
        assert len(used) == len(attempts)
        assert sum(used.values()) <= BUDGET
        assert read_record(AdapterManifest, folder / "adapter.json").state == "budget_reached"
    assert twice == 2


def test_no_gpu_had_two_trainings_across_the_restart(restart: Restart) -> None:
    all_attempts = sorted(
        (one for entry in ENTRIES for one in restart.attempts(entry)), key=lambda one: one.started
    )
    for node in {one.node for one in all_attempts}:
        for before, after in pairwise(one for one in all_attempts if one.node == node):
            assert before.ended is not None
            assert before.ended <= after.started


def test_what_was_finished_stays_finished(restart: Restart) -> None:
    assert len(restart.done_before) == 1
