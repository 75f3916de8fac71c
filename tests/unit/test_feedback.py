"""`palio feedback`: what a team may see of its entry, also of one that failed, and nothing else."""

from __future__ import annotations

import html
import json
import re
import zipfile
from pathlib import Path

import pytest

from palio.feedback.gathering import Gathering
from palio.feedback.writing import write_feedback
from palio.layout import Boards, EntryFolder, Results
from palio.records import Contamination, ProbeCheck, ProbeReport, read_record
from palio.release.gather import Leak
from palio.workflow import Workflow
from tests.support.canary import CANARY, STEPS, content_of, leave_competition, leave_log
from tests.support.chromium import chromium_page
from tests.support.page import accessibility_faults, contrast_faults, outside_of
from tests.support.report import HOSTILE, QUESTIONS, RIGHT

TOKEN = "hf_" + "abcdefghijklmnopqrstuvwxyz0123"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, secret = tmp_path_factory.mktemp("competition"), tmp_path_factory.mktemp("secret")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        leave_competition(folder, secret)
    return folder


@pytest.fixture
def gathering(home: Path, monkeypatch: pytest.MonkeyPatch) -> Gathering:
    monkeypatch.chdir(home)
    workflow = Workflow(content_of(home))
    results = Results(home / "results", workflow.competition.store)
    return Gathering(workflow, results, Boards(home / "results/leaderboard"))


def told(page: str) -> str:
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]*>", " ", page.replace("<wbr>", ""))))


def test_a_team_reads_its_rank_its_loss_to_the_next_better_entry_and_its_answers(
    gathering: Gathering, tmp_path: Path
) -> None:
    page, archive = write_feedback(gathering, "raw", tmp_path)
    text = told(page.read_text())
    assert "Provisional: among the entries that have finished so far." in text
    assert re.search(r"Rank 2 of 4 \(2 to 3\)", text)
    assert "The next better entry: curated" in text
    lost = RIGHT["curated"]["open"][0] - RIGHT["raw"]["open"][0]
    assert re.search(rf"pattern match exact match 0\.500 0\.750 0\.33 0\.83 {lost} 0 ", text)
    assert "natural reasoning exact match 0.375 0.500 0.67 1.00 secret secret" in text
    wrong = 2 * QUESTIONS - sum(RIGHT["raw"]["open"])
    assert f"80 answers, {wrong} of them without full marks" in text
    assert rf"{HOSTILE}\x1b[2J 39" in html.unescape(page.read_text()), "shown as text"
    assert "open: the last lines of open.log open begins asked 80 questions" in text
    with zipfile.ZipFile(archive) as zipped:
        assert zipped.read("index.html") == page.read_bytes()
        lines = [json.loads(line) for line in zipped.read("answers.jsonl").splitlines()]
        assert len(lines) == 2 * QUESTIONS
        assert {"records/adapter.json", "records/open.json", "answers/laptop.html"} <= {*zipped.namelist()}


@pytest.mark.parametrize("step", [step.name for step in STEPS])
def test_a_failure_gets_one_too_at_every_step(gathering: Gathering, tmp_path: Path, step: str) -> None:
    page, _ = write_feedback(gathering, f"fails_{step}", tmp_path)
    text = told(page.read_text())
    assert f"{step} went wrong {HOSTILE}" in html.unescape(page.read_text())
    assert "No score: the entry has not finished. 4 others have." in text
    shown = rf"last words of {step}\x1b[2J" in text
    assert shown is (step != "closed"), "the closed stage's log is nobody's"
    assert "\x1b" not in page.read_text()


def test_a_file_that_is_no_entry_gets_the_reason(gathering: Gathering, tmp_path: Path, home: Path) -> None:
    broken = home / "entries/broken.yaml"
    whole = broken.read_text()
    broken.write_text("team: x\ntrack: laptop\nlearning_rate: fast\n")
    try:
        page, _ = write_feedback(gathering, "broken", tmp_path)
    finally:
        broken.write_text(whole)
    assert "its base model is not approved" in told(page.read_text()), "it is withdrawn, too"


