"""A stage of one entry through real HELM, against a server whose answers and defects the test chooses."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from palio.answers.reading import helm_folder
from palio.config import Probe
from palio.errors import Crashed, RuleViolation, State
from palio.evaluation.earlier import includes
from palio.evaluation.evaluate import UsedTime, Watch
from palio.evaluation.helm import instance_answers, log_error, public_error, run_folders
from palio.evaluation.journal import JournalReader
from palio.evaluation.stage import StagePlan, prepare_stage
from palio.heartbeat import HeartbeatWriter, read_heartbeat
from palio.layout import EntryFolder, HelmFolder
from palio.records import AskedQuestions, PackageManifest, ProbeReport, StageRecord, read_record
from palio.serving.process import ServerProcess
from palio.settings import StageRuns
from tests.support.breaking import ANSWERED, break_in_mid_stage
from tests.support.entry import packaged_entry, run_stage, scenario
from tests.support.serving import one_core
from tests.support.toy import Toy

pytestmark = pytest.mark.timeout(900)
SMALL, LARGE = 4, 40


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evaluate")


@pytest.fixture(autouse=True)
def at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    monkeypatch.setattr("palio.evaluation.evaluate.PROGRESS_SECONDS", 2.0)


@pytest.fixture(scope="module")
def stage(home: Path) -> StageRuns:
    """HELM's own made-up tasks, which need no data."""
    scenarios = {
        mode: scenario(home / f"{mode}.conf", f"synthetic_reasoning:mode={mode}", instances=count)
        for mode, count in (("pattern_match", SMALL), ("variable_substitution", LARGE))
    }
    return StageRuns(competition="test", stage="open", closed_store="closed", scenarios=scenarios)


