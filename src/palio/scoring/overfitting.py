"""Whether the open stage told who would do well on the closed one, and who had seen the questions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy import stats

from palio.records import (
    Contamination,
    ContaminationCount,
    Correlation,
    Leaderboard,
    Overfitting,
    OverfittingEntry,
    Uncertainty,
)
from palio.scoring.robustness import rank_by_entry
from palio.scoring.uncertainty import LEVEL

FEWEST = 4
"""Fewer entries have no interval: its standard error divides by the root of n - 3."""


def overfitting(
    board: Leaderboard,
    sureness: Uncertainty | None,
    contamination: Mapping[str, Contamination | str],
) -> Overfitting | None:
    """Open against closed, per entry and over the track; None without entries or with one stage only.

    Args:
        contamination: by entry its report, or why there is none.
    """
    if not board.entries or not {"open", "closed"} <= set(board.stage_weights):
        return None
    score = {
        stage: {one.entry: one.stage_scores[stage] for one in board.entries} for stage in ("open", "closed")
    }
    rank = {stage: rank_by_entry(of) for stage, of in score.items()}
    intervals = {one.entry: one.stage_scores for one in sureness.entries} if sureness else {}
    entries = []
    for one in board.entries:
        report = contamination.get(one.entry, "no contamination report")
        entries.append(
            OverfittingEntry(
                entry=one.entry,
                open_score=score["open"][one.entry],
                closed_score=score["closed"][one.entry],
                open_interval=intervals[one.entry]["open"] if intervals else None,
                closed_interval=intervals[one.entry]["closed"] if intervals else None,
                open_rank=rank["open"][one.entry],
                closed_rank=rank["closed"][one.entry],
                rank_drop=rank["closed"][one.entry] - rank["open"][one.entry],
                contamination=None if isinstance(report, str) else contamination_counts(report),
                contamination_reason=report if isinstance(report, str) else "",
            )
        )
    open_scores = [one.open_score for one in entries]
    closed_scores = [one.closed_score for one in entries]
    pearson_found, spearman_found = pearson(open_scores, closed_scores), spearman(open_scores, closed_scores)
    return Overfitting(
        entries=entries,
        pearson=pearson_found,
        spearman=spearman_found,
        text=_text(entries, spearman_found),
    )


def contamination_counts(report: Contamination) -> dict[str, ContaminationCount]:
    return {
        stage: ContaminationCount(
            instances=sum(instances.values()),
            contaminated=sum(report.contaminated[stage].values()),
            by_scenario=dict(report.contaminated[stage]),
        )
        for stage, instances in report.instances.items()
    }


def pearson(x: Sequence[float], y: Sequence[float]) -> Correlation:
    """With the interval of Fisher's z, standard error 1/sqrt(n - 3)."""
    return _correlation(x, y, lambda value, n: 1 / math.sqrt(n - 3))


def spearman(x: Sequence[float], y: Sequence[float]) -> Correlation:
    """Pearson's of the mid-ranks, with Bonett and Wright's standard error sqrt((1 + r^2/2)/(n - 3))."""
    return _correlation(
        stats.rankdata(x), stats.rankdata(y), lambda value, n: math.sqrt((1 + value**2 / 2) / (n - 3))
    )


def _correlation(
    x: Sequence[float], y: Sequence[float], standard_error: Callable[[float, int], float]
) -> Correlation:
    n = len(x)
    if n < FEWEST:
        reason = f"{n} entries; a correlation with an interval needs at least {FEWEST}"
        return Correlation(value=None, low=None, high=None, n=n, reason=reason)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        reason = "all entries have the same score in one of the stages"
        return Correlation(value=None, low=None, high=None, n=n, reason=reason)
    value = float(np.clip(np.corrcoef(x, y)[0, 1], -1, 1))
    if abs(value) == 1:
        return Correlation(value=value, low=value, high=value, n=n)
    z, spread = math.atanh(value), float(stats.norm.ppf((1 + LEVEL) / 2)) * standard_error(value, n)
    return Correlation(value=value, low=math.tanh(z - spread), high=math.tanh(z + spread), n=n)


def _text(entries: Sequence[OverfittingEntry], correlation: Correlation) -> str:
    if correlation.value is None or correlation.low is None or correlation.high is None:
        first = f"Whether open and closed scores agree cannot be said: {correlation.reason}."
    else:
        figures = f"Spearman {correlation}"
        if correlation.low > 0:
            first = (
                f"Entries that did well on the open stage tended to do well on the closed one ({figures})."
            )
        elif correlation.high < 0:
            first = (
                f"Entries that did well on the open stage tended to do badly on the closed one ({figures})."
            )
        else:
            first = f"The open stage does not tell who does well on the closed one ({figures})."
    fallen = max(entries, key=lambda one: one.rank_drop)
    if fallen.rank_drop > 0:
        first += (
            f" The largest fall is {fallen.entry}'s: rank {fallen.open_rank} on open, "
            f"{fallen.closed_rank} on closed."
        )
    seen = [
        one.entry
        for one in entries
        if one.contamination and any(of.contaminated for of in one.contamination.values())
    ]
    if seen:
        first += f" Training data of {', '.join(seen)} contains evaluation instances."
    return first
