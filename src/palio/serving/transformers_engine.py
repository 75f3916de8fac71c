"""The default engine: any causal model of transformers, with continuous batching over shared prefixes.

One thread owns the model. Each of its steps is one forward pass over the next tokens of all running
sequences: one token of each that is generating, followed by its draft, and up to `STEP_TOKENS` of the
prompts still to be read, each distinct prefix once. Requests are admitted in order of arrival once memory for
their keys and values is free, so nothing that runs is ever preempted.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path

import torch

from palio.cpu import CpuDtype
from palio.serving.attention import Chunk
from palio.serving.job import Generation, Job
from palio.serving.model import Model, cache_tokens, check_model, load_model
from palio.serving.prefix_tree import Node
from palio.serving.request import BadRequest, Completion, QueueFull, Request, RequestFailed, Unavailable
from palio.serving.text import Vocabulary

QUEUE_LENGTH = 256
"""Requests that may wait; HELM has 8 in flight."""
MAX_RUNNING = 64
"""Sequences in one forward pass."""
STEP_TOKENS = 512
"""Prompt tokens in one forward pass: enough to keep the hardware busy, few enough not to delay decoding."""
ECHO_TOKENS = 64
"""Tokens of an echoed prompt in one forward pass: each needs a row of logits."""
DRAFT_ROWS = 64
"""Rows up to which drafts fill a step: a small step is bound by reading the weights, so they cost little."""
STOP_SECONDS = 2.0
"""Time for a step to finish when the engine is closed."""
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


def next_chunks(generations: Iterable[Generation], budget: int = STEP_TOKENS) -> list[Chunk]:
    """Plan one forward pass: every prefix once, and no token before the ones it depends on."""
    chunks: dict[Node, Chunk] = {}
    for generation in sorted(generations, key=lambda generation: not generation.new):  # decoding first
        for node in generation.leaf.path():
            if (chunk := chunks.get(node)) is None:
                if node.filled == len(node.tokens):
                    continue
                own = node is generation.leaf
                echo = own and generation.job.request.echo_prompt
                count = min(len(node.tokens) - node.filled, ECHO_TOKENS if echo else budget)
                if count == 0:
                    break
                stop = node.filled + count
                first_kept = node.filled if echo else max(node.filled, generation.known - 1)
                keep = max(0, stop - first_kept) if own else 0
                chunk = chunks[node] = Chunk(node, node.filled, stop, keep)
                budget = max(0, budget - count)
            if chunk.stop < len(node.tokens):
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
        max_context: int | None = None,
        cpu_dtype: CpuDtype = "float32",
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self.vocabulary = Vocabulary.load(package)
        self._model: Model = load_model(package, device, gpu_memory_gb, cpu_dtype)
        self._model.context = min(self._model.context, max_context or self._model.context)
        self._tree = self._model.tree(cache_tokens(self._model, cache_gb, gpu_memory_gb))
        self._waiting: deque[Job] = deque()
        self._running: list[Generation] = []
        self._closed = False
        self._broken = ""
        self._counts = dict.fromkeys(COUNTERS, 0.0)
        self._latencies: deque[float] = deque(maxlen=1000)
        self._changed = threading.Condition()
        """Guards what other threads touch: the queue, the counts of requests, `_closed`."""
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    # --- any thread

    def submit(self, request: Request) -> Future[list[Completion]]:
        context = self._model.context
        job = Job(request, self.vocabulary.prompt(request, context), context, self._model.shares)
        if job.tokens > self._tree.capacity:
            raise BadRequest(
                f"it needs memory for {job.tokens} tokens and there is memory for {self._tree.capacity}; "
                "ask for fewer sequences or tokens"
            )
        with self._changed:
            if self.failure():
                raise Unavailable(self.failure())
            if len(self._waiting) >= QUEUE_LENGTH:
                self._counts["requests_rejected_total"] += 1
                raise QueueFull(f"the queue of {QUEUE_LENGTH} requests is full; try again later")
            self._counts["requests_total"] += 1
            self._waiting.append(job)
            self._changed.notify()
        return job.future

    def metrics(self) -> dict[str, float]:
        with self._changed:
            counts = dict(self._counts)
            latencies = sorted(self._latencies)
            counts["requests_waiting"] = len(self._waiting)
        for name, quantile in (("p50", 0.5), ("p95", 0.95)):
            if latencies:
                counts[f"request_seconds_{name}"] = latencies[int(quantile * (len(latencies) - 1))]
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
        return self._broken or ("the server is stopping" if self._closed else "")

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(STOP_SECONDS)  # it may hang in a kernel

    # --- the engine's thread

    def _work(self) -> None:
        try:
            while not self._closed:
                with self._changed:
                    if not (self._waiting or self._running or self._closed):
                        self._changed.wait()
                self._step()
        except Exception as error:
            traceback.print_exc()
            self._broken = f"the model is broken: {type(error).__name__}; see the server's log"
        with self._changed:
            unanswered = [*(generation.job for generation in self._running), *self._waiting]
            self._running = []
            self._waiting.clear()
        for job in unanswered:
            job.settle(Unavailable(self.failure()))

    def _step(self) -> None:
        for generation in self._running:
            generation.done = generation.done or generation.job.future.cancelled()
        self._retire()
        self._admit()
        self._draft()
        if self._model.shares:
            self._advance(self._running)
        else:
            for generation in list(self._running):
                self._advance([generation])
        self._retire()

    def _advance(self, generations: Sequence[Generation]) -> None:
        """Run one forward pass. If it fails, halve the requests in it until the one at fault is alone."""
        chunks = next_chunks(generation for generation in generations if not generation.job.future.done())
        if not chunks:
            return
        started = time.monotonic()
        try:
            logits = self._model.forward(chunks)
        except Exception as error:
            jobs = list(dict.fromkeys(generation.job for generation in generations))
            if len(jobs) == 1:
                check_model(self._model)  # raises if the fault is not the request's
                self._fail(jobs[0], error)
                return
            for half in (jobs[::2], jobs[1::2]):
                self._advance([generation for generation in generations if generation.job in half])
            return
        by_leaf = {generation.leaf: generation for generation in generations}
        for chunk, rows in zip(chunks, logits, strict=True):
            if chunk.keep:
                self._read(by_leaf[chunk.node], chunk, rows)
        self._count(chunks, by_leaf, time.monotonic() - started)

    def _read(self, generation: Generation, chunk: Chunk, logits: torch.Tensor) -> None:
        if generation.job.future.done():  # another of its sequences failed
            return
        drafted = max(0, chunk.stop - generation.known)
        try:
            chosen = generation.read(chunk.stop - chunk.keep, logits, self.vocabulary.ends)
        except Exception as error:
            self._fail(generation.job, error)
            return
        self._counts["draft_tokens_total"] += drafted
        self._counts["draft_tokens_accepted_total"] += max(0, chosen - 1)
        self._counts["new_tokens_total"] += chosen

    def _admit(self) -> None:
        while self._waiting:
            job = self._waiting[0]
            count = job.request.num_return_sequences
            if job.future.cancelled():
                self._counts["requests_cancelled_total"] += 1
            elif self._running and len(self._running) + count > MAX_RUNNING:
                return
            elif leaves := self._tree.acquire(job.shared, job.own, count):
                job.generations = [Generation(job, leaf, n, self.vocabulary) for n, leaf in enumerate(leaves)]
                self._running += job.generations
                self._counts["prompt_tokens_total"] += len(job.shared) + count * len(job.own_prompt)
            else:
                return
            with self._changed:
                self._waiting.popleft()

    def _draft(self) -> None:
        count = len(self._running)
        if self._model.shares and count:  # other models' caches cannot be rolled back
            for generation in self._running:
                generation.draft(DRAFT_ROWS // count - 1)

    def _retire(self) -> None:
        """Free the memory of finished sequences, and answer the requests whose sequences are all finished."""
        finished = [generation for generation in self._running if generation.done]
        self._running = [generation for generation in self._running if not generation.done]
        for generation in finished:
            self._tree.release(generation.leaf)
        for job in dict.fromkeys(generation.job for generation in finished):
            if all(generation.done for generation in job.generations):
                name = "cancelled" if job.future.cancelled() else "answered"
                with self._changed:
                    self._counts[f"requests_{name}_total"] += 1
                    self._latencies.append(time.monotonic() - job.submitted)
                job.settle([generation.completion() for generation in job.generations])

    def _fail(self, job: Job, error: Exception) -> None:
        """Answer a request with the error that it caused."""
        traceback.print_exception(error)
        for generation in self._running:
            if generation.job is job:
                self._tree.release(generation.leaf)
        self._running = [generation for generation in self._running if generation.job is not job]
        self._counts["requests_failed_total"] += 1
        job.settle(RequestFailed(f"the model failed on it: {type(error).__name__}; see the server's log"))

    def _count(self, chunks: Sequence[Chunk], by_leaf: dict[Node, Generation], seconds: float) -> None:
        counts = self._counts
        for chunk in chunks:
            prompt = len(by_leaf[chunk.node].job.own_prompt) if chunk.node in by_leaf else chunk.stop
            counts["prompt_tokens_computed_total"] += max(0, min(chunk.stop, prompt) - chunk.start)
        counts["steps_total"] += 1
        counts["step_tokens_total"] += sum(map(len, chunks))
        counts["step_sequences_total"] += sum(chunk.keep > 0 for chunk in chunks)
        counts["step_seconds_total"] += seconds
