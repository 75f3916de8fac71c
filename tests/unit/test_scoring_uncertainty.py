"""Intervals of scores and ranks: what is drawn, and what the draws say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palio.records import Cell, Column, Leaderboard
from palio.scoring.leaderboard import Candidate, score
from palio.scoring.uncertainty import (
    AnswersByScenario,
    ScenarioAnswers,
    draw_questions,
    resampled_values,
    uncertainty,
)

OPEN = Column(stage="open", scenario="mmlu", metric="EM")
CLOSED = Column(stage="closed", scenario="math", metric="EM")
ONE_RUN = 40
SEED = np.random.SeedSequence(0)


def board_and_answers(
    right: dict[str, np.ndarray], runs: np.ndarray | None = None
) -> tuple[Leaderboard, AnswersByScenario]:
    """Entries with the same answers (0 or 1 per question) in the open and the closed column."""
    names = sorted(right)
    answers = np.stack([right[name] for name in names]).astype(np.float32)
    of_runs = np.zeros(answers.shape[1], dtype=np.int64) if runs is None else runs
    run_means = [answers[:, of_runs == run].mean(axis=1) for run in np.unique(of_runs)]
    values = np.mean(run_means, axis=0)
    board = score(
        competition="c",
        track="t",
        columns=[OPEN, CLOSED],
        candidates=[
            Candidate(name, name, [Cell(value=float(value), n=answers.shape[1])] * 2)
            for name, value in zip(names, values, strict=True)
        ],
        stage_weights={"open": 1 / 3, "closed": 2 / 3},
    )
    scenario = ScenarioAnswers(of_runs, [answers])
    return board, {("open", "mmlu"): scenario, ("closed", "math"): scenario}


def first(count: int, of: int = ONE_RUN) -> np.ndarray:
    return (np.arange(of) < count).astype(float)


def draws_of_one_column(right: np.ndarray, runs: np.ndarray) -> np.ndarray:
    """4000 draws of one entry's value."""
    answers = right[None, :].astype(np.float32)
    return resampled_values(answers, runs, draw_questions(ScenarioAnswers(runs, [answers]), 4000, SEED))


def test_a_clear_winner_is_first_in_every_replicate() -> None:
    found = uncertainty(*board_and_answers({"best": first(38), "mid": first(20), "last": first(2)}))
    assert found is not None
    assert [one.entry for one in found.entries] == ["best", "mid", "last"]
    assert [one.p_first for one in found.entries] == [1, 0, 0]
    assert [(one.rank.low, one.rank.high) for one in found.entries] == [(1, 1), (2, 2), (3, 3)]
    assert found.groups == [["best"], ["mid"], ["last"]]
    assert found.separation is not None
    assert found.separation.separated


def test_entries_with_the_same_answers_are_one_group_and_never_differ() -> None:
    found = uncertainty(*board_and_answers({"a": first(20), "b": first(20), "c": first(1)}))
    assert found is not None
    assert found.groups == [["a", "b"], ["c"]]
    assert found.entries[0].p_above_next == 0.5
    assert found.separation is not None
    assert (found.separation.difference.low, found.separation.difference.high) == (0, 0)
    assert found.separation.instances_needed is None


def test_pairing_sees_a_small_but_constant_lead_that_independent_draws_would_not() -> None:
    """b answers what a answers and six questions more: it is never behind, whichever are drawn."""
    board, answers = board_and_answers({"a": first(20), "b": first(26)})
    paired, alone = uncertainty(board, answers), uncertainty(board, {})
    assert paired is not None
    assert alone is not None
    assert paired.entries[0].p_first > 0.99
    assert alone.entries[0].p_first < 0.95


@pytest.mark.parametrize("more", range(1, 8))
def test_who_cannot_be_told_apart_needs_no_fewer_questions_than_there_are(more: int) -> None:
    found = uncertainty(*board_and_answers({"a": 1 - first(20), "b": first(20 + more)}))
    assert found is not None
    assert found.separation is not None
    needed = found.separation.instances_needed
    assert needed is None or (needed < found.separation.instances) == found.separation.separated


