"""Sensitivity of a ranking to the pool, the scenarios, and the scoring rule.

Win rates compare an entry with all others, so everybody's score depends on who else takes part. Here every
entry and every scenario is left out once, and the same values are ranked by every convention and aggregate
and by rules that do not use win rates in the pool. Each of the first three places gets a verdict in words.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from palio.records import Leaderboard, PrizeVerdict, RankMove, Removal, Robustness, Scheme
from palio.scoring.conventions import CONVENTIONS, Array, column_win_rates, tie_groups
from palio.scoring.formula import (
    Aggregate,
    Formula,
    arithmetic_mean,
    floored_geometric_mean,
    geometric_mean,
    ranks,
    scores,
    scores_of_win_rates,
)
from palio.scoring.pool import Pool, formula_of, pool_of
from palio.scoring.uncertainty import UsableAnswers
from palio.scoring.views import item_response, performance_profile

PRIZES = 3
PANEL_SIZE = 5
AGGREGATES: dict[str, tuple[Aggregate, str]] = {
    "geometric": (geometric_mean, "geometric mean over scenarios"),
    "floored": (floored_geometric_mean, "geometric mean over scenarios, each at least 1/(2n)"),
    "arithmetic": (arithmetic_mean, "arithmetic mean over scenarios"),
}
ONLY = "a view only, which no verdict counts"
MAX_NAMED = 3
"""Names that a sentence of a verdict lists before it only counts."""
ORDINALS = {1: "1st", 2: "2nd", 3: "3rd"}
VIRTUAL_TIE = 0.01
MAX_STEPS, CONVERGED = 1000, 1e-10
"""Of the iteration for Bradley-Terry strengths: its length, and the change of a log-strength that ends it."""

ScoreByEntry = Mapping[str, float]


def robustness(
    board: Leaderboard, panel: Sequence[str] = (), usable: UsableAnswers | None = None
) -> Robustness | None:
    """Compare the ranking with leave-one-out rankings and other schemes; None without entries.

    Args:
        panel: entry ids of the reference panel; default: entries at evenly spaced ranks.
        usable: instance values, for the view that weighs questions.
    """
    if not board.entries:
        return None
    pool, formula = pool_of(board), formula_of(board)
    ranking = {scored.entry: scored.final_score for scored in board.entries}
    # One entry or one scenario alone leaves nothing to rank.
    without_entry = [
        _removal(name, ranking, final_scores(pool.without(name), formula))
        for name in (ranking if len(ranking) > 1 else ())
    ]
    keys = board.scenario_keys
    without_scenario = [
        _removal("/".join(key), ranking, final_scores(pool.without_scenario(key), formula))
        for key in (keys if len(keys) > 1 else ())
    ]
    schemes = _schemes(board, pool, formula, ranking, panel)
    return Robustness(
        without_entry=without_entry,
        without_scenario=without_scenario,
        schemes=schemes,
        views=_views(pool, formula, ranking, usable),
        verdicts=[
            _verdict(index, board, without_entry, without_scenario, schemes)
            for index in range(min(PRIZES, len(board.entries)))
        ],
    )


def final_scores(pool: Pool, formula: Formula) -> dict[str, float]:
    """Return the final score by entry, without entries that have no value (policy `exclude`)."""
    return _by_entry(pool, scores(pool.columns, pool.values.T, formula).final)


def _by_entry(pool: Pool, final: Array) -> dict[str, float]:
    return {
        entry: float(value) for entry, value in zip(pool.entries, final, strict=True) if not np.isnan(value)
    }


# --- comparing rankings --------------------------------------------------------------------------------


def rank_by_entry(scored: ScoreByEntry) -> dict[str, int]:
    """Return the rank by entry, in the order of the ids."""
    names = sorted(scored)
    rank = ranks(np.array([scored[name] for name in names], dtype=float))
    return {name: int(value) for name, value in zip(names, rank, strict=True)}


def moves(before: ScoreByEntry, after: ScoreByEntry) -> list[RankMove]:
    """Return the entries whose rank among the entries in both rankings differs, by their rank before."""
    both = before.keys() & after.keys()
    old = rank_by_entry({name: before[name] for name in both})
    new = rank_by_entry({name: after[name] for name in both})
    return [
        RankMove(entry=name, before=old[name], after=new[name])
        for name in _order(old)
        if old[name] != new[name]
    ]


def _order(rank: Mapping[str, int]) -> list[str]:
    return sorted(rank, key=lambda name: (rank[name], name))


def _removal(removed: str, ranking: ScoreByEntry, remaining: ScoreByEntry) -> Removal:
    return Removal(removed=removed, order=_order(rank_by_entry(remaining)), moved=moves(ranking, remaining))


# --- schemes -------------------------------------------------------------------------------------------


def _schemes(
    board: Leaderboard, pool: Pool, formula: Formula, ranking: ScoreByEntry, panel: Sequence[str]
) -> list[Scheme]:
    """Return every scheme's ranking, the leaderboard's own first."""
    schemes: list[Scheme] = []

    def add(name: str, description: str, scored: ScoreByEntry) -> None:
        schemes.append(_scheme(name, description, scored, ranking))

    own = (board.convention, "geometric")
    rules = [(convention, aggregate) for convention in CONVENTIONS for aggregate in AGGREGATES]
    for convention, aggregate in sorted(rules, key=lambda rule: rule != own):
        function, words = AGGREGATES[aggregate]
        rule = Formula(CONVENTIONS[convention], formula.missing, formula.stage_weights, function)
        description = f"win rates {CONVENTIONS[convention].formula}; {words}"
        add(f"{convention}/{aggregate}", description, final_scores(pool, rule))
    add(
        "borda",
        "each scenario ranks the entries; points for every entry beaten, half for ties",
        _borda(pool, formula),
    )
    add(
        "bradley_terry",
        "strengths that explain the pairwise wins of all columns, each weighted as in the final score",
        bradley_terry(pool, formula),
    )
    best_of_team: dict[str, str] = {}
    for scored in board.entries:
        best_of_team.setdefault(scored.team, scored.entry)
    add(
        "one_per_team",
        "only the best entry of each team is in the pool",
        final_scores(pool.only(best_of_team.values()), formula),
    )
    references = list(panel) or reference_panel(board)
    add(
        "reference_panel",
        f"win rates against these entries only: {', '.join(references)}; scenarios at least 1/(2 x panel)",
        against_panel(pool, formula, references),
    )
    return schemes


def _scheme(name: str, description: str, scored: ScoreByEntry, ranking: ScoreByEntry) -> Scheme:
    return Scheme(
        name=name,
        description=description,
        ranks=rank_by_entry(scored),
        scores=dict(scored),
        moved=moves(ranking, scored),
    )


def _views(pool: Pool, formula: Formula, ranking: ScoreByEntry, usable: UsableAnswers | None) -> list[Scheme]:
    """Return the rankings that are to look at only; those that these results do not allow are left out."""
    found = {
        (
            "performance_profile",
            f"{ONLY}; how often, in columns, it is within a factor of 1 to 4 of the best",
        ): (performance_profile(pool, formula, column_weights(pool, formula))),
        (
            "item_response",
            f"{ONLY}; questions weigh by how well they tell the good entries from the others",
        ): (item_response(pool, formula, usable) if usable else None),
    }
    return [
        _scheme(name, description, _by_entry(pool, final), ranking)
        for (name, description), final in found.items()
        if final is not None
    ]


def _borda(pool: Pool, formula: Formula) -> dict[str, float]:
    """Return the points by entry; each scenario votes by mean midrank win rate, with its column weights."""
    midrank = CONVENTIONS["midrank"]
    result = scores(pool.columns, pool.values.T, Formula(midrank, formula.missing, formula.stage_weights))
    total_weight = sum(formula.stage_weights[stage] for stage in result.scenarios)
    points = np.zeros(len(pool.entries))
    for stage, scenarios in result.scenarios.items():
        votes = [np.nan_to_num(column_win_rates(rates, True, midrank)) for rates in scenarios.values()]
        points += formula.stage_weights[stage] / total_weight * np.mean(votes, axis=0)
    return _by_entry(pool, points)


def column_weights(pool: Pool, formula: Formula) -> Array:
    """Return each column's share of the final score if all means were arithmetic; they add up to 1."""
    keys = [column.scenario_key for column in pool.columns]
    scenarios = set(keys)
    total_weight = sum(formula.stage_weights[stage] for stage in {stage for stage, _ in keys})
    return np.array(
        [
            formula.stage_weights[key[0]]
            / total_weight
            / sum(stage == key[0] for stage, _ in scenarios)
            / keys.count(key)
            for key in keys
        ]
    )


