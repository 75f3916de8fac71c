"""Open against closed: did open scores predict closed ones, and who trained on evaluation instances."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import pandas as pd
from scipy.special import ndtri

from palio.records import (
    Contamination,
    ContaminationCount,
    Correlation,
    FallShares,
    Leaderboard,
    Overfitting,
    OverfittingEntry,
    Uncertainty,
)
from palio.scoring.fall import falls
from palio.scoring.robustness import rank_by_entry
from palio.scoring.uncertainty import LEVEL, Draws

MIN_ENTRIES = 4
"""Fewer have no interval: its standard error divides by the root of n - 3."""


def overfitting(
    board: Leaderboard,
    uncertainty: Uncertainty | None,
    contamination: Mapping[str, Contamination | str],
    drawn: Draws | None = None,
) -> Overfitting | None:
    """Compare open with closed, per entry and over the track; None without entries or with one stage only.

    Args:
        contamination: by entry id its report, or why there is none.
        drawn: the draws behind `uncertainty`; without them no fall is taken apart.
    """
    if not board.entries or not {"open", "closed"} <= set(board.stage_weights):
        return None
    open_scores = {scored.entry: scored.stage_scores["open"] for scored in board.entries}
    closed_scores = {scored.entry: scored.stage_scores["closed"] for scored in board.entries}
    open_ranks, closed_ranks = rank_by_entry(open_scores), rank_by_entry(closed_scores)
    intervals = {entry.entry: entry.stage_scores for entry in uncertainty.entries} if uncertainty else {}
    apart, shares = falls(board, drawn, contamination) if drawn else ([], None)
    entries = []
    for place, (name, open_score) in enumerate(open_scores.items()):
        report = contamination.get(name, "no contamination report")
        entries.append(
            OverfittingEntry(
                entry=name,
                open_score=open_score,
                closed_score=closed_scores[name],
                open_interval=intervals[name]["open"] if intervals else None,
                closed_interval=intervals[name]["closed"] if intervals else None,
                open_rank=open_ranks[name],
                closed_rank=closed_ranks[name],
                rank_drop=closed_ranks[name] - open_ranks[name],
                contamination=None if isinstance(report, str) else _contamination_counts(report),
                contamination_reason=report if isinstance(report, str) else "",
                fall=apart[place] if apart else None,
            )
        )
    x, y = list(open_scores.values()), list(closed_scores.values())
    rank_correlation = spearman(x, y)
    return Overfitting(
        entries=entries,
        pearson=pearson(x, y),
        spearman=rank_correlation,
        shares=shares,
        text=" ".join([_text(entries, rank_correlation), *_in_words(entries, shares, drawn)]),
    )


def _in_words(
    entries: Sequence[OverfittingEntry], shares: FallShares | None, drawn: Draws | None
) -> Iterator[str]:
    """Say what the falls are made of, and what cannot be known here."""
    if shares is None or drawn is None:
        return
    covered = "questions and training" if drawn.effects else "questions alone"
    yield (
        f"Of the variance of the falls between entries, {shares.noise:.0%} is what the noise of {covered} "
        f"makes, {shares.contamination:.0%} goes with known contamination, {shares.rest:.0%} is neither."
    )
    unknown = sum(entry.fall is not None and entry.fall.contamination is None for entry in entries)
    if unknown:
        yield (
            f"The contamination of {unknown} of {len(entries)} entries is not known: it is part of the rest."
        )
    if all(answers is None for answers in drawn.usable.columns):
        yield (
            "Without instance values, questions are drawn for every entry on its own, so their noise is "
            "overstated where entries answer the same ones, and no question can be left out."
        )


def without_closed_counts(overfitting: Overfitting) -> Overfitting:
    """Leave out how many closed questions are in the entries' training data."""
    entries = [
        entry.model_copy(update={"contamination": {"open": entry.contamination["open"]}})
        if entry.contamination
        else entry
        for entry in overfitting.entries
    ]
    return overfitting.model_copy(update={"entries": entries, "text": _text(entries, overfitting.spearman)})


def _contamination_counts(report: Contamination) -> dict[str, ContaminationCount]:
    return {
        stage: ContaminationCount(
            instances=sum(instances.values()),
            contaminated=sum(report.contaminated[stage].values()),
            by_scenario=dict(report.contaminated[stage]),
        )
        for stage, instances in report.instances.items()
    }


def pearson(x: Sequence[float], y: Sequence[float]) -> Correlation:
    """Return Pearson's correlation with the interval of Fisher's z, standard error 1/sqrt(n - 3)."""
    return _correlation(x, y, lambda value, n: 1 / math.sqrt(n - 3))


def spearman(x: Sequence[float], y: Sequence[float]) -> Correlation:
    """Return Pearson's correlation of the mid-ranks.

    Interval by Fisher's z with the standard error of Bonett and Wright (2000), sqrt((1 + r^2/2)/(n - 3)).
    """
    return _correlation(
        pd.Series(x).rank().to_list(),
        pd.Series(y).rank().to_list(),
        lambda value, n: math.sqrt((1 + value**2 / 2) / (n - 3)),
    )


def _correlation(
    x: Sequence[float], y: Sequence[float], standard_error: Callable[[float, int], float]
) -> Correlation:
    n = len(x)
    reason = ""
    if n < MIN_ENTRIES:
        reason = f"{n} entries; a correlation with an interval needs at least {MIN_ENTRIES}"
    elif np.ptp(x) == 0 or np.ptp(y) == 0:
        reason = "all entries have the same score in one of the stages"
    if reason:
        return Correlation(value=None, low=None, high=None, n=n, reason=reason)
    value = float(np.clip(np.corrcoef(x, y)[0, 1], -1, 1))
    if abs(value) == 1:
        return Correlation(value=value, low=value, high=value, n=n)
    z, margin = math.atanh(value), float(ndtri((1 + LEVEL) / 2)) * standard_error(value, n)
    return Correlation(value=value, low=math.tanh(z - margin), high=math.tanh(z + margin), n=n)


def _text(entries: Sequence[OverfittingEntry], correlation: Correlation) -> str:
    if correlation.low is None or correlation.high is None:
        text = f"Open and closed scores cannot be compared: {correlation.reason}."
    elif correlation.low <= 0 <= correlation.high:
        text = f"Open scores do not predict closed scores (Spearman {correlation})."
    else:
        tendency = "well" if correlation.low > 0 else "badly"
        text = (
            f"Entries that did well on the open stage tended to do {tendency} on the closed one "
            f"(Spearman {correlation})."
        )
    largest = max(entries, key=lambda entry: entry.rank_drop)
    if largest.rank_drop > 0:
        text += (
            f" The largest drop is {largest.entry}'s: rank {largest.open_rank} on open, "
            f"{largest.closed_rank} on closed."
        )
    contaminated = [
        entry.entry
        for entry in entries
        if entry.contamination and any(count.contaminated for count in entry.contamination.values())
    ]
    if contaminated:
        text += f" Training data of {', '.join(contaminated)} contains evaluation instances."
    return text
