"""Rows that ask the same in other words, by a local embedding model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from palio.config import DropSemanticDuplicates
from palio.curation.rows import FIELDS, Batch, Notes, Reasons, Surroundings

_TEXTS = 64
_BLOCK = 2048

Vectors = npt.NDArray[np.float32]


class _Embedder:
    def __init__(self, folder: Path) -> None:
        from transformers import AutoModel, AutoTokenizer

        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self._tokenizer.pad_token = self._tokenizer.pad_token or self._tokenizer.eos_token
        self._model: Any = AutoModel.from_pretrained(folder).eval()

    def vectors(self, texts: list[str]) -> Iterator[Vectors]:
        """Unit vectors: the mean of the last hidden states."""
        import torch

        with torch.inference_mode(), _one_thread():
            for start in range(0, len(texts), _TEXTS):
                given = self._tokenizer(
                    texts[start : start + _TEXTS],
                    padding=True,
                    truncation=True,
                    max_length=min(512, self._model.config.max_position_embeddings),
                    return_tensors="pt",
                )
                mask = given["attention_mask"].unsqueeze(-1)
                mean = (self._model(**given).last_hidden_state * mask).sum(1) / mask.sum(1)
                yield torch.nn.functional.normalize(mean, dim=1).float().numpy()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Batches are embedded side by side; and the order of a sum is the same whatever the cores."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@lru_cache(maxsize=1)
def _embedder(folder: Path) -> _Embedder:
    """One for all batches that a process looks at."""
    return _Embedder(folder)


def embeddings(settings: DropSemanticDuplicates, batch: Batch, around: Surroundings) -> pa.RecordBatch:
    """Of what the user says in each row."""
    texts = ["\n".join(turns[FIELDS["prompt"]]) for turns in batch.turns]
    vectors = [row for part in _embedder(Path(settings.model)).vectors(texts) for row in part]
    return pa.record_batch({"vector": pa.array(vectors, pa.list_(pa.float32())), "id": batch.table["id"]})


def semantic_duplicates(
    settings: DropSemanticDuplicates, notes: Notes, around: Surroundings
) -> Iterator[Reasons]:
    kept: list[Vectors] = []
    names: list[str] = []
    for note in notes:
        reasons: Reasons = []
        if note.num_rows == 0:
            yield reasons
            continue
        vectors = note["vector"].flatten().to_numpy().reshape(note.num_rows, -1)
        earlier = _best(vectors, np.concatenate(kept)) if kept else None
        mine: list[int] = []
        for place, name in enumerate(note["id"].to_pylist()):
            best, likeness = (int(earlier[0][place]), float(earlier[1][place])) if earlier else (0, -1.0)
            if mine:
                near = vectors[mine] @ vectors[place]
                if near.max() > likeness:
                    best, likeness = len(names) - len(mine) + int(near.argmax()), float(near.max())
            same = likeness >= settings.threshold
            reasons.append(f"asks as {names[best]} does (cosine {likeness:.3f})" if same else None)
            if not same:
                mine.append(place)
                names.append(name)
        kept.append(vectors[mine])
        yield reasons


def _best(vectors: Vectors, others: Vectors) -> tuple[npt.NDArray[np.int64], Vectors]:
    """Of each vector the most alike of the others, and its cosine."""
    best = np.zeros(len(vectors), dtype=np.int64)
    likeness = np.full(len(vectors), -1, dtype=np.float32)
    for start in range(0, len(others), _BLOCK):
        cosine = vectors @ others[start : start + _BLOCK].T
        found = cosine.argmax(axis=1)
        value = cosine[np.arange(len(vectors)), found]
        better = value > likeness
        best[better], likeness[better] = found[better] + start, value[better]
    return best, likeness
