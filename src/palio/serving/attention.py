"""Attention over a tree of prefixes: one forward pass for any mix of prompts and running completions.

A pass computes chunks, runs of new tokens of nodes of a `PrefixTree`, laid one behind the other in a
single row: no padding, whatever their lengths. A token attends to all of the nodes above its own and to
its own node up to itself. Each of these parts is one call of a fused kernel, shared by all the chunks
below a node, so a common prefix is read once for all of them; the parts are then joined by the
log-sum-exp of their scores, which is exact (arXiv 2402.05099).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.nn.attention.varlen import AuxRequest, varlen_attn
from transformers import AttentionInterface

from palio.serving.prefix_tree import Node

NAME = "palio_tree"
"""Of our attention among transformers' implementations."""
MIN_WINDOW = 2048
"""Tokens. A model whose sliding window is at least this long is served up to its window."""


@dataclass(frozen=True)
class Chunk:
    """Tokens `start` to `stop` of a node, the ones before being computed."""

    node: Node
    start: int
    stop: int
    keep: int
    """Logits are wanted of this many of its last tokens."""

    @property
    def tokens(self) -> list[int]:
        return self.node.tokens[self.start : self.stop]

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Part:
    """One call: rows `first` to `last` attend to tokens `start` to `stop` of a node."""

    level: int
    first: int
    last: int
    node: Node
    start: int
    stop: int
    causal: bool


class Plan:
    """What every layer of one forward pass does; made once per pass."""

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        # In this order the chunks below a node stand side by side, and those of a node before them.
        self.chunks = sorted(chunks, key=lambda chunk: [node.serial for node in chunk.node.path()])
        self.rows: list[tuple[int, int]] = []
        self.parts: list[Part] = []
        first = 0
        for chunk in self.chunks:
            last = first + len(chunk)
            self.rows.append((first, last))
            above = [(node, 0, len(node.tokens), False) for node in chunk.node.path()[:-1]]
            if len(chunk) == 1:
                own = [(chunk.node, 0, chunk.stop, False)]
            else:
                own = [(chunk.node, 0, chunk.start, False)] if chunk.start else []
                own.append((chunk.node, chunk.start, chunk.stop, True))
            for level, (node, start, stop, causal) in enumerate(above + own):
                self._add(Part(level, first, last, node, start, stop, causal))
            first = last
        self.length = first
        self.levels = 1 + max(part.level for part in self.parts)
        self.window = float("inf")
        """The shortest sliding window that a layer asked for: up to there, attention is as here."""

    def _add(self, part: Part) -> None:
        """Join a part to its left neighbour where both attend to the same."""
        for index in range(len(self.parts) - 1, -1, -1):
            other = self.parts[index]
            if other.level == part.level:
                same = (other.node, other.start, other.stop) == (part.node, part.start, part.stop)
                if same and not part.causal and not other.causal and other.last == part.first:
                    joined = Part(part.level, other.first, part.last, part.node, part.start, part.stop, False)
                    self.parts[index] = joined
                    return
                break
        self.parts.append(part)


def tree_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    plan: Plan,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: (1, heads, row, size) tensors in, (1, row, heads, size) out.

    Stores the new keys and values in the chunks' nodes.

    Raises:
        NotImplementedError: attention with capped scores, sinks, or a window shorter than a prompt.
    """
    if softcap is not None or s_aux is not None or (sliding_window or MIN_WINDOW) < MIN_WINDOW:
        raise NotImplementedError("its attention has a soft cap, sinks or a short window")
    plan.window = min(plan.window, sliding_window or plan.window)
    layer: int = module.layer_idx  # type: ignore[assignment]
    for chunk, (first, last) in zip(plan.chunks, plan.rows, strict=True):
        store(chunk, layer, key[0, :, first:last], value[0, :, first:last])
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    outs = query.new_zeros(plan.levels, *query.shape[1:])
    sums = query.new_full((plan.levels, *query.shape[1:3]), -torch.inf, dtype=torch.float32)
    for part in plan.parts:
        keys, values = part.node.memory[layer][:, :, part.start : part.stop]
        rows = slice(part.first, part.last)
        outs[part.level, :, rows], sums[part.level, :, rows] = attend(
            query[0, :, rows], keys, values, part.causal, scale
        )
    if plan.levels == 1:
        return outs.transpose(1, 2), None
    weights = sums.softmax(0).nan_to_num().unsqueeze(-1)  # NaN: rows that only fill up
    return (outs * weights).sum(0, keepdim=True).to(query.dtype).transpose(1, 2), None


def store(chunk: Chunk, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
    memory = chunk.node.memory.get(layer)
    if memory is None:
        heads, _, size = key.shape
        memory = key.new_empty(2, heads, chunk.node.capacity, size)
        chunk.node.memory[layer] = memory
    memory[0, :, chunk.start : chunk.stop] = key
    memory[1, :, chunk.start : chunk.stop] = value


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(heads, rows, size) queries over (key heads, tokens, size) keys and values.

    Returns the attention's output and, per head and row, the log of the sum of the exponentials of its
    scores. With `causal` row i attends to the first i + 1 tokens.
    """
    if query.device.type == "cpu":
        out, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query[None], key[None], value[None], 0.0, causal, scale=scale
        )
        return out[0], sums[0]
    if query.device.type == "cuda" and query.dtype != torch.float32 and query.shape[-1] <= 256:
        return _attend_cuda(query, key, value, causal, scale)
    return attend_plainly(query, key, value, causal, scale)


def _attend_cuda(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, tokens = query.shape[1], key.shape[1]
    out, sums = varlen_attn(
        query.transpose(0, 1),
        key.transpose(0, 1),
        value.transpose(0, 1),
        _ends(rows, query.device),
        _ends(tokens, query.device),
        rows,
        tokens,
        return_aux=AuxRequest(lse=True),
        scale=scale,
        window_size=(-1, 0) if causal else (-1, -1),
        enable_gqa=True,
    )
    return out.transpose(0, 1), sums


@lru_cache(maxsize=4096)
def _ends(length: int, device: torch.device) -> torch.Tensor:
    """Of the only sequence in a row; the same for every layer of a pass, so copied to the GPU once."""
    return torch.tensor([0, length], dtype=torch.int32, device=device)


def attend_plainly(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attend` in four lines of arithmetic, for devices without a fused kernel: the definition."""
    groups = query.shape[0] // key.shape[0]
    scores = (query.float() * scale) @ key.float().repeat_interleave(groups, 0).transpose(1, 2)
    if causal:
        scores += torch.full_like(scores, -torch.inf).triu_(1)
    sums = scores.logsumexp(-1)
    weights = (scores - sums.unsqueeze(-1)).exp().to(value.dtype)
    return weights @ value.repeat_interleave(groups, 0), sums


AttentionInterface.register(NAME, tree_attention)
