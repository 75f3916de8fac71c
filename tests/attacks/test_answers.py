"""Attacks by a reply's content: more than was asked for, numbers that break arithmetic, fields to fill a
disk, and what of the closed stage could leave through a statistic or a count."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from palio.config import load_competition
from palio.evaluation.evaluate import _only
from palio.evaluation.journal import Answer, Journal
from palio.evaluation.reply import Unanswered, as_number, checked_reply
from palio.records import Contained
from palio.settings import EvaluateSettings, StageRuns
from tests.support.folder import ROOT

BODY = {"prompt": "Siena?", "max_new_tokens": 2, "echo_prompt": False}
TOKEN = {"text": " yes", "logprob": -1.0}
REPLY: dict[str, Any] = {"text": " yes", "tokens": [TOKEN], "logprob": -1.0}


def test_a_reply_as_asked_for_is_kept_as_it_is() -> None:
    assert checked_reply(REPLY | {"request_time": 0.1}, BODY) == REPLY


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"tokens": [TOKEN] * 9}, "more tokens"),
        ({"tokens": [TOKEN] * 100_000}, "more tokens"),
        ({"text": "x" * 10_000}, "more characters"),
        ({"tokens": [{"text": "x" * 10_000, "logprob": 0}]}, "more characters"),
        ({"text": ["x"]}, "not a string"),
        ({"text": None}, "no text"),
    ],
)
def test_a_reply_that_is_not_what_was_asked_for_is_an_unanswered_question(
    change: dict[str, Any], line: str
) -> None:
    with pytest.raises(Unanswered, match=line):
        checked_reply(REPLY | change, BODY)


BAD_NUMBERS = [10**400, "1e9", True, None, [1], math.inf, math.nan]


@pytest.mark.parametrize("value", BAD_NUMBERS)
def test_a_number_that_is_none_is_missing_and_breaks_no_arithmetic(value: object) -> None:
    assert not math.isfinite(as_number(value))
    kept = checked_reply(
        {"text": " yes", "tokens": [{"text": " yes", "logprob": value}], "logprob": value}, BODY
    )
    assert kept["text"] == " yes"
    assert not math.isfinite(kept["logprob"] + kept["tokens"][0]["logprob"])
    assert json.loads(json.dumps(kept))["text"] == " yes"


@pytest.mark.parametrize("tokens", [[" yes"], {"text": 1}, 5, None, [{"text": 7, "logprob": 0}], [{}]])
def test_tokens_that_are_none_are_left_out(tokens: object) -> None:
    assert checked_reply(REPLY | {"tokens": tokens}, BODY) == REPLY | {"tokens": []}


@pytest.mark.parametrize(
    "change",
    [{"logprob": value} for value in BAD_NUMBERS]
    + [{"tokens": []}, {"tokens": [{"text": " yes", "logprob": math.nan}]}],
)
def test_where_choices_are_ranked_by_log_probabilities_they_must_be_numbers(change: dict[str, Any]) -> None:
    with pytest.raises(Unanswered, match="ranked by log-probabilities"):
        checked_reply(REPLY | change, BODY | {"echo_prompt": True})


def test_fields_that_nobody_asked_for_do_not_reach_the_journal() -> None:
    more = {
        "tokens": [TOKEN | {"id": 1, "secret": "x" * 1000}],
        "embedding": [0.0] * 1000,
        "prompt": "Siena?",
        "request_time": 50256,
    }
    assert checked_reply(REPLY | more, BODY) == REPLY


def test_an_echoed_prompt_has_its_own_tokens() -> None:
    echoed = REPLY | {"text": "Siena? yes", "tokens": [TOKEN] * 8}
    assert checked_reply(echoed, BODY | {"echo_prompt": True}) == echoed


def test_answers_are_kept_on_disk_and_not_in_memory(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "answers.jsonl")
    for number in range(50):
        journal.add(Answer(f"k{number}", False, REPLY | {"text": str(number)}))
    held = [value for value in vars(journal).values() if isinstance(value, dict)]
    assert all(isinstance(place, int) for values in held for place in values.values())
    for again in (journal, Journal(tmp_path / "answers.jsonl")):
        assert [again.reply(f"k{number}") for number in (0, 49)] == [
            REPLY | {"text": "0"},
            REPLY | {"text": "49"},
        ]
        assert again.reply("k50") is None


# --- the closed stage's side doors --------------------------------------------------------------------------


def test_only_configured_metrics_leave_the_closed_stage() -> None:
    competition = load_competition(ROOT / "config/config.yaml")
    runs = {
        stage: StageRuns(competition="demo", stage=stage, closed_store="private", scenarios={})
        for stage in ("open", "closed")
    }
    settings = {stage: EvaluateSettings.of_package(competition, runs[stage], "laptop") for stage in runs}
    assert settings["open"].metrics is None
    leaving = settings["closed"].metrics
    assert leaving == {"parity": ("exact_match",), "natural_reasoning": ("exact_set_match", "f1_set_match")}
    sent = [
        "logprob",
        "max_prob",
        "num_output_tokens",
        "num_completions",
        "exact_match",
        "finish_reason_stop",
    ]
    rows = [{"metric": metric, "value": 1.0} for metric in sent]
    assert [row["metric"] for row in _only(leaving["parity"], rows)] == ["exact_match"]


def test_counts_of_incidents_of_the_closed_stage_are_coarse() -> None:
    exact = Contained(counts={"a": 1, "b": 2, "c": 10, "d": 11, "e": 4711})
    assert exact.coarse().counts == {"a": 1, "b": 10, "c": 10, "d": 100, "e": 10_000}
    assert json.dumps(exact.coarse().counts)
