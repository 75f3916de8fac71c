"""From one position's logits to a token: pure, and independent of what else is in the batch."""

from __future__ import annotations

import random

import torch

from palio.serving.engine import GREEDY_BELOW


def draw(logits: torch.Tensor, temperature: float, top_p: float, random_state: random.Random) -> int:
    """A token id from (vocabulary,) logits.

    The smallest set of most likely tokens whose probability reaches `top_p` is kept (arXiv 1904.09751).
    """
    if temperature < GREEDY_BELOW:
        return int(logits.argmax())
    probabilities, order = (logits.double() / temperature).softmax(-1).sort(descending=True, stable=True)
    reached = probabilities.cumsum(-1)
    if top_p < 1:
        kept = int((reached < top_p).sum()) + 1
        reached = reached[:kept]
    point = random_state.random() * float(reached[-1])
    chosen = int(torch.searchsorted(reached, point, right=True))
    return int(order[min(chosen, len(reached) - 1)])


def most_likely(logprobs: torch.Tensor, count: int) -> list[tuple[int, float]]:
    """The `count` best (token, log-probability) of (vocabulary,) log-probabilities."""
    values, tokens = logprobs.topk(min(count, len(logprobs)))
    return list(zip(tokens.tolist(), values.tolist(), strict=True))
