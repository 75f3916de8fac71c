"""The report as text: what a reader finds on the page and in the files beside it."""

from __future__ import annotations

import html
import re
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import pyarrow.parquet as pq
import pytest
from PIL import Image

from palio.config import Competition, Prizes
from palio.layout import Boards, Results
from palio.records import (
    AdapterManifest,
    Analysis,
    Decision,
    Leaderboard,
    PackageManifest,
    StageRecord,
    StepFailure,
    read_record,
)
from palio.report.build import build_report, read_board, read_decision
from palio.report.figures import frontier
from palio.report.files import dropped_rows
from palio.report.page import TrackReport
from palio.report.rendering import render
from tests.support.report import RECIPES, RIGHT, competition, score_competition, write_competition


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Competition]]:
    """A finished competition with its report."""
    folder = tmp_path_factory.mktemp("competition")
    competition = write_competition(folder)
    boards = score_competition(folder, competition)
    build_report(
        competition,
        results=Results(folder / "results"),
        leaderboards=Boards(boards),
        out=folder / "results" / "report",
    )
    yield folder, competition


@pytest.fixture(scope="module")
def folder(finished: tuple[Path, Competition]) -> Path:
    return finished[0]


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    return (folder / "results/report/index.html").read_text(encoding="utf-8")


def article(page: str, entry: str) -> str:
    """The text of an entry's page, without tags."""
    found = re.search(rf'<article id="laptop\.{entry}".*?</article>', page, flags=re.DOTALL)
    assert found is not None
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]*>", " ", found[0].replace("<wbr>", ""))))


# --- entries ---------------------------------------------------------------------------------------------


def test_every_entry_has_a_page_of_its_own(page: str) -> None:
    pages = re.findall(r'<article id="laptop\.(\w+)"', page)
    assert sorted(pages) == sorted([*RIGHT, "broken"])


def test_an_entry_that_did_not_finish_is_shown_with_its_reason(page: str) -> None:
    assert "its base model is not approved" in article(page, "broken")


def test_what_an_entry_does_not_have_is_shown_with_the_reason(page: str) -> None:
    told = article(page, "untuned")
    why = "the base model unchanged: no training data, no fine-tuning"
    assert f"No training data: {why}" in told
    assert f"No fine-tuning: {why}" in told


def test_a_stage_score_of_0_says_why(page: str) -> None:
    assert "The open score is 0 because the entry beats nobody in variable_substitution" in article(
        page, "untuned"
    )


def test_every_dropped_row_stands_on_the_page_with_its_reason(folder: Path, page: str) -> None:
    told = article(page, "curated")
    dropped = pq.read_table(folder / "results/laptop/curated/dataset/dropped.parquet").to_pylist()
    assert len(dropped) > 300
    assert [row["id"] for row in dropped if row["id"] not in told] == []
    assert "the answer refuses: 'as an AI'" in told


def test_a_long_list_of_dropped_rows_keeps_the_most_frequent_reasons(folder: Path) -> None:
    path = folder / "results/laptop/curated/dataset/dropped.parquet"
    shown = dropped_rows(path, 10)["4 drop_exact_duplicates"]
    whole = dropped_rows(path, 10_000)["4 drop_exact_duplicates"]
    assert (shown.listed, shown.rows) == (10, whole.rows)
    assert shown.reasons[0].reason == whole.reasons[0].reason


def test_contamination_is_counts_by_scenario_of_both_stages(page: str) -> None:
    told = article(page, "curated")
    assert re.search(r"open ?pattern match ?40 ?2", told)
    assert re.search(r"closed ?parity ?40 ?0", told)


def test_curated_and_raw_differ_in_their_operations_only(page: str) -> None:
    assert RECIPES["curated"][0] == RECIPES["raw"][0]
    assert "None: the rows are unchanged from the sources." in article(page, "raw")
    assert "4 drop_exact_duplicates" in article(page, "curated")