def test_two_entries_that_answer_different_questions_are_not_told_apart() -> None:
    found = uncertainty(*board_and_answers({"a": first(21), "b": 1 - first(21)}))
    assert found is not None
    assert found.groups == [["a", "b"]]
    assert found.separation is not None
    assert not found.separation.separated
    assert found.separation.instances_needed is not None
    assert found.separation.instances_needed > found.separation.instances == 2 * ONE_RUN


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.lists(st.booleans(), min_size=12, max_size=12), min_size=2, max_size=5), st.integers(0, 10**6)
)
def test_names_and_order_of_entries_change_no_interval(rows: list[list[bool]], seed: int) -> None:
    right = {f"entry{number}": np.array(row, dtype=float) for number, row in enumerate(rows)}
    renamed = {f"x{len(rows) - number}": row for number, row in enumerate(right.values())}
    back = {f"x{len(rows) - number}": f"entry{number}" for number in range(len(rows))}
    a = uncertainty(*board_and_answers(right), replicates=50, seed=seed)
    b = uncertainty(*board_and_answers(renamed), replicates=50, seed=seed)
    assert a is not None
    assert b is not None
    told = {one.entry: (one.final_score, one.rank, one.p_first, one.p_top3) for one in a.entries}
    told_b = {back[one.entry]: (one.final_score, one.rank, one.p_first, one.p_top3) for one in b.entries}
    assert told == told_b


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.booleans(), st.integers(0, 10**6))
def test_resampled_values_are_those_of_a_plain_loop(n_runs: int, gaps: bool, seed: int) -> None:
    generator = np.random.default_rng(seed)
    runs = np.arange(30) * n_runs // 30
    answers = generator.random((4, 30)).astype(np.float32)
    if gaps:
        answers[generator.random(answers.shape) < 0.2] = np.nan
    draw = draw_questions(ScenarioAnswers(runs, [answers]), 5, SEED)
    drawn, weights = resampled_values(answers, runs, draw), draw.counts
    for replicate in range(5):
        for entry in range(4):
            means = []
            for run in np.unique(runs):
                total = count = 0.0
                for question in np.flatnonzero(runs == run):
                    if not np.isnan(answers[entry, question]):
                        total += weights[replicate, question] * answers[entry, question]
                        count += weights[replicate, question]
                means.append(total / count if count else np.nan)
            assert drawn[replicate, entry] == pytest.approx(np.mean(means), abs=2e-6, nan_ok=True)


def test_a_column_s_draws_spread_as_theory_says() -> None:
    drawn = draws_of_one_column(first(24), np.zeros(ONE_RUN, dtype=np.int64))
    assert drawn.mean() == pytest.approx(0.6, abs=0.01)
    assert drawn.std() == pytest.approx(np.sqrt(0.6 * 0.4 / ONE_RUN), rel=0.05)


def test_many_runs_are_drawn_whole_so_questions_of_one_source_count_as_one() -> None:
    """20 runs of 10 questions, each answered fully or not at all: 20 facts, not 200."""
    runs = np.repeat(np.arange(20), 10)
    drawn = draws_of_one_column(runs % 2 == 0, runs)
    assert drawn.std() == pytest.approx(np.sqrt(0.25 / 20), rel=0.05)


def test_runs_of_one_question_each_are_drawn_like_any_others() -> None:
    runs = np.arange(20)
    drawn = draws_of_one_column(runs % 2 == 0, runs)
    assert not np.isnan(drawn).any()
    assert drawn.std() == pytest.approx(np.sqrt(0.25 / 20), rel=0.05)


def test_a_column_of_few_of_many_runs_makes_the_scenario_s_instances_be_drawn() -> None:
    """Drawing whole runs would draw the one run of the second column not at all, or unchanged."""
    runs = np.repeat(np.arange(20), 10)
    everywhere = (np.arange(200) % 2 == 0)[None, :].astype(np.float32)
    one_run = np.where(runs == 3, everywhere, np.nan).astype(np.float32)
    draw = draw_questions(ScenarioAnswers(runs, [everywhere, one_run]), 4000, SEED)
    assert not draw.whole_runs
    drawn = resampled_values(one_run, runs, draw)
    assert drawn.std() == pytest.approx(np.sqrt(0.25 / 10), rel=0.05)


