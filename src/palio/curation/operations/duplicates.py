"""Rows that are equal, and rows that contradict each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from hashlib import blake2b

from palio.config import DropDisagreement, DropExactDuplicates
from palio.curation.rows import Batch, Rows, Surroundings, Turns, Verdict, same_text, shortened

Digest = bytes


def _digest(turns: Turns) -> Digest:
    return blake2b("\0".join(map(same_text, turns)).encode(), digest_size=16).digest()


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
    """Of all turns together, and the rows' ids."""
    return [_digest(turns) for turns in batch.turns], batch.ids


def drop_disagreement(settings: DropDisagreement, rows: Rows, around: Surroundings) -> Iterator[Verdict]:
    answers: dict[Digest, Counter[Digest]] = {}
    for digests in rows.map(_side_digests):
        for question, answer in digests:
            answers.setdefault(question, Counter())[answer] += 1
    for batch in rows:
        judged = zip(_side_digests(batch), batch.turns, strict=True)
        yield Verdict([_minority(answers[asked], given, turns[-1]) for (asked, given), turns in judged])


def _side_digests(batch: Batch) -> list[tuple[Digest, Digest]]:
    """Of all that is said before the last answer, and of that."""
    return [(_digest(turns[:-1]), _digest(turns[-1:])) for turns in batch.turns]


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
