"""Training rows, and which of them each optimizer step sees.

The rows of a forward pass are laid end to end without padding, in one sequence whose position ids restart
at every row (`flat_batch`); `palio.training.attention` keeps the rows apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from palio.errors import BadInput
from palio.tokens import TokenRow, Tokens, extended_tokenizer

if TYPE_CHECKING:
    from palio.config import FinetuneRecipe


@dataclass(frozen=True)
class Row:
    """One training example."""

    number: int
    """Index in train.parquet, from 0; the parts of a split conversation have the same."""
    ids: npt.NDArray[np.int32]
    """Tokens: prompt, completion, end of sequence; of a conversation that turn after turn."""
    answers: tuple[tuple[int, int], ...]
    """Start and end of each completion, in tokens."""
    whole: bool = False
    """Whether all of it is learned, not only the completions."""

    @property
    def learned(self) -> tuple[tuple[int, int], ...]:
        """Start and end of the parts that the loss is taken on. The first token follows nothing."""
        return ((1, len(self.ids)),) if self.whole else self.answers

    @property
    def predict(self) -> npt.NDArray[np.int64]:
        """Positions whose next token the loss is taken on."""
        return np.concatenate([np.arange(start - 1, end - 1) for start, end in self.learned])

    @property
    def targets(self) -> int:
        """Number of tokens that the loss is taken on."""
        return sum(end - start for start, end in self.learned)


@dataclass
class TooLong:
    """What became of the conversations that are longer than a row may be."""

    dropped: int = 0
    """Left out: none of their answers fits into a row with its question."""
    cut: int = 0
    """Truncated or split."""
    answers: int = 0
    """Answers of the cut conversations that are in no row."""


def dataset_rows(dataset: Path, model_folder: Path, recipe: FinetuneRecipe) -> tuple[list[Row], TooLong]:
    """Return the rows of a dataset (train.parquet) that a recipe trains on, and what was too long.

    Raises BadInput for a dataset without rows, and as `Tokens` does.
    """
    table = pq.read_table(dataset, columns=["history", "prompt", "completion"])
    columns = map(pa.ChunkedArray.to_pylist, table.columns)
    conversations = [(*history, *pair) for history, *pair in zip(*columns, strict=True)]
    if not conversations:
        raise BadInput(dataset, why="has no rows", fix="loosen the dataset's operations")
    return tokenize(
        Tokens(extended_tokenizer(model_folder, recipe.extra_tokens)),
        conversations,
        recipe.max_length,
        chat=recipe.chat_template,
        over_length=recipe.over_length,
        whole=recipe.loss_on == "rows",
    )


def tokenize(
    tokens: Tokens,
    conversations: Sequence[Sequence[str]],
    max_length: int,
    *,
    chat: bool = False,
    over_length: Literal["drop", "truncate", "split"] = "drop",
    whole: bool = False,
) -> tuple[list[Row], TooLong]:
    """Return the rows, each of at most `max_length` tokens, and what became of longer conversations.

    A conversation is a prompt and its completion, or several of them in turn; with `chat` they are turns of
    the tokenizer's chat template. With `whole` all of it is learned. Raises BadInput as `Tokens` does.
    """
    encode = tokens.chat_rows if chat else tokens.rows
    rows: list[Row] = []
    too_long = TooLong()
    for number, (turns, encoded) in enumerate(zip(conversations, encode(conversations), strict=True)):
        ids, answers = encoded
        if answers[0][0] == 0:  # its first token would be predicted from nothing
            why, fix = "writes nothing before an answer", "leave out finetune.chat_template"
            raise BadInput("tokenizer", "chat_template", why=why, fix=fix)
        parts = [encoded]
        if len(ids) > max_length:
            parts = list(_parts(turns, encoded, max_length, encode)) if over_length != "drop" else []
            parts = parts[: 1 if over_length == "truncate" else None]
            too_long.dropped += not parts
            too_long.cut += bool(parts)
            too_long.answers += (len(answers) - sum(len(kept) for _, kept in parts)) if parts else 0
        rows += [Row(number, np.asarray(part, dtype=np.int32), kept, whole) for part, kept in parts]
    return rows, too_long


def _parts(
    turns: Sequence[str],
    whole: TokenRow,
    max_length: int,
    encode: Callable[[Sequence[Sequence[str]]], Iterator[TokenRow]],
) -> Iterator[TokenRow]:
    """Yield the parts of a conversation that fit into a row, each of as many answers as possible."""
    ids, answers = whole
    while True:
        fitting = [end for _, end in answers if end <= max_length]
        if fitting:
            yield ids[: fitting[-1]], answers[: len(fitting)]
        turns = turns[2 * max(1, len(fitting)) :]
        if not turns:
            return
        ((ids, answers),) = encode([turns])


WINDOW = 50
"""Optimizer steps whose rows `group_by_length` sorts together: few enough to stay random."""


def split(rows: Sequence[Row], held_out: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Return the rows to train on and those of `held_out` conversations to validate on, drawn by the seed."""
    numbers = np.array(sorted({row.number for row in rows}), dtype=np.int64)
    # 2**31 keeps this draw apart from those of the epochs' orders.
    order = np.random.default_rng([seed, 2**31]).permutation(len(numbers))
    held = set(numbers[order[:held_out]].tolist())
    return [row for row in rows if row.number not in held], [row for row in rows if row.number in held]


def planned_steps(rows: int, recipe: FinetuneRecipe) -> int:
    """Return the number of optimizer steps; the last one of an epoch takes the remaining rows."""
    if recipe.max_steps is not None:
        return recipe.max_steps
    return math.ceil(recipe.epochs * _steps_per_epoch(rows, recipe))


def step_rows(rows: Sequence[Row], recipe: FinetuneRecipe, step: int) -> list[Row]:
    """Return the rows of step `step` (from 0): a pure function, so the step is the position in the data."""
    per_epoch = _steps_per_epoch(len(rows), recipe)
    epoch, position = divmod(step, per_epoch)
    order = np.random.default_rng([recipe.order_seed, epoch]).permutation(len(rows))
    size = recipe.batch_size * recipe.gradient_accumulation
    if recipe.group_by_length:
        window, position = divmod(position, WINDOW)
        order = order[window * WINDOW * size : (window + 1) * WINDOW * size]
        order = order[np.argsort([len(rows[index].ids) for index in order], kind="stable")]
        whole = len(order) // size  # the step of the remaining rows stays the last
        steps = np.random.default_rng([recipe.order_seed, epoch, window]).permutation(whole)
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
