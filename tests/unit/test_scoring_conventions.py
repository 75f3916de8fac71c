"""Win rates of one column under each named convention."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from palio.scoring.conventions import CONVENTIONS, Missing, column_win_rates

NAN = float("nan")
# few different values, so that ties are common
COLUMNS = hnp.arrays(float, st.integers(1, 12), elements=st.integers(-3, 3).map(float))
GAPS = st.sampled_from([-1.0, 0.0, 0.5, 2.0, NAN])


def win_rates(
    values: list[float], name: str, higher_is_better: bool = True, missing: Missing = "worst"
) -> list[float]:
    rates = column_win_rates(np.array(values), higher_is_better, CONVENTIONS[name], missing)
    return [float(rate) for rate in rates]


def test_midrank_shares_ties() -> None:
    assert win_rates([1, 2, 2, 3], "midrank") == [0, 0.5, 0.5, 1]


def test_helm2023_breaks_ties_by_the_alphabet_the_later_id_wins() -> None:
    assert win_rates([2, 2, 1], "helm2023") == [0.5, 1, 0]


def test_helm2023_reverses_the_whole_order_where_lower_is_better() -> None:
    assert win_rates([2, 2, 1], "helm2023", higher_is_better=False) == [0.5, 0, 1]


def test_hidden2023_divides_by_n_and_gives_a_tie_k_minus_1_over_k() -> None:
    assert win_rates([1, 2, 2, 3], "hidden2023") == [0, (1 + 1 / 2) / 4, (1 + 1 / 2) / 4, 3 / 4]
    assert win_rates([5, 5, 5], "hidden2023") == pytest.approx([2 / 9] * 3)


def test_final2023_gives_a_tie_1_over_k() -> None:
    assert win_rates([5, 5, 5], "final2023") == pytest.approx([1 / 9] * 3)
    assert win_rates([1, 2], "final2023") == [0, 0.5]


def test_the_2023_conventions_count_a_missing_value_as_zero_or_one() -> None:
    assert win_rates([NAN, 0.0, 0.3], "helm2023") == win_rates([0.0, 0.0, 0.3], "helm2023")
    assert win_rates([NAN, 0.9, 0.3], "hidden2023", False) == win_rates([1.0, 0.9, 0.3], "hidden2023", False)


def test_a_missing_value_loses_to_every_other_under_worst() -> None:
    assert win_rates([NAN, -5, 0], "midrank") == [0, 0.5, 1]
    assert win_rates([NAN, 100, 0], "midrank", higher_is_better=False) == [0, 0.5, 1]


def test_missing_values_tie_with_each_other_under_worst() -> None:
    assert win_rates([NAN, NAN, 0], "midrank") == [0.25, 0.25, 1]
    assert win_rates([NAN, NAN], "midrank") == [0.5, 0.5]


def test_exclude_compares_only_entries_that_have_a_value() -> None:
    assert win_rates([NAN, 1, 2], "midrank", missing="exclude") == pytest.approx([NAN, 0, 1], nan_ok=True)
    assert win_rates([NAN, 1], "midrank", missing="exclude") == pytest.approx([NAN, 0.5], nan_ok=True)
    assert np.isnan(win_rates([NAN, NAN], "midrank", missing="exclude")).all()


def test_one_entry_has_a_win_rate_of_one_half() -> None:
    assert win_rates([0.7], "midrank") == [0.5]


def test_midrank_ties_values_that_differ_only_by_the_order_of_additions() -> None:
    assert win_rates([(0.1 + 0.2) / 2, 0.15, 0.1], "midrank") == [0.75, 0.75, 0]
    assert win_rates([0.0, 1e-300, 1.0], "midrank") == [0, 0.5, 1]


def test_all_tied_is_one_half_for_everybody() -> None:
    assert win_rates([3.0] * 7, "midrank") == [0.5] * 7


@given(COLUMNS, st.booleans())
def test_midrank_of_a_column_averages_one_half(values: np.ndarray, higher: bool) -> None:
    assert np.mean(win_rates(list(values), "midrank", higher)) == pytest.approx(0.5)


@given(COLUMNS, st.booleans(), st.sampled_from(sorted(CONVENTIONS)))
def test_a_monotone_scaling_changes_no_win_rate(values: np.ndarray, higher: bool, name: str) -> None:
    scaled = [float(np.exp(value) * 7 - 2) for value in values]
    assert win_rates(scaled, name, higher) == win_rates(list(values), name, higher)


@given(COLUMNS, st.booleans(), st.sampled_from(["midrank", "hidden2023", "final2023"]))
def test_equal_values_get_equal_win_rates(values: np.ndarray, higher: bool, name: str) -> None:
    rates: dict[float, set[float]] = {}
    for value, rate in zip(values, win_rates(list(values), name, higher), strict=True):
        rates.setdefault(float(value), set()).add(rate)
    assert all(len(of_value) == 1 for of_value in rates.values())


@given(COLUMNS, st.booleans())
def test_midrank_counts_wins_and_half_ties_against_each_rival(values: np.ndarray, higher: bool) -> None:
    n = len(values)
    sign = 1 if higher else -1
    for place, rate in enumerate(win_rates(list(values), "midrank", higher)):
        rivals = [sign * values[other] for other in range(n) if other != place]
        own = sign * values[place]
        wins = sum((own > rival) + 0.5 * (own == rival) for rival in rivals)
        assert rate == pytest.approx(wins / len(rivals) if rivals else 0.5)


@given(
    hnp.arrays(float, st.tuples(st.integers(1, 4), st.integers(1, 6)), elements=GAPS),
    st.booleans(),
    st.sampled_from(sorted(CONVENTIONS)),
    st.sampled_from(["worst", "exclude"]),
)
def test_a_batch_of_columns_gives_what_each_gives_alone(
    values: np.ndarray, higher: bool, name: str, missing: Missing
) -> None:
    batch = column_win_rates(values, higher, CONVENTIONS[name], missing)
    for row, rates in zip(values, batch, strict=True):
        np.testing.assert_array_equal(rates, column_win_rates(row, higher, CONVENTIONS[name], missing))


@given(COLUMNS, st.booleans(), st.sampled_from(sorted(CONVENTIONS)))
def test_win_rates_lie_between_0_and_1(values: np.ndarray, higher: bool, name: str) -> None:
    assert all(0 <= rate <= 1 for rate in win_rates(list(values), name, higher))
