"""Operations one by one: what each drops, rewrites and keeps."""

from __future__ import annotations

import random
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palio.curation.operations.cleaning import without_markup
from palio.curation.operations.sampling import shares
from palio.errors import BadInput
from tests.curation import curate, pairs_of, recipe, write_jsonl

Rows = list[tuple[str, str]]


def kept(
    rows: Rows, operation: dict[str, object] | str, folder: Path, base_model: Path = Path("none")
) -> Rows:
    """What an operation leaves of the rows, in their order."""
    source = write_jsonl(
        folder / "rows.jsonl",
        [
            {"id": n, "prompt": prompt, "completion": completion}
            for n, (prompt, completion) in enumerate(rows)
        ],
    )
    curate(recipe([{"path": str(source)}], operation), folder / "dataset", base_model)
    table = pq.read_table(folder / "dataset/train.parquet").to_pylist()
    return [(row["prompt"], row["completion"]) for row in sorted(table, key=lambda row: int(row["id"]))]


# --- markup ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("<p>Who <b>won</b>?</p>", "Who won?"),
        ("one<br/>\ntwo<br>three", "one\ntwo\nthree"),
        ("<div class='q'>A &amp; B &lt; C</div>", "A & B < C"),
        ("**Rules:** *all* of them", "Rules: all of them"),
        ("a  b\t c  \nd", "a b c\nd"),
        (" ] )", " ] )"),
        ("Target:\n", "Target:\n"),
        ("X * * Y = Z * 2 * 3", "X * * Y = Z * 2 * 3"),
        ("if a < b and c > d: x**2 + y**2", "if a < b and c > d: x**2 + y**2"),
        ("List<int> f(<n>)", "List<int> f(<n>)"),
    ],
)
def test_markup_goes_and_formulas_stay(text: str, clean: str) -> None:
    assert without_markup(text) == clean


def test_a_row_of_markup_alone_is_dropped(tmp_path: Path) -> None:
    assert kept([("Who?", "<p></p>"), ("Who?", "me")], "clean_markup", tmp_path) == [("Who?", "me")]


# --- refusals and lengths -------------------------------------------------------------------------


def test_answers_that_match_a_pattern_are_dropped_and_questions_may_match(tmp_path: Path) -> None:
    rows = [("Why?", "Sorry, as an AI I won't."), ("Talk as an AI", "beep"), ("Why?", "I cannot say.")]
    assert kept(rows, "drop_refusals", tmp_path) == [("Talk as an AI", "beep")]


def test_a_pattern_that_is_no_regular_expression_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is no regular expression"):
        kept([("a", "b")], {"op": "drop_refusals", "patterns": ["("]}, tmp_path)


def test_rows_outside_the_lengths_are_dropped(tmp_path: Path) -> None:
    rows = [("a" * 10, "b"), ("a" * 11, "b"), ("a", "b" * 6)]
    operation = {"op": "length_filter", "max_prompt": 10, "max_completion": 5}
    assert kept(rows, operation, tmp_path) == rows[:1]


def test_tokens_are_counted_by_the_entrys_own_tokenizer_as_the_trainer_counts(
    tmp_path: Path, base_model: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base_model)
    rows = [("word " * count, "yes") for count in range(1, 20)]
    lengths = [
        sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in row) + 1 for row in rows
    ]
    left = kept(rows, {"op": "token_length", "min": 5, "max": 12}, tmp_path, base_model)
    assert left == [row for row, length in zip(rows, lengths, strict=True) if 5 <= length <= 12]
    assert 0 < len(left) < len(rows)


# --- agreement and duplicates ---------------------------------------------------------------------


def test_the_most_frequent_answer_stays_and_a_tie_drops_the_prompt(tmp_path: Path) -> None:
    rows = [
        ("2 + 2 =", "4"), ("2 + 2 =", "5"), ("2  + 2 = ", "4 "),
        ("Best horse?", "Remorex"), ("best horse?", "Panezio"),
        ("Alone?", "yes"),
    ]  # fmt: skip
    assert kept(rows, "drop_disagreement", tmp_path) == [rows[0], rows[2], rows[5]]


def test_of_equal_rows_the_first_stays(tmp_path: Path) -> None:
    rows = [("Who won?", "Oca"), ("who  won? ", "OCA"), ("Who won?", "Onda")]
    assert kept(rows, "drop_exact_duplicates", tmp_path) == [rows[0], rows[2]]


WORDS = [f"{first}{second}" for first in "bcdfglmnprstv" for second in ("ala", "eno", "isto", "ora", "umi")]


def essays(count: int, seed: int = 0) -> Rows:
    draw = random.Random(seed)
    return [(" ".join(draw.choices(WORDS, k=80)), " ".join(draw.choices(WORDS, k=20))) for _ in range(count)]


def test_near_duplicates_are_found_and_the_first_stays(tmp_path: Path) -> None:
    originals = essays(300)
    draw = random.Random(1)
    copies = []
    for prompt, completion in originals:
        words = prompt.split()
        for place in draw.sample(range(len(words)), 2):
            words[place] = draw.choice(WORDS)
        copies.append((" ".join(words), completion))
    left = kept(originals + copies, "drop_near_duplicates", tmp_path)
    assert set(originals) <= set(left)
    assert len(set(copies) & set(left)) <= 0.02 * len(copies)


def test_questions_that_differ_in_one_number_or_name_are_no_duplicates(tmp_path: Path) -> None:
    frame = " ".join(essays(1)[0][0].split()[:60])
    numbers = [
        (f"{frame} and then sold {n} horses in July. How many are left?", "some") for n in range(2, 40)
    ]
    names = [
        (f"{frame} and then {name} sold the horse. Who owns it?", "nobody")
        for name in ("Anna", "Bruno", "Carla")
    ]
    copies = [(prompt.replace(" ", "  ").upper(), completion) for prompt, completion in numbers[:5]]
    assert kept(numbers + names + copies, "drop_near_duplicates", tmp_path) == numbers + names


def test_rows_below_the_threshold_are_kept(tmp_path: Path) -> None:
    rows = essays(1)
    words = rows[0][0].split()
    rows.append((" ".join(words[:40] + essays(1, seed=9)[0][0].split()[:40]), rows[0][1]))
    assert kept(rows, {"op": "drop_near_duplicates", "threshold": 0.8}, tmp_path) == rows


# --- sampling -------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 50), min_size=1), st.integers(1, 200))
def test_shares_are_as_equal_as_the_sources_allow(available: dict[str, int], rows: int) -> None:
    taken = shares(available, rows)
    assert sum(taken.values()) == min(rows, sum(available.values()))
    short = [taken[source] for source in available if taken[source] < available[source]]
    assert all(taken[source] <= available[source] for source in available)
    assert not short or max(taken.values()) - min(short) <= 1


def test_sampling_takes_the_same_number_of_every_source(tmp_path: Path) -> None:
    for name, count in (("big", 50), ("small", 5)):
        write_jsonl(
            tmp_path / f"{name}.jsonl", [{"prompt": f"{name} {n}", "completion": "x"} for n in range(count)]
        )
    sources = [{"path": str(tmp_path / f"{name}.jsonl")} for name in ("big", "small")]
    manifest = curate(recipe(sources, {"op": "sample_rows", "rows": 20}), tmp_path / "dataset")
    assert manifest.rows_by_source == {"big": 15, "small": 5}
    other = curate(recipe(sources, {"op": "sample_rows", "rows": 20}, seed=1), tmp_path / "other")
    assert set(pairs_of(tmp_path / "other/train.parquet")) != set(
        pairs_of(tmp_path / "dataset/train.parquet")
    )
    assert other.rows == 20
