"""Looking before training: a source as it is, and rows as the trainer sees them."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from transformers import AutoTokenizer

from palio.config import FinetuneRecipe
from palio.curation.raw import raw_lines
from palio.errors import BadInput
from palio.training.inspection import Inspection, html_page, inspection, text_lines
from tests.support.curation import curate, recipe, write_jsonl

ROOT = Path(__file__).parents[2]
TURNS = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "The owl."}]


# --- sources ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": "a", "completion": "b"}, ["format: pairs"]),
        ({"instruction": "a", "input": "", "output": "b"}, ["format: alpaca"]),
        ({"instruction": "a", "context": "", "response": "b"}, ["format: dolly"]),
        ({"conversations": TURNS}, ["format: sharegpt"]),
        ({"conversations": ["a", "b"]}, ["format: lima"]),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            ["format: messages"],
        ),
        ({"inputs": "a", "targets": "b"}, ["format: flan"]),
        ({"Definition": "a", "Instances": [{"input": "a", "output": ["b"]}]}, ["natural_instructions"]),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "c"},
            ["format: transcript", "text: chosen"],
        ),
        ({"text": "a book"}, ["format: text"]),
        (
            {"prompt": {"text": "a", "replies": [{"role": "assistant", "text": "b", "replies": []}]}},
            ["format: oasst"],
        ),
        (
            {"conversations": [{"from": "bob", "value": "a"}, {"from": "eve", "value": "b"}]},
            ["format: sharegpt", "roles: {bob: assistant}"],
        ),
        (
            {"ident": 7, "question": "a", "the_answer": "b"},
            ["no known format", 'prompt: "{{ question }}"', 'completion: " {{ the_answer }}"'],
        ),
        ({"q": "a", "a": "b", "n": None}, ['"{{ q }}"', '" {{ a }}"', "n: null, missing in 1"]),
    ],
)
def test_a_source_is_shown_with_its_format_or_a_template(
    record: dict[str, Any], expected: list[str], tmp_path: Path
) -> None:
    text = "\n".join(raw_lines(str(write_jsonl(tmp_path / "a.jsonl", [record]))))
    for part in expected:
        assert part in text
    assert f"  - path: {tmp_path / 'a.jsonl'}" in text


def test_messages_of_a_hub_dataset_are_recognised_as_a_tree(tmp_path: Path) -> None:
    messages: list[dict[str, Any]] = [
        {"message_id": "a", "parent_id": None, "role": "prompter", "text": "Who?"},
        {"message_id": "b", "parent_id": "a", "role": "assistant", "text": "The owl.", "rank": 0},
    ]
    text = "\n".join(raw_lines(str(write_jsonl(tmp_path / "a.jsonl", messages))))
    assert "format: oasst_flat" in text


def test_a_strange_source_reaches_the_terminal_as_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"a\x9b": "\x7f\u202e", "b": "\ud800"}) + "\n{no\n\x1b[31m\n"
    )
    text = "\n".join(raw_lines(str(tmp_path / "a.jsonl")))
    assert text.isprintable() or all(char.isprintable() for char in text.replace("\n", ""))
    assert "2 of them broken" in text
    with pytest.raises(BadInput, match="no such file"):
        list(raw_lines(str(tmp_path / "gone.jsonl")))


# --- tokens -----------------------------------------------------------------------------------------------

TALK = ["Who won?", "The owl.\n", "And <|im_end|>?", "word " * 60, "When? 🦉", "In July."]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspect")
    rows = [
        {"conversations": TALK},
        {"conversations": ["short?", "yes"]},
        {"conversations": ["x " * 90, "y"]},
    ]
    source = write_jsonl(folder / "talks.jsonl", rows)
    curate(recipe([{"path": str(source), "format": "lima"}]), folder / "dataset")
    return folder / "dataset"


def found(dataset: Path, base_model: Path, **settings: Any) -> Inspection:
    given = FinetuneRecipe(**{"max_length": 40, "over_length": "split", **settings})
    return inspection(dataset / "train.parquet", base_model, given)


@pytest.mark.parametrize("chat", [False, True])
def test_tokens_are_those_of_the_trainer_and_spell_the_rows(
    dataset: Path, base_model: Path, *, chat: bool
) -> None:
    seen = list(found(dataset, base_model, max_length=500, chat_template=chat).seen())
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    (talk,) = [row for row in seen if row.name == "talks talks:1"]
    learned = tokenizer.decode([token.number for token in talk.tokens if token.learned])
    end = "<|im_end|>\n" if chat else "<|im_end|>"
    assert learned == "".join(answer + end for answer in TALK[1::2])
    ends = [token for token in talk.tokens if token.text == "<|im_end|>"]
    assert all(token.special for token in ends)
    assert sum(token.learned for token in ends) == 3
    # The user's text that spells one is none; the template ends each turn with one, its system turn too.
    assert len(ends) == (7 if chat else 3)
    if not chat:
        spelled = "".join(token.text for token in talk.tokens if not token.special)
        before, _, after = "".join(TALK).partition(" 🦉")
        assert spelled.startswith(before)
        assert spelled.endswith(after)


def test_what_is_cut_and_dropped_is_counted_and_named(dataset: Path, base_model: Path) -> None:
    inspected = found(dataset, base_model)
    text = "\n".join(text_lines(inspected))
    assert "3 rows in the dataset, 3 to train on" in text
    assert "1 rows dropped: longer than max_length = 40" in text
    assert (
        "1 rows split before a question: longer than max_length = 40; 1 of their answers are left out" in text
    )
    assert re.search(r"dropped: talks talks:3: \d+ tokens", text)
    assert re.search(
        r"--- talks talks:1: \d+ tokens, \d+ learned; part 2 of 2; 1 of 3 answers left out", text
    )
    assert "learned  The│ owl│.│⏎│⟦<|im_end|>⟧" in text
    assert "lost" not in text
    truncated = "\n".join(text_lines(found(dataset, base_model, over_length="truncate")))
    assert "truncated after the last answer that fits" in truncated
    assert "part" not in truncated


def test_characters_that_the_tokenizer_does_not_know_are_told(base_model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}?", "completion": text} for n, text in enumerate(["yes", "\x1dé🦉", "no\x1d"])]
    curate(recipe([{"path": str(write_jsonl(tmp_path / "a.jsonl", rows))}]), tmp_path / "dataset")
    text = "\n".join(found(tmp_path / "dataset", base_model).lines)
    assert "characters lost or changed, which the tokenizer does not know: U+001D in 2 rows" in text


class Spans(HTMLParser):
    """The tokens of a page: number, classes, text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tokens: list[tuple[int, list[str], str]] = []
        self._open: tuple[int, list[str]] | None = None
        self.tags: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        given = dict(attrs)
        if tag == "span" and "title" in given:
            self._open = int(given["title"] or 0), (given["class"] or "").split()

    def handle_data(self, data: str) -> None:
        if self._open:
            self.tokens.append((*self._open, data))
            self._open = None


