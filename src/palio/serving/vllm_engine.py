"""vLLM behind the same contract: `palio serve --engine vllm`, for a GPU.

vLLM pins its own torch and transformers, so it is installed in its own environment and runs as a child
process; all we need of it is the program `vllm` on PATH. It takes and returns token ids, so truncation, text
and stop sequences are those of the default engine.
"""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import httpx
from transformers import AutoConfig

from palio.errors import BadInput, Crashed
from palio.network import free_port
from palio.serving.model import context_of
from palio.serving.process import READY_SECONDS
from palio.serving.request import GREEDY_BELOW, BadRequest, Completion, Request, Token, Unavailable
from palio.serving.text import TextStream, Vocabulary, cut, find_stop
from palio.tensors import gpu_memory_share

PROGRAM = "vllm"
REQUEST_SECONDS = 3600.0
"""Above the deadline of the HTTP API, which cancels late requests."""


class VllmEngine:
    """See `Engine`. Queueing and batching are vLLM's own."""

    def __init__(self, package: Path, *, gpu_memory_gb: float | None = None) -> None:
        self.vocabulary = Vocabulary.load(package)
        if shutil.which(PROGRAM) is None:
            fix = "no such program on PATH; install it in an environment of its own and add its bin folder"
            raise BadInput("--engine", "", PROGRAM, fix)
        self._context = context_of(AutoConfig.from_pretrained(package))
        self._counts: Counter[str] = Counter()
        port = free_port()
        share = (
            ["--gpu-memory-utilization", f"{gpu_memory_share(gpu_memory_gb):.4f}"] if gpu_memory_gb else []
        )
        self._process = subprocess.Popen(
            [
                *(PROGRAM, "serve", str(package), "--served-model-name", "palio"),
                *("--host", "127.0.0.1", "--port", str(port), "--max-logprobs", "100"),
                *("--enable-prefix-caching", "--disable-log-requests", *share),
            ],
            stdin=subprocess.DEVNULL,
        )
        self._client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=REQUEST_SECONDS)
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
        prompt = self.vocabulary.prompt(request, self._context)
        self._counts["requests_total"] += 1
        self._counts["prompt_tokens_total"] += len(prompt)
        # Cancelling the future closes the connection, and vLLM drops a request whose client has left.
        return asyncio.run_coroutine_threadsafe(self._complete(request, prompt), self._loop)

    def metrics(self) -> dict[str, float]:
        return dict(self._counts)

    def failure(self) -> str:
        code = self._process.poll()
        return "" if code is None else f"vllm ended with code {code}; see the server's log"

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
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
        body = {
            "model": "palio",
            "prompt": prompt,
            "max_tokens": limit,
            "temperature": 0.0 if request.temperature < GREEDY_BELOW else request.temperature,
            "top_p": request.top_p,
            "n": request.num_return_sequences,
            "seed": request.seed,
            "echo": request.echo_prompt,
            "logprobs": request.top_k_per_token,
            "stop": list(request.stop_sequences),
            "add_special_tokens": False,
            "return_tokens_as_token_ids": True,
        }
        reply = await self._client.post("/v1/completions", json=body)
        if reply.status_code in (400, 422):
            raise BadRequest(f"vllm refused it: {reply.text[:200]}")
        reply.raise_for_status()
        self._counts["requests_answered_total"] += 1
        return [self._completion(request, prompt, choice["logprobs"]) for choice in reply.json()["choices"]]

    def _completion(self, request: Request, prompt: list[int], logprobs: Mapping[str, Any]) -> Completion:
        """Read vLLM's log-probabilities and candidates, one per token, whose names are `token_id:N`."""
        echoed = len(prompt) if request.echo_prompt else 0
        echo_stream, new_stream = TextStream(self.vocabulary, []), TextStream(self.vocabulary, prompt)
        tokens = [
            Token(
                (echo_stream if position < echoed else new_stream).add(_token_id(name)),
                logprob if logprob is not None else 0.0,  # nothing predicts the first
                {self.vocabulary.visible([_token_id(name)]): value for name, value in (top or {}).items()},
            )
            for position, (name, logprob, top) in enumerate(
                zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True)
            )
        ]
        echo, new = tokens[:echoed], tokens[echoed:]
        self._counts["new_tokens_total"] += len(new)
        text = "".join(token.text for token in new)
        stop = find_stop(text, request.stop_sequences)
        new = list(cut(new, len(text) if stop is None else stop).tokens)
        return Completion("".join(token.text for token in echo + new), (*echo, *new))


def _token_id(name: str) -> int:
    return int(name.removeprefix("token_id:"))
