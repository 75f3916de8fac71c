"""From open to closed: how much of an entry's fall is contamination, noise, or neither.

The fall is the open score minus the closed one. Contamination: the open score again on the questions that
are not in the entry's training data, everybody's on the same. Noise: the rest of the fall is a true one plus
that of questions and training, whose variance the draws give; the variance of the true ones between entries
is what is left of the observed variance, by the method of moments, and each fall is shrunk towards the mean
of all (empirical Bayes, Efron and Morris, 1975). What shrinking takes off is the noise that is to be expected
in it: an entry that was selected for a high open score falls back by that much whatever it was trained on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from palio.records import Contamination, Fall, FallShares, Leaderboard
from palio.scoring.conventions import Array
from palio.scoring.formula import scores
from palio.scoring.pool import formula_of
from palio.scoring.uncertainty import Draws, Question, values_without

NO_DATA = "no training data"
"""Why a base model as it is has no contamination report."""
MIN_ENTRIES = 4
"""Fewer say nothing about the variance of true falls."""


def falls(
    board: Leaderboard, drawn: Draws, contamination: Mapping[str, Contamination | str]
) -> tuple[list[Fall], FallShares | None]:
    """Take apart the falls of all entries, in the order of the leaderboard; none with too few entries."""
    if len(board.entries) < MIN_ENTRIES:
        return [], None
    value = drawn.estimate.stages["open"] - drawn.estimate.stages["closed"]
    both = drawn.all.stages["open"] - drawn.all.stages["closed"]
    questions = drawn.questions.stages["open"] - drawn.questions.stages["closed"]
    known = [contaminated_part(board, drawn, index, contamination) for index in range(len(value))]
    left = value - np.array([0.0 if isinstance(part, str) else part for part in known])
    noise = float(np.mean(np.var(both - both.mean(axis=0), axis=1, ddof=1)))
    spread, error = float(np.var(left, ddof=1)), np.var(both, axis=0)
    true = max(0.0, spread - noise)
    expected = left - left.mean()
    expected = expected * np.divide(error, error + true, out=np.zeros(len(error)), where=error + true > 0)
    found = [
        Fall(
            value=float(value[index]),
            standard_error=float(np.sqrt(error[index])),
            of_questions=_share(float(np.var(questions[:, index])), float(error[index]))
            if drawn.effects is not None
            else None,
            contamination=None if isinstance(part, str) else part,
            contamination_reason=part if isinstance(part, str) else "",
            noise=float(expected[index]),
            rest=float(left[index] - expected[index]),
        )
        for index, part in enumerate(known)
    ]
    return found, _shares(float(np.var(value, ddof=1)), spread, noise)


def _share(part: float, total: float) -> float:
    return min(1.0, part / total) if total > 0 else 1.0


def _shares(total: float, without_contamination: float, noise: float) -> FallShares | None:
    if total <= 0:
        return None
    of_noise = min(noise, without_contamination)
    return FallShares(
        contamination=(total - without_contamination) / total,
        noise=of_noise / total,
        rest=(without_contamination - of_noise) / total,
    )


def contaminated_part(
    board: Leaderboard, drawn: Draws, index: int, contamination: Mapping[str, Contamination | str]
) -> float | str:
    """Return what an entry's open score loses on the questions that are not in its training data, or why that
    is not known."""
    report = contamination.get(board.entries[index].entry, "no contamination report")
    if isinstance(report, str):
        return 0.0 if report == NO_DATA else report
    if not any(report.contaminated.get("open", {}).values()):
        return 0.0
    seen = {(run, id_) for run, ids in (report.open_questions or {}).items() for id_ in ids}
    affected = {scenario for scenario, count in report.contaminated["open"].items() if count}
    columns = [
        place
        for place, column in enumerate(drawn.pool.columns)
        if column.stage == "open" and column.scenario in affected
    ]
    if not seen:
        return "its report does not name the questions"
    if any(drawn.usable.columns[place] is None for place in columns):
        return "no instance values"
    values = drawn.pool.values.copy()
    for place in columns:
        values[:, place] = _clean_values(drawn, place, seen)
        if (np.isnan(values[:, place]) & ~np.isnan(drawn.pool.values[:, place])).any():
            return f"no question of {drawn.pool.columns[place].scenario} is left without those in its data"
    clean = scores(drawn.pool.columns, values.T, formula_of(board)).stages["open"]
    own = drawn.pool.entries.index(board.entries[index].entry)
    return float(drawn.estimate.stages["open"][index] - clean[own])


def _clean_values(drawn: Draws, place: int, seen: set[Question]) -> Array:
    """Return a column's values without the questions that were seen; what is missing stays missing."""
    scenario = drawn.usable.scenarios[drawn.pool.columns[place].scenario_key]
    answers, observed = drawn.usable.columns[place], drawn.pool.values[:, place]
    assert answers is not None
    values = values_without(answers, scenario.runs, _marked(scenario.questions, seen))
    return np.where(np.isnan(observed), np.nan, values)


def _marked(questions: Sequence[Question], seen: set[Question]) -> NDArray[np.bool_]:
    return np.array([question in seen for question in questions], dtype=bool)
