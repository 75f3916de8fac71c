"""Cross-entropy over a large vocabulary, with one tensor as large as the logits: its gradient.

torch's own keeps the logits in fp32, their log-softmax and two gradients: with 150 000 tokens in a vocabulary
a few thousand positions would fill a GPU. The gradient of a sum of cross-entropies, softmax minus one at the
target, is known in the forward pass, so it is computed there, some rows at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

ROWS = 128
"""Of logits at a time: few enough for a CPU's cache, enough to keep a GPU busy."""


def summed_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the sum over the K targets of the cross-entropy of the (K, vocabulary) logits, in fp32 nats.

    Its gradient has the logits' dtype; in fp16 it is kept in fp32 until the loss scale is known, which keeps
    small probabilities from vanishing.
    """
    total: torch.Tensor = _SummedCrossEntropy.apply(logits, targets)
    return total


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), device=logits.device)
        ctx.dtype = logits.dtype
        kept = torch.float32 if logits.dtype == torch.float16 else logits.dtype
        gradient = torch.empty_like(logits, dtype=kept) if ctx.needs_input_grad[0] else None
        for start in range(0, len(targets), ROWS):
            wanted = targets[start : start + ROWS, None]
            log_p = torch.log_softmax(logits[start : start + ROWS], dim=-1, dtype=torch.float32)
            total -= log_p.gather(1, wanted).sum()
            if gradient is not None:
                p = log_p.exp_()
                gradient[start : start + ROWS] = p.scatter_add_(1, wanted, p.new_full(wanted.shape, -1.0))
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(scale).to(ctx.dtype), None
