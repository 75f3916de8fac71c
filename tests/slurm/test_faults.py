"""One bad night on a real cluster: what each fault cost, what ran again, and what the organizer sees.

    PALIO_FAULT_TABLE=docs/faults.md pytest -m slow tests/slurm/test_faults.py tests/slurm/test_restart.py

writes what was measured as the table in docs/slurm.md.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from palio.errors import State
from palio.layout import EntryFolder
from palio.operating.attempt import Attempt, read_attempts
from palio.records import AdapterManifest, StepFailure, read_record
from palio.training.ledger import charged, read_ledger
from tests.slurm import competition
from tests.slurm.cluster import Cluster
from tests.slurm.competition import controller, ended, fault_row, output
from tests.support.folder import WorkingFolder

pytestmark = pytest.mark.slow  # the night has most of these faults, on steps that only write their records
ENTRIES = {
    "good": "a100",
    "diverges": "a100",
    "full": "a100",
    "moved": "rtx4090",
    "greedy": "narrow",
    "hangs": "short",
    "refused": "typo",
}


def adapter(entry: str) -> str:
    return f"results/{ENTRIES[entry]}/{entry}/adapter.json"


@dataclass
class Night:
    """What was seen while it happened."""

    folder: WorkingFolder
    cluster: Cluster
    exit_code: int
    again_exit_code: int
    jobs_before_restart: set[str]
    jobs_after_restart: set[str]
    slurmctld_away: float
    """Seconds."""
    lost_at: float
    again_at: float
    slurm_jobs: dict[str, str]
    """job -> rule with wildcards, of the night."""
    status: str
    first_log: str

    def of(self, entry: str) -> Path:
        return self.folder.path / "results" / ENTRIES[entry] / entry

    def attempts(self, entry: str) -> list[Attempt]:
        return [one for one in read_attempts(EntryFolder.at(self.of(entry))) if one.step == "finetune"]

    def failure(self, entry: str) -> StepFailure:
        return read_record(StepFailure, self.of(entry) / "work" / "failures" / "finetune.json")

    def last_job(self, entry: str) -> str:
        rule = f"rule_finetune_wildcards_{ENTRIES[entry]}_{entry}"
        return max((job for job, of in self.slurm_jobs.items() if of == rule), key=int)


def prepare(folder: WorkingFolder, tiny: Path) -> None:
    """Six tracks and seven entries, each with its fault."""

    def tracks(config: dict[str, Any]) -> None:
        known = config["tracks"]
        plain = {name: value for name, value in known["a100"].items() if name != "gpu_model"}
        # Long enough to be training when its node is lost, on a busy machine too.
        known["rtx4090"]["training_budget"] = "120s"
        known["narrow"] = {**plain, "ram_gb": 2}
        # SLURM warns two minutes before the limit. The next job must have refused the hanging entry by then.
        known["short"] = {**plain, "training_budget": "60s", "training_margin": "180s"}
        known["typo"] = plain

    folder.edit_yaml("config/config.yaml", tracks)
    competition.add_entry(folder, "good", "a100", tiny, max_steps=4)
    competition.add_entry(folder, "diverges", "a100", tiny, max_steps=50, learning_rate=1e30)
    competition.add_entry(folder, "full", "a100", tiny, max_steps=4, save_steps=1)
    competition.add_entry(folder, "moved", "rtx4090", tiny, max_steps=100_000, save_steps=5)
    competition.add_entry(folder, "greedy", "narrow", tiny, max_steps=4, batch_size=400)
    competition.add_entry(folder, "hangs", "short", tiny, max_steps=100_000)
    competition.add_entry(folder, "refused", "typo", tiny, max_steps=4)

    def partition(profile: dict[str, Any]) -> None:
        rule = profile["set-resources"]["finetune"]
        rule["slurm_partition"] = rule["slurm_partition"].replace(
            "'a100': 'a100'", "'a100': 'a100', 'typo': 'gppu'"
        )

    folder.edit_yaml("profiles/slurm/config.yaml", partition)


def small_disk(path: Path) -> None:
    """A disk of 350 kB: room for a dataset and a checkpoint, none for two."""
    path.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=350k", "tmpfs", str(path)], capture_output=True, check=False
    )
    if done.returncode != 0:
        pytest.skip("no right to mount a small disk here")


def running_pid(folder: Path) -> int | None:
    """The process of the entry's running training."""
    attempts = [
        one for one in read_attempts(EntryFolder.at(folder)) if one.step == "finetune" and one.state is None
    ]
    return attempts[-1].pid if attempts else None


