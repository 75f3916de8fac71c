"""Training rows, and which of them each optimizer step sees.

The rows of a forward pass are laid end to end without padding, in one sequence whose position ids restart
at every row (`flat_batch`); `palio.training.attention` keeps the rows apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from palio.tokens import Tokens

if TYPE_CHECKING:
    from palio.config import FinetuneRecipe


@dataclass(frozen=True)
class Row:
    """One training example."""

    number: int
    """Index in train.parquet, from 0."""
    ids: npt.NDArray[np.int32]
    """Tokens: prompt, completion, end of sequence; of a conversation that turn after turn."""
    answers: tuple[tuple[int, int], ...]
    """Start and end of each completion, in tokens; the loss is taken on these."""

    @property
    def predict(self) -> npt.NDArray[np.int64]:
        """Positions whose next token the loss is taken on."""
        return np.concatenate([np.arange(start - 1, end - 1) for start, end in self.answers])

    @property
    def targets(self) -> int:
        """Number of tokens that the loss is taken on."""
        return sum(end - start for start, end in self.answers)


def tokenize(
    tokens: Tokens, conversations: Sequence[Sequence[str]], max_length: int, *, chat: bool = False
) -> tuple[list[Row], int]:
    """Return the rows of at most `max_length` tokens, and the number of longer ones, which are dropped.

    A conversation is a prompt and its completion, or several of them in turn; with `chat` they are turns of
    the tokenizer's chat template. Raises BadInput as `Tokens` does.
    """
    rows = [
        Row(number, np.asarray(ids, dtype=np.int32), answers)
        for number, (ids, answers) in enumerate((tokens.chat_rows if chat else tokens.rows)(conversations))
    ]
    # A row without a prompt would have its first token predicted from nothing.
    kept = [row for row in rows if len(row.ids) <= max_length and row.answers[0][0] > 0]
    return kept, len(rows) - len(kept)


WINDOW = 50
"""Optimizer steps whose rows `group_by_length` sorts together: few enough to stay random."""


def split(rows: Sequence[Row], held_out: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Return the rows to train on and `held_out` rows to validate on, drawn by the seed."""
    # 2**31 keeps this draw apart from those of the epochs' orders.
    order = np.random.default_rng([seed, 2**31]).permutation(len(rows))
    held = set(order[:held_out].tolist())
    kept = [row for index, row in enumerate(rows) if index not in held]
    return kept, [rows[index] for index in sorted(held)]


def planned_steps(rows: int, recipe: FinetuneRecipe) -> int:
    """Return the number of optimizer steps; the last one of an epoch takes the remaining rows."""
    if recipe.max_steps is not None:
        return recipe.max_steps
    return math.ceil(recipe.epochs * _steps_per_epoch(rows, recipe))


def step_rows(rows: Sequence[Row], recipe: FinetuneRecipe, step: int) -> list[Row]:
    """Return the rows of step `step` (from 0): a pure function, so the step is the position in the data."""
    per_epoch = _steps_per_epoch(len(rows), recipe)
    epoch, position = divmod(step, per_epoch)
    order = np.random.default_rng([recipe.seed, epoch]).permutation(len(rows))
    size = recipe.batch_size * recipe.gradient_accumulation
    if recipe.group_by_length:
        window, position = divmod(position, WINDOW)
        order = order[window * WINDOW * size : (window + 1) * WINDOW * size]
        order = order[np.argsort([len(rows[index].ids) for index in order], kind="stable")]
        whole = len(order) // size  # the step of the remaining rows stays the last
        steps = np.random.default_rng([recipe.seed, epoch, window]).permutation(whole)
        position = int(steps[position]) if position < whole else position
    return [rows[index] for index in order[position * size : (position + 1) * size]]


def _steps_per_epoch(rows: int, recipe: FinetuneRecipe) -> int:
    return math.ceil(rows / (recipe.batch_size * recipe.gradient_accumulation))


@dataclass(frozen=True)
class Batch:
    """Rows of one forward pass, and the K positions whose next token the loss is taken on."""

    inputs: dict[str, torch.Tensor]
    """What the model takes. Rows end to end: `input_ids` and `position_ids`, (1, T). Padded rows:
    `input_ids` and `attention_mask`, (R, L)."""
    bounds: tuple[int, ...]
    """(R + 1) start of each row laid end to end, and T; empty if the rows are padded."""
    predict: torch.Tensor
    """(K,) positions in the flattened `input_ids`."""
    targets: torch.Tensor
    """(K,) their next tokens."""


def flat_batch(rows: Sequence[Row], device: torch.device) -> Batch:
    """Lay rows end to end, T tokens; position ids restart at 0 in every row."""
    lengths = [len(row.ids) for row in rows]
    bounds = tuple(np.cumsum([0, *lengths]).tolist())
    ids = np.concatenate([row.ids for row in rows])[None]
    positions = np.concatenate([np.arange(length) for length in lengths])[None]
    return _batch(rows, bounds[:-1], device, bounds, input_ids=ids, position_ids=positions)


def padded_batch(rows: Sequence[Row], device: torch.device) -> Batch:
    """Pad R rows to the longest, L tokens, for architectures that cannot take rows end to end."""
    longest = max(len(row.ids) for row in rows)
    ids = np.zeros((len(rows), longest), dtype=np.int64)
    mask = np.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, : len(row.ids)] = row.ids
        mask[index, : len(row.ids)] = 1
    return _batch(rows, range(0, ids.size, longest), device, (), input_ids=ids, attention_mask=mask)


def _batch(
    rows: Sequence[Row],
    starts: Sequence[int],
    device: torch.device,
    bounds: tuple[int, ...],
    **inputs: npt.NDArray[np.int64],
) -> Batch:
    """Move a batch to the device; `starts` are the rows' starts in the flattened `input_ids`."""
    predict = np.concatenate([start + row.predict for start, row in zip(starts, rows, strict=True)])
    targets = inputs["input_ids"].reshape(-1)[predict + 1]

    def tensor(values: npt.NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(values.astype(np.int64)).to(device, non_blocking=True)

    return Batch(
        {name: tensor(value) for name, value in inputs.items()}, bounds, tensor(predict), tensor(targets)
    )
