"""Every check of the probe, against a small server with exactly that defect."""

from __future__ import annotations

import json
import math
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from palio.evaluation import probe as probing
from palio.evaluation.probe import probe, probe_table

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]


class Toy:
    """A conforming server that counts in words; `defect` breaks one thing."""

    def __init__(self, defect: str = "") -> None:
        self.defect = defect
        self.lock = threading.Lock()
        self.served = 0
        self.in_flight = 0
        self.app = FastAPI()
        self.app.post("/process")(self.process)
        self.app.post("/tokenize")(self.tokenize)
        if defect != "no decode":
            self.app.post("/decode")(self.decode)

    def process(self, body: dict[str, Any]) -> Response:
        started = time.monotonic()
        with self.lock:
            self.served += 1
            self.in_flight += 1
            crowded = self.in_flight > 1
        try:
            if crowded or self.defect == "fails in parallel":
                time.sleep(0.02)
            return self.reply(body, started, self.in_flight > 1)
        finally:
            with self.lock:
                self.in_flight -= 1

    def refused(self, body: dict[str, Any], crowded: bool) -> bool:
        return {
            "needs all fields": "echo_prompt" not in body,
            "refuses unknown fields": "field_of_a_later_version" in body,
            "refuses null": body.get("echo_prompt", False) is None,
            "dies on long prompts": len(body["prompt"].split()) > 2040,
            "refuses temperature 1": body.get("temperature") == 1.0,
            "dies after 3 requests": self.served > 3,
            "fails in parallel": crowded,
        }.get(self.defect, False)

    def reply(self, body: dict[str, Any], started: float, crowded: bool) -> Response:
        defect, prompt = self.defect, body["prompt"]
        if defect == "not JSON":
            return Response("ok")
        if self.refused(body, crowded):
            return JSONResponse({}, 500)
        if defect == "slow":
            time.sleep(0.05)
        n = body.get("max_new_tokens", 8) + (1 if defect == "counts wrong" else 0)
        start = random.randrange(12) if defect == "samples at 0" else 0
        words = [WORDS[(start + i) % 12] for i in range(n)]
        text = " ".join(words)
        for stop in body.get("stop_sequences", []):
            if defect != "ignores stops":
                text = text.partition(stop)[0]
        tokens: list[dict[str, Any]] = [{"text": word, "logprob": -0.5} for word in text.split()]
        total = -0.5 * len(tokens) - (3 if defect == "wrong sum" else 0)
        if body.get("echo_prompt") and defect != "never echoes":
            text = prompt + " " + text
        content = {
            "text": text,
            "tokens": tokens,
            "logprob": total,
            "request_time": 50256 if defect == "token id as time" else time.monotonic() - started,
        }
        if defect == "no tokens":
            del content["tokens"]
        if defect == "NaN":  # json.dumps writes it bare, as the servers of 2023 did
            return Response(json.dumps(content | {"logprob": math.nan}), media_type="application/json")
        return JSONResponse(content)

    def tokenize(self, body: dict[str, Any]) -> dict[str, Any]:
        tokens = [ord(letter) for letter in body["text"]]
        if body["truncation"] and self.defect != "does not truncate":
            tokens = tokens[: body["max_length"]]
        return {"tokens": tokens, "request_time": 0.0}

    def decode(self, body: dict[str, Any]) -> dict[str, Any]:
        shift = 1 if self.defect == "decodes wrong" else 0
        return {"text": "".join(chr(token + shift) for token in body["tokens"]), "request_time": 0.0}


@contextmanager
def serving(toy: Toy) -> Iterator[str]:
    server = uvicorn.Server(uvicorn.Config(toy.app, host="127.0.0.1", port=0, log_level="critical"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(5)


def test_a_conforming_server_passes_every_check() -> None:
    with serving(Toy()) as url:
        report = probe(url, planned_requests=100, time_limit=3600)
    assert report.failed == []
    assert report.conforms
    assert report.projected_seconds is not None
    assert probe_table(report).row_count == len(report.checks)


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
        ("dies on long prompts", "any prompt"),
        ("no decode", "decode"),
        ("decodes wrong", "decode"),
        ("does not truncate", "tokenize, truncated"),
        ("fails in parallel", "parallel requests"),
        ("dies after 3 requests", "finite numbers"),
    ],
)
def test_a_defect_is_named(defect: str, check: str) -> None:
    with serving(Toy(defect)) as url:
        report = probe(url, planned_requests=10, time_limit=3600)
    if defect in ("not JSON", "no tokens", "dies after 3 requests", "fails in parallel"):
        assert report.failed[0] == check  # what follows fails with it
    else:
        assert report.failed == [check]
    required = {found.name: found.required for found in report.checks}
    assert report.conforms == (not required[check])
    assert all(found.fix for found in report.checks if found.state == "fail")


def test_a_server_too_slow_for_the_stage_fails_with_the_projection() -> None:
    with serving(Toy("slow")) as url:
        report = probe(url, planned_requests=100_000, time_limit=60)
    assert report.failed == ["speed"]
    assert report.projected_seconds is not None
    assert report.projected_seconds > 60


def test_nobody_listening_is_a_failure_and_not_a_wait() -> None:
    started = time.monotonic()
    report = probe("http://127.0.0.1:9", planned_requests=1, time_limit=60)
    assert time.monotonic() - started < 10
    assert not report.conforms
    assert {check.state for check in report.checks[2:]} == {"skipped"}


def test_a_server_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "FIRST_REPLY_SECONDS", 0.3)
    app = FastAPI()

    @app.post("/process")
    async def process(request: Request) -> Response:
        time.sleep(0.6)  # blocks the event loop, as 201 of 202 entries of 2023 did
        return Response("late")

    toy = Toy()
    toy.app = app
    with serving(toy) as url:
        report = probe(url, planned_requests=1, time_limit=60)
    assert report.checks[0].state == "fail"
    assert "no reply" in report.checks[0].why
