"""Ports of this machine, and what HTTP replies of teams' servers are taken for."""

from __future__ import annotations

import socket

ANSWERED = (200, 201)
"""HTTP statuses of a reply with an answer; 201 is a habit of POST's."""


def free_port() -> int:
    """Return a port on 127.0.0.1 that nobody listens on at the moment."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def is_slash_redirect(status: int, location: str | None, path: str) -> bool:
    """Return whether a reply sends a POST on to the same path with a slash at its end: FastAPI's and Flask's
    where a route is declared with one."""
    return status in (307, 308) and (location or "").endswith(f"{path}/")
