"""HTTP on our loopback in front of a confined server: what passes is a JSON reply of bounded size and time.

A reply that is too large, too slow, no JSON, a redirect or an upgrade becomes a short 502 or 504 with the
reason, which the probe and HELM's client report; the gateway counts its faults. It never keeps or prints a
prompt or a reply. One redirect is followed: to the same path with a slash at its end, where FastAPI and Flask
send a POST if a team declared it so.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType

from palio.network import ANSWERED, is_slash_redirect

REPLY_BYTES = 4 << 20
"""A completion of 2048 tokens with their log-probabilities is about 0.2 MB."""
REPLY_SECONDS = 300.0
REQUEST_BYTES = 16 << 20
PATHS = ("/process", "/tokenize", "/decode", "/health")


class BadReply(Exception):
    """Why a reply does not pass; `status` is what the client gets instead."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status, self.why = status, why


class Gateway:
    """`with Gateway(connect, faults) as gateway: gateway.base_url`; `connect` opens a connection to the
    server, `faults` counts what it did wrong."""

    def __init__(
        self,
        connect: Callable[[], socket.socket],
        faults: Counter[str],
        reply_seconds: float = REPLY_SECONDS,
    ) -> None:
        self.connect, self.faults, self.reply_seconds = connect, faults, reply_seconds
        self._turn = threading.Lock()

    def __enter__(self) -> Gateway:
        gateway = self

        class Handler(_Handler):
            of = gateway

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def ask(self, method: str, path: str, body: bytes) -> tuple[int, bytes]:
        """Return status and body of the server's reply. Raises BadReply."""
        status, content, headers = self._ask(method, path, body)
        if is_slash_redirect(status, headers.get("Location"), path):
            status, content, headers = self._ask(method, f"{path}/", body)
        if headers.get("Content-Encoding", "identity").lower() != "identity":
            raise BadReply(502, "a compressed reply, which was not asked for")
        return status, content

    def _ask(self, method: str, path: str, body: bytes) -> tuple[int, bytes, http.client.HTTPMessage]:
        try:
            connection = self.connect()
        except OSError:
            raise BadReply(502, "no connection to the server") from None
        late = threading.Event()

        def cut() -> None:
            late.set()
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)  # ends a read that dripping bytes keep alive

        connection.settimeout(None)
        clock = threading.Timer(self.reply_seconds, cut)
        clock.daemon = True
        client = http.client.HTTPConnection("entry")
        client.sock = connection
        try:
            clock.start()
            headers = {"Content-Type": "application/json", "Connection": "close"}
            client.request(method, path, body=body or None, headers=headers)
            reply = client.getresponse()
            content = reply.read(REPLY_BYTES + 1)
        except (OSError, http.client.HTTPException, ValueError):
            if late.is_set():
                raise BadReply(504, f"no whole reply in {self.reply_seconds:g} s") from None
            raise BadReply(502, "the connection broke, or the reply is not HTTP") from None
        finally:
            clock.cancel()
            client.close()
        if late.is_set():
            raise BadReply(504, f"no whole reply in {self.reply_seconds:g} s")
        if len(content) > REPLY_BYTES:
            raise BadReply(502, f"a reply of more than {REPLY_BYTES >> 20} MB")
        return reply.status, content, reply.headers

    def count(self, why: str) -> None:
        with self._turn:
            self.faults[why] += 1


def _check_json(content: bytes) -> None:
    try:
        json.loads(content)
    except UnicodeDecodeError:
        raise BadReply(502, "a reply that is not UTF-8") from None
    except (ValueError, RecursionError):
        raise BadReply(502, "a reply that is not JSON") from None


class _Handler(BaseHTTPRequestHandler):
    of: Gateway
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._pass("GET")

    def do_POST(self) -> None:
        self._pass("POST")

    def _pass(self, method: str) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        if self.path not in PATHS or length > REQUEST_BYTES:
            self._answer(404 if self.path not in PATHS else 413, b"{}")
            self.close_connection = True
            return
        body = self.rfile.read(length)
        try:
            status, content = self.of.ask(method, self.path, body)
            if status in ANSWERED:
                _check_json(content)
            elif status < 400:
                kind = "a redirect" if status >= 300 else "an upgrade" if status == 101 else "no answer"
                raise BadReply(502, f"HTTP {status}, which is {kind}")
            if not 200 <= status < 600:
                raise BadReply(502, "a status that HTTP does not have")
            if status >= 500:
                self.of.count(f"HTTP {status} of the server's own")
        except BadReply as bad:
            self.of.count(bad.why)
            status, content = bad.status, json.dumps({"error": bad.why}).encode()
        self._answer(status, content)

    def _answer(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the default would print addresses to our stderr."""