@pytest.fixture(scope="module", autouse=True)
def helm_seconds(home: Path, stage: StageRuns) -> float:
    """What HELM takes on this machine now to make the instances of the stage."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        started = time.monotonic()
        prepare_stage(stage, home / "stage.json")
    return time.monotonic() - started


def run(stage: StageRuns, entry_dir: Path, *toys: Toy, engine: str = "", **limits: Any) -> StageRecord:
    return run_stage(stage, Path("stage.json"), entry_dir, *toys, engine=engine, **limits)


def test_the_limit_stops_the_asking_and_a_rerun_asks_only_the_rest(
    stage: StageRuns, helm_seconds: float, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    limit = min(60, round(5 + 2 * helm_seconds))
    entry_dir = packaged_entry(tmp_path)
    slow = Toy(hangs_after=SMALL + 6)
    started = time.monotonic()
    stopped = run(stage, entry_dir, slow, time_limit=limit)
    assert limit <= time.monotonic() - started < 2 * limit

    small, large = stopped.runs
    assert (small.state, small.answered) == (State.FINISHED, SMALL)
    assert large.state is stopped.state is State.TIME_LIMIT
    assert large.answered == 6
    assert large.reason == f"{LARGE - 6} unanswered: the stage's limit ran out"
    shown = capfd.readouterr().err
    assert "of 44 requests answered, " in shown
    assert f" of {limit} s used, end expected at " in shown
    heartbeat = read_heartbeat(EntryFolder.at(entry_dir).heartbeat("open"), since=0)
    assert heartbeat is not None
    assert (heartbeat.done, heartbeat.total) == (SMALL + 6, SMALL + LARGE)

    nobody = Toy()
    scored = run(stage, entry_dir, nobody, time_limit=limit, unanswered="wrong")
    assert nobody.served == 0, "the limit is used up"
    assert [one.state for one in scored.runs] == [State.FINISHED] * 2
    assert scored.runs[1].answered == 6
    assert scored.state is State.TIME_LIMIT
    values = pq.read_table(entry_dir / "helm/open/metrics.parquet").to_pylist()
    exact = [row for row in values if row["metric"] == "exact_match"]
    assert sum(row["n"] for row in exact) == SMALL + LARGE
    assert {row["value"] for row in exact} == {0}, "what is not answered is wrong"

    fast = Toy()
    whole = run(stage, entry_dir, fast, time_limit=600)
    assert fast.served == LARGE - 6
    assert (whole.state, [one.answered for one in whole.runs]) == (State.FINISHED, [SMALL, LARGE])


def test_a_package_evaluated_twice_gives_the_same_records_and_tables(
    stage: StageRuns, tmp_path: Path
) -> None:
    first, second = (packaged_entry(tmp_path / name) for name in ("first", "second"))
    for entry_dir in (first, second):
        run(stage, entry_dir, Toy())
    for file in ("open.json", "helm/open/metrics.parquet", "helm/open/instances.parquet"):
        assert (first / file).read_bytes() == (second / file).read_bytes()


def test_another_engine_is_asked_everything_again(stage: StageRuns, tmp_path: Path) -> None:
    entry_dir = packaged_entry(tmp_path)
    first, same, other = Toy(), Toy(), Toy()
    run(stage, entry_dir, first, engine="transformers 5.1.0")
    assert run(stage, entry_dir, same, engine="transformers 5.1.0").engine == "transformers 5.1.0"
    assert run(stage, entry_dir, other, engine="vllm 0.33.0").engine == "vllm 0.33.0"
    assert (first.served, same.served, other.served) == (SMALL + LARGE, 0, SMALL + LARGE)


def test_a_stage_that_gets_more_questions_asks_only_these(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The questions that a run had are among those of the same run with a larger number, and the journal has
    their answers: nobody is asked twice, and the score is that of who was asked them all at once."""
    monkeypatch.chdir(tmp_path)

    def closed_stage(instances: int, record: str) -> StageRuns:
        of = scenario(tmp_path / "run.conf", "synthetic_reasoning:mode=pattern_match", instances=instances)
        runs = StageRuns(
            competition="test", stage="closed", closed_store=str(tmp_path / "closed"), scenarios={"s": of}
        )
        prepare_stage(runs, tmp_path / record)
        return runs

    def asked(stage: StageRuns, record: str, name: str) -> tuple[int, StageRecord]:
        toy = Toy(answer=lambda prompt: str(len(prompt) % 7))
        made = run_stage(stage, tmp_path / record, packaged_entry(tmp_path, name), toy)
        return toy.served, made

    few = closed_stage(5, "few.json")
    served, _ = asked(few, "few.json", "acme")
    assert served == 5
    (work,) = EntryFolder.at(tmp_path / "results/laptop/acme", few.closed).helm_runs("closed").iterdir()
    before = UsedTime(HelmFolder(work).used_seconds).used
    assert before > 0
    more = closed_stage(12, "more.json")
    served, _ = asked(more, "more.json", "acme")
    assert served == 12 - 5
    folder = EntryFolder.at(tmp_path / "results/laptop/acme", few.closed)
    (new,) = set(folder.helm_runs("closed").iterdir()) - {work}
    assert UsedTime(HelmFolder(new).used_seconds).used > before, "the limit is for all questions"
    served, _ = asked(more, "more.json", "bcme")
    assert served == 12
    values = [
        pq.read_table(tmp_path / f"results/laptop/{name}/helm/closed/instances.parquet").drop(["entry"])
        for name in ("acme", "bcme")
    ]
    assert values[0].equals(values[1])
    assert values[0].num_rows > 0


def test_answers_to_other_questions_are_not_taken_over() -> None:
    before = AskedQuestions(answering="a", questions={"mmlu": 5, "bbq": 5}, data={"mmlu.csv": "1"})

    def includes_them(**changes: object) -> bool:
        return includes(before.model_copy(update=changes), before)

    assert includes_them(questions={"mmlu": 8, "bbq": 5, "math": 3}, data={"mmlu.csv": "1", "math.csv": "2"})
    assert not includes_them(questions={"mmlu": 80, "bbq": 4})
    assert not includes_them(questions={"mmlu": 80})
    assert not includes_them(answering="b")
    assert not includes_them(data={"mmlu.csv": "2"})


