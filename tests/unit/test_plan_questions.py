"""What separates two entries: how many more questions of which scenario, or seeds, and at what price."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner, Result
from hypothesis import assume, given
from hypothesis import strategies as st

from palio.cli import palio
from palio.config import Competition, load_competition
from palio.config import Scenario as ScenarioConfig
from palio.evaluation.helm import budgets
from palio.operating.question_plan import raised
from palio.records import Cell, Column, Leaderboard, QuestionPlan, Replicate
from palio.scoring.leaderboard import Candidate, score
from palio.scoring.separation import (
    ErrorParts,
    Prices,
    Retrained,
    error_parts,
    largest_error,
    limits,
    ways,
)
from palio.scoring.uncertainty import AnswersByScenario, ScenarioAnswers
from tests.support.report import QUESTIONS, competition_content, score_competition, write_competition
from tests.support.stages import run_file
from tests.unit.test_scoring_uncertainty import board_and_answers, first

ROOT = Path(__file__).parents[2]
OPEN = Column(stage="open", scenario="mmlu", metric="EM")
CLOSED = Column(stage="closed", scenario="math", metric="EM")
SKILL = {f"e{number:02}": 0.35 + 0.01 * number for number in range(30)}


def drawn_world(questions: dict[str, int], number: int = 0) -> tuple[Leaderboard, AnswersByScenario]:
    """Entries that answer each question right with the probability SKILL, open and closed."""
    draw = np.random.default_rng(number)
    answers = {
        stage: np.stack([draw.random(count) < skill for skill in SKILL.values()])
        for stage, count in questions.items()
    }
    board = score(
        competition="c",
        track="t",
        columns=[OPEN, CLOSED],
        candidates=[
            Candidate(
                name, name, [Cell(value=float(of[row].mean()), n=of.shape[1]) for of in answers.values()]
            )
            for row, name in enumerate(SKILL)
        ],
        stage_weights={"open": 1 / 3, "closed": 2 / 3},
    )
    scenarios = {
        column.scenario_key: ScenarioAnswers(
            np.zeros(questions[column.stage], dtype=np.int64), [answers[column.stage].astype(np.float32)]
        )
        for column in (OPEN, CLOSED)
    }
    return board, scenarios


def made_up(**changes: Any) -> ErrorParts:
    known: dict[str, Any] = {
        "better": "a",
        "worse": "b",
        "difference": 0.1,
        "scenarios": [("open", "mmlu"), ("closed", "math")],
        "questions": np.array([100.0, 100.0]),
        "of_questions": np.array([0.002, 0.004]),
        "of_runs": 0.0,
        "training": np.zeros(2),
        "trainings": np.ones(2),
        "of_others": 0.0,
        "covers_training": True,
    }
    return ErrorParts(**known | changes)


def priced(*question: float, training: float = 1.0) -> Prices:
    each = np.array(question)
    return Prices(each, [Retrained(1, training, each / 10)] * 2)


# --- where the error comes from --------------------------------------------------------------------------


def test_the_error_that_is_planned_for_is_the_error_that_more_questions_leave() -> None:
    """Four times as many closed questions, predicted from few and measured with many; a mean over worlds."""
    predicted, measured = [], []
    for number in range(12):
        (few,) = error_parts(*drawn_world({"open": 150, "closed": 150}, number), [("e28", "e15")], draws=400)
        (many,) = error_parts(*drawn_world({"open": 150, "closed": 600}, number), [("e28", "e15")], draws=400)
        predicted.append(few.error(np.array([1.0, 4.0]), 1))
        measured.append(many.variance)
    assert np.mean(predicted) == pytest.approx(np.mean(measured), rel=0.2)


def test_parts_add_up_to_the_error_of_the_intervals_and_the_better_one_is_first() -> None:
    (parts,) = error_parts(*drawn_world({"open": 150, "closed": 150}), [("e05", "e25")], training_noise=0.05)
    assert (parts.better, parts.worse) == ("e25", "e05")
    assert parts.questions.tolist() == [150, 150]
    assert parts.training.min() > parts.of_others > 0, "one rival of 28 hardly matters"
    assert parts.covers_training
    assert parts.variance == pytest.approx(parts.error(np.ones(2), 1))


def test_what_differs_between_helm_runs_is_not_removed_by_more_questions_of_the_same_runs() -> None:
    """Two entries that are good at different subjects, of which there are twelve."""
    runs = np.repeat(np.arange(12), 20)
    good = {"a": runs % 2 == 0, "b": runs % 2 == 1, "c": np.zeros(len(runs), dtype=bool)}
    (parts,) = error_parts(
        *board_and_answers({name: of.astype(float) for name, of in good.items()}, runs), [("a", "b")]
    )
    assert parts.of_questions.sum() == 0
    assert parts.of_runs == pytest.approx(parts.variance)


# --- how many more ---------------------------------------------------------------------------------------


def test_questions_go_where_they_remove_most_for_their_price() -> None:
    parts = made_up()
    allowed = largest_error(parts.difference, 0.05, 0.8)
    dear, cheap = (ways(parts, allowed, priced(1.0, price))[0].questions for price in (1.0, 0.01))
    assert cheap["closed/math"] > dear["closed/math"]
    assert cheap.get("open/mmlu", 0) < dear["open/mmlu"]


@given(
    st.lists(st.tuples(st.floats(1e-5, 1e-2), st.floats(1e-3, 10)), min_size=2, max_size=4),
    st.floats(0, 2e-3),
)
def test_no_way_leaves_too_large_an_error_and_none_is_cheaper_than_the_first(
    scenarios: list[tuple[float, float]], training: float
) -> None:
    parts = made_up(
        scenarios=[("open", f"s{number}") for number in range(len(scenarios))],
        questions=np.full(len(scenarios), 100.0),
        of_questions=np.array([variance for variance, _ in scenarios]),
        training=np.array([training, training]),
    )
    allowed = largest_error(parts.difference, 0.05, 0.8)
    assume(parts.variance > allowed**2)
    found = ways(parts, allowed, priced(*(price for _, price in scenarios)))
    assert found, "nothing stays whatever is asked"
    for way in found:
        more = [way.questions.get(f"open/s{number}", 0) for number in range(len(scenarios))]
        times = 1 + np.array(more) / parts.questions
        assert parts.error(times, way.seeds or 1) <= allowed**2 * (1 + 1e-6)
    hours = [way.gpu_hours for way in found]
    assert hours == sorted(hours)  # type: ignore[type-var]
    alone = [way for way in found if way.kind == "one_scenario"]
    (best,) = [way for way in found if way.kind == "questions"] or [found[0]]
    assert all((best.gpu_hours or 0) <= (way.gpu_hours or 0) + sum(p for _, p in scenarios) for way in alone)


def test_with_one_seed_the_noise_of_training_is_a_floor_that_no_question_lowers() -> None:
    parts = made_up(training=np.array([0.001, 0.001]))
    allowed = largest_error(parts.difference, 0.05, 0.8)
    assert allowed**2 < 0.002
    found = ways(parts, allowed, priced(0.01, 0.01))
    assert [way.kind for way in found] == ["both"], "these questions leave too much for seeds alone too"
    assert found[0].seeds is not None
    questions, seeds, both = limits(parts, allowed)
    assert questions.startswith(
        "No number of questions alone separates them: with 1 training of each, the noise"
    )
    assert f"a standard error of {0.002**0.5:.4f} whatever is asked" in questions
    assert seeds.startswith("No number of seeds alone separates them")
    assert both == "More of both does."


def test_seeds_are_cheaper_where_training_is_cheap() -> None:
    parts = made_up(of_questions=np.array([2e-4, 2e-4]), training=np.array([5e-4, 5e-4]))
    allowed = largest_error(parts.difference, 0.05, 0.8)
    assert ways(parts, allowed, priced(100.0, 100.0, training=0.1))[0].kind == "seeds"
    assert ways(parts, allowed, priced(1e-5, 1e-5, training=100.0))[0].kind == "questions"


def test_equal_scores_and_what_stays_cannot_be_separated_at_any_number() -> None:
    equal = made_up(difference=0.0)
    assert ways(equal, 0.0, None) == []
    assert limits(equal, 0.0) == ["Nothing separates them: they have the same score."]
    stays = made_up(of_runs=0.01, of_others=0.01)
    assert ways(stays, 0.03, None) == []
    (why,) = limits(stays, 0.03)
    assert "No number of questions and seeds of the two separates them: the choice of HELM runs" in why


def test_who_is_separated_needs_nothing() -> None:
    board, answers = board_and_answers({"best": first(39), "mid": first(20), "last": first(1)})
    (parts,) = error_parts(board, answers, [("best", "last")])
    allowed = largest_error(parts.difference, 0.05, 0.8)
    assert (ways(parts, allowed, None), limits(parts, allowed)) == ([], [])


def test_without_a_second_training_the_plan_says_what_it_does_not_know() -> None:
    (parts,) = error_parts(*drawn_world({"open": 50, "closed": 50}), [("e16", "e15")])
    said = limits(parts, largest_error(parts.difference, 0.05, 0.8))
    assert said[-1].startswith("What the noise of training would leave is not known")


def test_trainings_that_there_are_count() -> None:
    """Of two entries, the better one has three trainings: more seeds begin with the other's second."""
    board, answers = drawn_world({"open": 150, "closed": 150})
    first_of_all, *others = board.entries
    cells = [cell.model_copy(update={"value": (cell.value or 0) + 0.05}) for cell in first_of_all.cells]
    three = [Replicate(number=number, cells=cells) for number in (2, 3)]
    entries = [first_of_all.model_copy(update={"replicates": three}), *others]
    pair = (first_of_all.entry, others[5].entry)
    (parts,) = error_parts(board.model_copy(update={"entries": entries}), answers, [pair])
    assert parts.trainings.tolist() == [3, 1]
    assert parts.trained(3) < parts.trained(1) == parts.trained(0)


