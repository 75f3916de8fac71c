"""The report in a real browser: sorting, searching, keyboard, contrast, phone, and nothing leaves it."""

from __future__ import annotations

from pathlib import Path

import pytest

from palio.config import Prizes
from palio.layout import Boards, Results
from palio.report.build import build_report
from tests.support.chromium import Page
from tests.support.page import accessibility_faults, contrast_faults, outside_of
from tests.support.report import HOSTILE, score_competition, write_competition


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("competition")
    competition = write_competition(folder)
    boards = score_competition(folder, competition, prizes=Prizes(places=2))
    build_report(
        competition, results=Results(folder / "results"), leaderboards=Boards(boards), out=folder / "report"
    )
    return f"file://{folder}/report/index.html"


@pytest.fixture
def page(browser: Page, address: str) -> Page:
    """The report, freshly opened."""
    browser.complaints.clear()
    browser.requests.clear()
    browser.open(address)
    return browser


BOARD = "document.querySelector('table.board')"


def order(page: Page, table: str = BOARD) -> list[str]:
    found: list[str] = page.do(f"[...{table}.tBodies[0].rows].map(row => row.querySelector('th').innerText)")
    return [name.rstrip("*") for name in found]


def click_head(page: Page, title: str, table: str = BOARD) -> None:
    heads = f"[...{table}.tHead.rows[0].cells]"
    page.do(f"{heads}.find(head => head.innerText.trim() === '{title}').querySelector('button').click()")


def test_the_page_opens_without_a_complaint_or_a_request(page: Page, address: str) -> None:
    page.do("document.querySelectorAll('a[href^=\"#\"]').forEach(link => link.click())")
    assert page.complaints == []
    assert {one.partition("#")[0] for one in page.requests} <= {address, "about:blank"}


def test_a_click_on_a_head_sorts_the_other_way_and_back(page: Page) -> None:
    by_rank = order(page)
    assert by_rank[0] == "curated"
    click_head(page, "open")
    assert order(page) == ["open_only", "curated", "raw", "untuned"]
    click_head(page, "open")
    assert order(page) == ["untuned", "raw", "curated", "open_only"]
    click_head(page, "open")
    assert order(page) == by_rank


def test_the_sorted_column_is_told_to_screen_readers(page: Page) -> None:
    click_head(page, "closed")
    assert page.do(f"{BOARD}.querySelector('[aria-sort]').ariaSort") == "descending"


def test_tables_can_be_sorted_from_the_keyboard(page: Page) -> None:
    page.do(f"{BOARD}.tHead.querySelector('button').focus()")
    page.press("Tab")
    assert page.do("document.activeElement.innerText.trim()") == "entry"
    page.press("Enter")
    page.press("Enter")
    assert order(page) == ["untuned", "raw", "open_only", "curated"]


def test_missing_values_stay_last_in_either_direction(page: Page) -> None:
    asked = "one.tHead.textContent.includes('open questions in its data')"
    table = f"[...document.querySelectorAll('details table.sortable')].find(one => {asked})"
    page.do("document.querySelectorAll('.overview details').forEach(one => one.open = true)")
    for _ in range(2):
        click_head(page, "open questions in its data", table)
        assert order(page, table)[-1] == "untuned"


def test_searching_hides_the_other_entries_and_says_how_many_are_left(page: Page) -> None:
    page.do("document.querySelector('#search').focus()")
    for letter in "open_":
        page.press(letter)
    shown = page.do(f"[...{BOARD}.tBodies[0].rows].filter(row => !row.hidden).length")
    assert shown == 1
    assert page.do("document.querySelector('#found').innerText") == "1 of 5 entries"


def test_an_entry_s_page_takes_the_place_of_the_overview(page: Page, address: str) -> None:
    page.do("location.hash = '#laptop.curated'")
    displayed = "[...document.querySelectorAll('.overview, .page')].filter(one => one.offsetHeight)"
    assert page.do(f"{displayed}.map(one => one.id)") == ["laptop.curated"]
    page.do("location.hash = '#laptop'")
    assert page.do(f"{displayed}.map(one => one.id)") == ["top"]


