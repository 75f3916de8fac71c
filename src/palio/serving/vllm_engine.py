"""vLLM behind the same contract: `palio serve --engine vllm`, for a GPU.

vLLM pins its own torch and transformers, so it is installed in its own environment and runs as a child
process; all we need of it is the program `vllm` on PATH. It takes and returns token ids, so truncation, text
and stop sequences are those of the default engine.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import torch
from transformers import AutoConfig

from palio.cpu import CpuDtype, check_cpu_dtype
from palio.errors import Crashed
from palio.guard import guarded
from palio.network import free_port
from palio.serving.model import CPU_CACHE_GB, context_of
from palio.serving.process import READY_SECONDS
from palio.serving.request import (
    GREEDY_BELOW,
    BadRequest,
    Completion,
    QueueFull,
    Request,
    RequestFailed,
    Token,
    Unavailable,
)
from palio.serving.text import TextStream, Vocabulary, cut, find_stop
from palio.tensors import gpu_memory_share
from palio.vllm import PROGRAM, vllm_version

REQUEST_SECONDS = 3600.0
"""Above the deadline of the HTTP API, which cancels late requests."""
STOP_SECONDS = 5.0
SETTLE_SECONDS = 5.0
"""From a broken connection or an HTTP 500 to the end of the guard, if it is because vllm breaks."""
MAX_REQUESTS = 320
"""Requests in vLLM, running or waiting: as many as the default engine takes."""
MAX_LOGPROBS = 100
MAX_STOP_SEQUENCES = 4
"""Limits of vLLM's API. All stop sequences are looked for here again."""
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 2.0
"""vLLM refuses higher ones, and silently raises lower ones unless they are greedy."""
CPU_BLOCK_TOKENS = 32
"""Prompts share whole blocks, by default of 128 tokens: the rest of a common prefix is computed for each."""
FLAGS = (
    *("--enable-prefix-caching", "--enable-prompt-tokens-details", "--disable-uvicorn-access-log"),
    *("--host", "127.0.0.1", "--served-model-name", "palio", "--max-logprobs", str(MAX_LOGPROBS)),
    *("--generation-config", "vllm"),  # not the package's, whose sampling settings would become defaults
)
"""Replies tell how many prompt tokens were shared. The log's last lines are for why vllm ended."""
NOT_FINITE = "not JSON compliant"
"""In vLLM's refusal of an answer whose log-probabilities are NaN."""
COUNTERS = (
    "requests_total",
    "requests_answered_total",
    "requests_rejected_total",
    "requests_cancelled_total",
    "requests_failed_total",
    "prompt_tokens_total",
    "prompt_tokens_computed_total",
    "new_tokens_total",
)


class _NotFinite(RequestFailed):
    """The model's log-probabilities are NaN."""

    def __init__(self) -> None:
        super().__init__("the model's log-probabilities are not finite")


