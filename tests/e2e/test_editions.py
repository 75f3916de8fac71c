"""Both editions, all scenarios, on the data at hand: who knows the answers gets 1, who knows none gets 0."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow.parquet as pq
import pytest

from palio.config import Competition
from palio.evaluation.stage import prepared_prompts
from palio.layout import EntryFolder
from palio.records import Cell, StageInstances, StageRecord, read_record
from palio.scoring.columns import scored_metrics, stage_cells
from palio.settings import StageRuns
from tests.support.answers import ignorant_server, knowing_server
from tests.support.entry import packaged_entry, run_stage
from tests.support.stages import competition_of_2023, needs_data, real_stage

pytestmark = needs_data
EDITIONS = ("neurips2023", pytest.param("neurips2023_fair", marks=pytest.mark.slow))
SCALE = 0.01
BIAS = ("Stereotypes", "Representation")


@dataclass(frozen=True)
class Asked:
    competition: Competition
    runs: dict[str, StageRuns]
    prepared: dict[str, StageInstances]
    cells: dict[str, dict[str, dict[tuple[str, str], Cell]]]
    """entry -> stage -> (scenario, metric) -> cell"""
    records: dict[str, dict[str, StageRecord]]


@pytest.fixture(scope="module", params=EDITIONS)
def asked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asked]:
    folder = tmp_path_factory.mktemp(request.param)
    everything = competition_of_2023(folder, SCALE, request.param)
    for given in (everything.stages.open, everything.stages.closed):
        for scenario in given.scenarios.values():
            object.__setattr__(scenario, "scored", True)  # also what 2023 asked and did not score
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("PALIO_HELM_DATA", raising=False)
        runs = {stage: real_stage(everything, stage, folder) for stage in ("open", "closed")}
        prepared = {stage: read_record(StageInstances, folder / f"{stage}.json") for stage in runs}
        cells: dict[str, dict[str, dict[tuple[str, str], Cell]]] = {}
        records: dict[str, dict[str, StageRecord]] = {}
        for name in ("knows", "ignorant"):
            entry_dir = packaged_entry(folder, name)
            for stage, of in runs.items():
                toy = knowing_server(of.store) if name == "knows" else ignorant_server()
                record = run_stage(of, folder / f"{stage}.json", entry_dir, toy, unanswered="wrong")
                records.setdefault(name, {})[stage] = record
                tables = EntryFolder.at(entry_dir, of.closed).tables(of.stage)
                found = stage_cells(everything, stage, record.runs, pq.read_table(tables.metrics))
                columns = [(of.scenario, of.column.metric) for of in scored_metrics(everything, stage)]
                cells.setdefault(name, {})[stage] = dict(zip(columns, found, strict=True))
        yield Asked(everything, runs, prepared, cells, records)


@pytest.mark.parametrize(("name", "value"), [("knows", 1.0), ("ignorant", 0.0)])
def test_who_knows_gets_one_in_every_column_and_who_does_not_gets_zero(
    asked: Asked, name: str, value: float
) -> None:
    for stage, cells in asked.cells[name].items():
        wrong = {
            column: cell.value
            for column, cell in cells.items()
            if not column[1].startswith(BIAS) and cell.value != pytest.approx(value)
        }
        assert wrong == {}, stage


def test_a_bias_column_has_a_value_or_the_reason(asked: Asked) -> None:
    for cell in (cell for of in asked.cells["ignorant"].values() for cell in of.values()):
        assert cell.value is not None or cell.state.value == "no_mention", cell.reason


def test_the_record_counts_what_is_asked_and_what_it_lacks(asked: Asked) -> None:
    for of in asked.prepared.values():
        for name, counts in of.counts.items():
            assert counts.prepared == of.scenarios[name] <= counts.asked
            assert counts.examples_min <= counts.examples_median <= max(counts.examples_asked, 0)
            if counts.constant_answer is not None:
                assert 0 < sum(counts.labels.values()) <= counts.prepared, "BIG-bench has other runs too"
    fair = asked.competition.competition.endswith("fair")
    corr2cause = asked.prepared["closed"].counts["corr2cause"]
    assert corr2cause.examples_asked == (5 if fair else 1)
    if fair:
        assert corr2cause.constant_answer is not None
        assert corr2cause.constant_answer <= 0.76, "balanced; four questions are drawn"


def test_the_fair_editions_stages_share_no_question(asked: Asked) -> None:
    texts = {
        stage: set(pq.read_table(of.store.instances)["text"].to_pylist()) for stage, of in asked.runs.items()
    }
    if asked.competition.competition.endswith("fair"):
        assert not texts["open"] & texts["closed"]


def test_the_stores_share_no_folder_of_data(asked: Asked) -> None:
    below = {
        stage: {path.name for path in (of.store.data / "scenarios").iterdir() if path.suffix != ".lock"}
        for stage, of in asked.runs.items()
    }
    assert below["open"] == {"mmlu", "truthful_qa", "big_bench", "gsm", "bbq", "cnn_dailymail"}
    assert below["closed"] == {"ethics", "MATH", "corr2cause", "sam_sum", "cnn_dailymail"}


def test_prompts_are_shown_by_scenario(asked: Asked) -> None:
    shown = list(prepared_prompts(asked.runs["closed"], "MATH", 1))
    assert len(shown) == len({heading for heading, _ in shown}) > 1
    assert all("Problem: " in prompt and prompt.endswith("Answer:") for _, prompt in shown)


def test_lost_examples_are_in_the_record(asked: Asked) -> None:
    runs = asked.records["knows"]["closed"].runs
    if not asked.competition.competition.endswith("fair"):
        assert sum(run.prompts_short for run in runs if run.scenario == "MATH") > 0
    ignorant = asked.records["ignorant"]["closed"].runs
    assert not any(run.empty_answers for run in ignorant), "an answer that is wrong is not empty"
