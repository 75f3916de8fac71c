"""Rows that are equal, and rows that contradict each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from hashlib import blake2b

from palio.config import DropDisagreement, DropExactDuplicates
from palio.curation.rows import Batches, Surroundings, Verdict, same_text, shortened

Digest = bytes


def _digest(text: str) -> Digest:
    return blake2b(text.encode(), digest_size=16).digest()


def drop_exact_duplicates(
    settings: DropExactDuplicates, rows: Batches, around: Surroundings
) -> Iterator[Verdict]:
    first: dict[Digest, str] = {}
    for batch in rows():
        reasons: list[str | None] = []
        for prompt, completion, name in zip(batch.prompts, batch.completions, batch.ids, strict=True):
            key = _digest(f"{same_text(prompt)}\0{same_text(completion)}")
            reasons.append(f"equals {first[key]}" if key in first else None)
            first.setdefault(key, name)
        yield Verdict(reasons)


def drop_disagreement(settings: DropDisagreement, rows: Batches, around: Surroundings) -> Iterator[Verdict]:
    answers: dict[Digest, Counter[Digest]] = {}
    for batch in rows():
        for prompt, completion in zip(batch.prompts, batch.completions, strict=True):
            answers.setdefault(_digest(same_text(prompt)), Counter())[_digest(same_text(completion))] += 1
    for batch in rows():
        yield Verdict(
            [
                _minority(answers[_digest(same_text(prompt))], completion)
                for prompt, completion in zip(batch.prompts, batch.completions, strict=True)
            ]
        )


def _minority(answers: Counter[Digest], completion: str) -> str | None:
    if len(answers) == 1:
        return None
    (_, most), (_, second) = answers.most_common(2)
    if most == second:
        return f"{answers.total()} rows of this prompt agree on no answer"
    given = answers[_digest(same_text(completion))]
    if given == most:
        return None
    return f"{most} rows of this prompt answer otherwise, {given} with {shortened(completion, 40)!r}"