# --- the verb, and the lines of the config ---------------------------------------------------------------


@pytest.fixture
def competition(tmp_path: Path) -> Competition:
    """A finished competition, whose leaderboard is in results/leaderboard."""
    made = write_competition(tmp_path)
    score_competition(tmp_path, made)
    return made.model_copy(update={"rules": str(ROOT / "config/rulesets/demo.yaml")})


def planned(folder: Path, competition: Competition, *arguments: str) -> Result:
    at = [str(folder / "results/leaderboard/laptop.json"), *arguments]
    given = [
        "--competition",
        competition.model_dump_json(exclude_none=True),
        "--results",
        str(folder / "results"),
    ]
    return CliRunner().invoke(palio, ["plan-questions", *at, *given, "--places", "3"])


def test_the_printed_lines_raise_the_numbers_of_the_config(tmp_path: Path, competition: Competition) -> None:
    done = planned(tmp_path, competition, "raw", "open_only", "--json")
    assert done.exception is None, done.output
    plan = QuestionPlan.model_validate_json(done.output)
    (pair,) = plan.pairs
    cheapest = pair.ways[0]
    assert cheapest.gpu_hours is not None
    changes = yaml.safe_load(pair.config)["stages"]
    content = competition_content(tmp_path)
    for stage, of in changes.items():
        for name, scenario in of["scenarios"].items():
            content["stages"][stage]["scenarios"][name] |= scenario
            more = cheapest.questions[f"{stage}/{name}"]
            assert scenario["max_eval_instances"] == QUESTIONS + more
    load_competition(content)
    assert len(cheapest.questions) == sum(len(of["scenarios"]) for of in changes.values()) > 0
    text = planned(tmp_path, competition, "raw", "open_only").output
    assert "| way | more questions | seeds | GPU hours |" in text
    assert "Differences are normally distributed" in text


