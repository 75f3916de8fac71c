"""One bad night, from the first start to the morning: eight entries, two tracks, and whatever can happen.

In the end the same command is typed until nothing is due, and the leaderboards are those of a run without
incident on the config as it is then. The steps only write records, whose content follows from what they ran
with and read (tests/support/quick.py), so that equal leaderboards mean equal work, step by step; SLURM,
Snakemake, planning and `palio` are real. The last test plays a part of it with real steps.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.slurm import competition
from tests.slurm.cluster import Cluster
from tests.slurm.competition import TRACKS, controller, output
from tests.slurm.conftest import Finished
from tests.support.folder import DEMO_ENTRIES, WorkingFolder
from tests.support.quick import program, ran

pytestmark = pytest.mark.slow  # each incident alone is in the other files here and in tests/workflow

TUNED = {"edited": "a100", "redata": "a100", "retried": "a100", "broken": "rtx4090", "sourceless": "rtx4090"}
UNTUNED = {"steady": "rtx4090", "removed": "a100", "withdrawn": "rtx4090"}
SOURCE = "resources/teams/sourceless/rows.jsonl"
STARTS = 4
"""In which the morning must be done."""

CRASH = """\
import signal, threading

def crash(signum, frame):
    raise RuntimeError("a bug in Snakemake")

