"""palio published, rescore, diff and report, as typed."""

from __future__ import annotations

import functools
import http.server
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from palio.cli import palio
from palio.errors import PalioError
from palio.neurips2023.download import SHA256, fetch_published
from palio.provenance import file_sha256
from palio.records import Decision, Leaderboard, read_record
from tests.support.report import score_competition, write_competition

PUBLISHED = Path(os.environ.get("PALIO_SHARED", Path(__file__).parents[3] / "shared")) / "neurips2023"
OF_4090 = {name: sha256 for name, sha256 in SHA256.items() if name.startswith("4090")}


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(palio, [str(one) for one in arguments], catch_exceptions=False)


# --- the published tables --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tables() -> Path:
    if not PUBLISHED.is_dir():
        pytest.skip(f"the published tables are not at {PUBLISHED}; set PALIO_SHARED")
    return PUBLISHED


def test_published_recomputes_every_cell_and_reports_on_every_round(tables: Path, tmp_path: Path) -> None:
    done = run("published", tables, "--out", tmp_path)
    assert done.exit_code == 0
    assert "4090_full_ranks_final_round.json: entries 8, cells 96, mismatches 0" in done.output
    assert "3 files, 510 cells, 0 mismatches" in done.output
    rounds = {path.name for path in tmp_path.glob("4090_*.json") if path.name.count(".") == 1}
    assert rounds == {f"4090_{name}.json" for name in ("open", "hidden", "final", "rounds")}
    decision = read_record(Decision, tmp_path / "4090_final.decision.json")
    assert [(award.places, len(award.entries)) for award in decision.awards] == [([1, 2, 3], 8)]
    assert not any(boundary.stands for boundary in decision.boundaries)
    assert decision.chances[-1].best_rank == 3
    page = (tmp_path / "report/index.html").read_text(encoding="utf-8")
    assert "6 of 8 removals reorder the rest" in page
    paper = {path.stem for path in (tmp_path / "report/figures").glob("*.png")}
    assert paper >= {"hidden-vs-open", "hidden-vs-final", "scenarios", "finalists-4090"}


def test_published_ends_with_1_if_a_published_value_does_not_follow(tables: Path, tmp_path: Path) -> None:
    name = "4090_full_ranks_final_round.json"
    rows = json.loads((tables / name).read_text())
    rows[0][1]["Score_full"] += 1e-9
    (tmp_path / name).write_text(json.dumps(rows))
    done = run("published", tmp_path, "--out", tmp_path / "out")
    assert done.exit_code == 1
    assert "mismatches 1" in done.output


@pytest.fixture
def server(tables: Path, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The address of a server of the published files, and their folder."""
    folder = tmp_path / "served"
    shutil.copytree(tables, folder)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{serving.server_port}/", folder
        serving.shutdown()


def test_the_published_files_are_downloaded_once(server: tuple[str, Path], tmp_path: Path) -> None:
    address, served = server
    fetch_published(tmp_path / "here", address, OF_4090)
    assert {path.name: file_sha256(path) for path in (tmp_path / "here").iterdir()} == OF_4090
    shutil.rmtree(served)
    fetch_published(tmp_path / "here", address, OF_4090)


def test_a_file_that_is_not_the_published_one_is_not_kept(server: tuple[str, Path], tmp_path: Path) -> None:
    address, served = server
    path = served / "4090_open_round_rank.json"
    path.chmod(0o644)
    path.write_text("[]")
    with pytest.raises(PalioError, match=r"has sha256 .*; it is not kept"):
        fetch_published(tmp_path / "here", address, OF_4090)
    assert not (tmp_path / "here" / path.name).exists()


def test_without_a_network_the_address_is_named(tmp_path: Path) -> None:
    with pytest.raises(PalioError, match=r"http://127\.0\.0\.1:9/4090_open.*cannot be downloaded"):
        fetch_published(tmp_path, "http://127.0.0.1:9/", OF_4090)


# --- our own ---------------------------------------------------------------------------------------------


def test_rescore_diff_and_report_go_on_from_a_leaderboard(tmp_path: Path) -> None:
    competition = write_competition(tmp_path)
    boards = score_competition(tmp_path, competition)
    given = competition.model_dump_json(exclude_none=True)
    at = ("--competition", given, "--results", tmp_path / "results")
    done = run("rescore", boards / "laptop.json", *at, "--convention", "helm2023")
    assert done.exit_code == 0, done.output
    version = boards / "versions/laptop.v2.json"
    assert read_record(Leaderboard, version).convention == "helm2023"
    told = run("diff", boards / "laptop.json", version).output
    assert "convention: midrank, missing worst -> helm2023" in told
    assert "open_only: rank 3 -> 2" in told
    done = run("report", *at, "--leaderboards", boards, "--out", tmp_path / "report")
    assert done.output.strip() == str(tmp_path / "report/index.html")
    assert "Palio of the tests" in (tmp_path / "report/index.html").read_text(encoding="utf-8")


def test_a_report_without_a_leaderboard_says_what_to_run(tmp_path: Path) -> None:
    competition = write_competition(tmp_path)
    given = competition.model_dump_json(exclude_none=True)
    with pytest.raises(PalioError, match=r"laptop\.json: no such record; run the step that makes it"):
        run("report", "--competition", given, "--leaderboards", tmp_path, "--out", tmp_path / "report")
