"""Attacks on the machine: processes, memory, disk, the log, and a life after the end."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from palio.errors import Crashed, OutOfMemory
from palio.sandbox import process
from tests.attacks.conftest import LIMITS, MB, Attack


def test_a_fork_bomb_ends_at_the_limit_of_processes(attack: Attack) -> None:
    done = attack(
        """
import os, time
made = 0
for _ in range(2000):
    try:
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
        made += 1
    except OSError as error:
        print(made, error.strerror)
        break
else:
    print("MADE", made)
"""
    )
    made, why = done.said[0].split(maxsplit=1)
    assert int(made) <= LIMITS.processes
    assert why == "Resource temporarily unavailable"
    assert done.lived == []


def test_memory_of_all_processes_together_is_limited(attack: Attack) -> None:
    done = attack(
        """
import os, time
for _ in range(6):
    if os.fork() == 0:
        kept = bytearray(100 << 20)
        time.sleep(20)
        os._exit(0)
time.sleep(20)
print("KEPT 600 MB")
"""
    )
    assert isinstance(done.broken, OutOfMemory)
    assert "of memory, 0.2 GiB are allowed" in str(done.broken)
    assert done.lived == []


def test_one_process_cannot_take_more_than_the_limit_at_once(attack: Attack) -> None:
    done = attack("try:\n    bytearray(2 << 30)\nexcept MemoryError:\n    print('refused')\n")
    assert done.said == ["refused"]


def test_memory_in_a_file_without_a_name_is_counted(attack: Attack) -> None:
    done = attack(
        """
import os, time
kept = [os.memfd_create(str(n)) for n in range(16)]
for file in kept:
    os.write(file, bytes(48 << 20))
time.sleep(15)
print("KEPT", len(kept))
"""
    )
    assert isinstance(done.broken, OutOfMemory)


def test_memory_that_no_limit_counts_and_new_namespaces_are_refused(attack: Attack) -> None:
    done = attack(
        """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
calls = {
    "shmget": lambda: libc.shmget(0, 1 << 30, 0o1600),
    "unshare": lambda: libc.unshare(0x10000000),
    "io_uring_setup": lambda: libc.syscall(425, 1, None),
    "setuid": lambda: libc.setuid(0),
    "mount": lambda: libc.mount(b"none", b"/tmp", b"tmpfs", 0, None),
    "chroot": lambda: libc.chroot(b"/tmp"),
}
for name, call in calls.items():
    print(name, "refused" if call() == -1 else "DONE", os.strerror(ctypes.get_errno()))
"""
    )
    assert len(done.said) == 6
    assert "DONE" not in done.log


@pytest.mark.parametrize("hidden", [False, True], ids=["files", "files that are open and unlinked"])
def test_the_disk_is_filled_to_the_quota_and_no_further(attack: Attack, hidden: bool) -> None:
    done = attack(
        f"""
import os, time
kept = []
for n in range(40):
    file = open(f"/output/{{n}}", "wb")
    if {hidden}:
        os.unlink(f"/output/{{n}}")
        kept.append(file)
    file.write(bytes(32 << 20))
    file.flush()
    time.sleep(0.1)
print("WROTE 1280 MB")
"""
    )
    assert isinstance(done.broken, Crashed)
    assert "at most 0.1 GiB and 100000 files are allowed" in str(done.broken)
    assert "WROTE" not in done.log


def test_a_single_file_ends_at_the_quota(attack: Attack) -> None:
    done = attack(
        """
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
file = open("/output/large", "wb", buffering=0)
try:
    for _ in range(200):
        file.write(bytes(16 << 20))
except OSError as error:
    print(error.strerror)
"""
    )
    assert (done.output / "large").stat().st_size <= LIMITS.output
    assert done.said[0] == "File too large"


def test_a_flood_of_files_is_ended(attack: Attack) -> None:
    done = attack(
        """
import time
for n in range(5000):
    open(f"/output/{n}", "w").close()
    time.sleep(0.001)
print("MADE")
""",
        limits=replace(LIMITS, files=500),
    )
    assert isinstance(done.broken, Crashed)
    assert len(list(done.output.iterdir())) < 5000


def test_scratch_space_has_its_size(attack: Attack) -> None:
    done = attack(
        """
for place in ("/tmp/x", "/dev/shm/x"):
    try:
        open(place, "wb").write(bytes(200 << 20))
    except OSError as error:
        print(error.strerror)
"""
    )
    assert done.said == ["No space left on device"] * 2


def test_nothing_outside_its_folder_is_written(attack: Attack, tmp_path: Path) -> None:
    done = attack(
        f"""
import os, sys
places = ["/", "/etc", "/usr", "/usr/bin", "/entry", "/dev", "/proc/sys/kernel", "/root",
          "/sys/devices/system/cpu", sys.prefix, "/output/..", "/output/../..", "/entry/..",
          "/proc/1/root/..", {str(tmp_path)!r}]
for place in places:
    try:
        open(place + "/written", "w").close()
        print("WROTE", place)
    except OSError:
        pass
for file in ("/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger", "/entry/main.py", "/etc/passwd"):
    try:
        open(file, "w").close()
        print("WROTE", file)
    except OSError:
        pass
print("tried", len(places))
"""
    )
    assert done.said == ["tried 15"]
    assert not list(tmp_path.rglob("written"))


def test_what_was_started_does_not_outlive_the_end(attack: Attack) -> None:
    done = attack(
        """
import os, signal, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        for beat in range(600):
            open("/output/beat", "w").write(str(beat))
            time.sleep(0.05)
    os._exit(0)
time.sleep(0.5)
"""
    )
    assert done.lived == []
    beat = (done.output / "beat").read_text()
    time.sleep(0.5)
    assert (done.output / "beat").read_text() == beat


def test_a_program_deaf_to_signals_is_ended_in_time(attack: Attack) -> None:
    code = """
import signal, time
for number in range(1, 65):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
for _ in range(600):
    time.sleep(0.1)
"""
    began = time.monotonic()
    done = attack(code, seconds=1)
    assert time.monotonic() - began < 20
    assert done.code is None
    assert done.lived == []


def test_it_runs_on_its_cores_alone(attack: Attack) -> None:
    done = attack("import os\nprint(len(os.sched_getaffinity(0)))", limits=replace(LIMITS, cpus=1))
    assert done.said == ["1"]
    assert len(os.sched_getaffinity(0)) >= 1


def test_a_flood_of_output_is_read_and_dropped(attack: Attack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "LOG_BYTES", 1 * MB)
    done = attack("for _ in range(400):\n    print('x' * 100_000)\n")
    assert done.code == 0
    assert len(done.log) < 1.1 * MB
    assert "of output; cut" in done.log