def test_what_a_team_s_own_program_does_not_tell_is_left_out(tmp_path: Path) -> None:
    competition = write_competition(tmp_path)
    at = tmp_path / "results/laptop"
    untold: dict[str, object] = {
        "steps": None,
        "planned_steps": None,
        "rows_too_long": None,
        "final_loss": None,
    }
    trained = read_record(AdapterManifest, at / "raw/adapter.json")
    untold["contained"] = {"more than 64 MB of output; the rest was dropped": 1}
    trained.model_copy(update=untold).write(at / "raw/adapter.json")
    asked = read_record(StageRecord, at / "untuned/open.json")
    held_back = {"contained": {"a reply of more than 4 MB": 3}}
    asked.model_copy(update=held_back).write(at / "untuned/open.json")
    telemetry = pq.read_table(at / "raw/train.parquet")
    pq.write_table(telemetry.slice(0, 0), at / "raw/train.parquet")
    served = read_record(PackageManifest, at / "untuned/package.json")
    served = served.model_copy(update={"kind": "server", "dtype": None, "parameters": None})
    served.write(at / "untuned/package.json")
    boards = score_competition(tmp_path, competition)
    build_report(
        competition,
        results=Results(tmp_path / "results"),
        leaderboards=Boards(boards),
        out=tmp_path / "report",
    )
    page = (tmp_path / "report/index.html").read_text(encoding="utf-8")
    assert "the team's own program trained the model and does not report its steps" in article(page, "raw")
    assert "1 × more than 64 MB of output; the rest was dropped" in article(page, "raw")
    assert "submitted the team's own server" in article(page, "untuned")
    assert "3 × a reply of more than 4 MB" in article(page, "untuned")


# --- the whole page --------------------------------------------------------------------------------------


def test_a_prize_is_green_only_if_no_choice_decides_it_and_its_neighbors_can_be_told_apart(
    folder: Path, page: str
) -> None:
    cards = re.findall(r'<li class="(holds|depends)">(.*?)</li>', page, flags=re.DOTALL)
    shown = {re.sub(r"<[^>]*>", "", text).split()[1]: (kind, text) for kind, text in cards}
    assert {name: kind for name, (kind, _) in shown.items()} == {
        "curated": "holds",
        "raw": "depends",
        "open_only": "depends",
    }
    analysis = read_record(Analysis, folder / "results/leaderboard/laptop.analysis.json")
    assert analysis.robustness is not None
    first, second, third = analysis.robustness.verdicts
    assert (first.stable, second.stable, third.stable) == (True, True, False)
    above, below = analysis.neighbours_of("raw")
    assert (above.separated, below.separated) == (True, False), "stable, and still no sure second place"
    assert "! cannot be told apart from a neighbor" in shown["raw"][1]
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", "", shown["raw"][1]))
    assert re.search(r"Below curated with probability 1\.00: these 160 questions tell them apart\.", text)
    assert re.search(r"Above open_only with probability 0\.\d\d: 160 questions do not tell them apart;", text)
    assert not analysis.model_copy(update={"uncertainty": None}).holds(first), "unknown is not sure"


