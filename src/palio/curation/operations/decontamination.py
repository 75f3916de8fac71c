"""Dropping rows that give the open stage's questions away."""

from __future__ import annotations

from collections.abc import Iterator

from palio.config import Decontaminate
from palio.curation.overlap import InstanceIndex, read_instances
from palio.curation.rows import Batches, Surroundings, Verdict


def decontaminate(settings: Decontaminate, rows: Batches, around: Surroundings) -> Iterator[Verdict]:
    index = InstanceIndex(read_instances(around.base / settings.instances), settings.ngram)
    for batch in rows():
        reasons: list[str | None] = []
        for prompt, completion in zip(batch.prompts, batch.completions, strict=True):
            found = index.found_in(prompt, completion)
            first = index.instances[min(found)] if found else None
            reasons.append(f"holds instance {first.id} of {first.scenario}" if first else None)
        yield Verdict(reasons)
