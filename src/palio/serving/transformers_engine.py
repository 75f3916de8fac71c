"""The default engine: any causal model of transformers, batched continuously over shared prefixes.

One thread owns the model. Each of its steps is one forward pass over the next tokens of all running
sequences: one token each of those that write, and up to `STEP_TOKENS` of the prompts still to be read,
each distinct prefix once. Requests are admitted in their order as soon as the memory of their keys and
values is free, so nothing that runs is ever thrown out again.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
import traceback
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, InvalidStateError
from pathlib import Path

import torch
from transformers import AutoTokenizer

from palio.serving.attention import Chunk
from palio.serving.engine import (
    GREEDY_BELOW,
    BadRequest,
    Completion,
    QueueFull,
    Request,
    Token,
    Unavailable,
)
from palio.serving.model import Model, cache_tokens, load_model
from palio.serving.prefix_tree import Node, PrefixTree
from palio.serving.sampling import draw, most_likely
from palio.serving.text import TextStream, Vocabulary, cut, find_stop

QUEUE_LENGTH = 256
"""Requests that may wait; HELM has 8 in flight."""
MAX_RUNNING = 64
"""Sequences in one forward pass."""
STEP_TOKENS = 512
"""Prompt tokens in one forward pass: enough to keep the hardware busy, few enough to let others write."""
ECHO_TOKENS = 64
"""Of a prompt whose log-probabilities are wanted, in one pass: each has a row of logits."""
MAX_FAILURES = 3
"""Failed steps one after the other before the engine says that it is broken."""


class Job:
    """A request on its way."""

    def __init__(self, request: Request, prompt: list[int], context: int, shares: bool) -> None:
        self.request = request
        self.prompt = prompt
        self.limit = min(request.max_new_tokens, context - len(prompt))
        """New tokens."""
        # A sequence's own tokens begin with the prompt's last: however much of the prompt is shared, there
        # is a token left to compute the next one's logits from. What must be computed anew is all its own.
        alone = request.echo_prompt or not shares
        self.shared = [] if alone else prompt[:-1]
        self.begun = prompt if alone else prompt[-1:]
        self.own = len(self.begun) + max(0, self.limit - 1)
        """Tokens of each sequence that need room of their own."""
        self.future: Future[list[Completion]] = Future()
        self.submitted = time.monotonic()
        self.writers: list[Writer] = []

    @property
    def tokens(self) -> int:
        """That need room, shared or not."""
        return len(self.shared) + self.own * self.request.num_return_sequences


class Writer:
    """One completion being written."""

    def __init__(self, job: Job, leaf: Node, number: int, vocabulary: Vocabulary) -> None:
        self.job = job
        self.leaf = leaf
        leaf.tokens = list(job.begun)
        self.echoed: list[Token] = []
        self.written: list[Token] = []
        self.text = ""
        self.done = False
        self._vocabulary = vocabulary
        self._random = random.Random(f"{job.request.seed} {number} {job.request.prompt}")
        self._echo = TextStream(vocabulary, [])
        self._stream = TextStream(vocabulary, job.prompt)

    def read(self, position: int, logits: torch.Tensor, best: int, ends: frozenset[int]) -> None:
        """Take the (vocabulary,) logits behind the leaf's token at `position`, whose largest is `best`."""
        request, tokens = self.job.request, self.leaf.tokens
        if position + 1 < len(tokens):  # the next token is known: the prompt is echoed
            if not self.echoed:
                self.echoed.append(Token(self._echo.add(tokens[0]), 0.0))  # nothing predicts the first
            token = tokens[position + 1]
            self.echoed.append(self._token(logits, token, self._echo.add(token)))
            return
        if request.echo_prompt and not self.echoed:
            self.echoed.append(Token(self._echo.add(tokens[0]), 0.0))
        if self.job.limit == 0:
            self.done = True
            return
        greedy = request.temperature < GREEDY_BELOW
        token = best if greedy else draw(logits, request.temperature, request.top_p, self._random)
        if token in ends:
            self.done = True
            return
        self.written.append(self._token(logits, token, self._stream.add(token)))
        self.text += self.written[-1].text
        if (stop := find_stop(self.text, request.stop_sequences)) is not None:
            self.written = list(cut(self.written, stop).tokens)
            self.done = True
        elif len(self.written) == self.job.limit:
            self.done = True
        else:
            tokens.append(token)

    def _token(self, logits: torch.Tensor, token: int, text: str) -> Token:
        logprobs = logits.log_softmax(-1)
        best = most_likely(logprobs, self.job.request.top_k_per_token)
        top = {self._vocabulary.visible([one]): value for one, value in reversed(best)}
        return Token(text, float(logprobs[token]), top)

    def completion(self) -> Completion:
        tokens = (*self.echoed, *self.written)
        return Completion("".join(token.text for token in tokens), tokens)


