"""The dataset's files: the rows in their final order, and those that were dropped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc
import pyarrow.parquet as pq

from palio.curation.rows import BATCH_ROWS, DROPPED, ROW
from palio.curation.store import read_batches
from palio.provenance import atomic_path

BUCKET_BYTES = 128 << 20
"""Of rows that are shuffled in memory at a time."""
EXAMPLES = 3
_PLACED = ROW.append(pa.field("place", pa.int64()))


@dataclass
class Written:
    """What the manifest and the card say of the rows."""

    rows: int = 0
    by_source: Counter[str] = field(default_factory=Counter)
    bins: dict[str, Counter[int]] = field(
        default_factory=lambda: {"prompt": Counter(), "completion": Counter()}
    )
    examples: list[dict[str, Any]] = field(default_factory=list)

    def add(self, table: pa.Table) -> None:
        self.rows += table.num_rows
        self.by_source.update(table["source"].to_pylist())
        before = pc.utf8_length(pc.binary_join(table["history"], ""))
        lengths = {
            "prompt": pc.add(before, pc.utf8_length(table["prompt"])),
            "completion": pc.utf8_length(table["completion"]),
        }
        for name, bins in self.bins.items():
            bins.update(length.bit_length() for length in lengths[name].to_pylist())
        self.examples += table.slice(0, EXAMPLES - len(self.examples)).to_pylist()

    def characters(self) -> dict[str, list[int]]:
        """Counts of lengths of 0, 1, 2-3, 4-7, … characters."""
        return {
            name: [bins[number] for number in range(max(bins, default=0) + 1)]
            for name, bins in self.bins.items()
        }


def write_shuffled(rows: Iterable[pa.RecordBatch], path: Path, seed: int, scratch: Path) -> Written:
    """The rows in random order as Parquet. Memory holds a bucket of `BUCKET_BYTES`, whatever their number."""
    written = Written()
    with atomic_path(path) as temporary, pq.ParquetWriter(temporary, ROW, compression="zstd") as writer:
        for table in _buckets(rows, seed, scratch):
            written.add(table)
            writer.write_table(table, row_group_size=BATCH_ROWS)
    return written


def _buckets(rows: Iterable[pa.RecordBatch], seed: int, scratch: Path) -> Iterator[pa.Table]:
    """The permuted rows: first each to the file of its bucket, then bucket by bucket in order."""
    sizes = [(batch.num_rows, batch.nbytes) for batch in rows]
    count, size = (sum(column) for column in zip(*sizes, strict=True))
    buckets = -(-size // BUCKET_BYTES)
    # Whole row groups, so that the file does not show where a bucket ends.
    height = -(-count // (buckets * BATCH_ROWS)) * BATCH_ROWS
    place = np.empty(count, dtype=np.int64)
    place[np.random.default_rng(seed).permutation(count)] = np.arange(count)
    files = [scratch / f"bucket-{number}.arrow" for number in range(-(-count // height))]
    with ExitStack() as stack:
        writers = [stack.enter_context(pa.ipc.new_file(file, _PLACED)) for file in files]
        start = 0
        for batch in rows:
            places = place[start : start + batch.num_rows]
            placed = pa.RecordBatch.from_arrays([*_row(batch), pa.array(places)], schema=_PLACED)
            for number in np.unique(places // height).tolist():
                writers[number].write_batch(placed.take(pa.array(np.flatnonzero(places // height == number))))
            start += batch.num_rows
    for file in files:
        table = pa.Table.from_batches(read_batches(file), schema=_PLACED)
        order = np.argsort(table["place"].to_numpy())
        yield table.drop_columns("place").take(pa.array(order)).combine_chunks()
        file.unlink()


def write_dropped(dropped: Iterable[tuple[str, Iterable[pa.RecordBatch]]], path: Path) -> None:
    """By operation the rows that it dropped, each with a `reason`."""
    with atomic_path(path) as temporary, pq.ParquetWriter(temporary, DROPPED, compression="zstd") as writer:
        for operation, batches in dropped:
            for batch in batches:
                if batch.num_rows:
                    names = pa.array([operation] * batch.num_rows)
                    columns = [*_row(batch), names, batch["reason"]]
                    writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=DROPPED))


def _row(batch: pa.RecordBatch) -> list[pa.Array]:
    return [batch[name] for name in ROW.names]
