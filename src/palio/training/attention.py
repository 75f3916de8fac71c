"""Attention for rows laid end to end: each row attends to itself only, without a mask.

A mask over the flat sequence of T tokens would cost T² in time and memory; rows of lengths l cost Σ l².
On a GPU one variable-length kernel serves all rows; on a CPU a causal kernel runs once per row.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "palio_rows"

HARMLESS = {"position_ids", "use_cache", "output_attentions", "output_router_logits"}
"""Arguments that layers pass on and that do not change causal attention."""

VARLEN: Callable[..., Any] | None = None
with suppress(ImportError):  # torch before 2.10 lacks the module, 2.10 lacks `window_size`
    from torch.nn.attention.varlen import varlen_attn

    if "window_size" in inspect.signature(varlen_attn).parameters:
        VARLEN = varlen_attn


class _Rows:
    """Row bounds of the current forward pass: not every architecture passes arguments on to its attention."""

    bounds: tuple[int, ...] = ()
    offsets: torch.Tensor | None = None
    longest: int = 0


@contextmanager
def row_bounds(bounds: Sequence[int], device: torch.device) -> Iterator[None]:
    """Declare that the passes inside are of rows that start at `bounds[:-1]`; empty for padded rows."""
    _Rows.bounds = tuple(bounds)
    _Rows.longest = max((b - a for a, b in pairwise(bounds)), default=0)
    _Rows.offsets = torch.tensor(bounds, dtype=torch.int32, device=device) if device.type == "cuda" else None
    try:
        yield
    finally:
        _Rows.bounds, _Rows.offsets, _Rows.longest = (), None, 0


def row_lengths(embedded: torch.Tensor) -> torch.Tensor:
    """Return each token's row length, (1, T), or the padded length, (R, L), if the rows are padded."""
    if not _Rows.bounds:
        return torch.full(embedded.shape[:2], embedded.shape[1], device=embedded.device)
    lengths = torch.tensor([b - a for a, b in pairwise(_Rows.bounds)])
    return lengths.repeat_interleave(lengths)[None].to(embedded.device)


def rows_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Compute causal attention within each row.

    Raises NotImplementedError for anything else: a mask, a window shorter than a row, any argument that may
    change the result (soft caps, sinks, biases).

    Query, key and value are (1, heads, T, head size); key and value may have fewer heads (grouped queries).
    Returns (1, T, heads, head size), as transformers' attention layers expect.
    """
    given = {name for name, value in others.items() if value is not None} - HARMLESS
    if attention_mask is not None:
        given.add("attention_mask")
    if sliding_window is not None and sliding_window < _Rows.longest:
        given.add("sliding_window")
    if not getattr(module, "is_causal", True):
        given.add("is_causal")
    if given:
        raise NotImplementedError(f"{type(module).__name__} asks for {', '.join(sorted(given))}")
    dtype = kernel_dtype(query)
    if VARLEN is not None and query.is_cuda and dtype != torch.float32 and dropout == 0:
        return _varlen(VARLEN, query.to(dtype), key.to(dtype), value.to(dtype), scaling), None
    grouped = key.shape[1] != query.shape[1]
    # Split, not sliced: a slice's gradient is as long as all rows, a split's only joins those of its parts.
    lengths = [end - start for start, end in pairwise(_Rows.bounds)]
    rows = zip(*(torch.split(states, lengths, dim=2) for states in (query, key, value)), strict=True)
    parts = [
        scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=grouped
        ).transpose(1, 2)
        for q, k, v in rows
    ]
    return torch.cat(parts, dim=1), None  # contiguous: some models view the heads in another shape


def kernel_dtype(query: torch.Tensor) -> torch.dtype:
    """Return the dtype to compute attention in. In full fine-tuning rotated queries and keys are fp32 and
    values are not; autocast would unify them, but does not know the variable-length kernel."""
    device = query.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype


def _varlen(
    kernel: Callable[..., Any],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
) -> torch.Tensor:
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    flat = [part[0].transpose(0, 1) for part in (query, key, value)]
    bounds = (_Rows.offsets, _Rows.offsets, _Rows.longest, _Rows.longest)
    out: torch.Tensor = kernel(*flat, *bounds, scale=scaling, window_size=(-1, 0))  # (-1, 0) is causal
    return out[None]


# Not compiled, since the bounds change with every step.
ALL_ATTENTION_FUNCTIONS.register(NAME, torch.compiler.disable(rows_attention))  # type: ignore[no-untyped-call]
