"""Decisions while jobs run and wait: an entry is edited while its job is queued, another is withdrawn."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.slurm import competition
from tests.slurm.cluster import Cluster
from tests.slurm.competition import controller, output
from tests.support.folder import WorkingFolder

ENTRIES = ("d1", "d2", "d3")
"""One more than the track has GPUs."""


@dataclass(frozen=True)
class Decided:
    folder: WorkingFolder
    queued: str
    """Entry whose job waited when its recipe was edited."""
    withdrawn: str
    said: str
    """What `palio withdraw` printed."""
    trainings: list[str]
    """Rule with wildcards of every fine-tuning job that was submitted."""
    status: str


@pytest.fixture(scope="module")
def decided(cluster: Cluster, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Decided:
    folder = competition.create(tmp_path_factory.mktemp("decided") / "competition", tiny)
    folder.edit_yaml(
        "config/config.yaml", lambda config: config["tracks"]["rtx4090"].update(training_budget="30s")
    )
    for entry in ENTRIES:
        competition.add_entry(folder, entry, "rtx4090", tiny, max_steps=100_000)
    competition.prepare_datasets(folder)
    known = set(cluster.jobs("%i"))

    def mine() -> dict[str, str]:
        """Entry -> state of its last training job."""
        lines = [line.split("|") for line in cluster.jobs("%i|%T|%k")]
        prefix = "rule_finetune_wildcards_rtx4090_"
        return {
            rule.removeprefix(prefix): state
            for job, state, rule in lines
            if job not in known and rule.startswith(prefix)
        }

    def waits() -> bool:
        return sorted(mine().values()) == ["PENDING", "RUNNING", "RUNNING"]

    targets = [f"results/rtx4090/{entry}/adapter.json" for entry in ENTRIES]
    with controller(folder, cluster, *targets) as snakemake:
        cluster.wait(waits, "two trainings and a queue", 1200)
        states = mine()
        queued = next(entry for entry, state in states.items() if state == "PENDING")
        withdrawn = next(entry for entry, state in states.items() if state == "RUNNING")
        folder.edit_entry(queued, lambda entry: entry["finetune"].update(learning_rate=7e-4))
        done = folder.run(
            "palio", "withdraw", withdrawn, "--why", "asked to", environment=cluster.environment
        )
        assert snakemake.wait(1500) != 0, "a withdrawn entry's step has not succeeded"
    lines = [line.split("|") for line in cluster.jobs("%i|%k")]
    trainings = [rule for job, rule in lines if job not in known and rule.startswith("rule_finetune_")]
    wide = cluster.environment | {"COLUMNS": "240"}
    status = folder.run("palio", "status", environment=wide).stdout
    return Decided(folder, queued, withdrawn, done.stdout, trainings, status)


def test_a_queued_job_runs_what_was_planned_and_the_edit_makes_it_due(decided: Decided) -> None:
    record = decided.folder.path / f"results/rtx4090/{decided.queued}/adapter.json"
    assert json.loads(record.read_text())["recipe"]["learning_rate"] == 1e-3, output(decided.folder)[-3000:]
    wrong = f"{decided.queued} finetune: made with recipe.learning_rate 0.001, the config says 0.0007"
    assert wrong in decided.status
    assert ("finetune", decided.queued) in decided.folder.plan(profile="slurm")


def test_a_withdrawn_entrys_job_is_cancelled_and_not_submitted_again(decided: Decided) -> None:
    assert "cancelled job" in decided.said
    of_withdrawn = f"rule_finetune_wildcards_rtx4090_{decided.withdrawn}"
    assert decided.trainings.count(of_withdrawn) == 1
    assert len(decided.trainings) == len(ENTRIES)
    assert decided.withdrawn not in {entry for _, entry in decided.folder.plan(profile="slurm")}
