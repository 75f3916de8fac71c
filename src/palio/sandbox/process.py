"""A team's program in its room: started, watched, and ended together with everything it started.

The kernel's namespaces and per-process limits hold by themselves. What they cannot count is watched from
outside a few times a second, and a program that goes over it is ended: memory and output of all its
processes together, memory of the GPU, and what is left of the machine's own memory and disk.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import stat
import subprocess
import threading
import time
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import psutil

from palio.config import Program
from palio.errors import Crashed, Interrupted, OutOfMemory, PalioError
from palio.records import Contained
from palio.sandbox import gpu
from palio.sandbox.door import allow_low_ports
from palio.sandbox.room import GIB, UID, Room, building, command_line, environment, limited, program_arguments
from palio.sandbox.seccomp import filter_program

WATCH_SECONDS = 0.2
LOG_BYTES = 64 << 20
"""Of a program's output kept in its log; the rest is read and dropped."""
MACHINE_MEMORY = GIB // 2
MACHINE_DISK = GIB
"""A program is ended where the machine has less left: it may hide some, e.g. in a file that nobody names."""
FIRST_UID = 1_000_000
"""Palio as root starts programs as this plus its own process id, which nobody else has."""
START_SECONDS = 20.0
SETUP = {"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"}
"""The environment of what builds the room; the program could read it, so Palio's own is not in it."""


