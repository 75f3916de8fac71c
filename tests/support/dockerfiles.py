"""Folders with a Dockerfile, on a base that is made of this machine's own files: no registry, no network."""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from palio.sandbox.doctor import Finding, examine_builds
from tests.support.images import folder, host_files, layer

SERVER = """
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FILLED = open("/root/.cache/weights").read().strip()

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/process":
            return self.reply(404, {})
        open("/root/.cache/asked", "w").write(body["prompt"])
        words = FILLED.split()[: body.get("max_new_tokens", 8)]
        text = "".join(f" {word}" for word in words)
        if body.get("echo_prompt"):
            words, text = body["prompt"].split() + words, body["prompt"] + text
        tokens = [{"text": f" {word}", "logprob": -0.1 - place} for place, word in enumerate(words)]
        logprob = sum(token["logprob"] for token in tokens)
        self.reply(200, {"text": text, "tokens": tokens, "logprob": logprob, "request_time": 0.01})

    def do_GET(self):
        self.reply(404, {})

    def reply(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass

ThreadingHTTPServer(("0.0.0.0", 80), Handler).serve_forever()
"""
"""A server as in 2023: on port 80, its weights filled into root's cache when the image was built."""
SERVES = """\
FROM scratch
ADD base.tar /
ENV WORDS="one two three four"
COPY main.py /srv/
RUN mkdir -p /root/.cache && echo $WORDS > /root/.cache/weights && chmod 600 /root/.cache/weights
WORKDIR /srv
EXPOSE 80
CMD ["python3", "main.py"]
"""


@functools.cache
def _trial() -> Finding:
    return examine_builds()


def builds() -> bool:
    """Whether images can be built here."""
    return shutil.which("buildah") is not None and _trial().ok


def require_builds() -> None:
    """Skip a test where no image can be built, and say why."""
    if not builds():
        pytest.skip(f"this machine builds no images: {_trial()}")


@functools.cache
def _base(*, python: bool) -> bytes:
    programs = (
        "/bin/cat",
        "/bin/chmod",
        "/bin/mkdir",
        "/bin/mknod",
        "/bin/ln",
        "/usr/bin/id",
        "/bin/sleep",
        "/usr/bin/head",
    )
    return layer([*host_files(*programs, python=python), folder("root", 0o700), folder("tmp")])


def dockerfile(where: Path, text: str, *, python: bool = False, **files: str) -> Path:
    """Write a folder with this Dockerfile, the base as base.tar, and other files (main_py is main.py)."""
    where.mkdir(parents=True, exist_ok=True)
    (where / "Dockerfile").write_text(text)
    (where / "base.tar").write_bytes(_base(python=python))
    for name, content in files.items():
        (where / name.replace("_", ".")).write_text(content)
    return where


def serving_dockerfile(where: Path) -> Path:
    return dockerfile(where, SERVES, python=True, main_py=SERVER)


def debian(path: Path) -> None:
    """Put the smallest Debian with Python at `path`, as a tar file. It is made once and kept outside the
    repository between test sessions."""
    made = Path(os.environ.get("XDG_CACHE_HOME", tempfile.gettempdir())) / "palio-tests" / "debian-python.tar"
    made.parent.mkdir(parents=True, exist_ok=True)
    with made.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            _mmdebstrap(made)
    shutil.copyfile(made, path)


def _mmdebstrap(made: Path) -> None:
    if shutil.which("mmdebstrap") is None:
        pytest.skip("no mmdebstrap here; envs/debian.txt names the package")
    # its /proc is busy now and then when it is to be unmounted, and nothing that is installed needs it
    options = ["--variant=minbase", "--include=python3", "--skip=chroot/mount/proc"]
    building = made.with_name("building.tar")
    line = ["mmdebstrap", *options, "bookworm", str(building)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    building.rename(made)
