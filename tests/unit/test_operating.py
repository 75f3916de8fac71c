"""Operating a run: attempts and what follows them, status, overrides, the controller's lock, news."""

from __future__ import annotations

import asyncio
import errno
import io
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from rich.console import Console
from snakemake.exceptions import WorkflowError

from palio.cli import palio
from palio.config import load_competition
from palio.errors import BadInput, Crashed, Interrupted, NotRetried, PalioError, State
from palio.files import append_json_line
from palio.heartbeat import HeartbeatWriter, read_heartbeat
from palio.layout import CONFIG, ENDED, EntryFolder
from palio.operating import controller, hooks, slurm
from palio.operating.attempt import RUN_VARIABLE, Attempt, attempt, read_attempts, refusal, set_aside
from palio.operating.controller import Releases, Watch
from palio.operating.cost import cost_table, costs
from palio.operating.doctor import engine_findings
from palio.operating.status import EntryStatus, Selection, Status, StepStatus, competition_status
from palio.operating.status_view import html_page, terminal_view
from palio.pipeline import BY_NAME, STEPS
from palio.records import StepFailure, read_record
from palio.workflow import Workflow
from tests.support.folder import WorkingFolder
from tests.support.records import leave_record, leave_shared_records


@pytest.fixture
def folder(tmp_path: Path) -> WorkingFolder:
    return WorkingFolder.create(tmp_path / "competition")


def an_attempt(state: State | None, *, run: str = "now", job: str | None = "7", number: int = 1) -> Attempt:
    ended = 2.0 if state else None
    return Attempt("finetune", number, 1.0, "n1", 1, run, job, "0", ended, state, "why" if state else "")


@pytest.mark.parametrize(
    ("earlier", "job_state", "refused"),
    [
        ([], "", None),
        ([an_attempt(State.FINISHED)], "", None),
        ([an_attempt(State.INTERRUPTED)], "", None),
        ([an_attempt(State.CRASHED)], "", State.CRASHED),
        ([an_attempt(State.OUT_OF_MEMORY)], "", State.OUT_OF_MEMORY),
        ([an_attempt(State.TIME_LIMIT)], "", State.TIME_LIMIT),
        ([an_attempt(State.CRASHED, run="yesterday")], "", None),
        ([an_attempt(None)], "NODE_FAIL", None),
        ([an_attempt(None)], "PREEMPTED", None),
        ([an_attempt(None)], "OUT_OF_MEMORY", State.OUT_OF_MEMORY),
        ([an_attempt(None)], "TIMEOUT", State.TIME_LIMIT),
        ([an_attempt(None)], "FAILED", None),
        ([an_attempt(None), an_attempt(None, number=2)], "FAILED", State.CRASHED),
        ([an_attempt(None), an_attempt(None, number=2)], "NODE_FAIL", None),
        ([an_attempt(None, job="8")], "FAILED", None),
    ],
)
def test_only_what_the_machine_did_is_tried_again_in_the_same_run(
    earlier: list[Attempt], job_state: str, refused: State | None
) -> None:
    found = refusal(earlier, "now", "8", job_state)
    assert (found[0] if found else None) is refused


def test_a_step_that_failed_by_its_own_fault_ends_at_once_the_second_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(RUN_VARIABLE, "now")
    with pytest.raises(Crashed), attempt("finetune", EntryFolder.at(tmp_path)):
        raise Crashed("training diverged")
    with pytest.raises(NotRetried, match="training diverged"), attempt("finetune", EntryFolder.at(tmp_path)):
        pytest.fail("the body must not run")
    failure = read_record(StepFailure, tmp_path / "work" / "failures" / "finetune.json")
    assert (failure.state, failure.reason) == (State.CRASHED, "training diverged")
    monkeypatch.setenv(RUN_VARIABLE, "tomorrow")
    with attempt("finetune", EntryFolder.at(tmp_path)):
        pass
    assert not (tmp_path / "work" / "failures" / "finetune.json").exists()
    assert [one.state for one in read_attempts(EntryFolder.at(tmp_path))] == [State.CRASHED, State.FINISHED]


