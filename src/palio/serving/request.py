"""A request, its completions, and the reasons not to answer it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Request:
    """A prompt and how to continue it, in HELM's terms."""

    prompt: str
    max_new_tokens: int = 64
    temperature: float = 1e-7
    """Below `GREEDY_BELOW` the most likely token is taken."""
    top_p: float = 1.0
    top_k_per_token: int = 1
    """Candidates reported per token; has no effect on sampling."""
    num_return_sequences: int = 1
    echo_prompt: bool = False
    """Return the prompt before the completion, its tokens with their log-probabilities."""
    stop_sequences: tuple[str, ...] = ()
    seed: int = 0
    """Equal requests with equal seeds have equal answers, whatever else is being served."""


GREEDY_BELOW = 1e-5
"""HELM sends temperature 0 as 1e-7."""


@dataclass(frozen=True)
class Token:
    text: str
    logprob: float
    """Natural logarithm, from the model's own distribution, before temperature and top_p."""
    top_logprob: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Completion:
    text: str
    tokens: tuple[Token, ...]
    """Their texts, joined, are `text`."""

    @property
    def logprob(self) -> float:
        return sum(token.logprob for token in self.tokens)


class QueueFull(Exception):
    """Try again later: HTTP 429."""


class BadRequest(Exception):
    """Its message says what to change: HTTP 422."""


class RequestFailed(Exception):
    """The model failed on this request, and only on this one: HTTP 500."""


class Unavailable(Exception):
    """The engine is closed or broken: HTTP 503."""
