"""The vLLM engine, against a program `vllm` that answers as vLLM 0.33 does but counts instead of thinking.

vLLM itself needs a GPU and an environment of its own.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path

import psutil
import pytest

from palio.errors import BadInput, Crashed
from palio.serving.request import BadRequest, Request
from palio.serving.vllm_engine import VllmEngine
from tests.support.training import tiny_base_model

PROGRAM = '''#!{python}
"""Continues a prompt with its own first tokens; refuses a temperature of 99, hangs at 98, dies of `die`."""
import argparse, asyncio, sys
import uvicorn
from fastapi import FastAPI, Response

parser = argparse.ArgumentParser()
parser.add_argument("verb")
parser.add_argument("package")
for name in ("served-model-name", "host", "port", "max-logprobs", "gpu-memory-utilization"):
    parser.add_argument(f"--{{name}}")
for name in ("enable-prefix-caching", "disable-log-requests"):
    parser.add_argument(f"--{{name}}", action="store_true")
given = parser.parse_args()
if "die" in given.package:
    sys.exit(3)
app = FastAPI()

@app.get("/health")
def health(): ...

@app.post("/v1/completions")
async def complete(body: dict):
    assert body["model"] == given.served_model_name and body["return_tokens_as_token_ids"]
    if body["temperature"] == 99:
        return Response("no", 400)
    if body["temperature"] == 98:
        await asyncio.sleep(1000)
    new = (body["prompt"] * 10)[: body["max_tokens"]]
    tokens = (body["prompt"] if body["echo"] else []) + new
    logprobs = [-0.5] * len(tokens)
    if body["echo"]:
        logprobs[0] = None
    names = [f"token_id:{{token}}" for token in tokens]
    top = [None if value is None else {{name: value}} for name, value in zip(names, logprobs)]
    choice = {{"text": "", "logprobs": {{"tokens": names, "token_logprobs": logprobs, "top_logprobs": top}}}}
    return {{"choices": [choice] * body["n"]}}

uvicorn.run(app, host=given.host, port=int(given.port), log_level="error")
'''


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pytest.MonkeyPatch]:
    folder = tmp_path_factory.mktemp("bin")
    program = folder / "vllm"
    program.write_text(PROGRAM.format(python=sys.executable))
    program.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{folder}:/usr/bin:/bin")
        yield patch


@pytest.fixture(scope="module")
def package(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base_model(tmp_path_factory.mktemp("tiny"), base_model) / "model"


@pytest.fixture(scope="module")
def engine(package: Path, path: pytest.MonkeyPatch) -> Iterator[VllmEngine]:
    engine = VllmEngine(package)
    yield engine
    engine.close()


def test_answers_have_the_form_of_the_default_engines(engine: VllmEngine) -> None:
    (answer,) = engine.submit(Request("One two three", max_new_tokens=3)).result(30)
    assert answer.text == "One two three"
    assert [token.text for token in answer.tokens] == ["One", " two", " three"]
    assert answer.logprob == -1.5


def test_an_echoed_prompt_stands_before_the_completion(engine: VllmEngine) -> None:
    (answer,) = engine.submit(Request("One two", max_new_tokens=1, echo_prompt=True)).result(30)
    assert answer.text == "One twoOne"
    assert [token.logprob for token in answer.tokens] == [0.0, -0.5, -0.5]


def test_a_completion_is_cut_at_a_stop_sequence(engine: VllmEngine) -> None:
    request = Request("One two three", max_new_tokens=3, stop_sequences=("wo",))
    (answer,) = engine.submit(request).result(30)
    assert answer.text == "One t"


def test_a_long_prompt_is_cut_to_the_context(engine: VllmEngine) -> None:
    (answer,) = engine.submit(Request("word " * 3000, max_new_tokens=5, echo_prompt=True)).result(30)
    assert len(answer.tokens) == 2048


def test_several_sequences_are_asked_for_at_once(engine: VllmEngine) -> None:
    assert len(engine.submit(Request("a", max_new_tokens=1, num_return_sequences=3)).result(30)) == 3


def test_what_vllm_refuses_is_a_bad_request(engine: VllmEngine) -> None:
    with pytest.raises(BadRequest):
        engine.submit(Request("a", temperature=99)).result(30)


def test_a_request_can_be_cancelled(engine: VllmEngine) -> None:
    future = engine.submit(Request("a", temperature=98))
    time.sleep(0.2)
    assert future.cancel()
    with pytest.raises(CancelledError):
        future.result(30)


def test_a_vllm_that_ends_at_once_is_named(package: Path, path: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "die").symlink_to(package)
    with pytest.raises(Crashed, match="vllm ended with code 3"):
        VllmEngine(tmp_path / "die")


def test_nothing_of_it_is_left_behind(package: Path, path: pytest.MonkeyPatch) -> None:
    engine = VllmEngine(package)
    process = psutil.Process(engine._process.pid)
    engine.close()
    assert not process.is_running()


def test_no_vllm_on_path_is_a_users_mistake(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(BadInput, match="no such program on PATH"):
        VllmEngine(package)
