"""Dropping rows for what they are, each on its own."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path

from palio.config import DropMatches, DropRefusals, LengthFilter, TokenLength
from palio.curation.rows import Batch, Rows, Surroundings, Verdict


def drop_refusals(settings: DropRefusals, rows: Rows, around: Surroundings) -> Iterator[Verdict]:
    return rows.map(partial(_matches, settings.patterns, "completion", "the answer refuses"))


def drop_matches(settings: DropMatches, rows: Rows, around: Surroundings) -> Iterator[Verdict]:
    return rows.map(partial(_matches, settings.patterns, settings.field, "holds"))


def _matches(patterns: Sequence[str], field: str, why: str, batch: Batch) -> Verdict:
    compiled = [re.compile(pattern, re.IGNORECASE) for pattern in patterns]
    reasons: list[str | None] = [None] * len(batch)
    for name, texts in (("prompt", batch.prompts), ("completion", batch.completions)):
        if field in (name, "both"):
            for place, text in enumerate(texts):
                found = next((match for one in compiled if (match := one.search(text.strip()))), None)
                if found and reasons[place] is None:
                    reasons[place] = f"{why}: {found[0]!r}"
    return Verdict(reasons)


def length_filter(settings: LengthFilter, rows: Rows, around: Surroundings) -> Iterator[Verdict]:
    return rows.map(partial(_lengths, settings))


def _lengths(settings: LengthFilter, batch: Batch) -> Verdict:
    least, most = settings.min_completion, settings.max_completion
    return Verdict(
        [
            _outside("prompt", len(prompt), settings.min_prompt, settings.max_prompt, "characters")
            or _outside("completion", len(completion), least, most, "characters")
            for prompt, completion in zip(batch.prompts, batch.completions, strict=True)
        ]
    )


def token_length(settings: TokenLength, rows: Rows, around: Surroundings) -> Iterator[Verdict]:
    """Counts as the trainer does: prompt and completion apart, one token for the end."""
    return rows.map(partial(_token_lengths, settings, around.base_model))


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


def _token_lengths(settings: TokenLength, base_model: Path, batch: Batch) -> Verdict:
    pairs = list(zip(batch.prompts, batch.completions, strict=True))
    reasons: list[str | None] = [None] * len(pairs)
    places = [place for place, pair in enumerate(pairs) if not _surely_inside(*pair, settings)]
    if places:
        count = _token_counter(base_model)
        prompts, completions = (count([pairs[place][column] for place in places]) for column in (0, 1))
        for place, prompt, completion in zip(places, prompts, completions, strict=True):
            reasons[place] = _outside("row", prompt + completion + 1, settings.min, settings.max, "tokens")
    return Verdict(reasons)


def _surely_inside(prompt: str, completion: str, settings: TokenLength) -> bool:
    """Without counting: of ASCII text a token is a character or more, but for one mark at each beginning."""
    most = len(prompt) + len(completion) + 3
    return settings.min <= 3 and most <= settings.max and prompt.isascii() and completion.isascii()


def _outside(what: str, length: int, least: int, most: int, unit: str) -> str | None:
    if length < least:
        return f"{what} has {length} {unit}, fewer than {least}"
    return f"{what} has {length} {unit}, more than {most}" if length > most else None
