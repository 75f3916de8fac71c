"""The stages of 2023 through HELM, offline, on a real model and real data, with the budget scaled down."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from palio.config import Competition
from palio.errors import State
from palio.evaluation.evaluate import evaluate
from palio.evaluation.stage import StagePlan
from palio.layout import EntryFolder
from palio.records import Cell, StageRecord
from palio.scoring.columns import columns_of, stage_cells
from palio.settings import EvaluateSettings, StageLimits
from tests.support.entry import packaged_entry
from tests.support.serving import one_core
from tests.support.stages import competition_of_2023, needs_data, real_stage

pytestmark = [needs_data, pytest.mark.timeout(1500)]


@dataclass(frozen=True)
class Evaluated:
    competition: Competition
    entry_dir: Path
    records: dict[str, StageRecord]

    def cells(self, stage: str) -> dict[tuple[str, str], Cell]:
        table = pq.read_table(self.entry_dir / "helm" / stage / "metrics.parquet")
        columns = columns_of(self.competition, stage)
        cells = stage_cells(self.competition, stage, self.records[stage].runs, table)
        return {(of.scenario, of.metric): cell for of, cell in zip(columns, cells, strict=True)}


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory, base_model: Path) -> Iterator[Evaluated]:
    """Both stages of an entry that hands in the demo's base model as it is."""
    folder = tmp_path_factory.mktemp("real")

    competition = competition_of_2023(folder, scale=0.005)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("PALIO_HELM_DATA", raising=False)
        entry_dir = packaged_entry(folder)
        (entry_dir / "package").symlink_to(base_model)
        limits = StageLimits(time_limit=1800, threads=4, unanswered="wrong")
        records = {}
        for stage in ("open", "closed"):
            runs = real_stage(competition, stage, folder)
            settings = EvaluateSettings(
                competition_id=runs.competition, runs=runs, limits=limits, track=competition.tracks["a100"]
            )
            at = EntryFolder.at(entry_dir, runs.closed)
            records[stage] = evaluate(at, settings, folder / f"{stage}.json", one_core(at.package))
        yield Evaluated(competition, entry_dir, records)


def test_every_question_of_every_scenario_is_answered(evaluated: Evaluated) -> None:
    for record in evaluated.records.values():
        assert record.state is State.FINISHED
        assert all(run.state is State.FINISHED and run.answered == run.instances for run in record.runs)
    asked = {
        scenario: sum(run.instances for run in evaluated.records["open"].runs if run.scenario == scenario)
        for scenario in evaluated.competition.stages.open.scenarios
    }
    assert asked == {"MMLU": 1, "TruthfulQA": 1, "BIG-bench": 2 * 4, "GSM8K": 1, "BBQ": 6}  # 0 to 3 shots
    assert len(evaluated.records["closed"].runs) == 5


def test_plain_columns_have_values_and_perturbed_ones_where_the_perturbation_ran(
    evaluated: Evaluated,
) -> None:
    cells = evaluated.cells("open") | evaluated.cells("closed")
    absent = {column for column, cell in cells.items() if cell.value is None}
    assert absent == {("GSM8K", "EM (Robustness)")}
    assert cells["GSM8K", "EM (Robustness)"].reason.startswith(
        "HELM reports no final_number_exact_match (test,"
    )
    assert len([column for column in cells if column[0] == "ethics"]) == 15
    for scenario in ("MMLU", "TruthfulQA"):
        plain, worst = (cells[scenario, name].value for name in ("EM", "EM (Robustness)"))
        assert plain is not None
        assert worst is not None
        assert worst <= plain


def test_perturbed_questions_are_asked_beside_the_plain_ones(evaluated: Evaluated) -> None:
    planned = json.loads((evaluated.entry_dir / "open.run.json").read_text())
    assert planned["requests"] > sum(run.instances for run in evaluated.records["open"].runs)
    kinds = pq.read_table(evaluated.entry_dir / "helm" / "closed" / "instances.parquet").column(
        "perturbation"
    )
    assert {"mild_mix", "dialect"} <= set(kinds.to_pylist())


def test_the_full_budget_can_be_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    competition = competition_of_2023(tmp_path, scale=1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PALIO_HELM_DATA", raising=False)
    asked: Counter[str] = Counter()
    for stage in ("open", "closed"):
        for run in StagePlan(real_stage(competition, stage, tmp_path).store).runs:
            asked[run.scenario] += run.instances
    assert asked.pop("BIG-bench") == 4 * 17 * 18  # 0 to 3 shots; without vitaminc
    assert asked == {"MMLU": 216, "TruthfulQA": 18, "GSM8K": 18, "BBQ": 6 * 18, "ethics": 1000}
