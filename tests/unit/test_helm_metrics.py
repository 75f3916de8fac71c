"""HELM's values are those computed by hand: ROUGE-2, exact match, worst cases, equivalence of mathematics."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from palio.evaluation.stage import fetch_data, prepare_stage
from palio.layout import EntryFolder
from palio.settings import StageRuns
from tests.support.entry import packaged_entry, run_stage, scenario
from tests.support.stages import SHARED, needs_data
from tests.support.toy import Toy

pytestmark = [needs_data, pytest.mark.timeout(900)]

DIALOGUES = {
    # Bigrams of the answer: they will, will meet, meet later; of the reference: they will, will meet, meet
    # at, at noon. Precision 2/3, recall 2/4, F 4/7.
    "Ann: at noon?": ("They will meet at noon.", "They will meet later.", 4 / 7),
    "Bo: buy milk": ("Bo wants milk to be bought.", "Bo wants milk to be bought.", 1.0),
    "Cleo: bye": ("Cleo takes her leave.", "A dog barks loudly.", 0.0),
}
PROBLEMS = {
    "Half of one?": ("It is \\boxed{\\frac{1}{2}}.", "We get \\boxed{1/2}.", 1.0),
    "Two thirds of three?": ("So \\boxed{2}.", "The answer is \\boxed{2}.", 1.0),
    "Seven?": ("\\boxed{7}", "It is \\boxed{8}.", 0.0),
}
# Asked as they are and perturbed: the first is always answered right, the second only as it is, the third
# never.
QUESTIONS = (
    "Mary said that her mother is not going to do anything about the doctor.",
    "John thinks that he is going to tell his father that there is nothing to do.",
    "My brother and his wife are not going to ask the woman about this.",
)


def write(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def answer(prompt: str) -> str:
    asked = prompt.rpartition("###")[2] if "###" in prompt else prompt
    for text, (_, said, _) in (DIALOGUES | PROBLEMS).items():
        if text in asked:
            return said
    if QUESTIONS[1] in prompt:
        return "A"
    is_first = " mother" in prompt.lower() or "mama" in prompt.lower() or "doctor" in prompt.lower()
    return "A" if is_first else "B"


def test_values_are_those_computed_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PALIO_HELM_DATA", raising=False)
    data = tmp_path / "data"
    dialogues = [{"dialogue": text, "summary": of[0]} for text, of in DIALOGUES.items()]
    write(data / "sam_sum" / "test.jsonl", dialogues)
    problems = [
        {"problem": text, "solution": of[0], "level": "Level 1", "type": "Algebra"}
        for text, of in PROBLEMS.items()
    ]
    write(data / "MATH" / "test.jsonl", problems)
    write(tmp_path / "questions.jsonl", [{"q": of, "a": "yes", "b": "no", "r": "yes"} for of in QUESTIONS])
    (data / "perturbations").symlink_to(SHARED / "perturbations")
    table = f"palio_table:data={tmp_path / 'questions.jsonl'},question=q,choices=a+b,answer=r"
    runs = {
        "sam_sum": "palio_sam_sum:examples=false,bias=false",
        "MATH": "palio_math:subject=algebra,level=1,examples=false",
        "choices": f"{table},data_augmentation=canonical",
    }
    stage = StageRuns(
        competition="test",
        stage="open",
        closed_store="closed",
        scenarios={name: scenario(tmp_path / f"{name}.conf", run, instances=3) for name, run in runs.items()},
    )
    fetch_data(stage, data)
    prepare_stage(stage, tmp_path / "stage.json")
    entry_dir = packaged_entry(tmp_path)
    run_stage(stage, tmp_path / "stage.json", entry_dir, Toy(answer=answer))

    tables = EntryFolder.at(entry_dir, stage.closed).tables("open")
    values = {
        (row["scenario"], row["metric"], row["perturbation"]): row["value"]
        for row in pq.read_table(tables.metrics).to_pylist()
        if row["split"] == "test"
    }
    assert values["sam_sum", "rouge_2", None] == pytest.approx((4 / 7 + 1 + 0) / 3)
    assert values["MATH", "math_equiv_chain_of_thought", None] == pytest.approx(2 / 3)
    assert values["choices", "exact_match", None] == pytest.approx(2 / 3)
    assert values["choices", "exact_match", "robustness"] == pytest.approx(1 / 3)
    assert values["choices", "exact_match", "fairness"] == pytest.approx(1 / 3)
