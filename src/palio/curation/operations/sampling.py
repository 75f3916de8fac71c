"""Choosing how many rows of each source to train on, and which."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from palio.config import CapRows, SampleRows
from palio.curation.rows import Batch, Rows, Surroundings, Verdict, same_text
from palio.errors import BadInput


def shares(available: Mapping[str, int], weights: Mapping[str, float], rows: int) -> dict[str, int]:
    """Rows to take of each source: in proportion to the weights, as far as the sources have them."""
    taken: dict[str, int] = {}
    left = rows
    # The scarcest first: what it cannot give goes to the others.
    order = sorted(available, key=lambda name: (available[name] / weights[name], name))
    for place, source in enumerate(order):
        weight = weights[source] / sum(weights[name] for name in order[place:])
        last = place == len(order) - 1
        taken[source] = min(available[source], left if last else int(left * weight))
        left -= taken[source]
    return taken


def sample_rows(settings: SampleRows, rows: Rows, around: Surroundings) -> Iterator[Verdict]:
    available: Counter[str] = Counter()
    for batch in rows:
        available.update(batch.sources)
    if unknown := sorted(settings.weights.keys() - available.keys()):
        fix = f"no row is of this source here; use {', '.join(sorted(available))}"
        raise BadInput("dataset", "sample_rows.weights", unknown[0], fix)
    power = 0 if settings.temperature is None else 1 / settings.temperature
    weights = {name: settings.weights.get(name, 1) * count**power for name, count in available.items()}
    wanted = shares(available, weights, settings.rows)
    choose = {"chance": _drawn, "score": _highest, "diversity": _spread}[settings.by]
    chosen = {name: set(choose(name, wanted[name], rows, around)) for name in sorted(available)}
    said = {"chance": "drawn", "score": "of the highest score", "diversity": "least alike"}[settings.by]
    seen: Counter[str] = Counter()
    for batch in rows:
        reasons: list[str | None] = []
        for source in batch.sources:
            kept = seen[source] in chosen[source]
            seen[source] += 1
            reasons.append(None if kept else f"not among the {len(chosen[source])} of {source} {said}")
        yield Verdict(reasons)


def _of_source(source: str, rows: Rows) -> Iterator[tuple[Batch, int]]:
    for batch in rows:
        yield from ((batch, place) for place, name in enumerate(batch.sources) if name == source)


def _drawn(source: str, count: int, rows: Rows, around: Surroundings) -> list[int]:
    available = sum(1 for _ in _of_source(source, rows))
    return random.Random(f"{around.seed}/{source}").sample(range(available), count)


def _highest(source: str, count: int, rows: Rows, around: Surroundings) -> list[int]:
    scores = [batch.scores[place] for batch, place in _of_source(source, rows)]
    if None in scores:
        fix = "has rows without a score; name the key of its records that holds it"
        raise BadInput("dataset", f"sources.{source}.score", None, fix)
    return sorted(range(len(scores)), key=lambda place: (-(scores[place] or 0), place))[:count]


def _spread(source: str, count: int, rows: Rows, around: Surroundings) -> list[int]:
    from sklearn.feature_extraction.text import TfidfVectorizer

    texts = (" ".join(batch.turns[place]) for batch, place in _of_source(source, rows))
    vectors = TfidfVectorizer(sublinear_tf=True, dtype=np.float32).fit_transform(texts)
    return k_center(vectors, count, random.Random(f"{around.seed}/{source}").randrange(vectors.shape[0]))


def k_center(vectors: Any, count: int, first: int) -> list[int]:
    """Rows of a matrix of unit vectors, each the one least like those before it (Gonzalez 1985)."""
    chosen = [first]
    likeness: npt.NDArray[np.float32] = np.full(vectors.shape[0], -1, dtype=np.float32)
    while len(chosen) < count:
        likeness = np.maximum(likeness, (vectors @ vectors[chosen[-1]].T).toarray().ravel())
        likeness[chosen[-1]] = np.inf
        chosen.append(int(np.argmin(likeness)))
    return chosen[:count]


def cap_rows(settings: CapRows, rows: Rows, around: Surroundings) -> Iterator[Verdict]:
    groups: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    start = 0
    for batch in rows:
        for place, group in enumerate(_groups(settings, batch)):
            groups[group].append(start + place)
        start += len(batch)
    draw = random.Random(around.seed)
    kept = {
        row
        for group in sorted(groups)
        for row in draw.sample(groups[group], min(settings.rows, len(groups[group])))
    }
    start = 0
    for batch in rows:
        reasons = [
            None if start + place in kept else f"{settings.rows} other rows of {source} {answer!r} are kept"
            for place, (source, answer) in enumerate(_groups(settings, batch))
        ]
        start += len(batch)
        yield Verdict(reasons)


def _groups(settings: CapRows, batch: Batch) -> Iterator[tuple[str, str]]:
    for source, turns in zip(batch.sources, batch.turns, strict=True):
        yield source, same_text(turns[-1]) if settings.per == "answer" else ""
