"""The vLLM engine, against a program `vllm` that counts instead of thinking.

It accepts the flags and refuses the requests that vLLM 0.32 does, and runs as several processes.
tests/vllm holds vLLM itself to the same contract.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from contextlib import closing
from pathlib import Path

import psutil
import pytest
import torch

from palio.errors import BadInput, Crashed, ServerBroken
from palio.serving.process import ServerProcess
from palio.serving.request import BadRequest, QueueFull, Request, RequestFailed, Unavailable
from palio.serving.vllm_engine import VllmEngine
from palio.vllm import vllm_version

PROGRAM = '''#!{python}
"""Continues a prompt with its own first tokens; dies of a package named `die`.

At temperature 1.95 it answers 500 and dies, at 1.96 it has NaN, and so has what follows until the cache is
overwritten, at 1.97 it has NaN at the first time only, at 1.98 it hangs, at 1.99 it answers 500.
"""
import argparse, asyncio, json, os, signal, sys, time
from pathlib import Path

if sys.argv[1:] == ["--version"]:
    sys.exit(print("{version}"))
parser = argparse.ArgumentParser(allow_abbrev=False)
parser.add_argument("verb", choices=["serve"])
parser.add_argument("package")
for name in ("served-model-name", "host", "generation-config"):
    parser.add_argument(f"--{{name}}")
for name in ("port", "max-logprobs", "max-model-len", "kv-cache-memory-bytes"):
    parser.add_argument(f"--{{name}}", type=int)
parser.add_argument("--block-size", type=int, default=16)
parser.add_argument("--gpu-memory-utilization", type=float)
parser.add_argument("--dtype", choices=["auto", "half", "float16", "bfloat16", "float", "float32"])
for name in ("enable-prefix-caching", "enable-prompt-tokens-details", "disable-uvicorn-access-log"):
    parser.add_argument(f"--{{name}}", action="store_true")
given = parser.parse_args()
assert os.environ["VLLM_NO_USAGE_STATS"] == "1"
if "die" in given.package:
    sys.exit(3)
vocabulary = json.loads(Path(given.package, "config.json").read_text())["vocab_size"]
seen, cache = set(), {{"dirty": False}}
if os.fork() == 0:  # the engine's core, and its worker
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.fork()
    time.sleep(600)

import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse

app = FastAPI()

@app.get("/health")
def health(): ...

@app.post("/v1/completions")
async def complete(body: dict):
    assert body["model"] == given.served_model_name
    body = {{"temperature": 1.0, "n": 1, "logprobs": 0, "stop": [], "seed": 0, "echo": False}} | body
    prompt, count, temperature = body["prompt"], body["logprobs"], body["temperature"]
    allowed = body.get("allowed_token_ids")
    refused = {{
        "temperature must be in [0, 2]": not 0 <= temperature <= 2,
        "n must be 1 when using greedy sampling": temperature < 1e-5 and body["n"] > 1,
        "at most 4 stop sequences": len(body["stop"]) > 4,
        "stop cannot contain an empty string": "" in body["stop"],
        "seed does not fit into int64": not -(2**63) <= body["seed"] < 2**63,
        "too many logprobs": count > given.max_logprobs,
        "the prompt is empty": not prompt,
        "a token id is out of vocabulary": max(prompt + (allowed or [])) >= vocabulary,
        "longer than the maximum": len(prompt) + max(1, body["max_tokens"]) > given.max_model_len,
        "max_tokens must be at least 1": body["max_tokens"] == 0 and not body["echo"],
    }}
    if len(prompt) % given.block_size == 0 and "cache_salt" in body:
        cache["dirty"] = False
    if temperature == 1.96:
        cache["dirty"] = True
    nan = cache["dirty"] or (temperature == 1.97 and body["seed"] not in seen)
    seen.add(body["seed"])
    refused["Out of range float values are not JSON compliant"] = nan
    if why := [why for why, wrong in refused.items() if wrong]:
        return JSONResponse({{"error": {{"message": why[0], "type": "BadRequestError", "code": 400}}}}, 400)
    assert temperature < 1e-5 or temperature >= 0.01, "it would be raised to 0.01"
    if temperature == 1.95:
        asyncio.get_running_loop().call_later(0.5, os._exit, 1)
    if temperature == 1.98:
        await asyncio.sleep(1000)
    if temperature in (1.95, 1.99):
        return JSONResponse({{"error": {{"message": "EngineCore encountered an issue", "code": 500}}}}, 500)
    new = ((allowed or prompt) * 10)[: body["max_tokens"]]
    ends = [at for at, token in enumerate(new) if token in body.get("stop_token_ids", [])]
    new = new[: ends[0] + 1] if ends else new
    tokens = (prompt if body["echo"] else []) + new
    logprobs = [-0.5] * len(tokens)
    if body["echo"]:
        logprobs[0] = None
    names = [f"token_id:{{token}}" for token in tokens]
    # the chosen token comes on top of the candidates asked for
    others = {{f"token_id:{{100 + n}}": -0.1 * n for n in range(count)}}
    top = [None if value is None else others | {{name: value}} for name, value in zip(names, logprobs)]
    choice = {{"text": "", "logprobs": {{"tokens": names, "token_logprobs": logprobs, "top_logprobs": top}}}}
    used = {{"prompt_tokens": len(prompt), "completion_tokens": body["n"] * len(new)}}
    used["prompt_tokens_details"] = {{"cached_tokens": len(prompt) - 1}}
    return {{"choices": [choice] * body["n"], "usage": used}}

uvicorn.run(app, host=given.host, port=given.port, log_level="error")
'''


def install(folder: Path, version: str = "0.33.1") -> str:
    """Put the program into a folder; return a PATH that starts with it."""
    program = folder / "vllm"
    program.write_text(PROGRAM.format(python=sys.executable, version=version))
    program.chmod(0o755)
    return f"{folder}:/usr/bin:/bin"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", install(tmp_path_factory.mktemp("bin")))
        yield patch


@pytest.fixture(scope="module")
def engine(package: Path, path: pytest.MonkeyPatch) -> Iterator[VllmEngine]:
    engine = VllmEngine(package, threads=1, max_context=1024)
    yield engine
    engine.close()


def test_answers_have_the_form_of_the_default_engines(engine: VllmEngine) -> None:
    (answer,) = engine.submit(Request("One two three", max_new_tokens=3)).result(30)
    assert answer.text == "One two three"
    assert [token.text for token in answer.tokens] == ["One", " two", " three"]
    assert answer.logprob == -1.5


def test_where_there_is_no_gpu_it_runs_on_the_cpu(engine: VllmEngine) -> None:
    command = psutil.Process(engine._process.pid).cmdline()
    assert ("--kv-cache-memory-bytes" in command) is not torch.cuda.is_available()


def test_it_computes_on_a_cpu_in_the_dtype_that_is_asked_for(
    package: Path, path: pytest.MonkeyPatch, bf16_cpu: Path
) -> None:
    with closing(VllmEngine(package, device="cpu", threads=1, cpu_dtype="bfloat16")) as engine:
        command = psutil.Process(engine._process.pid).cmdline()
    assert command[command.index("--dtype") + 1] == "bfloat16"


def test_an_echoed_prompt_stands_before_the_completion(engine: VllmEngine) -> None:
    (answer,) = engine.submit(Request("One two", max_new_tokens=1, echo_prompt=True)).result(30)
    assert answer.text == "One twoOne"
    assert [token.logprob for token in answer.tokens] == [0.0, -0.5, -0.5]


def test_a_completion_is_cut_at_a_stop_sequence(engine: VllmEngine) -> None:
    request = Request("One two three", max_new_tokens=3, stop_sequences=("wo",))
    (answer,) = engine.submit(request).result(30)
    assert answer.text == "One t"


def test_a_long_prompt_is_cut_to_the_context(engine: VllmEngine) -> None:
    (answer,) = engine.submit(Request("word " * 1500, max_new_tokens=5, echo_prompt=True)).result(30)
    assert len(answer.tokens) == 1024


def test_a_prompt_that_fills_the_context_is_echoed(engine: VllmEngine) -> None:
    request = Request("word " * 1500, max_new_tokens=0, echo_prompt=True)
    (answer,) = engine.submit(request).result(30)
    assert [token.logprob for token in answer.tokens] == [0.0] + [-0.5] * 1023
    assert answer.tokens[-1].text == " word"


def test_half_a_character_at_the_end_is_a_token_without_text(engine: VllmEngine) -> None:
    (answer,) = engine.submit(Request("🙂", max_new_tokens=1)).result(30)
    assert [token.text for token in answer.tokens] == [""]


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
def test_several_sequences_are_answered(engine: VllmEngine, temperature: float) -> None:
    request = Request("a", max_new_tokens=1, num_return_sequences=3, temperature=temperature)
    assert len(engine.submit(request).result(30)) == 3


def test_more_stop_sequences_than_vllm_takes_are_all_looked_for(engine: VllmEngine) -> None:
    request = Request("One two three", max_new_tokens=3, stop_sequences=("1", "2", "3", "4", " thr"))
    (answer,) = engine.submit(request).result(30)
    assert answer.text == "One two"


def test_a_completion_ends_before_the_end_token(engine: VllmEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    end = engine.vocabulary.encode("One two three")[1]
    monkeypatch.setattr(engine.vocabulary, "ends", frozenset([end]))
    (answer,) = engine.submit(Request("One two three", max_new_tokens=3)).result(30)
    assert answer.text == "One"


def test_as_many_candidates_as_asked_for_are_reported(engine: VllmEngine) -> None:
    (answer,) = engine.submit(Request("One two", max_new_tokens=2, top_k_per_token=3)).result(30)
    assert [len(token.top_logprob) for token in answer.tokens] == [3, 3]


def test_a_huge_seed_is_a_seed(engine: VllmEngine) -> None:
    assert engine.submit(Request("a", max_new_tokens=1, seed=10**30)).result(30)


@pytest.mark.parametrize("temperature", [99, 2.1, 0.001])
def test_a_temperature_that_vllm_does_not_sample_at_is_a_bad_request(
    engine: VllmEngine, temperature: float
) -> None:
    with pytest.raises(BadRequest, match=r"temperatures of 0\.01 to 2, or 0; choose"):
        engine.submit(Request("a", temperature=temperature))


@pytest.mark.parametrize(("temperature", "why"), [(1.99, "HTTP 500"), (1.96, "not finite")])
def test_a_request_that_fails_in_vllm_fails_alone(engine: VllmEngine, temperature: float, why: str) -> None:
    with pytest.raises(RequestFailed, match=why):
        engine.submit(Request("a", temperature=temperature)).result(30)
    assert not engine.failure()
    assert engine.submit(Request("a", max_new_tokens=1)).result(30)


def test_a_request_that_meets_the_nan_of_another_is_asked_again(engine: VllmEngine) -> None:
    assert engine.submit(Request("a", max_new_tokens=1, temperature=1.97, seed=77)).result(30)


def test_the_tokens_that_vllm_computed_are_counted(engine: VllmEngine) -> None:
    before = engine.metrics()
    engine.submit(Request("One two three", max_new_tokens=2)).result(30)
    added = {name: value - before[name] for name, value in engine.metrics().items()}
    assert added["prompt_tokens_total"] == 3
    assert added["prompt_tokens_computed_total"] == 1
    assert added["new_tokens_total"] == 2


def test_a_request_can_be_cancelled(engine: VllmEngine) -> None:
    future = engine.submit(Request("a", temperature=1.98))
    time.sleep(0.2)
    assert future.cancel()
    with pytest.raises(CancelledError):
        future.result(30)


def test_a_request_cancelled_before_it_is_sent_gives_its_place_back(engine: VllmEngine) -> None:
    for _ in range(50):
        engine.submit(Request("a", temperature=1.98)).cancel()
    assert engine._in_flight == 0


def test_over_a_hundred_requests_are_in_flight_and_a_full_queue_sends_clients_away(
    engine: VllmEngine,
) -> None:
    stuck = [engine.submit(Request("a", temperature=1.98)) for _ in range(319)]
    assert engine.submit(Request("a", max_new_tokens=1)).result(60)
    deadline = time.monotonic() + 30
    while engine._in_flight > 319 and time.monotonic() < deadline:  # its place is given back just after
        time.sleep(0.01)
    stuck.append(engine.submit(Request("a", temperature=1.98)))
    with pytest.raises(QueueFull):
        engine.submit(Request("a"))
    for future in stuck:
        future.cancel()
    assert engine._in_flight == 0
    assert engine.metrics()["requests_cancelled_total"] >= 320


def test_a_vllm_that_ends_at_once_is_named(package: Path, path: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "die").symlink_to(package)
    with pytest.raises(Crashed, match="vllm ended with code 3"):
        VllmEngine(tmp_path / "die", device="cpu")


def test_a_vllm_that_dies_is_a_failure(package: Path, path: pytest.MonkeyPatch) -> None:
    engine = VllmEngine(package, device="cpu")
    pending = engine.submit(Request("a", temperature=1.98))
    tree = psutil.Process(engine._process.pid).children(recursive=True)
    tree[0].kill()
    with pytest.raises(Unavailable, match="vllm ended with code 137"):
        pending.result(30)
    assert engine.failure()
    assert psutil.wait_procs(tree, timeout=5)[1] == []
    engine.close()


def test_a_vllm_that_answers_500_as_it_dies_is_a_failure(package: Path, path: pytest.MonkeyPatch) -> None:
    engine = VllmEngine(package, device="cpu")
    with pytest.raises(Unavailable, match="vllm ended with code 1"):
        engine.submit(Request("a", temperature=1.95)).result(30)
    engine.close()


def test_an_engine_that_is_closed_leaves_no_process(package: Path, path: pytest.MonkeyPatch) -> None:
    engine = VllmEngine(package, device="cpu")
    guard = psutil.Process(engine._process.pid)
    tree = [guard, *guard.children(recursive=True)]
    assert len(tree) == 4
    engine.close()
    assert psutil.wait_procs(tree, timeout=5)[1] == []


@pytest.mark.parametrize("victim", ["the server, by SIGTERM", "the server", "the guard", "vllm"])
def test_whatever_is_killed_no_process_of_the_server_is_left(
    package: Path, path: pytest.MonkeyPatch, tmp_path: Path, victim: str
) -> None:
    with ServerProcess(package, log=tmp_path / "server.log", engine="vllm") as server:
        process = psutil.Process(server.pid)
        tree = [process, *process.children(recursive=True)]
        assert len(tree) == 5
        if victim == "the server, by SIGTERM":
            process.terminate()
        else:
            tree[["the server", "the guard", "vllm"].index(victim)].kill()
        assert psutil.wait_procs(tree[1:], timeout=5)[1] == []
        code = process.wait(30)
        assert code == ServerBroken.exit_code or victim.startswith("the server")


OWNER = """
import sys, time
from pathlib import Path
from palio.serving.process import ServerProcess
with ServerProcess(Path(sys.argv[1]), log=Path(sys.argv[2]), engine="vllm") as server:
    print(server.pid, flush=True)
    time.sleep(600)
"""


def test_a_killed_step_leaves_no_process_of_its_server(
    package: Path, path: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", OWNER, str(package), str(tmp_path / "server.log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        server = psutil.Process(int(owner.stdout.readline()))
        tree = [server, *server.children(recursive=True)]
        assert len(tree) == 5
        owner.kill()
    assert psutil.wait_procs(tree[1:], timeout=5)[1] == []
    server.wait(30)


def test_no_vllm_on_path_is_a_users_mistake(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(BadInput, match="no such program on PATH"):
        VllmEngine(package)


def test_the_version_on_path_is_told_and_an_old_one_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", install(tmp_path))
    assert vllm_version() == "0.33.1"
    monkeypatch.setenv("PATH", install(tmp_path, "0.16.0"))
    with pytest.raises(BadInput, match=r"0\.16\.0.*too old; upgrade to 0\.17"):
        vllm_version()