def test_what_an_entry_wrote_is_shown_and_never_run(page: Page) -> None:
    page.do("location.hash = '#laptop.raw'")
    assert HOSTILE in page.do("document.querySelector('.page:target .lead').innerText")
    # Not even if it got past the escaping: the content policy admits the page's own script alone.
    smuggled = "<img src=x onerror='window.ran=1'>"
    page.do(f"document.querySelector('.page:target').insertAdjacentHTML('beforeend', `{smuggled}`)")
    page.do("new Promise(done => setTimeout(done, 200))")
    assert page.do("window.ran") is None


@pytest.mark.parametrize("hash_", ["", "#laptop.curated", "#laptop.broken"])
def test_on_a_phone_every_table_and_figure_is_read_without_moving_sideways(
    page: Page, address: str, hash_: str
) -> None:
    page.open(address + hash_, width=400, height=800)
    page.do("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert outside_of(page, 400) == []
    page.open(address + hash_, width=360, height=740)
    assert page.do("document.documentElement.scrollWidth") == 360


def test_a_stacked_row_names_its_columns_and_sorts(page: Page, address: str) -> None:
    page.open(address, width=400, height=800)
    told = f"getComputedStyle({BOARD}.tBodies[0].rows[0].cells[3], '::before').content"
    assert page.do(told) == '"final score"'
    click_head(page, "open")
    assert order(page)[0] == "open_only"


def test_the_open_stage_comes_first(page: Page) -> None:
    heads = page.do(f"[...{BOARD}.tHead.rows[0].cells].map(head => head.innerText.trim())")
    assert heads.index("open") + 1 == heads.index("closed")
    assert "33.3 % open + 66.7 % closed" in page.do(f"{BOARD}.caption.innerText")


def test_a_wide_screen_has_tables_as_tables_and_each_figure_once(page: Page) -> None:
    assert page.do(f"getComputedStyle({BOARD}.tBodies[0].rows[0]).display") == "table-row"
    shown = (
        "[...document.querySelectorAll('.overview figure svg')].filter(one => one.getClientRects().length)"
    )
    names = page.do(f"{shown}.map(one => one.ariaLabel)")
    assert len(names) == len(set(names)) >= 5


@pytest.mark.parametrize("dark", [False, True])
def test_every_text_has_the_contrast_that_wcag_aa_asks_for(page: Page, address: str, dark: bool) -> None:
    page.open(address, dark=dark)
    assert page.do("getComputedStyle(document.body).backgroundColor") == (
        "rgb(26, 29, 35)" if dark else "rgb(255, 255, 255)"
    )
    assert contrast_faults(page) == []


@pytest.mark.parametrize("hash_", ["", "#laptop.curated", "#laptop.broken"])
def test_axe_finds_nothing_serious(page: Page, address: str, hash_: str) -> None:
    page.open(address + hash_)
    page.do("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert accessibility_faults(page) == []


def test_tables_figures_and_scrolling_parts_have_names(page: Page) -> None:
    assert (
        page.do("[...document.querySelectorAll('thead th')].filter(one => one.scope !== 'col').length") == 0
    )
    assert (
        page.do("[...document.querySelectorAll('tbody th')].filter(one => one.scope !== 'row').length") == 0
    )
    assert (
        page.do("[...document.querySelectorAll('svg[role=img]')].filter(one => !one.ariaLabel).length") == 0
    )
    unnamed = "[...document.querySelectorAll('.wide')].filter(one => !one.ariaLabel || one.tabIndex !== 0)"
    assert page.do(f"{unnamed}.length") == 0
    ids = page.do("[...document.querySelectorAll('[id]')].map(one => one.id)")
    assert len(ids) == len(set(ids))


def test_the_screenshot_of_the_report_shows_more_than_a_blank_page(page: Page, tmp_path: Path) -> None:
    from PIL import Image

    page.screenshot(tmp_path / "report.png")
    with Image.open(tmp_path / "report.png") as picture:
        assert picture.size[1] > 2000
        assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 50
