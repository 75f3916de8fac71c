"""The system calls that a confined program is refused: memory that no limit counts, and kernel surface that
neither training nor serving needs. Everything else is left to the namespaces and limits of its room.
"""

from __future__ import annotations

import errno
import platform
import struct

REFUSED = {
    # name: (x86_64, aarch64), from the kernel's tables
    "shmget": (29, 194),  # System V memory outlives its processes and no limit counts it
    "msgget": (68, 186),
    "semget": (64, 190),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "perf_event_open": (298, 241),
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
}
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x80000000
_X32_BIT = 0x40000000


def filter_program() -> bytes:
    """A classic BPF program over `struct seccomp_data`: refuse with EPERM, kill on a foreign architecture."""
    machine = platform.machine()
    if machine not in _AUDIT_ARCH:
        return struct.pack("=HBBI", _RETURN, 0, 0, _ALLOW)
    column = 0 if machine == "x86_64" else 1
    numbers = [of[column] for of in REFUSED.values()]
    code = [
        (_LOAD, 0, 0, 4),  # architecture
        (_EQUAL, 1, 0, _AUDIT_ARCH[machine]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),  # number of the call
        (_AT_LEAST, len(numbers) + 1, 0, _X32_BIT),
        *((_EQUAL, len(numbers) - at, 0, number) for at, number in enumerate(numbers)),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _REFUSE),
    ]
    return b"".join(struct.pack("=HBBI", *one) for one in code)
