"""A server, confined: package → room → door → gateway.

team_server    a team's own program; docs/server_entries.md is its contract
model_server   Palio's, of a model that brings code of its own
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from palio.config import Isolation, ServerProgram
from palio.errors import Crashed, PalioError
from palio.network import free_port
from palio.records import Contained
from palio.sandbox.death import last_words
from palio.sandbox.door import Door
from palio.sandbox.gateway import REPLY_SECONDS, BadReply, Gateway
from palio.sandbox.image import image_folder, served_port
from palio.sandbox.model_room import PACKAGE, Call
from palio.sandbox.process import Confined
from palio.sandbox.room import GIB, Limits, Room

PROGRAM, FILES, IMAGES = "server.json", "files", ("image.tar", "image.sif")
"""What a server's package consists of, beside what was trained for it."""
TRAINED = {"adapter": "PALIO_ADAPTER", "model": "PALIO_MODEL"}
"""Folder of what was trained for it, at the same name in the room, and the variable that says where."""
FIRST_FREE_PORT = 1024
"""Lower ports are root's, unless a network says otherwise."""
READY_SECONDS = 1800.0
CONNECT_SECONDS = 10.0
PORT = 8080
"""Of Palio's own server, in a network of its own."""


class ConfinedServer:
    """`with ConfinedServer(program, …) as server: server.base_url`, once it answers on its port.

    The server's output is appended to `log`, and what it did wrong is counted in the `Contained` record
    beside it. It sees prompts: for the closed stage both lie in the closed store, and what is said of them
    elsewhere is not `exact`.

    Raises:
        Crashed, OutOfMemory: it ended, did not get ready, or broke a limit; with its last lines, if `exact`.
            Any PalioError raised inside the block leaves it with a note of what was held back.
    """

    def __init__(
        self,
        program: ServerProgram,
        room: Room,
        log: Path,
        *,
        port: int,
        unconfined: bool = False,
        ready_seconds: float = READY_SECONDS,
        reply_seconds: float = REPLY_SECONDS,
        exact: bool = True,
    ) -> None:
        self._exact, self._log = exact, log
        self._log_start = log.stat().st_size if log.exists() else 0
        self._port, self._ready_seconds, self._reply_seconds = port, ready_seconds, reply_seconds
        self._confined = Confined(program, room, log, unconfined=unconfined)
        self._open = contextlib.ExitStack()
        self.base_url = ""

    def __enter__(self) -> ConfinedServer:
        with contextlib.ExitStack() as opened:
            opened.enter_context(self._confined)
            gateway = Gateway(self._connection(opened), self._confined.contained, self._reply_seconds)
            self._gateway = opened.enter_context(gateway)
            self._wait()
            self.base_url = self._gateway.base_url
            self._open = opened.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if faults := self._confined.contained:
            held_back = Contained(counts=faults)
            seen = f"of the server: {held_back if self._exact else held_back.coarse()}"
            print(seen, file=sys.stderr, flush=True)
            if isinstance(error, PalioError):
                error.add_note(seen)
        self._open.close()
        if self._confined.broken is not None and (error is None or isinstance(error, PalioError)):
            raise self._over(self._confined.broken) from None  # what the others saw is what came of it

    def _connection(self, opened: contextlib.ExitStack) -> Callable[[], socket.socket]:
        """What opens a connection to the server, wherever it listens."""
        if self._confined.unconfined:
            return lambda: socket.create_connection(("127.0.0.1", self._port), CONNECT_SECONDS)
        door = opened.enter_context(Door(self._confined.network))
        return lambda: door.connect(self._port, CONNECT_SECONDS)

    def alive(self) -> bool:
        return self._confined.poll() is None

    def exit_code(self) -> int | None:
        return self._confined.poll()

    def _wait(self) -> None:
        """Until the server answers anything at all on its port."""
        deadline = time.monotonic() + self._ready_seconds
        while time.monotonic() < deadline:
            if not self.alive():
                if self._confined.broken is not None:
                    raise self._over(self._confined.broken)
                raise self._crashed(f"the server ended with code {self.exit_code()} before it answered")
            with contextlib.suppress(BadReply, OSError, http.client.HTTPException):
                self._gateway.ask("GET", "/health", b"")
                return
            time.sleep(0.1)
        raise self._crashed(f"the server did not answer on port {self._port} in {self._ready_seconds:.0f} s")

    def _over(self, limit: PalioError) -> PalioError:
        limit.log = self._log if self._exact else None
        return limit

    def _crashed(self, what: str) -> Crashed:
        if not self._exact:
            return Crashed(f"{what}; its log is in the closed store")
        self._confined.finish_log()
        error = Crashed(f"{what}{last_words(self._log, self._log_start)}")
        error.log = self._log
        return error


def team_server(
    package: Path,
    *,
    base_model: Path,
    limits: Limits,
    isolation: Isolation,
    log: Path,
    work: Path,
    ready_seconds: float = READY_SECONDS,
    reply_seconds: float = REPLY_SECONDS,
    exact: bool = True,
) -> ConfinedServer:
    """Return the server that a package holds as a team's own program; an image is unpacked in `work`."""
    program = ServerProgram.model_validate_json((package / PROGRAM).read_text(encoding="utf-8"))
    path = next((package / name for name in IMAGES if (package / name).exists()), None)
    image = image_folder(str(path) if path else None, work, int(isolation.image_gb * GIB))
    port = free_port() if isolation.unconfined else served_port(image, program.port)
    trained = {name: package / name for name in TRAINED if (package / name).is_dir()}
    room = Room(
        limits=limits,
        files=package / FILES if (package / FILES).is_dir() else None,
        inputs={"/base_model": base_model, **{f"/{name}": path for name, path in trained.items()}},
        variables={
            "PALIO_CONTRACT": "1",
            "PALIO_BASE_MODEL": "/base_model",
            **{TRAINED[name]: f"/{name}" for name in trained},
            "PALIO_MEMORY_BYTES": str(limits.memory),
            "PALIO_GPU_MEMORY_BYTES": str(limits.gpu_memory or 0),
            "PORT": str(port),
        },
        visible=isolation.visible,
        image=image,
        low_ports=port < FIRST_FREE_PORT,
    )
    return ConfinedServer(
        program,
        room,
        log,
        port=port,
        unconfined=isolation.unconfined,
        ready_seconds=ready_seconds,
        reply_seconds=reply_seconds,
        exact=exact,
    )


def model_server(
    package: Path,
    code: Mapping[str, str],
    *,
    limits: Limits,
    isolation: Isolation,
    log: Path,
    reply_seconds: float,
    exact: bool = True,
    settings: Mapping[str, Any],
) -> ConfinedServer:
    """Return Palio's own server of a package with code of its model's own (sha256 by name), which is confined
    whatever `isolation` says; `settings` are those of the engine."""
    on_gpu = limits.gpu_memory is not None
    given = {
        "device": "cuda" if on_gpu else "cpu",
        "threads": limits.cpus,
        "gpu_memory_gb": limits.gpu_memory / 1e9 if limits.gpu_memory is not None else None,
        "cache_gb": None,
        **settings,
    }
    variables = {"PORT": str(PORT), "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    call = Call("serve", given, code, {PACKAGE: package}, PACKAGE, variables)
    room = call.room(limits, visible=isolation.visible)
    return ConfinedServer(call.program(), room, log, port=PORT, reply_seconds=reply_seconds, exact=exact)