def test_a_server_that_ignores_stop_sequences_is_cut_and_counted(stage: StageRuns, tmp_path: Path) -> None:
    toy = Toy("ignores stops", answer=lambda prompt: "one two\nand more")
    entry_dir = packaged_entry(tmp_path)
    assert run(stage, entry_dir, toy).completions_cut == SMALL + LARGE

    runs = helm_folder(EntryFolder.at(entry_dir), "open")
    cut = frozenset(answer.key for answer in JournalReader(runs.journal).answers() if answer.cut)
    read = [one for folder in run_folders(runs) for one in instance_answers(folder, cut)]
    assert len(read) == SMALL + LARGE, "people read what HELM wrote"
    assert {(reply.text.strip(), reply.cut) for one in read for reply in one.replies if reply.text} == {
        ("one two", True)
    }
    marks = [{value for (name, *_), value in one.values.items() if name == "exact_match"} for one in read]
    assert marks == [{0}] * len(read)
    assert all(any(reference.correct for reference in one.references) for one in read)


def test_a_package_of_less_context_is_shown_fewer_examples(stage: StageRuns, tmp_path: Path) -> None:
    """Its server would cut the end of the prompt, which is the question."""
    entry_dir = packaged_entry(tmp_path)
    package = read_record(PackageManifest, entry_dir / "package.json")
    package.model_copy(update={"context": 240}).write(entry_dir / "package.json")
    runs = {each.scenario: each for each in run(stage, entry_dir, Toy("short of room")).runs}
    assert runs["variable_substitution"].prompts_short > LARGE // 2


def test_a_server_that_does_not_conform_is_named_before_helm_starts(stage: StageRuns, tmp_path: Path) -> None:
    entry_dir = packaged_entry(tmp_path)
    with pytest.raises(RuleViolation, match=r"check same_answer: . different answers to 5 equal requests"):
        run(stage, entry_dir, Toy("samples at 0"), probe=Probe())
    assert read_record(ProbeReport, entry_dir / "probe.json").failed == ["same_answer"]
    assert not list(entry_dir.glob("work/helm/open/*/helm.log"))


def test_a_refused_request_is_one_unanswered_question(stage: StageRuns, tmp_path: Path) -> None:
    entry_dir = packaged_entry(tmp_path)
    refusing = Toy(refuses=lambda number: number == 4)
    refusing.contained = {"HTTP 500 of the server's own": 1}
    why = r"1 of 2 HELM runs failed; first .*: 1 unanswered: HTTP 500.*; of the server: 1 × HTTP 500 of"
    with pytest.raises(Crashed, match=why):
        run(stage, entry_dir, refusing)

    refusing_again = Toy(refuses=lambda number: True)
    refusing_again.contained = {"HTTP 500 of the server's own": 2}
    scored = run(stage, entry_dir, refusing_again, unanswered="wrong")
    assert scored.state is State.FINISHED
    assert scored.contained == refusing_again.contained
    assert sum(one.answered for one in scored.runs) == SMALL + LARGE - 1

    mended = Toy()
    assert sum(one.answered for one in run(stage, entry_dir, mended).runs) == SMALL + LARGE
    assert (refusing_again.served, mended.served) == (1, 1)


def test_a_dead_server_ends_the_stage_at_once_with_its_last_words(
    stage: StageRuns, helm_seconds: float, tmp_path: Path
) -> None:
    started = time.monotonic()
    with pytest.raises(Crashed) as death:
        run(stage, packaged_entry(tmp_path), Toy("dies after 20 requests"))
    assert time.monotonic() - started < 15 + 4 * helm_seconds, "HELM alone would try for minutes"
    assert "the model server died with exit code 1, its last lines: loading | ToyError: out of words" in str(
        death.value
    )


