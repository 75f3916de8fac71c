"""`palio publish-site`: a static site that anybody may see while the competition runs."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pandas as pd
import pytest

from palio.config import Competition, load_competition
from palio.errors import BadInput
from palio.layout import Boards, Results, SiteFolder
from palio.records import Contamination, Leaderboard, read_record
from palio.release.gather import Leak
from palio.scoring.analysis import analyze_track
from palio.scoring.tables import write_leaderboard
from palio.scoring.versions import difference, read_leaderboard, rescore, write_version
from palio.site.building import publish_site
from tests.support.canary import CANARY, FAILED, content_of, leave_competition
from tests.support.chromium import Page
from tests.support.page import accessibility_faults, contrast_faults, outside_of
from tests.support.report import HOSTILE, RIGHT

FIRST, LATER = (datetime(2026, 5, 1, hour, tzinfo=UTC) for hour in (9, 10))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A competition in progress, with a canary in closed store, answers and logs."""
    folder, secret = tmp_path_factory.mktemp("competition"), tmp_path_factory.mktemp("secret")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        leave_competition(folder, secret)
        yield folder


@pytest.fixture(scope="module")
def site(home: Path) -> SiteFolder:
    """Published twice, in between of which an entry has joined; and scored by another convention."""
    board = standings(home)
    late = board.model_copy(update={"entries": [one for one in board.entries if one.entry != "untuned"]})
    write_leaderboard(late, Boards(home / "early"))
    publish(home, home / "site", FIRST, Boards(home / "early"))
    results = Results(home / "results", given(home).store)
    helm2023 = rescore(board, given(home), results, convention="helm2023")
    write_version(helm2023, results.standings, analyze_track(given(home), helm2023, results))
    return publish(home, home / "site", LATER)


def publish(home: Path, out: Path, now: datetime = FIRST, boards: Boards | None = None) -> SiteFolder:
    results = Results(home / "results", given(home).store)
    return publish_site(
        given(home), results=results, leaderboards=boards or results.leaderboards, out=out, now=now
    )


def given(home: Path) -> Competition:
    return load_competition(content_of(home))


def standings(home: Path) -> Leaderboard:
    return read_record(Leaderboard, Results(home / "results").standings.leaderboard("laptop"))


def files(site: SiteFolder) -> dict[str, bytes]:
    return {
        path.relative_to(site.path).as_posix(): path.read_bytes()
        for path in sorted(site.path.rglob("*"))
        if path.is_file()
    }


def test_every_entry_has_a_page_also_one_that_failed(site: SiteFolder) -> None:
    pages = {path.stem for path in site.entries.rglob("*.html")}
    assert pages == {*RIGHT, *FAILED, "broken"}
    assert "check went wrong" in site.entry("laptop", "fails_check").read_text()


def test_every_link_leads_to_a_page_and_a_place_on_it(site: SiteFolder) -> None:
    pages = sorted(site.path.rglob("*.html"))
    assert len(pages) > 10
    seen = set()
    for page in pages:
        for link in re.findall(r'href="([^"]+)"', page.read_text()):
            if link == "data:,":
                continue
            address, place = urldefrag(unquote(link))
            target = (page.parent / address).resolve() if address else page
            assert target.is_relative_to(site.path), link
            assert target.is_file(), f"{page.name}: {link}"
            if place and "=" not in place:
                assert f'id="{place}"' in target.read_text(), f"{page.name}: {link}"
            seen.add(target.relative_to(site.path).as_posix())
    assert {"answers/laptop.html", "downloads/laptop.parquet", "entries/laptop/raw.html"} <= seen


def test_the_history_says_what_palio_diff_says(site: SiteFolder, home: Path) -> None:
    first, second = sorted(site.published("laptop").glob("*.json"))
    assert [first.name, second.name] == ["0001-20260501T090000Z.json", "0002-20260501T100000Z.json"]
    page = site.page.read_text()
    told = difference(read_record(Leaderboard, first), read_record(Leaderboard, second))
    assert told.changes == ["entries that joined: untuned"]
    assert page.index("Version 2, 2026-05-01 10:00 UTC") < page.index("Version 1, 2026-05-01 09:00 UTC")
    for change in told.changes:
        assert f"<li>{change}</li>" in page
    assert "Scored otherwise: version 2 by helm2023" in page
    moved = page.partition("Scored otherwise")[2]
    assert "convention: midrank, missing worst -&gt; helm2023, missing as in 2023" in moved
    assert "open_<wbr>only: rank 3 → 2" in moved
    assert "3 → 2 by convention: its score 0.5265 -&gt; 0.5556" in moved


