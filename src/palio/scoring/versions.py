"""Score versions: a new leaderboard from stored results, and why ranks differ between two.

`rescore` reads the HELM results that a leaderboard was made from, holds them against its hashes and
scores them under a new rule; nothing is run again. `difference` explains every rank that moved, by going
from one leaderboard to the other one change at a time.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast, get_args

import numpy as np

from palio.config import Competition
from palio.errors import BadInput
from palio.layout import STAGES, Boards, Results
from palio.records import Analysis, Column, Leaderboard, Part, ScoredEntry, read_record
from palio.scoring.columns import columns_of
from palio.scoring.conventions import CONVENTIONS, Array, Missing
from palio.scoring.formula import Formula, scores
from palio.scoring.leaderboard import Candidate, read_finished, score
from palio.scoring.pool import formula_of
from palio.scoring.robustness import rank_by_entry
from palio.scoring.tables import write_leaderboard

# --- a new version -------------------------------------------------------------------------------------


def rescore(
    board: Leaderboard,
    competition: Competition,
    results: Results,
    *,
    convention: str | None = None,
    missing: str | None = None,
) -> Leaderboard:
    """Score the pool of `board` again, by `competition`'s columns, weights and rules, or those given.

    Raises:
        BadInput: a result is not the one `board` was made from, or convention or policy is unknown.
    """
    if convention is not None and convention not in CONVENTIONS:
        raise BadInput("rescore", "convention", convention, f"use one of {', '.join(CONVENTIONS)}")
    if missing is not None and missing not in get_args(Missing):
        raise BadInput("rescore", "missing", missing, f"use one of {', '.join(get_args(Missing))}")
    candidates: list[Candidate] = []
    inputs: dict[str, str] = {}
    for one in board.entries:
        finished = read_finished(competition, results.entry(board.track, one.entry))
        for path, digest in finished.inputs.items():
            if board.inputs.get(path) != digest:
                raise BadInput(
                    results.path / path,
                    "",
                    None,
                    "changed since the leaderboard was made; run `palio score` instead",
                )
        inputs |= finished.inputs
        candidates.append(
            Candidate(one.entry, one.team, [cell for stage in STAGES for cell in finished.cells[stage]])
        )
    return score(
        competition=board.competition,
        track=board.track,
        columns=columns_of(competition),
        candidates=candidates,
        stage_weights={stage: competition.stage(stage).weight for stage in STAGES},
        convention=convention or competition.scoring.convention,
        missing=cast(Missing, missing or competition.scoring.missing),
        final=board.final,
        did_not_finish=board.did_not_finish,
        inputs=inputs,
    )


def write_version(board: Leaderboard, boards: Boards, analysis: Analysis | None = None) -> Path:
    """Write versions/<track>.v<n>.json and its tables, n from 2: the leaderboard itself is the first.

    A leaderboard equal to an earlier version is not written again; its path is returned.
    """
    versions = boards.versions
    numbers = {}
    for path in sorted(versions.path.glob(f"{board.track}.v*.json")):
        if found := re.fullmatch(re.escape(board.track) + r"\.v(\d+)\.json", path.name):
            numbers[int(found[1])] = path
            if read_leaderboard(path) == board:
                return path
    name = f"{board.track}.v{max(numbers, default=1) + 1}"
    write_leaderboard(board, versions, analysis, name)
    return versions.leaderboard(name)


def read_leaderboard(path: Path) -> Leaderboard:
    return read_record(Leaderboard, path)


# --- why ranks differ ----------------------------------------------------------------------------------


class StepMove(Part):
    """What one change did to one entry's rank."""

    change: str
    before: int
    after: int
    why: str
    """What changed, in words."""
    effect: str
    """What it did to the entry's own score and scenarios; a rank can also move because others' did."""


class Move(Part):
    """One entry whose rank differs, and the changes that moved it, in the order they were applied."""

    entry: str
    before: int
    after: int
    steps: list[StepMove]
    """`before` of the first and `after` of the last are the entry's two ranks."""

    def __str__(self) -> str:
        lines = [f"{self.entry}: rank {self.before} -> {self.after}"]
        for one in self.steps:
            own = f" ({one.why})" if one.change == "values" else ""
            lines.append(f"  {one.before} -> {one.after} by {one.change}{own}: {one.effect}")
        return "\n".join(lines)


