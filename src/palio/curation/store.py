"""Rows on disk between two operations, and processes that look at them."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import lru_cache
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc

from palio.curation.rows import Batch, Seen
from palio.errors import Crashed
from palio.provenance import atomic_path

_POOL_BATCHES = 3
"""Fewer batches than this are looked at here: a process takes half a second to start."""


def write_batches(path: Path, schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> None:
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with atomic_path(path) as temporary, pa.ipc.new_file(temporary, schema, options=options) as writer:
        for batch in batches:
            writer.write_batch(batch)


def read_batches(path: Path) -> Iterator[pa.RecordBatch]:
    with pa.memory_map(str(path)) as file, pa.ipc.open_file(file) as reader:
        for number in range(reader.num_record_batches):
            yield reader.get_batch(number)


Tick = Callable[[int], None]
"""Told how many rows were just seen."""


class StoredRows:
    """The rows in a file of `write_batches`; `palio.curation.rows.Rows` for an operation."""

    def __init__(self, path: Path, pool: Pool, tick: Tick) -> None:
        self._path = path
        self._pool = pool
        self._tick = tick

    def __iter__(self) -> Iterator[Batch]:
        for batch in read_batches(self._path):
            yield Batch(batch)
            self._tick(batch.num_rows)

    def map(self, look: Callable[..., Seen], *beside: Iterable[Any]) -> Iterator[Seen]:
        count = _reader(self._path).num_record_batches
        if self._pool.workers == 1 or count < _POOL_BATCHES:
            yield from map(look, self, *beside)
            return
        waiting: deque[Future[tuple[int, Seen]]] = deque()
        for number, *items in zip(range(count), *beside, strict=True):
            waiting.append(self._pool.start().submit(_looked, self._path, number, look, items))
            if len(waiting) > 2 * self._pool.workers:
                yield self._result(waiting)
        while waiting:
            yield self._result(waiting)

    def _result(self, waiting: deque[Future[tuple[int, Seen]]]) -> Seen:
        try:
            rows, seen = waiting.popleft().result()
        except BrokenProcessPool:
            fix = "it was killed, likely for memory; give the job more, or fewer workers"
            raise Crashed(f"a process of curation died: {fix}") from None
        self._tick(rows)
        return seen


@lru_cache(maxsize=2)
def _reader(path: Path) -> pa.ipc.RecordBatchFileReader:
    return pa.ipc.open_file(pa.memory_map(str(path)))


def _looked(path: Path, number: int, look: Callable[..., Seen], items: list[Any]) -> tuple[int, Seen]:
    batch = Batch(_reader(path).get_batch(number))
    return len(batch), look(batch, *items)


class Pool:
    """Processes that look at batches, started when first needed."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._executor: ProcessPoolExecutor | None = None

    def start(self) -> ProcessPoolExecutor:
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
