"""Runs of several models as one suite of HELM, for its own viewer: `helm-summarize`, then `helm-server`.

runs/<suite>/<run>/         HELM's files of each run, its model renamed: all our runs have the same
schema.yaml                 scenarios and metrics, for `helm-summarize --schema-path`
config/model_metadata.yaml  the models, for `helm-summarize --local-path`
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from palio.config import Scenario
from palio.evaluation.helm.folder import GROUP_PREFIX, MODEL, RunFolder
from palio.files import link_or_copy
from palio.layout import HelmSuite
from palio.provenance import write_text

UNCHANGED = ("stats.json", "per_instance_stats.json", "scenario.json")
"""Files of a run that do not name its model."""


@dataclass(frozen=True)
class SuiteModel:
    """A model of the suite."""

    name: str
    """As HELM wants it: `organization/model`."""
    creator: str
    runs: list[RunFolder]


def write_suite(
    suite: HelmSuite, name: str, title: str, models: list[SuiteModel], scenarios: Mapping[str, Scenario]
) -> None:
    """Write the suite `name` with the runs of `models`; the files of a run are linked where they can be."""
    for model in models:
        for run in model.runs:
            _write_run(suite, name, run, model.name)
    write_text(suite.schema, yaml.safe_dump(schema(title, scenarios), sort_keys=False, allow_unicode=True))
    metadata = {"models": [_metadata(model) for model in models]}
    write_text(
        suite.config / "model_metadata.yaml", yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
    )


def _write_run(suite: HelmSuite, name: str, run: RunFolder, model: str) -> None:
    """Write a run whose model is called `model`; its folder is named like the run, as HELM looks for it."""
    renamed = run.spec["name"].replace(f"model={_in_name(MODEL)}", f"model={_in_name(model)}")
    folder = suite.run(name, renamed)
    groups = [GROUP_PREFIX + run.scenario]  # HELM's own are in no schema of ours
    spec = run.spec | {"name": renamed, "groups": groups, "adapter_spec": _adapter(run.spec, model)}
    write_text(folder / "run_spec.json", json.dumps(spec))
    state = json.loads((run.path / "scenario_state.json").read_text(encoding="utf-8"))
    state["adapter_spec"] = _adapter(state, model)
    for result in (request["result"] for request in state["request_states"]):
        if not result["completions"]:  # HELM shows the first of them
            result["completions"] = [_unanswered(result)]
    write_text(folder / "scenario_state.json", json.dumps(state))
    for file in UNCHANGED:
        link_or_copy(run.path / file, folder / file)


def _unanswered(result: Mapping[str, Any]) -> dict[str, Any]:
    return {"text": f"[unanswered: {result.get('error', '')}]", "logprob": 0.0, "tokens": []}


def _adapter(content: Mapping[str, Any], model: str) -> dict[str, Any]:
    return {**content["adapter_spec"], "model": model, "model_deployment": model}


def _in_name(model: str) -> str:
    return model.replace("/", "_")


def _metadata(model: SuiteModel) -> dict[str, Any]:
    return {
        "name": model.name,
        "display_name": model.name.partition("/")[2],
        "description": model.name,
        "creator_organization_name": model.creator,
        "access": "open",
        "release_date": datetime.date(2023, 6, 1),  # HELM wants one; its pages of runs show none
        "tags": [],
    }


def schema(title: str, scenarios: Mapping[str, Scenario]) -> dict[str, Any]:
    """Return HELM's schema: a table of each scenario with its columns, and one of their first columns."""
    columns = [metric for scenario in scenarios.values() for metric in scenario.metrics.values()]
    lower = {one.metric: one.higher_is_better is False for one in columns}
    perturbations = dict.fromkeys(one.perturbation for one in columns if one.perturbation)
    groups = [
        {
            **_named(GROUP_PREFIX + name, name),
            "description": name,
            "metric_groups": ["main", GROUP_PREFIX + name],
            "environment": _main(scenario),
            "category": "Scenarios",
        }
        for name, scenario in scenarios.items()
    ]
    return {
        "metrics": [
            {**_named(name), "description": name, "lower_is_better": is_lower}
            for name, is_lower in lower.items()
        ],
        "perturbations": [_named(name) for name in perturbations],
        "metric_groups": [
            {
                **_named("main", "First column"),
                "metrics": [{"name": "${main_name}", "split": "${main_split}"}],
            },
            *(
                {**_named(GROUP_PREFIX + name, name), "metrics": _matchers(scenario)}
                for name, scenario in scenarios.items()
            ),
        ],
        "run_groups": [
            {
                **_named("stage", title),
                "description": title,
                "category": "All scenarios",
                "subgroups": [group["name"] for group in groups],
            },
            *groups,
        ],
    }


def _named(name: str, shown: str | None = None) -> dict[str, Any]:
    return {"name": name, "display_name": name if shown is None else shown}


def _main(scenario: Scenario) -> dict[str, str]:
    first = next(iter(scenario.metrics.values()))
    return {"main_name": first.metric, "main_split": first.split}


def _matchers(scenario: Scenario) -> list[dict[str, str]]:
    return [
        {"name": one.metric, "split": one.split}
        | ({"perturbation_name": one.perturbation} if one.perturbation else {})
        for one in scenario.metrics.values()
    ]
