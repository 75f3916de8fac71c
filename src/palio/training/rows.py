"""Training rows: tokens of prompts and completions, and which rows each optimizer step sees.

No padding anywhere: the rows of a forward pass are laid end to end in one flat sequence whose position
ids restart at every row (`flat_batch`), and `palio.training.attention` keeps the rows apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
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
    """Tokens: prompt, completion, end of sequence; of a conversation that turn after turn."""
    answers: tuple[tuple[int, int], ...]
    """Where each completion begins and ends, in tokens; the loss is taken on these."""

    @property
    def predict(self) -> npt.NDArray[np.int64]:
        """Places whose next token the loss is taken on."""
        return np.concatenate([np.arange(start - 1, end - 1) for start, end in self.answers])

    @property
    def targets(self) -> int:
        """Tokens that the loss is taken on."""
        return sum(end - start for start, end in self.answers)


def tokenise(
    tokenizer: Any, conversations: Sequence[Sequence[str]], max_length: int, *, chat: bool = False
) -> tuple[list[Row], int]:
    """Rows of at most `max_length` tokens, and how many rows were longer and left out.

    A conversation is a prompt and its completion, or several of them after each other. With `chat` they are
    turns of the tokenizer's chat template; raises BadInput where that writes a turn otherwise once it is
    answered.
    """
    if not conversations:
        return [], 0
    rows = [
        Row(number, np.asarray(ids, dtype=np.int32), answers)
        for number, (ids, answers) in enumerate((_chat if chat else _plain)(tokenizer, conversations))
    ]
    # A row without a prompt would have its first token predicted from nothing.
    kept = [row for row in rows if len(row.ids) <= max_length and row.answers[0][0] > 0]
    return kept, len(rows) - len(kept)


Tokens = tuple[list[int], tuple[tuple[int, int], ...]]
"""Of a whole row, and where its answers begin and end."""


def _plain(tokenizer: Any, conversations: Sequence[Sequence[str]]) -> Iterator[Tokens]:
    """Every turn is tokenised on its own and without special tokens, so that a prompt has the same tokens as
    when the model server sees it alone; each completion ends with the end-of-sequence token.
    """
    texts = [turn for turns in conversations for turn in turns]
    encoded = iter(tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"])
    for turns in conversations:
        ids: list[int] = []
        answers = []
        for _ in range(len(turns) // 2):
            ids += next(encoded)
            start = len(ids)
            ids += [*next(encoded), tokenizer.eos_token_id]
            answers.append((start, len(ids)))
        yield ids, tuple(answers)


def _chat(tokenizer: Any, conversations: Sequence[Sequence[str]]) -> Iterator[Tokens]:
    """In the chat template an answer is what follows the template of all turns before it."""
    said = [
        [
            {"role": role, "content": turn}
            for role, turn in zip(cycle(("user", "assistant")), turns, strict=False)
        ]
        for turns in conversations
    ]
    answered = [turns[:end] for turns in said for end in range(2, len(turns) + 1, 2)]
    asked = [turns[:-1] for turns in answered]
    before = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    pairs = zip(before, tokenizer.apply_chat_template(answered, return_dict=False), strict=True)
    for turns in said:
        parts = list(islice(pairs, len(turns) // 2))
        whole = parts[-1][1]
        if any(whole[: len(part)] != part for pair in parts for part in pair):
            why = "the chat template changes a turn once it is answered"
            fix = "leave out finetune.chat_template"
            raise BadInput("tokenizer", "chat_template", why=why, fix=fix)
        yield whole, tuple((len(prompt), len(answer)) for prompt, answer in parts)


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
    predict = np.concatenate([start + row.predict for start, row in zip(bounds, rows, strict=False)])

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
    predict = np.concatenate([place * longest + row.predict for place, row in enumerate(rows)])
    return PaddedBatch(
        input_ids=torch.from_numpy(ids).to(device),
        attention_mask=torch.from_numpy(mask).to(device),
        predict=torch.from_numpy(predict).to(device),
        targets=torch.from_numpy(ids.reshape(-1)[predict + 1]).to(device),
    )