class Confined:
    """`with Confined(program, room, log) as running: ...`; leaving the block ends it.

    Raises on entry: PalioError where this machine cannot confine it and `unconfined` is not given.
    """

    def __init__(self, program: Program, room: Room, log: Path, *, unconfined: bool = False) -> None:
        self.program, self.room, self.log = program, room, log
        self.unconfined = unconfined
        self.peak_memory = 0
        """Bytes, of all processes together."""
        self.broken: PalioError | None = None
        """The limit it broke, if it was ended for that."""
        self.contained: Counter[str] = Counter()
        """What was held back, and how often; goes to the `Contained` record beside the log."""
        self.network = -1
        """A descriptor of the room's network namespace; it outlives the program."""
        self._ended = threading.Event()

    def __enter__(self) -> Confined:
        if self.unconfined and self.room.image is not None:
            raise cannot_confine("an image runs confined only")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._gpu_before = self._gpu_used()  # the driver's own
        with contextlib.ExitStack() as opened:
            self._stream = opened.enter_context(self.log.open("ab"))
            self._opened = opened
            self._start_unconfined() if self.unconfined else self._start_confined()
            self._opened = opened.pop_all()
        threads = (self._keep_log, self._watch)
        self._threads = [threading.Thread(target=run, daemon=True) for run in threads]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()
        self._ended.set()
        for thread in self._threads:
            thread.join(START_SECONDS)  # what outlives an unconfined run may hold the log open
        self._opened.close()
        if self.broken is not None:
            self.contained[f"ended: {self.broken}"] += 1
        before = Counter(Contained.beside(self.log).counts)
        Contained(counts=before + self.contained).write(Contained.file(self.log))

    # --- what the caller asks

    def poll(self) -> int | None:
        """Exit code, 128 + n after signal n; None while it runs."""
        code = self._process.poll()
        return code if code is None or code >= 0 else 128 - code

    def wait(self, seconds: float) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        return self.poll()

    def ask_to_stop(self) -> None:
        self.send(signal.SIGTERM)

    def send(self, number: int) -> None:
        """Send a signal to the program and its process group."""
        with contextlib.suppress(psutil.Error, ProcessLookupError, IndexError):
            first = self._first if self.unconfined else self._first.children()[0]
            os.killpg(os.getpgid(first.pid), number)

    def end(self) -> None:
        """SIGKILL to every process of the room; returns when none is left."""
        for process in [*(_children(self._first) if self.unconfined else []), self._first]:
            with contextlib.suppress(psutil.Error):
                process.kill()  # with the first of a process namespace, the kernel ends the others
        if self.unconfined:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        deadline = time.monotonic() + START_SECONDS
        while alive(self._first) and time.monotonic() < deadline:
            time.sleep(0.01)
        self._process.kill()
        self._process.wait()

    def finish_log(self) -> None:
        """Wait until what a program that has ended wrote last is in its log."""
        self._threads[0].join(1.0 if self._process.poll() is None else START_SECONDS)

    # --- starting

    def _start_confined(self) -> None:
        uid = FIRST_UID + os.getpid() if os.geteuid() == 0 else None
        if uid is not None and self.room.output is not None:
            _give(self.room.output, uid)
        contents = {"/etc/passwd": f"entry:x:{UID}:{UID}::/tmp:/bin/sh\n".encode()}
        if self.room.image is not None:
            contents = {}  # it has its own
        contents |= {place: text.encode() for place, text in self.room.texts.items()}
        files = {place: memory_file(content) for place, content in contents.items()}
        seccomp = memory_file(filter_program())
        (reported, info), (block, release) = os.pipe(), os.pipe()
        arguments = building(self.room, files=files, seccomp=seccomp, info=info, block=block, uid=uid)
        described = memory_file("".join(f"{argument}\0" for argument in arguments).encode())
        line = command_line(self.room, self.program, described=described, uid=uid)
        self._begin(line, [*files.values(), seccomp, info, block, described], reported, release)

    def _begin(self, line: list[str], passed: list[int], reported: int, release: int) -> None:
        """Start `line` with the descriptors `passed`. bubblewrap writes to the pipe that ends in `reported`
        once it has a process, which waits for `release`."""
        try:
            self._process = subprocess.Popen(
                line,
                env=SETUP,
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=passed,
            )
        except FileNotFoundError as error:
            raise cannot_confine(f"{error.filename} is not installed") from None
        finally:
            for descriptor in passed:
                os.close(descriptor)
        with os.fdopen(reported, "rb") as stream, os.fdopen(release, "wb") as start:
            pid = self._told(stream)
            try:
                self._first = psutil.Process(pid)
                self.network = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
                self._opened.callback(os.close, self.network)
                self._before_start(pid)
            except (psutil.NoSuchProcess, FileNotFoundError):
                raise self._not_built() from None
            start.write(b"!")

    def _before_start(self, pid: int) -> None:
        """What is done from outside before the program starts."""
        if self.room.low_ports:
            allow_low_ports(self.network)

    def _told(self, stream: BinaryIO) -> int:
        """Return the id of the sandbox's first process, which bubblewrap reports when it is built."""
        text = b""
        deadline = time.monotonic() + START_SECONDS
        while select.select([stream], [], [], max(0.0, deadline - time.monotonic()))[0]:
            part = os.read(stream.fileno(), 4096)
            text += part
            with contextlib.suppress(ValueError):
                return int(json.loads(text)["child-pid"])
            if not part:
                break
        raise self._not_built()

    def _not_built(self) -> PalioError:
        """End what is left of a room that bubblewrap could not build, and return why."""
        self._process.kill()
        output, _ = self._process.communicate()
        lines = output.decode(errors="replace").strip().splitlines() or ["no answer"]
        return cannot_confine(lines[-1])

    def _start_unconfined(self) -> None:
        where = self.room.files.resolve() if self.room.files else Path("/")
        self._process = subprocess.Popen(
            limited(self.room, program_arguments(self.program)),
            env=environment(self.room, confined=False),
            cwd=where,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._first = psutil.Process(self._process.pid)

    # --- while it runs

    def _keep_log(self) -> None:
        assert self._process.stdout is not None
        kept = 0
        while part := os.read(self._process.stdout.fileno(), 1 << 16):
            room_left = LOG_BYTES - kept
            self._stream.write(part[: max(0, room_left)])
            self._stream.flush()
            if room_left > 0 >= room_left - len(part):
                self.contained[f"more than {LOG_BYTES >> 20} MB of output; the rest was dropped"] += 1
                self._stream.write(f"\n[palio: more than {LOG_BYTES >> 20} MB of output; cut]\n".encode())
            kept += len(part)
        self._process.stdout.close()

    def _watch(self) -> None:
        pause = WATCH_SECONDS
        while not self._ended.wait(pause) and self._process.poll() is None:
            clock = time.monotonic()
            try:
                self.broken = self._over()
            except psutil.Error:  # it ended while we looked
                continue
            if self.broken is not None:
                self._stream.write(f"\n[palio: ended: {self.broken}]\n".encode())
                self.end()
                return
            pause = max(WATCH_SECONDS, 4 * (time.monotonic() - clock))  # never most of a core

    def _over(self) -> PalioError | None:
        limits = self.room.limits
        processes = [self._first, *_children(self._first)]
        if len(processes) > limits.processes:
            return Crashed(f"more than {limits.processes} processes; start fewer")
        scratch = set() if self.unconfined else self._scratch_devices()
        disk = self.room.output.stat().st_dev if self.room.output else -1
        unlinked = _unlinked(processes, scratch)
        hidden = sum(size for device, size in unlinked if device != disk)
        memory = _memory(processes, "VmRSS") + hidden
        if memory > limits.memory:  # pages that processes share count once
            memory = _memory(processes, "Pss") + hidden
        self.peak_memory = max(self.peak_memory, memory)
        if memory > limits.memory:
            return OutOfMemory(
                f"used {memory / GIB:.1f} GiB of memory, {limits.memory / GIB:.1f} GiB are allowed"
            )
        if psutil.virtual_memory().available < MACHINE_MEMORY:
            return Interrupted(f"the machine has less than {MACHINE_MEMORY >> 20} MB of memory left")
        if (used := self._gpu_used() - self._gpu_before) > (limits.gpu_memory or 0):
            return OutOfMemory(
                f"used {used / 1e9:.1f} GB of GPU memory, {(limits.gpu_memory or 0) / 1e9:.1f} GB are allowed"
            )
        if self.room.output is not None:
            unlinked_here = sum(size for device, size in unlinked if device == disk)
            return self._output_over(self.room.output, unlinked_here)
        return None

    def _gpu_used(self) -> int:
        return gpu.program_gpu().memory_used() if self.room.limits.gpu_memory is not None else 0

    def _output_over(self, folder: Path, unlinked: int) -> PalioError | None:
        most = self.room.limits.files
        size, count = _size(folder, most)
        size += unlinked
        allowed = self.room.limits.output
        if size > allowed or count > most:
            return Crashed(
                f"wrote {size / GIB:.1f} GiB in {count} files; at most {allowed / GIB:.1f} GiB and "
                f"{most} files are allowed"
            )
        if shutil.disk_usage(folder).free < MACHINE_DISK:
            return Interrupted(f"the disk has less than {MACHINE_DISK >> 20} MB left")
        return None

    def _scratch_devices(self) -> set[int]:
        """Of the room's own /tmp and /dev/shm, which have a size of their own."""
        root = Path(f"/proc/{self._first.pid}/root")
        with contextlib.suppress(OSError):
            return {(root / place).stat().st_dev for place in ("tmp", "dev/shm")}
        return set()


def cannot_confine(why: str) -> PalioError:
    return PalioError(f"this machine cannot confine a program ({why}); `palio doctor` says what to do")


def memory_file(content: bytes) -> int:
    """Return a descriptor of a file that holds `content`, in memory."""
    descriptor = os.memfd_create("palio")
    os.write(descriptor, content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _give(folder: Path, uid: int) -> None:
    """A folder and what is in it to `uid`; links are changed themselves, never followed."""
    os.chown(folder, uid, uid)
    for where, folders, files in os.walk(folder):
        for name in (*folders, *files):
            os.lchown(Path(where, name), uid, uid)


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def alive(process: psutil.Process) -> bool:
    """A zombie is dead: the first of a namespace becomes one when all others are gone."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _memory(processes: list[psutil.Process], measure: str) -> int:
    """Bytes: `VmRSS`, quick, counts pages that processes share for each; `Pss` shares them out."""
    total = 0
    for process in processes:
        source = Path(f"/proc/{process.pid}/{'status' if measure == 'VmRSS' else 'smaps_rollup'}")
        with contextlib.suppress(OSError):
            for line in source.read_text().splitlines():
                if line.startswith(f"{measure}:"):
                    total += int(line.split()[1]) * 1024
    return total


def _unlinked(processes: list[psutil.Process], scratch: set[int]) -> list[tuple[int, int]]:
    """(device, bytes) of files that are open and have no name, outside the scratch file systems."""
    found: dict[tuple[int, int], int] = {}
    for process in processes:
        folder = Path(f"/proc/{process.pid}/fd")
        with contextlib.suppress(OSError):
            for descriptor in folder.iterdir():
                with contextlib.suppress(OSError):
                    file = descriptor.stat()
                    if stat.S_ISREG(file.st_mode) and file.st_nlink == 0 and file.st_dev not in scratch:
                        found[file.st_dev, file.st_ino] = file.st_blocks * 512
    return [(device, size) for (device, _), size in found.items()]


def _size(folder: Path, most: int) -> tuple[int, int]:
    """Bytes on disk and number of files and folders, of which not many more than `most` are counted."""
    size = count = 0
    for where, folders, files in os.walk(folder):
        count += len(folders) + len(files)
        for name in files:
            with contextlib.suppress(OSError):
                size += Path(where, name).lstat().st_blocks * 512
        if count > most:
            break
    return size, count