def _pairwise_wins(pool: Pool, formula: Formula) -> Iterator[tuple[Array, NDArray[np.bool_]]]:
    """Yield, for each column, who beats whom (1/2 for a tie) and who meets whom, shape (entries, entries).

    Nobody meets itself; a missing value loses to all others, or meets nobody under `exclude`.
    """
    for column, values in zip(pool.columns, pool.values.T, strict=True):
        absent = np.isnan(values)
        worse, _ = tie_groups(np.where(absent, -np.inf, values if column.higher_is_better else -values))
        met = ~np.eye(len(values), dtype=bool)
        if formula.missing_in(column) == "exclude":
            met &= ~(absent[:, None] | absent)
        yield ((worse[:, None] > worse) + 0.5 * (worse[:, None] == worse)) * met, met


def bradley_terry(pool: Pool, formula: Formula) -> dict[str, float]:
    """Return log-strengths with mean 0, by the MM algorithm of Hunter (2004).

    Every pair also shares a virtual tie, so that an entry that never wins has a finite strength.
    """
    n = len(pool.entries)
    if n == 1:
        return {pool.entries[0]: 0.0}
    wins = np.full((n, n), VIRTUAL_TIE / 2)
    for weight, (won, _) in zip(column_weights(pool, formula), _pairwise_wins(pool, formula), strict=True):
        wins += weight * won
    np.fill_diagonal(wins, 0)
    meetings = wins + wins.T
    total_wins = wins.sum(axis=1)
    strength: Array = np.ones(n)
    for _ in range(MAX_STEPS):
        updated = total_wins / (meetings / (strength[:, None] + strength[None, :])).sum(axis=1)
        updated /= np.exp(np.mean(np.log(updated)))
        change = np.abs(np.log(updated / strength)).max()
        strength = updated
        if change < CONVERGED:
            break
    # Smaller differences than the iteration resolves are ties.
    return {name: round(float(value), 8) for name, value in zip(pool.entries, np.log(strength), strict=True)}


