"""Sources as people have them: published formats read to exact rows, and small files that once went wrong."""

from __future__ import annotations

import codecs
import gzip
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from palio.config import DataSource
from palio.curation.source import Quarantined, read_source
from palio.errors import BadInput, InvalidValue
from tests.support.curation import curate, recipe, write_jsonl

CASES = Path(os.environ.get("PALIO_SHARED", Path(__file__).parents[3] / "shared")) / "cases/curation"
cases = pytest.mark.skipif(not CASES.is_dir(), reason="no cases/curation under PALIO_SHARED")


def read(path: Path, **settings: Any) -> tuple[list[tuple[str, ...]], list[tuple[int, str]]]:
    """Read a source: the turns of its rows, and line and reason of its quarantined records."""
    source = DataSource(path=str(path), licence="CC0-1.0", **settings)
    rows, quarantined = [], []
    for record in read_source(source, ()):
        if isinstance(record, Quarantined):
            quarantined.append((record.line, record.reason))
        else:
            rows.append(tuple(record.turns))
    return rows, quarantined


def sums(count: int) -> list[tuple[str, str]]:
    return [(f"Q{n}: what is {n} plus {n}?\nA:", f" {2 * n}") for n in range(count)]


# --- cases ----------------------------------------------------------------------------------------------


@cases
def test_a_byte_order_mark_costs_no_row() -> None:
    assert read(CASES / "bom.jsonl") == (sums(30), [])


@cases
def test_a_quote_that_is_never_closed_is_refused_at_its_line(tmp_path: Path) -> None:
    with pytest.raises(
        BadInput, match=r"openquote\.csv: line 62: a quote opened in this record is never closed"
    ):
        curate(recipe([{"path": str(CASES / "openquote.csv")}]), tmp_path / "dataset")
    assert not (tmp_path / "dataset").exists()


@cases
def test_nulls_and_nan_never_become_text() -> None:
    template = {"prompt": "{{ q }}\n{{ ctx }}", "completion": "{{ a }} {{ b }}"}
    rows, quarantined = read(CASES / "null_template.jsonl", template=template)
    assert len(rows) == 30
    assert not quarantined
    assert rows[:3] == [("Add 0\nwith care", " True"), ("Add 1\n", "1 True"), ("Add 2\nwith care", "2 True")]
    assert not [row for row in rows if "None" in "".join(row) or "nan" in "".join(row)]
    rows, _ = read(CASES / "nan_alpaca.jsonl", format="alpaca")
    assert rows == [(f"Add {n}", f"{n}") for n in range(30)]


@cases
def test_a_parquet_text_that_is_not_utf8_is_refused_by_column_and_row() -> None:
    with pytest.raises(BadInput, match=r"invalid_utf8\.parquet: column prompt, row 30: is not UTF-8"):
        read(CASES / "invalid_utf8.parquet")


@cases
@pytest.mark.parametrize("name", ["msg_emptysystem", "msg_nullsystem"])
def test_a_blank_system_turn_is_no_turn(name: str) -> None:
    assert read(CASES / f"{name}.jsonl", format="messages") == (
        [(f"hi {n}", f"hello {n}") for n in range(30)],
        [],
    )


@cases
def test_a_role_is_named_and_can_be_mapped() -> None:
    rows, quarantined = read(CASES / "sg_roles.jsonl", format="sharegpt")
    assert len(rows) == 41
    assert [reason.partition(",")[0] for _, reason in quarantined] == [
        "turn 2 is by 'chatgpt'",
        "turn 2 is by 'bing'",
    ]
    roles = {"chatgpt": "assistant", "bing": "assistant"}
    rows, quarantined = read(CASES / "sg_roles.jsonl", format="sharegpt", roles=roles)
    assert (len(rows), quarantined) == (43, [])


@cases
@pytest.mark.parametrize("settings", [{}, {"id": ""}])
def test_blank_ids_are_none(settings: dict[str, Any]) -> None:
    assert read(CASES / "ids_empty.jsonl", **settings) == (sums(30), [])