@pytest.fixture(scope="module")
def with_prizes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished competition with two prizes, and its page."""
    folder = tmp_path_factory.mktemp("prizes")
    competition = write_competition(folder)
    boards = score_competition(folder, competition, prizes=Prizes(places=2))
    out = folder / "results/report"
    build_report(competition, results=Results(folder / "results"), leaderboards=Boards(boards), out=out)
    return boards, (out / "index.html").read_text(encoding="utf-8")


def prize_section(page: str) -> str:
    found = re.search(r"<h3>Prizes</h3>(.*?)<div[^>]*aria-label=\"Leaderboard of", page, flags=re.DOTALL)
    assert found is not None
    return found[1]


def plain(text: str) -> str:
    """Without tags, and without the marks of Markdown."""
    text = html.unescape(re.sub(r"<[^>]*>", " ", text.replace("<wbr>", "")))
    return " ".join(re.sub(r"[|#\\]|-{3,}:?|^- ", " ", text, flags=re.MULTILINE).split())


def test_the_prizes_are_on_the_page_in_the_words_of_the_decision_s_document(
    with_prizes: tuple[Path, str],
) -> None:
    boards, page = with_prizes
    told = plain(prize_section(page))
    document = (boards / "laptop.decision.md").read_text()
    assert "Holm" in document
    for title in ("How likely", "What was tested", "What would change it"):
        section = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", document, flags=re.MULTILINE | re.DOTALL)
        assert section is not None
        assert f"{title} {plain(section[1])}" in told
    decision = read_record(Decision, boards / "laptop.decision.json")
    cards = re.findall(r'<li class="\w+">(.*?)</li>', prize_section(page), flags=re.DOTALL)
    for award, card in zip(decision.awards, cards[: len(decision.awards)], strict=True):
        for entry, chances in decision.chances_in(award).items():
            said = ", ".join(f"P({place}) {p:.3f}" for place, p in zip(award.places, chances, strict=True))
            assert re.search(rf"{entry}\b.*{re.escape(said)}", plain(card))


def test_a_prize_is_green_only_if_it_is_awarded_and_its_rank_depends_on_no_choice(
    with_prizes: tuple[Path, str],
) -> None:
    boards, page = with_prizes
    kinds = re.findall(r'<li class="(holds|depends)">', prize_section(page))
    decision = read_record(Decision, boards / "laptop.decision.json")
    assert [award.outcome for award in decision.awards] == ["awarded", "shared"]
    assert kinds == ["holds", "depends"]
    board, analysis = read_board(Boards(boards), "laptop")
    first = decision.awards[0]
    assert analysis is not None and analysis.robustness is not None
    doubts = partial(TrackReport, "laptop", "", board, entries=[], decision=decision)
    assert doubts(analysis=analysis).doubts(first) == ""
    assert "is not known" in doubts(analysis=None).doubts(first)
    verdicts = [one.model_copy(update={"stable": False}) for one in analysis.robustness.verdicts]
    unstable = analysis.robustness.model_copy(update={"verdicts": verdicts})
    assert "depends on a choice" in doubts(
        analysis=analysis.model_copy(update={"robustness": unstable})
    ).doubts(first)
    assert analysis.uncertainty is not None
    pairs = [one.model_copy(update={"separated": False}) for one in analysis.uncertainty.neighbours]
    blurred = analysis.uncertainty.model_copy(update={"neighbours": pairs})
    assert "cannot be told apart" in doubts(
        analysis=analysis.model_copy(update={"uncertainty": blurred})
    ).doubts(first)


def test_without_prizes_or_with_those_of_another_leaderboard_there_is_no_decision(
    page: str, with_prizes: tuple[Path, str], tmp_path: Path
) -> None:
    assert "<h3>Prizes</h3>" not in page
    boards, _ = with_prizes
    shutil.copy(boards / "laptop.decision.json", tmp_path)
    board = read_record(Leaderboard, boards / "laptop.json")
    assert read_decision(Boards(tmp_path), board) is not None
    assert read_decision(Boards(tmp_path), board.model_copy(update={"competition": "another"})) is None


def test_the_frontier_is_who_got_as_far_for_less() -> None:
    points = [(3.0, 0.9), (1.0, 0.2), (2.0, 0.2), (2.0, 0.6), (4.0, 0.8), (3.0, 0.9)]
    assert frontier(points) == [1, 3, 0, 5]
    assert frontier([]) == []


def test_efficiency_is_drawn_for_what_is_known_of_two_entries(folder: Path) -> None:
    drawn = (folder / "results/report/figures/laptop-efficiency.svg").read_text()
    assert "hours of training" in drawn
    assert "million parameters" in drawn
    assert "kWh" not in drawn, "nothing was metered"
    assert "open_only: 0.01 hours of training, final score" in drawn
    labels = re.findall(r'font-weight="600">(\w+)</text>', drawn)
    assert labels == ["open_only", "curated", "curated"], "the frontier of each panel by name"


def test_no_link_and_no_source_leads_out_of_the_page(page: str) -> None:
    addresses = re.findall(r'<[^>]*(?:href|src|action)="([^"]*)"', page)
    assert addresses
    assert all(address.startswith(("#", "data:")) for address in addresses)
    assert "url(" not in page
    assert "@import" not in page


def test_the_page_stays_small(page: str) -> None:
    assert len(page.encode()) < 500_000


def test_the_verdicts_on_the_prizes_stand_before_the_table(page: str) -> None:
    assert 0 < page.index("1st place (curated)") < page.index("<table")


def test_the_same_records_give_the_same_page(
    finished: tuple[Path, Competition], page: str, tmp_path: Path
) -> None:
    folder, competition = finished
    results = folder / "results"
    build_report(
        competition, results=Results(results), leaderboards=Boards(results / "leaderboard"), out=tmp_path
    )
    assert (tmp_path / "index.html").read_text(encoding="utf-8") == page


def test_standings_say_that_they_are_provisional_and_who_is_missing(tmp_path: Path) -> None:
    competition = write_competition(tmp_path)
    (tmp_path / "results/laptop/raw/closed.json").unlink()
    failure = StepFailure.model_validate(
        {"step": "closed", "state": "crashed", "reason": "the model server died", "log": "closed.log"}
    )
    failure.write(tmp_path / "results/laptop/raw/work/failures/closed.json")
    boards = score_competition(tmp_path, competition, final=False)
    build_report(
        competition,
        results=Results(tmp_path / "results"),
        leaderboards=Boards(boards),
        out=tmp_path / "report",
    )
    page = (tmp_path / "report/index.html").read_text(encoding="utf-8")
    assert "Provisional standings" in page
    assert "the model server died" in article(page, "raw")
    assert "4 drop_exact_duplicates" in article(page, "curated")


def test_where_training_is_covered_no_number_of_questions_is_promised_and_no_tie_claimed(
    tmp_path: Path,
) -> None:
    write_competition(tmp_path)
    noisy = competition(tmp_path, scoring={"training_noise": 0.05})
    boards = score_competition(tmp_path, noisy)
    results = Results(tmp_path / "results")
    build_report(noisy, results=results, leaderboards=Boards(boards), out=tmp_path / "report")
    page = (tmp_path / "report/index.html").read_text(encoding="utf-8")
    assert "160 questions and these trainings do not tell them apart." in page
    assert "their scores are equal" not in page


def test_standings_before_anything_has_finished_are_a_page_too(tmp_path: Path) -> None:
    competition = write_competition(tmp_path)
    shutil.rmtree(tmp_path / "results")
    boards = score_competition(tmp_path, competition, final=False)
    (tmp_path / "report/figures").mkdir(parents=True)
    (tmp_path / "report/figures/laptop-win-rates.svg").write_text("of an earlier report")
    build_report(
        competition,
        results=Results(tmp_path / "results"),
        leaderboards=Boards(boards),
        out=tmp_path / "report",
    )
    page = (tmp_path / "report/index.html").read_text(encoding="utf-8")
    assert "No entry has finished yet." in page
    assert "not run yet" in article(page, "raw")
    assert list((tmp_path / "report/figures").iterdir()) == []


def test_an_analysis_of_another_leaderboard_is_not_shown(folder: Path, tmp_path: Path) -> None:
    board = read_record(Leaderboard, folder / "results/leaderboard/laptop.json")
    (tmp_path / "laptop.analysis.json").write_bytes(
        (folder / "results/leaderboard/laptop.analysis.json").read_bytes()
    )
    board.model_copy(update={"competition": "another"}).write(tmp_path / "laptop.json")
    assert read_board(Boards(tmp_path), "laptop")[1] is None


# --- figures ---------------------------------------------------------------------------------------------

KINDS = ("efficiency", "open-vs-closed", "rank-intervals", "win-rates", "leave-one-out", "budget-use")


def test_figures_lie_beside_the_page_as_svg_and_png(folder: Path) -> None:
    names = {path.name for path in (folder / "results/report/figures").iterdir()}
    assert names == {f"laptop-{kind}.{ending}" for kind in KINDS for ending in ("svg", "png")}


@pytest.mark.parametrize("kind", KINDS)
def test_both_files_of_a_figure_show_the_same_drawing(folder: Path, kind: str) -> None:
    svg = ElementTree.parse(folder / f"results/report/figures/laptop-{kind}.svg").getroot()  # noqa: S314
    with Image.open(folder / f"results/report/figures/laptop-{kind}.png") as picture:
        width, height = float(svg.attrib["width"]), float(svg.attrib["height"])
        assert picture.size == pytest.approx((2 * width, 2 * height), abs=2)
        assert len(set(picture.convert("RGB").getdata())) > 10
    told = " ".join(svg.itertext())
    assert all(name in told for name in ("curated", "untuned"))
    assert svg.attrib["aria-label"]


def test_pages_share_compiled_templates_and_nothing_of_their_content() -> None:
    def page(title: str, script: str, *, parts: bool) -> str:
        return render("answers.html.j2", script, parts=parts, competition="Palio", title=title, index={})

    one, other = page("One", "answers.js", parts=True), page("Other", "page.js", parts=False)
    assert "Answers: One" in one
    assert "Answers: Other" in other
    policy, other_policy = (
        html.unescape(text).split("script-src ")[1].split(";")[0] for text in (one, other)
    )
    assert policy.split()[1:] == ["'self'"]
    assert other_policy.split()[1:] == []
    assert policy.split()[0] != other_policy.split()[0]
    assert page("One", "answers.js", parts=True) == one