def test_a_server_that_dies_is_started_again_and_asked_only_the_rest(
    stage: StageRuns, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    entry_dir = packaged_entry(tmp_path)
    dying, healthy = Toy("dies after 20 requests"), Toy()
    whole = run(stage, entry_dir, dying, healthy)
    assert (whole.state, [one.answered for one in whole.runs]) == (State.FINISHED, [SMALL, LARGE])
    assert SMALL + LARGE - 20 <= healthy.served < SMALL + LARGE
    told = capfd.readouterr().err
    assert "the model server died with exit code 1, its last lines: loading | ToyError: out of words" in told
    assert "out of words; it is started again" in told


def test_a_server_that_keeps_dying_is_given_up(stage: StageRuns, tmp_path: Path) -> None:
    toys = [Toy("dies after 10 requests") for _ in range(4)]
    with pytest.raises(Crashed, match="the model server died"):
        run(stage, packaged_entry(tmp_path), *toys)
    assert [toy.served > 0 for toy in toys] == [True, True, True, False]


def test_seconds_with_a_dead_server_are_not_the_entrys(stage: StageRuns, tmp_path: Path) -> None:
    watch = Watch(
        HelmFolder(tmp_path),
        StagePlan(stage.store),
        600,
        UsedTime(tmp_path / "used.json"),
        (toy := Toy()),
        HeartbeatWriter(tmp_path / "heartbeat.json", 1, "requests"),
    )
    assert watch(1.0)
    toy.dead = True
    assert not watch(1.9)
    assert watch.alive_seconds == 1.0


AGING = """
import pathlib
from palio.cli import main
from palio.serving.model import TreeModel

forward = TreeModel.forward

def forward_until_broken(model, chunks):
    if pathlib.Path({broken!r}).exists():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    return forward(model, chunks)

TreeModel.forward = forward_until_broken
main()
"""
"""`palio serve` on a device that breaks as soon as a file is there."""


@pytest.mark.parametrize("how", ["killed", "its device is broken"])
def test_a_real_server_that_breaks_ends_the_stage_in_seconds_and_the_next_start_asks_only_the_rest(
    how: str, stage: StageRuns, package: Path, helm_seconds: float, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"

    def start(log: Path) -> ServerProcess:
        server = one_core(package)(log)
        server._command[1:3] = ["-c", AGING.format(broken=str(broken))]
        broken.unlink(missing_ok=True)
        return server

    def break_it(server: ServerProcess) -> None:
        if how == "killed":
            os.kill(server.pid, signal.SIGKILL)
        else:
            broken.touch()

    seen = break_in_mid_stage(stage, Path("stage.json"), packaged_entry(tmp_path), start, break_it)
    assert seen.over_after < 15 + 2 * helm_seconds
    assert 0 < seen.used <= seen.alive + 2, "seconds with a dead server are not the entry's"
    assert 0 < seen.asked_again <= SMALL + LARGE - ANSWERED
    assert (seen.whole.state, [one.answered for one in seen.whole.runs]) == (State.FINISHED, [SMALL, LARGE])


def test_the_log_tells_the_error_of_the_run_that_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "helm.log").write_text(
        "2026-01-01 INFO Error when running gsm:max_eval_instances=2,model=palio_entry,groups=palio_GSM8K:\n"
        "Traceback (most recent call last):\n"
        "ValueError: no train file\n"
        "2026-01-01 INFO Error when running mmlu:subject=anatomy,max_eval_instances=2,model=palio_entry:\n"
        "Traceback (most recent call last):\n"
        "helm.common.cache.CacheError: broken\n"
        "helm.benchmark.runner.RunnerError: Failed runs: [gsm, mmlu]\n"
    )
    folder = HelmFolder(tmp_path)
    assert log_error(folder, "gsm") == "ValueError: no train file"
    assert log_error(folder, "mmlu:subject=anatomy") == "helm.common.cache.CacheError: broken"
    assert log_error(folder, "bbq") == ""
    assert public_error(log_error(folder)) == "CacheError"


def test_a_check_that_is_raised_later_is_made_although_everything_is_answered(
    stage: StageRuns, tmp_path: Path
) -> None:
    entry_dir = packaged_entry(tmp_path)
    run(stage, entry_dir, Toy("never echoes"), probe=Probe())
    again = Toy("never echoes")
    with pytest.raises(RuleViolation, match="the server fails the check echo_prompt"):
        run(stage, entry_dir, again, probe=Probe(echo_prompt="required"))
    mended = Toy()
    whole = run(stage, entry_dir, mended, probe=Probe(echo_prompt="required"))
    assert sum(one.answered for one in whole.runs) == SMALL + LARGE
    assert mended.served < 120, "it is probed, and asked no question again"
