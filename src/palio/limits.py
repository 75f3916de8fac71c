"""Limits on work of our own on what others handed in: a regular expression, a template, a file that unfolds.

bounded     one item may take seconds of CPU time, the work as a whole so much more memory
in_child    a whole step, in a process with the limits of its job
"""

from __future__ import annotations

import os
import pickle
import resource
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from palio.errors import Crashed, OutOfMemory, PalioError, TimeLimit
from palio.guard import end_with_parent

ITEM_SECONDS = 4.0
"""CPU time for one record, row or text; honest ones take milliseconds."""
WORK_SECONDS = 60.0
"""CPU time for an operation on a batch of rows; an honest one takes a second."""
WORK_MEMORY = 4 << 30
"""Bytes that reading a source, or an operation on a batch of rows, may take on top of what is in use."""

T = TypeVar("T")


class TooMuch(Exception):
    """An item took too long, or the work too much memory; the message says which."""


class Watched:
    """Counts the items that are worked on."""

    def __init__(self) -> None:
        self.item = 0

    def __call__(self, items: Iterable[T]) -> Iterator[T]:
        iterator = iter(items)
        while True:
            self.item += 1
            try:
                item = next(iterator)
            except StopIteration:
                return
            yield item


@contextmanager
def bounded(
    seconds: float = ITEM_SECONDS, memory: int = WORK_MEMORY, total: float = WORK_SECONDS
) -> Iterator[Watched]:
    """Watch the items of a loop. Regular expressions and templates look for signals, so they can be
    interrupted; outside the main thread, where no signal arrives, only memory is limited.

    Raises:
        TooMuch: an item took more than `seconds` of CPU time, or all together more than `total` seconds or
            `memory` bytes.
    """
    watched = Watched()
    in_main_thread = threading.current_thread() is threading.main_thread()
    last = looks = 0

    def look(signum: int, frame: object) -> None:
        nonlocal last, looks
        looks += 1
        if looks * seconds / 2 > total:
            raise TooMuch(f"the items up to {watched.item} take more than {total:g} s")
        if watched.item == last:
            raise TooMuch(f"item {last} takes more than {seconds / 2:g} s")
        last = watched.item

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    allowed = _data_bytes() + memory
    limits = [limit for limit in (soft, hard, allowed) if limit != resource.RLIM_INFINITY]
    if in_main_thread:
        before = signal.signal(signal.SIGPROF, look)
        signal.setitimer(signal.ITIMER_PROF, seconds / 2, seconds / 2)
    resource.setrlimit(resource.RLIMIT_DATA, (min(limits), hard))
    try:
        yield watched
    except MemoryError:
        raise TooMuch(f"item {watched.item} takes more than {memory >> 20} MB of memory") from None
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
        if in_main_thread:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, before)


def _data_bytes() -> int:
    """What RLIMIT_DATA counts of this process."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) * 1024
    return 0


def in_child(work: Callable[[], None], *, memory: int, seconds: float) -> None:
    """Do `work` in a child of this process, which ends with it.

    Raises:
        OutOfMemory: a process needed more than `memory` bytes.
        TimeLimit: it took more than `seconds`.
        Crashed: it died, e.g. in a library that ends a process where memory runs out.
    """
    reader, writer = os.pipe()
    parent = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _as_child(work, parent, memory, writer)
    os.close(writer)
    timer = threading.Timer(seconds, os.kill, (child, signal.SIGKILL))
    timer.daemon = True
    timer.start()
    try:
        with os.fdopen(reader, "rb") as stream:
            told = stream.read()
        _, status = os.waitpid(child, 0)
    except BaseException:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise
    finally:
        in_time = timer.is_alive()
        timer.cancel()
    if told:
        raise pickle.loads(told)  # noqa: S301 (our own child wrote it)
    code = os.waitstatus_to_exitcode(status)
    if code == -signal.SIGKILL and not in_time:
        raise TimeLimit(f"took more than the {seconds:g} s of its job")
    if code != 0:
        raise Crashed(f"a process ended with code {code}, likely for more than {memory >> 20} MB of memory")


def _as_child(work: Callable[[], None], parent: int, memory: int, writer: int) -> None:
    """Do the work, report what it raised, and end."""
    raised: BaseException | None = None
    try:
        end_with_parent(parent, signal.SIGKILL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the parent's to record
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
        work()
    except MemoryError:
        raised = OutOfMemory(f"a process needs more than the {memory >> 20} MB of its job")
    except BaseException as error:
        raised = error
        if not isinstance(error, PalioError):
            traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    if raised is not None:
        try:
            content = pickle.dumps(raised)
        except Exception:  # whatever an exception of a library holds
            content = pickle.dumps(RuntimeError(f"{type(raised).__name__}: {raised}"))
        with os.fdopen(writer, "wb") as stream:
            stream.write(content)
    os._exit(0)