def test_a_longer_limit_is_printed_where_the_slowest_entry_would_need_it(
    tmp_path: Path, competition: Competition
) -> None:
    closed_stage = competition.stages.closed.model_copy(update={"time_limit": 300.0})
    stages = competition.stages.model_copy(update={"closed": closed_stage})
    shorter = competition.model_copy(update={"stages": stages})
    text = planned(tmp_path, shorter, "raw", "open_only").output
    closed = yaml.safe_load(text.split("```yaml")[1].split("```")[0])["stages"]["closed"]
    more = closed["scenarios"]["natural_reasoning"]["max_eval_instances"] - QUESTIONS
    needed = 118.5 + more * 118.5 / 80
    assert needed > 300
    assert closed["time_limit"] == f"{-int(-needed // 60)}m"


def test_seeds_go_into_replicates(tmp_path: Path, competition: Competition) -> None:
    done = planned(tmp_path, competition, "raw", "curated", "--training-noise", "0.08", "--json")
    assert done.exception is None, done.output
    (pair,) = QuestionPlan.model_validate_json(done.output).pairs
    assert pair.ways, pair.limits
    assert pair.ways[0].seeds is not None
    replicates = yaml.safe_load(pair.config)["replicates"]
    assert replicates == {"entries": ["curated", "raw"], "seeds": pair.ways[0].seeds}


