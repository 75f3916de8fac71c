"""Choosing how many rows of each source to train on."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping

from palio.config import SampleRows
from palio.curation.rows import Batches, Surroundings, Verdict


def shares(available: Mapping[str, int], rows: int) -> dict[str, int]:
    """Rows to take of each source: as equal as the sources allow, at most `rows` together."""
    taken: dict[str, int] = {}
    left = rows
    # The smallest source first: what it cannot give goes to the others.
    for place, source in enumerate(sorted(available, key=lambda name: (available[name], name))):
        taken[source] = min(available[source], left // (len(available) - place))
        left -= taken[source]
    return taken


def sample_rows(settings: SampleRows, rows: Batches, around: Surroundings) -> Iterator[Verdict]:
    available: Counter[str] = Counter()
    for batch in rows():
        available.update(batch.sources)
    chosen = {
        source: set(random.Random(f"{around.seed}/{source}").sample(range(available[source]), share))
        for source, share in shares(available, settings.rows).items()
    }
    seen: Counter[str] = Counter()
    for batch in rows():
        reasons: list[str | None] = []
        for source in batch.sources:
            kept = seen[source] in chosen[source]
            seen[source] += 1
            reasons.append(None if kept else f"not among the {len(chosen[source])} drawn of {source}")
        yield Verdict(reasons)
