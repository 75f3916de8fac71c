"""How far a running step is, as it writes it down and as `palio status` reads it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from palio.heartbeat import HeartbeatWriter, read_heartbeat
from palio.layout import EntryFolder


def test_what_is_left_takes_as_long_as_what_is_done(tmp_path: Path) -> None:
    path = EntryFolder.at(tmp_path).heartbeat("finetune")
    HeartbeatWriter(path, 40, "steps").beat(10, used_seconds=60)
    heartbeat = read_heartbeat(path, since=0)
    assert heartbeat is not None
    assert (heartbeat.step, heartbeat.done, heartbeat.total) == ("finetune", 10, 40)
    assert heartbeat.expected_end == pytest.approx(time.time() + 180, abs=5)


def test_nothing_is_expected_before_the_first_unit_is_done(tmp_path: Path) -> None:
    path = EntryFolder.at(tmp_path).heartbeat("open")
    HeartbeatWriter(path, 40, "requests").beat(0, used_seconds=60)
    heartbeat = read_heartbeat(path, since=0)
    assert heartbeat is not None
    assert heartbeat.expected_end is None


def test_beats_within_a_second_are_one_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = EntryFolder.at(tmp_path).heartbeat("finetune")
    heartbeat = HeartbeatWriter(path, 40, "steps")
    for step in (1, 2, 3):
        heartbeat.beat(step, used_seconds=step)
    assert (read_heartbeat(path, since=0) or pytest.fail()).done == 1
    monkeypatch.setattr("palio.heartbeat.INTERVAL_SECONDS", 0)
    heartbeat.beat(4, used_seconds=4)
    assert (read_heartbeat(path, since=0) or pytest.fail()).done == 4


def test_a_heartbeat_of_an_earlier_attempt_is_not_read(tmp_path: Path) -> None:
    path = EntryFolder.at(tmp_path).heartbeat("finetune")
    HeartbeatWriter(path, 40, "steps").beat(10, used_seconds=60)
    assert read_heartbeat(path, since=time.time() + 1) is None


def test_a_heartbeat_of_another_version_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "finetune.json"
    path.write_text('{"schema_version": 2}')
    assert read_heartbeat(path, since=0) is None


def test_a_heartbeat_that_cannot_be_written_does_not_hurt_the_step(tmp_path: Path) -> None:
    (tmp_path / "work").write_text("a file where a folder should be")
    HeartbeatWriter(EntryFolder.at(tmp_path).heartbeat("finetune"), 40, "steps").beat(1, used_seconds=1)
    assert read_heartbeat(EntryFolder.at(tmp_path).heartbeat("finetune"), since=0) is None
