"""Balancing sources or answers."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from typing import Literal

import pyarrow as pa
from pydantic import PositiveInt

from palio.curation.operations import OperationContext, Reasons, Sketches, TableOperation
from palio.curation.rows import Batch, same_text


class CapRows(TableOperation):
    """Keep a random sample of each source, or of each answer of each source: class balance of a task with
    few different answers."""

    op: Literal["cap_rows"]
    per: Literal["source", "answer"] = "answer"
    """What is sampled: each `source`, or each `answer` of a source."""
    rows: PositiveInt
    """Maximum number of rows of each."""

    def sketch(self, batch: Batch, context: OperationContext) -> pa.RecordBatch:
        answers = (same_text(turns[-1]) if self.per == "answer" else "" for turns in batch.turns)
        return pa.record_batch({"source": batch.table["source"], "answer": pa.array(answers, pa.string())})

    def decide(self, sketches: Sketches, context: OperationContext) -> Iterator[Reasons]:
        rows: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
        start = 0
        for sketch in sketches:
            for row, group in enumerate(_groups(sketch), start=start):
                rows[group].append(row)
            start += sketch.num_rows
        draw = random.Random(context.seed)
        kept = {
            row
            for group in sorted(rows)
            for row in draw.sample(rows[group], min(self.rows, len(rows[group])))
        }
        start = 0
        for sketch in sketches:
            yield [
                None if row in kept else f"{self.rows} other rows of {source} {answer!r} are kept"
                for row, (source, answer) in enumerate(_groups(sketch), start=start)
            ]
            start += sketch.num_rows


def _groups(sketch: pa.RecordBatch) -> Iterator[tuple[str, str]]:
    return zip(sketch["source"].to_pylist(), sketch["answer"].to_pylist(), strict=True)
