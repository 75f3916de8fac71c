"""Dropping rows that give the open stage's questions away."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from palio.config import Decontaminate
from palio.curation.overlap import InstanceIndex, read_instances
from palio.curation.rows import Batch, Reasons, Surroundings, Verdict


@lru_cache(maxsize=1)
def _index(instances: Path, written: int, ngram: int) -> InstanceIndex:
    """One for all batches that a process looks at."""
    return InstanceIndex(read_instances(instances), ngram)


def decontaminate(settings: Decontaminate, batch: Batch, around: Surroundings) -> Verdict:
    path = Path(settings.instances)
    index = _index(path, path.stat().st_mtime_ns, settings.ngram)
    reasons: Reasons = []
    for found in index.found_in(batch.table):
        first = index.instances[min(found)] if found else None
        reasons.append(f"holds instance {first.id} of {first.scenario}" if first else None)
    return Verdict(reasons)
