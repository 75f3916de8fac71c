"""Attention over a prefix tree: one forward pass for any mix of prompts and running completions.

A pass computes chunks, runs of new tokens of nodes of a `PrefixTree`, concatenated into one sequence
without padding. A token attends to all nodes above its own, and to its own node up to itself. Each of these
parts is one call of a fused kernel, shared by all chunks below a node, so a common prefix is read once for
all of them; the parts are merged by the log-sum-exp of their scores, which is exact (arXiv 2402.05099).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch.nn.attention.varlen import AuxRequest, varlen_attn
from transformers import AttentionInterface

from palio.serving.prefix_tree import Node

NAME = "palio_tree"
"""Name of this attention in transformers' registry."""
HARMLESS = {"position_ids", "use_cache", "output_attentions", "output_router_logits", "cache_position"}
"""Arguments that layers pass on and that do not change causal attention."""
MIN_WINDOW = 2048
"""Tokens. A model whose sliding window is at least this long is served up to its window."""


@dataclass(frozen=True)
class Chunk:
    """Tokens `start` to `stop` of a node; those before are computed."""

    node: Node
    start: int
    stop: int
    keep: int
    """Number of its last tokens whose logits are wanted."""

    @property
    def tokens(self) -> list[int]:
        return self.node.tokens[self.start : self.stop]

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Part:
    """One kernel call: rows `first` to `last` attend to the first `stop` tokens of a node."""

    first: int
    last: int
    node: Node
    stop: int
    causal: bool
    """The last row attends to all of them, the row before it to all but the last, and so on."""


class Plan:
    """The kernel calls of every layer in one forward pass."""

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        # In this order the chunks below a node are contiguous, and a node's own chunk comes before them.
        self.chunks = sorted(chunks, key=lambda chunk: [node.serial for node in chunk.node.path()])
        self.rows: list[tuple[int, int]] = []
        self.levels: list[list[Part]] = []
        """A row is in at most one part of each level, and in one part of the first."""
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
        """The shortest sliding window of any layer; up to it, full attention is the same."""


def _add(level: list[Part], part: Part) -> None:
    """Append a part, merged with the one before it where both attend to the same tokens."""
    if level:
        previous = level[-1]
        adjacent = previous.node is part.node and previous.last == part.first
        if adjacent and not part.causal and not previous.causal:
            level[-1] = replace(previous, last=part.last)
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
    dropout: float = 0.0,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: (1, heads, rows, size) tensors in, (1, rows, heads, size) out.

    Stores the new keys and values in the chunks' nodes.

    Raises as `check_arguments` does.
    """
    check_arguments(module, sliding_window, others)
    plan.window = min(plan.window, sliding_window or plan.window)
    layer: int = module.layer_idx  # type: ignore[assignment]
    for chunk, (first, last) in zip(plan.chunks, plan.rows, strict=True):
        store(chunk, layer, key[0, :, first:last], value[0, :, first:last])
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    merged, sums = _attend_level(plan.levels[0], layer, query[0], scale)
    merged = merged.float()
    for parts in plan.levels[1:]:
        rows = slice(parts[0].first, parts[-1].last)
        out, level_sums = _attend_level(parts, layer, query[0], scale)
        # out has the share exp(level_sums) / (exp(sums) + exp(level_sums)) of the merged softmax
        merged[:, rows].lerp_(out.float(), (level_sums - sums[:, rows]).sigmoid_().unsqueeze(-1))
        sums[:, rows] = sums[:, rows].logaddexp(level_sums)
    return merged.to(query.dtype)[None].transpose(1, 2), None


def check_arguments(module: torch.nn.Module, sliding_window: int | None, others: Mapping[str, Any]) -> None:
    """Refuse what plain causal attention with one scale does not compute.

    Raises:
        NotImplementedError: a window shorter than a prompt, or any argument that may change the result, as
            soft caps, sinks and biases do.
    """
    given = {name for name, value in others.items() if value is not None} - HARMLESS
    if (sliding_window or MIN_WINDOW) < MIN_WINDOW:
        given.add("a short sliding_window")
    if not getattr(module, "is_causal", True):
        given.add("is_causal=False")
    if given:
        raise NotImplementedError(f"{type(module).__name__} asks for {', '.join(sorted(given))}")


def _attend_level(
    parts: Sequence[Part], layer: int, query: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attend` for the rows from the first part's to the last's; rows between parts attend to nothing."""
    begin, end = parts[0].first, parts[-1].last
    if len(parts) == 1:
        return _attend_part(parts[0], layer, query, scale)
    out = torch.zeros_like(query[:, begin:end])
    sums = query.new_full(out.shape[:2], -torch.inf, dtype=torch.float32)
    for part in parts:
        rows = slice(part.first - begin, part.last - begin)
        out[:, rows], sums[:, rows] = _attend_part(part, layer, query, scale)
    return out, sums


def _attend_part(
    part: Part, layer: int, query: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    keys, values = part.node.memory[layer][:, :, : part.stop]
    return attend(query[:, part.first : part.last], keys, values, part.causal, scale)


def store(chunk: Chunk, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
    """Keep a chunk's (heads, tokens, size) keys and values in its node."""
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
    """Attention of (heads, rows, size) queries over (key heads, tokens, size) keys and values.

    Returns the output and, per head and row, the log-sum-exp of the scores. With `causal` the last row
    attends to all tokens, the row before it to all but one, and so on.
    """
    rows, tokens = query.shape[1], key.shape[1]
    if query.device.type == "cpu":
        mask = _mask(rows, tokens, query.dtype) if causal and rows < tokens else None
        out, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query[None], key[None], value[None], 0.0, causal and mask is None, attn_mask=mask, scale=scale
        )
        return out[0], sums[0]
    if query.device.type == "cuda" and query.dtype != torch.float32 and query.shape[-1] <= 256:
        out, sums = varlen_attn(
            query.transpose(0, 1),
            key.transpose(0, 1),
            value.transpose(0, 1),
            _boundaries(rows, query.device),
            _boundaries(tokens, query.device),
            rows,
            tokens,
            return_aux=AuxRequest(lse=True),
            scale=scale,
            window_size=(-1, 0) if causal else (-1, -1),
            enable_gqa=True,
        )
        return out.transpose(0, 1), sums
    return attend_unfused(query, key, value, causal, scale)


@lru_cache(maxsize=64)
def _mask(rows: int, tokens: int, dtype: torch.dtype) -> torch.Tensor:
    """Return a causal (rows, tokens) mask to add to scores, its diagonal ending in the corner."""
    return torch.full((rows, tokens), -torch.inf, dtype=dtype).triu_(1 + tokens - rows)


@lru_cache(maxsize=4096)
def _boundaries(length: int, device: torch.device) -> torch.Tensor:
    """Return the boundaries of one sequence; cached, so all layers share one copy to the GPU."""
    return torch.tensor([0, length], dtype=torch.int32, device=device)


def attend_unfused(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attend` by its definition, for dtypes and devices without a fused kernel."""
    groups = query.shape[0] // key.shape[0]
    scores = (query.float() * scale) @ key.float().repeat_interleave(groups, 0).transpose(1, 2)
    if causal:
        scores += torch.full_like(scores, -torch.inf).triu_(1 + scores.shape[2] - scores.shape[1])
    sums = scores.logsumexp(-1)
    weights = (scores - sums.unsqueeze(-1)).exp().to(value.dtype)
    return weights @ value.repeat_interleave(groups, 0), sums


AttentionInterface.register(NAME, tree_attention)
