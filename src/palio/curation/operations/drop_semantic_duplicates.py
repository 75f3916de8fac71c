"""Dropping rows that ask the same in other words, by a local embedding model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field

from palio.config import Input
from palio.curation.operations import OperationContext, Reasons, Sketches, TableOperation
from palio.curation.rows import FIELDS, Batch

_TEXTS = 64
"""Texts embedded at once."""
_BLOCK = 2048
"""Vectors compared at once."""

Vectors = npt.NDArray[np.float32]


class DropSemanticDuplicates(TableOperation):
    """Keep the first of rows whose prompts mean the same: the cosine of their embeddings, the mean of the
    last hidden states, is at least `threshold`. Time grows with the square of the rows: for tens of
    thousands."""

    op: Literal["drop_semantic_duplicates"]
    model: str
    """Folder of an embedding model in Hugging Face format, such as all-MiniLM-L6-v2."""
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Smallest cosine of duplicates."""

    @property
    def inputs(self) -> tuple[Input, ...]:
        return (Input("model_folder", "model", self.model),)

    def sketch(self, batch: Batch, context: OperationContext) -> pa.RecordBatch:
        """Return the embedding of what the user says in each row; of text without a prompt, of the text."""
        texts = ["\n".join(turns[FIELDS["prompt"]]) or turns[-1] for turns in batch.turns]
        vectors = [row for part in _embedder(context.models[self.model]).vectors(texts) for row in part]
        return pa.record_batch({"vector": pa.array(vectors, pa.list_(pa.float32())), "id": batch.table["id"]})

    def decide(self, sketches: Sketches, context: OperationContext) -> Iterator[Reasons]:
        """Compare each row with the rows kept so far: those of earlier batches, then those of its own."""
        kept: list[Vectors] = []
        names: list[str] = []
        for sketch in sketches:
            reasons: Reasons = []
            if sketch.num_rows == 0:
                yield reasons
                continue
            vectors = sketch["vector"].flatten().to_numpy().reshape(sketch.num_rows, -1)
            earlier = _most_alike(vectors, np.concatenate(kept)) if kept else None
            kept_here: list[int] = []
            for row, name in enumerate(sketch["id"].to_pylist()):
                best, cosine = (int(earlier[0][row]), float(earlier[1][row])) if earlier else (0, -1.0)
                if kept_here:
                    cosines = vectors[kept_here] @ vectors[row]
                    if cosines.max() > cosine:
                        best = len(names) - len(kept_here) + int(cosines.argmax())
                        cosine = float(cosines.max())
                duplicate = cosine >= self.threshold
                reasons.append(f"asks as {names[best]} does (cosine {cosine:.3f})" if duplicate else None)
                if not duplicate:
                    kept_here.append(row)
                    names.append(name)
            kept.append(vectors[kept_here])
            yield reasons


class _Embedder:
    def __init__(self, folder: Path) -> None:
        from transformers import AutoModel, AutoTokenizer

        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        self._tokenizer.pad_token = self._tokenizer.pad_token or self._tokenizer.eos_token
        self._model: Any = AutoModel.from_pretrained(
            folder, trust_remote_code=False, use_safetensors=True
        ).eval()

    def vectors(self, texts: list[str]) -> Iterator[Vectors]:
        """Yield unit vectors, so that a dot product is a cosine: the mean of the last hidden states over a
        text's tokens, Σ mask·h / Σ mask, divided by its norm."""
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
    """Use one thread: batches are embedded in parallel, and sums must not depend on the number of cores."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@lru_cache(maxsize=1)
def _embedder(folder: Path) -> _Embedder:
    """Return the model, loaded once for all batches that a process looks at."""
    return _Embedder(folder)


def _most_alike(vectors: Vectors, others: Vectors) -> tuple[npt.NDArray[np.int64], Vectors]:
    """Return for each vector the index of the most similar of the others, the first of equals, and its
    cosine."""
    best = np.zeros(len(vectors), dtype=np.int64)
    best_cosine = np.full(len(vectors), -1, dtype=np.float32)
    for start in range(0, len(others), _BLOCK):
        cosines = vectors @ others[start : start + _BLOCK].T
        nearest = cosines.argmax(axis=1)
        cosine = cosines[np.arange(len(vectors)), nearest]
        better = cosine > best_cosine
        best[better], best_cosine[better] = nearest[better] + start, cosine[better]
    return best, best_cosine
