"""The stages of 2023 through HELM, offline, on a real model and real data, with the budget scaled down."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from palio.config import Competition
from palio.errors import State
from palio.evaluation.evaluate import evaluate
from palio.evaluation.window import Window
from palio.layout import EntryFolder
from palio.records import Cell, StageInstances, StageRecord, read_record
from palio.scoring.columns import columns_of, stage_cells
from palio.settings import EvaluateSettings, StageLimits
from tests.support.entry import UNPROBED, packaged_entry
from tests.support.serving import one_core
from tests.support.stages import competition_of_2023, data_of_2023, needs_data, real_stage

# test_editions.py asks every scenario of both editions in small, without a real model.
pytestmark = [needs_data, pytest.mark.slow]


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
    closed = competition.stages.closed.scenarios
    for name in set(closed) - {"ethics"}:  # long texts: hours for a small model on a CPU
        del closed[name]
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
                competition_id=runs.competition,
                runs=runs,
                limits=limits,
                track=competition.tracks["a100"],
                probe=UNPROBED,
            )
            at = EntryFolder.at(entry_dir, runs.closed)
            records[stage] = evaluate(
                at, settings, folder / f"{stage}.json", one_core(at.package), Window.of_model(at.package)
            )
        yield Evaluated(competition, entry_dir, records)


def test_every_question_of_every_scenario_is_answered(evaluated: Evaluated) -> None:
    for record in evaluated.records.values():
        assert record.state is State.FINISHED
        assert all(run.state is State.FINISHED and run.answered == run.instances for run in record.runs)
    asked = {
        scenario: sum(run.instances for run in evaluated.records["open"].runs if run.scenario == scenario)
        for scenario in evaluated.competition.stages.open.scenarios
    }
    four_shots = asked.pop("BIG-bench")
    assert four_shots == 5 * 4  # 0 to 3 examples
    assert asked == {"MMLU": 4, "TruthfulQA": 1, "GSM8K": 1, "BBQ": 1, "CNN-DailyMail": 1}
    assert len(evaluated.records["closed"].runs) == 5


def test_plain_columns_have_values_and_perturbed_ones_where_the_perturbation_ran(
    evaluated: Evaluated,
) -> None:
    cells = evaluated.cells("open") | evaluated.cells("closed")
    absent = {column for column, cell in cells.items() if cell.value is None}
    assert absent == set()
    assert not [column for column in cells if column[0] == "CNN-DailyMail"], "asked and not scored"
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


@pytest.mark.parametrize("edition", ["neurips2023", "neurips2023_fair"])
def test_the_full_budget_is_prepared_in_two_minutes_of_two_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edition: str
) -> None:
    competition = competition_of_2023(tmp_path, 1, edition)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PALIO_HELM_DATA", raising=False)
    data_of_2023(tmp_path)
    before = cpu_seconds()
    counts = {}
    for stage in ("open", "closed"):
        real_stage(competition, stage, tmp_path)
        counts[stage] = read_record(StageInstances, tmp_path / f"{stage}.json").counts
    used = cpu_seconds() - before
    print(f"{edition}: {used:.0f} CPU-seconds")
    assert used < 2 * 120
    found = {name: of.prepared for name, of in counts["closed"].items()}
    fair = edition.endswith("fair")
    assert found["ethics"] == found["CNN-DailyMail"] == 1000
    assert found["sam_sum"] == (800 if fair else 819)
    # Of the data at hand: 8 problems of each subject and level; 300 rows of corr2cause, a fifth of them or as
    # many of each answer.
    assert found["MATH"] == (280 if fair else 112)
    assert found["corr2cause"] == (2 * counts["closed"]["corr2cause"].labels["B"] if fair else 60)
    asked = {name: of.prepared for name, of in counts["open"].items() if name != "BIG-bench"}
    assert asked == {name: competition.stages.open.scenarios[name].questions for name in asked}


def cpu_seconds() -> float:
    """CPU time of this process and the HELM processes that have ended."""
    usage = [resource.getrusage(of) for of in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(of.ru_utime + of.ru_stime for of in usage)
