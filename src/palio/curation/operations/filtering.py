"""Dropping rows for what they are, each on its own."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path

from palio.config import DropMatches, DropRefusals, LengthFilter, TokenLength
from palio.curation.rows import FIELDS, Batch, Reasons, Surroundings, Turns, Verdict


def drop_refusals(settings: DropRefusals, batch: Batch, around: Surroundings) -> Verdict:
    return _matches(settings.patterns, "completion", "the answer refuses", batch)


def drop_matches(settings: DropMatches, batch: Batch, around: Surroundings) -> Verdict:
    return _matches(settings.patterns, settings.field, "holds", batch)


def _matches(patterns: Sequence[str], field: str, why: str, batch: Batch) -> Verdict:
    compiled = [re.compile(pattern, re.IGNORECASE) for pattern in patterns]
    reasons: Reasons = []
    for turns in batch.turns:
        texts = [text.strip() for text in turns[FIELDS[field]]]
        found = next((match for text in texts for one in compiled if (match := one.search(text))), None)
        reasons.append(f"{why}: {found[0]!r}" if found else None)
    return Verdict(reasons)


def length_filter(settings: LengthFilter, batch: Batch, around: Surroundings) -> Verdict:
    reasons: Reasons = []
    for turns in batch.turns:
        prompt, completion = (sum(map(len, turns[FIELDS[side]])) for side in ("prompt", "completion"))
        reasons.append(
            _outside("prompt", prompt, settings.min_prompt, settings.max_prompt, "characters")
            or _outside(
                "completion", completion, settings.min_completion, settings.max_completion, "characters"
            )
        )
    return Verdict(reasons)


@lru_cache(maxsize=1)
def _token_counter(base_model: Path) -> Callable[[list[str]], list[int]]:
    """Counts tokens of texts. A fast tokenizer's file is all that it is: without transformers, whose import
    takes four seconds and 700 MB in every process."""
    if (base_model / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        fast = Tokenizer.from_file(str(base_model / "tokenizer.json"))
        fast.no_truncation()
        fast.no_padding()
        return lambda texts: [len(ids) for ids in fast.encode_batch_fast(texts, add_special_tokens=False)]
    from transformers import AutoTokenizer

    slow = AutoTokenizer.from_pretrained(base_model)
    return lambda texts: [len(ids) for ids in slow(texts, add_special_tokens=False)["input_ids"]]


def token_length(settings: TokenLength, batch: Batch, around: Surroundings) -> Verdict:
    """Counts as the trainer does: every turn on its own, one token for the end of each answer."""
    reasons: Reasons = [None] * len(batch)
    places = [place for place, turns in enumerate(batch.turns) if not _surely_inside(turns, settings)]
    if places:
        texts = [text for place in places for text in batch.turns[place]]
        counts = iter(_token_counter(around.base_model)(texts))
        for place in places:
            turns = len(batch.turns[place])
            tokens = sum(islice(counts, turns)) + turns // 2
            reasons[place] = _outside("row", tokens, settings.min, settings.max, "tokens")
    return Verdict(reasons)


def _surely_inside(turns: Turns, settings: TokenLength) -> bool:
    """Without counting: of ASCII text a token is a character or more, but for one mark at each beginning."""
    most = sum(map(len, turns)) + len(turns) + len(turns) // 2
    return settings.min <= 3 and most <= settings.max and all(map(str.isascii, turns))


def _outside(what: str, length: int, least: int, most: int, unit: str) -> str | None:
    if length < least:
        return f"{what} has {length} {unit}, fewer than {least}"
    return f"{what} has {length} {unit}, more than {most}" if length > most else None
