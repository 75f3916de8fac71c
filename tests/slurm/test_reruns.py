"""Changes in a finished competition, played by the real executor: what runs again, and what stays.

tests/workflow/test_reruns.py asks the same of plans, one change at a time; here three meet in one run.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.slurm import competition
from tests.slurm.cluster import Cluster
from tests.slurm.competition import controller, output
from tests.support.folder import ROOT, WorkingFolder

pytestmark = pytest.mark.slow  # the plans of each change alone, in tests/workflow, are made in every run
KEPT = ("tuned", "other")
"""Trained entries to which nothing happened."""


@dataclass(frozen=True)
class Changed:
    """After the run in which a step failed, and a scenario and the code were changed."""

    folder: WorkingFolder
    exit_code: int
    ran: set[str]
    """Rule with wildcards of every job."""
    before: dict[str, bytes]
    """Adapter records of the kept entries before."""

    def of(self, rule: str) -> set[str]:
        prefix = f"rule_{rule}_wildcards_"
        return {one.removeprefix(prefix) for one in self.ran if one.startswith(prefix)}

    def run_record(self, entry: str, step: str) -> dict[str, Any]:
        (path,) = (self.folder.path / "results").glob(f"*/{entry}/{step}.run.json")
        found: dict[str, Any] = json.loads(path.read_text())
        return found


def adapters(folder: WorkingFolder) -> dict[str, bytes]:
    results = folder.path / "results"
    return {entry: next(results.glob(f"*/{entry}/adapter.json")).read_bytes() for entry in KEPT}


@pytest.fixture(scope="module")
def changed(finished: Any, cluster: Cluster, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Changed:
    folder = competition.copy(finished.folder, tmp_path_factory.mktemp("changed") / "competition")
    for step in ("open", "closed"):  # the open stage of one entry failed
        (folder.path / f"results/a100/plain/{step}.json").unlink()

    def one_question_more(config: dict[str, Any]) -> None:
        (scenario,) = config["stages"]["closed"]["scenarios"].values()
        scenario["max_eval_instances"] += 1

    folder.edit_yaml("config/config.yaml", one_question_more)
    code = tmp_path_factory.mktemp("code") / "src"
    shutil.copytree(ROOT / "src", code)
    with (code / "palio/training/trainer.py").open("a") as trainer:
        trainer.write("# rewritten, same recipe\n")
    before, known = adapters(folder), set(cluster.jobs("%i"))
    with controller(folder, cluster, PYTHONPATH=str(code)) as snakemake:
        exit_code = snakemake.wait(1500)
    jobs = [line.split("|") for line in cluster.jobs("%i|%k")]
    return Changed(folder, exit_code, {rule for job, rule in jobs if job not in known}, before)


def test_a_failed_step_alone_runs_again_with_what_depends_on_it(changed: Changed) -> None:
    assert changed.exit_code == 0, output(changed.folder)[-5000:]
    assert changed.of("helm_open") == {"a100_plain"}
    assert changed.of("score") == {"a100", "rtx4090"}


def test_a_closed_scenario_re_evaluates_the_closed_stage_of_all_and_nothing_before_it(
    changed: Changed,
) -> None:
    assert changed.of("prepare_stage") == {"closed"}
    assert changed.of("helm_closed") == {"a100_plain", "a100_tuned", "rtx4090_other"}
    assert changed.of("measure_contamination") == {"a100_tuned", "rtx4090_other"}


def test_other_code_of_the_same_recipe_retrains_nothing_and_is_on_record(changed: Changed) -> None:
    assert not changed.of("finetune") | changed.of("curate_dataset")
    assert adapters(changed.folder) == changed.before
    for entry in KEPT:
        trained, evaluated = (changed.run_record(entry, step) for step in ("finetune", "closed"))
        assert trained["code_sha256"] != evaluated["code_sha256"]
