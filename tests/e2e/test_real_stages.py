"""The stages of 2023 through HELM, offline, on a real model and real data, with the budget scaled down."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from palio.config import Competition, StageLimits, load_competition, read_yaml
from palio.errors import State
from palio.evaluation.evaluate import evaluate
from palio.evaluation.helm import stage_runs
from palio.evaluation.stage import fetch_data, prepare_stage
from palio.records import Cell, StageRecord
from palio.scoring.columns import columns_of, stage_cells
from palio.serving.process import ServerProcess
from tests.entry import packaged_entry

ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("PALIO_SHARED", ROOT.parent / "shared")) / "helm_data"
BBQ = ("Age", "Disability_status", "Nationality", "Physical_appearance", "Religion", "Sexual_orientation")
ETHICS = ("justice", "virtue", "deontology", "commonsense", "utilitarianism")

pytestmark = [
    pytest.mark.skipif(not SHARED.is_dir(), reason=f"no evaluation data in {SHARED}"),
    pytest.mark.timeout(1500),
]


def run_file(path: Path, descriptions: list[str]) -> str:
    lines = [f'{{description: "{description}", priority: 1}}' for description in descriptions]
    path.write_text("entries: [\n" + "\n".join(lines) + "\n]\n")
    return str(path)


def competition_of_2023(folder: Path) -> Competition:
    """config/neurips2023.yaml where its data is here: no summaries, BBQ's six categories, ETHICS."""
    config = read_yaml(ROOT / "config/neurips2023.yaml")
    config["closed_store"] = str(folder / "closed")
    opened, closed = config["stages"]["open"], config["stages"]["closed"]
    del opened["scenarios"]["CNN-DailyMail"]
    closed["scenarios"] = {"ethics": closed["scenarios"]["ethics"]}
    bbq = opened["scenarios"]["BBQ"]
    del bbq["questions"]
    bbq |= {
        "max_eval_instances": 18,
        "run_entries": run_file(folder / "bbq.conf", [f"bbq:subject={name}" for name in BBQ]),
    }
    # The training files of two subsets are not here, so these prompts show no examples.
    bare = {"commonsense": ",examples=false", "utilitarianism": ",examples=false"}
    closed["scenarios"]["ethics"]["run_entries"] = run_file(
        folder / "ethics.conf",
        [f"palio_ethics:subset={name}{bare.get(name, '')},data_augmentation=canonical" for name in ETHICS],
    )
    # Columns that nothing fills: these inputs are not perturbed.
    opened["scenarios"]["GSM8K"]["metrics"]["EM (Robustness)"] = {
        "metric": "final_number_exact_match",
        "perturbation": "robustness",
    }
    opened["scale"] = closed["scale"] = 0.005
    return load_competition(config)


def data_source(folder: Path) -> Path:
    """What a login node has: the shared data, and small word lists in the format of HELM's."""
    source = folder / "source"
    source.mkdir()
    for path in SHARED.iterdir():
        (source / path.name).symlink_to(path)
    words = {"is": ["be"], "the": ["da"], "this": ["dis"], "that": ["dat"], "i": ["ah"], "you": ["ya"]}
    names = [
        f"{name},first_name,race,{race},gender,{gender}"
        for race, gender, of in (
            ("white_american", "female", "emily anne"),
            ("white_american", "male", "greg todd"),
            ("black_american", "female", "aisha keisha"),
            ("black_american", "male", "darnell jamal"),
        )
        for name in of.split()
    ]
    for path, text in (
        ("dialect/SAE_to_AAVE_mapping.json", json.dumps(words)),
        ("person_name/data/person_names.txt", "\n".join(names) + "\n"),
    ):
        (source / "perturbations" / path).parent.mkdir(parents=True)
        (source / "perturbations" / path).write_text(text)
    return source


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

    @contextmanager
    def start(package: Path, log: Path) -> Iterator[ServerProcess]:
        with ServerProcess(package, log=log, threads=1) as server:
            yield server

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # where the config's run files are
        competition = competition_of_2023(folder)
        runs = {stage: stage_runs(competition, stage) for stage in ("open", "closed")}
        patch.chdir(folder)
        for name, of in runs["open"].scenarios.items():
            path = str(ROOT / of.run_entries)
            runs["open"].scenarios[name] = of.model_copy(update={"run_entries": path})
        entry_dir = packaged_entry(folder)
        (entry_dir / "package").symlink_to(base_model)
        source = data_source(folder)
        patch.delenv("PALIO_HELM_DATA", raising=False)
        records = {}
        limits = StageLimits(time_limit=1800, threads=4, unanswered="wrong")
        for stage, what in runs.items():
            fetch_data(what, source)
            prepare_stage(what, folder / f"{stage}.json")
            records[stage] = evaluate(what, limits, folder / f"{stage}.json", entry_dir, start)
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