if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGUSR2, crash)
"""
"""What makes any Python program crash on demand, wherever it is: its sitecustomize.py."""


def prepare(path: Path, tiny: Path) -> WorkingFolder:
    folder = competition.create(path, tiny)
    for entry, track in TUNED.items():
        competition.add_entry(folder, entry, track, tiny, max_steps=4)
    for entry, track in UNTUNED.items():
        competition.add_entry(folder, entry, track, tiny)
    source = folder.path / SOURCE
    source.parent.mkdir(parents=True)
    rows = [{"prompt": f"What is {number} + 1?", "completion": str(number + 1)} for number in range(20)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder.edit_entry("sourceless", lambda entry: entry["dataset"]["sources"][0].update(path=SOURCE))
    return folder


@dataclass
class Night:
    """What was done, and what was seen."""

    folder: WorkingFolder
    environment: dict[str, str]
    reference: WorkingFolder
    logs: list[str]
    """What Snakemake printed in each start."""
    exit_codes: list[int]
    """Of the starts of the morning."""
    after_crash: str
    """`palio status` after the crash."""

    def board(self, folder: WorkingFolder, track: str) -> Any:
        return json.loads((folder.path / f"results/leaderboard/{track}.json").read_text())


def wait_for(
    cluster: Cluster, folder: WorkingFolder, process: subprocess.Popen[bytes], *steps: tuple[str, str]
) -> None:
    def begun() -> bool:
        assert process.poll() is None, output(folder)[-5000:]
        return (folder.path / "ran.jsonl").exists() and set(steps) <= set(ran(folder.path))

    cluster.wait(begun, f"{steps} to begin", 1200)


def decide(night: WorkingFolder, tiny: Path, environment: dict[str, str]) -> None:
    """What teams and organizers do in the evening."""
    night.edit_entry("edited", lambda entry: entry["finetune"].update(learning_rate=7e-4))
    night.edit_entry("redata", lambda entry: entry["dataset"].update(seed=7))
    (night.path / SOURCE).rename(night.path / "rows.away")

    def another_metric(config: dict[str, Any]) -> None:
        (scenario,) = config["stages"]["closed"]["scenarios"].values()
        scenario["metrics"] = {"quasi-exact match": {"metric": "quasi_exact_match"}}

    night.edit_yaml("config/config.yaml", another_metric)
    competition.add_entry(night, "late", "a100", tiny)
    (night.path / DEMO_ENTRIES / "removed.yaml").unlink()
    for command in (("withdraw", "withdrawn", "--why", "asked to"), ("retry", "retried", "--step", "open")):
        done = night.run("palio", *command, environment=environment)
        assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def night(cluster: Cluster, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Night:
    place = tmp_path_factory.mktemp("a_night")
    folder = prepare(place / "competition", tiny)
    quick = program(place / "bin")
    (place / "crash").mkdir()
    (place / "crash" / "sitecustomize.py").write_text(CRASH)
    environment = cluster.environment | {
        "PATH": f"{place / 'bin'}:{cluster.environment['PATH']}",
        "PYTHONPATH": f"{place / 'crash'}:{os.environ.get('PYTHONPATH', '')}",
    }
    logs = []

    def start(**variables: str) -> Any:
        (folder.path / "snakemake.log").unlink(missing_ok=True)
        return controller(folder, cluster, **(environment | variables))

    # the evening: everybody decides something, and the controller is killed
    slow = "edited finetune 600,withdrawn open 600,retried closed 600"  # until they are cancelled
    with start(PALIO_SLOW=slow) as snakemake:
        begun = ("edited", "finetune"), ("withdrawn", "open"), ("retried", "closed"), ("redata", "open")
        wait_for(cluster, folder, snakemake, *begun, ("sourceless", "finetune"))
        removed = folder.path / "results/a100/removed/closed.json"
        cluster.wait(removed.exists, "an entry to be finished", 1200)
        decide(folder, tiny, environment)
        snakemake.kill()
        snakemake.wait()
    logs.append(output(folder))

    # the night: one entry's folder is lost, and the controller crashes
    lost = folder.path / "results/rtx4090/broken"
    with start(PALIO_SLOW="edited finetune 20,late open 600") as snakemake:
        wait_for(cluster, folder, snakemake, ("late", "check"))
        shutil.move(lost, place / "broken.away")
        lost.symlink_to("/proc/sys/kernel")  # nobody can write there
        wait_for(cluster, folder, snakemake, ("late", "open"))
        snakemake.send_signal(signal.SIGUSR2)
        cluster.wait(lambda: snakemake.poll() is not None, "the crashed controller to end", 120)
    logs.append(output(folder))
    after_crash = folder.run("palio", "status", environment=environment | {"COLUMNS": "240"}).stdout

    # the morning: the same command, with the folder still lost, and then until nothing is due
    exit_codes = []
    for number in range(STARTS):
        with start() as snakemake:
            exit_codes.append(snakemake.wait(1500))
        logs.append(output(folder))
        if exit_codes[-1] == 0:
            break
        if number == 0:
            lost.unlink()
            shutil.move(place / "broken.away", lost)

    reference = WorkingFolder(place / "reference")
    shutil.copytree(
        folder.path,
        reference.path,
        symlinks=True,
        ignore=shutil.ignore_patterns("results", "resources", "private", "logs", ".snakemake", "*.jsonl"),
    )
    (reference.path / SOURCE).parent.mkdir(parents=True)
    (reference.path / "rows.away").rename(reference.path / SOURCE)
    command = [str(Path(sys.executable).with_name("snakemake")), "--profile", "local"]
    done = subprocess.run(command, cwd=reference.path, env=quick, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    return Night(folder, environment, reference, logs, exit_codes, after_crash)


def test_the_leaderboards_are_those_of_a_run_without_incident(night: Night) -> None:
    assert night.exit_codes[-1] == 0, night.logs[-1][-5000:]
    for track in TRACKS:
        board = night.board(night.folder, track)
        assert board == night.board(night.reference, track)
        expected = {entry for entry, of in (TUNED | UNTUNED | {"late": "a100"}).items() if of == track}
        assert set(board["entries"]) == expected - {"removed", "withdrawn"}
    assert night.folder.plan(profile="slurm") == set()


def test_what_was_finished_was_not_done_again(night: Night) -> None:
    lines = (night.folder.path / "done.jsonl").read_text().splitlines()
    assert [line for line, times in Counter(lines).items() if times > 1] == []


def test_what_waited_or_ran_as_the_controller_died_was_cancelled_and_no_withdrawn_step_ran_again(
    night: Night,
) -> None:
    assert "cancelling job" in night.logs[1]
    assert ran(night.folder.path).count(("withdrawn", "open")) == 1
    assert ("withdrawn", "closed") not in ran(night.folder.path)
    assert (night.folder.path / "results/a100/removed/closed.json").exists(), "its file was removed, not it"


def test_the_crash_is_told_and_the_lost_folder_stopped_nobody_else(night: Night) -> None:
    assert "last run ended" in night.after_crash
    assert "by an exception" in night.after_crash
    assert "broken: its folder cannot be used" in night.logs[2]
    assert night.exit_codes[0] != 0, "no final leaderboard while an entry is left out"
    assert ("edited", "closed") in ran(night.folder.path)


def test_real_steps_after_a_killed_controller_and_an_edit_score_as_without_either(
    finished: Finished, cluster: Cluster, tmp_path: Path
) -> None:
    """A trained entry is trained anew: first by another recipe, until the controller is killed."""
    folder = competition.copy(finished.folder, tmp_path / "competition")
    shutil.rmtree(folder.path / "results/a100/tuned")
    recipe = (folder.path / DEMO_ENTRIES / "tuned.yaml").read_text()
    folder.edit_entry("tuned", lambda entry: entry["finetune"].update(max_steps=100_000, learning_rate=7e-4))
    log = folder.path / "results/a100/tuned/logs/finetune.log"
    with controller(folder, cluster) as snakemake:
        cluster.wait(lambda: log.exists() and "step " in log.read_text(), "training to begin", 900)
        snakemake.kill()
        snakemake.wait()
    (folder.path / DEMO_ENTRIES / "tuned.yaml").write_text(recipe)
    with controller(folder, cluster) as snakemake:
        assert snakemake.wait(1500) == 0, output(folder)[-5000:]
    for track in TRACKS:
        again, before = (
            json.loads((one.path / f"results/leaderboard/{track}.json").read_text())
            for one in (folder, finished.folder)
        )
        assert again["final"]
        assert again["entries"] == before["entries"]