@cases
def test_an_array_of_records_is_a_source() -> None:
    rows, quarantined = read(CASES / "array.jsonl")
    assert (rows, quarantined) == (sums(len(rows)), [])
    assert len(rows) == len(json.loads((CASES / "array.jsonl").read_text()))


# --- the same faults elsewhere --------------------------------------------------------------------------

PAIRS = [{"prompt": f'Who\nran "{n}"?', "completion": f"Ündine, {n}"} for n in range(20)]
EXPECTED = [(pair["prompt"], pair["completion"]) for pair in PAIRS]


def csv_line(fields: Sequence[str], delimiter: str = ",") -> str:
    """A line by RFC 4180, every field quoted."""
    return delimiter.join('"' + field.replace('"', '""') + '"' for field in fields) + "\r\n"


def csv_text(delimiter: str = ",") -> str:
    return "".join(csv_line(row, delimiter) for row in [("prompt", "completion"), *EXPECTED])


TEXTS = {
    "jsonl": "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in PAIRS),
    "json": json.dumps(PAIRS, indent=2, ensure_ascii=False),
    "csv": csv_text(),
    "tsv": csv_text("\t"),
}


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8], ids=["plain", "BOM"])
@pytest.mark.parametrize("ending", TEXTS)
def test_every_text_file_gives_all_rows_with_and_without_a_mark(
    ending: str, mark: bytes, packed: str, tmp_path: Path
) -> None:
    content = mark + TEXTS[ending].encode()
    pack: dict[str, Callable[[bytes], bytes]] = {
        "": bytes,
        ".gz": gzip.compress,
        ".zst": lambda data: bytes(pa.compress(data, codec="zstd", asbytes=True)),
    }
    path = tmp_path / f"a.{ending}{packed}"
    path.write_bytes(pack[packed](content))
    assert read(path) == (EXPECTED, [])