def test_what_says_the_same_is_no_new_version_and_gives_equal_pages(site: SiteFolder, home: Path) -> None:
    before = files(site)
    publish(home, site.path, datetime(2026, 5, 2, tzinfo=UTC))
    assert files(site) == before


def test_downloads_hold_every_value(site: SiteFolder, home: Path) -> None:
    csv = pd.read_csv(site.downloads.table("laptop", "csv"))
    parquet = pd.read_parquet(site.downloads.table("laptop", "parquet"))
    assert list(csv.columns) == list(parquet.columns)
    assert {*RIGHT} <= {*csv["entry"]} == {*parquet["entry"]}
    assert site.downloads.table("laptop.v2", "csv").is_file(), "the other convention, too"


def test_nothing_of_the_closed_stage_but_scores_is_on_it(site: SiteFolder, home: Path) -> None:
    found = files(site)
    assert len(found) > 25
    assert not [name for name, content in found.items() if b"canary" in content]
    assert "canary" in (home / "results/laptop/raw/logs/closed.log").read_text(), "there was one to find"
    counted = read_record(Contamination, home / "results/laptop/curated/contamination.json")
    assert any(counted.contaminated["closed"].values()) or any(counted.contaminated["open"].values())
    page = site.entry("laptop", "curated").read_text()
    table = page.partition('aria-label="Evaluation questions in the training data"')[2].partition("</table>")[
        0
    ]
    assert "pattern match" in table
    assert "natural reasoning" not in table, "how many of its questions a team has could be asked often"


def test_a_closed_text_stops_it_before_anything_is_published(
    site: SiteFolder, home: Path, tmp_path: Path
) -> None:
    before = files(site)
    board = standings(home)
    leaked = [one.model_copy(update={"team": CANARY}) for one in board.entries]
    write_leaderboard(board.model_copy(update={"entries": leaked}), Boards(tmp_path))
    with pytest.raises(Leak, match="contains a text of the closed stage"):
        publish(home, site.path, LATER, Boards(tmp_path))
    assert files(site) == before


def test_a_web_servers_own_files_stay_and_another_site_is_left_alone(home: Path, tmp_path: Path) -> None:
    (tmp_path / "public").mkdir()
    (tmp_path / "public/CNAME").write_text("palio.example")
    publish(home, tmp_path / "public")
    assert (tmp_path / "public/CNAME").read_text() == "palio.example"
    for name in ("index.html", "entries", "downloads", "history"):
        other = tmp_path / "other" / name
        (other / name).mkdir(parents=True)
        with pytest.raises(BadInput, match=f"{name}: is not a site of Palio, .*; name another folder"):
            publish(home, other)
        assert [path.name for path in other.iterdir()] == [name]
    beside = {path.name for path in tmp_path.iterdir()} - {"public", "other"}
    assert beside == {".public.lock"}


def test_the_folder_may_be_the_one_we_are_in(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert publish(home, Path()).page.is_file()


def test_no_place_of_a_log_is_published(site: SiteFolder, home: Path) -> None:
    assert any(stopped.log for stopped in standings(home).did_not_finish)
    boards = [*site.history.rglob("*.json"), site.downloads.leaderboard("laptop")]
    assert not any(stopped.log for board in boards for stopped in read_leaderboard(board).did_not_finish)


def test_a_track_that_nobody_has_scored_is_named_with_the_fix(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "results/laptop/raw", tmp_path / "results/laptop/raw")
    results = Results(tmp_path / "results")
    with pytest.raises(BadInput, match="run the workflow to its end, or `palio standings`"):
        publish_site(
            given(home), results=results, leaderboards=results.leaderboards, out=tmp_path / "site", now=FIRST
        )


# --- in a browser ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["index.html", "entries/laptop/raw.html", "entries/laptop/fails_check.html"])
def test_it_is_read_everywhere_and_asks_nobody(browser: Page, site: SiteFolder, name: str) -> None:
    browser.complaints.clear()
    browser.requests.clear()
    address = f"file://{site.path}/{name}"
    for width, dark in ((1200, False), (400, True)):
        browser.open(address, width=width, dark=dark)
        browser.do("document.querySelectorAll('details').forEach(one => one.open = true)")
        assert contrast_faults(browser) == []
        assert accessibility_faults(browser) == []
        if width == 400:
            assert outside_of(browser, 400) == []
    if name.endswith("raw.html"):
        assert HOSTILE in browser.do("document.querySelector('.lead').innerText"), "shown, never run"
    assert browser.complaints == []
    assert {one.partition("#")[0] for one in browser.requests} <= {address, "about:blank"}
