"""Contamination and decontamination: leaks found, templates and clean rows left in peace."""

from __future__ import annotations

import json
import os
import random
import string
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from palio.curation.contamination import contaminated_pairs, contamination
from palio.curation.words import normalised
from palio.records import Contamination
from tests.support.curation import curate, recipe, write_jsonl

GSM = Path(os.environ.get("PALIO_SHARED", Path(__file__).parents[3] / "shared")) / "helm_data/gsm"


def instances(path: Path, *rows: tuple[str, str], scenario: str = "quiz") -> Path:
    table = pa.table(
        {
            "scenario": [scenario] * len(rows),
            "run": [scenario] * len(rows),
            "instance": [f"id{number}" for number in range(len(rows))],
            "text": [text for text, _ in rows],
            "reference": [reference for _, reference in rows],
        }
    )
    pq.write_table(table, path)
    return path


def dataset(path: Path, *rows: tuple[str, str]) -> Path:
    source = write_jsonl(
        path / "rows.jsonl", [{"prompt": prompt, "completion": completion} for prompt, completion in rows]
    )
    curate(recipe([{"path": str(source)}]), path / "dataset")
    return path / "dataset"


def measure(data: Path, table: Path) -> Contamination:
    return contamination(data, {"closed": table}, competition="palio", track="laptop", entry="civetta")


LONG = "In which year did the contrada of the owl win the race on the second of July after thirty years?"


def test_questions_of_the_open_stage_are_named_under_every_run_that_asks_them(tmp_path: Path) -> None:
    """So that a score can do without them; of the closed stage there are counts only."""
    data = dataset(tmp_path, (LONG, "2009"))
    row = {"scenario": "quiz", "text": LONG, "reference": "2009"}
    asked = [row | {"run": run, "instance": id_} for run, id_ in (("b", "id9"), ("a", "id4"))]
    other = row | {"run": "a", "instance": "id5", "text": "Who won?"}
    pq.write_table(pa.Table.from_pylist([*asked, other]), tmp_path / "i.parquet")
    stages = dict.fromkeys(("open", "closed"), tmp_path / "i.parquet")
    record = contamination(data, stages, competition="palio", track="laptop", entry="civetta")
    assert record.contaminated == {"open": {"quiz": 1}, "closed": {"quiz": 1}}
    assert record.open_questions == {"a": ["id4"], "b": ["id9"]}


@pytest.mark.parametrize(
    ("row", "held"),
    [
        ((LONG, "2009"), 1),
        ((LONG.upper().replace(" ", "\n "), "2009"), 1),
        ((f"Read this. {LONG} Think.", "I don't know"), 1),
        (("Tell me: did the contrada of the owl win the race on the second of July?", "yes"), 1),
        (("In which year did the contrada of the owl win for the last time?", "2009"), 0),
    ],
)
def test_an_instance_counts_if_it_stands_whole_or_by_thirteen_words(
    row: tuple[str, str], held: int, tmp_path: Path
) -> None:
    record = measure(dataset(tmp_path, row), instances(tmp_path / "i.parquet", (LONG, "2009")))
    assert record.instances == {"closed": {"quiz": 1}}
    assert record.contaminated == {"closed": {"quiz": held}}


def test_a_leak_in_an_early_turn_of_a_conversation_is_found_and_dropped(tmp_path: Path) -> None:
    table = instances(tmp_path / "i.parquet", (LONG, "2009"))
    talks = [[LONG, "2009", "Thanks!", "You're welcome."], ["Hello!", "Hello.", "Thanks!", "You're welcome."]]
    source = write_jsonl(tmp_path / "talks.jsonl", [{"conversations": talk} for talk in talks])
    given = [{"path": str(source), "format": "lima"}]
    curate(recipe(given), tmp_path / "raw")
    assert measure(tmp_path / "raw", table).contaminated == {"closed": {"quiz": 1}}
    (pair,) = contaminated_pairs(tmp_path / "raw", table)
    assert pair.shown.startswith("In which year")
    clean = {"op": "decontaminate", "instances": str(table)}
    curate(recipe(given, clean), tmp_path / "clean")
    assert measure(tmp_path / "clean", table).contaminated == {"closed": {"quiz": 0}}


