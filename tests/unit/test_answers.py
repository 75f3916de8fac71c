"""`palio answers`: what an entry answered, in the terminal."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from palio.answers.comparison import decisions, full_marks
from palio.answers.listing import entry_lines
from palio.answers.pages import write_pages
from palio.answers.reading import AskedStage
from palio.config import Competition
from palio.errors import BadInput
from palio.layout import AnswerPages, Resources, Results, Stage
from tests.support.helm_runs import leave_runs, leave_stage_store, right
from tests.support.report import HOSTILE, QUESTIONS, RIGHT, SCENARIOS, competition, leave_entry, write_entries

SCENARIO, OTHER = SCENARIOS["open"]
CANARY = "canary-7f3a"


@pytest.fixture
def finished(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Competition, Results]]:
    """Two entries: `curated` answers right as often as its record says, `untuned` sends escape sequences."""
    monkeypatch.chdir(tmp_path)
    write_entries(tmp_path, ["curated", "untuned"])
    closed = str(tmp_path_factory.mktemp("closed"))
    given = competition(tmp_path, withdrawn={}, closed_store=closed)
    results = Results(tmp_path / "results", given.store)
    scenarios = dict.fromkeys(SCENARIOS["open"], QUESTIONS)
    leave_stage_store(Resources().open_store, scenarios)
    for name in ("curated", "untuned"):
        leave_entry(tmp_path, name, trained=False)
        count = dict(zip(SCENARIOS["open"], RIGHT[name]["open"], strict=True))

        def says(scenario: str, number: int, name: str = name, count: dict[str, int] = count) -> str | None:
            if number == QUESTIONS - 1:
                return None
            return right(number) if number < count[scenario] else f"\x1b[2J{HOSTILE} of {name}"

        leave_runs(results.entry("laptop", name), "open", scenarios, says)
    yield given, results


def lines(
    finished: tuple[Competition, Results],
    entry: str,
    *,
    stage: Stage = "open",
    scenario: str | None = None,
    wrong: bool = False,
    compare: str | None = None,
) -> list[str]:
    return list(entry_lines(*finished, entry, stage, scenario, wrong, compare))


def test_an_answer_is_shown_with_its_prompt_references_and_metrics(
    finished: tuple[Competition, Results],
) -> None:
    shown = "\n".join(lines(finished, "curated", scenario=SCENARIO))
    first = shown.split("\n---")[0]
    assert first.splitlines() == [
        f"--- {SCENARIO}, {SCENARIO}/id0",
        "  prompt: Question: an example?",
        "          Answer: yes",
        "          ",
        f"          Question 0 of {SCENARIO}: which letter comes after a?",
        "          Answer:",
        "  correct: b",
        "  choice: c",
        "  answer: b",
        "  exact match 1",
    ]
    assert shown.endswith(f"{QUESTIONS} answers, {2 * QUESTIONS} questions in the stage")


def test_wrong_answers_only_and_why_one_is_missing(finished: tuple[Competition, Results]) -> None:
    shown = lines(finished, "curated", wrong=True)
    wrong = 2 * QUESTIONS - sum(RIGHT["curated"]["open"])
    assert shown[-1].startswith(f"{wrong} answers without full marks")
    assert shown.count("  answer: none, HTTP 500") == 2


def test_no_character_of_an_answer_reaches_the_terminal_as_a_command(
    finished: tuple[Competition, Results],
) -> None:
    shown = "\n".join(lines(finished, "untuned"))
    assert "\x1b" not in shown
    assert r"\x1b[2J<script>" in shown


def test_two_entries_are_compared_by_the_questions_that_decide_between_them(
    finished: tuple[Competition, Results],
) -> None:
    lost = [
        mine - other for mine, other in zip(RIGHT["untuned"]["open"], RIGHT["curated"]["open"], strict=True)
    ]
    shown = lines(finished, "untuned", compare="curated")
    assert shown[-1] == f"untuned did better on 0 questions, curated on {-sum(lost)}"
    assert sum(line.startswith("---") for line in shown) == -sum(lost)

    asked = AskedStage(finished[0], "open")
    mine, other = (asked.answers(finished[1].entry("laptop", name)) for name in ("untuned", "curated"))
    found = decisions(mine, other, {name: asked.metrics(name) for name in SCENARIOS["open"]})
    by_scenario = sum(one.difference for one in found if one.question.scenario == SCENARIO)
    assert by_scenario == pytest.approx(lost[0] / QUESTIONS), "they add up to the difference in the column"


def test_an_answer_without_a_reply_never_has_full_marks(finished: tuple[Competition, Results]) -> None:
    asked = AskedStage(finished[0], "open")
    missing = [one for one in asked.answers(finished[1].entry("laptop", "curated")) if one.unanswered]
    assert len(missing) == 2
    assert not any(full_marks(one, asked.metrics(one.question.scenario)) for one in missing)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"entry": "currated"}, "ENTRY is 'currated': no entry has this id; did you mean curated?"),
        (
            {"entry": "curated", "compare": "x"},
            "ENTRY is 'x': no entry has this id; use one of curated, untuned",
        ),
        ({"entry": "curated", "scenario": "mmlu"}, f"--scenario is 'mmlu': use one of {SCENARIO}, {OTHER}"),
        ({"entry": "curated", "stage": "closed"}, "the stage is not prepared here; start the workflow"),
    ],
)
def test_what_there_is_not_is_named_with_the_fix(
    finished: tuple[Competition, Results], given: dict[str, str], told: str
) -> None:
    with pytest.raises(BadInput) as fault:
        lines(finished, **given)  # type: ignore[arg-type]
    assert told in str(fault.value)


def test_an_entry_that_has_not_come_so_far_has_no_answers(finished: tuple[Competition, Results]) -> None:
    (finished[1].path / "laptop/curated/open.json").unlink()
    assert lines(finished, "curated"), "without a record, those of the newest runs"
    folder = finished[1].entry("laptop", "curated").helm_runs("open")
    folder.rename(folder.with_name("elsewhere"))
    with pytest.raises(
        BadInput, match="no HELM run of the open stage of curated; ask once the stage has run"
    ):
        lines(finished, "curated")


def test_the_closed_stage_is_read_from_the_closed_store_and_is_on_no_page(
    finished: tuple[Competition, Results], tmp_path: Path
) -> None:
    given, results = finished
    scenarios = dict.fromkeys(SCENARIOS["closed"], QUESTIONS)
    leave_stage_store(given.store.stage, scenarios)
    leave_runs(results.entry("laptop", "curated"), "closed", scenarios, lambda *_: CANARY)
    assert f"  answer: {CANARY}" in lines(finished, "curated", stage="closed")
    write_pages(given, results, AnswerPages(tmp_path / "answers"))
    written = [path.read_text() for path in (tmp_path / "answers").rglob("*") if path.is_file()]
    assert len(written) == 9, "the page, two parts of questions, marks and two parts of each entry"
    assert not [text for text in written if CANARY in text or SCENARIOS["closed"][0] in text]


def test_a_part_is_json_and_shows_control_characters_as_escapes(
    finished: tuple[Competition, Results], tmp_path: Path
) -> None:
    write_pages(*finished, AnswerPages(tmp_path / "answers"))
    (part, *_) = sorted((tmp_path / "answers/laptop/entries/untuned").glob("0.js"))
    text = part.read_text()
    assert text.startswith('palioPart("entries/untuned/0",')
    replies = json.loads(text[text.index(",") + 1 :].removesuffix(");\n"))
    assert replies[QUESTIONS - 1][0][1:3] == [None, "HTTP 500"]
    assert replies[QUESTIONS - 2][0][1] == rf"\x1b[2J{HOSTILE} of untuned"
