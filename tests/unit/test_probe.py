"""Every check of the probe, against a small server with exactly that defect."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from palio.evaluation import probe as probing
from palio.evaluation.probe import probe, probe_table
from palio.serving.process import ServerProcess
from tests.support.toy import Toy, serving
from tests.support.training import tiny_base_model


def test_a_conforming_server_passes_every_check() -> None:
    with serving(Toy()) as toy:
        report = probe(toy.base_url, planned_requests=100, time_limit=3600)
    assert report.failed == []
    assert report.conforms
    assert report.projected_seconds is not None
    assert probe_table(report).row_count == len(report.checks)


def test_palios_own_server_passes_every_check(base_model: Path, tmp_path: Path) -> None:
    tiny = tiny_base_model(tmp_path / "tiny", tokenizer_of=base_model) / "model"
    with ServerProcess(tiny, log=tmp_path / "server.log", threads=1) as server:
        report = probe(server.base_url, planned_requests=100, time_limit=3600)
    assert report.failed == []


@pytest.mark.parametrize(
    ("defect", "check"),
    [
        ("needs all fields", "prompt alone"),
        ("not JSON", "prompt alone"),
        ("no tokens", "HELM's request"),
        ("refuses unknown fields", "unknown fields"),
        ("NaN", "finite numbers"),
        ("wrong sum", "finite numbers"),
        ("token id as time", "request_time"),
        ("never echoes", "echo_prompt"),
        ("refuses null", "echo_prompt"),
        ("samples at 0", "temperature 0"),
        ("refuses temperature 1", "temperature 1"),
        ("counts wrong", "max_new_tokens"),
        ("ignores stops", "stop sequences"),
        ("fails on long prompts", "long prompts"),
        ("dies on long prompts", "any prompt"),
        ("no decode", "decode"),
        ("decodes wrong", "decode"),
        ("does not truncate", "tokenize, truncated"),
        ("fails in parallel", "parallel requests"),
        ("blocks", "blocking"),
        ("dies after 3 requests", "finite numbers"),
    ],
)
def test_a_defect_is_named(defect: str, check: str) -> None:
    with serving(Toy(defect)) as toy:
        report = probe(toy.base_url, planned_requests=10, time_limit=3600)
    if defect in ("not JSON", "no tokens", "fails in parallel") or defect.startswith("dies"):
        assert report.failed[0] == check  # what follows fails with it
    else:
        assert report.failed == [check]
    required = {found.name: found.required for found in report.checks}
    assert report.conforms == (not required[check])
    assert all(found.fix for found in report.checks if found.state == "fail")


def test_a_server_too_slow_for_the_stage_is_warned_with_the_projection() -> None:
    with serving(Toy(seconds=0.05)) as toy:
        report = probe(toy.base_url, planned_requests=100_000, time_limit=60)
    assert report.failed == ["speed"]
    assert report.conforms, "the limit keeps what it answers"
    assert report.projected_seconds is not None
    assert report.projected_seconds > 60


def test_nobody_listening_is_a_failure_and_not_a_wait() -> None:
    started = time.monotonic()
    report = probe("http://127.0.0.1:9", planned_requests=1, time_limit=60)
    assert time.monotonic() - started < 10
    assert not report.conforms
    assert {check.state for check in report.checks[2:]} == {"skipped"}


def test_a_server_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "REPLY_SECONDS", 0.3)
    with serving(Toy(seconds=0.6)) as toy:
        report = probe(toy.base_url, planned_requests=1, time_limit=60)
    assert report.checks[0].state == "fail"
    assert "no reply" in report.checks[0].why


def test_the_command_prints_a_table_for_people_and_json_for_machines() -> None:
    from palio.cli import palio

    with serving(Toy("no decode")) as toy:
        shown = CliRunner(env={"COLUMNS": "200"}).invoke(palio, ["probe", toy.base_url])
        asked = CliRunner().invoke(palio, ["probe", toy.base_url, "--json"])
    assert shown.exit_code == asked.exit_code == 3
    assert "/decode answered HTTP 404" in shown.output
    report = json.loads(asked.output)
    (failed,) = [check for check in report["checks"] if check["state"] == "fail"]
    assert failed["name"] == "decode"
    assert report["planned_requests"] == 80
