"""Batches of rows on disk between two operations, and processes that work on them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc

from palio.errors import Crashed
from palio.provenance import atomic_path

_POOL_BATCHES = 3
"""Fewer batches than this are worked on here: a process takes half a second to start."""


def write_batches(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with atomic_path(path) as temporary, pa.ipc.new_file(temporary, schema, options=options) as writer:
        for batch in batches:
            writer.write_batch(batch)


def read_batch(path: Path, number: int) -> pa.RecordBatch:
    with pa.memory_map(str(path)) as file, pa.ipc.open_file(file) as reader:
        return reader.get_batch(number)


def read_batches(path: Path) -> Iterator[pa.RecordBatch]:
    with pa.memory_map(str(path)) as file, pa.ipc.open_file(file) as reader:
        for number in range(reader.num_record_batches):
            yield reader.get_batch(number)


@dataclass(frozen=True)
class Stored:
    """One batch of each file, read anew whenever asked for."""

    files: Sequence[Path]
    number: int = 0

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        return (read_batch(file, self.number) for file in self.files)


Tick = Callable[[int], None]
"""Told how many rows were just seen."""


def batch_file(folder: Path, number: int) -> Path:
    return folder / f"{number:05}.arrow"


def unheard(rows: int) -> None: ...


class Pool:
    """Processes that work on batches, started when first needed."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._executor: ProcessPoolExecutor | None = None

    def each(self, work: Callable[[int], int], batches: Sequence[int], tick: Tick = unheard) -> None:
        """Do the work on the batches with these numbers; it returns how many rows it has seen."""
        if self.workers == 1 or len(batches) < _POOL_BATCHES:
            seen: Iterator[int] = map(work, batches)
        else:
            seen = self._start().map(work, batches)
        try:
            for rows in seen:
                tick(rows)
        except BrokenProcessPool:
            fix = "it was killed, likely for memory; give the job more, or fewer workers"
            raise Crashed(f"a process of curation died: {fix}") from None

    def _start(self) -> ProcessPoolExecutor:
        if self._executor is None:
            # Spawned: Arrow's and the tokenizer's threads do not survive a fork.
            self._executor = ProcessPoolExecutor(self.workers, get_context("spawn"), _end_with_parent)
        return self._executor

    def stop(self) -> None:
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)


@contextmanager
def pool(workers: int) -> Iterator[Pool]:
    made = Pool(workers)
    try:
        yield made
    finally:
        made.stop()


def _end_with_parent() -> None:
    """A killed parent cannot stop its processes; they watch it and end themselves."""

    def watch() -> None:
        parent = parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
