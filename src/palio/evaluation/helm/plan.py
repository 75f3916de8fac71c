"""Evaluation instances of a stage, from a dry run of HELM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from palio.errors import BadInput, Crashed
from palio.evaluation.helm.folder import RunFolder, run_folders, write_helm_folder
from palio.evaluation.helm.log import NETWORK_ERRORS, error_class, failed_download, log_error
from palio.evaluation.helm.process import run_helm
from palio.layout import HelmFolder


@dataclass(frozen=True)
class RunPlan:
    """What a run has to answer."""

    scenario: str
    run: str
    instances: tuple[tuple[str, str, str], ...]
    """id, input text, correct references joined by newlines; one per evaluation instance."""
    requests: int
    """At least one per instance; more where HELM perturbs inputs or asks for each choice."""


def plan_stage(
    folder: HelmFolder,
    stage_name: str,
    entries: Mapping[str, list[str]],
    data: Path,
    *,
    offline: bool = False,
) -> list[RunPlan]:
    """Let HELM make every evaluation instance of a stage without asking a model.

    Data that is not in the folder `data` is downloaded, unless `offline`.

    Raises:
        BadInput: HELM does not know a run entry or cannot make its instances.
        Crashed: HELM left out a scenario.
    """
    write_helm_folder(folder, entries, data)
    if run_helm(folder, threads=1, dry_run=True, offline=offline).code != 0:
        raise _failure(folder, stage_name, data)
    plans = [_run_plan(run) for run in run_folders(folder)]
    for plan in plans:
        if not plan.instances:
            why = "has no question in the split that its metrics look at"
            fix = "correct split or drop the run entry"
            raise BadInput(f"stages.{stage_name}.scenarios.{plan.scenario}", plan.run, why=why, fix=fix)
    planned = {plan.scenario for plan in plans}
    if missing := [name for name in entries if name not in planned]:
        raise Crashed(f"HELM planned no run for {', '.join(missing)}; see {folder.log}")
    return plans


def _failure(folder: HelmFolder, stage_name: str, data: Path) -> BadInput:
    error, scenarios = log_error(folder), f"stages.{stage_name}.scenarios"
    if NETWORK_ERRORS.search(error):
        why = f"its data is not in {data} and cannot be downloaded here"
        fix = (
            "run `palio fetch-data --stage"
            f" {stage_name}` where there is a network, or with --source and a folder of the files"
        )
        return BadInput(scenarios, failed_download(folder), why=why, fix=fix)
    shown = error if stage_name == "open" else error_class(error)
    return BadInput(scenarios, why=f"HELM cannot make the instances ({shown})", fix=f"see {folder.log}")


def _run_plan(run: RunFolder) -> RunPlan:
    states = run.read("scenario_state.json")["request_states"]
    instances = {}
    for state in states:
        instance = state["instance"]
        if not instance.get("perturbation"):
            references = [
                reference["output"]["text"]
                for reference in instance["references"]
                if "correct" in reference["tags"]
            ]
            instances[instance["id"]] = (instance["id"], instance["input"]["text"], "\n".join(references))
    return RunPlan(run.scenario, run.name, tuple(instances.values()), len(states))
