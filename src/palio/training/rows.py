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

from palio.errors import BadInput

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
    tokenizer: Any, prompts: Sequence[str], completions: Sequence[str], max_length: int, *, chat: bool = False
) -> tuple[list[Row], int]:
    """Rows of at most `max_length` tokens, and how many rows were longer and left out.

    With `chat` prompt and completion are turns of the tokenizer's chat template. Raises BadInput where
    the template has none for a prompt alone.
    """
    if not prompts:
        return [], 0
    before, whole = (_chat if chat else _plain)(tokenizer, list(prompts), list(completions))
    rows = [
        Row(number, np.asarray(ids, dtype=np.int32), len(prompt))
        for number, (prompt, ids) in enumerate(zip(before, whole, strict=True))
    ]
    # A row without a prompt would have its first token predicted from nothing.
    kept = [row for row in rows if len(row.ids) <= max_length and row.prompt > 0]
    return kept, len(rows) - len(kept)


Ids = list[list[int]]
"""Tokens of each row."""


def _plain(tokenizer: Any, prompts: list[str], completions: list[str]) -> tuple[Ids, Ids]:
    """Tokens of the prompts, and of the whole rows.

    Prompt and completion are tokenised apart and without special tokens, so that a prompt has the same
    tokens as when the model server sees it alone; the completion ends with the end-of-sequence token.
    """
    encode = {"add_special_tokens": False, "return_attention_mask": False}
    before = tokenizer(prompts, **encode)["input_ids"]
    after = tokenizer(completions, **encode)["input_ids"]
    return before, [
        [*prompt, *rest, tokenizer.eos_token_id] for prompt, rest in zip(before, after, strict=True)
    ]


def _chat(tokenizer: Any, prompts: list[str], completions: list[str]) -> tuple[Ids, Ids]:
    """The same, of a user's turn and the answer to it in the chat template."""
    asked = [[{"role": "user", "content": prompt}] for prompt in prompts]
    answered = [
        [*turn, {"role": "assistant", "content": completion}]
        for turn, completion in zip(asked, completions, strict=True)
    ]
    before = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template(answered, return_dict=False)
    if any(ids[: len(prompt)] != prompt for prompt, ids in zip(before, whole, strict=True)):
        fix = "the chat template changes a prompt once it is answered; leave out finetune.chat_template"
        raise BadInput("tokenizer", "chat_template", None, fix)
    return before, whole


WINDOW = 50
"""Optimizer steps whose rows are sorted together by `group_by_length`: few enough to stay random."""


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
    if recipe.group_by_length:
        window, place = divmod(place, WINDOW)
        order = order[window * WINDOW * size : (window + 1) * WINDOW * size]
        order = order[np.argsort([len(rows[index].ids) for index in order], kind="stable")]
        whole = len(order) // size  # the step of the rows that are left over stays the last
        steps = np.random.default_rng([recipe.seed, epoch, window]).permutation(whole)
        place = int(steps[place]) if place < whole else place
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
