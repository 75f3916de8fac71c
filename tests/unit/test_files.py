"""Lines of JSON that survive a crash, and texts for people."""

from __future__ import annotations

from pathlib import Path

from palio.files import append_json_line, read_json_lines
from palio.text import duration, last_lines, markdown_table


def test_a_line_that_a_crash_tore_costs_that_line_only(tmp_path: Path) -> None:
    path = tmp_path / "work" / "lines.jsonl"
    append_json_line(path, {"n": 1})
    with path.open("a") as stream:
        stream.write('{"n": 2')
    append_json_line(path, {"n": 3})
    assert read_json_lines(path) == [{"n": 1}, {"n": 3}]


def test_a_file_that_does_not_exist_has_no_lines(tmp_path: Path) -> None:
    assert read_json_lines(tmp_path / "none.jsonl") == []


def test_durations_read_as_people_say_them() -> None:
    assert [duration(seconds) for seconds in (41.2, 720, 58_320)] == ["41 s", "12 min", "16.2 h"]


def test_a_cell_cannot_break_a_markdown_table() -> None:
    table = markdown_table(("name", "n"), [("a|b\nc", 1)], left={"name"})
    assert table == "| name | n |\n| --- | ---: |\n| a\\|b c | 1 |"


def test_the_end_of_a_log_is_one_printable_line() -> None:
    assert last_lines("first\n\n second \nthird\x1b[0m\n", 2) == "second | third[0m"
    assert len(last_lines("x" * 9000)) == 500
