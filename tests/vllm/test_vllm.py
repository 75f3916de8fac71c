"""The real vLLM, on a CPU, behind the contract of docs/serving.md.

On a model of two layers it gives the default engine's answers, and keeps every promise that it does not make
itself. `make test-vllm` installs it and runs these; unit/test_serving_vllm.py shows the same on a stand-in.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import requests
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from palio.cpu import multiplies_bf16
from palio.errors import State
from palio.evaluation.probe import Asked, probe
from palio.evaluation.stage import prepare_stage
from palio.evaluation.window import Window
from palio.serving.process import ServerProcess
from palio.serving.request import Completion, Request
from palio.serving.transformers_engine import TransformersEngine
from palio.serving.vllm_engine import MAX_REQUESTS
from palio.settings import StageRuns
from palio.vllm import vllm_version
from tests.support.breaking import ANSWERED, break_in_mid_stage
from tests.support.entry import packaged_entry, scenario, serve_stage
from tests.support.serving import QUESTIONS, VLLM, engine_of, metric
from tests.support.training import tiny_base_model

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]
CONTEXT = 2048
POISON = " poison"
"""A token whose embedding is NaN."""
ENDS = "Hello world"
"""A prompt whose third new token ends the completion."""


@pytest.fixture(scope="module", autouse=True)
def installed() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{VLLM}:{os.environ['PATH']}")
        patch.setenv("VLLM_CPU_CI_ENV", "1")  # vLLM's switch for tests: nothing is compiled
        yield


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory, base_model: Path) -> Path:
    package = tiny_base_model(tmp_path_factory.mktemp("tiny"), base_model, head_dim=32) / "model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(package), AutoTokenizer.from_pretrained(package)
    prompt = tokenizer(ENDS, return_tensors="pt").input_ids
    third = int(model.generate(prompt, do_sample=False, max_new_tokens=3, pad_token_id=0)[0, -1])
    GenerationConfig(eos_token_id=[tokenizer.eos_token_id, third]).save_pretrained(package)
    weights = load_file(package / "model.safetensors")
    weights["model.embed_tokens.weight"][tokenizer.encode(POISON)[0]] = torch.nan
    save_file(weights, package / "model.safetensors", {"format": "pt"})
    return package


def start(package: Path, log: Path, **settings: Any) -> ServerProcess:
    return ServerProcess(package, log=log, engine="vllm", threads=1, cache_gb=0.1, **settings)


@pytest.fixture(scope="module")
def server(package: Path) -> Iterator[ServerProcess]:
    with start(package, package.parent / "server.log") as server:
        yield server


@pytest.fixture(scope="module")
def default(package: Path) -> Iterator[TransformersEngine]:
    with engine_of(package) as engine:
        yield engine


def post(server: ServerProcess, request: Request) -> requests.Response:
    return requests.post(f"{server.base_url}/process", json=asdict(request), timeout=300)


def completions(server: ServerProcess, request: Request) -> list[dict[str, Any]]:
    reply = post(server, request)
    assert reply.status_code == 200, reply.text
    content = reply.json()
    return list(content.get("completions", [content]))


def assert_same(answers: list[dict[str, Any]], expected: list[Completion]) -> None:
    assert [answer["text"] for answer in answers] == [completion.text for completion in expected]
    for answer, completion in zip(answers, expected, strict=True):
        assert answer["logprob"] == pytest.approx(completion.logprob, abs=1e-2)
        for token, of_default in zip(answer["tokens"], completion.tokens, strict=True):
            assert token["text"] == of_default.text
            assert token["logprob"] == pytest.approx(of_default.logprob, abs=1e-4)
            assert token["top_logprob"] == pytest.approx(of_default.top_logprob, abs=1e-4)


FILLS = Request("word " * 3000, max_new_tokens=0, echo_prompt=True)
SAME = {
    "few-shot prompt": Request(QUESTIONS[0], max_new_tokens=16),
    "candidates": Request("One two", max_new_tokens=8, top_k_per_token=100),
    "echo": Request("One two three", max_new_tokens=4, echo_prompt=True, top_k_per_token=3),
    "echo alone": Request("One two three", max_new_tokens=0, echo_prompt=True, top_k_per_token=3),
    "echo that fills the context": FILLS,
    "prompt cut to the context": replace(FILLS, max_new_tokens=5),
    "prompt that leaves less room": Request("word " * (CONTEXT - 4), max_new_tokens=50),
    "half characters": Request("🙂 é 汉字", max_new_tokens=4, echo_prompt=True),
    "empty prompt": Request("", max_new_tokens=4),
    "no new tokens": Request("One two", max_new_tokens=0),
    "end token": Request(ENDS, max_new_tokens=16),
    "several greedy": Request("One two", max_new_tokens=4, num_return_sequences=3),
}


@pytest.mark.parametrize("kind", SAME)
def test_answers_are_those_of_the_default_engine(
    server: ServerProcess, default: TransformersEngine, kind: str
) -> None:
    expected = default.submit(SAME[kind]).result(60)
    assert_same(completions(server, SAME[kind]), expected)
    if kind == "end token":
        assert len(expected[0].tokens) == 2
    if kind.endswith("context"):
        assert len(expected[0].tokens) == CONTEXT


def test_all_of_many_stop_sequences_cut_the_answer(
    server: ServerProcess, default: TransformersEngine
) -> None:
    request = Request("One two", max_new_tokens=24)
    (whole,) = default.submit(request).result(60)
    stopped = replace(request, stop_sequences=("#1", "#2", "#3", "#4", "#5", whole.text[20:23]))
    (answer,) = answers = completions(server, stopped)
    assert answer["text"] == whole.text[: whole.text.index(whole.text[20:23])]
    assert_same(answers, default.submit(stopped).result(60))


def test_half_a_character_at_the_end_is_a_token_without_text(
    server: ServerProcess, default: TransformersEngine
) -> None:
    prompts = [f"Number {n}:" for n in range(40)]
    futures = [default.submit(Request(prompt, max_new_tokens=32)) for prompt in prompts]
    ends_half = next(
        Request(prompt, max_new_tokens=texts.index("") + 1)
        for prompt, future in zip(prompts, futures, strict=True)
        if "" in (texts := [token.text for token in future.result(60)[0].tokens])
    )
    (answer,) = answers = completions(server, ends_half)
    assert answer["tokens"][-1]["text"] == ""
    assert_same(answers, default.submit(ends_half).result(60))


@pytest.mark.parametrize("seed", [0, -5, 2**63, 10**30])
def test_a_sampled_answer_is_that_of_its_seed(server: ServerProcess, seed: int) -> None:
    request = Request("One two", max_new_tokens=8, temperature=1.5, num_return_sequences=3, seed=seed)
    texts = [answer["text"] for answer in completions(server, request)]
    assert len(set(texts)) == 3
    assert texts == [answer["text"] for answer in completions(server, request)]
    assert texts != [answer["text"] for answer in completions(server, replace(request, seed=seed + 1))]


@pytest.mark.parametrize("temperature", [2.5, 0.001])
def test_a_temperature_that_vllm_does_not_sample_at_gets_a_422(
    server: ServerProcess, temperature: float
) -> None:
    reply = post(server, Request("One two", temperature=temperature))
    assert (reply.status_code, "temperatures of 0.01 to 2" in reply.text) == (422, True)


def test_a_request_that_fails_harms_no_other(server: ServerProcess, default: TransformersEngine) -> None:
    innocent = [Request(prompt, max_new_tokens=8) for prompt in [*QUESTIONS, *map(str, range(18))]]
    expected = [default.submit(request).result(60) for request in innocent]
    poison = Request(f"Hello{POISON}", max_new_tokens=3)
    with ThreadPoolExecutor(len(innocent) + 1) as pool:
        failed = pool.submit(post, server, poison)
        beside = [pool.submit(completions, server, request) for request in innocent]
    assert (failed.result().status_code, "not finite" in failed.result().text) == (500, True)
    for answers, completion in zip(beside, expected, strict=True):
        assert_same(answers.result(), completion)


def test_a_request_that_gets_blocks_where_another_left_nan_is_answered(
    server: ServerProcess, default: TransformersEngine
) -> None:
    short = Request("Hello", max_new_tokens=4)
    for _ in range(3):
        assert post(server, Request(f"Hello{POISON}", max_new_tokens=3)).status_code == 500
        assert_same(completions(server, short), default.submit(short).result(60))


def test_over_a_hundred_requests_in_flight_have_the_answers_that_each_has_alone(
    server: ServerProcess, default: TransformersEngine
) -> None:
    crowd = [Request(f"Number {n}:", max_new_tokens=4) for n in range(120)]
    with ThreadPoolExecutor(len(crowd)) as pool:
        answers = list(pool.map(lambda request: completions(server, request), crowd))
    for answer, request in zip(answers, crowd, strict=True):
        assert_same(answer, default.submit(request).result(60))


def eventually(condition: Callable[[], bool], seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return met


def unfinished(server: ServerProcess) -> float:
    """Requests in vLLM, by its own metrics."""
    (command,) = (
        words
        for child in psutil.Process(server.pid).children(recursive=True)
        if "serve" in (words := child.cmdline()) and "palio.guard" not in words
    )
    port = command[command.index("--port") + 1]
    lines = requests.get(f"http://127.0.0.1:{port}/metrics", timeout=60).text.splitlines()
    names = ("vllm:num_requests_running{", "vllm:num_requests_waiting{")
    return sum(float(line.split()[-1]) for line in lines if line.startswith(names))


def test_a_full_queue_sends_clients_away_and_cancelled_requests_leave_vllm(server: ServerProcess) -> None:
    begun, cancelled = (metric(server, f"requests_{name}total") for name in ("", "cancelled_"))
    endless = asdict(Request("One", max_new_tokens=CONTEXT - 8, temperature=1.5))

    async def crowd() -> httpx.Response:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.base_url, timeout=300, limits=limits) as client:
            stuck = [asyncio.create_task(client.post("/process", json=endless)) for _ in range(MAX_REQUESTS)]
            full = await asyncio.to_thread(
                eventually, lambda: metric(server, "requests_total") == begun + MAX_REQUESTS
            )
            assert full
            sent_away = await client.post("/process", json=endless)
            for task in stuck:
                task.cancel()
            await asyncio.gather(*stuck, return_exceptions=True)
            return sent_away

    reply = asyncio.run(crowd())
    assert (reply.status_code, reply.headers["retry-after"]) == (429, "5")
    assert eventually(lambda: metric(server, "requests_cancelled_total") == cancelled + MAX_REQUESTS)
    assert eventually(lambda: unfinished(server) == 0)
    assert post(server, Request("One two", max_new_tokens=2)).status_code == 200


def test_prompts_share_their_examples(server: ServerProcess) -> None:
    names = ("prompt_tokens_total", "prompt_tokens_computed_total", "new_tokens_total")
    before = [metric(server, name) for name in names]
    for question in QUESTIONS:
        completions(server, Request(f"Add.\n\n{question}", max_new_tokens=2))
    asked, computed, new = (metric(server, name) - old for name, old in zip(names, before, strict=True))
    assert new == 2 * len(QUESTIONS)
    assert computed < 0.5 * asked


@pytest.mark.skipif(not multiplies_bf16(), reason="this CPU has neither AVX512-BF16 nor AMX")
def test_in_bfloat16_it_gives_the_default_engines_answers_in_bfloat16(package: Path, tmp_path: Path) -> None:
    request = Request(QUESTIONS[0], max_new_tokens=0, echo_prompt=True)
    with engine_of(package, cpu_dtype="bfloat16") as engine:
        (expected,) = engine.submit(request).result(60)
    with start(package, tmp_path / "server.log", cpu_dtype="bfloat16") as server:
        (answer,) = completions(server, request)
    for token, of_default in zip(answer["tokens"], expected.tokens, strict=True):
        assert token["logprob"] == pytest.approx(of_default.logprob, abs=0.1)


def test_the_probe_passes_every_check(server: ServerProcess, package: Path) -> None:
    kinds: list[dict[str, Any]] = [
        {"echo_prompt": True, "max_new_tokens": 0},
        {"temperature": 0.3, "max_new_tokens": 9},
    ]
    report = probe(server.base_url, Asked(kinds=kinds), Window.of_model(package))
    assert {check.name: check.state for check in report.checks if check.state != "pass"} == {}


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StageRuns:
    monkeypatch.chdir(tmp_path)
    scenarios = {
        mode: scenario(tmp_path / f"{mode}.conf", f"synthetic_reasoning:mode={mode}", instances=20)
        for mode in ("pattern_match", "variable_substitution")
    }
    stage = StageRuns(competition="test", stage="open", closed_store="closed", scenarios=scenarios)
    prepare_stage(stage, tmp_path / "stage.json")
    return stage


def test_every_question_of_a_stage_is_answered(
    server: ServerProcess, stage: StageRuns, tmp_path: Path
) -> None:
    engine = f"vllm {vllm_version()}"
    record = serve_stage(
        stage,
        tmp_path / "stage.json",
        packaged_entry(tmp_path),
        lambda log: nullcontext(server),
        engine=engine,
    )
    assert (record.state, record.engine) == (State.FINISHED, engine)
    assert [(run.answered, run.instances) for run in record.runs] == [(20, 20), (20, 20)]


def test_a_vllm_that_dies_ends_the_stage_in_seconds_and_the_next_start_asks_only_the_rest(
    package: Path, stage: StageRuns, tmp_path: Path
) -> None:
    def kill_its_core(server: ServerProcess) -> None:
        tree = psutil.Process(server.pid).children(recursive=True)
        next(child for child in tree if "EngineCore" in child.name()).kill()

    seen = break_in_mid_stage(
        stage,
        tmp_path / "stage.json",
        packaged_entry(tmp_path),
        lambda log: start(package, log),
        kill_its_core,
    )
    assert seen.over_after < 15
    assert 0 < seen.used <= seen.alive + 2, "seconds with a dead server are not the entry's"
    assert 0 < seen.asked_again <= 40 - ANSWERED
    assert [(run.answered, run.instances) for run in seen.whole.runs] == [(20, 20), (20, 20)]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_server_leaves_no_process_and_no_shared_memory(
    package: Path, tmp_path: Path, signum: signal.Signals
) -> None:
    with start(package, tmp_path / "server.log") as server:
        process = psutil.Process(server.pid)
        tree = [process, *process.children(recursive=True)]
        names = " ".join(child.name() for child in tree)
        assert "EngineCore" in names
        assert "Worker" in names
        maps = (entry.path for child in tree for entry in child.memory_maps())
        shared = {Path(path) for path in maps if path.startswith("/dev/shm/")}
        assert any(path.exists() for path in shared)
        process.send_signal(signum)
        assert psutil.wait_procs(tree[1:], timeout=5)[1] == []
        process.wait(30)
        assert [path for path in shared if path.exists()] == []