def test_a_draw_without_any_value_of_an_entry_leaves_what_was_observed() -> None:
    """Entry b has a value on one question of forty: 36 % of the draws miss it."""
    board, answers = board_and_answers({"a": first(1), "b": first(ONE_RUN)})
    sparse = np.stack([first(1), np.where(first(1) == 1, 1.0, np.nan)]).astype(np.float32)
    scenario = ScenarioAnswers(np.zeros(ONE_RUN, dtype=np.int64), [sparse])
    found = uncertainty(board, dict.fromkeys(answers, scenario))
    assert found is not None
    assert found.method == "bootstrap"
    assert found.entries[0].entry == "b"
    assert found.entries[0].p_first == 1


def test_aggregates_only_is_parametric_and_says_so() -> None:
    board, _ = board_and_answers({"a": first(30), "b": first(10)})
    found = uncertainty(board, {}, remark="Sizes are assumed.")
    assert found is not None
    assert found.method == "parametric"
    assert found.parametric_columns == ["open/mmlu/EM", "closed/math/EM"]
    assert "binomial" in found.explanation
    assert "Sizes are assumed." in found.explanation
    assert found.instances == 0


def test_a_column_whose_instances_do_not_average_to_its_value_is_drawn_parametrically() -> None:
    board, answers = board_and_answers({"a": first(30), "b": first(10)})
    wrong = ScenarioAnswers(np.zeros(ONE_RUN, dtype=np.int64), [np.ones((2, ONE_RUN), dtype=np.float32)])
    found = uncertainty(board, {**answers, ("open", "mmlu"): wrong})
    assert found is not None
    assert (found.method, found.parametric_columns) == ("mixed", ["open/mmlu/EM"])


def test_a_missing_value_stays_missing_in_every_replicate() -> None:
    def candidate(name: str, value: float | None) -> Candidate:
        return Candidate(name, name, [Cell(value=value, n=100), Cell(value=0.5, n=100)])

    settings_: dict[str, Any] = {"columns": [OPEN, CLOSED], "stage_weights": {"open": 1 / 3, "closed": 2 / 3}}
    board = score(
        competition="c", track="t", candidates=[candidate("a", None), candidate("b", 0.01)], **settings_
    )
    found = uncertainty(board, {})
    assert found is not None
    of_a = next(one for one in found.entries if one.entry == "a")
    assert (of_a.stage_scores["open"].low, of_a.stage_scores["open"].high) == (0, 0)


def test_one_entry_and_none_are_documented_states() -> None:
    only = uncertainty(*board_and_answers({"a": first(20)}))
    assert only is not None
    assert (only.entries[0].p_first, only.entries[0].p_above_next, only.separation) == (1, None, None)
    assert only.entries[0].final_score.low == pytest.approx(0.5)
    board, _ = board_and_answers({"a": first(20)})
    assert uncertainty(board.model_copy(update={"entries": []}), {}) is None


def test_the_seed_decides_the_draws() -> None:
    board, answers = board_and_answers({"a": first(21), "b": 1 - first(21)})
    assert uncertainty(board, answers, seed=1) == uncertainty(board, answers, seed=1)
    assert uncertainty(board, answers, seed=1) != uncertainty(board, answers, seed=2)


def test_the_interval_of_a_score_covers_what_other_questions_would_have_given() -> None:
    """Nineteen pools of three entries with known skills: the true score of a large test lies inside
    the interval of a small one nearly always."""
    generator = np.random.default_rng(3)
    inside = total = 0
    for _ in range(19):
        skill = np.sort(generator.uniform(0.3, 0.8, size=3))
        drawn = {
            f"e{number}": (generator.random(ONE_RUN) < p).astype(float) for number, p in enumerate(skill)
        }
        found = uncertainty(*board_and_answers(drawn), replicates=200)
        assert found is not None
        for one in found.entries:
            true_rank = 3 - int(one.entry[1])
            inside += one.rank.low <= true_rank <= one.rank.high
            total += 1
    assert inside / total > 0.9
