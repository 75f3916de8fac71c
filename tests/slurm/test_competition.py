"""A whole competition on a real SLURM cluster: `snakemake --profile slurm`, as typed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from itertools import pairwise

from palio.layout import ENDED, EntryFolder
from palio.operating.attempt import Attempt, read_attempts
from tests.slurm.cluster import Cluster
from tests.slurm.competition import TRACKS, output
from tests.slurm.conftest import Finished
from tests.support.folder import ROOT

GPU_RULES = ("finetune", "helm_open", "helm_closed")


def gpu_attempts(finished: Finished) -> list[Attempt]:
    found = [
        one
        for folder in (finished.folder.path / "results").glob("*/*")
        for one in read_attempts(EntryFolder.at(folder))
        if one.step in ("finetune", "open", "closed")
    ]
    assert found
    return found


def test_the_leaderboards_stand_at_the_end(finished: Finished) -> None:
    assert finished.exit_code == 0, output(finished.folder)[-8000:]
    for track, entries in (("a100", {"tuned", "plain"}), ("rtx4090", {"other"})):
        board = json.loads((finished.folder.path / f"results/leaderboard/{track}.json").read_text())
        assert board["final"] is True
        assert {row["entry"] for row in board["entries"]} == entries


def test_every_step_is_a_job_on_the_right_partition(finished: Finished) -> None:
    seen = set()
    for state, partition, comment in finished.jobs.values():
        assert state == "COMPLETED"
        rule, _, wildcards = comment.removeprefix("rule_").partition("_wildcards_")
        track = next((track for track in TRACKS if wildcards.startswith(f"{track}_")), "")
        assert partition == (track if rule in GPU_RULES else "cpu"), comment
        seen.add(rule)
    assert seen >= {"curate_dataset", "build_package", "score", "report", *GPU_RULES}


def test_each_gpu_step_had_one_gpu_and_no_gpu_had_two_steps(finished: Finished) -> None:
    by_gpu: dict[tuple[str, str | None], list[Attempt]] = {}
    for one in gpu_attempts(finished):
        assert re.fullmatch(r"\d", one.gpu or ""), "CUDA_VISIBLE_DEVICES is one GPU"
        assert one.job in finished.jobs
        by_gpu.setdefault((one.node, one.gpu), []).append(one)
    for attempts in by_gpu.values():
        attempts.sort(key=lambda one: one.started)
        for before, after in pairwise(attempts):
            assert before.ended is not None
            assert before.ended <= after.started


def test_checks_of_all_entries_take_no_job(finished: Finished) -> None:
    checks = [
        one
        for folder in (finished.folder.path / "results").glob("*/*")
        for one in read_attempts(EntryFolder.at(folder))
        if one.step == "check"
    ]
    assert [(check.job, check.state) for check in checks] == [(None, "finished")] * 3
    assert not any("check_entry" in comment for _, _, comment in finished.jobs.values())


def test_steps_without_a_gpu_hold_none(finished: Finished) -> None:
    for folder in (finished.folder.path / "results").glob("*/*"):
        for one in read_attempts(EntryFolder.at(folder)):
            if one.step in ("curate", "package", "contamination"):
                assert one.gpu is None
                assert one.node == "c1"


def test_status_beside_the_run_showed_it_going_on(finished: Finished) -> None:
    together = "\n".join(finished.statuses)
    assert "run by process" in together
    for words in ("waiting", "done"):
        assert words in together
    assert re.search(r"│ \w\d, ", together), "a running step names its node"
    last = finished.folder.run("palio", "status").stdout
    assert "3 entries: 3 done; no run in progress" in last


def cells(status: str) -> list[str]:
    return [cell.strip() for line in status.splitlines() if "│" in line for cell in line.split("│")[3:-1]]


def test_a_step_that_is_done_stays_done_while_its_job_ends(finished: Finished) -> None:
    for before, after in pairwise(cells(status) for status in finished.statuses):
        for cell, later in zip(before, after, strict=True):
            assert not cell.startswith("done") or later.startswith("done")


def test_jobs_tell_the_controller_that_they_end(finished: Finished) -> None:
    assert (finished.folder.path / ENDED).exists()


def test_what_a_step_cost_besides_its_work_is_told_from_the_records(
    finished: Finished, cluster: Cluster
) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/chain.py")],
        cwd=finished.folder.path,
        env=cluster.environment,
        capture_output=True,
        text=True,
        check=True,
    )
    jobs = dict(re.findall(r"(?m)^\| (\w+) \| (\d+) \|", done.stdout))
    assert jobs == {
        "curate_dataset": "2",
        "measure_contamination": "2",
        "finetune": "2",
        "build_package": "3",
        "helm_open": "3",
        "helm_closed": "3",
    }
    assert re.search(r"\d+ s for the 6 steps of an entry", done.stdout)
    assert "two at once on one GPU: never" in done.stdout


def test_a_second_run_submits_nothing(finished: Finished) -> None:
    done = finished.folder.run("snakemake", "--profile", "slurm", "--dry-run")
    assert "Nothing to be done" in done.stdout + done.stderr
