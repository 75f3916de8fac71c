"""How rows share a forward pass: end to end if the model then gives each row's own logits, else padded.

Checked before the budget starts, on the longest row and two others, against each row alone in the model's own
attention. The bound is measured too: a change of the embeddings by one unit in the last place shows how far
rounding alone moves a logit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from palio.errors import BadInput
from palio.quantization import evaluation_mode
from palio.tensors import largest_difference, last_bits_flipped
from palio.training.attention import NAME, row_bounds
from palio.training.model import compute_dtype
from palio.training.rows import Batch, Row, flat_batch, padded_batch

TOLERANCE = 5.0
"""Largest difference from the row alone, in units of rounding noise. Right layouts stayed below 1 in 20
families of random weights, and at 1.3 where other kernels ran a 30-layer model; wrong ones were above 30."""

ENDS = 8
"""Tokens at each end of a row that are compared: leaks show at its start, windows at its end."""

KEPT_APART = {"full_attention", "sliding_attention"}
"""Layer types that see other tokens by attention only; convolutions and recurrences would mix the rows."""


@dataclass(frozen=True)
class Batching:
    """Outcome of the check."""

    rows: Literal["end to end", "padded"]
    difference: float
    """Largest difference of a logit from the row alone."""
    reason: str = ""
    """Why rows are not laid end to end."""


def choose_batching(model: Any, rows: Sequence[Row], batch_size: int, device: torch.device) -> Batching:
    """Check how `rows` can be batched, and set the model's attention accordingly.

    Raises BadInput if not even padded rows get the logits of each row alone.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    own = inner.config._attn_implementation
    probes = _probes(rows)
    evaluation_mode(model)
    try:
        alone = _logits(model, probes, 1, padded_batch, device)
        with last_bits_flipped(inner, compute_dtype(device)):
            noise = largest_difference(alone, _logits(model, probes, 1, padded_batch, device))
        reason = _obstacle(inner)
        if not reason:
            try:
                inner.set_attn_implementation(NAME)
                difference = largest_difference(alone, _logits(model, probes, batch_size, flat_batch, device))
                if difference <= TOLERANCE * noise:
                    return Batching("end to end", difference)
                reason = f"a logit would change by {difference:.2g}, rounding changes it by {noise:.2g}"
            except torch.OutOfMemoryError:
                raise
            except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
                reason = f"{type(error).__name__}: {error}"
            inner.set_attn_implementation(own)
        difference = largest_difference(alone, _logits(model, probes, batch_size, padded_batch, device))
    finally:
        model.train()
    if difference <= TOLERANCE * noise:
        return Batching("padded", difference, reason)
    why = f"in a batch, {inner.config.model_type} changes a logit by {difference:.2g} (rounding: {noise:.2g})"
    fix = "set it to 1 and raise gradient_accumulation"
    raise BadInput("finetune", "batch_size", batch_size, why=why, fix=fix)


def _probes(rows: Sequence[Row]) -> list[Row]:
    """Return the longest, the shortest and the median row, to be compared at both ends."""
    ordered = sorted(rows, key=lambda row: len(row.ids))
    chosen = [ordered[-1], ordered[0], ordered[len(ordered) // 2]]
    return [
        Row(row.number, row.ids, ((1, min(ENDS + 1, end)), (max(ENDS + 1, end - ENDS), end)))
        for row in chosen
        if (end := len(row.ids))
    ]


def _obstacle(inner: Any) -> str:
    """Return what keeps a model's rows from lying end to end; empty if nothing is known to."""
    if not getattr(inner, "_supports_attention_backend", False):
        return f"the attention of {inner.config.model_type} cannot be replaced"
    if getattr(inner, "_is_stateful", False):
        return f"{inner.config.model_type} is recurrent"
    others = sorted(set(getattr(inner.config, "layer_types", None) or ()) - KEPT_APART)
    return f"{inner.config.model_type} has layers of type {others[0]}" if others else ""


@torch.no_grad()
def _logits(
    model: Any,
    rows: Sequence[Row],
    batch_size: int,
    batch_of: Callable[[Sequence[Row], torch.device], Batch],
    device: torch.device,
) -> torch.Tensor:
    """Return the (K, vocabulary) logits of rows, `batch_size` of them in a forward pass."""
    dtype, parts = compute_dtype(device), []
    for start in range(0, len(rows), batch_size):
        batch = batch_of(rows[start : start + batch_size], device)
        with (
            row_bounds(batch.bounds, device),
            torch.autocast(device.type, dtype, enabled=dtype != torch.float32),
        ):
            parts.append(model(**batch.inputs, use_cache=False).logits.flatten(0, 1)[batch.predict].float())
    return torch.cat(parts)
