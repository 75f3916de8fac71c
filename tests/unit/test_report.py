"""The report as text: what a reader finds on the page, and that nothing on it reaches outside."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from palio.report.build import build_report
from tests.report import RIGHT, score_competition, write_competition


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A finished competition with its report."""
    folder = tmp_path_factory.mktemp("competition")
    competition = write_competition(folder)
    boards = score_competition(folder, competition)
    build_report(
        competition, results=folder / "results", leaderboards=boards, out=folder / "results" / "report"
    )
    yield folder


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    return (folder / "results/report/index.html").read_text(encoding="utf-8")


def test_every_entry_has_a_page_of_its_own(page: str) -> None:
    pages = re.findall(r'<article id="laptop\.(\w+)"', page)
    assert sorted(pages) == sorted([*RIGHT, "broken"])


def test_an_entry_that_did_not_finish_is_shown_with_its_reason(page: str) -> None:
    assert "its base model is not approved" in page


def test_no_link_and_no_source_leads_out_of_the_page(page: str) -> None:
    addresses = re.findall(r'(?:href|src|action)="([^"]*)"', page)
    assert addresses
    assert all(address.startswith(("#", "data:")) for address in addresses)
    assert "url(" not in page
    assert "@import" not in page


def test_figures_lie_beside_the_page_as_svg_and_png(folder: Path) -> None:
    names = {path.name for path in (folder / "results/report/figures").iterdir()}
    kinds = ("open-vs-closed", "rank-intervals", "win-rates", "leave-one-out", "budget-use")
    assert names == {f"laptop-{kind}.{ending}" for kind in kinds for ending in ("svg", "png")}