def test_without_names_it_plans_for_the_places_that_could_not_be_decided(
    tmp_path: Path, competition: Competition
) -> None:
    plan = QuestionPlan.model_validate_json(planned(tmp_path, competition, "--json").output)
    assert [(pair.better, pair.worse) for pair in plan.pairs] == [("raw", "open_only")]
    assert plan.pairs[0].level <= 0.05


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (["raw", "rawe"], "ENTRIES is 'rawe': is not on the leaderboard; use two of curated, open_only"),
        (["raw"], "ENTRIES: 1 given, 1 of them different; name two entries, or none"),
        (["raw", "raw"], "ENTRIES: 2 given, 1 of them different; name two entries, or none"),
    ],
)
def test_two_entries_of_the_leaderboard_are_named_or_none(
    tmp_path: Path, competition: Competition, names: list[str], why: str
) -> None:
    assert why in str(planned(tmp_path, competition, *names).exception)


def test_of_a_leaderboard_of_another_competition_only_the_numbers_are_known(
    tmp_path: Path, competition: Competition
) -> None:
    path = tmp_path / "results/leaderboard/laptop.json"
    board = json.loads(path.read_text()) | {"competition": "neurips2023", "inputs": {}}
    path.write_text(json.dumps(board))
    done = planned(tmp_path, competition, "raw", "open_only", "--json")
    assert done.exception is None, done.output
    (pair,) = QuestionPlan.model_validate_json(done.output).pairs
    assert pair.config == ""
    assert pair.ways[0].questions
    assert {way.gpu_hours for way in pair.ways} == {None}


@given(now=st.integers(1, 40), times=st.floats(1, 6), scale=st.sampled_from((1.0, 0.5, 2.0)))
def test_a_number_over_many_runs_is_raised_so_that_none_of_them_gets_fewer(
    tmp_path_factory: pytest.TempPathFactory, now: int, times: float, scale: float
) -> None:
    """An even share of one question more can be a question less for one of the runs."""
    folder = tmp_path_factory.mktemp("runs")
    subjects = ("anatomy", "virology", "marketing", "nutrition", "sociology", "astronomy", "management")
    groups = ["a", "a", "a", "b", "b", "c", "d"]
    file = run_file(
        folder / "runs.conf",
        [(f"mmlu:subject={name}", group) for name, group in zip(subjects, groups, strict=True)],
    )
    scenario = ScenarioConfig(run_entries=file, questions=now, metrics={"EM": {"metric": "exact_match"}})
    number = raised(scenario, times, scale)
    before, after = (budgets(groups, max(1, round(one * scale))) for one in (now, number))
    assert all(new >= old for new, old in zip(after, before, strict=True))
    assert sum(after) >= times * sum(before) - 1e-3


@pytest.mark.parametrize("scale", [1.0, 0.01, 30.0])
@pytest.mark.parametrize("now", [1, 37])
def test_a_number_of_billions_is_found_at_once_and_is_the_least(
    tmp_path: Path, now: int, scale: float
) -> None:
    file = run_file(tmp_path / "runs.conf", [("mmlu:subject=anatomy", "a")])
    metrics = {"EM": {"metric": "exact_match"}}

    def scaled(number: int) -> int:
        return max(1, round(number * scale))

    for setting in ("questions", "max_eval_instances"):
        scenario = ScenarioConfig(run_entries=file, metrics=metrics, **{setting: now})
        number = raised(scenario, 1e9, scale)
        assert scaled(number) >= 1e9 * scaled(now) > scaled(number - 1)


def test_a_way_of_more_than_a_million_questions_is_named_and_not_proposed() -> None:
    close = made_up(difference=1e-5)
    allowed = largest_error(close.difference, 0.05, 0.8)
    assert ways(close, allowed, None) == []
    said = limits(close, allowed)[-1]
    assert said.startswith("One way is not proposed, for more than 1,000,000 questions more of a scenario: ")
    assert int(said.split("+")[1].rstrip(".").replace(",", "")) > 1e9
    less_close = made_up(difference=0.01)
    allowed = largest_error(less_close.difference, 0.05, 0.8)
    assert ways(less_close, allowed, None)
    assert not any("not proposed" in one for one in limits(less_close, allowed))


def test_of_seeds_and_too_many_questions_seeds_are_proposed() -> None:
    parts = made_up(
        difference=0.01,
        of_questions=np.array([1e-9, 1e-9]),
        training=np.array([1.28e-5, 0]),
        questions=np.full(2, 1e4),
    )
    allowed = parts.trained(1) ** 0.5 * (1 + 1e-9)
    prices = priced(1.0, 1.0)
    assert [way.kind for way in ways(parts, allowed, prices)] == ["seeds"]
    assert any("not proposed" in one for one in limits(parts, allowed, prices))
