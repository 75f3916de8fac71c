"""Choosing how many rows of each source to train on, and which."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from palio.config import CapRows, SampleRows
from palio.curation.rows import Batch, Notes, Reasons, Surroundings, same_text
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


def mix(settings: SampleRows, batch: Batch, around: Surroundings) -> pa.RecordBatch:
    """Each row's source, and what it is chosen by."""
    columns = {"source": batch.table["source"]}
    if settings.by == "score":
        columns["score"] = batch.table["score"]
    if settings.by == "diversity":
        columns["text"] = pa.array(map(" ".join, batch.turns), pa.string())
    return pa.record_batch(columns)


def sample(settings: SampleRows, notes: Notes, around: Surroundings) -> Iterator[Reasons]:
    available: Counter[str] = Counter()
    for note in notes:
        available.update(note["source"].to_pylist())
    if unknown := sorted(settings.weights.keys() - available.keys()):
        fix = f"no row is of this source here; use {', '.join(sorted(available))}"
        raise BadInput("dataset", "sample_rows.weights", unknown[0], fix)
    power = 0 if settings.temperature is None else 1 / settings.temperature
    weights = {name: settings.weights.get(name, 1) * count**power for name, count in available.items()}
    wanted = shares(available, weights, settings.rows)
    chosen: dict[str, set[int]] = {}
    for name in sorted(available):
        draw = random.Random(f"{around.seed}/{name}")
        if settings.by == "chance":
            chosen[name] = set(draw.sample(range(available[name]), wanted[name]))
        elif settings.by == "score":
            chosen[name] = set(_highest(name, list(_of_source(name, "score", notes)), wanted[name]))
        else:
            chosen[name] = set(_spread(_of_source(name, "text", notes), wanted[name], draw))
    said = {"chance": "drawn", "score": "of the highest score", "diversity": "least alike"}[settings.by]
    seen: Counter[str] = Counter()
    for note in notes:
        reasons: Reasons = []
        for source in note["source"].to_pylist():
            kept = seen[source] in chosen[source]
            seen[source] += 1
            reasons.append(None if kept else f"not among the {len(chosen[source])} of {source} {said}")
        yield reasons


def _of_source(source: str, column: str, notes: Notes) -> Iterator[Any]:
    for note in notes:
        yield from note[column].filter(pc.equal(note["source"], source)).to_pylist()


def _highest(source: str, scores: list[float | None], count: int) -> list[int]:
    if None in scores:
        fix = "has rows without a score; name the key of its records that holds it"
        raise BadInput("dataset", f"sources.{source}.score", None, fix)
    return sorted(range(len(scores)), key=lambda place: (-(scores[place] or 0), place))[:count]


def _spread(texts: Iterator[str], count: int, draw: random.Random) -> list[int]:
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectors = TfidfVectorizer(sublinear_tf=True, dtype=np.float32).fit_transform(texts)
    return k_center(vectors, count, draw.randrange(vectors.shape[0]))


def k_center(vectors: Any, count: int, first: int) -> list[int]:
    """Rows of a matrix of unit vectors, each the one least like those before it (Gonzalez 1985)."""
    chosen = [first]
    likeness: npt.NDArray[np.float32] = np.full(vectors.shape[0], -1, dtype=np.float32)
    while len(chosen) < count:
        likeness = np.maximum(likeness, (vectors @ vectors[chosen[-1]].T).toarray().ravel())
        likeness[chosen[-1]] = np.inf
        chosen.append(int(np.argmin(likeness)))
    return chosen[:count]


def groups(settings: CapRows, batch: Batch, around: Surroundings) -> pa.RecordBatch:
    """The source and the answer that each row counts for."""
    answers = (same_text(turns[-1]) if settings.per == "answer" else "" for turns in batch.turns)
    return pa.record_batch({"source": batch.table["source"], "answer": pa.array(answers, pa.string())})


def cap(settings: CapRows, notes: Notes, around: Surroundings) -> Iterator[Reasons]:
    rows: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    start = 0
    for note in notes:
        for row, group in enumerate(_group_of(note), start=start):
            rows[group].append(row)
        start += note.num_rows
    draw = random.Random(around.seed)
    kept = {
        row
        for group in sorted(rows)
        for row in draw.sample(rows[group], min(settings.rows, len(rows[group])))
    }
    start = 0
    for note in notes:
        yield [
            None if row in kept else f"{settings.rows} other rows of {source} {answer!r} are kept"
            for row, (source, answer) in enumerate(_group_of(note), start=start)
        ]
        start += note.num_rows


def _group_of(note: pa.RecordBatch) -> Iterator[tuple[str, str]]:
    return zip(note["source"].to_pylist(), note["answer"].to_pylist(), strict=True)