class Difference(Part):
    """Between two leaderboards A and B."""

    changes: list[str]
    """What differs, in words; empty if nothing that decides a score does."""
    joined: list[str]
    """Entries scored in B only."""
    left: list[str]
    moved: list[Move]
    """By rank in B."""

    def __str__(self) -> str:
        if not self.changes:
            return "the same scores"
        lines = [f"changed: {change}" for change in self.changes]
        return "\n".join(lines + ([str(move) for move in self.moved] or ["no rank moved"]))


@dataclass(frozen=True)
class _State:
    """All that decides a ranking, between two leaderboards."""

    entries: tuple[str, ...]
    columns: tuple[Column, ...]
    values: Mapping[tuple[str, str, str, str], float]
    """By (entry, stage, scenario, metric); NaN where missing."""
    formula: Formula

    def ranking(self) -> _Ranking:
        matrix: Array = np.array(
            [
                [self.values.get((entry, *_name(column)), np.nan) for column in self.columns]
                for entry in self.entries
            ],
            dtype=float,
        ).reshape(len(self.entries), len(self.columns))
        result = scores(self.columns, matrix.T, self.formula)
        final = dict(zip(self.entries, result.final.tolist(), strict=True))
        scenarios = {
            f"{stage}/{name}": dict(zip(self.entries, rates.tolist(), strict=True))
            for stage, of in result.scenarios.items()
            for name, rates in of.items()
        }
        return _Ranking(rank_by_entry(final), final, scenarios)


@dataclass(frozen=True)
class _Ranking:
    ranks: Mapping[str, int]
    final: Mapping[str, float]
    scenarios: Mapping[str, Mapping[str, float]]
    """Mean win rate by stage/scenario and entry."""


def _effect(entry: str, before: _Ranking, after: _Ranking) -> str:
    """What a change did to an entry's own score, and through which scenario most."""
    old, new = before.final[entry], after.final[entry]
    if abs(old - new) < 5e-5:
        return f"its score stays {new:.4f}, others' changed"
    told = f"its score {old:.4f} -> {new:.4f}"
    changes = {
        name: rates[entry] - before.scenarios[name][entry]
        for name, rates in after.scenarios.items()
        if name in before.scenarios and not np.isnan(rates[entry] - before.scenarios[name][entry])
    }
    largest = max(changes, key=lambda name: abs(changes[name]), default=None)
    if largest is None or changes[largest] == 0:
        return told
    rates = f"{before.scenarios[largest][entry]:.3f} -> {after.scenarios[largest][entry]:.3f}"
    return f"{told}, most by its win rate in {largest} {rates}"


def difference(a: Leaderboard, b: Leaderboard) -> Difference:
    """Explain every rank that moved from A to B.

    Changes are applied one at a time, in this order: entries that left, values, columns, convention and
    policy, weights, entries that joined. What a change does can depend on those before it.

    Raises:
        BadInput: the leaderboards are of different competitions or tracks, or of a convention's version
            that this Palio cannot compute.
    """
    if (a.competition, a.track) != (b.competition, b.track):
        told = f"{a.competition}/{a.track} and {b.competition}/{b.track}"
        raise BadInput("diff", "", None, f"the leaderboards are of {told}; give two of one track")
    for board in (a, b):
        if CONVENTIONS[board.convention].version != board.convention_version:
            used = f"{board.convention} version {board.convention_version}"
            raise BadInput("diff", "", None, f"{used} is not this Palio's; rescore that leaderboard first")
    of_a, of_b = _by_name(a), _by_name(b)
    path = _path(a, b)
    start = _State(tuple(sorted(of_a)), tuple(a.columns), _values(a), formula_of(a)).ranking()
    rankings = [start, *(step.state.ranking() for step in path)]
    moved = []
    for one in b.entries:
        name = one.entry
        if name in of_a and of_a[name].rank != one.rank:
            steps = [
                StepMove(
                    change=step.change,
                    before=before.ranks[name],
                    after=after.ranks[name],
                    why=step.why_of_entry.get(name, step.why),
                    effect=_effect(name, before, after),
                )
                for step, before, after in zip(path, rankings, rankings[1:], strict=False)
                if before.ranks[name] != after.ranks[name]
            ]
            moved.append(Move(entry=name, before=of_a[name].rank, after=one.rank, steps=steps))
    return Difference(
        changes=[f"{step.change}: {step.why}" for step in path],
        joined=sorted(of_b.keys() - of_a.keys()),
        left=sorted(of_a.keys() - of_b.keys()),
        moved=moved,
    )