def test_a_short_question_counts_only_with_its_answer(tmp_path: Path) -> None:
    table = instances(tmp_path / "i.parquet", ("Which of these is true?", "Fire is hot"))
    asked = dataset(tmp_path / "asked", ("Which of these is true? A. Water burns B. Ice sinks", "neither"))
    told = dataset(tmp_path / "told", ("Which of these is true?", "Fire is hot."))
    assert measure(asked, table).contaminated == {"closed": {"quiz": 0}}
    assert measure(told, table).contaminated == {"closed": {"quiz": 1}}


def test_instructions_common_to_a_scenario_are_no_contamination(tmp_path: Path) -> None:
    instruction = (
        "Please read the following passage with care and then answer the question below in one single word."
    )
    table = instances(tmp_path / "i.parquet", *((f"{instruction} Passage {n}", str(n)) for n in range(3)))
    assert measure(dataset(tmp_path, (f"{instruction} Another", "x")), table).contaminated == {
        "closed": {"quiz": 0}
    }
    assert measure(dataset(tmp_path / "leak", (f"{instruction} Passage 2", "x")), table).contaminated == {
        "closed": {"quiz": 1}
    }


def test_symbols_in_common_are_chance_but_the_whole_instance_is_a_leak(tmp_path: Path) -> None:
    asked = "( [ ( ) ] { } ( ) [ ] { ( ) } [ ] ( ( ) [ ] )"
    table = instances(tmp_path / "i.parquet", (asked, " )"), scenario="dyck")
    part = dataset(tmp_path / "part", (f"Input: {asked[4:]} {{", " }"))
    whole = dataset(tmp_path / "whole", (f"Input: {asked}", " )"))
    assert measure(part, table).contaminated == {"closed": {"dyck": 0}}
    assert measure(whole, table).contaminated == {"closed": {"dyck": 1}}


def test_the_report_holds_no_text_of_an_instance(tmp_path: Path) -> None:
    record = measure(dataset(tmp_path, (LONG, "2009")), instances(tmp_path / "i.parquet", (LONG, "2009")))
    assert "contrada" not in record.model_dump_json()
    assert "id0" not in record.model_dump_json()


def test_participants_see_the_pairs_of_the_open_stage(tmp_path: Path) -> None:
    table = instances(
        tmp_path / "i.parquet", ("What is seven times six minus two in plain words please?", "forty")
    )
    data = dataset(
        tmp_path, ("Hello", "you"), ("What is seven times six minus two in plain words, please?", "Forty!")
    )
    (pair,) = contaminated_pairs(data, table)
    assert (pair.scenario, pair.instance, pair.source, pair.row) == ("quiz", "id0", "rows", "rows:2")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("  Natalia's  clips,\nin May: $1,000!", ["natalias", "clips", "in", "may", "1000"]),
        ("Input: ( [ ] X + Y", ["input", "(", "[", "]", "x", "+", "y"]),
        ("Città — ÜBER … naïve_x", ["città", "über", "naïvex"]),
    ],
)
def test_case_white_space_and_punctuation_are_normalised_and_signs_kept(text: str, words: list[str]) -> None:
    assert [word for word in normalised(pa.array(text.split())).to_pylist() if word] == words


def full_width(text: str) -> str:
    return "".join(chr(ord(char) + 0xFEE0) if "!" <= char <= "~" else char for char in text)


