"""`palio answers --helm`: HELM's own viewer shows the open runs of all entries."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helm.benchmark.adaptation.adapter_spec import AdapterSpec
from helm.benchmark.adaptation.request_state import RequestState
from helm.benchmark.adaptation.scenario_state import ScenarioState
from helm.benchmark.metrics.metric import PerInstanceStats
from helm.benchmark.metrics.metric_name import MetricName
from helm.benchmark.metrics.statistic import Stat
from helm.benchmark.run_spec import RunSpec
from helm.benchmark.scenarios.scenario import CORRECT_TAG, Input, Instance, Output, Reference, ScenarioSpec
from helm.common.codec import to_json
from helm.common.request import GeneratedOutput, Request, RequestResult

from palio.answers.reading import helm_folder
from palio.answers.viewer import write_helm_suite
from palio.errors import BadInput
from palio.layout import EntryFolder, HelmSuite, Results
from tests.support.helm_runs import leave_runs, question, right
from tests.support.report import HOSTILE, SCENARIOS, competition, leave_entry, write_entries

ASKED = 4
CORRECT = {"curated": 3, "raw": 1}


def leave_helm_runs(folder: EntryFolder, correct: int) -> None:
    """Runs in all of HELM's own detail: the first so many right, the last question unanswered."""
    leave_runs(folder, "open", dict.fromkeys(SCENARIOS["open"], ASKED), lambda scenario, number: None)
    for run in helm_folder(folder, "open").runs.glob("*"):
        scenario = run.name.partition(":")[0]
        adapter = AdapterSpec(method="generation", model="palio/entry", model_deployment="palio/entry")
        answers = [right(n) if n < correct else f"{HOSTILE} {n}" for n in range(ASKED - 1)]
        spec = RunSpec(
            name=f"{scenario}:max_eval_instances={ASKED},model=palio_entry,groups=palio_{scenario}",
            scenario_spec=ScenarioSpec("helm.benchmark.scenarios.simple_scenarios.Simple1Scenario"),
            adapter_spec=adapter,
            metric_specs=[],
            groups=["helms_own", f"palio_{scenario}"],
        )
        states = [_state(scenario, number, text) for number, text in enumerate([*answers, None])]
        name = MetricName("em", split="test")
        marks = [Stat(name).add(float(number < correct)) for number in range(ASKED)]
        whole = Stat(name).add(correct / ASKED)
        for file, content in {
            "run_spec": spec,
            "scenario_state": ScenarioState(adapter, states),
            "stats": [whole],
            "per_instance_stats": [PerInstanceStats(f"id{n}", None, 0, [one]) for n, one in enumerate(marks)],
        }.items():
            (run / f"{file}.json").write_text(to_json(content))


def _state(scenario: str, number: int, text: str | None) -> RequestState:
    asked = Instance(
        Input(text=question(scenario, number)),
        [Reference(Output(text=right(number)), tags=[CORRECT_TAG])],
        split="test",
        id=f"id{number}",
    )
    given = [] if text is None else [GeneratedOutput(text=text, logprob=-1.0, tokens=[])]
    error = "HTTP 500" if text is None else None
    result = RequestResult(
        success=text is not None, embedding=[], completions=given, cached=False, error=error
    )
    request = Request(model="palio/entry", model_deployment="palio/entry", prompt=question(scenario, number))
    return RequestState(
        instance=asked,
        reference_index=None,
        request_mode=None,
        train_trial_index=0,
        output_mapping=None,
        request=request,
        result=result,
        num_train_instances=0,
        prompt_truncated=False,
    )


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Results:
    monkeypatch.chdir(tmp_path)
    write_entries(tmp_path, [*CORRECT, "late"])
    found = Results(tmp_path / "results")
    for name, correct in CORRECT.items():
        leave_entry(tmp_path, name, trained=False)
        leave_helm_runs(found.entry("laptop", name), correct)
    return found


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_helm_summarizes_and_exports_the_runs_of_all_entries(results: Results, tmp_path: Path) -> None:
    suite = HelmSuite(tmp_path / "for helm")
    summarize, serve, export = write_helm_suite(competition(tmp_path, withdrawn={}), results, suite)
    assert export == f"{serve} --export-path '{tmp_path}/for helm/static'"
    for command in (summarize, export):
        program, *arguments = shlex.split(command)
        done = subprocess.run(
            [Path(sys.executable).with_name(program), *arguments], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
    runs = suite.export / "benchmark_output/runs/demo"
    (table,) = (table for table in read(runs / "groups/stage.json") if table["title"] == "First column")
    rows = {row[0]["value"]: [cell["value"] for cell in row[2:]] for row in table["rows"]}
    assert rows == {"curated": [0.75, 0.75], "raw": [0.25, 0.25]}
    (run,) = runs.glob(f"{SCENARIOS['open'][0]}:*model=laptop_raw*")
    said = [one["predicted_text"] for one in read(run / "display_predictions.json")]
    assert said == [right(0), f"{HOSTILE} 1", f"{HOSTILE} 2", "[unanswered: HTTP 500]"]


def test_what_is_no_suite_stays_and_nothing_to_show_is_told(results: Results, tmp_path: Path) -> None:
    given = competition(tmp_path, withdrawn={})
    with pytest.raises(BadInput, match="entries: already exists; name another folder"):
        write_helm_suite(given, results, HelmSuite(tmp_path / "entries"))
    assert {path.stem for path in (tmp_path / "entries").iterdir()} == {*CORRECT, "late"}
    with pytest.raises(BadInput, match="no entry has a run of the open stage; ask once an entry has run it"):
        write_helm_suite(given, Results(tmp_path / "nothing"), HelmSuite(tmp_path / "suite"))
