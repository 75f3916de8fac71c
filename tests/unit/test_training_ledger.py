"""The ledger charges every second of every attempt, and dying never pays."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from palio.training.ledger import Ledger, beat_interval, charged, joules, read_ledger

ENDLESS = """
import sys, time
from pathlib import Path
from palio.training.ledger import Ledger
with Ledger(Path(sys.argv[1]), 100):
    print("started", flush=True)
    time.sleep(60)
"""


def test_attempts_add_up(tmp_path: Path) -> None:
    for _ in range(2):
        with Ledger(tmp_path / "ledger.jsonl", 100) as ledger:
            time.sleep(0.2)
    assert ledger.used() == pytest.approx(0.4, abs=0.15)
    assert sum(charged(read_ledger(tmp_path / "ledger.jsonl")).values()) == pytest.approx(0.4, abs=0.15)


def test_a_killed_attempt_is_charged_within_one_interval(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    process = subprocess.Popen([sys.executable, "-c", ENDLESS, str(path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(1.3)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    seconds = Ledger(path, 100).before
    assert 1.3 - 0.1 <= seconds <= 1.3 + beat_interval(100) + 0.1


def test_a_moved_clock_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Ledger(tmp_path / "ledger.jsonl", 100) as ledger:
        monkeypatch.setattr(time, "time", lambda: 0.0)
        time.sleep(0.1)
        assert 0.1 <= ledger.used() < 1


def test_a_torn_last_line_loses_that_line_only(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with Ledger(path, 100):
        time.sleep(0.1)
    with path.open("a") as stream:
        stream.write('{"event": "st')
    with Ledger(path, 100) as ledger:
        assert ledger.before == pytest.approx(0.1, abs=0.1)
    assert [line["event"] for line in read_ledger(path)] == ["start", "end", "start", "end"]


def test_the_ledger_is_only_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with Ledger(path, 100, device="cpu"):
        first = path.read_text()
    second = path.read_text()
    assert second.startswith(first)
    assert json.loads(first.splitlines()[0])["device"] == "cpu"


def test_energy_is_counted_over_all_attempts(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    for readings in ([1000.0, 1040.0], [7.0, 9.5]):  # the counter starts anew with the driver
        with Ledger(path, 100, meter=iter(readings).__next__):
            pass
    assert joules(read_ledger(path)) == 42.5


def test_energy_nobody_metered_is_unknown_rather_than_zero(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.jsonl", 100):
        pass
    assert joules(read_ledger(tmp_path / "ledger.jsonl")) is None


def test_what_is_left_falls_below_zero_when_the_budget_is_overdrawn(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.jsonl", 0.1) as ledger:
        assert 0 < ledger.left() <= 0.1
        time.sleep(0.2)
        assert ledger.left() < 0