def test_files_with_a_mark_can_be_concatenated(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes((codecs.BOM_UTF8 + TEXTS["jsonl"].encode()) * 2)
    assert read(tmp_path / "a.jsonl") == (EXPECTED * 2, [])


@pytest.mark.parametrize("ending", TEXTS)
@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_other_encodings_are_refused_or_named(ending: str, encoding: str, tmp_path: Path) -> None:
    (tmp_path / f"a.{ending}").write_bytes(TEXTS[ending].encode(encoding))
    with pytest.raises(BadInput, match="UTF-"):
        curate(recipe([{"path": str(tmp_path / f"a.{ending}")}]), tmp_path / "dataset")


@pytest.mark.parametrize(
    ("lines", "line"),
    [
        (['"Q2: a 5 inch pipe?,6', "Q3: x,7", '"Q4: a 7 inch pipe?,8', "Q5: x,9"], 3),  # the next one follows
        (['"Q2: a 5 inch pipe?,6', "Q3: x,7", 'Q4: y,7"', "Q5: x,9"], 3),  # the end of a line closes it
        (['"Q2: a 5 inch pipe?,6', "Q3: x,7", 'Q4: y",7', "Q5: x,9"], 3),  # the end of a field closes it
        (['"He said \\"hi\\" to me",x', "Q3: x,7"], 3),  # backslashes
        (['"He said \\"",x', "Q3: x,7"], 3),
        (['"Q2" is what?,x', "Q3: x,7"], 3),
    ],
)
def test_no_row_swallows_another(lines: list[str], line: int, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("\n".join(["prompt,completion", "Q1: x,5", *lines]) + "\n")
    with pytest.raises(BadInput, match=rf"a\.csv: line {line}: a quote"):
        read(tmp_path / "a.csv")


def test_texts_of_many_lines_and_quotes_inside_a_bare_field_are_read_as_they_are(tmp_path: Path) -> None:
    """Among them one that looks like rows: of most records that does not hold."""
    texts = ["Add, up\na, 1\nb, 2\nSum?", "A poem\nof three\nlines", "Roses\n\nViolets", "1\n2\n3\n4"]
    rows = [(text, "x") for text in texts] + [('a 5" pipe', 'the "owl"')]
    content = "".join(f'"{text}",x\n' for text in texts) + 'a 5" pipe,the "owl"\n'
    (tmp_path / "a.csv").write_text("prompt,completion\n" + content)
    assert read(tmp_path / "a.csv") == (rows, [])


def test_rows_of_another_length_and_twice_named_columns_are_told(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('prompt,completion\n"a\nb",x\n\nc\nd,y,z\n')
    assert read(tmp_path / "a.csv") == (
        [("a\nb", "x")],
        [(5, "has 1 fields, the header has 2"), (6, "has 3 fields, the header has 2")],
    )
    (tmp_path / "b.csv").write_text("prompt,prompt\na,b\n")
    with pytest.raises(BadInput, match="two columns are called 'prompt'"):
        read(tmp_path / "b.csv")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"prompt": "a", "completion": "b"}, {"prompt":', "record 2: is not JSON"),
        ('[{"prompt": "a", "completion": "b"}', "record 1: is not JSON: the array is not closed"),
        ('[{"prompt": "a", "completion": "b"} {"prompt": "c"}]', "the array is not closed"),
        ('[{"prompt": "a", "completion": "b"},]', "record 2: is not JSON"),
        ('[{"prompt": "a", "completion": "b"}] {"prompt": "c"}', "something follows the array"),
        ("[" * 100_000, "record 1: is not JSON"),
    ],
)
def test_a_broken_array_is_refused_whole(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(BadInput, match=message):
        read(tmp_path / "a.json")


def test_an_array_is_read_item_by_item_whatever_its_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("palio.curation.files._JsonText._block", 7)
    (tmp_path / "a.json").write_text(TEXTS["json"])
    (tmp_path / "b.json").write_text("".join(json.dumps(pair, indent=1) for pair in PAIRS) + " 17 ")
    assert read(tmp_path / "a.json") == (EXPECTED, [])
    assert read(tmp_path / "b.json") == (EXPECTED, [(21, "is not a JSON object")])


@pytest.mark.parametrize(
    ("template", "record", "row"),
    [
        ("{{ 'Context: ' ~ c }}", {"c": None}, "Context: "),
        ("{% if c is none %}no{% else %}{{ c }}{% endif %} context", {"c": None}, "no context"),
        ("{% if c == none %}no{% endif %} context", {"c": float("nan")}, "no context"),
        ("{{ c or 'no' }} context", {"c": None}, "no context"),
        ("{{ c | default('no', true) }} context", {"c": None}, "no context"),
        ("{{ c | join(', ') }}.", {"c": ["a", None, "b"]}, "a, , b."),
        ("{{ c.d }}.", {"c": {"d": float("nan")}}, "."),
        ("{{ c }}", {"c": 0}, "0"),
        ("{{ c }}", {"c": False}, "False"),
    ],
)
def test_a_null_in_a_template_is_an_empty_text_wherever_it_is(
    template: str, record: dict[str, Any], row: str, tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [record])
    rows, _ = read(path, template={"prompt": template, "completion": "x"})
    assert rows == [(row, "x")]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ a / 0 }}", "division by zero"),
        ("{{ a.b.c }}", "has no attribute 'b'"),
        ("{{ missing }}", "'missing' is undefined"),
        ("{{ a | round('x') }}", "does not fit the template"),
    ],
)
def test_a_template_that_raises_sets_the_record_aside(template: str, reason: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"a": 1}])
    rows, ((_, said),) = read(path, template={"prompt": template, "completion": "x"})
    assert not rows
    assert reason in said


@pytest.mark.parametrize("template", ["{{ a", "{{ a | nofilter }}", "{% for %}"])
def test_a_template_that_does_not_parse_is_refused_with_the_entry(template: str) -> None:
    with pytest.raises(BadInput, match="is not a Jinja template"):
        recipe([{"path": "a.jsonl", "template": {"prompt": template, "completion": "x"}}])


