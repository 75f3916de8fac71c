"""Rows that are equal, and rows that contradict each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from hashlib import blake2b

import pyarrow as pa

from palio.config import DropDisagreement, DropExactDuplicates
from palio.curation.rows import Batch, Notes, Reasons, Surroundings, Turns, same_text, shortened

Digest = bytes


def _digests(said: Iterable[Turns]) -> pa.Array:
    return pa.array(map(_digest, said), pa.binary(16))


def _digest(turns: Turns) -> Digest:
    return blake2b("\0".join(map(same_text, turns)).encode(), digest_size=16).digest()


def row_digests(settings: DropExactDuplicates, batch: Batch, around: Surroundings) -> pa.RecordBatch:
    """Of all turns together, and the rows' ids."""
    return pa.record_batch({"digest": _digests(batch.turns), "id": batch.table["id"]})


def exact_duplicates(settings: DropExactDuplicates, notes: Notes, around: Surroundings) -> Iterator[Reasons]:
    first: dict[Digest, str] = {}
    for note in notes:
        reasons: Reasons = []
        for digest, name in zip(note["digest"].to_pylist(), note["id"].to_pylist(), strict=True):
            reasons.append(f"equals {first[digest]}" if digest in first else None)
            first.setdefault(digest, name)
        yield reasons


def answer_digests(settings: DropDisagreement, batch: Batch, around: Surroundings) -> pa.RecordBatch:
    """Of all that is said before the last answer, and of that."""
    return pa.record_batch(
        {
            "prompt": _digests(turns[:-1] for turns in batch.turns),
            "answer": _digests(turns[-1:] for turns in batch.turns),
            "shown": pa.array((shortened(turns[-1], 40) for turns in batch.turns), pa.string()),
        }
    )


def disagreement(settings: DropDisagreement, notes: Notes, around: Surroundings) -> Iterator[Reasons]:
    answers: dict[Digest, Counter[Digest]] = {}
    for note in notes:
        for prompt, answer in zip(note["prompt"].to_pylist(), note["answer"].to_pylist(), strict=True):
            answers.setdefault(prompt, Counter())[answer] += 1
    for note in notes:
        given = zip(*(note[name].to_pylist() for name in ("prompt", "answer", "shown")), strict=True)
        yield [_minority(answers[prompt], answer, shown) for prompt, answer, shown in given]


def _minority(answers: Counter[Digest], answer: Digest, shown: str) -> str | None:
    if len(answers) == 1:
        return None
    (_, most), (_, second) = answers.most_common(2)
    if most == second:
        return f"{answers.total()} rows of this prompt agree on no answer"
    given = answers[answer]
    if given == most:
        return None
    return f"{most} rows of this prompt answer otherwise, {given} with {shown!r}"
