"""HELM 0.5.16 as a subprocess, and the files it leaves. Only this, `client` and `scenarios` know its inside.

A stage is one `helm-run`. Each run entry carries its own `max_eval_instances` and, as a HELM group, the
name of our scenario, so every scenario has its own budget and every run tells its scenario.

    registry    what the installed HELM knows: run specs, metrics and their directions
    run_entry   run-entries files, and the questions each run entry gets
    folder      the files we write for `helm-run`, and the run folders it writes
    process     `helm-run` itself
    log         errors in HELM's log
    statistic   values of a finished run
    answer      its questions and answers, for people
    plan        evaluation instances, from a dry run
    suite       finished runs of several entries, for HELM's own viewer

Names, files and fields follow the sources of crfm-helm 0.5.16, the release that pyproject.toml pins.
"""

from palio.evaluation.helm.answer import InstanceAnswer, Reference, Reply, instance_answers
from palio.evaluation.helm.folder import (
    MODEL,
    RequestSettings,
    RunFolder,
    package_folder,
    run_folders,
    write_helm_folder,
)
from palio.evaluation.helm.log import log_error, printed, public_error
from palio.evaluation.helm.plan import (
    distinct,
    plan_stage,
    planned_prompts,
    prompt_of,
    question_kept,
    scenario_counts,
    variant,
)
from palio.evaluation.helm.process import HelmExit, run_helm
from palio.evaluation.helm.registry import check_directions, helm_version, metric_directions
from palio.evaluation.helm.run_entry import (
    asked_of_runs,
    budgets,
    run_entries,
    shares,
    stage_entries,
    stage_runs,
)
from palio.evaluation.helm.statistic import instance_statistics, statistics
from palio.evaluation.helm.suite import SuiteModel, write_suite

__all__ = [
    "MODEL",
    "HelmExit",
    "InstanceAnswer",
    "Reference",
    "Reply",
    "RequestSettings",
    "RunFolder",
    "SuiteModel",
    "asked_of_runs",
    "budgets",
    "check_directions",
    "distinct",
    "helm_version",
    "instance_answers",
    "instance_statistics",
    "log_error",
    "metric_directions",
    "package_folder",
    "plan_stage",
    "planned_prompts",
    "printed",
    "prompt_of",
    "public_error",
    "question_kept",
    "run_entries",
    "run_folders",
    "run_helm",
    "scenario_counts",
    "shares",
    "stage_entries",
    "stage_runs",
    "statistics",
    "variant",
    "write_helm_folder",
    "write_suite",
]
