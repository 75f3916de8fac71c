"""Sockets into the network of a confined server.

That network has a loopback device and nothing else, and no address leads to it. This small process of ours
enters it, outside of everything else the program is confined in, and hands out sockets that were made there:
a socket stays in the network where it was made. Run as a script; the standard library alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import socket
import subprocess
import sys
import threading
from types import TracebackType

NS_GET_USERNS = 0xB701
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000


class Door:
    """`with Door(network) as door: door.connect(8080, 5.0)`; `network` is a namespace's descriptor."""

    def __init__(self, network: int) -> None:
        self._network = network
        self._turn = threading.Lock()

    def __enter__(self) -> Door:
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", __file__, str(theirs.fileno()), str(self._network)],
                env={},
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno(), self._network],
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._channel.close()  # which ends the process
        self._process.wait()

    def connect(self, port: int, timeout: float) -> socket.socket:
        """A connection to the server's port on its loopback. Raises OSError."""
        with self._turn:
            self._channel.send(b"?")
            _, descriptors, _, _ = socket.recv_fds(self._channel, 1, 1)
        if not descriptors:
            raise OSError("the network of the server cannot be entered")
        made = socket.socket(fileno=descriptors[0])
        made.settimeout(timeout)
        try:
            made.connect(("127.0.0.1", port))
        except OSError:
            made.close()
            raise
        return made


def allow_low_ports(network: int) -> None:
    """Let programs in this network namespace listen on ports below 1024. Raises OSError."""
    line = [sys.executable, "-I", "-S", __file__, "-", str(network)]
    done = subprocess.run(line, env={}, stdin=subprocess.DEVNULL, pass_fds=[network], check=False)
    if done.returncode != 0:
        raise OSError("ports below 1024 cannot be opened to the server")


def _enter(network: int) -> None:
    """Become a member of the network namespace, by way of the user namespace that owns it."""
    libc = ctypes.CDLL(None, use_errno=True)
    owner = fcntl.ioctl(network, NS_GET_USERNS)
    for descriptor, kind in ((owner, CLONE_NEWUSER), (network, CLONE_NEWNET)):
        if libc.setns(descriptor, kind) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))


def _hand_out(channel: socket.socket) -> None:
    while channel.recv(1):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as made:
            socket.send_fds(channel, [b"!"], [made.fileno()])


if __name__ == "__main__":
    _enter(int(sys.argv[2]))
    if sys.argv[1] == "-":
        with open("/proc/sys/net/ipv4/ip_unprivileged_port_start", "w") as setting:  # noqa: PTH123
            setting.write("0")
    else:
        with contextlib.suppress(OSError):
            _hand_out(socket.socket(fileno=int(sys.argv[1])))
