"""A server that knows the answers of a prepared stage, from HELM's own plan of it."""

from __future__ import annotations

import json
from typing import Any

from palio.layout import StageStore
from tests.support.toy import Toy


def knowing_server(store: StageStore) -> Toy:
    """Answers every prompt of a stage with what its scenario takes for right.

    A prompt that lost examples to the window is recognised by its question: what follows the last mark that
    begins one; a question that was cut, by its beginning.
    """
    known: dict[str, str] = {}
    marks: set[str] = set()
    for path in sorted(store.path.glob("helm/*/output/runs/*/*/scenario_state.json")):
        adapter = json.loads(path.with_name("run_spec.json").read_text())["adapter_spec"]
        mark = adapter["input_prefix"]
        marks |= {mark} - {""}
        for state in json.loads(path.read_text())["request_states"]:
            prompt, right = state["request"]["prompt"], right_answer(state)
            known[prompt] = right
            if mark:
                known[prompt.rpartition(mark)[2]] = right

    def answer(prompt: str) -> str:
        if prompt in known:
            return known[prompt]
        asked = [prompt.rpartition(mark)[2] for mark in marks if mark in prompt]
        whole = (known[question] for question in asked if question in known)
        cut = (of for text, of in known.items() for start in asked if text.startswith(start) and start)
        return next(whole, "") or next(cut, "")

    return Toy(answer=answer)


def right_answer(state: dict[str, Any]) -> str:
    references = state["instance"]["references"]
    right: str = next(
        reference["output"]["text"] for reference in references if "correct" in reference["tags"]
    )
    letters = state.get("output_mapping") or {}
    return next((letter for letter, text in letters.items() if text == right), right)


def ignorant_server() -> Toy:
    return Toy(answer=lambda prompt: "qqqq")
