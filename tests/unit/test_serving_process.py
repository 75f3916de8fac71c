"""A server as a process: it gets ready, it is watched, and nothing of it is left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import requests

from palio.errors import Crashed, OutOfMemory, ServerBroken
from palio.evaluation.probe import Asked, probe
from palio.evaluation.window import Window
from palio.serving.process import ServerProcess
from tests.support.serving import SHOTS, ask, metric


@pytest.fixture(scope="module")
def server(package: Path) -> Iterator[ServerProcess]:
    with ServerProcess(package, log=package.parent / "server.log", threads=1) as server:
        yield server


def test_it_answers_once_it_is_ready(server: ServerProcess) -> None:
    assert ask(server.base_url, "a", max_new_tokens=2).status_code == 200
    assert server.alive()


def test_a_client_that_leaves_frees_its_place(server: ServerProcess) -> None:
    with pytest.raises(requests.Timeout):
        ask(server.base_url, SHOTS, timeout=0.3, max_new_tokens=1500)
    deadline = time.monotonic() + 30
    while metric(server, "requests_cancelled_total") < 1 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert metric(server, "requests_cancelled_total") == 1
    assert metric(server, "sequences_running") == 0


def test_the_log_shows_no_prompt(server: ServerProcess, package: Path) -> None:
    ask(server.base_url, "a canary")
    ask(server.base_url, "a canary", temperature=-1)
    assert "canary" not in (package.parent / "server.log").read_text()


def test_the_whole_group_ends_with_the_context(package: Path, tmp_path: Path) -> None:
    with ServerProcess(package, log=tmp_path / "server.log", threads=1) as server:
        process = psutil.Process(server.pid)
        assert server.alive()
    assert not process.is_running()
    assert not server.alive()


OWNER = """
import sys, time
from pathlib import Path
from palio.serving.process import ServerProcess
with ServerProcess(Path(sys.argv[1]), log=Path(sys.argv[2]), threads=1) as server:
    print(server.pid, flush=True)
    time.sleep(600)
"""


def test_a_server_ends_when_its_owner_is_killed(package: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", OWNER, str(package), str(tmp_path / "server.log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        server = psutil.Process(int(owner.stdout.readline()))
        owner.kill()
    server.wait(20)
    assert not server.is_running()


def test_a_killed_server_is_seen(package: Path, tmp_path: Path) -> None:
    with ServerProcess(package, log=tmp_path / "server.log", threads=1) as server:
        os.kill(server.pid, signal.SIGKILL)
        psutil.Process(server.pid).wait(10)
        assert not server.alive()


FRAGILE = """
from palio.cli import main
from palio.serving.model import TreeModel

forward, broken = TreeModel.forward, []

def forward_until_poisoned(model, chunks):
    broken.extend(chunk for chunk in chunks if chunk.tokens == [82])
    if broken:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    return forward(model, chunks)

TreeModel.forward = forward_until_poisoned
main()
"""
"""`palio serve` on a device that never recovers once it has seen the prompt b."""
BROKEN = "the model is broken: RuntimeError; see the server's log"


def test_a_server_whose_device_is_broken_says_so_and_ends_with_its_own_code(
    package: Path, tmp_path: Path
) -> None:
    server = ServerProcess(package, log=tmp_path / "server.log", threads=1)
    server._command[1:3] = ["-c", FRAGILE]
    with server:
        assert ask(server.base_url, "Hello", max_new_tokens=2).status_code == 200
        started = time.monotonic()
        reply = ask(server.base_url, "b")
        assert (reply.status_code, reply.json()["detail"]) == (503, BROKEN)
        health = requests.get(f"{server.base_url}/health", timeout=60)
        assert (health.status_code, health.json()["reason"]) == (503, BROKEN)
        assert not server.alive()
        assert server._process is not None
        assert server._process.wait(15) == ServerBroken.exit_code
        assert time.monotonic() - started < 15
    assert "CUDA error" in (tmp_path / "server.log").read_text()


def test_a_package_that_cannot_be_served_is_named_with_the_logs_last_lines(tmp_path: Path) -> None:
    with (
        pytest.raises(Crashed, match=r"code 2 .*no config\.json"),
        ServerProcess(tmp_path / "nothing", log=tmp_path / "server.log"),
    ):
        pass


def test_a_model_too_large_for_the_memory_is_out_of_memory(package: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(OutOfMemory, match="keys and values"),
        ServerProcess(package, log=tmp_path / "server.log", cache_gb=1e-4),
    ):
        pass


def test_a_port_in_use_is_a_users_mistake(package: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        from palio.errors import BadInput
        from palio.serving.app import serve

        with pytest.raises(BadInput, match="choose another"):
            serve(package, host="127.0.0.1", port=taken.getsockname()[1], device="cpu", threads=1)


def test_the_real_model_passes_every_check_of_the_probe(base_model: Path, tmp_path: Path) -> None:
    with ServerProcess(base_model, log=tmp_path / "server.log", threads=1) as server:
        report = probe(server.base_url, Asked(), Window.of_model(base_model))
        assert report.failed == []
        assert server.alive()
