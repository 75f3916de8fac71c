"""The probe against a small server: a report in order, deaths, silence, and the command. What it says of each
kind of server is in test_servers_of_2023."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from fastapi.responses import JSONResponse

from palio.cli import palio
from palio.config import Probe
from palio.evaluation import probe as probing
from palio.evaluation.probe import Asked, probe, probe_table
from palio.evaluation.window import Window
from palio.records import ProbeReport
from palio.serving.process import ServerProcess
from tests.support.toy import Toy, serving
from tests.support.training import tiny_base_model

ESTIMATE = Window.estimate("no model here")


def probed(toy: Toy, asked: Asked | None = None, settings: Probe | None = None) -> ProbeReport:
    with serving(toy):
        return probe(toy.base_url, asked or Asked(), ESTIMATE, settings, toy.alive)


def test_a_conforming_server_passes_every_check() -> None:
    report = probed(Toy())
    assert report.failed == []
    assert report.conforms
    assert report.projected_seconds is not None
    assert probe_table(report).row_count == len(report.checks)
    (unknown,) = (check for check in report.checks if check.state == "unknown")
    assert unknown.why == "cannot tell: the base model's tokenizer cannot be loaded here (no model here)"


def test_palios_own_server_passes_every_check(base_model: Path, tmp_path: Path) -> None:
    tiny = tiny_base_model(tmp_path / "tiny", tokenizer_of=base_model) / "model"
    ranking = Asked(
        kinds=[{"echo_prompt": True, "max_new_tokens": 0}, {"temperature": 0.3, "max_new_tokens": 9}]
    )
    with ServerProcess(tiny, log=tmp_path / "server.log", threads=1) as server:
        report = probe(server.base_url, ranking, Window.of_model(tiny))
    assert {check.state for check in report.checks} == {"pass"}
    assert all(
        check.required for check in report.checks if check.name in ("log_probabilities", "echo_prompt")
    )


@pytest.mark.parametrize(
    ("defect", "check", "fix"),
    [
        ("not JSON", "answers", "return a JSON object"),
        ("needs all fields", "missing_fields", "traceback is in the server's log"),
        ("refuses unknown fields", "unknown_fields", "give a default"),
        ("wrong sum", "log_probabilities", "and their sum"),
        ("never echoes", "echo_prompt", "echo only when it is true"),
        ("refuses null", "echo_prompt", "traceback is in the server's log"),
        ("samples at 0", "same_answer", "choose nothing at random"),
        ("fails on long prompts", "odd_prompts", "traceback is in the server's log"),
        ("fails in parallel", "parallel_requests", "traceback is in the server's log"),
        ("blocks", "blocking", "in a thread, or behind a queue"),
    ],
)
def test_a_defect_is_named_once_with_its_own_fix(defect: str, check: str, fix: str) -> None:
    report = probed(Toy(defect))
    failed = {done.name: done for done in report.checks if done.state == "fail"}
    assert check in failed
    assert fix in failed[check].fix
    assert failed[check].cost
    if defect != "fails in parallel":  # which shows at `speed` too
        assert list(failed) == [check]


@pytest.mark.parametrize(
    ("defect", "check"), [("decodes wrong", "decode(tokenize(text)) is"), ("", "counts 67")]
)
def test_a_tokenizer_that_disagrees_with_the_base_models_is_a_warning(
    base_model: Path, defect: str, check: str
) -> None:
    with serving(Toy(defect)) as toy:
        report = probe(toy.base_url, Asked(), Window.of_model(base_model))
    assert report.failed == ["tokenizer"]
    assert report.conforms
    assert "counts 67 tokens, the declared base model's tokenizer" in report.checks[-3].why


def test_the_stages_own_requests_are_asked() -> None:
    hot = {"temperature": 1.0, "max_new_tokens": 400, "stop_sequences": ["\n"]}
    report = probed(Toy("refuses temperature 1"), Asked(kinds=[{"max_new_tokens": 1}, hot]))
    assert report.failed == ["answers"]
    assert "HTTP 500 (with temperature=1.0, stop_sequences=['\\n'])" in report.checks[0].why
    assert not report.conforms
    assert probed(Toy("refuses temperature 1")).failed == [], "no question is asked like that"


def test_a_completion_that_goes_on_costs_points_where_it_is_not_cut() -> None:
    for cut, cost in (
        (True, "time: Palio cuts"),
        (False, "points: answers are scored with all that follows"),
    ):
        report = probed(Toy("ignores stops"), Asked(cut_at_stop_sequences=cut))
        assert report.failed == ["stop_sequences"]
        (stops,) = (check for check in report.checks if check.state == "fail")
        assert cost in stops.cost


def test_a_server_too_slow_for_the_stage_is_warned_with_the_projection() -> None:
    report = probed(Toy(seconds=0.05), Asked(requests=100_000, time_limit=60))
    assert report.failed == ["speed"]
    assert report.conforms, "the limit keeps what it answers"
    assert report.projected_seconds is not None
    assert report.projected_seconds > 60


def test_all_checks_run_until_the_server_dies() -> None:
    report = probed(Toy("dies after 10 requests"))
    assert report.died == "parallel_requests"
    assert not report.conforms
    states = [check.state for check in report.checks]
    assert states[:3] == ["pass", "pass", "fail"]
    assert set(states[3:]) == {"skipped"}
    assert report.checks[3].why == "nobody answers since parallel_requests"


def test_nobody_listening_is_a_failure_and_not_a_wait() -> None:
    started = time.monotonic()
    report = probe("http://127.0.0.1:9", Asked(), ESTIMATE)
    assert time.monotonic() - started < 10
    assert not report.conforms
    assert {check.state for check in report.checks[1:]} == {"skipped"}


def test_a_server_that_hangs_is_given_less_time_after_each_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "REPLY_SECONDS", 0.6)
    monkeypatch.setattr(probing, "IMPATIENT_SECONDS", 0.1)
    started = time.monotonic()
    report = probed(Toy(seconds=5))
    assert time.monotonic() - started < 12
    assert report.failed == ["answers"]
    assert report.checks[0].why == "/process gave no reply in 0.6 s"


def test_a_full_queue_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "BUSY_SECONDS", 0.05)
    assert probed(Toy(refuses=lambda number: number % 3 == 0, refusal=503)).conforms


@pytest.mark.parametrize("tokens", [5, "one", {"a": 1}, [1], [None], [{}], [[]]])
def test_tokens_may_be_anything(tokens: object, monkeypatch: pytest.MonkeyPatch) -> None:
    def reply(self: Toy, body: dict[str, Any], started: float, crowded: bool) -> JSONResponse:
        return JSONResponse({"text": "one two", "tokens": tokens, "logprob": tokens, "request_time": tokens})

    monkeypatch.setattr(Toy, "reply", reply)
    report = probed(Toy())
    assert report.conforms
    assert {"log_probabilities", "request_time"} <= set(report.failed)


def test_the_command_prints_a_table_for_people_and_json_for_machines() -> None:
    with serving(Toy("never echoes")) as toy:
        shown = CliRunner(env={"COLUMNS": "200"}).invoke(palio, ["probe", toy.base_url])
        asked = CliRunner().invoke(palio, ["probe", toy.base_url, "--json"])
    assert shown.exit_code == asked.exit_code == 3, "the demo requires it"
    assert "echo_prompt=True answered without the prompt" in shown.output
    report = json.loads(asked.output)
    (failed,) = [check for check in report["checks"] if check["state"] == "fail"]
    assert failed["name"] == "echo_prompt"
    assert report["planned_requests"] == 80
