"""What a ranking depends on besides the entries' answers: the pool, the scenarios, the scoring rule.

Win rates compare an entry with all others, so who else takes part moves everybody's score. Here every
entry and every scenario is left out once, the same values are ranked by every convention and aggregate
and by rules that do not use win rates of the pool, and each of the first three places gets a verdict in
plain words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from palio.records import Leaderboard, PrizeVerdict, RankMove, Removal, Robustness, Scheme
from palio.scoring.conventions import CONVENTIONS, Array, Missing, column_win_rates
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

PRIZES = 3
PANEL_SIZE = 5
AGGREGATES: dict[str, tuple[Aggregate, str]] = {
    "geometric": (geometric_mean, "geometric mean over scenarios"),
    "floored": (floored_geometric_mean, "geometric mean over scenarios, each at least 1/(2n)"),
    "arithmetic": (arithmetic_mean, "arithmetic mean over scenarios"),
}
NAMED = 3
"""Names a sentence of a verdict lists before it says how many more there are."""
ORDINALS = {1: "1st", 2: "2nd", 3: "3rd"}

Scored = Mapping[str, float]
"""Score by entry."""


def robustness(board: Leaderboard, panel: Sequence[str] = ()) -> Robustness | None:
    """Leave-one-out, schemes side by side, verdicts; None without entries.

    Args:
        panel: entry ids of the reference panel; default: entries at evenly spaced ranks.
    """
    if not board.entries:
        return None
    pool, formula = pool_of(board), formula_of(board)
    ranking = {one.entry: one.final_score for one in board.entries}
    without_entry = (
        [
            _removal(one.entry, ranking, final_scores(pool.without(one.entry), formula))
            for one in board.entries
        ]
        if len(board.entries) > 1
        else []
    )
    scenarios = list(dict.fromkeys((column.stage, column.scenario) for column in board.columns))
    without_scenario = [
        _removal(f"{stage}/{name}", ranking, final_scores(pool.without_scenario(stage, name), formula))
        for stage, name in (scenarios if len(scenarios) > 1 else [])
    ]
    schemes = _schemes(board, pool, formula, ranking, panel)
    verdicts = [
        _verdict(place, board, without_entry, without_scenario, schemes)
        for place in range(min(PRIZES, len(board.entries)))
    ]
    return Robustness(
        without_entry=without_entry,
        without_scenario=without_scenario,
        schemes=schemes,
        verdicts=verdicts,
    )


def final_scores(pool: Pool, formula: Formula) -> dict[str, float]:
    """Final score by entry; entries without any value (policy `exclude`) are absent."""
    result = scores(pool.columns, pool.values.T, formula)
    return _by_entry(pool, result.final)


def _by_entry(pool: Pool, final: Array) -> dict[str, float]:
    return {
        entry: float(value) for entry, value in zip(pool.entries, final, strict=True) if not np.isnan(value)
    }


# --- comparing rankings --------------------------------------------------------------------------------


def rank_by_entry(scored: Scored) -> dict[str, int]:
    names = sorted(scored)
    of = ranks(np.array([scored[name] for name in names], dtype=float))
    return {name: int(rank) for name, rank in zip(names, of, strict=True)}


def moves(before: Scored, after: Scored) -> list[RankMove]:
    """Entries whose rank among the entries of both rankings differs, by their rank before."""
    both = before.keys() & after.keys()
    old = rank_by_entry({name: before[name] for name in both})
    new = rank_by_entry({name: after[name] for name in both})
    return [
        RankMove(entry=name, before=old[name], after=new[name])
        for name in sorted(both, key=lambda one: (old[one], one))
        if old[name] != new[name]
    ]


def _order(scored: Scored) -> list[str]:
    of = rank_by_entry(scored)
    return sorted(of, key=lambda name: (of[name], name))


def _removal(removed: str, ranking: Scored, left: Scored) -> Removal:
    return Removal(removed=removed, order=_order(left), moved=moves(ranking, left))


# --- schemes -------------------------------------------------------------------------------------------


def _schemes(
    board: Leaderboard, pool: Pool, formula: Formula, ranking: Scored, panel: Sequence[str]
) -> list[Scheme]:
    found: list[Scheme] = []

    def add(name: str, description: str, scored: Scored) -> None:
        found.append(
            Scheme(
                name=name,
                description=description,
                ranks=rank_by_entry(scored),
                scores=dict(scored),
                moved=moves(ranking, scored),
            )
        )

    missing: Missing = formula.missing
    own = (board.convention, "geometric")
    rules = [(convention, aggregate) for convention in CONVENTIONS for aggregate in AGGREGATES]
    for convention, aggregate in sorted(rules, key=lambda rule: rule != own):
        function, words = AGGREGATES[aggregate]
        other = Formula(CONVENTIONS[convention], missing, formula.stage_weights, function)
        described = f"win rates {CONVENTIONS[convention].formula}; {words}"
        add(f"{convention}/{aggregate}", described, final_scores(pool, other))
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
    best = _best_of_teams(board)
    add(
        "one_per_team",
        "only the best entry of each team is in the pool",
        final_scores(pool.only(best), formula),
    )
    references = list(panel) or reference_panel(board)
    add(
        "reference_panel",
        f"win rates against these entries only: {', '.join(references)}; scenarios at least 1/(2 x panel)",
        against_panel(pool, formula, references),
    )
    return found


def _borda(pool: Pool, formula: Formula) -> dict[str, float]:
    """Every scenario is a voter that ranks entries by their mean midrank win rate; voters weigh as in the
    final score if its means were arithmetic."""
    midrank = CONVENTIONS["midrank"]
    result = scores(pool.columns, pool.values.T, Formula(midrank, formula.missing, formula.stage_weights))
    weights = {stage: formula.stage_weights[stage] for stage in result.scenarios}
    whole = sum(weights.values())
    total = np.zeros(len(pool.entries))
    for stage, scenarios in result.scenarios.items():
        votes = [
            np.nan_to_num(column_win_rates(np.round(rates, 12), True, midrank))
            for rates in scenarios.values()
        ]
        total += weights[stage] / whole * np.mean(votes, axis=0)
    return _by_entry(pool, total)


def column_weights(pool: Pool, formula: Formula) -> Array:
    """Share of each column in the final score if all means were arithmetic; adds up to 1."""
    keys = [(column.stage, column.scenario) for column in pool.columns]
    whole = sum(formula.stage_weights[stage] for stage in {stage for stage, _ in keys})
    return np.array(
        [
            formula.stage_weights[stage]
            / whole
            / len({scenario for of, scenario in keys if of == stage})
            / keys.count((stage, scenario))
            for stage, scenario in keys
        ]
    )


def bradley_terry(pool: Pool, formula: Formula, steps: int = 1000) -> dict[str, float]:
    """Log-strengths by Hunter's MM algorithm, mean 0.

    A pair meets in every column in which both have a value; a missing value loses under `worst`. Every
    pair also shares a virtual tie of weight 1/100, so an entry that never wins has a finite strength.
    """
    n = len(pool.entries)
    if n == 1:
        return {pool.entries[0]: 0.0}
    wins = np.zeros((n, n))
    for weight, column, values in zip(
        column_weights(pool, formula), pool.columns, pool.values.T, strict=True
    ):
        signed = values if column.higher_is_better else -values
        if formula.missing != "exclude":
            signed = np.where(np.isnan(signed), -np.inf, signed)
        wins += weight * ((signed[:, None] > signed[None, :]) + 0.5 * (signed[:, None] == signed[None, :]))
    wins += 0.005
    np.fill_diagonal(wins, 0)
    meetings = wins + wins.T
    won = wins.sum(axis=1)
    strength = np.ones(n)
    for _ in range(steps):
        updated = won / (meetings / (strength[:, None] + strength[None, :])).sum(axis=1)
        updated /= np.exp(np.mean(np.log(updated)))
        change = np.abs(np.log(updated / strength)).max()
        strength = updated
        if change < 1e-10:
            break
    # Converged to 1e-10: what differs by less is equal.
    return {
        entry: round(float(value), 8) for entry, value in zip(pool.entries, np.log(strength), strict=True)
    }


def _best_of_teams(board: Leaderboard) -> list[str]:
    best: dict[str, str] = {}
    for one in board.entries:
        best.setdefault(one.team, one.entry)
    return list(best.values())


def reference_panel(board: Leaderboard) -> list[str]:
    """Entries at evenly spaced ranks, first and last among them."""
    places = np.linspace(0, len(board.entries) - 1, min(PANEL_SIZE, len(board.entries)))
    return [board.entries[round(place)].entry for place in places]


def against_panel(pool: Pool, formula: Formula, panel: Sequence[str]) -> dict[str, float]:
    """Win rate of a column = share of the panel beaten, half for ties; nobody meets itself.

    Entries outside the panel do not touch each other's scores: who else takes part changes nothing.
    """
    members = np.array([pool.entries.index(name) for name in panel])
    itself = np.arange(len(pool.entries))[:, None] == members[None, :]
    rates: list[Array] = []
    for column, values in zip(pool.columns, pool.values.T, strict=True):
        signed = values if column.higher_is_better else -values
        absent = np.isnan(signed)
        signed = np.where(absent, -np.inf, signed)
        own, other = signed[:, None], signed[members][None, :]
        met = ~itself
        if formula.missing == "exclude":
            met = met & ~absent[:, None] & ~absent[members][None, :]
        won = ((own > other) + 0.5 * (own == other)) * met
        with np.errstate(invalid="ignore"):
            rate = won.sum(axis=1) / met.sum(axis=1)
        rates.append(np.asarray(rate, dtype=float))

    def floored(scenarios: Array) -> Array:
        return geometric_mean(np.maximum(scenarios, 1 / (2 * len(members))))

    rule: Aggregate = floored
    result = scores_of_win_rates(
        pool.columns,
        rates,
        Formula(formula.convention, formula.missing, formula.stage_weights, rule),
    )
    return _by_entry(pool, result.final)


# --- verdicts ------------------------------------------------------------------------------------------


def _verdict(
    place: int,
    board: Leaderboard,
    without_entry: Sequence[Removal],
    without_scenario: Sequence[Removal],
    schemes: Sequence[Scheme],
) -> PrizeVerdict:
    holder = board.entries[place].entry
    rank = board.entries[place].rank

    def loses_place(moved: Sequence[RankMove]) -> bool:
        return any(move.entry == holder for move in moved)

    entries = [one for one in without_entry if loses_place(one.moved)]
    scenarios = [one for one in without_scenario if loses_place(one.moved)]
    other = [scheme for scheme in schemes if loses_place(scheme.moved)]
    shared = [one.entry for one in board.entries if one.rank == rank and one.entry != holder]
    who = f"{holder}, shared with {', '.join(shared)}" if shared else holder
    subject = f"{ORDINALS[rank]} place ({who})"
    told = [
        f"{subject} depends on {_what_else('entry', holder, entries)}."
        if entries
        else f"{subject} is the same whichever other entry is left out of the pool.",
        f"It depends on {_what_else('scenario', holder, scenarios)}."
        if scenarios
        else "No single scenario decides it.",
        f"Scored otherwise {holder} has {_other_ranks(holder, other)}."
        if other
        else f"All {len(schemes)} ways of scoring compared here agree on it.",
    ]
    return PrizeVerdict(
        rank=rank,
        entry=holder,
        stable=not (entries or scenarios or other),
        depends_on_entries=[one.removed for one in entries],
        depends_on_scenarios=[one.removed for one in scenarios],
        depends_on_schemes=[scheme.name for scheme in other],
        text=" ".join(told),
    )


def _move_of(moved: Sequence[RankMove], entry: str) -> RankMove:
    return next(move for move in moved if move.entry == entry)


KINDS = {
    "entry": ("entry {} being in the pool", "which entries are in the pool"),
    "scenario": ("scenario {} being scored", "which scenarios are scored"),
}


def _what_else(kind: str, holder: str, removals: Sequence[Removal]) -> str:
    """What a place depends on and who has it in the first few of the other rankings."""
    one, several = KINDS[kind]
    if len(removals) == 1:
        return f"{one.format(removals[0].removed)}: without it {_taker(holder, removals[0])}"
    told = [f"without {removal.removed} {_taker(holder, removal)}" for removal in removals[:NAMED]]
    more = f"; {len(removals) - NAMED} more change it too" if len(removals) > NAMED else ""
    return f"{several}: {'; '.join(told)}{more}"


def _taker(holder: str, removal: Removal) -> str:
    move = _move_of(removal.moved, holder)
    taker = removal.order[move.before - 1]
    return f"it has rank {move.after}" if taker == holder else f"{taker} has the place"


def _other_ranks(holder: str, schemes: Sequence[Scheme]) -> str:
    by_rank: dict[int, list[str]] = {}
    for scheme in schemes:
        by_rank.setdefault(_move_of(scheme.moved, holder).after, []).append(scheme.name)
    return ", ".join(f"rank {rank} ({', '.join(names)})" for rank, names in sorted(by_rank.items()))