def next_chunks(writers: Iterable[Writer], budget: int = STEP_TOKENS) -> list[Chunk]:
    """What one forward pass computes: every prefix once, and nothing before what it stands on."""
    chunks: dict[Node, Chunk] = {}
    for writer in sorted(writers, key=lambda one: not one.written):  # who writes waits for no one's prompt
        for node in writer.leaf.path():
            if (planned := chunks.get(node)) is None:
                if node.filled == len(node.tokens):
                    continue
                own = node is writer.leaf
                echo = own and writer.job.request.echo_prompt
                count = min(len(node.tokens) - node.filled, ECHO_TOKENS if echo else budget)
                if count == 0:
                    break
                stop = node.filled + count
                keep = count if echo else int(own and stop == len(node.tokens))
                planned = chunks[node] = Chunk(node, node.filled, stop, keep)
                budget = max(0, budget - count)
            if planned.stop < len(node.tokens):
                break
    return list(chunks.values())


class TransformersEngine:
    """See `Engine`. `cache_gb` is the memory for keys and values; see `cache_tokens` for its default."""

    def __init__(
        self,
        package: Path,
        *,
        device: str = "auto",
        threads: int | None = None,
        gpu_memory_gb: float | None = None,
        cache_gb: float | None = None,
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self._model: Model = load_model(package, device, gpu_memory_gb)
        self._vocabulary = Vocabulary(AutoTokenizer.from_pretrained(package))
        self._tree = PrefixTree(cache_tokens(self._model, cache_gb, gpu_memory_gb))
        self._waiting: deque[Job] = deque()
        self._running: list[Writer] = []
        self._closed = False
        self._failures = 0
        self._counts: defaultdict[str, float] = defaultdict(float)
        self._latencies: deque[float] = deque(maxlen=1000)
        self._changed = threading.Condition()
        """Guards what other threads touch: the queue, the counts of requests, `_closed`."""
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    # --- any thread

    def submit(self, request: Request) -> Future[list[Completion]]:
        context = self._model.context
        prompt = self._vocabulary.prompt(request.prompt)
        kept = prompt[: max(1, context - request.max_new_tokens)]  # cut from the right, as HELM does
        job = Job(request, kept, context, self._model.shares)
        if job.tokens > self._tree.capacity:
            raise BadRequest(
                f"it needs the keys and values of {job.tokens} tokens and {self._tree.capacity} fit; "
                "ask for fewer sequences or tokens"
            )
        with self._changed:
            if self.failure():
                raise Unavailable(self.failure())
            if len(self._waiting) >= QUEUE_LENGTH:
                self._counts["requests_rejected_total"] += 1
                raise QueueFull(f"{QUEUE_LENGTH} requests wait already; come back later")
            self._counts["requests_total"] += 1
            self._waiting.append(job)
            self._changed.notify()
        return job.future

    def tokenize(self, text: str, max_length: int | None = None) -> list[int]:
        return self._vocabulary.encode(text)[:max_length]

    def decode(self, tokens: list[int]) -> str:
        return self._vocabulary.decode(tokens)

    def metrics(self) -> dict[str, float]:
        with self._changed:
            counts = {name: self._counts[name] for name in COUNTERS}
            latencies = sorted(self._latencies)
            counts["requests_waiting"] = len(self._waiting)
        for name, part in (("p50", 0.5), ("p95", 0.95)):
            if latencies:
                counts[f"request_seconds_{name}"] = latencies[int(part * (len(latencies) - 1))]
        return counts | {
            "sequences_running": len(self._running),
            "cache_tokens": self._tree.size,
            "cache_tokens_capacity": self._tree.capacity,
            "cache_tokens_evicted_total": self._tree.evicted,
            "cache_bytes": self._tree.size * self._model.token_bytes,
            "cache_bytes_peak": self._tree.peak * self._model.token_bytes,
            "cache_bytes_capacity": self._tree.capacity * self._model.token_bytes,
        }

    def failure(self) -> str:
        if self._failures >= MAX_FAILURES:
            return "the model failed again and again; see the server's log"
        return "the server is stopping" if self._closed or not self._thread.is_alive() else ""

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    # --- the engine's thread

    def _work(self) -> None:
        while not self._closed and self._failures < MAX_FAILURES:
            with self._changed:
                if not (self._waiting or self._running or self._closed):
                    self._changed.wait()
            try:
                self._step()
                self._failures = 0
            except Exception as error:
                traceback.print_exc()
                self._failures += 1
                self._give_up(error)
        with self._changed:
            jobs = list(self._waiting)
            self._waiting.clear()
        self._give_up(Unavailable(self.failure()))
        for job in jobs:
            _settle(job, Unavailable(self.failure()))

    def _step(self) -> None:
        for writer in self._running:
            writer.done = writer.done or writer.job.future.cancelled()
        self._leave()
        self._admit()
        chunks = next_chunks(self._running)
        if not chunks:
            return
        started = time.monotonic()
        logits = self._model.forward(chunks)
        of_leaf = {writer.leaf: writer for writer in self._running}
        for chunk, rows in zip(chunks, logits, strict=True):
            if chunk.keep:
                writer = of_leaf[chunk.node]
                best = rows.argmax(-1).tolist()
                for at in range(chunk.keep):
                    writer.read(chunk.stop - chunk.keep + at, rows[at], best[at], self._model.ends)
        self._count(chunks, of_leaf, time.monotonic() - started)
        self._leave()

    def _admit(self) -> None:
        while self._waiting:
            job = self._waiting[0]
            count = job.request.num_return_sequences
            if job.future.cancelled():
                self._counts["requests_cancelled_total"] += 1
            elif self._running and len(self._running) + count > MAX_RUNNING:
                return
            elif leaves := self._tree.acquire(job.shared, job.own, count):
                job.writers = [Writer(job, leaf, n, self._vocabulary) for n, leaf in enumerate(leaves)]
                self._running += job.writers
                self._counts["prompt_tokens_total"] += len(job.shared) + count * len(job.begun)
            else:
                return
            with self._changed:
                self._waiting.popleft()

    def _leave(self) -> None:
        """Free what is done, and answer the requests that are."""
        for writer in self._running:
            if writer.done:
                self._tree.release(writer.leaf)
        done = {writer.job: None for writer in self._running if writer.done}
        self._running = [writer for writer in self._running if not writer.done]
        for job in done:
            if all(writer.done for writer in job.writers):
                name = "cancelled" if job.future.cancelled() else "answered"
                with self._changed:
                    self._counts[f"requests_{name}_total"] += 1
                    self._latencies.append(time.monotonic() - job.submitted)
                _settle(job, [writer.completion() for writer in job.writers])

    def _give_up(self, error: Exception) -> None:
        """Fail what runs, and forget what may be half computed."""
        for writer in self._running:
            self._tree.release(writer.leaf)
        jobs = {writer.job: None for writer in self._running}
        self._running = []
        self._tree.clear()
        for job in jobs:
            self._counts["requests_failed_total"] += 1
            _settle(job, error)

    def _count(self, chunks: Sequence[Chunk], of_leaf: dict[Node, Writer], seconds: float) -> None:
        counts = self._counts
        for chunk in chunks:
            begun = len(of_leaf[chunk.node].job.begun) if chunk.node in of_leaf else chunk.stop
            counts["prompt_tokens_computed_total"] += max(0, min(chunk.stop, begun) - chunk.start)
        counts["new_tokens_total"] += sum(chunk.node in of_leaf and chunk.keep > 0 for chunk in chunks)
        counts["steps_total"] += 1
        counts["step_tokens_total"] += sum(map(len, chunks))
        counts["step_sequences_total"] += sum(chunk.keep > 0 for chunk in chunks)
        counts["step_seconds_total"] += seconds


COUNTERS = (
    "requests_total",
    "requests_answered_total",
    "requests_rejected_total",
    "requests_cancelled_total",
    "requests_failed_total",
    "prompt_tokens_total",
    "prompt_tokens_computed_total",
    "new_tokens_total",
    "steps_total",
    "step_tokens_total",
    "step_sequences_total",
    "step_seconds_total",
)


def _settle(job: Job, outcome: list[Completion] | Exception) -> None:
    with contextlib.suppress(InvalidStateError):  # cancelled meanwhile
        if isinstance(outcome, Exception):
            job.future.set_exception(outcome)
        else:
            job.future.set_result(outcome)
