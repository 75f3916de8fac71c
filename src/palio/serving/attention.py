"""Attention over a tree of prefixes: one forward pass for any mix of prompts and running completions.

A pass computes chunks, runs of new tokens of nodes of a `PrefixTree`, laid one behind the other in a
single row: no padding, whatever their lengths. A token attends to all of the nodes above its own and to
its own node up to itself. Each of these parts is one call of a fused kernel, shared by all the chunks
below a node, so a common prefix is read once for all of them; the parts are then joined by the
log-sum-exp of their scores, which is exact (arXiv 2402.05099).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
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
    """One call: rows `first` to `last` attend to the first `stop` tokens of a node."""

    first: int
    last: int
    node: Node
    stop: int
    causal: bool
    """The last row attends to them all, the row before it to all but the last, and so on."""


class Plan:
    """What every layer of one forward pass does; made once per pass."""

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        # In this order the chunks below a node stand side by side, and those of a node before them.
        self.chunks = sorted(chunks, key=lambda chunk: [node.serial for node in chunk.node.path()])
        self.rows: list[tuple[int, int]] = []
        self.levels: list[list[Part]] = []
        """A row is in at most one part of a level, and in one of the first."""
        first = 0
        for chunk in self.chunks:
            last = first + len(chunk)
            self.rows.append((first, last))
            parts = [Part(first, last, node, len(node.tokens), False) for node in chunk.node.path()[:-1]]
            parts.append(Part(first, last, chunk.node, chunk.stop, len(chunk) > 1))
            self.levels += [[] for _ in parts[len(self.levels) :]]
            for level, part in zip(self.levels, parts, strict=False):
                _add(level, part)
            first = last
        self.window = float("inf")
        """The shortest sliding window that a layer asked for: up to there, attention is as here."""


def _add(level: list[Part], part: Part) -> None:
    """Join a part to its left neighbour where both attend to the same."""
    if level:
        left = level[-1]
        same = left.node is part.node and left.last == part.first
        if same and not part.causal and not left.causal:
            level[-1] = replace(left, last=part.last)
            return
    level.append(part)


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
    joined, sums = _attend_level(plan.levels[0], layer, query[0], scale)
    joined = joined.float()
    for parts in plan.levels[1:]:
        rows = slice(parts[0].first, parts[-1].last)
        out, more = _attend_level(parts, layer, query[0], scale)
        joined[:, rows].lerp_(out.float(), (more - sums[:, rows]).sigmoid_().unsqueeze(-1))
        sums[:, rows] = sums[:, rows].logaddexp(more)
    return joined.to(query.dtype)[None].transpose(1, 2), None


def _attend_level(
    parts: Sequence[Part], layer: int, query: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attend` for the rows from the first part's to the last's; those between parts attend to nothing."""
    begin, end = parts[0].first, parts[-1].last
    if len(parts) == 1:
        (part,) = parts
        keys, values = part.node.memory[layer][:, :, : part.stop]
        return attend(query[:, begin:end], keys, values, part.causal, scale)
    out = torch.zeros_like(query[:, begin:end])
    sums = query.new_full(out.shape[:2], -torch.inf, dtype=torch.float32)
    for part in parts:
        keys, values = part.node.memory[layer][:, :, : part.stop]
        rows = slice(part.first - begin, part.last - begin)
        out[:, rows], sums[:, rows] = attend(
            query[:, part.first : part.last], keys, values, part.causal, scale
        )
    return out, sums


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
    scores. With `causal` the last row attends to all tokens, the row before it to all but one, and so on.
    """
    if query.device.type == "cpu":
        rows, tokens = query.shape[1], key.shape[1]
        mask = _mask(rows, tokens, query.dtype) if causal and rows < tokens else None
        out, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query[None], key[None], value[None], 0.0, causal and mask is None, attn_mask=mask, scale=scale
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


@lru_cache(maxsize=64)
def _mask(rows: int, tokens: int, dtype: torch.dtype) -> torch.Tensor:
    """(rows, tokens) to be added to scores, the diagonal ending in the corner; the same for every layer."""
    return torch.full((rows, tokens), -torch.inf, dtype=dtype).triu_(1 + tokens - rows)


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
        scores += torch.full_like(scores, -torch.inf).triu_(1 + scores.shape[2] - scores.shape[1])
    sums = scores.logsumexp(-1)
    weights = (scores - sums.unsqueeze(-1)).exp().to(value.dtype)
    return weights @ value.repeat_interleave(groups, 0), sums


AttentionInterface.register(NAME, tree_attention)
