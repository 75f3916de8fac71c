"""A prepared open stage and HELM runs of it, as files: for readers of answers, without HELM or a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from palio.evaluation import helm
from palio.evaluation.stage import INSTANCE_TEXTS, PROMPT_TEXTS
from palio.layout import EntryFolder, HelmFolder, Stage, StageStore
from palio.provenance import write_json
from palio.records import PackageManifest, StageRecord, read_record

Replies = Callable[[str, int], str | None]
"""Scenario and number of a question -> the completion; None: unanswered."""


def question(scenario: str, number: int) -> str:
    return f"Question {number} of {scenario}: which letter comes after {chr(ord('a') + number % 25)}?"


def right(number: int) -> str:
    return chr(ord("b") + number % 25)


def leave_stage_store(store: StageStore, scenarios: dict[str, int], text: str | None = None) -> None:
    """Instances, prompts and plan of a stage with one HELM run and so many questions a scenario.

    With `text` every question is that.
    """
    store.path.mkdir(parents=True, exist_ok=True)
    asked = [(name, number) for name, count in scenarios.items() for number in range(count)]
    instances = [
        {
            "scenario": name,
            "run": name,
            "instance": f"id{number}",
            "text": text or question(name, number),
            "reference": right(number),
        }
        for name, number in asked
    ]
    prompts = [
        {
            "scenario": name,
            "run": name,
            "instance": f"id{number}",
            "variant": "",
            "prompt": text or prompt(name, number),
            "examples": 1,
        }
        for name, number in asked
    ]
    pq.write_table(pa.Table.from_pylist(instances, INSTANCE_TEXTS), store.instances)
    pq.write_table(pa.Table.from_pylist(prompts, PROMPT_TEXTS), store.prompts)
    runs = [
        {"scenario": name, "run": name, "instances": count, "requests": count}
        for name, count in scenarios.items()
    ]
    write_json(store.runs, {"entries": {}, "runs": runs, "kinds": []})


def prompt(scenario: str, number: int) -> str:
    return f"Question: an example?\nAnswer: yes\n\n{question(scenario, number)}\nAnswer:"


def leave_runs(folder: EntryFolder, stage: Stage, scenarios: dict[str, int], says: Replies) -> None:
    """HELM's runs of a stage that an entry has finished, where its record says that they are."""
    made = read_record(StageRecord, folder.stage_record(stage))
    package = read_record(PackageManifest, folder.package_manifest)
    served = (made.package_fingerprint, package.base_model_fingerprint, made.engine)
    asked = (made.instances_sha256, made.helm_version, made.cut_at_stop_sequences)
    runs = helm.package_folder(folder, stage, *served, *asked)
    for scenario, count in scenarios.items():
        _leave_run(runs, scenario, [says(scenario, number) for number in range(count)])


def _leave_run(runs: HelmFolder, scenario: str, completions: list[str | None]) -> None:
    at = runs.runs / f"{scenario}:max_eval_instances={len(completions)},model=palio_entry"
    write_json(at / "run_spec.json", _run_spec(scenario, len(completions)))
    write_json(at / "scenario.json", {})
    write_json(at / "stats.json", [])
    states = [_state(scenario, number, completion) for number, completion in enumerate(completions)]
    (at / "scenario_state.json").write_text(json.dumps({"request_states": states}))
    write_json(at / "per_instance_stats.json", [_statistics(*one) for one in enumerate(completions)])


def _run_spec(scenario: str, count: int) -> dict[str, Any]:
    return {
        "name": f"{scenario}:max_eval_instances={count},model=palio_entry",
        "groups": [f"palio_{scenario}"],
        "data_augmenter_spec": {"perturbation_specs": []},
    }


def _state(scenario: str, number: int, completion: str | None) -> dict[str, Any]:
    references = [(right(number), ["correct"]), (right(number + 1), [])]
    result: dict[str, Any] = {"success": True, "completions": [{"text": completion, "logprob": -1.0}]}
    if completion is None:
        result = {"success": False, "completions": [], "error": "HTTP 500"}
    return {
        "instance": {
            "id": f"id{number}",
            "input": {"text": question(scenario, number)},
            "references": [{"output": {"text": text}, "tags": tags} for text, tags in references],
        },
        "request": {
            "prompt": prompt(scenario, number),
            "temperature": 0.0,
            "num_completions": 1,
            "max_tokens": 5,
            "top_p": 1,
            "echo_prompt": False,
            "top_k_per_token": 1,
            "stop_sequences": ["\n"],
        },
        "result": result,
    }


def _statistics(number: int, completion: str | None) -> dict[str, Any]:
    value = float((completion or "").strip() == right(number))
    name = {"name": "em", "split": "test"}
    return {"instance_id": f"id{number}", "stats": [{"name": name, "mean": value}]}
