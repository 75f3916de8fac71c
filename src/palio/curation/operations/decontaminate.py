"""Dropping rows that give the open stage's questions away."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from palio.config import Input
from palio.curation.operations import OperationContext, Reasons, RowOperation, Verdict
from palio.curation.overlap import InstanceIndex, read_instances
from palio.curation.rows import Batch
from palio.layout import OPEN_INSTANCES


class Decontaminate(RowOperation):
    """Drop rows that hold an evaluation instance of the open stage, whole or `ngram` words of it in a row."""

    op: Literal["decontaminate"]
    instances: str = OPEN_INSTANCES
    """Table of the open stage's instances, as the workflow prepares it."""
    ngram: Annotated[int, Field(ge=1, le=64)] = 13
    """Consecutive words that count as a copy."""

    @property
    def inputs(self) -> tuple[Input, ...]:
        return (Input("open_stage", "instances", self.instances),)

    def apply(self, batch: Batch, context: OperationContext) -> Verdict:
        path = Path(self.instances)
        index = _index(path, path.stat().st_mtime_ns, self.ngram)
        reasons: Reasons = []
        for numbers in index.found_in(batch.table):
            first = index.instances[min(numbers)] if numbers else None
            reasons.append(f"holds instance {first.id} of {first.scenario}" if first else None)
        return Verdict(reasons)


@lru_cache(maxsize=1)
def _index(instances: Path, modified: int, ngram: int) -> InstanceIndex:
    """Return the index, built once for all batches that a process looks at."""
    return InstanceIndex(read_instances(instances), ngram)
