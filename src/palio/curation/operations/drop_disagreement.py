"""Dropping rows that contradict each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Literal

import pyarrow as pa

from palio.curation.operations import OperationContext, Reasons, Sketches, TableOperation
from palio.curation.operations.drop_exact_duplicates import Digest, digests
from palio.curation.rows import Batch, shortened


class DropDisagreement(TableOperation):
    """Keep the most frequent of several answers to one prompt, and drop the prompt on a tie. In a
    conversation this is the last answer, to everything said before. Text without a prompt is kept."""

    op: Literal["drop_disagreement"]

    def sketch(self, batch: Batch, context: OperationContext) -> pa.RecordBatch:
        return pa.record_batch(
            {
                "prompt": digests(turns[:-1] if turns[0] else None for turns in batch.turns),
                "answer": digests(turns[-1:] for turns in batch.turns),
                "shown": pa.array((shortened(turns[-1], 40) for turns in batch.turns), pa.string()),
            }
        )

    def decide(self, sketches: Sketches, context: OperationContext) -> Iterator[Reasons]:
        answers: dict[Digest, Counter[Digest]] = {}
        for sketch in sketches:
            for prompt, answer in zip(
                sketch["prompt"].to_pylist(), sketch["answer"].to_pylist(), strict=True
            ):
                if prompt is not None:
                    answers.setdefault(prompt, Counter())[answer] += 1
        for sketch in sketches:
            rows = zip(*(sketch[name].to_pylist() for name in ("prompt", "answer", "shown")), strict=True)
            yield [
                None if prompt is None else _minority(answers[prompt], answer, shown)
                for prompt, answer, shown in rows
            ]


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
