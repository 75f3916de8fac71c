"""Keeping rows by their number of tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Literal

from pydantic import NonNegativeInt, PositiveInt

from palio.config import Input
from palio.curation.operations import OperationContext, Reasons, RowOperation, Verdict
from palio.curation.operations.length_filter import outside
from palio.curation.rows import Batch, Turns


class TokenLength(RowOperation):
    """Keep rows by their tokens, prompt and completion together, counted by the base model's tokenizer."""

    op: Literal["token_length"]
    min: NonNegativeInt = 1
    """Minimum number of tokens."""
    max: PositiveInt = 2048
    """Maximum number of tokens."""

    @property
    def inputs(self) -> tuple[Input, ...]:
        return (Input("tokenizer"),)

    def apply(self, batch: Batch, context: OperationContext) -> Verdict:
        """Count as the trainer does: every turn on its own, and one token for the end of each answer."""
        reasons: Reasons = [None] * len(batch)
        counted = [row for row, turns in enumerate(batch.turns) if not self._surely_inside(turns)]
        if counted:
            texts = [text for row in counted for text in batch.turns[row]]
            counts = iter(_token_counter(context.base_model)(texts))
            for row in counted:
                turns = len(batch.turns[row])
                tokens = sum(islice(counts, turns)) + turns // 2
                reasons[row] = outside("row", tokens, self.min, self.max, "tokens")
        return Verdict(reasons)

    def _surely_inside(self, turns: Turns) -> bool:
        """Return whether a row is inside without counting: a token of ASCII text is at least one character,
        save for one mark at the beginning of each turn."""
        most = sum(map(len, turns)) + len(turns) + len(turns) // 2
        return self.min <= 3 and most <= self.max and all(map(str.isascii, turns))


@lru_cache(maxsize=1)
def _token_counter(base_model: Path) -> Callable[[list[str]], list[int]]:
    """Return a function that counts the tokens of texts. A fast tokenizer needs only its file, not
    transformers, whose import takes four seconds and 700 MB in every process."""
    if (base_model / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        fast = Tokenizer.from_file(str(base_model / "tokenizer.json"))
        fast.no_truncation()
        fast.no_padding()
        return lambda texts: [len(ids) for ids in fast.encode_batch_fast(texts, add_special_tokens=False)]
    from transformers import AutoTokenizer

    slow = AutoTokenizer.from_pretrained(base_model, trust_remote_code=False)
    return lambda texts: [len(ids) for ids in slow(texts, add_special_tokens=False)["input_ids"]]
