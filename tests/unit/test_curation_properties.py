"""What holds of all texts and all recipes: no character is lost on the way to the trainer, and no row."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from palio.curation.formats import FORMATS
from palio.errors import BadInput
from palio.tokens import Tokens
from palio.training.rows import tokenize
from tests.support.curation import curate, recipe, write_jsonl
from tests.unit.test_curation_sources import csv_line, read

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40).filter(str.strip)
"""Any text but lone surrogates, which are none."""
BARE_TEXT = ANY_TEXT.map(str.strip).filter(lambda text: "Human:" not in text and "Assistant:" not in text)


def record_of(name: str, turns: tuple[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A record of a format with a question and an answer, and the source's settings."""
    question, answer = turns
    talk = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    records: dict[str, dict[str, Any]] = {
        "pairs": {"prompt": question, "completion": answer},
        "alpaca": {"instruction": question, "input": "", "output": answer},
        "dolly": {"instruction": question, "context": "", "response": answer},
        "sharegpt": {"conversations": talk},
        "lima": {"conversations": [question, answer]},
        "messages": {
            "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        },
        "oasst": {
            "prompt": {"text": question, "replies": [{"role": "assistant", "text": answer, "replies": []}]}
        },
        "flan": {"inputs": question, "targets": answer},
        "natural_instructions": {"Definition": "Do.", "Instances": [{"input": question, "output": [answer]}]},
        "transcript": {"text": f"Human: {question}\nAssistant: {answer}"},
        "text": {"text": answer},
        "template": {"q": question, "a": answer},
    }
    if name == "oasst_flat":  # two records: see the test
        return {"message_id": "q", "parent_id": None, "role": "prompter", "text": question}, {"format": name}
    if name == "template":
        return records[name], {"template": {"prompt": "{{ q }}", "completion": "{{ a }}"}}
    return records[name], {"format": name}


@pytest.fixture(scope="module")
def tokens(base_model: Path) -> Tokens:
    return Tokens(AutoTokenizer.from_pretrained(base_model))


def known(text: str, tokens: Tokens) -> str:
    """The text without what the vocabulary lacks: some control characters, and the planes without letters."""
    tokenizer = tokens._tokenizer
    return "".join(
        char
        for char in text.replace("\ufffd", "")
        if ord(char) in range(32, 127) or tokenizer.decode(tokenizer.encode(char)) == char
    )


# Without shrinking: each example is a whole curation.
@settings(
    max_examples=4,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(talks=st.lists(st.tuples(BARE_TEXT, BARE_TEXT), min_size=5, max_size=20))
@example(
    talks=[("é e\u0301 Å \u212b", "\ufeff\u2028\u0085\x00\x1b 🦉‍🐎 \U0002a6d6"), ("<|im_end|><s>", '"\\"')]
)
def test_any_text_survives_from_a_record_to_the_trainer_and_back(
    talks: list[tuple[str, str]], tokens: Tokens, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """In every format: read, curated, tokenized, and decoded again, but for characters that the demo's
    tokenizer has no tokens for (`palio inspect --tokens` names them)."""
    folder = tmp_path_factory.mktemp("text")
    sources, expected = [], Counter[tuple[str, str, str]]()
    for name in (*FORMATS, "template"):
        records: list[dict[str, Any]] = []
        for number, (question, answer) in enumerate(talks):
            record, settings = record_of(name, (question, answer))
            records.append(record)
            if name == "oasst_flat":
                record["message_id"] = f"q{number}"
                reply = {"message_id": f"a{number}", "parent_id": f"q{number}", "role": "assistant"}
                records.append({**reply, "text": answer})
            asked = {"text": "", "natural_instructions": f"Do.\n\n{question}"}.get(name, question)
            expected[name, asked, answer] += 1
        sources.append({"path": str(write_jsonl(folder / f"{name}.jsonl", records)), **settings})
    curate(recipe(sources), folder / "dataset")
    rows = pq.read_table(folder / "dataset/train.parquet").to_pylist()
    assert Counter((row["source"], row["prompt"], row["completion"]) for row in rows) == expected
    trained, _ = tokenize(tokens, [(row["prompt"], row["completion"]) for row in rows], 10_000)
    for row, made in zip(rows, trained, strict=True):
        ((start, end),) = made.answers
        prompt, answered = made.ids[:start], made.ids[start : end - 1]
        for ids, text in ((prompt, row["prompt"]), (answered, row["completion"])):
            if text:  # what is left of a character's bytes is shown as U+FFFD
                assert tokens._tokenizer.decode(ids).replace("\ufffd", "") == known(text, tokens)


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "tsv", "parquet"])
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.tuples(ANY_TEXT, ANY_TEXT), min_size=1, max_size=6))
@example(rows=[('"', "\\"), ("a\r\nb", "c\rd"), (",\t", '""\n"'), ("\ufeff", "x")])
def test_any_text_survives_every_type_of_file(
    ending: str, rows: list[tuple[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("file")
    path = folder / f"a.{ending}"
    records = [{"prompt": question, "completion": answer} for question, answer in rows]
    if ending == "parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    elif ending in ("csv", "tsv"):
        delimiter = "," if ending == "csv" else "\t"
        lines = [csv_line(("prompt", "completion"), delimiter), *(csv_line(row, delimiter) for row in rows)]
        path.write_bytes("".join(lines).encode())
    else:
        text = json.dumps(records, ensure_ascii=False)
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        path.write_bytes((text if ending == "json" else "".join(lines)).encode())
    curate(recipe([{"path": str(path)}]), folder / "dataset")
    table = pq.read_table(folder / "dataset/train.parquet").to_pylist()
    assert Counter((row["prompt"], row["completion"]) for row in table) == Counter(rows)


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "oasst_flat"])
def test_a_lone_surrogate_is_set_aside_in_every_format(name: str, tmp_path: Path) -> None:
    bad, source = record_of(name, ("a\ud800", "b\udfff"))
    good, _ = record_of(name, ("a", "b"))
    rows, quarantined = read(write_jsonl(tmp_path / "a.jsonl", [good, bad]), **source)
    assert len(rows) == 1
    assert quarantined == [(2, "has half a surrogate pair, which is no text")]


# --- every row is accounted for -------------------------------------------------------------------------

OPERATIONS: list[dict[str, Any]] = [
    {"op": "clean_markup"},
    {"op": "drop_refusals"},
    {"op": "drop_disagreement"},
    {"op": "drop_exact_duplicates"},
    {"op": "drop_near_duplicates"},
    {"op": "length_filter", "max_prompt": 40},
    {"op": "drop_matches", "patterns": ["owl"]},
    {"op": "replace_matches", "pattern": "July", "by": "August"},
    {"op": "replace_matches", "pattern": "^yes$", "field": "completion"},
    {"op": "cap_rows", "rows": 5},
    {"op": "sample_rows", "rows": 25, "temperature": 2},
    {"op": "keep_quality"},
    {"op": "keep_where", "field": "lang", "equals": ["en", 7], "missing": "keep"},
    {"op": "drop_where", "field": "lang", "matches": "i"},
]


def random_record(draw: random.Random, name: str) -> str:
    """A line: most of them good, some broken in one of the ways there are."""
    words = ("who", "won", "the owl", "July", "<b>yes</b>", "yes", "no", "as an AI", "É", "7", "")
    texts = tuple(" ".join(draw.choices(words, k=draw.randint(1, 4))) for _ in range(2))
    record, _ = record_of(name, (texts[0], texts[1]))
    if draw.random() < 0.2:
        record["id"] = draw.choice(["", "same", None, draw.random()])
    record["lang"] = draw.choice(["en", "it", 7, None])
    line = json.dumps(record)
    kinds = {0: "{", 1: "[]", 2: '"x"', 3: "\ufeff" + line, 4: line.replace("a", "\\ud800"), 5: "null"}
    return kinds.get(draw.randrange(60), line)


@pytest.mark.parametrize("seed", range(200))
def test_rows_read_are_kept_dropped_or_quarantined(seed: int, tmp_path: Path) -> None:
    """Of 200 random recipes: sources of any format and operations in any order."""
    draw = random.Random(seed)
    sources, lines = [], {}
    for number in range(draw.randint(1, 3)):
        name = draw.choice([name for name in FORMATS if name != "oasst_flat"])
        label = f"s{number}"
        content = [random_record(draw, name) for _ in range(draw.randint(1, 60))]
        (tmp_path / f"{label}.jsonl").write_text("".join(line + "\n" for line in content))
        lines[label] = len(content)
        sources.append({"path": str(tmp_path / f"{label}.jsonl"), "format": name})
    operations = draw.sample(OPERATIONS, draw.randint(0, 5))
    given = recipe(sources, *operations, max_quarantined=1.0, seed=seed)
    try:
        manifest = curate(given, tmp_path / "dataset")
    except BadInput as refused:  # no row is left
        known = ("dropped the last of", "hold no row", "no row has it")
        assert any(reason in str(refused) for reason in known)
        return
    kept = pq.read_table(tmp_path / "dataset/train.parquet")
    dropped = pq.read_table(tmp_path / "dataset/dropped.parquet")
    quarantined = (tmp_path / "dataset/quarantine.jsonl").read_text().splitlines()
    read = Counter(kept["source"].to_pylist()) + Counter(dropped["source"].to_pylist())
    aside = Counter(json.loads(line)["source"] for line in quarantined)
    assert {label: read[label] + aside[label] for label in lines} == lines
    assert {one.name: (one.rows, one.quarantined) for one in manifest.sources} == {
        label: (read[label], aside[label]) for label in lines
    }
    ids = [(row["source"], row["id"]) for row in kept.to_pylist() + dropped.to_pylist()]
    assert len(set(ids)) == len(ids)
