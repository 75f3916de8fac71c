"""Dropping rows that are equal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from hashlib import blake2b
from typing import Literal

import pyarrow as pa

from palio.curation.operations import OperationContext, Reasons, Sketches, TableOperation
from palio.curation.rows import Batch, Turns, same_text

Digest = bytes


class DropExactDuplicates(TableOperation):
    """Keep the first of rows that are equal except for case, white space and composed or decomposed
    accents."""

    op: Literal["drop_exact_duplicates"]

    def sketch(self, batch: Batch, context: OperationContext) -> pa.RecordBatch:
        return pa.record_batch({"digest": digests(batch.turns), "id": batch.table["id"]})

    def decide(self, sketches: Sketches, context: OperationContext) -> Iterator[Reasons]:
        first: dict[Digest, str] = {}
        for sketch in sketches:
            reasons: Reasons = []
            for digest, name in zip(sketch["digest"].to_pylist(), sketch["id"].to_pylist(), strict=True):
                reasons.append(f"equals {first[digest]}" if digest in first else None)
                first.setdefault(digest, name)
            yield reasons


def digests(rows: Iterable[Turns | None]) -> pa.Array:
    """Return a digest of the turns of each row; null for None."""
    return pa.array((None if turns is None else _digest(turns) for turns in rows), pa.binary(16))


def _digest(turns: Turns) -> Digest:
    return blake2b("\0".join(map(same_text, turns)).encode(), digest_size=16).digest()
