"""The HTTP API: HELM's contract, clean refusals, deadlines, clients that leave."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from palio.serving.app import build_app
from palio.serving.request import Completion, QueueFull, Request, RequestFailed, Unavailable
from tests.support.serving import engine_of
from tests.support.training import tiny_base_model


@pytest.fixture(scope="module")
def client(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    package = tiny_base_model(tmp_path_factory.mktemp("tiny"), base_model) / "model"
    with engine_of(package) as engine, TestClient(build_app(engine)) as client:
        yield client


class Stuck:
    """An engine that never answers."""

    vocabulary: Any = None

    def __init__(self, refusal: Exception | None = None) -> None:
        self.refusal = refusal
        self.futures: list[Future[list[Completion]]] = []

    def submit(self, request: Request) -> Future[list[Completion]]:
        if self.refusal:
            raise self.refusal
        self.futures.append(Future())
        return self.futures[-1]

    def metrics(self) -> dict[str, float]:
        return {}

    def failure(self) -> str:
        return "it is stuck"

    def close(self) -> None: ...


def test_a_reply_has_what_helm_reads(client: TestClient) -> None:
    reply = client.post("/process", json={"prompt": "Hello", "max_new_tokens": 3}).json()
    assert reply["text"] == "".join(token["text"] for token in reply["tokens"])
    assert reply["logprob"] == pytest.approx(sum(token["logprob"] for token in reply["tokens"]))
    assert 0 < reply["request_time"] < 60


def test_several_sequences_stand_under_completions(client: TestClient) -> None:
    body = {"prompt": "Hello", "max_new_tokens": 3, "num_return_sequences": 2, "temperature": 1}
    reply = client.post("/process", json=body).json()
    assert [set(one) for one in reply["completions"]] == [{"text", "tokens", "logprob"}] * 2
    assert reply["text"] == reply["completions"][0]["text"]


@pytest.mark.parametrize(
    "body",
    [
        {},
        [],
        {"prompt": 1},
        {"prompt": "a", "temperature": -1},
        {"prompt": "a", "temperature": "NaN"},
        {"prompt": "a", "temperature": math.nan},
        {"prompt": "a", "top_p": math.nan},
        {"prompt": "a", "temperature": math.inf},
        {"prompt": "a", "seed": 1e300},
        {"prompt": "a", "max_new_tokens": -1},
        {"prompt": "a", "max_new_tokens": 1e30},
        {"prompt": "a", "top_p": 0},
        {"prompt": "a", "num_return_sequences": 0},
        {"prompt": "a", "stop_sequences": [1]},
        {"prompt": "a", "echo_prompt": "perhaps"},
        {"prompt": "\ud83d"},
    ],
    ids=repr,
)
def test_an_invalid_request_is_refused_and_the_server_goes_on(client: TestClient, body: Any) -> None:
    reply = client.post("/process", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert reply.status_code == 422
    assert client.post("/process", json={"prompt": "a", "max_new_tokens": 1}).status_code == 200


def test_a_refusal_names_the_field_and_does_not_repeat_the_prompt(client: TestClient) -> None:
    reply = client.post("/process", json={"prompt": ["a canary"], "top_p": 2})
    assert reply.json()["detail"] == (
        "prompt: Input should be a valid string; top_p: Input should be less than or equal to 1"
    )


def test_huge_integers_mean_as_much_as_fits(client: TestClient) -> None:
    body = {"prompt": "a", "max_new_tokens": 10**40, "seed": 10**40, "stop_sequences": ["e", "a", "o"]}
    assert client.post("/process", json=body).status_code == 200
    assert client.post("/decode", json={"tokens": [10**40]}).status_code == 422


def test_null_means_the_default(client: TestClient) -> None:
    body = {"prompt": "a", "max_new_tokens": 1, "echo_prompt": None, "stop_sequences": None}
    assert client.post("/process", json=body).status_code == 200


def test_tokens_can_be_counted_cut_and_turned_back(client: TestClient) -> None:
    text = "their 'studio' 🐎"
    tokens = client.post("/tokenize", json={"text": text}).json()["tokens"]
    body = {"text": text, "truncation": True, "max_length": 2}
    assert client.post("/tokenize", json=body).json()["tokens"] == tokens[:2]
    assert client.post("/decode", json={"tokens": tokens}).json()["text"] == text
    assert client.post("/decode", json={"tokens": [-1]}).status_code == 422


def test_metrics_are_prometheus_lines(client: TestClient) -> None:
    client.post("/process", json={"prompt": "Hello", "max_new_tokens": 3})
    values = dict(line.split() for line in client.get("/metrics").text.splitlines())
    assert float(values["palio_prompt_tokens_computed_total"]) > 0
    assert float(values["palio_request_seconds_p95"]) > 0


def test_a_passed_deadline_is_said_and_frees_the_request() -> None:
    engine = Stuck()
    reply = TestClient(build_app(engine, deadline=0.05)).post("/process", json={"prompt": "a"})
    assert reply.status_code == 504
    assert engine.futures[0].cancelled()


@pytest.mark.parametrize(
    ("refusal", "status"),
    [(QueueFull("later"), 429), (RequestFailed("the model failed"), 500), (Unavailable("broken"), 503)],
)
def test_an_engine_that_refuses_is_a_clean_status(refusal: Exception, status: int) -> None:
    reply = TestClient(build_app(Stuck(refusal))).post("/process", json={"prompt": "a"})
    assert reply.status_code == status
    assert reply.json()["detail"] == str(refusal)


def test_health_gives_the_reason_when_nothing_is_served(client: TestClient) -> None:
    assert client.get("/health").status_code == 200
    reply = TestClient(build_app(Stuck())).get("/health")
    assert (reply.status_code, reply.json()["reason"]) == (503, "it is stuck")