def test_a_full_disk_is_an_interruption_and_no_bug(tmp_path: Path) -> None:
    with (
        pytest.raises(Interrupted, match="make room and start again"),
        attempt("curate", EntryFolder.at(tmp_path)),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert read_attempts(EntryFolder.at(tmp_path))[0].state is State.INTERRUPTED


def test_every_attempts_log_is_kept(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "curate.log"
    log.parent.mkdir()
    for number in (1, 2):
        log.unlink(missing_ok=True)
        log.write_text(f"attempt {number}")
        with attempt("curate", EntryFolder.at(tmp_path)):
            pass
    kept = tmp_path / "work" / "logs"
    assert [(kept / f"curate.{number}.log").read_text() for number in (1, 2)] == ["attempt 1", "attempt 2"]


def test_a_fresh_start_is_made_once_for_each_grant(tmp_path: Path) -> None:
    work = tmp_path / "train"
    work.mkdir()
    (work / "ledger").write_text("24 h used")
    set_aside(work, 1)
    assert not work.exists()
    work.mkdir()
    set_aside(work, 1)
    assert work.exists(), "an interrupted fresh start goes on from its own work"
    set_aside(work, 2)
    assert not work.exists()
    assert (tmp_path / "train.before-1" / "ledger").read_text() == "24 h used"


# --- the controller


HOLD = """
from palio.operating.controller import take_over
take_over(on_slurm=False)
print("held", flush=True)
input()
"""


def test_a_second_controller_is_refused_until_the_first_is_gone_however_it_went(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with subprocess.Popen(
        [sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        assert f"process {first.pid} on" in (controller.running() or "")
        with pytest.raises(PalioError, match=rf"another Snakemake is running .*process {first.pid} on"):
            controller.take_over(on_slurm=False)
        first.kill()
        first.wait()
    assert controller.running() is None
    second = subprocess.run(
        [sys.executable, "-c", HOLD], input="\n", capture_output=True, text=True, check=True
    )
    assert second.stdout == "held\n"


def test_the_folder_is_free_once_a_run_has_ended_however_long_the_news_take(
    folder: WorkingFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.path)
    lock = "flock --nonblock .snakemake/palio.lock echo free > seen.txt"
    folder.edit_yaml("config/config.yaml", lambda config: config.update(notify=lock))
    controller.take_over(on_slurm=False)
    monkeypatch.delenv("PALIO_CONTROLLER")
    monkeypatch.delenv(RUN_VARIABLE)
    controller.end(Workflow(CONFIG), "finish", "every step is done")
    assert (folder.path / "seen.txt").read_text() == "free\n"
    assert "every step is done" in controller.last_run()


def test_failures_and_silence_are_told_once() -> None:
    failed = StepStatus("open", "failed", attempt=1, reason="crashed: the server died", log="open.log")
    silent = StepStatus("finetune", "running", attempt=1, node="a1", heard=0.0, log="finetune.log")
    entries = [EntryStatus("a100", "x", "team", [silent, failed])]
    watch = Watch(stalled_after=3600)
    assert watch.look(entries, now=60) == [("failure", "x: open: crashed: the server died (log: open.log)")]
    assert watch.look(entries, now=7200) == [
        ("stall", "x: finetune: no output for 120 min on a1 (log: finetune.log)")
    ]
    assert watch.look(entries, now=9999) == []


def test_a_job_that_will_not_start_by_itself_is_told_once() -> None:
    held = slurm.Job("12", "palio", "PENDING", Path(), "JobHeldUser", "rule_finetune", "a100")
    drained = replace(held, reason="Resources")
    assert held.obstacle(closed=[]) == "job 12 is held (JobHeldUser): scontrol release 12"
    assert drained.obstacle(closed=["rtx4090"]) == ""
    obstacle = drained.obstacle(closed=["a100"])
    assert obstacle == "job 12: no node of partition a100 takes jobs: sinfo -R says why"
    queued = StepStatus("finetune", "queued", obstacle=obstacle)
    watch = Watch(stalled_after=3600)
    entries = [EntryStatus("a100", "x", "team", [queued])]
    assert watch.look(entries, now=60) == [("stall", f"x: finetune: {obstacle}")]
    assert watch.look(entries, now=120) == []


def test_only_our_own_jobs_that_a_node_could_not_start_are_released_each_four_times_at_most(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    released: list[str] = []
    monkeypatch.setattr(slurm, "release", released.append)
    failed = slurm.Job("1", "palio_run", "PENDING", Path(), slurm.LAUNCH_FAILED, "rule_finetune", "a100")
    jobs = [
        failed,
        replace(failed, id="2", reason="JobHeldUser"),
        replace(failed, id="3", reason="JobHeldAdmin"),
        replace(failed, id="4", name="of another program"),
        replace(failed, id="5", state="RUNNING"),
    ]
    releases = Releases()
    at = [minute for minute in range(60) if _releases(releases, jobs, minute * 60.0, released)]
    assert set(released) == {"1"}
    assert at == [0, 1, 3, 7], "SLURM's own limit of five (MaxBatchRequeue) is not reached"


def _releases(releases: Releases, jobs: list[slurm.Job], now: float, released: list[str]) -> bool:
    before = len(released)
    releases.look(jobs, now)
    return len(released) > before


def test_the_organizers_command_gets_event_and_message(
    folder: WorkingFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.path)
    command = 'echo "$PALIO_COMPETITION $PALIO_EVENT: $PALIO_MESSAGE" >> news.txt'
    folder.edit_yaml("config/config.yaml", lambda config: config.update(notify=command))
    competition = load_competition(Path("config/config.yaml"))
    controller.notify(competition, "finish", "every step is done")
    assert (folder.path / "news.txt").read_text() == "demo finish: every step is done\n"


# --- status and overrides


def test_status_tells_every_state(folder: WorkingFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.path)
    folder.edit_yaml("config/config.yaml", lambda config: config.update(withdrawn={"untuned": "asked to"}))
    done = folder.path / "results/laptop/curated"
    workflow = Workflow(Path("config/config.yaml"))
    leave_shared_records(workflow)
    curate = BY_NAME["curate"]
    leave_record(
        curate, EntryFolder.at(done), curate.settings.of(workflow.planned("curated"), "curate"), workflow
    )
    with pytest.raises(Crashed), attempt("finetune", EntryFolder.at(folder.path / "results/laptop/raw")):
        raise Crashed("training diverged")
    ledger = done / "work/train/key/ledger.jsonl"
    ledger.parent.mkdir(parents=True)
    lines = [
        {"event": "start", "attempt": "1", "interval": 5},
        {"event": "beat", "attempt": "1", "seconds": 55},
    ]
    folder_of_step = EntryFolder.at(done)
    with attempt("finetune", folder_of_step):
        ledger.write_text("".join(json.dumps(line) + "\n" for line in lines))
        HeartbeatWriter(folder_of_step.heartbeat("finetune"), 40, "steps").beat(10, used_seconds=60)
        status = competition_status(Workflow(Path("config/config.yaml")))
    found = {(entry.entry, step.step): step for entry in status.entries for step in entry.steps}
    assert found["curated", "curate"].state == "done"
    running = found["curated", "finetune"]
    assert (running.state, running.used, running.budget) == ("running", 60, 600)
    heartbeat = read_heartbeat(folder_of_step.heartbeat("finetune"), since=0)
    assert heartbeat is not None
    assert running.ends == pytest.approx(heartbeat.time + 180, abs=1)  # 60 s for 10 steps of 40
    assert (found["curated", "open"].state, found["curated", "open"].wait) == ("waiting", "behind check")
    assert found["curated", "check"].wait == "for the next run"
    failed = found["raw", "finetune"]
    assert (failed.state, failed.reason) == ("failed", "crashed: training diverged")
    assert failed.log.endswith("results/laptop/raw/logs/finetune.log")
    assert found["untuned", "check"].state == "withdrawn"
    page = html_page(status)
    for text in ("training diverged", "asked to", "10 % used"):
        assert text in page


def test_status_keeps_the_reason_of_an_attempt_while_the_next_one_runs_in_its_own_budget(
    folder: WorkingFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.path)
    raw = EntryFolder.at(folder.path / "results/laptop/raw")
    with pytest.raises(Interrupted), attempt("finetune", raw):
        ledger = raw.training("of the first recipe").ledger
        ledger.parent.mkdir(parents=True)
        ledger.write_text('{"event": "start", "attempt": "1", "interval": 5}\n')
        raise Interrupted("the disk is full")
    os.utime(ledger, (1.0, 1.0))
    with attempt("finetune", raw):
        status = competition_status(Workflow(Path("config/config.yaml")))
    (step,) = (
        step
        for entry in status.entries
        for step in entry.steps
        if (entry.entry, step.step) == ("raw", "finetune")
    )
    assert (step.state, step.attempt, step.used, step.budget) == ("running", 2, None, 600)
    assert step.before == "attempt 1 ended, and it is tried again: interrupted: the disk is full"
    assert step.before in html_page(status)


def test_a_narrow_terminal_shows_one_line_for_each_entry() -> None:
    names = [step.name for step in STEPS if step.name != "image"]  # an entry without a Dockerfile
    done = [StepStatus(name, "done", seconds=60.0) for name in names[:3]]
    here = StepStatus(
        "finetune", "running", node="a100-node17.cluster", seconds=7200, used=7000, budget=86400
    )
    failed = StepStatus("finetune", "failed", reason="crashed: training diverged", log="finetune.log")
    behind = [StepStatus(name, "waiting", wait="behind finetune") for name in names[4:]]
    entries = [
        EntryStatus("rtx4090", f"entry_{number}", "team", [*done, (here, failed)[number % 2], *behind])
        for number in range(20)
    ]
    console = Console(width=80, file=io.StringIO())
    console.print(terminal_view(Status("demo", "Palio demo", 0.0, None, entries), console.width))
    assert isinstance(console.file, io.StringIO)
    heading, counts, track, *lines = console.file.getvalue().splitlines()
    assert (heading, track) == ("Palio demo", "rtx4090")
    assert counts == "20 entries: 10 running, 10 failed; no run in progress"
    assert lines[0] == "  entry_0   3/7  finetune: 8 % used, 2.0 h on a100-node17"
    assert lines[19] == "  entry_19  3/7  finetune: crashed"
    assert "…" not in console.file.getvalue()


def status_of_200() -> Status:
    """Entries of two tracks in turn; every tenth failed, and entry 7 runs."""
    entries = []
    for number in range(200):
        step = StepStatus("finetune", "waiting", wait="behind check")
        if number % 10 == 0:
            step = StepStatus(
                "finetune", "failed", reason="crashed: diverged", log="finetune.log", seconds=number
            )
        if number == 7:
            step = StepStatus("finetune", "running", node="a1", seconds=7200)
        track = ("a100", "rtx4090")[number % 2]
        entries.append(EntryStatus(track, f"e{number:03}", f"Contrada {number % 20}", [step]))
    return Status("demo", "Palio demo", 0.0, None, entries)


@pytest.mark.parametrize(
    ("selection", "shown"),
    [
        (Selection(), 200),
        (Selection(states=frozenset({"failed"})), 20),
        (Selection(states=frozenset({"failed", "running"})), 21),
        (Selection(states=frozenset({"failed"}), tracks=frozenset({"rtx4090"})), 0),
        (Selection(team="CONTRADA 19"), 10),
    ],
)
def test_the_status_of_200_entries_begins_with_their_number_and_shows_what_was_asked_for(
    selection: Selection, shown: int
) -> None:
    status = replace(status_of_200(), selection=selection)
    assert len(status.shown) == shown
    for width in (80, 160):
        console = Console(width=width, file=io.StringIO())
        console.print(terminal_view(status, width))
        assert isinstance(console.file, io.StringIO)
        text = console.file.getvalue()
        assert "200 entries: 179 waiting, 1 running, 20 failed" in " ".join(text.splitlines()[1:3])
        assert sum(f"e{number:03}" in text for number in range(200)) == shown


@pytest.mark.parametrize(("sort", "first"), [("track", "e000"), ("state", "e007"), ("seconds", "e007")])
def test_status_is_sorted_as_asked(sort: Any, first: str) -> None:
    status = replace(status_of_200(), selection=Selection(sort=sort))
    assert status.shown[0].entry == first
    if sort == "seconds":
        assert status.shown[1].entry == "e190"


def test_cost_counts_every_attempt_and_those_that_led_to_nothing(
    folder: WorkingFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.path)
    price = {"telemetry": {"usd_per_hour": {"laptop": 2.0}}}
    folder.edit_yaml("config/config.yaml", lambda config: config.update(price))

    def gpu(gigabytes: float | None) -> Workflow:
        track = {"gpu_memory_gb": gigabytes}
        folder.edit_yaml("config/config.yaml", lambda config: config["tracks"]["laptop"].update(track))
        return Workflow(Path("config/config.yaml"))

    def took(entry: str, step: str, number: int, begin: float, end: float, state: str) -> None:
        start = {"node": "a1", "pid": 1, "run": "r", "job": "1", "gpu": "0", "started": begin}
        lines = [{"event": "start", **start}, {"event": "end", "ended": end, "state": state, "reason": ""}]
        path = EntryFolder.at(folder.path / "results/laptop" / entry).attempts
        for line in lines if state else lines[:1]:
            append_json_line(path, {"step": step, "number": number, **line})

    hour = 3600.0
    took("curated", "curate", 1, 0, hour, "finished")
    took("curated", "finetune", 1, hour, 2 * hour, "interrupted")
    took("curated", "finetune", 2, 2 * hour, 5 * hour, "finished")
    took("raw", "finetune", 1, 0, 0, "")  # it died without a word; its next attempt began after two hours
    took("raw", "finetune", 2, 2 * hour, 3 * hour, "finished")
    workflow = gpu(None)
    total = costs(workflow, workflow.results, "step")[-1]
    assert (total.gpu_hours, total.cpu_hours, total.usd) == (0, 8, 14), "what no GPU did is no GPU's hours"
    workflow = gpu(24)
    finetune, curate, total = costs(workflow, workflow.results, "step")
    assert vars(finetune) == {
        "of": "finetune",
        "attempts": 4,
        "cpu_hours": 0,
        "gpu_hours": 7,
        "lost_gpu_hours": 3,
        "usd": 14,
    }
    assert (curate.of, curate.cpu_hours, curate.gpu_hours) == ("curate", 1, 0)
    assert (total.of, total.attempts, total.gpu_hours, total.cpu_hours) == ("in all", 5, 7, 1)
    by_entry = {row.of: row.gpu_hours for row in costs(workflow, workflow.results, "entry")}
    assert by_entry == {"curated": 4, "raw": 3, "in all": 7}
    assert (
        cost_table([finetune, total], "step").splitlines()[2]
        == "| finetune | 4 | 0.00 | 7.00 | 3.00 | 14.00 |"
    )


def test_status_tells_how_far_the_jobs_are_that_share_a_curation(
    folder: WorkingFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.path)
    shards = folder.path / "results/laptop/raw/work/shards"
    shards.mkdir(parents=True)
    for done in ("1.1-of-3", "1.2-of-3", "1.3-of-3", "1.joined", "2.2-of-3"):
        (shards / done).touch()
    status = competition_status(Workflow(Path("config/config.yaml")))
    (raw,) = (entry for entry in status.entries if entry.entry == "raw")
    (curate,) = (step for step in raw.steps if step.step == "curate")
    assert (curate.state, curate.reason) == ("waiting", "1 of 3 shards of phase 2 done")


def cli(*arguments: str) -> str:
    done = CliRunner().invoke(palio, arguments, standalone_mode=False)
    if done.exception:
        raise done.exception
    return done.output


def test_withdraw_and_retry_are_on_record_and_read_with_the_config(
    folder: WorkingFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.path)
    cli("withdraw", "raw", "--why", "the team asked to")
    cli("retry", "curated", "--step", "open")
    cli("retry", "curated", "--step", "open", "--step", "finetune")
    written = yaml.safe_load((folder.path / "config/overrides/demo.yaml").read_text())
    assert written == {
        "withdrawn": {"raw": "the team asked to"},
        "retries": {"curated": {"open": 2, "finetune": 1}},
    }
    competition = load_competition(Path("config/config.yaml"))
    assert competition.withdrawn == {"raw": "the team asked to"}
    plan = folder.plan()
    assert "raw" not in {entry for _, entry in plan}


def test_retry_without_a_step_takes_what_failed(
    folder: WorkingFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.path)
    with pytest.raises(BadInput, match="no step of raw has failed"):
        cli("retry", "raw")
    with pytest.raises(Crashed), attempt("open", EntryFolder.at(folder.path / "results/laptop/raw")):
        raise Crashed("the server died")
    assert "raw: open will start afresh" in cli("retry", "raw")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("withdraw", "nobody", "--why", "x"), "no entry has this id; use one of curated"),
        (("retry", "raw", "--step", "curate"), "runs again on its own"),
    ],
)
def test_a_wrong_decision_is_refused_and_nothing_is_written(
    folder: WorkingFolder, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], line: str
) -> None:
    monkeypatch.chdir(folder.path)
    with pytest.raises(BadInput, match=line):
        cli(*arguments)
    assert not (folder.path / "config/overrides").exists()


# --- engines


def test_a_stage_that_vllm_serves_needs_it_on_path(
    folder: WorkingFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    competition = load_competition(folder.path / CONFIG)
    assert list(engine_findings(competition)) == []
    stages = competition.stages
    open_stage = stages.open.model_copy(update={"engine": "vllm"})
    with_vllm = competition.model_copy(update={"stages": stages.model_copy(update={"open": open_stage})})
    monkeypatch.setenv("PATH", "/nowhere")
    (finding,) = engine_findings(with_vllm)
    assert str(finding).startswith(
        "FIX  vllm serves the packages: engine is 'vllm': there is no such program"
    )


# --- a job's Snakemake ---------------------------------------------------------------------------------


def job_with(**resources: int) -> SimpleNamespace:
    return SimpleNamespace(threads=2, resources=resources)


def test_a_job_starts_one_snakemake_in_its_step() -> None:
    snakemake = "python3 -m snakemake --target-jobs 'finetune:entry=a b' --mode remote"
    step = "python3 -m palio.operating.jobstep --cpus-per-task=2 --gpus=1 --nodes=1"
    made = hooks.as_one_step(f"cd there && {snakemake}", "python3", job_with(gpu=1))
    assert made == f"cd there && {step} {snakemake}"
    assert "--gpus" not in hooks.as_one_step(snakemake, "python3", job_with())
    with pytest.raises(WorkflowError, match="starts no Snakemake"):
        hooks.as_one_step("sh job.sh", "python3", job_with())


def test_the_step_is_given_what_it_asks_for_and_not_what_the_job_has(tmp_path: Path) -> None:
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/sh\nprintf "%s " "$@"; env')
    srun.chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_GPUS": "4", "SRUN_EXPORT": "no", "SLURM_CONF": "/c", "HF_HOME": "/h"}
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | job
    step = (
        sys.executable,
        "-m",
        "palio.operating.jobstep",
        "--nodes=1",
        "python",
        "-m",
        "snakemake",
        "-s",
        "a b",
    )
    told = subprocess.run(step, env=environment, capture_output=True, text=True, check=True).stdout
    arguments, *lines = told.splitlines()
    assert arguments.startswith("--ntasks=1 --cpu-bind=q --nodes=1 python -m snakemake -s a b ")
    known = dict(line.partition("=")[::2] for line in [arguments.rpartition(" ")[2], *lines])
    assert {name: known.get(name) for name in job} == job | {"SLURM_GPUS": None, "SRUN_EXPORT": None}


# --- when the controller asks SLURM ----------------------------------------------------------------------


def slept(due: float, at_least: float = 0.0) -> float:
    """Seconds that the SLURM executor sleeps where the next look is due in so many."""
    settings = SimpleNamespace(init_seconds_before_status_checks=at_least)
    executor = SimpleNamespace(
        next_seconds_between_status_checks=due,
        workflow=SimpleNamespace(executor_settings=settings),
        last_end=hooks.last_end(),
    )
    before = time.monotonic()
    asyncio.run(hooks.until_a_job_ends(executor))
    return time.monotonic() - before


@pytest.fixture
def soon(folder: WorkingFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.path)
    ENDED.parent.mkdir()
    monkeypatch.setattr(hooks, "ENDING_SECONDS", 0.4)
    monkeypatch.setattr(hooks, "GLANCE_SECONDS", 0.1)


@pytest.mark.usefixtures("soon")
def test_slurm_is_asked_when_it_is_due_or_once_a_job_has_ended() -> None:
    assert slept(0.5) >= 0.5
    mark = "from palio.operating.controller import mark_end\nmark_end()"
    with subprocess.Popen([sys.executable, "-c", mark]):
        assert slept(600.0) < 300.0


@pytest.mark.usefixtures("soon")
def test_it_is_asked_no_sooner_than_the_profile_says() -> None:
    with subprocess.Popen(["sh", "-c", f"sleep 0.3; touch {ENDED}"]):
        assert 1.5 <= slept(600.0, at_least=1.5) < 300.0
    assert slept(0.0, at_least=0.5) >= 0.5


@pytest.mark.usefixtures("soon")
def test_it_is_asked_after_the_last_of_several_ends_and_never_later_than_it_was_due() -> None:
    def ends(often: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen(["sh", "-c", f"for one in $(seq {often}); do touch {ENDED}; sleep 0.1; done"])

    with ends(8) as program:
        slept(600.0)
        assert program.poll() is not None
    with ends(50) as program:
        slept(0.3)
        assert program.poll() is None