def training(folder: Path) -> bool:
    log = folder / "logs" / "finetune.log"
    return log.exists() and "step " in log.read_text()


@pytest.fixture(scope="module")
def night(
    finished: Any, cluster: Cluster, tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Night]:
    folder = competition.copy(finished.folder, tmp_path_factory.mktemp("night") / "competition")
    prepare(folder, tiny)
    disk = folder.path / "results/a100/full"  # the whole entry: its folders are moved, not copied
    small_disk(disk)
    competition.prepare_datasets(folder)
    targets = [adapter(entry) for entry in ENTRIES]
    moved, hangs = (folder.path / "results" / ENTRIES[name] / name for name in ("moved", "hangs"))
    known = set(cluster.jobs("%i"))
    try:
        with controller(folder, cluster, *targets) as snakemake:
            cluster.wait(lambda: running_pid(hangs) is not None, "the hanging entry to start", 1200)
            os.kill(running_pid(hangs) or 0, signal.SIGSTOP)
            cluster.wait(lambda: training(moved), "training to begin", 1200)
            before, stopped = set(cluster.jobs("%i")), time.monotonic()
            cluster.stop_controller()
            time.sleep(2)
            cluster.start_controller()
            after = set(cluster.jobs("%i"))
            away = time.monotonic() - stopped
            node = next(one.node for one in read_attempts(EntryFolder.at(moved)) if one.step == "finetune")
            lost_at = time.time()
            cluster.lose_node(node)
            wide = cluster.environment | {"COLUMNS": "240"}
            status = folder.run("palio", "status", environment=wide).stdout
            exit_code = snakemake.wait(1500)
        cluster.start_node(node)
        first_log = output(folder)
        subprocess.run(["mount", "-o", "remount,size=300m", str(disk)], check=True)
        mend = (folder.path / "profiles/slurm/config.yaml").read_text().replace("gppu", "gpu")
        (folder.path / "profiles/slurm/config.yaml").write_text(mend)
        again_at = time.time()
        with controller(folder, cluster, adapter("full"), adapter("refused"), adapter("good")) as snakemake:
            again_exit_code = snakemake.wait(1500)
        jobs = dict(line.split("|") for line in cluster.jobs("%i|%k"))
        mine = {job: of for job, of in jobs.items() if job not in known}
        yield Night(
            folder=folder,
            cluster=cluster,
            exit_code=exit_code,
            again_exit_code=again_exit_code,
            jobs_before_restart=before,
            jobs_after_restart=after,
            slurmctld_away=away,
            lost_at=lost_at,
            again_at=again_at,
            slurm_jobs=mine,
            status=status,
            first_log=first_log,
        )
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


def test_the_others_finish_and_the_run_ends_with_the_failures_named(night: Night) -> None:
    assert night.exit_code == 1
    assert read_record(AdapterManifest, night.of("good") / "adapter.json").state == "finished"
    *lost, last = night.attempts("good")
    assert last.state is State.FINISHED, "what is finished is not run again"
    # On a slow machine it still trains when its node is lost, and SLURM requeues its job.
    assert all(one.state in (None, State.INTERRUPTED) and one.job == last.job for one in lost)


def test_a_poisoned_entry_trains_once_and_is_refused_after(night: Night) -> None:
    (attempt,) = night.attempts("diverges")
    assert attempt.state is State.CRASHED
    assert "diverged" in night.failure("diverges").reason
    assert night.last_job("diverges") == attempt.job
    again = "nothing: no further job is submitted"
    fault_row("a poisoned entry that crashes every time", "nothing", again, None)


