"""Dropping rows for what they are, each on its own."""

from __future__ import annotations

import re
from collections.abc import Iterator

from palio.config import DropRefusals, LengthFilter, TokenLength
from palio.curation.rows import Batches, Surroundings, Verdict
from palio.errors import BadInput


def drop_refusals(settings: DropRefusals, rows: Batches, around: Surroundings) -> Iterator[Verdict]:
    try:
        patterns = [re.compile(pattern, re.IGNORECASE) for pattern in settings.patterns]
    except re.error as error:
        raise BadInput(
            "dataset", "drop_refusals.patterns", error.pattern, f"is no regular expression: {error}"
        ) from None
    for batch in rows():
        yield Verdict([_refusal(patterns, completion.strip()) for completion in batch.completions])


def _refusal(patterns: list[re.Pattern[str]], completion: str) -> str | None:
    found = next((match for pattern in patterns if (match := pattern.search(completion))), None)
    return f"the answer refuses: {found[0]!r}" if found else None


def length_filter(settings: LengthFilter, rows: Batches, around: Surroundings) -> Iterator[Verdict]:
    for batch in rows():
        yield Verdict(
            [
                _outside("prompt", len(prompt), settings.min_prompt, settings.max_prompt, "characters")
                or _outside(
                    "completion",
                    len(completion),
                    settings.min_completion,
                    settings.max_completion,
                    "characters",
                )
                for prompt, completion in zip(batch.prompts, batch.completions, strict=True)
            ]
        )


def token_length(settings: TokenLength, rows: Batches, around: Surroundings) -> Iterator[Verdict]:
    """Counts as the trainer does: prompt and completion apart, one token for the end."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(around.base_model)
    encode = {"add_special_tokens": False, "return_attention_mask": False}
    for batch in rows():
        prompts = tokenizer(batch.prompts, **encode)["input_ids"]
        completions = tokenizer(batch.completions, **encode)["input_ids"]
        yield Verdict(
            [
                _outside("row", len(prompt) + len(completion) + 1, settings.min, settings.max, "tokens")
                for prompt, completion in zip(prompts, completions, strict=True)
            ]
        )


def _outside(what: str, length: int, least: int, most: int, unit: str) -> str | None:
    if length < least:
        return f"{what} has {length} {unit}, fewer than {least}"
    return f"{what} has {length} {unit}, more than {most}" if length > most else None
