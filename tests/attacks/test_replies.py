"""Attacks of a server on who asks it: replies without end, never whole, or made to break a parser."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import requests

from palio.config import Isolation, ServerProgram
from palio.errors import Crashed, OutOfMemory, RuleViolation
from palio.provenance import write_json
from palio.records import Contained
from palio.sandbox.gateway import REPLY_BYTES
from palio.sandbox.server import ConfinedServer, team_server
from tests.attacks.conftest import LIMITS, MB

HEAD = """
import os, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(404)
        self.end_headers()
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        try:
            self.reply()
        except OSError:
            pass
    def send(self, body):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
"""
TAIL = """
ThreadingHTTPServer(("127.0.0.1", int(os.environ["PORT"])), Handler).serve_forever()
"""

Server = Callable[[str], ConfinedServer]


@pytest.fixture
def server(tmp_path: Path) -> Server:
    """A server whose handler has this `reply` method."""

    def start(reply: str) -> ConfinedServer:
        files, model = tmp_path / "package" / "files", tmp_path / "model"
        files.mkdir(parents=True, exist_ok=True)
        model.mkdir(exist_ok=True)
        (files / "main.py").write_text(HEAD + reply + TAIL)
        program = ServerProgram(run="python -I main.py", files="files")
        write_json(tmp_path / "package" / "server.json", program.model_dump(mode="json", exclude_none=True))
        return team_server(
            tmp_path / "package",
            base_model=model,
            limits=LIMITS,
            isolation=Isolation(),
            log=tmp_path / "server.log",
            work=tmp_path / "work",
            ready_seconds=60,
            reply_seconds=2,
        )

    return start


def ask(server: ConfinedServer) -> requests.Response:
    return requests.post(f"{server.base_url}/process", json={"prompt": "x"}, timeout=25)


def faults(tmp_path: Path) -> dict[str, int]:
    return Contained.beside(tmp_path / "server.log").counts


def test_a_reply_of_1_gb_is_cut_off_and_named(server: Server, tmp_path: Path) -> None:
    endless = """
    def reply(self):
        self.send_response(200)
        self.send_header("Content-Length", str(1 << 30))
        self.end_headers()
        for _ in range(1024):
            self.wfile.write(bytes(1 << 20))
"""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with server(endless) as running:
        reply = ask(running)
    assert (reply.status_code, reply.json()) == (502, {"error": "a reply of more than 4 MB"})
    assert faults(tmp_path) == {"a reply of more than 4 MB": 1}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before < 64 * MB > REPLY_BYTES


@pytest.mark.parametrize(
    "reply",
    [
        "    def reply(self):\n        time.sleep(30)\n",
        "    def reply(self):\n        for _ in range(300):\n            self.wfile.write(b'H')\n"
        "            time.sleep(0.1)\n",
        "    def reply(self):\n        self.send_response(200)\n        self.end_headers()\n"
        "        for _ in range(300):\n            self.wfile.write(b'x')\n            time.sleep(0.1)\n",
    ],
    ids=["nothing", "a status line, byte by byte", "a body, byte by byte"],
)
def test_a_server_that_never_answers_is_not_waited_for(server: Server, tmp_path: Path, reply: str) -> None:
    began = time.monotonic()
    with server(reply) as running:
        assert ask(running).status_code == 504
    assert time.monotonic() - began < 25
    assert faults(tmp_path) == {"no whole reply in 2 s": 1}


@pytest.mark.parametrize(
    ("body", "what"),
    [("b'[' * 1_000_000", "JSON"), ("b'\\xff' * 10", "UTF-8"), ("b'1' * 1_000_000", "JSON")],
    ids=["nesting", "bytes", "digits"],
)
def test_a_reply_made_to_break_a_parser_does_not_pass(
    server: Server, tmp_path: Path, body: str, what: str
) -> None:
    with server(f"    def reply(self):\n        self.send({body})\n") as running:
        assert ask(running).status_code == 502
        assert running.alive()
    assert faults(tmp_path) == {f"a reply that is not {what}": 1}


@pytest.mark.parametrize(
    ("status", "header", "why"),
    [
        (302, "Location", "HTTP 302, which is a redirect"),
        (307, "Location", "HTTP 307, which is a redirect"),
        (101, "Upgrade", "HTTP 101, which is an upgrade"),
        (204, "X", "HTTP 204, which is no answer"),
        (999, "X", "a status that HTTP does not have"),
    ],
)
def test_redirects_and_upgrades_are_counted_and_named_and_not_followed(
    server: Server, tmp_path: Path, status: int, header: str, why: str
) -> None:
    reply = f"""
    def reply(self):
        self.send_response({status})
        self.send_header("{header}", "http://192.0.2.1/process")
        self.send_header("Content-Length", "0")
        self.end_headers()
"""
    with server(reply) as running:
        assert ask(running).json() == {"error": why}
    assert faults(tmp_path) == {why: 1}


def test_what_a_server_did_wrong_is_counted_over_its_attempts_and_ends_in_the_reason(
    server: Server, tmp_path: Path
) -> None:
    reply = "    def reply(self):\n        self.send(b'Siena')\n"
    with server(reply) as running:
        ask(running)
    with pytest.raises(Crashed) as ended, server(reply) as running:
        for _ in range(2):
            ask(running)
        raise Crashed("no run has a result")
    assert str(ended.value) == "no run has a result; of the server: 2 × a reply that is not JSON"
    assert faults(tmp_path) == {"a reply that is not JSON": 3}


@pytest.mark.parametrize("seen", [None, RuleViolation("the connection broke")], ids=["nothing", "a symptom"])
def test_a_server_over_its_memory_is_ended_and_named(
    server: Server, tmp_path: Path, seen: Exception | None
) -> None:
    eats = """
    def reply(self):
        if os.fork() == 0:
            kept = b"x" * (100 << 20)
            time.sleep(20)
            os._exit(0)
        self.send(b"{}")
"""
    with pytest.raises(OutOfMemory, match=r"used 0\.\d GiB of memory"), server(eats) as running:
        for _ in range(4):
            ask(running)
        for _ in range(100):
            time.sleep(0.1 if running.alive() else 0)
        assert not running.alive()
        if seen is not None:
            raise seen
    assert any(why.startswith("ended: used 0.") for why in faults(tmp_path))


def test_a_server_reaches_nothing_and_leaves_nothing(server: Server, tmp_path: Path) -> None:
    tries = """
    def reply(self):
        import json, socket
        found = []
        for address in (("127.0.0.1", 22), ("192.0.2.1", 80)):
            try:
                socket.create_connection(address, 1)
                found.append(address)
            except OSError:
                pass
        for place in ("/entry/x", "/base_model/x", "/output/x", "/x"):
            try:
                open(place, "w")
                found.append(place)
            except OSError:
                pass
        self.send(json.dumps(found).encode())
"""
    with server(tries) as running:
        assert ask(running).json() == []
    assert faults(tmp_path) == {}