@dataclass(frozen=True)
class _Step:
    """One change on the way from A to B, and the state after it."""

    change: str
    why: str
    state: _State
    why_of_entry: Mapping[str, str] = field(default_factory=dict)


def _path(a: Leaderboard, b: Leaderboard) -> list[_Step]:
    of_a, of_b = _by_name(a), _by_name(b)
    both = tuple(sorted(of_a.keys() & of_b.keys()))
    left, joined = sorted(of_a.keys() - of_b.keys()), sorted(of_b.keys() - of_a.keys())
    values_a, values_b = _values(a), _values(b)
    changed = _changed_values(both, a.columns, values_a, values_b)
    state = _State(tuple(sorted(of_a)), tuple(a.columns), values_a, formula_of(a))
    path: list[_Step] = []
    if left:
        state = replace(state, entries=both)
        path.append(_Step("entries that left", ", ".join(left), state))
    if changed:
        state = replace(state, values=dict(values_a) | {key: values_b[key] for key in changed})
        names = sorted({key[0] for key in changed})
        why = f"{len(changed)} values of {', '.join(names)} differ"
        own = {name: _own_values(name, changed, values_a, values_b) for name in names}
        path.append(_Step("values", why, state, own))
    if list(a.columns) != list(b.columns):
        # A stage that only B scores has B's weight from here on.
        formula = replace(state.formula, stage_weights={**b.stage_weights, **a.stage_weights})
        state = replace(state, columns=tuple(b.columns), values={**values_a, **values_b}, formula=formula)
        path.append(_Step("columns", _told_columns(a.columns, b.columns), state))
    if (a.convention, a.missing) != (b.convention, b.missing):
        rule = replace(formula_of(b), stage_weights=state.formula.stage_weights)
        state = replace(state, formula=rule)
        why = f"{a.convention}, missing {a.missing} -> {b.convention}, missing {b.missing}"
        path.append(_Step("convention", why, state))
    if a.stage_weights != b.stage_weights:
        state = replace(state, formula=formula_of(b))
        path.append(_Step("weights", f"{_told_weights(a)} -> {_told_weights(b)}", state))
    if joined:
        state = _State(tuple(sorted(of_b)), tuple(b.columns), values_b, formula_of(b))
        path.append(_Step("entries that joined", ", ".join(joined), state))
    return path


def _name(column: Column) -> tuple[str, str, str]:
    return column.stage, column.scenario, column.metric


def _by_name(board: Leaderboard) -> dict[str, ScoredEntry]:
    return {one.entry: one for one in board.entries}


def _values(board: Leaderboard) -> dict[tuple[str, str, str, str], float]:
    return {
        (one.entry, *_name(column)): np.nan if cell.value is None else cell.value
        for one in board.entries
        for column, cell in zip(board.columns, one.cells, strict=True)
    }


Key = tuple[str, str, str, str]


def _changed_values(
    entries: Sequence[str], columns: Sequence[Column], before: Mapping[Key, float], after: Mapping[Key, float]
) -> list[Key]:
    """Of the columns that both leaderboards hold."""
    keys = [(entry, *_name(column)) for entry in entries for column in columns]
    return [
        key for key in keys if key in after and not np.array_equal(before[key], after[key], equal_nan=True)
    ]


def _told(value: float) -> str:
    return "missing" if np.isnan(value) else f"{value:.4g}"


def _own_values(
    entry: str, changed: Sequence[Key], before: Mapping[Key, float], after: Mapping[Key, float]
) -> str:
    own = [key for key in changed if key[0] == entry]
    return ", ".join(f"{key[2]} {key[3]} {_told(before[key])} -> {_told(after[key])}" for key in own)


def _told_columns(a: Sequence[Column], b: Sequence[Column]) -> str:
    before, after = {_name(column): column for column in a}, {_name(column): column for column in b}
    parts = [f"{'/'.join(name)} is new" for name in after if name not in before]
    parts += [f"{'/'.join(name)} is gone" for name in before if name not in after]
    parts += [
        f"{'/'.join(name)}: {'higher' if after[name].higher_is_better else 'lower'} is better now"
        for name in before
        if name in after and before[name] != after[name]
    ]
    return ", ".join(parts) or "another order"


def _told_weights(board: Leaderboard) -> str:
    return " + ".join(f"{weight:.4g} {stage}" for stage, weight in board.stage_weights.items())
