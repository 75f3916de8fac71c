"""The demo's sources: right where they say so, noisy as documented, disjoint from HELM's instances."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from palio.demo.data import FAMILIES, REFUSALS, solve, write_demo_sources
from tests.support.curation import demo_lines, plain

SEED = 7


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sources")
    write_demo_sources(out, seed=SEED)
    return out


def helm_instances(family: str) -> list[tuple[str, str, str]]:
    """Split, input and reference of everything the family's HELM scenario can draw from."""
    from helm.benchmark.scenarios.simple_scenarios import SimpleClassificationScenario
    from helm.benchmark.scenarios.synthetic_reasoning_natural_scenario import SRNScenario
    from helm.benchmark.scenarios.synthetic_reasoning_scenario import SyntheticReasoningScenario

    scenario = {
        "pattern_match": lambda: SyntheticReasoningScenario(mode="pattern_match"),
        "variable_substitution": lambda: SyntheticReasoningScenario(mode="variable_substitution"),
        "parity": SimpleClassificationScenario,
        "natural_reasoning": lambda: SRNScenario(difficulty="easy"),
    }[family]()
    return [
        (instance.split, instance.input.text, instance.first_correct_reference.output.text)
        for instance in scenario.get_instances("")
    ]


AS_ADAPTED = {  # an instance's input as HELM's adapter writes the last question
    "pattern_match": "{}\nTarget:",
    "variable_substitution": "{}\nTarget:",
    "parity": "Number: {}\nParity:",
    "natural_reasoning": "Rules:\n{}\n",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_solving_helms_own_instances_gives_helms_references(family: str) -> None:
    """The truth that curation is measured with, against answers that are not ours."""
    instances = helm_instances(family)[:3000]
    wrong = [
        (text, reference)
        for _, text, reference in instances
        if _shape(solve(family, AS_ADAPTED[family].format(text))) != _shape(reference)
    ]
    assert not wrong


def _shape(answer: str) -> str:
    """Several of HELM's patterns can match one result; they then differ in the names of X, Y and Z alone."""
    return re.sub(r"[XYZ]( [XYZ])*", "?", answer.strip())


@pytest.mark.parametrize("family", FAMILIES)
def test_no_question_is_one_of_helms(family: str, sources: Path) -> None:
    def normalised(text: str) -> str:
        return " ".join(text.lower().split())

    theirs = [
        AS_ADAPTED[family].format(text) for split, text, _ in helm_instances(family) if split != "train"
    ]
    assert len(theirs) >= 79
    ours = "\n\n".join(normalised(plain(line["prompt"])) for line in demo_lines(sources, family))
    assert not [text for text in theirs if normalised(text) in ours]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_share_of_wrong_answers_is_the_documented_one(family: str, sources: Path) -> None:
    lines = demo_lines(sources, family)
    refusals = sum(line["completion"].strip() in REFUSALS for line in lines)
    wrong = (
        sum(plain(line["completion"]) != solve(family, plain(line["prompt"])) for line in lines) - refusals
    )
    assert 0.22 < wrong / len(lines) < 0.37
    assert 0.01 < refusals / len(lines) < 0.06


def test_equal_seeds_give_equal_files_and_another_seed_other_ones(sources: Path, tmp_path: Path) -> None:
    write_demo_sources(tmp_path / "same", seed=SEED)
    write_demo_sources(tmp_path / "other", seed=SEED + 1)
    for family in FAMILIES:
        text = (sources / f"{family}.jsonl").read_text()
        assert (tmp_path / "same" / f"{family}.jsonl").read_text() == text
        assert (tmp_path / "other" / f"{family}.jsonl").read_text() != text


def test_prompts_have_the_form_of_helms_adapter(sources: Path) -> None:
    from helm.benchmark.adaptation.adapter_spec import AdapterSpec
    from helm.benchmark.run_specs.classic_run_specs import (
        get_synthetic_reasoning_natural_spec,
        get_synthetic_reasoning_spec,
    )
    from helm.benchmark.run_specs.simple_run_specs import get_simple_classification_run_spec

    adapters: dict[str, AdapterSpec] = {
        "pattern_match": get_synthetic_reasoning_spec("pattern_match").adapter_spec,
        "variable_substitution": get_synthetic_reasoning_spec("variable_substitution").adapter_spec,
        "parity": get_simple_classification_run_spec().adapter_spec,
        "natural_reasoning": get_synthetic_reasoning_natural_spec("easy").adapter_spec,
    }
    for family, adapter in adapters.items():
        for line in demo_lines(sources, family):
            prompt = plain(line["prompt"])
            begin = adapter.instructions + adapter.instance_prefix + adapter.input_prefix
            assert prompt.lower().startswith(begin.lower())
            assert prompt.endswith(adapter.output_prefix.rstrip() or adapter.input_suffix)
    assert json.loads((sources / "parity.jsonl").open().readline())["completion"].startswith(" ")
