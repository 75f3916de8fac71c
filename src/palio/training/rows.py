"""Training rows: tokens of prompt and completion, and which rows each optimizer step sees.

No padding anywhere: the rows of a forward pass are laid end to end in one flat sequence whose position
ids restart at every row (`flat_batch`), and `palio.training.attention` keeps the rows apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

if TYPE_CHECKING:
    from palio.config import FinetuneRecipe


@dataclass(frozen=True)
class Row:
    """One training example."""

    number: int
    """Row of train.parquet, from 0."""
    ids: npt.NDArray[np.int32]
    """Tokens: prompt, completion, end of sequence."""
    prompt: int
    """How many of them are the prompt; the loss is taken on the others."""


def tokenise(
    tokenizer: Any, prompts: Sequence[str], completions: Sequence[str], max_length: int
) -> tuple[list[Row], int]:
    """Rows of at most `max_length` tokens, and how many rows were longer and left out.

    Prompt and completion are tokenised apart and without special tokens, so that a prompt has the same
    tokens as when the model server sees it alone; the completion ends with the end-of-sequence token.
    """
    if not prompts:
        return [], 0
    encode = {"add_special_tokens": False, "return_attention_mask": False}
    before = tokenizer(list(prompts), **encode)["input_ids"]
    after = tokenizer(list(completions), **encode)["input_ids"]
    rows = [
        Row(number, np.asarray([*prompt, *completion, tokenizer.eos_token_id], dtype=np.int32), len(prompt))
        for number, (prompt, completion) in enumerate(zip(before, after, strict=True))
    ]
    # A row without a prompt would have its first token predicted from nothing.
    kept = [row for row in rows if len(row.ids) <= max_length and row.prompt > 0]
    return kept, len(rows) - len(kept)


def split(rows: Sequence[Row], held_out: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Rows to train on and `held_out` rows to validate on, drawn by the seed."""
    # The number keeps this draw apart from those of the epochs' orders.
    order = np.random.default_rng([seed, 2**31]).permutation(len(rows))
    held = set(order[:held_out].tolist())
    kept = [row for index, row in enumerate(rows) if index not in held]
    return kept, [rows[index] for index in sorted(held)]


def planned_steps(rows: int, recipe: FinetuneRecipe) -> int:
    """Optimizer steps of the whole training; the last step of an epoch takes the rows that are left."""
    if recipe.max_steps is not None:
        return recipe.max_steps
    return math.ceil(recipe.epochs * _steps_per_epoch(rows, recipe))


def step_rows(rows: Sequence[Row], recipe: FinetuneRecipe, step: int) -> list[Row]:
    """Rows of optimizer step `step` (from 0): a pure function, so the step is the data position."""
    per_epoch = _steps_per_epoch(len(rows), recipe)
    epoch, place = divmod(step, per_epoch)
    order = np.random.default_rng([recipe.seed, epoch]).permutation(len(rows))
    size = recipe.batch_size * recipe.gradient_accumulation
    return [rows[index] for index in order[place * size : (place + 1) * size]]


def _steps_per_epoch(rows: int, recipe: FinetuneRecipe) -> int:
    return math.ceil(rows / (recipe.batch_size * recipe.gradient_accumulation))


@dataclass(frozen=True)
class FlatBatch:
    """Rows end to end: T tokens, R rows, K positions whose next token the loss is taken on."""

    input_ids: torch.Tensor
    """(1, T)"""
    position_ids: torch.Tensor
    """(1, T), from 0 in every row."""
    bounds: tuple[int, ...]
    """(R + 1) where each row begins, and T."""
    predict: torch.Tensor
    """(K,) positions whose next token is part of a completion."""
    targets: torch.Tensor
    """(K,) those next tokens."""


def flat_batch(rows: Sequence[Row], device: torch.device) -> FlatBatch:
    lengths = [len(row.ids) for row in rows]
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.concatenate([row.ids for row in rows]).astype(np.int64)
    positions = np.concatenate([np.arange(length) for length in lengths])
    predict = np.concatenate(
        [
            start + np.arange(row.prompt - 1, len(row.ids) - 1)
            for start, row in zip(bounds, rows, strict=False)
        ]
    )

    def tensor(values: npt.NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(values).to(device, non_blocking=True)

    return FlatBatch(
        input_ids=tensor(ids)[None],
        position_ids=tensor(positions)[None],
        bounds=tuple(int(bound) for bound in bounds),
        predict=tensor(predict),
        targets=tensor(ids[predict + 1]),
    )


@dataclass(frozen=True)
class PaddedBatch:
    """R rows padded to the longest, L tokens: for architectures that cannot take rows end to end."""

    input_ids: torch.Tensor
    """(R, L)"""
    attention_mask: torch.Tensor
    """(R, L), 1 at tokens, 0 at padding."""
    predict: torch.Tensor
    """(K,) places in the flattened (R · L) whose next token the loss is taken on."""
    targets: torch.Tensor
    """(K,)"""


def padded_batch(rows: Sequence[Row], device: torch.device) -> PaddedBatch:
    longest = max(len(row.ids) for row in rows)
    ids = np.zeros((len(rows), longest), dtype=np.int64)
    mask = np.zeros_like(ids)
    for place, row in enumerate(rows):
        ids[place, : len(row.ids)] = row.ids
        mask[place, : len(row.ids)] = 1
    predict = np.concatenate(
        [place * longest + np.arange(row.prompt - 1, len(row.ids) - 1) for place, row in enumerate(rows)]
    )
    return PaddedBatch(
        input_ids=torch.from_numpy(ids).to(device),
        attention_mask=torch.from_numpy(mask).to(device),
        predict=torch.from_numpy(predict).to(device),
        targets=torch.from_numpy(ids.reshape(-1)[predict + 1]).to(device),
    )