def test_the_page_shows_the_same_tokens_and_runs_nothing(
    dataset: Path, base_model: Path, tmp_path: Path
) -> None:
    inspected = found(dataset, base_model)
    spans = Spans(html_page(inspected, "Tokens of <script>"))
    rows = list(inspected.seen())
    assert [number for number, _, _ in spans.tokens] == [token.number for row in rows for token in row.tokens]
    assert ["learned" in classes for _, classes, _ in spans.tokens] == [
        token.learned for row in rows for token in row.tokens
    ]
    assert "script" not in spans.tags
    assert ["special" in classes for _, classes, text in spans.tokens if text == "⟦<|im_end|>⟧"]


def inspect(*arguments: str) -> Result:
    from palio.cli import palio

    return CliRunner().invoke(palio, ["inspect", *arguments])


def test_a_participant_looks_at_tokens_before_training(
    dataset: Path, base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    entry = "config/entries/demo/curated.yaml"
    given = (str(dataset), "--tokens", "--entry", entry, "--base-model", str(base_model.parent))
    done = inspect(*given, "--limit", "1")
    assert done.exit_code == 0, done.output
    assert done.output.count("--- ") == 1
    assert "⟦<|im_end|>⟧" in done.output
    done = inspect(*given, "--html", str(tmp_path / "page.html"))
    assert done.output == f"{tmp_path / 'page.html'}: written\n"
    assert Spans((tmp_path / "page.html").read_text()).tokens
    # Without --entry it is the dataset's own; this one's is none of the demo's.
    assert "entry is 'civetta': no entry has this id" in str(inspect(str(dataset), "--tokens").exception)
    untuned = inspect(str(dataset), "--tokens", "--entry", "config/entries/demo/untuned.yaml")
    assert "finetune: the entry has none" in str(untuned.exception)


def test_a_source_is_looked_at_from_the_command_line(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [{"conversations": TURNS}])
    done = inspect(str(source), "--raw")
    assert done.exit_code == 0, done.output
    assert "looks like sharegpt: 1 of 1 records can be read" in done.output
    assert inspect(str(source), "--raw", "--tokens").exit_code == 2
