"""Data as people have it: which files of a folder are read, how many rows they have, what is refused."""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from palio.evaluation.data import DataError, only_file, read_rows, split_files, version_folder
from palio.evaluation.scenarios import (
    CnnDailyMailScenario,
    Corr2CauseScenario,
    EthicsScenario,
    MathScenario,
    PalioScenario,
    SamSumScenario,
    TableScenario,
)

SHARED = Path(os.environ.get("PALIO_SHARED", Path(__file__).parents[3] / "shared"))
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no shared data in {SHARED}")
DIALOGUE = "Ann: shall we meet?\nBo: yes"
Rows = list[dict[str, Any]]


def write(path: Path, rows: Rows) -> None:
    """Write rows in the format that the file's name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=2))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def problem(number: int, level: object = "Level 1", subject: str = "Algebra") -> dict[str, Any]:
    return {"problem": f"{number}?", "solution": f"\\boxed{{{number}}}", "level": level, "type": subject}


def counted(scenario: PalioScenario) -> Counter[str]:
    return Counter(instance.split for instance in scenario.get_instances("nowhere"))


def refusal(scenario: PalioScenario) -> str:
    with pytest.raises(DataError) as fault:
        scenario.get_instances("nowhere")
    return str(fault.value)


# --- layouts that are read ----------------------------------------------------------------------------------


def test_math_as_its_archive_has_it_one_object_a_file(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for subject in ("Algebra", "Geometry"):
            for number in range(12):
                path = tmp_path / "MATH" / split / subject.lower() / f"{number}.json"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(problem(number, subject=subject), indent=4))
    scenario = MathScenario("algebra", "1", data=str(tmp_path))
    assert counted(scenario) == {"train": 12, "test": 12}


def test_math_500_has_numbers_as_levels(tmp_path: Path) -> None:
    rows = [{**problem(n, level=3), "subject": "Algebra"} for n in range(5)]
    for row in rows:
        del row["type"]
    write(tmp_path / "test.jsonl", [*rows, problem(9, level="Level 3"), problem(10, level=4)])
    assert counted(MathScenario("algebra", "3", data=str(tmp_path), examples=False)) == {"test": 6}


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "tsv", "parquet"])
def test_samsum_in_every_format_with_line_breaks_in_its_dialogues(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / f"test.{suffix}", [{"dialogue": DIALOGUE, "summary": f"{n} meet."} for n in range(7)])
    found = SamSumScenario(data=str(tmp_path), examples=False).get_instances("nowhere")
    assert [instance.input.text for instance in found] == [DIALOGUE] * 7


@needs_shared
@pytest.mark.parametrize("case", ["sam_bom", "sam_u2028"])
def test_a_byte_order_mark_and_a_raw_line_separator_cost_no_row(case: str) -> None:
    folder = SHARED / "cases" / "helm" / case
    lines = {name: (folder / f"{name}.jsonl").read_bytes().count(b"\n") for name in ("train", "test")}
    scenario = SamSumScenario(data=str(folder))
    scenario.example_words = (0, 1000)
    assert counted(scenario) == lines


def test_the_hubs_corr2cause_has_perturbed_questions_that_are_not_its_test(tmp_path: Path) -> None:
    for name, count in (("train", 4), ("dev", 3), ("test", 2), ("perturbation_by_paraphrase_test", 9)):
        rows = [{"input": f"{name} {n}", "label": n % 2} for n in range(count)]
        write(tmp_path / f"{name}.csv", rows)
    assert counted(Corr2CauseScenario(data=str(tmp_path))) == {"train": 4, "test": 2}


def test_the_version_of_cnn_dailymail_is_chosen(tmp_path: Path) -> None:
    for number, version in enumerate(("1.0.0", "2.0.0", "3.0.0"), start=1):
        for split in ("train", "validation", "test"):
            rows = [{"article": f"{version} {n}", "highlights": "a"} for n in range(number)]
            write(tmp_path / version / f"{split}-00000-of-00001.parquet", rows)
    scenario = CnnDailyMailScenario(data=str(tmp_path), examples=False, version="2.0.0")
    assert counted(scenario) == {"test": 2}
    many = refusal(CnnDailyMailScenario(data=str(tmp_path), examples=False))
    assert "3 matches for the test file: 1.0.0/test-*-of-00001.parquet, 2.0.0/" in many
    assert "keep one of them, or choose with data= or version=" in many
    other = refusal(CnnDailyMailScenario(data=str(tmp_path), examples=False, version="4.0.0"))
    assert "has the versions 1.0.0, 2.0.0, 3.0.0; give one as version=, not 4.0.0" in other


def test_ethics_hard_files_are_read_only_where_2023_asked_them(tmp_path: Path) -> None:
    for name, count in (("cm_test", 10), ("cm_test_hard", 20), ("cm_train", 5), ("cm_ambig", 3)):
        rows = [{"label": n % 2, "input": f"{name} {n}"} for n in range(count)]
        write(tmp_path / "ethics" / "commonsense" / f"{name}.csv", rows)
    assert counted(EthicsScenario("commonsense", data=str(tmp_path))) == {"train": 5, "test": 10}
    as_2023 = EthicsScenario("commonsense", data=str(tmp_path), edition="2023")
    assert counted(as_2023) == {"train": 16, "test": 4}


def test_2023_took_one_file_and_divided_it(tmp_path: Path) -> None:
    write(tmp_path / "corr2cause.csv", [{"input": f"{n}", "label": n % 2} for n in range(20)])
    found = Corr2CauseScenario(data=str(tmp_path), edition="2023").get_instances("nowhere")
    texts = {split: {i.input.text for i in found if i.split == split} for split in ("train", "test")}
    assert {split: len(of) for split, of in texts.items()} == {"train": 16, "test": 4}
    assert not texts["train"] & texts["test"]
    write(tmp_path / "sam" / "all.tsv", [{"dialogue": DIALOGUE, "summary": "."}] * 3)
    assert counted(SamSumScenario(data=str(tmp_path / "sam"), edition="2023")) == {"test": 3}


def test_shards_are_read_all_or_not_at_all(tmp_path: Path) -> None:
    for number in range(3):
        rows = [{"article": f"{number} {n}", "highlights": "a"} for n in range(2)]
        write(tmp_path / "data" / f"test-0000{number}-of-00003.parquet", rows)
    assert counted(CnnDailyMailScenario(data=str(tmp_path), examples=False)) == {"test": 6}
    (tmp_path / "data" / "test-00001-of-00003.parquet").unlink()
    short = refusal(CnnDailyMailScenario(data=str(tmp_path), examples=False))
    assert "2 of 3 shards of data/test-*-of-00003.parquet; fetch the others" in short


def test_parts_share_no_question_and_leave_none_out(tmp_path: Path) -> None:
    write(tmp_path / "test.jsonl", [{"article": f"news {n}", "highlights": "a"} for n in range(200)] * 2)
    texts = []
    for part in ("1of2", "2of2"):
        scenario = CnnDailyMailScenario(data=str(tmp_path), examples=False, part=part)
        texts.append({instance.input.text for instance in scenario.get_instances("nowhere")})
    assert not texts[0] & texts[1]
    assert len(texts[0] | texts[1]) == 200
    assert min(map(len, texts)) > 70


def test_balanced_corr2cause_leaves_a_constant_answer_a_half(tmp_path: Path) -> None:
    write(tmp_path / "test.csv", [{"input": f"{n}", "label": int(n % 6 == 0)} for n in range(60)])
    scenario = Corr2CauseScenario(data=str(tmp_path), examples=False, balanced="true")
    answers = Counter(
        instance.first_correct_reference.output.text for instance in scenario.get_instances("nowhere")
    )
    assert answers == {"Yes": 10, "No": 10}


def test_short_worked_examples_are_chosen_as_far_as_there_are_enough(tmp_path: Path) -> None:
    rows = [problem(n) for n in range(6)]
    for number, row in enumerate(rows):
        row["solution"] = "so " * (40 * number) + row["solution"]
    write(tmp_path / "train.jsonl", rows)
    write(tmp_path / "test.jsonl", rows[:1])
    for characters, count, expected in ((300, 2, 3), (10, 2, 2), (0, 2, 6)):
        scenario = MathScenario(
            "algebra", "1", data=str(tmp_path), examples=count, example_characters=characters
        )
        assert counted(scenario)["train"] == expected


# --- what is refused ----------------------------------------------------------------------------------------


def test_no_file_lists_what_there_is(tmp_path: Path) -> None:
    assert "no such folder" in refusal(SamSumScenario(data="", examples=False))
    (tmp_path / "README.md").write_text("x")
    assert "found: no data file" in refusal(SamSumScenario(data=str(tmp_path), examples=False))
    write(tmp_path / "dev.csv", [{"dialogue": "a", "summary": "b"}])
    line = refusal(SamSumScenario(data=str(tmp_path), examples=False))
    assert line == f"{tmp_path}: no test file among .parquet, .csv, .tsv, .jsonl, .json; found: dev.csv"


def test_several_files_of_a_split_are_never_mixed(tmp_path: Path) -> None:
    for name in ("test.csv", "old/test.csv", "test.jsonl"):
        write(tmp_path / name, [{"dialogue": "a", "summary": "b"}])
    line = refusal(SamSumScenario(data=str(tmp_path), examples=False))
    assert "3 matches for the test file: old/test.csv, test.csv, test.jsonl; keep one of them" in line


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("test.csv", b'dialogue,summary\na,b\n"c,d\ne,f\n', "line 3: a quote opened here is never closed"),
        ("test.csv", b"dialogue,summary\na,b\nc\n", "line 3: 1 fields, the header has 2; mend the row"),
        ("test.csv", b"dialogue,summary\n\xff\xfe,b\n", "is not UTF-8"),
        ("test.jsonl", b'{"dialogue": "a"\n', "line 1: not JSON"),
        ("test.jsonl", b"[1]\n", "row 1 is not an object"),
        ("test.json", b'[{"dialogue": "a"', "is not JSON"),
        ("test.parquet", b"PAR1 no", "is broken"),
        (
            "test.jsonl",
            b'{"dialog": "secret words", "summary": "b"}',
            "lacks the column dialogue; it has dialog",
        ),
        ("test.csv", b"I met Bo.,He met Ann.\na,b\n", "lacks the column dialogue; it has (a text), (a text)"),
        ("test.jsonl", b'{"dialogue": 3, "summary": "b"}', "the column dialogue holds a int, not a text"),
        ("test.jsonl", b'{"dialogue": NaN, "summary": "b"}\n' * 3, "3 of 3 rows have no text"),
    ],
)
def test_a_broken_file_is_named_with_its_line_and_quotes_no_text(
    tmp_path: Path, name: str, content: bytes, why: str
) -> None:
    (tmp_path / name).write_bytes(content)
    line = refusal(SamSumScenario(data=str(tmp_path), examples=False))
    assert why in line
    assert "secret" not in line


@pytest.mark.parametrize("label", ["2", "", None, "yes", float("nan")])
def test_a_label_that_is_none_is_refused(tmp_path: Path, label: object) -> None:
    write(tmp_path / "test.jsonl", [{"input": "a", "label": label}])
    line = refusal(Corr2CauseScenario(data=str(tmp_path), examples=False))
    assert "the column label holds something else than 0 and 1" in line


def test_one_blank_row_in_many_is_left_out_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: Rows = [{"dialogue": "" if n == 3 else f"A: {n}", "summary": "b"} for n in range(150)]
    write(tmp_path / "test.jsonl", [*rows, {"dialogue": None, "summary": "b"}][:150])
    assert counted(SamSumScenario(data=str(tmp_path), examples=False)) == {"test": 149}
    assert "rows left out: test.jsonl: 1 of 150 have no text" in capsys.readouterr().out


# --- tables of one's own ------------------------------------------------------------------------------------


def test_a_table_of_choices_takes_the_answer_as_text_letter_or_number(tmp_path: Path) -> None:
    rows = [{"q": "1+1", "a": "2", "b": "3", "right": answer} for answer in ("2", "3", "A", "b", "0", "1")]
    path = tmp_path / "sums.csv"
    write(path, rows)
    scenario = TableScenario("q", "right", choices="a+b", data=str(path), examples="false")
    found = [i.first_correct_reference.output.text for i in scenario.get_instances("nowhere")]
    assert found == ["2", "3", "2", "3", "2", "3"]
    write(path, [{"q": "1+1", "a": "2", "b": "3", "right": "four"}])
    assert "the column right holds no choice" in refusal(
        TableScenario("q", "right", choices="a+b", data=str(path), examples="false")
    )


def test_a_table_of_short_answers_and_one_with_a_list_of_choices(tmp_path: Path) -> None:
    write(tmp_path / "short.jsonl", [{"q": "Capital of Italy?", "a": "Rome"}])
    (short,) = TableScenario("q", "a", data=str(tmp_path / "short.jsonl"), examples=False).get_instances("")
    assert [reference.output.text for reference in short.references] == ["Rome"]
    write(tmp_path / "listed.parquet", [{"q": "x", "options": ["u", "v", "w"], "a": "C"}])
    table = TableScenario("q", "a", choices="options", data=str(tmp_path / "listed.parquet"), examples=False)
    (listed,) = table.get_instances("")
    assert listed.first_correct_reference.output.text == "w"


# --- the functions themselves -------------------------------------------------------------------------------


def test_a_split_in_a_files_name_beats_its_folders(tmp_path: Path) -> None:
    write(tmp_path / "train" / "test.csv", [{"a": 1}])
    assert [path.name for path in split_files(tmp_path, "test")] == ["test.csv"]
    assert version_folder(tmp_path, "3.0.0") == tmp_path
    write(tmp_path / "all.json", [{"a": 1}])
    assert [path.name for path in only_file(tmp_path)] == ["all.json"]
    assert list(read_rows(tmp_path / "all.json")) == [{"a": 1}]
