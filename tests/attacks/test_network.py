"""Attacks over the network: by loopback, by the machine's address, by a socket without a name."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

from palio.config import Program
from palio.sandbox.process import Confined
from palio.sandbox.room import Room
from tests.attacks.conftest import LIMITS, Attack

REACHES = """
import socket, sys
for family, address in {targets}:
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        try:
            with socket.socket(family, kind) as one:
                one.settimeout(1)
                one.connect(address)
                one.send(b"out")
                print("REACHED", address, kind)
        except OSError as error:
            print("refused", address, error.strerror)
print("interfaces", [name for _, name in socket.if_nameindex()])
"""


class Listener:
    """A TCP port on all addresses of this machine and an abstract Unix socket; counts who comes."""

    def __enter__(self) -> Listener:
        self.came = 0
        self.tcp = socket.create_server(("0.0.0.0", 0))
        self.unix = socket.socket(socket.AF_UNIX)
        self.name = f"\0palio-attack-{self.tcp.getsockname()[1]}"
        self.unix.bind(self.name)
        self.unix.listen()
        for one in (self.tcp, self.unix):
            threading.Thread(target=self._accept, args=(one,), daemon=True).start()
        return self

    def _accept(self, one: socket.socket) -> None:
        while True:
            try:
                one.accept()
            except OSError:
                return
            self.came += 1

    def __exit__(self, *_: object) -> None:
        for one in (self.tcp, self.unix):
            one.shutdown(socket.SHUT_RDWR)
            one.close()

    def targets(self) -> str:
        port = self.tcp.getsockname()[1]
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
            try:
                one.connect(("192.0.2.1", 9))
                own = one.getsockname()[0]
            except OSError:
                own = "127.0.0.2"
        inet = [f"(socket.AF_INET, ({host!r}, {port}))" for host in ("127.0.0.1", own, "192.0.2.1")]
        return f"[{', '.join(inet)}, (socket.AF_UNIX, {self.name!r})]"


def test_nothing_outside_is_reached(attack: Attack) -> None:
    with Listener() as listener:
        done = attack(REACHES.format(targets=listener.targets()))
        assert listener.came == 0
    assert "REACHED ('192" not in done.log
    assert "REACHED ('127" not in [line[:13] for line in done.said if "SOCK_STREAM" in line]
    assert done.said[-1] == "interfaces ['lo']"


def test_where_the_rules_allow_a_network_it_is_there(tmp_path: Path) -> None:
    files = tmp_path / "files"
    files.mkdir()
    (files / "main.py").write_text("import socket\nprint([name for _, name in socket.if_nameindex()])")
    program = Program(run="python -I -S main.py", files=str(files))
    room = Room(LIMITS, files=files, network=True)
    with Confined(program, room, tmp_path / "log") as running:
        running.wait(10)
    assert (tmp_path / "log").read_text().strip() == str([name for _, name in socket.if_nameindex()])