def test_a_key_that_the_format_does_not_use_is_refused() -> None:
    with pytest.raises(BadInput, match="format messages has no use for markers; remove it"):
        recipe([{"path": "a.jsonl", "format": "messages", "markers": {"user": "Q:"}}])
    with pytest.raises(BadInput, match="two marks are the same"):
        recipe([{"path": "a", "format": "transcript", "markers": {"user": "Q:", "assistant": " Q:"}}])
    assert issubclass(InvalidValue, ValueError)


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ({"role": "tool", "content": "4"}, "turn 3 is by the tool 'tool'"),
        ({"role": "function", "content": "4"}, "turn 3 is by the tool 'function'"),
        ({"from": "observation", "value": "4"}, "turn 3 is by the tool 'observation'"),
        (
            {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]},
            "turn 3 by 'assistant' calls a tool",
        ),
        ({"role": "system", "content": "Be brief."}, "turn 3 is by 'system' where the user's is due"),
        ({"role": "user", "content": [{"type": "image"}]}, "content is not a text"),
        ({"content": "x"}, "turn 3 names no role"),
    ],
)
def test_turns_that_cannot_be_read_are_named(turn: dict[str, Any], reason: str, tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "I ask."}, turn]
    rows, quarantined = read(write_jsonl(tmp_path / "a.jsonl", [{"messages": talk}]), format="messages")
    assert not rows
    assert quarantined[0][1].startswith(reason)


# --- formats, as their publishers describe them -----------------------------------------------------------


def oasst_messages() -> list[dict[str, Any]]:
    """Rows of OpenAssistant/oasst1 on the hub: a message each, depth first."""

    def message(name: str, parent: str | None, role: str, text: str, **more: Any) -> dict[str, Any]:
        return {
            "message_id": name,
            "parent_id": parent,
            "user_id": "u",
            "text": text,
            "role": role,
            "lang": "en",
            "deleted": False,
            "rank": None,
            "message_tree_id": name[0],
            "tree_state": "ready_for_export",
            **more,
        }

    return [
        message("a", None, "prompter", "Who won?"),
        message("a1", "a", "assistant", "The eagle.", rank=1),
        message("a2", "a", "assistant", "The owl.", rank=0),
        message("a21", "a2", "prompter", "When?"),
        message("a211", "a21", "assistant", "In July.", rank=0.0),
        message("a212", "a21", "assistant", "Never.", rank=None),
        message("a3", "a", "assistant", "Spam", rank=-1, deleted=True),
        message("b", None, "prompter", "Is anybody there?"),
        message("c1", "c", "assistant", "An answer to nothing."),
        message("d", None, "prompter", "Where?"),
        message("d1", "d", "assistant", "In Siena."),
    ]


TRANSCRIPT = (
    "\n\nHuman: Who won?\n\nAssistant: The owl.\nNo Human: none.\n\nHuman: When?\n\nAssistant: In July."
)


