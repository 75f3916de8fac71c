"""The default engine: any causal model of transformers, batched continuously over shared prefixes.

One thread owns the model. Each of its steps is one forward pass over the next tokens of all running
sequences: one token each of those that write with a few guessed ones behind it, and up to `STEP_TOKENS`
of the prompts still to be read, each distinct prefix once. Requests are admitted in their order as soon
as the memory of their keys and values is free, so nothing that runs is ever thrown out again.
"""

from __future__ import annotations

import contextlib
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
from palio.serving.engine import BadRequest, Completion, QueueFull, Request, Unavailable
from palio.serving.job import Job, Writer
from palio.serving.model import Model, cache_tokens, load_model
from palio.serving.prefix_tree import Node, PrefixTree
from palio.serving.text import Vocabulary

QUEUE_LENGTH = 256
"""Requests that may wait; HELM has 8 in flight."""
MAX_RUNNING = 64
"""Sequences in one forward pass."""
STEP_TOKENS = 512
"""Prompt tokens in one forward pass: enough to keep the hardware busy, few enough to let others write."""
ECHO_TOKENS = 64
"""Of a prompt whose log-probabilities are wanted, in one pass: each has a row of logits."""
DRAFT_ROWS = 64
"""Rows up to which guessed tokens fill a step: few rows cost hardly less than these, as the time is that
of reading the weights."""
MAX_FAILURES = 3
"""Failed steps one after the other before the engine says that it is broken."""


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
                keep = count if echo else max(0, stop - max(node.filled, writer.known - 1)) if own else 0
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
        self._draft()
        chunks = next_chunks(self._running)
        if not chunks:
            return
        started = time.monotonic()
        logits = self._model.forward(chunks)
        of_leaf = {writer.leaf: writer for writer in self._running}
        for chunk, rows in zip(chunks, logits, strict=True):
            if chunk.keep:
                writer = of_leaf[chunk.node]
                self._counts["draft_tokens_total"] += max(0, chunk.stop - writer.known)
                chosen = writer.read(chunk.stop - chunk.keep, rows, self._model.ends)
                self._counts["draft_tokens_accepted_total"] += max(0, chosen - 1)
                self._counts["new_tokens_total"] += chosen
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

    def _draft(self) -> None:
        count = len(self._running)
        if self._model.shares and count:  # other models' caches cannot be rolled back
            for writer in self._running:
                writer.draft(DRAFT_ROWS // count - 1)

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
    "draft_tokens_total",
    "draft_tokens_accepted_total",
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