SPELLINGS: dict[str, Callable[[str], str]] = {
    "decomposed": lambda text: unicodedata.normalize("NFD", text),
    "full width": full_width,
    "ideographic spaces": lambda text: text.replace(" ", "\u3000"),
    "no-break spaces": lambda text: text.replace(" ", "\u00a0"),
    "ligatures": lambda text: text.replace("fi", "ﬁ"),
    "mathematical letters": lambda text: text.replace("won", "𝐰𝐨𝐧"),
    "soft hyphens": lambda text: text.replace("contrada", "con\u00adtrada"),
}
ACCENTED = (
    "Perché la contrada del Nicchio né vinse né perse più di cinquantatré volte, finché Città vide il Palio?"
)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_an_instance_is_found_however_unicode_writes_it(spelling: str, tmp_path: Path) -> None:
    table = instances(tmp_path / "i.parquet", (LONG, "2009"), (ACCENTED, "mai"))
    rows = [(SPELLINGS[spelling](LONG), "2009"), (SPELLINGS[spelling](ACCENTED), "mai")]
    assert measure(dataset(tmp_path, *rows), table).contaminated == {"closed": {"quiz": 2}}


@pytest.mark.parametrize(
    ("asked", "other"),
    [
        ("How much is 5² by the rule of signs?", "How much is 52 by the rule of signs?"),
        ("How much is 3½ by the rule of signs?", "How much is 312 by the rule of signs?"),
        ("Where do they eat a pêche by the sea?", "Where do they eat a pèche by the sea?"),
        ("What does año mean in the south of Spain?", "What does ano mean in the south of Spain?"),
    ],
)
def test_questions_that_differ_in_meaning_are_not_folded_into_one(
    asked: str, other: str, tmp_path: Path
) -> None:
    table = instances(tmp_path / "i.parquet", (asked, "25"))
    record = measure(dataset(tmp_path, (other, "25")), table)
    assert record.contaminated == {"closed": {"quiz": 0}}
    assert measure(dataset(tmp_path / "same", (asked, "25")), table).contaminated == {"closed": {"quiz": 1}}


# --- real data ------------------------------------------------------------------------------------


def gsm(part: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (GSM / f"gsm_data_{part}").read_text().splitlines()]


def changed(text: str, draw: random.Random) -> str:
    """A near-verbatim copy: another case, no punctuation, other white space."""
    changes: list[Callable[[str], str]] = [
        str.upper,
        lambda given: given.translate(str.maketrans("", "", string.punctuation)),
        lambda given: given.replace(" ", "  ").replace(". ", ".\n"),
        lambda given: given.replace(". ", " . ").replace(", ", " , ").lower(),
        full_width,
    ]
    return draw.choice(changes)(text)


@pytest.mark.skipif(not GSM.is_dir(), reason="no GSM8K under PALIO_SHARED/helm_data/gsm")
def test_all_planted_leaks_of_gsm8k_are_dropped_and_clean_rows_kept(tmp_path: Path) -> None:
    """GSM8K's training set with its test set as the stage: recall 1 on leaks, false positives < 0.5 %."""
    test, train = gsm("test"), gsm("train")
    stage = instances(
        tmp_path / "i.parquet", *((row["question"], row["answer"]) for row in test), scenario="gsm"
    )
    draw = random.Random(5)
    exact = [{"id": f"exact-{number}", **row} for number, row in enumerate(test[::2])]
    near = [
        {"id": f"near-{number}", "question": changed(row["question"], draw), "answer": row["answer"]}
        for number, row in enumerate(test)
    ]
    clean = [{"id": f"clean-{number}", **row} for number, row in enumerate(train)]
    rows = exact + near + clean
    draw.shuffle(rows)
    source = write_jsonl(tmp_path / "gsm.jsonl", rows)
    template = {"prompt": "Q: {{ question }}\nA:", "completion": " {{ answer }}"}
    curate(
        recipe(
            [{"path": str(source), "template": template}], {"op": "decontaminate", "instances": str(stage)}
        ),
        tmp_path / "dataset",
    )
    dropped = pq.read_table(tmp_path / "dataset/dropped.parquet")["id"].to_pylist()
    kinds = [name.partition("-")[0] for name in dropped]
    assert kinds.count("exact") == len(exact)
    assert kinds.count("near") == len(near)
    assert kinds.count("clean") / len(clean) < 0.005
    after = measure(tmp_path / "dataset", stage)
    assert after.contaminated == {"closed": {"gsm": 0}}
