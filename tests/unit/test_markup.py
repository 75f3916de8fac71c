"""Names, titles and reasons that teams write are shown in every format, and do nothing in any."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from rich.console import Console

from palio.errors import State
from palio.layout import Boards
from palio.markup import csv_cell, html, latex, markdown, terminal, visible
from palio.records import Cell, Column, DidNotFinish, Leaderboard
from palio.report.build import entry_reports, write_report
from palio.report.drawing import Drawing
from palio.report.page import TrackReport
from palio.scoring import tables
from palio.scoring.analysis import analyze
from palio.scoring.leaderboard import Candidate, score

ATTACKS = (
    "<script>alert(1)</script>",
    "</title><img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)',
    "[a link](https://example.org) ![](https://example.org/x.png)",
    "https://example.org www.example.org <https://example.org>",
    "| a | b\n---\n# heading\n- item\n1. item\n> quote",
    "**bold** _em_ __strong__ `code` ~~gone~~ $x$ &copy; a_b_c _",
    "\\input{/etc/passwd} 100 % & # $ { } ~ ^ ^^5c",
    "=HYPERLINK(1)",
    "+1",
    "-1",
    "@SUM(A1)",
    "\t=1",
    "\uff1d1",
    "\x1b[2J\x1b]0;title\x07 [bold red]markup[/]",
    "abc\u202edef\u2066 \x00\x9b\u2028\ud800",
)
TEXT = st.one_of(
    st.sampled_from(ATTACKS),
    st.text(),
    st.text("\\`*_{}[]()<>#+-.!|~&$:@=1 aw/\n\x1b\x00\u202e\"'"),
)


def with_attacks(test: Callable[[str], None]) -> Callable[[str], None]:
    for attack in ATTACKS:
        test = example(attack)(test)
    return given(TEXT)(test)


def is_inert_line(text: str) -> bool:
    return all(char.isprintable() or char in "\u200c\u200d" for char in text)


# --- each format -----------------------------------------------------------------------------------------


@with_attacks
def test_a_terminal_gets_one_line_without_control_characters(text: str) -> None:
    assert is_inert_line(terminal(text))


def test_invisible_characters_are_shown_as_escapes_and_readable_text_is_unchanged() -> None:
    assert terminal("a\x1b[2Jb\u202ec") == r"a\x1b[2Jb\u202ec"
    assert terminal("Équipe 日本 👩\u200d🚀") == "Équipe 日本 👩\u200d🚀"


@with_attacks
def test_html_has_no_tags_and_shows_the_text(text: str) -> None:
    class Reader(HTMLParser):
        data, tags = "", 0

        def handle_data(self, data: str) -> None:
            self.data += data

        def handle_starttag(self, tag: str, attrs: object) -> None:
            self.tags += 1

    reader = Reader()
    reader.feed(f"<p title='{html(text)}'>{html(text)}</p>")
    reader.close()
    assert (reader.data, reader.tags) == (visible(text), 1)


@with_attacks
def test_svg_is_well_formed_whatever_its_labels_say(text: str) -> None:
    drawing = Drawing(10, 10, text)
    drawing.text(0, 0, text)
    drawing.dot(0, 0, 1, "ink", tip=text)
    svg = ElementTree.fromstring(drawing.svg_file)  # noqa: S314
    assert {element.tag.partition("}")[2] for element in svg.iter()} <= {
        *("svg", "style", "rect", "text", "circle", "title")
    }


GITHUB = MarkdownIt("commonmark").enable(["table", "strikethrough"])


def inline_texts(source: str) -> list[str]:
    """The text of every paragraph and cell; fails if one holds more than text."""
    texts = []
    for token in GITHUB.parse(source):
        assert token.type.split("_")[0] in (
            "inline",
            "paragraph",
            "table",
            "thead",
            "tbody",
            "tr",
            "th",
            "td",
        )
        if token.type == "inline":
            assert {child.type for child in token.children or ()} <= {"text"}
            texts.append("".join(child.content for child in token.children or ()))
    return texts


@with_attacks
def test_a_markdown_paragraph_is_plain_text(text: str) -> None:
    assert inline_texts(markdown(text)) == ([terminal(text)] if terminal(text) else [])
    assert not re.search(r"://|www\.", markdown(text), flags=re.IGNORECASE)


@with_attacks
def test_a_markdown_cell_is_plain_text(text: str) -> None:
    table = f"| a | b |\n| --- | --- |\n| {markdown(text)} | end |"
    assert inline_texts(table) == ["a", "b", terminal(text), "end"]


def test_an_id_stays_readable_in_markdown() -> None:
    assert markdown("my_entry-2 (0.57), 95 %") == "my_entry-2 (0.57), 95 %"


@with_attacks
def test_latex_has_no_commands_but_those_for_its_characters(text: str) -> None:
    symbols = r"\\text(?:backslash|asciitilde|asciicircum|less|greater|bar|asciigrave)\{\}|\\[&%$#_{}]"
    assert re.fullmatch(rf"(?:{symbols}|[^\\{{}}$&#^_~%\n])*", latex(text))


@with_attacks
def test_no_csv_cell_is_a_formula(text: str) -> None:
    cell = csv_cell(text)
    assert not re.match(r"\s*[=+\-@\uff1d\uff0b\uff0d\uff20]", cell)
    assert cell.removeprefix("'") == terminal(text).removeprefix("'")


# --- a leaderboard of hostile teams ----------------------------------------------------------------------


def board_of(names: tuple[str, ...]) -> Leaderboard:
    """Entries, teams and reasons are all called by these names."""
    return score(
        competition="c",
        track="t",
        columns=[
            Column(stage="open", scenario="mmlu", metric="EM"),
            Column(stage="closed", scenario="math", metric="EM"),
        ],
        candidates=[
            Candidate(
                name,
                name,
                [Cell(value=index / 100, n=10), Cell(value=None, state=State.CRASHED, reason=name)],
            )
            for index, name in enumerate(names)
        ],
        stage_weights={"open": 0.5, "closed": 0.5},
        did_not_finish=[
            DidNotFinish(entry=name, team=name, step="open", state=State.CRASHED, reason=name, log=name)
            for name in names
        ],
    )


PRINTED = ATTACKS[:-1]  # the last one has a surrogate, which no file can hold
HARMLESS = tuple(f"name {number:02}" for number in range(len(PRINTED)))


@pytest.fixture(scope="module")
def board() -> Leaderboard:
    return board_of(PRINTED)


def test_a_leaderboard_in_markdown_holds_tables_and_text_only(board: Leaderboard) -> None:
    analysis = analyze(board, replicates=20)
    for source in (tables.markdown(board, analysis), tables.analysis_markdown(board, analysis)):
        kinds = {token.type for token in GITHUB.parse(source)}
        assert not kinds & {"html_block", "fence", "code_block", "blockquote_open", "hr"}
        children = [child for token in GITHUB.parse(source) for child in token.children or ()]
        assert not {child.type for child in children} & {"html_inline", "link_open", "image", "strong_open"}


def test_a_leaderboard_in_csv_has_the_same_shape_and_no_formulas(board: Leaderboard, tmp_path: Path) -> None:
    tables.write_leaderboard(board, Boards(tmp_path))
    with (tmp_path / "t.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 2 * len(PRINTED)
    assert not [cell for row in rows for cell in row.values() if cell.startswith(("=", "+", "-", "@"))]


def test_a_leaderboard_on_the_terminal_sends_no_escape_sequence(board: Leaderboard) -> None:
    out = io.StringIO()
    tables.print_leaderboard(board, analyze(board, replicates=20), Console(file=out, width=400))
    assert is_inert_line(out.getvalue().replace("\n", ""))
    assert "[bold red]markup[/]" in out.getvalue()


def test_a_report_on_hostile_names_has_the_tags_of_one_on_harmless_names(tmp_path: Path) -> None:
    def tags(names: tuple[str, ...]) -> list[tuple[str, list[str]]]:
        tags: list[tuple[str, list[str]]] = []

        class Reader(HTMLParser):
            def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
                if tag != "wbr":
                    tags.append((tag, [name for name, _ in attrs]))

        board = board_of(names)
        track = TrackReport("t", names[0], board, None, entry_reports(board))
        page = write_report(names[0], [track], tmp_path)
        Reader().feed(page.read_text(encoding="utf-8"))
        return sorted(tags)

    assert tags(PRINTED) == tags(HARMLESS)
