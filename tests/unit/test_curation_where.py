"""Rows are kept or dropped by a field of the record that they were read from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from palio.config import DatasetRecipe, faults
from palio.curation.metadata import metadata_of
from palio.errors import BadInput
from tests.support.curation import curate, pairs_of, recipe, write_jsonl

Condition = dict[str, Any]
ABSENT = object()


def split(values: list[Any], operation: Condition, folder: Path) -> tuple[list[Any], list[str]]:
    """The values of field `x` in the rows kept, in their order, and the reasons of the rows dropped."""
    records = [{"id": n, "prompt": f"q{n}", "completion": "a", "x": value} for n, value in enumerate(values)]
    records = [{key: value for key, value in one.items() if value is not ABSENT} for one in records]
    source = write_jsonl(folder / "rows.jsonl", records)
    curate(recipe([{"path": str(source)}], {"field": "x", **operation}), folder / "dataset")
    kept = sorted(int(row["id"]) for row in pq.read_table(folder / "dataset/train.parquet").to_pylist())
    reasons = pq.read_table(folder / "dataset/dropped.parquet")["reason"].to_pylist()
    return [values[number] for number in kept], reasons


@pytest.mark.parametrize(
    ("condition", "fulfilling", "others"),
    [
        ({"equals": "en"}, ["en", ["it", "en"]], ["EN", "english", "it", ["it"], []]),
        ({"equals": ["en", "it"]}, ["en", "it"], ["fr", "en, it"]),
        ({"equals": 3}, [3, 3.0, "3", "3.0"], [True, 4, "three", "33"]),
        ({"equals": True}, [True, "true", "True"], [1, False, "yes"]),
        ({"equals": "3"}, ["3"], [3, "3.0"]),
        ({"matches": "^https?://.*wiki"}, ["https://it.wikipedia.org", "HTTP://WIKI"], ["wiki", 7]),
        ({"matches": "7"}, [17, "a7", [1, 7]], [8, "eight"]),
        ({"min": 0.5, "max": 1}, [0.5, 1, "0.75"], [0.49, 1.01, "high", True]),
        ({"min": 0}, [0, 10**20], [-1, "nan"]),
        ({"max": -1.5}, [-2, "-1.5"], [0, ""]),
    ],
)
def test_a_condition_holds_for_these_values_and_not_for_those(
    condition: Condition, fulfilling: list[Any], others: list[Any], tmp_path: Path
) -> None:
    values = [*fulfilling, *others]
    assert split(values, {"op": "keep_where", **condition}, tmp_path / "keep")[0] == fulfilling
    assert split(values, {"op": "drop_where", **condition}, tmp_path / "drop")[0] == others


def test_rows_without_the_field_go_or_stay_as_the_operation_says(tmp_path: Path) -> None:
    values = ["en", None, ABSENT, float("nan"), "it"]
    keep = {"op": "keep_where", "equals": "en"}
    kept, reasons = split(values, keep, tmp_path / "keep")
    assert kept == ["en"]
    assert sorted(reasons) == ["x is 'it'", "x is missing", "x is missing", "x is missing"]
    assert split(values, {**keep, "missing": "keep"}, tmp_path / "missing")[1] == ["x is 'it'"]
    assert split(values, {"op": "drop_where", "equals": "en"}, tmp_path / "drop")[1] == ["x is 'en'"]


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.sampled_from(["a", "b", "1", "true", ""])
) | st.lists(st.sampled_from(["a", 1, None]), max_size=3)
CONDITIONS = st.one_of(
    st.fixed_dictionaries({"equals": st.sampled_from(["a", 1, True, ["a", "b"], [1, "1"]])}),
    st.fixed_dictionaries({"matches": st.sampled_from(["a", "^1$", "."])}),
    st.fixed_dictionaries({"min": st.integers(-2, 1)}, optional={"max": st.integers(1, 3)}),
)


@settings(max_examples=40)
@given(values=st.lists(VALUES, max_size=12), condition=CONDITIONS)
def test_what_one_operation_keeps_the_other_drops_and_every_row_is_accounted_for(
    values: list[Any], condition: Condition, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("where")
    # One value that fulfills every condition above, one that fulfills none.
    values = [["a", 1, "1", True], *values, []]
    records = [{"id": n, "prompt": "q", "completion": "a", "x": value} for n, value in enumerate(values)]
    sources = [{"path": str(write_jsonl(folder / "rows.jsonl", records))}]
    kept = {}
    for op in ("keep_where", "drop_where"):
        manifest = curate(recipe(sources, {"op": op, "field": "x", **condition}), folder / op)
        (report,) = manifest.operations
        dropped = pq.read_table(folder / op / "dropped.parquet")
        assert report.rows_in == len(values) == report.rows_out + dropped.num_rows
        assert report.dropped_by_source == ({"rows": dropped.num_rows} if dropped.num_rows else {})
        kept[op] = {row["id"] for row in pq.read_table(folder / op / "train.parquet").to_pylist()}
    assert kept["keep_where"] | kept["drop_where"] == {str(number) for number in range(len(values))}
    assert not kept["keep_where"] & kept["drop_where"]


def test_metadata_survives_operations_that_rewrite_and_that_need_all_rows(tmp_path: Path) -> None:
    records = [
        {"id": n, "prompt": f"<p>Who won {n % 4}?</p>", "completion": "me", "labels": {"quality": n / 10}}
        for n in range(10)
    ]
    source = write_jsonl(tmp_path / "rows.jsonl", records)
    where = {"op": "keep_where", "field": "labels.quality", "min": 0.2}
    given = recipe([{"path": str(source)}], "clean_markup", "drop_exact_duplicates", where)
    manifest = curate(given, tmp_path / "dataset")
    assert sorted(pairs_of(tmp_path / "dataset/train.parquet")) == [
        ("Who won 2?", "me"),
        ("Who won 3?", "me"),
    ]
    assert [step.rows_out for step in manifest.operations] == [10, 4, 2]
    assert "metadata" not in pq.read_schema(tmp_path / "dataset/train.parquet").names


@pytest.mark.parametrize("long", ["x", "id"])
def test_long_fields_and_ids_fill_a_batch_as_long_texts_do(long: str, tmp_path: Path) -> None:
    """Else 8 192 rows of 270 KB would overflow a column of Arrow, which holds 2 GiB."""
    records = [{"id": str(n), "prompt": "q", "completion": "a", "x": "y"} for n in range(40)]
    records = [{**one, long: f"{number:08}" * 131_072} for number, one in enumerate(records)]
    source = write_jsonl(tmp_path / "rows.jsonl", records)
    where = {"op": "drop_where", "field": "x", "equals": f"{7:08}" * 131_072}
    manifest = curate(recipe([{"path": str(source)}], where), tmp_path / "dataset")
    assert manifest.rows == (39 if long == "x" else 40)
    read = (tmp_path / "work/curate").glob("sources-*/*.arrow")
    assert len(list(read)) == 2


def test_every_operation_finds_its_own_field(tmp_path: Path) -> None:
    records = [
        {"prompt": f"q{n}", "completion": "a", "lang": lang, "stars": n}
        for n, lang in enumerate(["en", "en", "it", "en"])
    ]
    source = write_jsonl(tmp_path / "rows.jsonl", records)
    english = {"op": "keep_where", "field": "lang", "equals": "en"}
    poor = {"op": "drop_where", "field": "stars", "max": 0}
    curate(recipe([{"path": str(source)}], english, poor), tmp_path / "dataset")
    assert sorted(pairs_of(tmp_path / "dataset/train.parquet")) == [("q1", "a"), ("q3", "a")]


def test_a_field_that_no_row_has_is_refused_with_those_there_are(tmp_path: Path) -> None:
    good = {"prompt": "q", "completion": "a", "lang": "en", "labels": {"quality": 1, "toxicity": None}}
    one = write_jsonl(tmp_path / "one.jsonl", [good])
    other = write_jsonl(tmp_path / "other.jsonl", [{"prompt": "r", "completion": "b", "stars": 5}])
    sources = [{"path": str(one)}, {"path": str(other)}]
    where = {"op": "keep_where", "field": "language", "equals": "en"}
    with pytest.raises(BadInput) as refused:
        curate(recipe(sources, "clean_markup", where), tmp_path / "dataset")
    assert str(refused.value) == (
        "dataset: operations.1.field is 'language': no row has it; "
        "name one of completion, labels.quality, labels.toxicity, lang, prompt, stars"
    )


def test_what_another_operation_looks_at_changes_no_other_rows_and_reads_the_sources_again(
    tmp_path: Path,
) -> None:
    """Rows that were read without a field do not have it."""
    source = write_jsonl(
        tmp_path / "a.jsonl", [{"prompt": f"q{n}", "completion": "a", "n": n} for n in range(4)]
    )
    plain = curate(recipe([{"path": str(source)}]), tmp_path / "dataset")
    every = {"op": "drop_where", "field": "n", "min": 9}
    filtered = curate(recipe([{"path": str(source)}], every), tmp_path / "dataset")
    assert filtered.sha256 == plain.sha256


@pytest.mark.parametrize("condition", [{}, {"equals": "a", "matches": "b"}, {"matches": "a", "min": 0}])
def test_none_or_two_conditions_are_refused(condition: Condition) -> None:
    with pytest.raises(
        BadInput, match=r"operations\.0.*needs one condition; give equals, or matches, or min"
    ):
        recipe([{"path": "a.jsonl"}], {"op": "keep_where", "field": "x", **condition})


@pytest.mark.parametrize(
    ("condition", "fault"),
    [
        (
            "equals: [en, no]",
            "equals: has true or false beside texts; put quotes around texts that YAML takes",
        ),
        (
            "equals: []",
            "equals: is not a value to compare with; give a text, a number, true or false, or a list",
        ),
        ("equals: {en: 1}", "equals: is not a value to compare with; give a text"),
        ("equals: [en, [it]]", "equals: is not a value to compare with; give a text"),
        ("equals: .inf", "equals is inf: is not a value to compare with; give a text"),
        ("{min: 2, max: 1}", "min is 2, above max, 1; swap them"),
    ],
)
def test_a_condition_that_cannot_be_meant_is_one_fault_with_a_plain_key(condition: str, fault: str) -> None:
    where = {"op": "keep_where", "field": "lang", **yaml.safe_load(condition)}
    with pytest.raises(BadInput) as refused:
        recipe([{"path": "a.jsonl"}], where)
    assert fault in str(refused.value)
    assert (
        len(faults(DatasetRecipe, {"sources": [{"path": "a", "licence": "MIT"}], "operations": [where]})) == 1
    )


def test_norwegian_in_quotes_is_norwegian(tmp_path: Path) -> None:
    where = {"op": "keep_where", **yaml.safe_load('equals: [en, "no"]')}
    assert split(["en", "no", "it"], where, tmp_path)[0] == ["en", "no"]


def test_a_preview_that_left_rows_unread_only_notes_that_none_has_the_field(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"q{n}", "completion": "a"} | ({"lang": "it"} if n == 9 else {}) for n in range(10)]
    source = [{"path": str(write_jsonl(tmp_path / "a.jsonl", rows))}]
    given = recipe(source, {"op": "drop_where", "field": "lang", "equals": "it"})
    assert curate(given, tmp_path / "head", limit=5).rows == 5
    assert capsys.readouterr().err == (
        "notice: operations.0.field is 'lang': none of the 5 rows read has it\n"
    )
    assert curate(given, tmp_path / "whole", limit=10).rows == 9
    misspelt = recipe(source, {"op": "drop_where", "field": "language", "equals": "it"})
    with pytest.raises(BadInput, match="no row has it"):
        curate(misspelt, tmp_path / "misspelt", limit=10)


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("sharegpt", {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}),
        ("natural_instructions", {"Definition": "Do.", "Instances": [{"input": "q", "output": ["a"]}]}),
        ("alpaca", {"instruction": "q", "output": "a"}),
    ],
)
def test_a_field_is_found_whatever_the_format(name: str, record: dict[str, Any], tmp_path: Path) -> None:
    records = [{**record, "id": town, "Categories": [town]} for town in ("Siena", "Pisa")]
    source = write_jsonl(tmp_path / "a.jsonl", records)
    where = {"op": "keep_where", "field": "Categories", "equals": "Siena"}
    curate(recipe([{"path": str(source), "format": name}], where), tmp_path / "dataset")
    assert pq.read_table(tmp_path / "dataset/train.parquet")["id"].to_pylist() == ["Siena"]


def test_values_are_kept_as_json_has_them() -> None:
    from datetime import date

    record = {"day": date(2023, 10, 15), "a.b": 1, "a": {"b": 2, "c": {"d": [1, {"e": 2}, [3], None]}}}
    fields = ["day", "a.b", "a.c.d", "a", "a.c.x", "day.x"]
    assert metadata_of(record, fields) == {"day": "2023-10-15", "a.b": 1, "a.c.d": [1]}
    json.dumps(metadata_of(record, fields))
