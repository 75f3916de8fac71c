"""The kinds of servers that teams of 2023 handed in: what is said of each, what it costs, and that the honest
ones answer every question, through real HELM."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import requests
import uvicorn

from palio.config import Isolation, Probe, ServerProgram, Track, load_competition
from palio.errors import Crashed, RuleViolation, State
from palio.evaluation.evaluate import evaluate
from palio.evaluation.probe import CHECKS, Asked, probe, speed
from palio.evaluation.stage import prepare_stage
from palio.evaluation.window import Window
from palio.layout import BaseModelFolder, EntryFolder
from palio.operating.attempt import attempt
from palio.packaging.server import package_server
from palio.records import ProbeReport, StepFailure, read_record
from palio.sandbox.gateway import Gateway
from palio.sandbox.room import Limits
from palio.sandbox.server import ConfinedServer, team_server
from palio.settings import EvaluateSettings, PackageSettings, StageLimits, StageRuns
from tests.support.entry import packaged_entry, scenario
from tests.support.folder import ROOT
from tests.support.kinds import (
    DEAD,
    GARBLED,
    HONEST,
    SPOKEN,
    UNFIT,
    Dead,
    Kind,
    Serving,
    Speak,
    Switchboard,
    speaking,
)

pytestmark = pytest.mark.timeout(600)
LONG = 3
"""Questions of more than 4 000 tokens."""
SHORT = 2 * len(HONEST)


@dataclass
class Running:
    """A server of a kind, as `evaluate` sees it."""

    base_url: str

    def alive(self) -> bool:
        return True

    def exit_code(self) -> None:
        return None


@contextmanager
def served(app: Any) -> Iterator[Running]:
    server = uvicorn.Server(
        uvicorn.Config(app, "127.0.0.1", 0, log_level="critical", lifespan="off", interface="asgi3")
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield Running(f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}")
    finally:
        server.should_exit = server.force_exit = True
        thread.join(5)


@pytest.fixture(scope="module")
def window(base_model: Path) -> Window:
    return Window.of_model(base_model)


def probed(
    kind: Kind, window: Window, settings: Probe | None = None, asked: Asked | None = None
) -> ProbeReport:
    with served(kind.server(window.count).app) as server:
        return probe(server.base_url, asked or Asked(), window, settings)


# --- what the probe says of each -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*HONEST, *UNFIT], ids=lambda kind: kind.name)
def test_a_kind_is_named_with_its_cost_and_its_fix(kind: Kind, window: Window) -> None:
    report = probed(kind, window)
    failed = {check.name: check for check in report.checks if check.state == "fail"}
    assert set(failed) == set(kind.told)
    for name, (why, cost, fix) in kind.told.items():
        assert why in failed[name].why
        assert cost in failed[name].cost
        assert fix in failed[name].fix
        assert failed[name].required == (kind in UNFIT)
    assert report.conforms == (kind in HONEST)
    assert not report.died
    assert [check.name for check in report.checks] == [*(check.name for check in CHECKS), speed.__name__]


def test_a_reply_that_lacks_everything_is_named_once() -> None:
    (kind,) = (kind for kind in UNFIT if kind.name == "AnswersNothing")
    report = probed(kind, Window.estimate("none"))
    assert report.failed == ["answers"]
    states = Counter(check.state for check in report.checks)
    assert states["unknown"] > 10, "it cannot tell whether the others pass"


# --- how it is said --------------------------------------------------------------------------------------

ANSWERS = Probe(**{**dict.fromkeys(Probe.model_fields, "skip"), "answers": "required"})


@contextmanager
def behind_the_gateway(speak: Speak) -> Iterator[str]:
    """What a confined server is reached by."""
    with speaking(speak) as port:
        connect = partial(socket.create_connection, ("127.0.0.1", port))
        with Gateway(connect, Counter()) as gateway:
            yield gateway.base_url


@pytest.mark.parametrize("how", SPOKEN)
def test_http_as_servers_speak_it_passes_and_changes_no_letter(how: str) -> None:
    with speaking(SPOKEN[how]) as port, behind_the_gateway(SPOKEN[how]) as confined:
        for url in (confined, f"http://127.0.0.1:{port}"):
            assert probe(url, Asked(), Window.estimate("none"), ANSWERS).conforms
        assert requests.post(f"{confined}/process", json={"prompt": ""}, timeout=60).json()["text"] == "naïve"


@pytest.mark.parametrize("how", GARBLED)
def test_a_reply_that_is_none_is_told_as_what_it_is(how: str) -> None:
    speak, why, fix = GARBLED[how]
    with behind_the_gateway(speak) as url:
        (check,) = probe(url, Asked(), Window.estimate("none"), ANSWERS).checks
    assert (check.state, check.why) == ("fail", why)
    assert fix in check.fix


# --- what the competition makes of it ------------------------------------------------------------------


def test_a_competition_raises_a_check_or_switches_it_off(window: Window) -> None:
    (kind,) = (kind for kind in HONEST if kind.name == "FailsAtTemperature0")
    assert not probed(kind, window, Probe(temperature_0="required")).conforms
    without = probed(kind, window, Probe(temperature_0="skip"))
    assert without.conforms
    assert "temperature_0" not in [check.name for check in without.checks]


def test_echoes_and_log_probabilities_are_required_where_choices_are_ranked_by_them(window: Window) -> None:
    ranking = Asked(kinds=[{"echo_prompt": True, "max_new_tokens": 0}])
    for name in ("HasOneLogProbability", "HasNaN", "AnswersTextAlone"):
        (kind,) = (kind for kind in HONEST if kind.name == name)
        report = probed(kind, window, asked=ranking)
        assert not report.conforms, name
    constant = next(check for check in report.checks if check.name == "log_probabilities")
    assert constant.required
    assert "arbitrary" in constant.cost
    assert probed(HONEST[0], window, asked=ranking).failed == []


def test_2023_took_what_sampled_or_failed_under_load_and_the_demo_takes_less(
    window: Window, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    taken: dict[str, set[str]] = {}
    for edition in ("neurips2023", "neurips2023_open", "neurips2023_hidden", "neurips2023_fair", "config"):
        settings = load_competition(Path(f"config/{edition}.yaml")).probe
        taken[edition] = {name for name, level in settings if level == "required"}
    assert taken["neurips2023"] == {"answers", "any_prompt"}
    assert taken["neurips2023"] == taken["neurips2023_open"] == taken["neurips2023_hidden"]
    default = {name for name, level in Probe() if level == "required"}
    assert (
        taken["neurips2023_fair"] == default == {"answers", "same_answer", "parallel_requests", "any_prompt"}
    )
    assert taken["config"] > default


def test_every_check_can_be_set() -> None:
    assert [*Probe.model_fields] == [*(check.name for check in CHECKS), speed.__name__]


# --- through HELM --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StageRuns]:
    """Short questions for every kind, and some of more than 4 000 tokens."""
    home = tmp_path_factory.mktemp("stage")
    questions = home / "long.jsonl"
    words = "Siena has seventeen contrade and each of them has a fountain . "
    lines = [{"q": f"Question {n}: {words * 400}", "a": "one"} for n in range(LONG)]
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    scenarios = {
        "short": scenario(home / "short.conf", "synthetic_reasoning:mode=pattern_match", instances=SHORT),
        "long": scenario(
            home / "long.conf",
            f"palio_table:name=long,data={questions},question=q,answer=a,examples=0,max_tokens=5",
            instances=LONG,
        ),
    }
    runs = StageRuns(competition="test", stage="open", closed_store="closed", scenarios=scenarios)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        prepare_stage(runs, home / "stage.json")
        yield runs


def settings_of(stage: StageRuns, **given: Any) -> EvaluateSettings:
    limits = StageLimits(time_limit=600, threads=8)
    track = Track(title="t", ram_gb=4, training_budget="600s")
    return EvaluateSettings(competition_id="test", runs=stage, limits=limits, track=track, **given)


def test_the_honest_ones_answer_every_question_and_no_prompt_is_lost(
    stage: StageRuns, window: Window, base_model: Path, tmp_path: Path
) -> None:
    """One run of HELM, whose prompts go round the kinds; those over the window among them."""
    kinds: dict[str, Serving] = {kind.name: kind.server(window.count) for kind in HONEST}
    board = Switchboard(kinds)
    folder = EntryFolder.at(packaged_entry(tmp_path))
    skipped = Probe(**dict.fromkeys(Probe.model_fields, "skip"))  # of each kind above

    @contextmanager
    def start(log: Path) -> Iterator[Running]:
        with served(board.app) as server:
            yield server

    record = evaluate(
        folder, settings_of(stage, probe=skipped), Path("stage.json"), start, Window.of_model(base_model)
    )
    assert record.state is State.FINISHED
    assert {run.scenario: run.answered for run in record.runs} == {"short": SHORT, "long": LONG}
    shares = Counter(board.asked.values())
    assert min(shares[name] for name in kinds) >= 2, "every kind was asked"
    assert set(board.paths) == {"/process"}, "HELM needs no other endpoint"

    long = [body["prompt"] for body in board.bodies if body["max_new_tokens"] == 5]
    assert len(long) == LONG
    for prompt in long:
        assert "seventeen contrade" in prompt
        assert 2000 <= window.count(prompt) <= 2048 - 5, "as much of it as fits in the window"
    assert sum(run.prompts_cut for run in record.runs) == LONG


# --- servers that end ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dead", DEAD, ids=lambda dead: dead.name)
def test_a_server_that_ends_is_crashed_with_its_own_last_lines_and_log(
    dead: Dead, stage: StageRuns, tiny: Path, tmp_path: Path
) -> None:
    files = tmp_path / "files"
    files.mkdir()
    (files / "main.py").write_text(dead.program)
    folder = EntryFolder.at(tmp_path / "results/laptop/acme")
    program = ServerProgram(run="python main.py", files=str(files))
    packaging = PackageSettings(competition_id="test", base_model_id="tiny", adapter=False, server=program)
    package_server(program, folder, packaging, BaseModelFolder(tiny))

    def start(log: Path) -> ConfinedServer:
        return team_server(
            folder.package,
            base_model=tiny / "model",
            limits=Limits(memory=2 << 30, processes=128, scratch=64 << 20, output=64 << 20, cpus=1),
            isolation=Isolation(),
            log=log,
            work=folder.work,
            ready_seconds=60,
        )

    with pytest.raises(Crashed), attempt("open", folder):
        evaluate(folder, settings_of(stage), Path("stage.json"), start, Window.of_model(tiny / "model"))
    failure = read_record(StepFailure, folder.failure("open"))
    assert failure.state is State.CRASHED
    for part in dead.told:
        assert part in failure.reason
    assert failure.log is not None
    assert re.search(r"work/helm/open/\w+/server\.log$", failure.log)
    assert Path(failure.log).is_file()


def test_an_unfit_server_is_refused_with_the_check_and_the_fix(
    stage: StageRuns, window: Window, base_model: Path, tmp_path: Path
) -> None:
    folder = EntryFolder.at(packaged_entry(tmp_path))
    (kind,) = (kind for kind in UNFIT if kind.name == "PicksATemplate")

    @contextmanager
    def start(log: Path) -> Iterator[Running]:
        with served(kind.server(window.count).app) as server:
            yield server

    with pytest.raises(RuleViolation, match=r"fails the check same_answer: .* equal requests.*at random"):
        evaluate(folder, settings_of(stage), Path("stage.json"), start, Window.of_model(base_model))
    assert read_record(ProbeReport, folder.probe).failed == ["same_answer"]
