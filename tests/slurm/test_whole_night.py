"""A whole night of twenty entries and eight faults, by the program that plays larger ones with real steps.

    python -m benchmarks.night --entries 200 --faults all

Here every step only writes its record (tests/support/quick.py); SLURM, Snakemake, planning, what the
organizer types and the faults are real.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from benchmarks.night.__main__ import NODES, Outcome, spend
from benchmarks.night.night import FAKE_CLOCK, HOOK, AnotherNightError, faketime
from benchmarks.night.result import wrong

from tests.slurm.cluster import Cluster, missing_programs
from tests.support.folder import WorkingFolder

ENTRIES, FAULTS, SEED = 20, 8, 4


@pytest.fixture(scope="module")
def night(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outcome]:
    if missing := missing_programs():
        pytest.skip(f"{', '.join(missing)} not installed: apt-get install slurm-wlm munge")
    with Cluster(tmp_path_factory.mktemp("cluster_of_a_night"), NODES) as cluster:
        place = tmp_path_factory.mktemp("whole_night") / "night"
        yield spend(place, cluster, ENTRIES, FAULTS, SEED, stand_ins=True)


def test_every_entry_is_where_it_belongs_and_the_leaderboards_are_those_of_a_run_without_faults(
    night: Outcome,
) -> None:
    print(night.table)
    assert night.wrong == []


def test_eight_kinds_of_faults_were_played_and_each_is_in_the_table(night: Outcome) -> None:
    played = {event.kind for event in night.night.events}
    assert len(played) == FAULTS
    for kind in played:
        assert f"| – {kind} | 1 of 1" in night.table
    assert "every step only writes its record" in night.table, "a stand-in is named"


def test_a_night_that_scored_an_entry_wrong_would_not_pass(night: Outcome, tmp_path: Path) -> None:
    """The same night against a reference of which one leaderboard differs in a byte."""
    other = tmp_path / "reference"
    shutil.copytree(night.night.place / "reference/results", other / "results")
    board = other / "results/leaderboard/a100.json"
    board.write_text(board.read_text() + " ")
    assert wrong(night.night, WorkingFolder(other)) == ["the leaderboard of a100 is not the reference's"]


def test_a_night_that_is_over_is_not_played_again_and_its_interrupted_reference_goes_on(
    night: Outcome,
) -> None:
    seen = night.night
    entry = next(one for one in seen.planned if not one.broken and not one.role)
    interrupted = seen.place / "reference/results" / entry.track / entry.name
    shutil.rmtree(interrupted)
    again = spend(seen.place, seen.cluster, ENTRIES, FAULTS, SEED, stand_ins=True)
    assert again.wrong == []
    assert interrupted.exists()
    assert again.night.starts == seen.starts
    assert _without_wall_time(again.table) == _without_wall_time(night.table)


def test_a_folder_that_holds_another_night_is_refused(night: Outcome) -> None:
    with pytest.raises(AnotherNightError, match="holds the night of"):
        spend(night.night.place, night.night.cluster, ENTRIES, FAULTS, SEED + 1, stand_ins=True)


def _without_wall_time(table: str) -> list[str]:
    return [line for line in table.splitlines() if not line.startswith("| wall time")]


def test_under_a_clock_that_was_moved_python_still_sleeps(tmp_path: Path) -> None:
    library = faketime()
    if library is None:
        pytest.skip("apt-get install libfaketime")
    (tmp_path / "sitecustomize.py").write_text(HOOK)
    code = (
        "import time\nbegun = time.monotonic()\ntime.sleep(0.2)\nprint(time.time(), time.monotonic() - begun)"
    )
    moved = dict(setting.split("=") for setting in FAKE_CLOCK.split())
    environment = os.environ | moved | {
        "LD_PRELOAD": str(library), "FAKETIME": "+3600", "PYTHONPATH": str(tmp_path),
        "NIGHT_USAGE": str(tmp_path / "usage.jsonl"),
    }  # fmt: skip
    before = time.time()
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    told, slept = map(float, done.stdout.split())
    assert told - before > 3500
    assert slept >= 0.2