def test_nothing_of_the_closed_stage_is_in_what_any_team_gets(
    gathering: Gathering, tmp_path: Path, home: Path
) -> None:
    for entry_id in gathering.workflow.entries:
        write_feedback(gathering, entry_id, tmp_path / "out")
    for path in sorted((tmp_path / "out").glob("*.zip")):
        zipfile.ZipFile(path).extractall(tmp_path / "out" / path.stem)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) > 60
    closed = {name for name in files if name.name == "closed.json" or "helm/closed" in name.as_posix()}
    assert not closed
    assert not [path for path in files if b"canary" in path.read_bytes()]
    assert "canary" in (home / "results/laptop/raw/logs/closed.log").read_text(), "there was one to find"
    counted = read_record(Contamination, tmp_path / "out/curated/records/contamination.json")
    assert counted.instances.keys() == counted.contaminated.keys() == {"open"}
    assert (
        "closed" in read_record(Contamination, home / "results/laptop/curated/contamination.json").instances
    )


def test_a_closed_text_in_another_log_stops_it_before_anything_is_written(
    gathering: Gathering, tmp_path: Path, home: Path
) -> None:
    log = leave_log(EntryFolder.at(home / "results/laptop/untuned"), "package", CANARY)
    try:
        with pytest.raises(Leak, match=r"^index\.html contains a text of the closed stage"):
            write_feedback(gathering, "untuned", tmp_path / "out")
    finally:
        log.unlink()
    assert not (tmp_path / "out").exists()


def test_a_token_in_a_log_is_left_out_with_what_follows(
    gathering: Gathering, tmp_path: Path, home: Path
) -> None:
    log = leave_log(EntryFolder.at(home / "results/laptop/untuned"), "package", f"loading\n{TOKEN}\nthe rest")
    try:
        page, _ = write_feedback(gathering, "untuned", tmp_path)
    finally:
        log.unlink()
    text = told(page.read_text())
    assert "loading (the rest is left out: it holds what looks like a Hugging Face token)" in text
    assert TOKEN not in text


def test_a_server_reads_every_check_of_the_probe_with_its_fix(
    gathering: Gathering, tmp_path: Path, home: Path
) -> None:
    checks = (
        ProbeCheck(name="stop_sequences", required=False, state="fail", why="w", cost="c", fix="cut there"),
        ProbeCheck(name="tokenize", required=True, state="pass", why="counts agree"),
    )
    report = ProbeReport(checks=checks, planned_requests=80, time_limit=600, projected_seconds=100)
    path = home / "results/laptop/untuned/probe.json"
    report.write(path)
    try:
        text = told(write_feedback(gathering, "untuned", tmp_path)[0].read_text())
    finally:
        path.unlink()
    assert "stop sequences fails, a warning w c cut there" in text
    assert "tokenize pass counts agree" in text


@pytest.mark.parametrize("entry", ["raw", "fails_finetune"])
def test_the_page_is_read_on_a_phone_in_the_dark_and_asks_nobody(
    gathering: Gathering, tmp_path: Path, entry: str
) -> None:
    path, _ = write_feedback(gathering, entry, tmp_path)
    with chromium_page() as page:
        page.open(f"file://{path}", width=400, height=800, dark=True)
        page.do("document.querySelectorAll('details').forEach(one => one.open = true)")
        assert outside_of(page, 400) == []
        assert contrast_faults(page) == []
        assert accessibility_faults(page) == []
        assert page.complaints == []
        assert {*page.requests} == {f"file://{path}", "about:blank"} & {*page.requests}


def test_equal_feedback_gives_equal_files(gathering: Gathering, tmp_path: Path) -> None:
    one, two = (write_feedback(gathering, "curated", tmp_path / name) for name in ("one", "two"))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]
