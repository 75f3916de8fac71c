"""Equal results are ties, in whatever order HELM's floats were added."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from palio.errors import State
from palio.records import Column, HelmRun, Leaderboard
from palio.records.tables import METRICS_SCHEMA
from palio.scoring.columns import mean_of_runs, stage_cells
from palio.scoring.conventions import CONVENTIONS, column_win_rates
from palio.scoring.formula import ranks
from palio.scoring.leaderboard import Candidate, score
from palio.scoring.pool import formula_of, pool_of
from palio.scoring.robustness import against_panel, bradley_terry
from palio.scoring.uncertainty import uncertainty
from tests.unit.test_scoring_leaderboard import competition

COLUMN = Column(stage="open", scenario="mmlu", metric="EM")


def candidate(name: str, right: list[int], sizes: list[int]) -> Candidate:
    """An entry with so many right answers in HELM runs of these sizes."""
    runs = [
        HelmRun(scenario="mmlu", run=f"mmlu:{number}", state=State.FINISHED, instances=size, answered=size)
        for number, size in enumerate(sizes)
    ]
    where = {"competition": "small", "track": "t", "entry": name, "stage": "open", "scenario": "mmlu"}
    statistic = {"metric": "exact_match", "split": "test", "perturbation": None}
    rows = [
        where | statistic | {"run": run.run, "value": count / run.instances, "n": run.instances}
        for run, count in zip(runs, right, strict=True)
    ]
    table = pa.Table.from_pylist(rows, schema=METRICS_SCHEMA)
    return Candidate(name, name, stage_cells(competition(), "open", runs, table))


def board_of(candidates: list[Candidate], convention: str = "midrank") -> Leaderboard:
    return score(
        competition="small",
        track="t",
        columns=[COLUMN],
        candidates=candidates,
        stage_weights={"open": 1.0},
        convention=convention,
    )


@pytest.fixture
def pair() -> list[Candidate]:
    """Three right of thirty each: as floats the means of the runs' means differ."""
    assert sum([0.1, 0.2, 0.0]) / 3 != sum([0.0, 0.3, 0.0]) / 3
    return [candidate("a", [1, 2, 0], [10, 10, 10]), candidate("b", [0, 3, 0], [10, 10, 10])]


def test_three_right_answers_tie_with_three_others(pair: list[Candidate]) -> None:
    board = board_of(pair)
    assert [scored.cells[0].value for scored in board.entries] == [0.1, 0.1]
    assert [scored.cells[0].win_rate for scored in board.entries] == [0.5, 0.5]
    assert [scored.rank for scored in board.entries] == [1, 1]


def test_a_tie_is_a_tie_for_every_scheme_and_in_every_replicate(pair: list[Candidate]) -> None:
    board = board_of(pair)
    pool, formula = pool_of(board), formula_of(board)
    assert set(bradley_terry(pool, formula).values()) == {0.0}
    assert set(against_panel(pool, formula, ["a", "b"]).values()) == {0.5}
    found = uncertainty(board, {})
    assert found is not None
    assert found.groups == [["a", "b"]]
    assert found.separation is not None
    assert found.separation.instances_needed is None


def test_means_that_are_not_counts_tie_whatever_the_order_of_helm_s_additions() -> None:
    assert (0.1 + 0.2 + 0.3) / 3 != (0.3 + 0.2 + 0.1) / 3
    assert mean_of_runs([((0.1 + 0.2 + 0.3) / 3, 3)]) == mean_of_runs([((0.3 + 0.2 + 0.1) / 3, 3)])


def test_scores_that_differ_only_by_the_order_of_additions_share_a_rank() -> None:
    assert ranks(np.array([0.1 + 0.2 + 0.3, 0.3 + 0.2 + 0.1, 0.5])).tolist() == [1, 1, 3]


@st.composite
def pools(draw: st.DrawFn) -> tuple[list[int], list[list[int]]]:
    """Sizes of HELM runs, and the right answers of every entry in each."""
    sizes = draw(st.lists(st.integers(1, 60), min_size=1, max_size=6))
    right = st.tuples(*(st.integers(0, min(size, 4)) for size in sizes)).map(list)
    return sizes, draw(st.lists(right, min_size=1, max_size=8))


@given(pools(), st.sampled_from(sorted(CONVENTIONS)))
def test_win_rates_are_those_of_exact_fractions(pool: tuple[list[int], list[list[int]]], name: str) -> None:
    sizes, rows = pool
    exact = [sum(Fraction(count, size) for count, size in zip(row, sizes, strict=True)) for row in rows]
    order = sorted(set(exact))
    places = np.array([order.index(value) for value in exact], dtype=float)
    board = board_of([candidate(f"entry{number}", row, sizes) for number, row in enumerate(rows)], name)
    rates = {scored.entry: scored.cells[0].win_rate for scored in board.entries}
    expected = column_win_rates(places, True, CONVENTIONS[name])
    assert [rates[f"entry{number}"] for number in range(len(rows))] == expected.tolist()
