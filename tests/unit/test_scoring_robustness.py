"""What a ranking depends on: pool, scenarios, scoring rule."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from palio.neurips2023.tables import published_leaderboards
from palio.records import Cell, Column, Leaderboard, Robustness
from palio.scoring.analysis import analyze
from palio.scoring.leaderboard import Candidate, score
from palio.scoring.pool import formula_of, pool_of
from palio.scoring.robustness import against_panel, bradley_terry, moves, robustness
from palio.scoring.tables import analysis_markdown
from palio.scoring.uncertainty import ScenarioAnswers, usable_answers
from palio.scoring.views import discrimination, performance_profile, weighted_values

FOLDER = Path(os.environ.get("PALIO_SHARED", Path(__file__).parents[3] / "shared")) / "neurips2023"
COLUMNS = [
    Column(stage="open", scenario="mmlu", metric="EM"),
    Column(stage="open", scenario="bbq", metric="EM"),
    Column(stage="closed", scenario="math", metric="EM"),
]


def board_of(rows: dict[str, list[float]], **settings: Any) -> Leaderboard:
    return score(
        competition="c",
        track="t",
        columns=COLUMNS,
        candidates=[
            Candidate(name, name.partition("_")[0], [Cell(value=value, n=10) for value in values])
            for name, values in rows.items()
        ],
        stage_weights={"open": 1 / 3, "closed": 2 / 3},
        **settings,
    )


def robustness_of(board: Leaderboard, **settings: Any) -> Robustness:
    found = robustness(board, **settings)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def final_2023() -> Leaderboard:
    if not FOLDER.is_dir():
        pytest.skip(f"the published tables are not at {FOLDER}; set PALIO_SHARED")
    return next(board for board in published_leaderboards(FOLDER) if board.track == "4090_final")


def test_6_of_8_removals_reorder_the_rest_of_the_published_4090_final(final_2023: Leaderboard) -> None:
    removals = robustness_of(final_2023).without_entry
    assert (sum(bool(one.moved) for one in removals), len(removals)) == (6, 8)


def test_the_analysis_of_2023_reads_as_tables(final_2023: Leaderboard) -> None:
    text = analysis_markdown(final_2023, analyze(final_2023, replicates=50))
    assert "## Without one entry: 6 of 8 removals reorder the rest" in text
    assert "| entry | final2023/geometric |" in text
    assert "midrank/geometric" in text
    assert "| akjindal53244_neurips_submission_submission_2 | nobody |" in text


def test_a_floor_or_an_arithmetic_mean_changes_the_second_place_of_2023(final_2023: Leaderboard) -> None:
    second = final_2023.entries[1].entry
    schemes = {scheme.name: scheme for scheme in robustness_of(final_2023).schemes}
    assert schemes["final2023/geometric"].ranks[second] == 2
    assert schemes["midrank/geometric"].ranks[second] == 2
    assert schemes["final2023/floored"].ranks[second] != 2
    assert schemes["final2023/arithmetic"].ranks[second] != 2


def test_the_verdict_of_2023_says_the_first_place_stands_and_the_third_does_not(
    final_2023: Leaderboard,
) -> None:
    first, _, third = robustness_of(final_2023).verdicts
    assert first.stable
    assert "same whichever other entry is left out" in first.text
    assert not third.stable
    assert third.depends_on_entries
    assert f"without {third.depends_on_entries[0]}" in third.text


def test_a_place_that_depends_on_one_entry_names_it() -> None:
    """a beats b on mmlu only because c stands between them there."""
    board = board_of(
        {"a": [0.9, 0.1, 0.5], "b": [0.1, 0.9, 0.51], "c": [0.5, 0.95, 0.1], "d": [0.0, 0.0, 0.0]}
    )
    found = robustness_of(board)
    for verdict in found.verdicts:
        told = [
            one.removed for one in found.without_entry if any(m.entry == verdict.entry for m in one.moved)
        ]
        assert verdict.depends_on_entries == told
        assert verdict.stable == (
            not told and not verdict.depends_on_scenarios and not verdict.depends_on_schemes
        )


def test_an_unbeaten_entry_is_first_whatever_is_left_out_and_however_it_is_scored() -> None:
    board = board_of({"a": [0.9, 0.9, 0.9], "b": [0.5, 0.1, 0.5], "c": [0.1, 0.5, 0.3]})
    first = robustness_of(board).verdicts[0]
    assert (first.entry, first.stable) == ("a", True)
    assert "No single scenario decides it." in first.text


def test_moves_compare_ranks_among_the_entries_of_both_rankings() -> None:
    assert moves({"a": 3, "b": 2, "c": 1}, {"b": 2, "c": 1}) == []
    (b, c) = moves({"a": 3, "b": 2, "c": 1}, {"b": 1, "c": 2})
    assert (b.entry, b.before, b.after) == ("b", 1, 2)
    assert (c.entry, c.before, c.after) == ("c", 2, 1)


VALUES = st.lists(st.integers(0, 3).map(float), min_size=3, max_size=3)


@given(st.lists(VALUES, min_size=3, max_size=6), VALUES)
def test_an_entry_outside_the_panel_changes_nobody_s_score_against_it(
    rows: list[list[float]], newcomer: list[float]
) -> None:
    entries = {f"e{number}": row for number, row in enumerate(rows)}
    panel = ["e0", "e1"]
    before, after = board_of(entries), board_of({**entries, "new": newcomer})
    scores_before = against_panel(pool_of(before), formula_of(before), panel)
    scores_after = against_panel(pool_of(after), formula_of(after), panel)
    assert {name: scores_after[name] for name in scores_before} == pytest.approx(scores_before)


@given(st.lists(VALUES, min_size=2, max_size=6, unique_by=tuple))
def test_bradley_terry_ranks_a_dominating_entry_above(rows: list[list[float]]) -> None:
    entries = {f"e{number}": row for number, row in enumerate(rows)}
    entries["best"] = [4.0, 4.0, 4.0]
    board = board_of(entries)
    strengths = bradley_terry(pool_of(board), formula_of(board))
    assert max(strengths, key=strengths.__getitem__) == "best"
    assert sum(strengths.values()) == pytest.approx(0, abs=1e-6)


def test_bradley_terry_of_two_is_the_log_of_their_odds() -> None:
    """a wins both open columns (1/3 of the weight), b the closed one (2/3); 0.005 is the virtual tie."""
    board = board_of({"a": [1, 1, 0], "b": [0, 0, 1]})
    strengths = bradley_terry(pool_of(board), formula_of(board))
    odds = (2 / 3 + 0.005) / (1 / 3 + 0.005)
    assert pytest.approx(odds) == pytest.approx(
        2.7182818284590452 ** (strengths["b"] - strengths["a"]), rel=1e-6
    )


def test_one_entry_per_team_drops_a_team_s_other_entries() -> None:
    board = board_of({"x_1": [0.9, 0.9, 0.9], "x_2": [0.8, 0.8, 0.8], "y_1": [0.1, 0.1, 0.1]})
    scheme = next(one for one in robustness_of(board).schemes if one.name == "one_per_team")
    assert scheme.ranks == {"x_1": 1, "y_1": 2}


def test_a_given_panel_is_the_one_used() -> None:
    board = board_of({"a": [0.9, 0.9, 0.9], "b": [0.5, 0.1, 0.5], "c": [0.1, 0.5, 0.3]})
    scheme = next(one for one in robustness_of(board, panel=["c"]).schemes if one.name == "reference_panel")
    assert "these entries only: c;" in scheme.description


def test_the_leaderboard_s_own_scheme_comes_first_and_moves_nobody() -> None:
    board = board_of({"a": [0.9, 0.2, 0.9], "b": [0.5, 0.1, 0.5]}, convention="final2023")
    own = robustness_of(board).schemes[0]
    assert (own.name, own.moved) == ("final2023/geometric", [])


def test_one_entry_alone_has_nothing_to_remove() -> None:
    found = robustness_of(board_of({"a": [0.9, 0.2, 0.9]}))
    assert found.without_entry == []
    assert found.verdicts[0].stable


# --- views -----------------------------------------------------------------------------------------------


def test_a_performance_profile_is_how_often_an_entry_is_within_a_factor_of_the_best() -> None:
    """The best is within every factor, half the best within 2 to 4, a quarter within none below 4."""
    board = board_of({"best": [0.8, 0.4, 1.0], "half": [0.4, 0.2, 0.5], "quarter": [0.2, 0.1, 0.25]})
    pool = pool_of(board)
    profile = performance_profile(pool, formula_of(board), np.array([0.2, 0.3, 0.5]))
    assert profile is not None
    assert dict(zip(pool.entries, profile.tolist(), strict=True)) == pytest.approx(
        {"best": 1, "half": 2 / 3, "quarter": 0}
    )


def test_of_a_share_of_which_less_is_better_a_profile_takes_the_rest_and_of_other_values_nothing() -> None:
    bias = Column(stage="open", scenario="bbq", metric="bias", higher_is_better=False)
    logit = Column(stage="closed", scenario="math", metric="logit")
    board = score(
        competition="c",
        track="t",
        columns=[bias, logit],
        candidates=[
            Candidate("fair", "f", [Cell(value=0.2, n=10), Cell(value=-3, n=10)]),
            Candidate("biased", "b", [Cell(value=0.6, n=10), Cell(value=5, n=10)]),
        ],
        stage_weights={"open": 1 / 3, "closed": 2 / 3},
    )
    profile = performance_profile(pool_of(board), formula_of(board), np.array([0.5, 0.5]))
    assert profile is not None
    assert profile.tolist() == pytest.approx([2 / 3, 1])  # biased, fair


def test_questions_that_tell_nothing_about_the_entries_weigh_nothing() -> None:
    skill = np.linspace(0, 1, 12)
    telling = np.stack([(skill > at).astype(float) for at in (0.2, 0.4, 0.6, 0.8)], axis=1)
    all_right, upside_down = np.ones((12, 1)), 1 - telling[:, [1]]
    answers = np.hstack([telling, all_right, upside_down])
    told = discrimination(answers, np.ones(answers.shape, dtype=bool))
    assert (told[:4] > 0.5).all()
    assert told[4:].tolist() == [0, 0]
    values = weighted_values(answers.astype(np.float32), np.zeros(6, dtype=np.int64))
    assert values[0] == 0
    assert values[-1] == 1
    assert (np.diff(values) >= 0).all()


def test_views_are_beside_the_scoring_rules_and_no_verdict_counts_them() -> None:
    draw = np.random.default_rng(0)
    skill = np.linspace(0.2, 0.8, 12)
    answers = {column: (draw.random((12, 60)) < skill[:, None]).astype(np.float32) for column in range(3)}
    rows = {f"e{row:02}": [float(answers[column][row].mean()) for column in range(3)] for row in range(12)}
    board = board_of(rows)
    runs = np.zeros(60, dtype=np.int64)
    by_scenario = {
        column.scenario_key: ScenarioAnswers(runs, [answers[place]]) for place, column in enumerate(COLUMNS)
    }
    found = robustness_of(board, usable=usable_answers(pool_of(board), by_scenario))
    assert [view.name for view in found.views] == ["performance_profile", "item_response"]
    assert found.views[1].scores != {scored.entry: scored.final_score for scored in board.entries}
    assert found.verdicts == robustness_of(board).verdicts
    text = analysis_markdown(board, analyze(board, by_scenario, replicates=20))
    assert "- `item_response`: a view only, which no verdict counts; questions weigh by" in text


def test_of_a_few_entries_questions_are_not_weighed() -> None:
    board = board_of({"a": [0.5, 0.5, 0.5], "b": [0.4, 0.4, 0.4]})
    usable = usable_answers(pool_of(board), {})
    assert [view.name for view in robustness_of(board, usable=usable).views] == ["performance_profile"]
