"""Sampling: from one position's logits to a token, independent of the rest of the batch."""

from __future__ import annotations

import hashlib

import torch


def seeded(text: str) -> torch.Generator:
    """Return a source of random numbers, the same ones for equal texts."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]))


def sample(logits: torch.Tensor, temperature: float, top_p: float, source: torch.Generator) -> int:
    """Sample a token id from (vocabulary,) logits at a temperature above 0.

    Keeps the smallest set of most likely tokens whose probability reaches `top_p` (arXiv 1904.09751), and
    draws by the Gumbel-max trick (arXiv 1411.0030): each token has its own random number, so the last digits
    of the logits, which change with the batch, hardly ever change the choice.
    """
    scores = logits.double() / temperature
    if top_p < 1:
        probabilities, order = scores.softmax(-1).sort(descending=True, stable=True)
        scores[order[probabilities.cumsum(-1) - probabilities >= top_p]] = -torch.inf
    noise = torch.empty(scores.shape, dtype=scores.dtype).exponential_(generator=source)
    return int((scores - noise.log().to(scores.device)).argmax())
