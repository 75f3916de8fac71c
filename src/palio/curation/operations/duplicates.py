"""Rows that are equal, and rows that contradict each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from hashlib import blake2b

from palio.config import DropDisagreement, DropExactDuplicates
from palio.curation.rows import Batch, Rows, Surroundings, Verdict, same_text, shortened

Digest = bytes


def _digest(text: str) -> Digest:
    return blake2b(text.encode(), digest_size=16).digest()


def drop_exact_duplicates(
    settings: DropExactDuplicates, rows: Rows, around: Surroundings
) -> Iterator[Verdict]:
    first: dict[Digest, str] = {}
    for digests, names in rows.map(_row_digests):
        reasons: list[str | None] = []
        for digest, name in zip(digests, names, strict=True):
            reasons.append(f"equals {first[digest]}" if digest in first else None)
            first.setdefault(digest, name)
        yield Verdict(reasons)


def _row_digests(batch: Batch) -> tuple[list[Digest], list[str]]:
    """Of prompt and completion together, and the rows' ids."""
    digests = [
        _digest(f"{same_text(prompt)}\0{same_text(completion)}")
        for prompt, completion in zip(batch.prompts, batch.completions, strict=True)
    ]
    return digests, batch.ids


def drop_disagreement(settings: DropDisagreement, rows: Rows, around: Surroundings) -> Iterator[Verdict]:
    answers: dict[Digest, Counter[Digest]] = {}
    for prompts, completions in rows.map(_column_digests):
        for prompt, completion in zip(prompts, completions, strict=True):
            answers.setdefault(prompt, Counter())[completion] += 1
    for batch in rows:
        digests = zip(*_column_digests(batch), batch.completions, strict=True)
        yield Verdict([_minority(answers[prompt], given, text) for prompt, given, text in digests])


def _column_digests(batch: Batch) -> tuple[list[Digest], list[Digest]]:
    prompts, completions = (
        [_digest(same_text(text)) for text in texts] for texts in (batch.prompts, batch.completions)
    )
    return prompts, completions


def _minority(answers: Counter[Digest], digest: Digest, completion: str) -> str | None:
    if len(answers) == 1:
        return None
    (_, most), (_, second) = answers.most_common(2)
    if most == second:
        return f"{answers.total()} rows of this prompt agree on no answer"
    given = answers[digest]
    if given == most:
        return None
    return f"{most} rows of this prompt answer otherwise, {given} with {shortened(completion, 40)!r}"
