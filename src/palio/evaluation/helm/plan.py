"""Evaluation instances of a stage, from a dry run of HELM."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from palio.errors import BadInput, Crashed
from palio.evaluation.helm.folder import CONTEXT_TOKENS, RunFolder, run_folders, write_helm_folder
from palio.evaluation.helm.log import (
    NETWORK_ERRORS,
    failed_download,
    first_failed,
    log_error,
    public_error,
)
from palio.evaluation.helm.process import run_helm
from palio.evaluation.reply import request_body
from palio.layout import HelmFolder
from palio.provenance import canonical_json
from palio.records import ScenarioCounts

MULTIPLE_CHOICE = "multiple_choice_joint"
TAIL_CHARACTERS = 60
"""End of a prompt by which a cut one is told: HELM drops examples first, then cuts from the right."""


@dataclass(frozen=True)
class PlannedPrompt:
    """One request, as it is before a model's window is known."""

    instance: str
    variant: str
    """Which of an instance's requests it is: perturbation and answer choice."""
    prompt: str
    examples: int
    """Examples shown in it."""


@dataclass(frozen=True)
class RunPlan:
    """What a run has to answer."""

    scenario: str
    run: str
    asked: int
    """Questions that the run entry asks for."""
    examples_asked: int
    window: int
    """Tokens left for a prompt in the competition's context: without the completion."""
    instances: tuple[tuple[str, str, str], ...]
    """id, input text, correct references joined by newlines; one per evaluation instance."""
    labels: Counter[int]
    """Instances by the position of their correct answer, of a multiple-choice run."""
    prompts: tuple[PlannedPrompt, ...]
    """At least one per instance; more where HELM perturbs inputs or asks for each choice."""
    kinds: tuple[dict[str, Any], ...]
    """How it asks: bodies to /process without the prompt, each once."""

    @property
    def requests(self) -> int:
        return len(self.prompts)


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
    shown = error if stage_name == "open" else public_error(error)
    why = f"HELM cannot make the instances ({shown})"
    return BadInput(scenarios, first_failed(folder), why=why, fix=f"see {folder.log}")


def _run_plan(run: RunFolder) -> RunPlan:
    states = run.read("scenario_state.json")["request_states"]
    adapter = run.spec["adapter_spec"]
    instances = {}
    labels: Counter[int] = Counter()
    for state in states:
        instance = state["instance"]
        if not instance.get("perturbation") and instance["id"] not in instances:
            correct = [place for place, of in enumerate(instance["references"]) if "correct" in of["tags"]]
            references = [instance["references"][place]["output"]["text"] for place in correct]
            instances[instance["id"]] = (instance["id"], instance["input"]["text"], "\n".join(references))
            labels.update(correct[:1])
    return RunPlan(
        scenario=run.scenario,
        run=run.name,
        asked=int(adapter["max_eval_instances"] or 0),
        examples_asked=int(adapter["max_train_instances"]),
        window=CONTEXT_TOKENS - int(adapter["max_tokens"]),
        instances=tuple(instances.values()),
        labels=labels if adapter["method"] == MULTIPLE_CHOICE else Counter(),
        prompts=tuple(
            PlannedPrompt(state["instance"]["id"], variant(state), prompt_of(state), examples(state, adapter))
            for state in states
        ),
        kinds=distinct(request_body(state["request"]) for state in states),
    )


def distinct(bodies: Iterable[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    """Return bodies to /process without their prompts, each once, in a fixed order."""
    kinds = {canonical_json({**body, "prompt": ""}) for body in bodies}
    return tuple(
        {key: value for key, value in json.loads(kind).items() if key != "prompt"} for kind in sorted(kinds)
    )


def prompt_of(state: Mapping[str, Any]) -> str:
    return str(state["request"]["prompt"])


def question_kept(sent: str, whole: str) -> bool:
    """Return whether a prompt that was shortened to `sent` has lost examples only."""
    return sent.endswith(whole[-TAIL_CHARACTERS:])


def variant(state: Mapping[str, Any]) -> str:
    """Return which of an instance's requests this is: perturbation and answer choice."""
    perturbation = state["instance"].get("perturbation") or {}
    described = [f"{key}={perturbation[key]}" for key in sorted(perturbation)]
    return ",".join(
        [*described, *([f"choice={c}"] if (c := state.get("reference_index")) is not None else [])]
    )


def examples(state: Mapping[str, Any], adapter: Mapping[str, Any]) -> int:
    """Return how many examples a prompt shows, by the marks that begin each question in it."""
    mark = (
        f"{adapter['instance_prefix']}{adapter['input_prefix']}".strip() or adapter["output_prefix"].strip()
    )
    asked = int(adapter["max_train_instances"])
    return min(asked, max(0, prompt_of(state).count(mark) - 1)) if mark else asked


def scenario_counts(plans: Sequence[RunPlan]) -> dict[str, ScenarioCounts]:
    """Count what was made against what was asked for, by scenario. No text is in it."""
    return {
        name: _counts([plan for plan in plans if plan.scenario == name])
        for name in sorted({plan.scenario for plan in plans})
    }


def _counts(plans: Sequence[RunPlan]) -> ScenarioCounts:
    shown = [prompt.examples for plan in plans for prompt in plan.prompts]
    short = [prompt.examples < plan.examples_asked for plan in plans for prompt in plan.prompts]
    words = [len(prompt.prompt.split()) for plan in plans for prompt in plan.prompts]
    labels = sum((plan.labels for plan in plans), Counter())
    return ScenarioCounts(
        asked=sum(plan.asked for plan in plans),
        prepared=sum(len(plan.instances) for plan in plans),
        requests=sum(plan.requests for plan in plans),
        examples_asked=max(plan.examples_asked for plan in plans),
        examples_min=min(shown),
        examples_median=median(shown),
        prompts_short_of_examples=sum(short),
        prompts_without_examples=sum(
            not prompt.examples for plan in plans if plan.examples_asked for prompt in plan.prompts
        ),
        longest_prompt_words=max(words),
        window_tokens=min(plan.window for plan in plans),
        prompts_over_window=sum(_over(plan) for plan in plans),
        labels={chr(ord("A") + place): count for place, count in sorted(labels.items())},
        constant_answer=round(max(labels.values()) / labels.total(), 4) if labels else None,
    )


def _over(plan: RunPlan) -> int:
    """Prompts that no tokenizer gets into the window: it makes at least a token of each word."""
    return sum(len(prompt.prompt.split()) > plan.window for prompt in plan.prompts)


def planned_prompts(plans: Sequence[RunPlan]) -> Iterator[dict[str, Any]]:
    """Yield a row per request: scenario, run, instance, variant, prompt, examples."""
    for plan in plans:
        for prompt in plan.prompts:
            yield {"scenario": plan.scenario, "run": plan.run, **prompt.__dict__}
