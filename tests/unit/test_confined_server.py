"""A team's server in its room: reached through the gateway alone, and held to what it may answer."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import requests

from palio.config import Isolation, ServerProgram
from palio.errors import Crashed
from palio.layout import BaseModelFolder, EntryFolder
from palio.packaging.server import package_server
from palio.provenance import folder_sha256
from palio.records import Contained, PackageManifest, read_record
from palio.sandbox.process import Confined
from palio.sandbox.room import Limits
from palio.sandbox.server import ConfinedServer, team_server
from palio.settings import PackageSettings

ROOT = Path(__file__).parents[2]
MB = 1 << 20
LIMITS = Limits(memory=2048 * MB, processes=128, scratch=64 * MB, output=64 * MB, cpus=1)

ECHO = """
import json, os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        reply = json.dumps({"text": json.loads(body)["prompt"], "port": os.environ["PORT"]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)
ThreadingHTTPServer(("127.0.0.1", int(os.environ["PORT"])), Handler).serve_forever()
"""

Serve = Callable[..., AbstractContextManager[ConfinedServer]]


@pytest.fixture
def serve(tiny: Path, tmp_path: Path) -> Serve:
    """Package a server's code and run it: `with serve(code) as server`."""

    def start(code: str, *, ready_seconds: float = 60, limits: Limits = LIMITS) -> ConfinedServer:
        files = tmp_path / "files"
        files.mkdir(exist_ok=True)
        (files / "main.py").write_text(code)
        package(ServerProgram(run="python main.py", files=str(files)), tiny, tmp_path / "entry")
        return team_server(
            tmp_path / "entry" / "package",
            base_model=tiny / "model",
            limits=limits,
            isolation=Isolation(),
            log=tmp_path / "server.log",
            work=tmp_path / "entry" / "work",
            ready_seconds=ready_seconds,
        )

    return start


def package(program: ServerProgram, base: Path, entry_dir: Path) -> PackageManifest:
    settings = PackageSettings(competition_id="c", base_model_id="tiny", adapter=False, server=program)
    return package_server(program, EntryFolder.at(entry_dir), settings, BaseModelFolder(base))


def ask(server: ConfinedServer, prompt: str = "x") -> requests.Response:
    return requests.post(f"{server.base_url}/process", json={"prompt": prompt}, timeout=30)


def test_a_servers_package_records_the_hash_of_every_file(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "weights.bin").write_bytes(b"anything")
    program = ServerProgram(run="python main.py", files=str(tmp_path / "files"))
    manifest = package(program, tiny, tmp_path / "e")
    assert manifest.kind == "server"
    assert manifest.files == folder_sha256(tmp_path / "e" / "package")
    assert set(manifest.files) == {"server.json", "files/weights.bin"}
    assert read_record(PackageManifest, tmp_path / "e" / "package.json") == manifest
    again = package(ServerProgram(run="python other.py", files=program.files), tiny, tmp_path / "e")
    assert again.fingerprint != manifest.fingerprint


def test_a_server_that_ends_before_anything_else_happens_is_its_own_fault(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = Confined.__enter__

    def start_and_wait(confined: Confined) -> Confined:
        start(confined)
        assert confined.wait(60) is not None
        return confined

    monkeypatch.setattr(Confined, "__enter__", start_and_wait)
    ended = "the server ended with code 3 before it answered, its last lines: I am off"
    with pytest.raises(Crashed, match=ended), serve("print('I am off'); raise SystemExit(3)"):
        pass


def test_a_server_is_reached_by_the_gateway_and_by_nothing_else(serve: Serve) -> None:
    with serve(ECHO) as server:
        assert ask(server, "hello").json() == {"text": "hello", "port": "8080"}
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", 8080), 1)
        assert requests.get(f"{server.base_url}/admin", timeout=5).status_code == 404


def test_eight_requests_at_once_all_come_through(serve: Serve) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with serve(ECHO) as server, ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda n: ask(server, str(n)).json()["text"], range(40)))
    assert replies == [str(n) for n in range(40)]


def test_two_servers_on_the_same_port_do_not_meet(serve: Serve) -> None:
    with serve(ECHO) as one, serve(ECHO.replace('["prompt"]', '["prompt"] + "!"')) as other:
        assert ask(one).json()["text"] == "x"
        assert ask(other).json()["text"] == "x!"


def test_a_server_that_ends_or_never_listens_is_named(serve: Serve) -> None:
    with pytest.raises(Crashed, match="the server ended with code 3 before it answered"), serve("exit(3)"):
        pass
    sleeper = serve("import time; time.sleep(60)", ready_seconds=2)
    with pytest.raises(Crashed, match="the server did not answer on port 8080 in 2 s"), sleeper:
        pass


def test_a_server_that_dies_later_is_seen_dead(serve: Serve) -> None:
    with serve(ECHO.replace("        reply =", "        os._exit(1)\n        reply =")) as server:
        assert server.alive()
        assert ask(server).status_code == 502
        time.sleep(0.5)
        assert not server.alive()


def test_the_example_of_2023_answers_and_its_defects_are_named(tiny: Path, tmp_path: Path) -> None:
    from palio.evaluation.probe import Asked, probe
    from palio.evaluation.window import Window

    program = ServerProgram(
        run="python -m uvicorn main:app --host 127.0.0.1 --port $PORT",
        files=str(ROOT / "config/entries/examples/server2023"),
    )
    package(program, tiny, tmp_path / "e")
    server = team_server(
        tmp_path / "e" / "package",
        base_model=tiny / "model",
        limits=LIMITS,
        isolation=Isolation(),
        log=tmp_path / "server.log",
        work=tmp_path / "e" / "work",
    )
    with server:
        report = probe(server.base_url, Asked(), Window.of_model(tiny / "model"))
        assert server.alive()
    assert report.conforms
    assert {"stop_sequences", "odd_prompts", "request_time"} <= set(report.failed)
    assert Contained.beside(tmp_path / "server.log").counts["HTTP 500 of the server's own"] > 0
