"""Looking into a dataset: its rows, and the dropped ones with operation and reason, as lines of text."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

import pyarrow.parquet as pq

from palio.curation.rows import BATCH_ROWS
from palio.errors import BadInput
from palio.layout import DatasetFolder
from palio.records import DatasetManifest


def lines_of(
    dataset: Path,
    *,
    dropped: bool = False,
    operation: str | None = None,
    source: str | None = None,
    limit: int | None = None,
) -> Iterator[str]:
    """A block of text for every row of a dataset folder that is asked for, texts as they are.

    Args:
        dropped: the rows that operations dropped, instead of the training rows.
        operation: of the dropped, only those of this operation (its name, or number and name).
        source: only rows of this source.
        limit: stop after so many rows.
    """
    folder = DatasetFolder(dataset)
    path = folder.dropped if dropped else folder.rows
    if not path.is_file():
        raise BadInput(path, why="no such file", fix="give the folder of a curated dataset")
    shown = 0
    for batch in pq.ParquetFile(path).iter_batches(batch_size=BATCH_ROWS):
        for row in batch.to_pylist():
            name = row.get("operation", "")
            if source is not None and row["source"] != source:
                continue
            if operation is not None and operation not in (name, name.partition(" ")[2]):
                continue
            if shown == limit:
                return
            shown += 1
            why = f"  dropped by {name}: {row['reason']}" if dropped else ""
            said = [*row["history"], row["prompt"], row["completion"]]
            text = "\n".join(mark + turn for mark, turn in zip(cycle(("", ">>>")), said, strict=False))
            yield f"--- {row['source']} {row['id']}{why}\n{text}\n"


def account(manifest: DatasetManifest) -> Iterator[str]:
    """A line for each source and each operation: how many rows came in and went out."""
    for source in manifest.sources:
        yield f"{source.name}: {source.rows} rows, {source.quarantined} malformed"
    for number, step in enumerate(manifest.operations, start=1):
        changed = f", {step.changed} rewritten" if step.changed else ""
        yield f"{number} {step.op}: {step.rows_in} → {step.rows_out}{changed}"
    yield f"{manifest.rows} rows"
