"""`palio feedback`: what a team may see of its entry, also of one that failed, and nothing else."""

from __future__ import annotations

import html
import json
import re
import shutil
import zipfile
from pathlib import Path

import pytest

from palio.feedback.gathering import Gathering
from palio.feedback.writing import write_feedback
from palio.layout import Boards, EntryFolder, Resources, Results
from palio.pipeline import STEPS as ALL_STEPS
from palio.records import Contamination, ProbeCheck, ProbeReport, StepFailure, read_record
from palio.release.gather import Leak
from palio.workflow import Workflow
from tests.support.chromium import chromium_page
from tests.support.helm_runs import leave_runs, leave_stage_store, right
from tests.support.page import contrast_faults, outside_of
from tests.support.report import (
    HOSTILE,
    QUESTIONS,
    RIGHT,
    SCENARIOS,
    competition,
    competition_content,
    leave_entry,
    score_competition,
    write_competition,
    write_entries,
)

CANARY = "canary-7f3a: what nobody may see"
TOKEN = "hf_" + "abcdefghijklmnopqrstuvwxyz0123"
ROOT = Path(__file__).parents[2]
STEPS = [step for step in ALL_STEPS if step.name != "image"]  # of entries without a Dockerfile
FAILED = [f"fails_{step.name}" for step in STEPS]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished competition, and an entry that failed at each step; a canary in closed store and log."""
    folder, secret = tmp_path_factory.mktemp("competition"), tmp_path_factory.mktemp("secret")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_competition(folder)
        shutil.copy(ROOT / "config/rulesets/demo.yaml", "rules.yaml")
        (folder / "x.conf").write_text('entries: [{description: "synthetic_reasoning:mode=pattern_match"}]')
        (folder / "closed.txt").write_text(str(secret))
        write_entries(folder, FAILED, trained=FAILED)
        given = competition(folder, closed_store=str(secret))
        for stage in ("open", "closed"):
            leave_stage_store(
                Resources().open_store if stage == "open" else given.store.stage,
                dict.fromkeys(SCENARIOS[stage], QUESTIONS),
                text=None if stage == "open" else CANARY,
            )
        results = Results(folder / "results", given.store)
        for name in RIGHT:
            leave_answers(results.entry("laptop", name), name)
        for step in STEPS:
            leave_failure(folder, results.entry("laptop", f"fails_{step.name}"), step.name)
        score_competition(folder, given, final=False)
    return folder


def leave_answers(folder: EntryFolder, name: str) -> None:
    for stage in ("open", "closed"):
        count = dict(zip(SCENARIOS[stage], RIGHT[name][stage], strict=True))

        def says(
            scenario: str, number: int, count: dict[str, int] = count, secret: bool = stage == "closed"
        ) -> str:
            wrong = CANARY if secret else f"{HOSTILE}\x1b[2J {number}"
            return right(number) if number < count[scenario] else wrong

        leave_runs(folder, stage, dict.fromkeys(SCENARIOS[stage], QUESTIONS), says)
        leave_log(folder, stage, CANARY if stage == "closed" else "asked 80 questions")


def leave_log(folder: EntryFolder, step: str, text: str) -> Path:
    path = folder.log(step)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{step} begins\n{text}\n")
    return path


def leave_failure(home: Path, folder: EntryFolder, failed: str) -> None:
    """Records and logs of all steps before this one; of this one a failure and a log."""
    names = [step.name for step in STEPS]
    leave_entry(home, folder.entry_id, trained=False)
    for step in STEPS[names.index(failed) :]:
        step.record(folder).unlink(missing_ok=True)
    for step in STEPS[: names.index(failed) + 1]:
        leave_log(folder, step.name, CANARY if step.name == "closed" else f"last words of {step.name}\x1b[2J")
    failure = StepFailure(step=failed, state="crashed", reason=f"{failed} went wrong {HOSTILE}", log="x.log")
    failure.write(folder.failure(failed))


@pytest.fixture
def gathering(home: Path, monkeypatch: pytest.MonkeyPatch) -> Gathering:
    monkeypatch.chdir(home)
    content = competition_content(home, closed_store=(home / "closed.txt").read_text())
    workflow = Workflow(content)
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
        assert page.complaints == []
        assert {*page.requests} == {f"file://{path}", "about:blank"} & {*page.requests}


def test_equal_feedback_gives_equal_files(gathering: Gathering, tmp_path: Path) -> None:
    one, two = (write_feedback(gathering, "curated", tmp_path / name) for name in ("one", "two"))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]