class VllmEngine:
    """See `Engine`. Queueing and batching are vLLM's own.

    Raises:
        BadInput: no package, or no usable vllm on PATH.
        Crashed: vllm ended or did not get ready.
    """

    def __init__(
        self,
        package: Path,
        *,
        device: str = "auto",
        threads: int | None = None,
        gpu_memory_gb: float | None = None,
        cache_gb: float | None = None,
        max_context: int | None = None,
        cpu_dtype: CpuDtype = "float32",
    ) -> None:
        self.vocabulary = Vocabulary.load(package)
        vllm_version()
        config = AutoConfig.from_pretrained(package, trust_remote_code=False)
        self._context = min(context_of(config), max_context or context_of(config))
        self._counts = dict.fromkeys(COUNTERS, 0.0)
        self._in_flight = 0
        self._counting = threading.Lock()  # threads of the HTTP API add, the loop's thread takes away
        port = free_port()
        on_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
        if on_cpu:
            check_cpu_dtype(cpu_dtype)
        options = {
            "port": port,
            "dtype": cpu_dtype if on_cpu else str(config.dtype or "auto").removeprefix("torch."),
            "max-model-len": self._context,
            **_memory_options(on_cpu, gpu_memory_gb, cache_gb),
        }
        arguments = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        self._process = subprocess.Popen(
            guarded([PROGRAM, "serve", str(package), *FLAGS, *arguments]),
            env=os.environ | _environment(on_cpu, threads),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._client = httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}",
            timeout=REQUEST_SECONDS,
            limits=httpx.Limits(max_connections=None),
            trust_env=False,
        )
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True).start()
        try:
            self._wait(f"http://127.0.0.1:{port}/health")
        except BaseException:
            self.close()
            raise

    def submit(self, request: Request) -> Future[list[Completion]]:
        if self.failure():
            raise Unavailable(self.failure())
        if not (
            request.temperature < GREEDY_BELOW or MIN_TEMPERATURE <= request.temperature <= MAX_TEMPERATURE
        ):
            possible = f"{MIN_TEMPERATURE:g} to {MAX_TEMPERATURE:g}, or 0"
            raise BadRequest(f"vllm samples at temperatures of {possible}; choose one of these")
        prompt = self.vocabulary.prompt(request, self._context)
        with self._counting:
            if self._in_flight >= MAX_REQUESTS:
                self._counts["requests_rejected_total"] += 1
                raise QueueFull(f"{MAX_REQUESTS} requests are in vllm; try again later")
            self._counts["requests_total"] += 1
            self._counts["prompt_tokens_total"] += len(prompt)
            self._in_flight += 1
        # Cancelling the future closes the connection, and vLLM drops a request whose client has left.
        future = asyncio.run_coroutine_threadsafe(self._complete(request, prompt), self._loop)
        future.add_done_callback(self._ended)  # also if it is cancelled before the loop begins with it
        return future

    def _ended(self, future: Future[list[Completion]]) -> None:
        """Give back a request's place, and count how it ended."""
        ending = "cancelled" if future.cancelled() else "failed" if future.exception() else "answered"
        with self._counting:
            self._in_flight -= 1
            self._counts[f"requests_{ending}_total"] += 1

    def metrics(self) -> dict[str, float]:
        with self._counting:
            return dict(self._counts)

    def failure(self) -> str:
        code = self._process.poll()
        return "" if code is None else f"vllm ended with code {code}; see the server's log"

    def close(self) -> None:
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
        with suppress(ProcessLookupError):  # also what a killed guard left
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _wait(self, health: str) -> None:
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline:
            if failure := self.failure():
                raise Crashed(failure)
            try:
                if httpx.get(health, timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.5)
        raise Crashed(f"vllm was not ready after {READY_SECONDS:.0f} s")

    async def _complete(self, request: Request, prompt: list[int]) -> list[Completion]:
        limit = min(request.max_new_tokens, self._context - len(prompt))
        if limit == 0 and not request.echo_prompt:
            return [Completion("", ())] * request.num_return_sequences
        body = self._body(request, prompt, limit)
        try:
            reply = await self._post(body)
        except _NotFinite:
            await self._overwrite(body["n"] * (len(prompt) + limit))
            try:
                reply = await self._post(body)
            except _NotFinite:  # they are this request's own
                await self._overwrite(body["n"] * (len(prompt) + limit))
                raise
        used = reply["usage"]
        with self._counting:
            shared = (used["prompt_tokens_details"] or {}).get("cached_tokens") or 0
            self._counts["prompt_tokens_computed_total"] += used["prompt_tokens"] - shared
            self._counts["new_tokens_total"] += used["completion_tokens"] if limit else 0
        completions = [self._completion(request, prompt, choice["logprobs"]) for choice in reply["choices"]]
        return completions * (request.num_return_sequences // len(completions))

    def _body(self, request: Request, prompt: list[int], limit: int) -> dict[str, Any]:
        """Return what to ask of vLLM."""
        greedy = request.temperature < GREEDY_BELOW  # of which vLLM makes one only
        body = {
            "model": "palio",
            "prompt": prompt,
            "max_tokens": limit,
            "temperature": 0.0 if greedy else request.temperature,
            "top_p": request.top_p,
            "n": 1 if greedy else request.num_return_sequences,
            "seed": request.seed % 2**63,
            "echo": request.echo_prompt,
            "logprobs": request.top_k_per_token,
            "stop": list(request.stop_sequences[:MAX_STOP_SEQUENCES]),
            "stop_token_ids": sorted(self.vocabulary.ends),
            "add_special_tokens": False,
            "return_tokens_as_token_ids": True,
        }
        if len(prompt) == self._context:
            # vLLM wants room for a new token. So the prompt's last one is new, and the only one that it may
            # choose, which changes neither its log-probability nor the candidates.
            body |= {"prompt": prompt[:-1], "max_tokens": 1, "allowed_token_ids": prompt[-1:]}
        return body

    async def _overwrite(self, tokens: int) -> None:
        """Fill the blocks that a request of so many tokens has just given back, which vLLM takes first.

        On a CPU it multiplies with the unused rest of a request's last block, where NaN of an earlier request
        would make NaN of all.
        """
        blocks = min(-(-tokens // CPU_BLOCK_TOKENS) + 1, (self._context - 1) // CPU_BLOCK_TOKENS)
        body = {"model": "palio", "prompt": [0] * blocks * CPU_BLOCK_TOKENS, "max_tokens": 1}
        await self._post(body | {"cache_salt": str(time.monotonic())})  # so that nothing of it is shared

    async def _post(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return vLLM's answer.

        Raises:
            BadRequest, RequestFailed, Unavailable: see there.
        """
        try:
            reply = await self._client.post("/v1/completions", json=body)
        except httpx.HTTPError as error:
            why = f"vllm did not answer: {type(error).__name__}"
        else:
            if reply.status_code == 200:
                return dict(reply.json())
            if NOT_FINITE in reply.text:
                raise _NotFinite
            if reply.status_code in (400, 422):
                raise BadRequest(f"vllm refused it: {reply.text[:200]}")
            why = f"vllm answered HTTP {reply.status_code}"
        deadline = time.monotonic() + SETTLE_SECONDS
        while time.monotonic() < deadline:
            if failure := self.failure():
                raise Unavailable(failure)
            await asyncio.sleep(0.1)
        raise RequestFailed(why)

    def _completion(self, request: Request, prompt: list[int], logprobs: Mapping[str, Any]) -> Completion:
        """Read vLLM's log-probabilities and candidates, one per token, whose names are `token_id:N`."""
        echoed = len(prompt) if request.echo_prompt else 0
        echo_stream, new_stream = TextStream(self.vocabulary, []), TextStream(self.vocabulary, prompt)
        tokens: list[Token] = []
        for name, logprob, top in zip(
            logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
        ):
            token = _token_id(name)
            if logprob is None and (tokens or not echoed):  # NaN, in a JSON that has no such number
                raise _NotFinite
            if len(tokens) >= echoed and token in self.vocabulary.ends:
                break
            # vLLM adds the chosen token where it is not among the candidates asked for.
            best = sorted((top or {}).items(), key=lambda item: -item[1])[: request.top_k_per_token]
            tokens.append(
                Token(
                    (echo_stream if len(tokens) < echoed else new_stream).add(token),
                    logprob if logprob is not None else 0.0,  # nothing predicts the first
                    {self.vocabulary.visible([_token_id(name)]): value for name, value in reversed(best)},
                )
            )
        echo, new = tokens[:echoed], tokens[echoed:]
        stop = find_stop("".join(token.text for token in new), request.stop_sequences)
        if stop is not None:
            new = list(cut(new, stop).tokens)
        return Completion("".join(token.text for token in echo + new), (*echo, *new))


def _memory_options(on_cpu: bool, gpu_memory_gb: float | None, cache_gb: float | None) -> dict[str, object]:
    options: dict[str, object] = {}
    if on_cpu:
        options["block-size"] = CPU_BLOCK_TOKENS
    if gpu_memory_gb:
        options["gpu-memory-utilization"] = f"{gpu_memory_share(gpu_memory_gb):.4f}"
    if cache_gb or on_cpu:
        options["kv-cache-memory-bytes"] = int((cache_gb or CPU_CACHE_GB) * 1e9)
    return options


def _environment(on_cpu: bool, threads: int | None) -> dict[str, str]:
    """Return vLLM's environment variables."""
    variables = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    if on_cpu:
        # Servers side by side would all be bound to the first cores.
        variables |= {"CUDA_VISIBLE_DEVICES": "", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    if threads:
        variables["OMP_NUM_THREADS"] = str(threads)
    return variables


def _token_id(name: str) -> int:
    return int(name.removeprefix("token_id:"))
