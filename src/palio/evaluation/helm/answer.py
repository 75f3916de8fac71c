"""Questions and answers of HELM runs, from scenario_state.json and per_instance_stats.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from palio.evaluation.helm.folder import RunFolder
from palio.evaluation.helm.plan import prompt_of, variant
from palio.evaluation.helm.statistic import instance_statistics
from palio.evaluation.reply import request_key

Statistic = tuple[str, str, str | None]
"""HELM's metric, split, perturbation."""


@dataclass(frozen=True)
class Reference:
    """An answer that the question allows for."""

    text: str
    correct: bool
    label: str = ""
    """The letter that stands for it in the prompt of a multiple-choice question."""


@dataclass(frozen=True)
class Reply:
    """One request, and what came back."""

    variant: str
    """Perturbation and answer choice; empty for the plain question."""
    prompt: str
    text: str | None
    """The completion as HELM scored it; None: unanswered."""
    why: str = ""
    """Why it is unanswered."""
    cut: bool = False
    """The server went on behind a stop sequence, and the completion was cut there."""
    logprob: float | None = None
    """Log-probability, where choices are ranked by it."""


@dataclass(frozen=True)
class InstanceAnswer:
    """One question of a run as one entry answered it."""

    instance: str
    references: tuple[Reference, ...]
    replies: tuple[Reply, ...]
    values: Mapping[Statistic, float | None]
    """HELM's statistics of this instance."""


def instance_answers(run: RunFolder, cut: frozenset[str] = frozenset()) -> Iterator[InstanceAnswer]:
    """Yield every question of a complete run, in HELM's order.

    Args:
        cut: keys of the requests whose completions were cut (`request_key`).
    """
    states: dict[str, list[dict[str, Any]]] = {}
    for state in run.read("scenario_state.json")["request_states"]:
        states.setdefault(str(state["instance"]["id"]), []).append(state)
    values: dict[str, dict[Statistic, float | None]] = {}
    for row in instance_statistics(run):
        key = (row["metric"], row["split"], row["perturbation"])
        values.setdefault(row["instance"], {})[key] = row["value"]
    for instance, requests in states.items():
        plain = next((one for one in requests if not one["instance"].get("perturbation")), requests[0])
        yield InstanceAnswer(
            instance,
            _references(plain),
            tuple(_reply(state, cut) for state in requests),
            values.get(instance, {}),
        )


def _references(state: Mapping[str, Any]) -> tuple[Reference, ...]:
    labels = {text: label for label, text in (state.get("output_mapping") or {}).items()}
    return tuple(
        Reference(text, "correct" in reference["tags"], labels.get(text, ""))
        for reference in state["instance"]["references"]
        for text in [str(reference["output"]["text"])]
    )


def _reply(state: Mapping[str, Any], cut: frozenset[str]) -> Reply:
    request, result = state["request"], state["result"]
    if not result["success"]:
        return Reply(variant(state), prompt_of(state), None, str(result.get("error", "")))
    first: dict[str, Any] = result["completions"][0] if result["completions"] else {"text": ""}
    return Reply(
        variant(state),
        prompt_of(state),
        first["text"],
        cut=request_key(request) in cut,
        logprob=first.get("logprob") if request["echo_prompt"] else None,
    )
