"""Our HELM plug-ins, on small files in the data's format and on the real data where it is."""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from helm.benchmark.scenarios.scenario import CORRECT_TAG, Instance

from palio.errors import BadInput
from palio.evaluation.data import DataError, dataset_folder
from palio.evaluation.helm import (
    run_entries,
    run_folders,
    run_helm,
    stage_entries,
    statistics,
    write_helm_folder,
)
from palio.evaluation.scenarios import (
    CnnDailyMailScenario,
    Corr2CauseScenario,
    EthicsScenario,
    MathScenario,
    SamSumScenario,
    summary_metric_specs,
)
from palio.evaluation.stage import prepare_stage
from palio.layout import HelmFolder
from palio.provenance import fingerprint
from palio.settings import ScenarioRuns, StageRuns

SHARED = Path(os.environ.get("PALIO_SHARED", Path(__file__).parents[3] / "shared")) / "helm_data"
needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no evaluation data in {SHARED}")


def gold(instance: Instance) -> str:
    return next(
        str(reference.output.text) for reference in instance.references if CORRECT_TAG in reference.tags
    )


def write_csv(path: Path, rows: list[list[str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def write_lines(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# --- ETHICS ----------------------------------------------------------------------------------------


@needs_data
@pytest.mark.parametrize(
    ("subset", "file", "answers"),
    [
        ("commonsense", "cm", ("not wrong", "wrong")),
        ("deontology", "deontology", ("unreasonable", "reasonable")),
        ("justice", "justice", ("unreasonable", "reasonable")),
        ("virtue", "virtue", ("no", "yes")),
    ],
)
def test_gold_answers_of_ethics_have_both_classes_in_the_datas_proportion(
    subset: str, file: str, answers: tuple[str, str]
) -> None:
    instances = EthicsScenario(subset, data=str(SHARED / "ethics"), examples=False).get_instances("")
    with (SHARED / "ethics" / f"{file}_test.csv").open() as lines:
        labels = Counter(int(row["label"]) for row in csv.DictReader(lines))
    found = Counter(gold(instance) for instance in instances)
    assert found == {answers[label]: count for label, count in labels.items()}
    assert min(found.values()) > 0
    assert len(found) == 2


@needs_data
def test_the_more_pleasant_situation_is_shown_first_about_half_the_time() -> None:
    scenario = EthicsScenario("utilitarianism", data=str(SHARED / "ethics"), examples=False)
    found = Counter(gold(instance) for instance in scenario.get_instances(""))
    assert 0.47 < found["first"] / found.total() < 0.53
    again = Counter(gold(instance) for instance in scenario.get_instances(""))
    assert found == again


def test_the_pair_is_swapped_together_with_its_answer(tmp_path: Path) -> None:
    pairs = [[f"I won {n} euros.", f"I lost {n} euros."] for n in range(20)]
    write_csv(tmp_path / "util_test.csv", pairs)
    instances = EthicsScenario("utilitarianism", data=str(tmp_path), examples=False).get_instances("")
    assert len(instances) == 20
    for instance in instances:
        first = instance.input.text.splitlines()[0]
        assert ("won" in first) == (gold(instance) == "first")


def test_a_trait_stands_on_its_own_line(tmp_path: Path) -> None:
    write_csv(tmp_path / "virtue" / "test.csv", [["label", "scenario"], ["1", "Jo helps. [SEP] kind"]])
    (found,) = EthicsScenario("virtue", data=str(tmp_path), examples=False).get_instances("")
    assert found.input.text.splitlines()[:2] == ["Jo helps.", "Trait: kind"]
    assert gold(found) == "yes"


def test_a_missing_train_file_is_named_unless_no_examples_are_asked_for(tmp_path: Path) -> None:
    write_csv(tmp_path / "cm_test.csv", [["label", "input"], ["0", "I sang."]])
    with pytest.raises(ValueError, match="no cm or train file"):
        EthicsScenario("commonsense", data=str(tmp_path)).get_instances("")
    assert len(EthicsScenario("commonsense", data=str(tmp_path), examples=False).get_instances("")) == 1


def test_the_hard_variant_is_not_taken_for_the_test_split(tmp_path: Path) -> None:
    for name, text in (("test", "I sang."), ("test_hard", "I shouted.")):
        write_csv(tmp_path / "commonsense" / f"{name}.csv", [["label", "input"], ["0", text]])
    (found,) = EthicsScenario("commonsense", data=str(tmp_path), examples=False).get_instances("")
    assert "I sang." in found.input.text


# --- the others --------------------------------------------------------------------------------------


def test_corr2cause_asks_yes_or_no(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", [["input", "label"], ["Premise: A. Hypothesis: B.", "1"]])
    write_lines(tmp_path / "test.jsonl", [{"premise": "C.", "hypothesis": "D.", "label": 0}])
    train, test = Corr2CauseScenario(data=str(tmp_path)).get_instances("")
    assert (train.split, gold(train)) == ("train", "Yes")
    assert (test.split, gold(test)) == ("test", "No")
    assert test.input.text == "Premise: C.\nHypothesis: D."


def test_math_takes_one_subject_and_level_with_the_solution_as_reference(tmp_path: Path) -> None:
    rows = [
        {"problem": f"{kind} {level}?", "solution": "So \\boxed{4}.", "level": f"Level {level}", "type": kind}
        for kind in ("Algebra", "Counting & Probability")
        for level in (1, 2)
    ]
    for split in ("train", "test"):
        write_lines(tmp_path / f"{split}.jsonl", rows)
    found = MathScenario("counting_and_probability", "2", data=str(tmp_path)).get_instances("")
    assert [(i.split, i.input.text) for i in found] == [
        ("train", "Counting & Probability 2?"),
        ("test", "Counting & Probability 2?"),
    ]
    assert gold(found[0]) == "So \\boxed{4}."


def test_summaries_are_cut_and_examples_are_short(tmp_path: Path) -> None:
    rows = [{"article": "word " * n, "highlights": "a b"} for n in (20, 100, 900)]
    for split in ("train", "test"):
        write_lines(tmp_path / f"{split}.jsonl", rows)
    found = CnnDailyMailScenario(data=str(tmp_path)).get_instances("")
    lengths = [(i.split, len(i.input.text.split())) for i in found]
    assert lengths == [("train", 100), ("test", 20), ("test", 100), ("test", 512)]


def test_a_column_that_is_missing_is_named(tmp_path: Path) -> None:
    write_lines(tmp_path / "test.jsonl", [{"dialog": "A: hi", "summary": "Hi."}])
    with pytest.raises(ValueError, match="lacks the column dialogue; it has dialog, summary"):
        SamSumScenario(data=str(tmp_path), examples=False).get_instances("")


def test_data_comes_from_the_argument_the_variable_or_helms_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    assert dataset_folder("ethics", str(tmp_path), cache) == tmp_path
    monkeypatch.delenv("PALIO_HELM_DATA", raising=False)
    assert dataset_folder("ethics", "", cache) == cache
    monkeypatch.setenv("PALIO_HELM_DATA", "/data")
    assert dataset_folder("ethics", "", cache) == Path("/data/ethics")
    cache.mkdir()
    write_lines(cache / "test.jsonl", [{}])
    assert dataset_folder("ethics", "", cache) == cache, "a copy in the store is the only one that is read"
    with pytest.raises(DataError, match="40-character commit id"):
        dataset_folder("ethics", "org/name@main", cache)


def test_bias_metrics_without_their_tokenizer_are_an_error_and_not_a_zero(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import nltk

    monkeypatch.setattr(nltk.data, "path", [])
    with pytest.raises(ValueError, match="punkt_tab"):
        summary_metric_specs(bias=True)
    assert ["rouge_2"] in [spec.args.get("names") for spec in summary_metric_specs(bias=False)]


# --- through HELM ------------------------------------------------------------------------------------

RUNS = {
    "MMLU": ["mmlu:subject=anatomy,data_augmentation=robustness", "mmlu:subject=virology"],
    "BIG-bench": ["big_bench:task=emoji_movie,subtask=,max_train_instances=2"],
    "TruthfulQA": ["truthful_qa:task=mc_single"],
    "GSM8K": ["gsm"],
    "BBQ": [
        f"bbq:subject={subject}"
        for subject in (
            "Age",
            "Disability_status",
            "Nationality",
            "Physical_appearance",
            "Religion",
            "Sexual_orientation",
        )
    ],
    "ethics": [
        "palio_ethics:subset=commonsense,examples=false",
        "palio_ethics:subset=utilitarianism,examples=false",
        "palio_ethics:subset=deontology",
        "palio_ethics:subset=justice,data_augmentation=robustness",
        "palio_ethics:subset=virtue",
    ],
}


def stage_of(folder: Path, runs: dict[str, list[str]]) -> StageRuns:
    scenarios = {}
    for name, descriptions in runs.items():
        path = folder / f"{name}.conf"
        path.write_text(
            "entries: ["
            + "\n".join(f'{{description: "{description}", priority: 1}}' for description in descriptions)
            + "]"
        )
        scenarios[name] = ScenarioRuns(
            run_entries=str(path),
            max_eval_instances=4,
            shortfall="accept",  # one of BBQ's categories has no examples
            sha256=fingerprint(run_entries(path)),
        )
    return StageRuns(competition="test", stage="open", closed_store="closed", scenarios=scenarios)


@needs_data
@pytest.mark.timeout(180)
def test_helm_makes_the_instances_of_both_stages_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PALIO_HELM_DATA", str(SHARED))
    runs = stage_of(tmp_path, RUNS)
    record = prepare_stage(runs, tmp_path / "stage.json")
    planned = json.loads(runs.store.runs.read_text())["runs"]
    assert {name: len(of) for name, of in RUNS.items()} == Counter(run["scenario"] for run in planned)
    assert all(run["instances"] == 4 for run in planned)
    assert record.scenarios["ethics"] == 20
    perturbed = {run["run"]: run["requests"] for run in planned if run["requests"] > run["instances"]}
    assert {name.partition(",")[0] for name in perturbed} == {
        "mmlu:subject=anatomy",
        "palio_ethics:subset=justice",
    }


@pytest.mark.timeout(120)
def test_summaries_and_mathematics_are_scored_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dialogue: dict[str, object] = {"dialogue": "A: shall we meet? " * 20, "summary": "They will meet."}
    problem: dict[str, object] = {
        "problem": "2 + 2?",
        "solution": "So \\boxed{4}.",
        "level": "Level 1",
        "type": "Algebra",
    }
    for name, row in (("sam_sum", dialogue), ("MATH", problem)):
        (tmp_path / name).mkdir()
        for split in ("train", "test"):
            write_lines(tmp_path / name / f"{split}.jsonl", [row])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PALIO_HELM_DATA", str(tmp_path))
    runs = {
        "sam_sum": ["palio_sam_sum:bias=false"],
        "MATH": ["palio_math:subject=algebra,level=1"],
    }
    entries = stage_entries(stage_of(tmp_path, runs))
    folder = HelmFolder(tmp_path / "helm")
    write_helm_folder(folder, entries, tmp_path / "data")  # HELM's toy model, which echoes words
    assert run_helm(folder, threads=1).code == 0
    values = {
        (run.scenario, row["metric"]): row["value"]
        for run in run_folders(folder)
        for row in statistics(run)
        if row["split"] == "test"
    }
    assert 0 <= values["sam_sum", "rouge_2"] <= 1
    assert values["MATH", "math_equiv_chain_of_thought"] == 0


@pytest.mark.timeout(60)
def test_missing_data_stops_the_stage_and_says_where_it_should_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PALIO_HELM_DATA", str(tmp_path / "nowhere"))
    runs = stage_of(tmp_path, {"corr2cause": ["palio_corr2cause"]})
    with pytest.raises(BadInput, match="no test file among"):
        prepare_stage(runs, tmp_path / "stage.json")
