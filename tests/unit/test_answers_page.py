"""The pages of answers in a real browser: loaded in parts, linked, searched, compared, and never run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from palio.answers.pages import write_pages
from palio.config import Competition
from palio.layout import ReportFolder, Resources, Results
from tests.support.chromium import Page
from tests.support.helm_runs import leave_runs, leave_stage_store, right
from tests.support.page import accessibility_faults, contrast_faults, outside_of
from tests.support.report import HOSTILE, SCENARIOS, competition, leave_entry, write_entries

ASKED = 1000
"""Questions of each of two scenarios."""
SCENARIO, OTHER = SCENARIOS["open"]
RIGHT = {"curated": 900, "raw": 600}
"""In each scenario: the first so many."""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("competition")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        given = write_answers(folder)
        write_pages(given, Results(folder / "results"), ReportFolder(folder / "report").answers)
    return f"file://{folder}/report/answers/laptop.html"


def write_answers(folder: Path) -> Competition:
    write_entries(folder, RIGHT)
    given = competition(folder, withdrawn={})
    scenarios = dict.fromkeys(SCENARIOS["open"], ASKED)
    leave_stage_store(Resources().open_store, scenarios)
    for name, count in RIGHT.items():
        leave_entry(folder, name, trained=False)

        def says(scenario: str, number: int, name: str = name, count: int = count) -> str | None:
            if number == ASKED - 1:
                return None
            return right(number) if number < count else f"{HOSTILE} {name} answers {number}"

        leave_runs(Results(folder / "results").entry("laptop", name), "open", scenarios, says)
    return given


@pytest.fixture
def page(browser: Page, address: str) -> Iterator[Page]:
    browser.complaints.clear()
    browser.requests.clear()
    yield browser
    assert browser.complaints == []
    own = address.rpartition("/")[0]
    assert [one for one in browser.requests if not one.startswith((own, "about:"))] == []


def opened(page: Page, address: str, hash_: str = "", *, width: int = 1200, dark: bool = False) -> None:
    page.open(address + hash_, width=width, dark=dark)
    wait(page, "document.querySelector('#count').textContent")


def wait(page: Page, condition: str) -> None:
    waiting = "await new Promise(done => setTimeout(done, 20))"
    page.do(f"(async () => {{ for (let n = 0; n < 250 && !({condition}); n++) {waiting}; }})()")
    assert page.do(f"Boolean({condition})"), condition


def text(page: Page, selector: str = "#question") -> str:
    found: str = page.do(f"document.querySelector('{selector}').innerText")
    return found


def test_two_thousand_questions_are_there_in_two_seconds(page: Page, address: str) -> None:
    started = time.monotonic()
    opened(page, address, "#entry=raw&with=curated")
    assert time.monotonic() - started < 2
    assert text(page, "#count").startswith("2000 of 2000 questions; raw did better on 0, curated on 600")
    assert page.do("document.querySelectorAll('#list li').length") == 200
    assert not [one for one in page.requests if "/questions/" in one], "prompts are loaded when looked at"


def test_a_link_leads_to_one_question_of_two_entries(page: Page, address: str) -> None:
    opened(page, address, f"#entry=raw&with=curated&question={SCENARIO}%2Fid700")
    wait(page, "document.querySelector('#question h2')")
    shown = text(page)
    assert f"Question 700 of {SCENARIO}: which letter comes after a?" in shown
    assert "✓ correct: b" in shown
    assert f"{HOSTILE} raw answers 700" in shown, "shown as text, never run"
    assert shown.index("raw") < shown.index("curated")
    opened(page, address, f"#question={OTHER}%2Fid999")
    wait(page, "document.querySelector('#question h2')")
    assert "Unanswered: HTTP 500" in text(page)


def test_the_keyboard_goes_through_questions_finds_words_and_leaves_out_full_marks(
    page: Page, address: str
) -> None:
    opened(page, address, "#entry=raw")
    for _ in range(2):
        page.press("j")
        wait(page, "document.querySelector('[aria-current]')")
    wait(page, "document.querySelector('#question h2')?.innerText.endsWith('id1')")
    page.press("k")
    wait(page, "document.querySelector('#question h2').innerText.endsWith('id0')")
    page.press("w")
    wait(page, "document.querySelector('#count').textContent.startsWith('800 of 2000')")
    page.press("/")
    for letter in "answers 77":
        page.press(letter)
    wait(page, "document.querySelector('#count').textContent.startsWith('26 of 2000')")
    assert page.do("location.hash").endswith("find=answers+77&wrong=1"), "and the address says so"


def test_what_another_entry_had_better_comes_first(page: Page, address: str) -> None:
    opened(page, address, "#entry=raw&with=curated&wrong=1")
    assert text(page, "#count").startswith("600 of 2000 questions")
    first = page.do("document.querySelector('#list li').textContent")
    assert first.startswith(f"✗✓{SCENARIO.replace('_', ' ')} id600")


@pytest.mark.parametrize("hash_", ["", f"#entry=raw&with=curated&question={SCENARIO}%2Fid700"])
def test_on_a_phone_nothing_is_beside_the_screen(page: Page, address: str, hash_: str) -> None:
    opened(page, address, hash_, width=400)
    if hash_:
        wait(page, "document.querySelector('#question h2')")
    assert outside_of(page, 400) == []


@pytest.mark.parametrize("dark", [False, True])
def test_every_text_has_contrast_and_axe_finds_nothing_serious(page: Page, address: str, dark: bool) -> None:
    opened(page, address, f"#entry=raw&with=curated&question={SCENARIO}%2Fid700", dark=dark)
    wait(page, "document.querySelector('#question h2')")
    assert contrast_faults(page) == []
    assert accessibility_faults(page) == []