@pytest.mark.parametrize(
    ("name", "content", "settings", "expected"),
    [
        (  # tatsu-lab/stanford_alpaca, alpaca_data.json
            "alpaca_data.json",
            [
                {"instruction": "Add.", "input": "1 and 1", "output": "2"},
                {"instruction": "Name a bird.", "input": "", "output": "Owl"},
            ],
            {"format": "alpaca"},
            [("Add.\n\n1 and 1", "2"), ("Name a bird.", "Owl")],
        ),
        (  # hiyouga/LLaMA-Factory, data/README.md
            "llama_factory.json",
            [
                {
                    "instruction": "When?",
                    "input": "",
                    "output": "In July.",
                    "system": "Be brief.",
                    "history": [["Who won?", "The owl."]],
                }
            ],
            {"format": "alpaca"},
            [("Be brief.\n\nWho won?", "The owl.", "When?", "In July.")],
        ),
        (  # ShareGPT_V3_unfiltered_cleaned_split.json
            "sharegpt.json",
            [
                {
                    "id": "QWJhYvA_0",
                    "conversations": [
                        {"from": "human", "value": "Who won?"},
                        {"from": "gpt", "value": "The owl."},
                        {"from": "human", "value": "Thanks"},
                    ],
                },
                {
                    "id": "QWJhYvA_1",
                    "conversations": [
                        {"from": "gpt", "value": "Welcome!"},
                        {"from": "human", "value": "When?"},
                        {"from": "gpt", "value": "In July."},
                    ],
                },
            ],
            {"format": "sharegpt", "drop_greeting": True},
            [("Who won?", "The owl."), ("When?", "In July.")],
        ),
        (  # the same with a chat API's names
            "sharegpt_roles.jsonl",
            [
                {
                    "system": "Be brief.",
                    "conversations": [
                        {"role": "user", "content": "Who won?"},
                        {"role": "assistant", "content": "The owl."},
                    ],
                }
            ],
            {"format": "sharegpt"},
            [("Be brief.\n\nWho won?", "The owl.")],
        ),
        (  # HuggingFaceH4/no_robots, OpenAI's fine-tuning format
            "messages.jsonl",
            [
                {
                    "messages": [
                        {"role": "system", "content": "You are an owl."},
                        {"role": "user", "content": "Who won?"},
                        {"role": "assistant", "content": "The owl."},
                    ]
                }
            ],
            {"format": "messages"},
            [("You are an owl.\n\nWho won?", "The owl.")],
        ),
        (  # Anthropic/hh-rlhf
            "train.jsonl.gz",
            [{"chosen": TRANSCRIPT, "rejected": "\n\nHuman: Who won?\n\nAssistant: Me."}],
            {"format": "transcript", "text": "chosen"},
            [("Who won?", "The owl.\nNo Human: none.", "When?", "In July.")],
        ),
        ("oasst1.jsonl", oasst_messages(), {"format": "oasst_flat"}, None),
        (  # databricks-dolly-15k.jsonl
            "dolly.jsonl",
            [{"instruction": "Who?", "context": "The owl won.", "response": "The owl"}],
            {"format": "dolly"},
            [("Who?\n\nThe owl won.", "The owl")],
        ),
        (  # GAIR/lima
            "lima.jsonl",
            [{"conversations": ["Who won?", "The owl."], "source": "multi_turn"}],
            {"format": "lima"},
            [("Who won?", "The owl.")],
        ),
        (  # Open-Orca/FLAN
            "flan.jsonl",
            [{"inputs": "Who won?", "targets": "The owl", "task": "quac"}],
            {"format": "flan"},
            [("Who won?", "The owl")],
        ),
        (  # allenai/natural-instructions, tasks/task001_….json: one object over many lines
            "task001.json",
            {"Definition": ["Add."], "Instances": [{"id": "t-1", "input": "1 + 1", "output": ["2", "two"]}]},
            {"format": "natural_instructions"},
            [("Add.\n\n1 + 1", "2")],
        ),
        ("books.jsonl", [{"text": "Once upon a time."}], {"format": "text"}, [("", "Once upon a time.")]),
        (
            "qa.tsv",
            'question\tanswer\nWho won?\tThe "owl"\n',
            {"template": {"prompt": "{{ question }}", "completion": "{{ answer }}"}},
            [("Who won?", 'The "owl"')],
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value and len(value) < 30 else "",
)
def test_published_formats_are_read_to_exact_rows(
    name: str, content: Any, settings: dict[str, Any], expected: list[tuple[str, ...]] | None, tmp_path: Path
) -> None:
    if isinstance(content, str):
        text = content
    elif name.endswith(".json"):
        text = json.dumps(content, indent=4)
    else:
        text = "".join(json.dumps(record) + "\n" for record in content)
    data = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    if name == "oasst1.jsonl":
        assert read(tmp_path / name, **settings) == (
            [("Who won?", "The owl.", "When?", "In July."), ("Where?", "In Siena.")],
            [(9, "its parent 'c' is not in the source"), (8, "the tree's question has no answer")],
        )
        return
    assert read(tmp_path / name, **settings) == (expected, [])