def reference_panel(board: Leaderboard) -> list[str]:
    """Return entries at evenly spaced ranks, first and last among them."""
    indexes = np.linspace(0, len(board.entries) - 1, min(PANEL_SIZE, len(board.entries)))
    return [board.entries[round(index)].entry for index in indexes]


def against_panel(pool: Pool, formula: Formula, panel: Sequence[str]) -> dict[str, float]:
    """Return final scores from win rates against the panel: the share beaten, half for ties.

    Entries outside the panel do not affect each other's scores.
    """
    members = [pool.entries.index(name) for name in panel]
    with np.errstate(invalid="ignore"):  # 0/0: the entry meets nobody
        rates = [
            won[:, members].sum(axis=1) / met[:, members].sum(axis=1)
            for won, met in _pairwise_wins(pool, formula)
        ]

    def floored(scenarios: Array) -> Array:
        return geometric_mean(np.maximum(scenarios, 1 / (2 * len(members))))

    rule = Formula(formula.convention, formula.missing, formula.stage_weights, floored)
    return _by_entry(pool, scores_of_win_rates(pool.columns, rates, rule).final)


# --- verdicts ------------------------------------------------------------------------------------------


def _verdict(
    index: int,
    board: Leaderboard,
    without_entry: Sequence[Removal],
    without_scenario: Sequence[Removal],
    schemes: Sequence[Scheme],
) -> PrizeVerdict:
    holder, rank = board.entries[index].entry, board.entries[index].rank
    entries = [removal for removal in without_entry if _move_of(removal.moved, holder)]
    scenarios = [removal for removal in without_scenario if _move_of(removal.moved, holder)]
    other = [scheme for scheme in schemes if _move_of(scheme.moved, holder)]
    shared = [scored.entry for scored in board.entries if scored.rank == rank and scored.entry != holder]
    who = f"{holder}, shared with {', '.join(shared)}" if shared else holder
    subject = f"{ORDINALS[rank]} place ({who})"
    sentences = [
        f"{subject} depends on {_dependence('entry', holder, entries)}."
        if entries
        else f"{subject} is the same whichever other entry is left out of the pool.",
        f"It depends on {_dependence('scenario', holder, scenarios)}."
        if scenarios
        else "No single scenario decides it.",
        f"Under other scoring rules {holder} has {_other_ranks(holder, other)}."
        if other
        else f"All {len(schemes)} scoring rules compared here agree on it.",
    ]
    return PrizeVerdict(
        rank=rank,
        entry=holder,
        stable=not (entries or scenarios or other),
        depends_on_entries=[removal.removed for removal in entries],
        depends_on_scenarios=[removal.removed for removal in scenarios],
        depends_on_schemes=[scheme.name for scheme in other],
        text=" ".join(sentences),
    )


def _move_of(moved: Sequence[RankMove], entry: str) -> RankMove | None:
    return next((move for move in moved if move.entry == entry), None)


DEPENDENCES = {
    "entry": ("entry {} being in the pool", "which entries are in the pool"),
    "scenario": ("scenario {} being scored", "which scenarios are scored"),
}


def _dependence(kind: str, holder: str, removals: Sequence[Removal]) -> str:
    """Say what a place depends on, and who has it in the first few of the other rankings."""
    single, several = DEPENDENCES[kind]
    if len(removals) == 1:
        return f"{single.format(removals[0].removed)}: without it {_successor(holder, removals[0])}"
    cases = [f"without {removal.removed} {_successor(holder, removal)}" for removal in removals[:MAX_NAMED]]
    more = f"; {len(removals) - MAX_NAMED} more change it too" if len(removals) > MAX_NAMED else ""
    return f"{several}: {'; '.join(cases)}{more}"


def _successor(holder: str, removal: Removal) -> str:
    move = _move_of(removal.moved, holder)
    assert move is not None
    successor = removal.order[move.before - 1]
    return f"it has rank {move.after}" if successor == holder else f"{successor} has the place"


def _other_ranks(holder: str, schemes: Sequence[Scheme]) -> str:
    by_rank: dict[int, list[str]] = {}
    for scheme in schemes:
        by_rank.setdefault(scheme.ranks[holder], []).append(scheme.name)
    return ", ".join(f"rank {rank} ({', '.join(names)})" for rank, names in sorted(by_rank.items()))