def test_an_entry_over_its_memory_is_killed_twice_at_most(night: Night) -> None:
    attempts = night.attempts("greedy")
    assert 1 <= len(attempts) <= 2
    failure = night.failure("greedy")
    assert failure.state in (State.OUT_OF_MEMORY, State.CRASHED)
    assert "memory" in failure.reason
    again = (
        "that training once, then refused (at once where SLURM says OUT_OF_MEMORY, as it does with cgroups)"
    )
    seconds = attempts[1].started - ended(night.cluster, attempts[0].job) if len(attempts) == 2 else None
    fault_row("out of memory (killed by SLURM)", "nothing", again, seconds)


def test_a_hanging_entry_ends_at_the_time_limit_and_is_not_tried_again(night: Night) -> None:
    (attempt,) = night.attempts("hangs")
    states = dict(line.split("|") for line in night.cluster.jobs("%i|%T"))
    # On a busy machine the warning may find it not yet stopped, and be heard.
    heard = attempt.state is State.TIME_LIMIT
    assert heard or states[attempt.job or ""] == "TIMEOUT", "a job lasts as long as the Palio in it"
    failure = night.failure("hangs")
    assert failure.state is State.TIME_LIMIT, failure.reason
    assert night.last_job("hangs") == attempt.job or not heard
    again = "nothing: refused as `time_limit`"
    fault_row("an entry that hangs, until the job's time limit", "nothing", again, None)


def test_training_goes_on_on_another_node_inside_its_budget(night: Night) -> None:
    first, second = night.attempts("moved")
    assert first.node != second.node
    assert first.job == second.job, "SLURM requeued it"
    assert second.state is State.FINISHED
    manifest = read_record(AdapterManifest, night.of("moved") / "adapter.json")
    assert manifest.state == "budget_reached"
    (ledger,) = (night.of("moved") / "work" / "train").glob("*/ledger.jsonl")
    used = charged(read_ledger(ledger))
    assert len(used) == 2
    assert sum(used.values()) <= 120
    assert "resumed from step" in (night.of("moved") / "logs" / "finetune.log").read_text()
    assert (night.of("moved") / "work" / "logs" / "finetune.1.log").exists()
    waited = second.started - night.lost_at
    again = "that training, on another node, same SLURM job, inside its budget"
    fault_row("node gone in the middle of training", "steps since the last checkpoint", again, waited)


def test_a_restarted_slurmctld_forgets_no_job(night: Night) -> None:
    assert night.jobs_before_restart <= night.jobs_after_restart
    fault_row("slurmctld killed and started again", "nothing", "nothing", night.slurmctld_away)


def test_a_full_disk_is_the_machines_fault_and_the_next_run_finishes(night: Night) -> None:
    assert night.again_exit_code == 0, output(night.folder)[-5000:]
    attempts = night.attempts("full")
    assert len(attempts) > 2
    assert attempts[-1].state is State.FINISHED
    assert all(one.state in (State.INTERRUPTED, None) for one in attempts[:-1])
    assert "make room" in night.first_log
    seconds = attempts[-1].started - night.again_at
    again = "that training, at the next start with room"
    fault_row("disk full", "steps since the last checkpoint", again, seconds)


def test_a_refused_submission_costs_nothing_and_says_what_sbatch_said(night: Night) -> None:
    assert "invalid partition specified: gppu" in night.first_log
    (attempt,) = night.attempts("refused")
    assert attempt.state is State.FINISHED
    seconds = attempt.started - night.again_at
    again = "that step, at the next start with the profile mended"
    fault_row("sbatch refused (wrong partition)", "nothing", again, seconds)


def test_status_in_the_middle_of_it_named_nodes_and_failures(night: Night) -> None:
    assert "run by process" in night.status
    assert "% used" in night.status
