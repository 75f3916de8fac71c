"""Attention over a prefix tree with few kernel calls, for GPUs: as many for sixty-four requests as for one.

`attention` calls a kernel for each node; on a GPU the calls themselves, from Python, would then take most of
the time. Here the keys and values of all nodes of a layer are regions of one tensor, and one call of a
variable-length kernel computes the own nodes of all chunks, one more each level of the tree above them. The
outputs are merged by the log-sum-exp of their scores, which is exact (arXiv 2402.05099).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch.nn.attention.varlen import AuxRequest, varlen_attn
from transformers import AttentionInterface

from palio.serving.attention import Chunk, attend, check_arguments
from palio.serving.prefix_tree import Node

NAME = "palio_pooled"
"""Name of this attention in transformers' registry."""


class Pool:
    """Keys and values: of each layer one (2, rows, key heads, size) tensor, made when it is first stored."""

    def __init__(self, capacity: int, scratch: int) -> None:
        self.rows = capacity + scratch
        self._scratch = capacity
        self.layers: dict[int, torch.Tensor] = {}

    def offset(self, node: Node) -> int:
        """Return a node's first row; a node of no tree is computed behind all others."""
        return self._scratch if node.offset is None else node.offset

    def store(self, layer: int, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Put (rows, key heads, size) keys and values into their slots; return the layer's tensor."""
        memory = self.layers.get(layer)
        if memory is None:
            # Zeros: a kernel may read rows behind those in use, and a NaN there outlives its weight of 0.
            memory = self.layers[layer] = key.new_zeros(2, self.rows, *key.shape[1:])
        memory[0].index_copy_(0, slots, key)
        memory[1].index_copy_(0, slots, value)
        return memory


@dataclass(frozen=True)
class Call:
    """One kernel call. Sequence i: rows `query_bounds[i]` to `query_bounds[i + 1]` of the query attend to the
    first `used[i]` tokens from `key_bounds[i]` on."""

    rows: torch.Tensor | None
    """Rows of the step that are its query; None for all."""
    query_bounds: torch.Tensor
    key_bounds: torch.Tensor
    used: torch.Tensor
    longest_query: int
    longest_key: int
    causal: bool
    """The last row attends to all tokens, the row before it to all but the last, and so on."""


@dataclass
class Sequences:
    """A call in the making: (first row of keys, tokens in use, rows of the query) of each sequence."""

    causal: bool
    found: list[tuple[int, int, list[int]]]

    def call(self, device: torch.device, *, all_rows: bool = False) -> Call:
        """Raises ValueError where a sequence would reach into the next one's keys."""
        found = sorted(self.found)
        begins, used, rows = zip(*found, strict=True)
        lengths = [len(one) for one in rows]
        ends = [begin + count for begin, count in zip(begins, used, strict=True)]
        if any(end > begin for end, begin in zip(ends, begins[1:], strict=False)):
            raise ValueError("two sequences overlap in the pool")

        def on_device(values: Sequence[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        return Call(
            rows=None if all_rows else on_device([row for one in rows for row in one]),
            query_bounds=on_device([0, *accumulate(lengths)]),
            key_bounds=on_device([*begins, ends[-1]]),
            used=on_device(used),
            longest_query=max(lengths),
            longest_key=max(used),
            causal=self.causal,
        )


class PooledPlan:
    """The kernel calls of every layer in one forward pass. Raises ValueError as `Sequences.call` does."""

    def __init__(self, chunks: Sequence[Chunk], pool: Pool, device: torch.device) -> None:
        self.pool = pool
        self.chunks = sorted(chunks, key=lambda chunk: pool.offset(chunk.node) + chunk.start)
        bounds = [0, *accumulate(map(len, self.chunks))]
        self.rows = list(pairwise(bounds))
        own = Sequences(True, [])
        above: list[dict[Node, list[int]]] = []
        slots: list[int] = []
        for chunk, (first, last) in zip(self.chunks, self.rows, strict=True):
            begin = pool.offset(chunk.node)
            slots += range(begin + chunk.start, begin + chunk.stop)
            own.found.append((begin, chunk.stop, list(range(first, last))))
            path = chunk.node.path()[:-1]
            above += [{} for _ in path[len(above) :]]
            for level, node in zip(above, path, strict=False):
                level.setdefault(node, []).extend(range(first, last))
        self.slots = torch.tensor(slots, device=device)
        self.calls = [own.call(device, all_rows=True)]
        for level in above:
            found = [(pool.offset(node), len(node.tokens), rows) for node, rows in level.items()]
            self.calls.append(Sequences(False, found).call(device))
        self.places = self._places(len(slots), device)
        self.window = float("inf")
        """The shortest sliding window of any layer; up to it, full attention is the same."""

    def _places(self, rows: int, device: torch.device) -> torch.Tensor:
        """Return (calls, rows): where a row's output is among those of all calls, or behind them all."""
        counts = [rows, *(len(call.rows) for call in self.calls[1:] if call.rows is not None)]
        places = torch.full((len(counts), rows), sum(counts), device=device)
        places[0] = torch.arange(rows, device=device)
        for number, (call, begin) in enumerate(zip(self.calls[1:], accumulate(counts), strict=False), 1):
            if call.rows is not None:
                places[number, call.rows] = torch.arange(begin, begin + len(call.rows), device=device)
        return places


def pooled_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    plan: PooledPlan,
    scaling: float | None = None,
    sliding_window: int | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: (1, heads, rows, size) tensors in, (1, rows, heads, size) out.

    Stores the new keys and values in the pool. Raises as `tree_attention` does.
    """
    check_arguments(module, sliding_window, others)
    plan.window = min(plan.window, sliding_window or plan.window)
    rows, keys, values = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    layer: int = module.layer_idx  # type: ignore[assignment]
    memory = plan.pool.store(layer, plan.slots, keys, values)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    outs, sums = [], []
    for call in plan.calls:
        asked = rows if call.rows is None else rows.index_select(0, call.rows)
        out, level_sums = attend_many(asked, memory[0], memory[1], call, scale)
        outs.append(out)
        sums.append(level_sums)
    if len(outs) == 1:
        return outs[0][None], None
    nothing = outs[0].new_zeros(1, *outs[0].shape[1:])
    every_out = torch.cat([*outs, nothing])[plan.places]  # (calls, rows, heads, size)
    every_sum = torch.nn.functional.pad(torch.cat(sums, 1), (0, 1), value=-torch.inf)[:, plan.places]
    weights = every_sum.softmax(1).permute(1, 2, 0).unsqueeze(-1)  # (calls, rows, heads, 1)
    return (every_out * weights).sum(0).to(query.dtype)[None], None


def attend_many(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, call: Call, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of (rows, heads, size) queries over (pool rows, key heads, size) keys and values.

    Returns the output and, per head and row, the log-sum-exp of the scores. Off a GPU, where there is no
    such kernel, the sequences are computed one after the other.
    """
    if query.device.type == "cuda":
        out, sums = varlen_attn(
            query,
            keys,
            values,
            call.query_bounds,
            call.key_bounds,
            call.longest_query,
            call.longest_key,
            return_aux=AuxRequest(lse=True),
            scale=scale,
            window_size=(-1, 0) if call.causal else (-1, -1),
            enable_gqa=True,
            seqused_k=call.used,
        )
        return out, sums
    outs, sums = [], []
    bounds = call.query_bounds.tolist()
    for number, (begin, used) in enumerate(zip(call.key_bounds.tolist(), call.used.tolist(), strict=False)):
        part = query[bounds[number] : bounds[number + 1]].transpose(0, 1)
        key, value = (tensor[begin : begin + used].transpose(0, 1) for tensor in (keys, values))
        out, part_sums = attend(part, key, value, call.causal, scale)
        outs.append(out.transpose(0, 1))
        sums.append(part_sums)
    return torch.cat(outs), torch.cat(sums, 1)


AttentionInterface.register(NAME, pooled_attention)
