"""What the HTTP side asks of an inference engine, and what it gets back.

An engine answers through a `Future`: cancelling it (the client left, its deadline passed) frees the
request's place at the engine's next step.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True)
class Request:
    """One prompt and how to continue it, in HELM's words."""

    prompt: str
    max_new_tokens: int = 64
    temperature: float = 1e-7
    """Below `GREEDY_BELOW` the most likely token is taken."""
    top_p: float = 1.0
    top_k_per_token: int = 1
    """Candidates reported per token; it does not change what is drawn."""
    num_return_sequences: int = 1
    echo_prompt: bool = False
    """Put the prompt before the completion, its tokens with their log-probabilities."""
    stop_sequences: tuple[str, ...] = ()
    seed: int = 0
    """Equal requests with equal seeds have equal answers, whatever is served beside them."""


GREEDY_BELOW = 1e-5
"""HELM sends temperature 0 as 1e-7."""


@dataclass(frozen=True)
class Token:
    text: str
    logprob: float
    """Natural logarithm, of the model's own distribution: temperature and top_p are not in it."""
    top_logprob: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Completion:
    text: str
    tokens: tuple[Token, ...]
    """Their texts in sequence are `text`."""

    @property
    def logprob(self) -> float:
        return sum(token.logprob for token in self.tokens)


class Engine(Protocol):
    """A loaded model. All methods may be called from any thread."""

    def submit(self, request: Request) -> Future[list[Completion]]:
        """Queue a request; the future holds its `num_return_sequences` completions.

        Raises:
            QueueFull: as many requests wait as the queue holds.
            BadRequest: the request cannot be answered, whoever asks.
            Unavailable: the engine serves no more.
        """
        ...

    def tokenize(self, text: str, max_length: int | None = None) -> list[int]:
        """Token ids as the model sees a prompt, the first `max_length` of them."""
        ...

    def decode(self, tokens: list[int]) -> str:
        """The inverse of `tokenize`."""
        ...

    def metrics(self) -> dict[str, float]:
        """Counters (`*_total`) and gauges since the start."""
        ...

    def failure(self) -> str:
        """Why the engine serves no more; empty while it does."""
        ...

    def close(self) -> None: ...


class QueueFull(Exception):
    """Come back later: HTTP 429."""


class BadRequest(Exception):
    """Its message says what to change: HTTP 422."""


class Unavailable(Exception):
    """The engine is closed or broken: HTTP 503."""
