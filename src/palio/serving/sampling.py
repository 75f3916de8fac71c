"""Sampling: from one position's logits to a token, independent of the rest of the batch."""

from __future__ import annotations

import random

import torch


def sample(logits: torch.Tensor, temperature: float, top_p: float, random_state: random.Random) -> int:
    """Sample a token id from (vocabulary,) logits at a temperature above 0.

    Keeps the smallest set of most likely tokens whose probability reaches `top_p` (arXiv 1904.09751).
    """
    probabilities, order = (logits.double() / temperature).softmax(-1).sort(descending=True, stable=True)
    cumulative = probabilities.cumsum(-1)
    if top_p < 1:
        cumulative = cumulative[: int((cumulative < top_p).sum()) + 1]
    point = random_state.random() * float(cumulative[-1])
    rank = int(torch.searchsorted(cumulative, point, right=True))
    return int(order[min(rank, len(cumulative) - 1)])
