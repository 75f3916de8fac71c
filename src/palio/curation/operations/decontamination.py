"""Dropping rows that give the open stage's questions away."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path

from palio.config import Decontaminate
from palio.curation.overlap import InstanceIndex, read_instances
from palio.curation.rows import Batch, Rows, Surroundings, Verdict


def decontaminate(settings: Decontaminate, rows: Rows, around: Surroundings) -> Iterator[Verdict]:
    path = around.base / settings.instances
    return rows.map(partial(_leaks, path, path.stat().st_mtime_ns, settings.ngram))


@lru_cache(maxsize=1)
def _index(instances: Path, written: int, ngram: int) -> InstanceIndex:
    """One for all batches that a process looks at."""
    return InstanceIndex(read_instances(instances), ngram)


def _leaks(instances: Path, written: int, ngram: int, batch: Batch) -> Verdict:
    index = _index(instances, written, ngram)
    reasons: list[str | None] = []
    for found in index.found_in(batch.table):
        first = index.instances[min(found)] if found else None
        reasons.append(f"holds instance {first.id} of {first.scenario}" if first else None)
    return Verdict(reasons)
