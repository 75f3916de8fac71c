"""A server that knows the answers of a prepared stage, from HELM's own plan of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from palio.layout import StageStore
from tests.support.toy import Toy

TAILS = (3000, 1500, 800, 400, 250, 150)
"""Ends of a prompt by which one is recognised that lost examples to the window."""


def knowing_server(store: StageStore) -> Toy:
    """Answers every prompt of a stage with what its scenario takes for right."""
    known: dict[str, str] = {}
    for path in sorted(Path(store.path).glob("helm/*/output/runs/*/*/scenario_state.json")):
        for state in json.loads(path.read_text())["request_states"]:
            prompt, answer = state["request"]["prompt"], right_answer(state)
            known[prompt] = answer
            known |= {prompt[-length:]: answer for length in TAILS if len(prompt) > length}

    def answer(prompt: str) -> str:
        ends = (prompt[-length:] for length in TAILS)
        return known.get(prompt) or next((known[end] for end in ends if end in known), "")

    return Toy(answer=answer)


def right_answer(state: dict[str, Any]) -> str:
    references = state["instance"]["references"]
    right = next(reference["output"]["text"] for reference in references if "correct" in reference["tags"])
    letters = state.get("output_mapping") or {}
    return next((letter for letter, text in letters.items() if text == right), right)


def ignorant_server() -> Toy:
    return Toy(answer=lambda prompt: "qqqq")
