"""Who gets the prizes: what is claimed, what is not, and what would change it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from palio.cli import palio
from palio.config import Prizes, load_rules
from palio.layout import Boards
from palio.records import Cell, Decision, Leaderboard, Replicate, read_record
from palio.scoring.decision import Differences, decide, separated_pairs
from palio.scoring.decision_document import decision_markdown, write_decision
from palio.scoring.leaderboard import Candidate, score
from palio.scoring.uncertainty import AnswersByScenario
from palio.settings import CheckSettings
from palio.workflow import Workflow
from tests.support.report import score_competition, write_competition
from tests.unit.test_scoring_uncertainty import CLOSED, OPEN, board_and_answers, first

ROOT = Path(__file__).parents[2]
DEMO_RULES = (ROOT / "config/rulesets/demo.yaml").read_text()
Given = tuple[Leaderboard, AnswersByScenario]


def decided(given: Given, assumed: float | None = None, **prizes: Any) -> Decision:
    made = decide(*given, Prizes(**prizes), draws=500, training_noise=assumed)
    assert made is not None
    return made


def outcomes(decision: Decision) -> list[tuple[list[int], str, list[str]]]:
    return [(award.places, award.outcome, award.entries) for award in decision.awards]


@pytest.fixture
def clear() -> Given:
    return board_and_answers({"best": first(39), "good": first(25), "mid": first(12), "last": first(1)})


@pytest.fixture
def close() -> Given:
    """One entry far above two that nothing separates, and one far below."""
    draw = np.random.default_rng(1)
    equal = {name: (draw.random(40) < 0.5).astype(float) for name in ("b", "c")}
    return board_and_answers({"a": first(40), **equal, "d": first(0)})


def test_each_place_goes_to_one_entry_if_every_boundary_stands(clear: Given) -> None:
    made = decided(clear)
    assert outcomes(made) == [
        ([1], "awarded", ["best"]),
        ([2], "awarded", ["good"]),
        ([3], "awarded", ["mid"]),
    ]
    assert [boundary.stands for boundary in made.boundaries] == [True, True, True]
    assert [chance.places[0] for chance in made.chances] == [1, 0, 0, 0]
    assert "every place is decided" in decision_markdown(made)


def test_entries_between_two_boundaries_share_their_places(close: Given) -> None:
    made = decided(close)
    names = made.awards[1].entries
    assert outcomes(made) == [([1], "awarded", ["a"]), ([2, 3], "shared", names)]
    assert sorted(names) == ["b", "c"]
    assert [boundary.stands for boundary in made.boundaries] == [True, False, True]
    assert made.awards[1].text.endswith("cannot be told apart; they share.")


def test_the_rules_may_ask_for_more_before_a_place_is_awarded(close: Given) -> None:
    made = decided(close, not_separable="more_questions", places=2)
    assert outcomes(made)[1][:2] == ([2], "more_questions")
    remedy = made.boundaries[1].remedy
    assert remedy is not None
    assert remedy.times_questions is not None
    assert remedy.times_questions > 1
    assert remedy.times_trainings is None, "training is not covered"


def test_who_is_in_contention_for_the_last_place_shares_it(close: Given) -> None:
    made = decided(close, places=2)
    assert [sorted(award.entries) for award in made.awards] == [["a"], ["b", "c"]]
    (last,) = [chance for chance in made.chances if chance.entry == "d"]
    assert (last.best_rank, last.worst_rank) == (4, 4)


def test_an_assumed_noise_of_training_can_undo_an_award(clear: Given) -> None:
    made = decided(clear, 0.3)
    assert made.boundaries[0].stands is False
    assert "not measured but assumed: a standard deviation of 0.3" in made.covers
    assert made.comparisons[0].of_questions < 0.5
    assert made.boundaries[0].remedy is not None


def test_a_second_training_decides_by_the_mean_not_by_the_lucky_one() -> None:
    def cells(value: float) -> list[Cell]:
        return [Cell(value=value, n=100_000)] * 2

    board = score(
        competition="c",
        track="t",
        columns=[OPEN, CLOSED],
        candidates=[
            Candidate("lucky", "l", cells(0.60), replicates=[Replicate(number=2, cells=cells(0.50))]),
            Candidate("steady", "s", cells(0.58), replicates=[Replicate(number=2, cells=cells(0.58))]),
        ],
        stage_weights={"open": 1 / 3, "closed": 2 / 3},
    )
    assert board.entries[0].entry == "lucky"
    made = decided((board, {}), places=1)
    assert [chance.entry for chance in made.chances] == ["steady", "lucky"]
    assert made.awards[0].outcome == "shared"


def test_equal_entries_are_almost_never_separated_however_many_there_are() -> None:
    """The largest of many differences is held against the largest of many drawn ones."""
    wrong = 0
    for number in range(100):
        draw = np.random.default_rng(number)
        estimate = np.sort(draw.normal(size=20))[::-1]
        draws = draw.normal(size=(500, 20))
        error = np.full((20, 20), np.sqrt(2))
        differences = Differences(
            [f"e{i}" for i in range(20)], estimate, draws, error, error, covers_training=False
        )
        _, separated = separated_pairs(differences, 0.05)
        alone = differences.statistic > 1.96
        assert separated.sum() <= alone.sum()
        wrong += bool(separated.any())
    assert wrong <= 12


def test_one_entry_has_the_prize_and_none_have_none() -> None:
    assert outcomes(decided(board_and_answers({"only": first(3)}))) == [([1], "awarded", ["only"])]
    assert (
        decide(board_and_answers({"only": first(3)})[0].model_copy(update={"entries": []}), {}, Prizes())
        is None
    )


def test_equal_answers_share_even_the_first_place() -> None:
    made = decided(board_and_answers({"a": first(20), "b": first(20), "c": first(1)}), places=1)
    assert outcomes(made) == [([1], "shared", ["a", "b"])]
    assert made.boundaries[0].remedy is not None
    assert made.boundaries[0].remedy.text == "nothing: they have the same score"


def test_the_document_names_everything_it_rests_on(close: Given, tmp_path: Path) -> None:
    made = decided(close)
    write_decision(made, Boards(tmp_path), "t")
    assert read_record(Decision, tmp_path / "t.decision.json") == made
    text = (tmp_path / "t.decision.md").read_text()
    for words in (
        "| 2 to 3 | shared |",
        "P(1)",
        "Holm",
        "Romano and Wolf",
        "all 6 pairs",
        "What would change it",
        "palio plan-questions says of which scenarios",
    ):
        assert words in text
    assert "the standings are provisional" in text.lower()


# --- the verb, and what prizes re-run --------------------------------------------------------------------


def test_decide_takes_prizes_from_the_rule_set_or_the_command_line(tmp_path: Path) -> None:
    competition = write_competition(tmp_path)
    boards = score_competition(tmp_path, competition)
    rules = tmp_path / "rules.yaml"
    rules.write_text(DEMO_RULES.replace("{places: 2}", "{places: 2, alpha: 0.1}"))
    given = competition.model_copy(update={"rules": str(rules)}).model_dump_json(exclude_none=True)
    at = [
        "decide",
        str(boards / "laptop.json"),
        "--competition",
        given,
        "--results",
        str(tmp_path / "results"),
    ]
    done = CliRunner().invoke(palio, at, catch_exceptions=False)
    assert done.output.startswith("Place")
    made = read_record(Decision, boards / "laptop.decision.json")
    assert (made.places, made.alpha) == (2, 0.1)
    CliRunner().invoke(palio, [*at, "--places", "1"], catch_exceptions=False)
    assert read_record(Decision, boards / "laptop.decision.json").places == 1


def test_prizes_score_again_and_check_no_entry_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    workflow = Workflow(Path("config/config.yaml"))
    before = CheckSettings.of(workflow.planned("raw"), "check"), workflow.scored_with("laptop")
    rules = tmp_path / "rules.yaml"
    rules.write_text(DEMO_RULES.replace("{places: 2}", "{places: 3}"))
    workflow.rules = load_rules(rules)
    after = CheckSettings.of(workflow.planned("raw"), "check"), workflow.scored_with("laptop")
    assert before[0] == after[0]
    assert before[1] != after[1]
