"""Choosing how many rows of each source to train on, and which."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import PositiveFloat, PositiveInt

from palio.curation.operations import OperationContext, Reasons, Sketches, TableOperation
from palio.curation.rows import Batch
from palio.errors import BadInput


class SampleRows(TableOperation):
    """Keep `rows` rows, or all if there are fewer, in a mix of sources; no row is repeated.

    A source's share is its weight times its number of rows to the power of 1/`temperature`. What a source is
    short of comes from the others.
    """

    op: Literal["sample_rows"]
    rows: PositiveInt
    """Rows to keep of all sources together."""
    weights: dict[str, PositiveFloat] = {}
    """Source name → weight; 1 for sources not listed."""
    temperature: PositiveFloat | None = None
    """1: sources in proportion to their sizes; more: closer to equal shares; omit it to ignore sizes."""
    by: Literal["chance", "score", "diversity"] = "chance"
    """Which rows of a source: at random, those with the highest `score` of its records, or by `diversity`,
    the k-center choice on TF-IDF (each next row is the one least like those chosen; takes time in rows ×
    rows kept)."""

    def sketch(self, batch: Batch, context: OperationContext) -> pa.RecordBatch:
        """Return each row's source, and what it is chosen by."""
        columns = {"source": batch.table["source"]}
        if self.by == "score":
            columns["score"] = batch.table["score"]
        if self.by == "diversity":
            columns["text"] = pa.array(map(" ".join, batch.turns), pa.string())
        return pa.record_batch(columns)

    def decide(self, sketches: Sketches, context: OperationContext) -> Iterator[Reasons]:
        available: Counter[str] = Counter()
        for sketch in sketches:
            available.update(sketch["source"].to_pylist())
        if unknown := sorted(self.weights.keys() - available.keys()):
            why, fix = "no row is of this source here", f"use {', '.join(sorted(available))}"
            raise BadInput("dataset", "sample_rows.weights", unknown[0], why=why, fix=fix)
        power = 0 if self.temperature is None else 1 / self.temperature
        weights = {name: self.weights.get(name, 1) * count**power for name, count in available.items()}
        wanted = shares(available, weights, self.rows)
        chosen: dict[str, set[int]] = {}
        for name in sorted(available):
            draw = random.Random(f"{context.seed}/{name}")
            if self.by == "chance":
                chosen[name] = set(draw.sample(range(available[name]), wanted[name]))
            elif self.by == "score":
                chosen[name] = set(_highest(name, list(_column(sketches, name, "score")), wanted[name]))
            else:
                chosen[name] = set(_diverse(_column(sketches, name, "text"), wanted[name], draw))
        how = {"chance": "drawn", "score": "of the highest score", "diversity": "least alike"}[self.by]
        seen: Counter[str] = Counter()
        for sketch in sketches:
            reasons: Reasons = []
            for source in sketch["source"].to_pylist():
                kept = seen[source] in chosen[source]
                seen[source] += 1
                reasons.append(None if kept else f"not among the {len(chosen[source])} of {source} {how}")
            yield reasons


def shares(available: Mapping[str, int], weights: Mapping[str, float], rows: int) -> dict[str, int]:
    """Return the rows to take of each source, in proportion to the weights as far as the sources have
    them."""
    taken: dict[str, int] = {}
    left = rows
    # The scarcest first: what it is short of is shared by those after it.
    order = sorted(available, key=lambda name: (available[name] / weights[name], name))
    for index, source in enumerate(order):
        weight = weights[source] / sum(weights[name] for name in order[index:])
        last = index == len(order) - 1
        taken[source] = min(available[source], left if last else int(left * weight))
        left -= taken[source]
    return taken


def _column(sketches: Sketches, source: str, name: str) -> Iterator[Any]:
    """Yield a column's values in the rows of a source."""
    for sketch in sketches:
        yield from sketch[name].filter(pc.equal(sketch["source"], source)).to_pylist()


def _highest(source: str, scores: list[float | None], count: int) -> list[int]:
    if None in scores:
        why, fix = "has rows without a score", "name the key of its records that holds it"
        raise BadInput("dataset", f"sources.{source}.score", why=why, fix=fix)
    return sorted(range(len(scores)), key=lambda row: (-(scores[row] or 0), row))[:count]


def _diverse(texts: Iterator[str], count: int, draw: random.Random) -> list[int]:
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectors = TfidfVectorizer(sublinear_tf=True, dtype=np.float32).fit_transform(texts)
    return k_center(vectors, count, draw.randrange(vectors.shape[0]))


def k_center(vectors: Any, count: int, first: int) -> list[int]:
    """Return rows of a matrix of unit vectors, each the one least like those before it.

    Greedy k-center (Gonzalez 1985): the next row is argmin over rows of max over chosen rows of the cosine,
    at most twice as far from the rest as the best choice. `likeness` holds that maximum for every row.
    """
    chosen = [first]
    likeness: npt.NDArray[np.float32] = np.full(vectors.shape[0], -1, dtype=np.float32)
    while len(chosen) < count:
        likeness = np.maximum(likeness, (vectors @ vectors[chosen[-1]].T).toarray().ravel())
        likeness[chosen[-1]] = np.inf  # never chosen again
        chosen.append(int(np.argmin(likeness)))
    return chosen[:count]
