"""Score versions: a new leaderboard from stored results, and why ranks differ between two.

`rescore` reads the HELM results behind a leaderboard, checks them against its hashes, and scores them under a
new rule; nothing is run again. `difference` explains every rank that moved by going from one leaderboard to
the other one change at a time.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import cast, get_args

import numpy as np

from palio.config import Competition
from palio.errors import BadInput
from palio.layout import Boards, Results
from palio.records import Analysis, Column, Leaderboard, Part, read_record
from palio.scoring.columns import columns_of
from palio.scoring.conventions import CONVENTIONS, TIE, Missing
from palio.scoring.formula import Formula, Scores, scores
from palio.scoring.leaderboard import Candidate, read_finished, score, with_replicates
from palio.scoring.pool import formula_of
from palio.scoring.robustness import rank_by_entry
from palio.scoring.tables import weights_text, write_leaderboard

# --- a new version -------------------------------------------------------------------------------------


def rescore(
    board: Leaderboard,
    competition: Competition,
    results: Results,
    *,
    convention: str | None = None,
    missing: str | None = None,
) -> Leaderboard:
    """Score the pool of `board` again, with `competition`'s columns, weights and rules unless given.

    Raises:
        BadInput: a result is not the one behind `board`, or the convention or policy is unknown.
    """
    for key, value, known in (
        ("convention", convention, tuple(CONVENTIONS)),
        ("missing", missing, get_args(Missing)),
    ):
        if value is not None and value not in known:
            raise BadInput("rescore", key, value, fix=f"use one of {', '.join(known)}")
    candidates: list[Candidate] = []
    inputs: dict[str, str] = {}
    for scored in board.entries:
        folder = results.entry(board.track, scored.entry)
        numbers = {replicate.number for replicate in scored.replicates}
        again = [one for one in folder.replicates() if one.replicate in numbers]
        finished = with_replicates(
            read_finished(competition, folder, scored.team, trained=scored.trained),
            [read_finished(competition, one, scored.team) for one in again],
        )
        for path, digest in finished.inputs.items():
            if board.inputs.get(path) != digest:
                why, fix = "changed since the leaderboard was made", "run `palio score` instead"
                raise BadInput(results.path / path, why=why, fix=fix)
        inputs |= finished.inputs
        candidates.append(finished.candidate)
    return score(
        competition=board.competition,
        track=board.track,
        columns=columns_of(competition),
        candidates=candidates,
        stage_weights=competition.stage_weights,
        convention=convention or competition.scoring.convention,
        missing=cast(Missing, missing or competition.scoring.missing),
        final=board.final,
        did_not_finish=board.did_not_finish,
        inputs=inputs,
    )


def write_version(board: Leaderboard, boards: Boards, analysis: Analysis | None = None) -> Path:
    """Write versions/<track>.v<n>.json and its tables, n from 2: the leaderboard itself is the first.

    A leaderboard that equals an earlier version is not written again. Returns the path of the version.
    """
    versions = boards.versions
    latest = 1
    for path in sorted(versions.path.glob(f"{board.track}.v*.json")):
        if match := re.fullmatch(re.escape(board.track) + r"\.v(\d+)\.json", path.name):
            latest = max(latest, int(match[1]))
            if read_leaderboard(path) == board:
                return path
    name = f"{board.track}.v{latest + 1}"
    write_leaderboard(board, versions, analysis, name)
    return versions.leaderboard(name)


def read_leaderboard(path: Path) -> Leaderboard:
    return read_record(Leaderboard, path)


# --- why ranks differ ----------------------------------------------------------------------------------


class StepMove(Part):
    """The effect of one change on one entry's rank."""

    change: str
    before: int
    after: int
    why: str
    """What changed, in words."""
    effect: str
    """The effect on the entry's own score and scenarios; a rank also moves because others' scores do."""


class Move(Part):
    """An entry whose rank differs, and the changes that moved it, in the order in which they are applied."""

    entry: str
    before: int
    after: int
    steps: list[StepMove]
    """`before` of the first and `after` of the last are the entry's two ranks."""

    def __str__(self) -> str:
        lines = [f"{self.entry}: rank {self.before} -> {self.after}"]
        for step in self.steps:
            why = f" ({step.why})" if step.change == "values" else ""
            lines.append(f"  {step.before} -> {step.after} by {step.change}{why}: {step.effect}")
        return "\n".join(lines)


class Difference(Part):
    """The difference between two leaderboards A and B."""

    changes: list[str]
    """What differs, in words; empty if nothing that decides a score does."""
    joined: list[str]
    """Entries scored in B only."""
    left: list[str]
    """Entries scored in A only."""
    moved: list[Move]
    """By rank in B."""

    def __str__(self) -> str:
        if not self.changes:
            return "the same scores"
        lines = [f"changed: {change}" for change in self.changes]
        return "\n".join(lines + ([str(move) for move in self.moved] or ["no rank moved"]))


Values = Mapping[tuple[str, str], float]
"""Value by entry and stage/scenario/metric, NaN where missing."""


@dataclass(frozen=True)
class _State:
    """Everything that decides a ranking, at one point between two leaderboards."""

    entries: Sequence[str]
    columns: Sequence[Column]
    values: Values
    formula: Formula

    @cached_property
    def scores(self) -> Scores:
        rows = [
            [self.values.get((entry, str(column)), np.nan) for entry in self.entries]
            for column in self.columns
        ]
        return scores(self.columns, np.array(rows, dtype=float), self.formula)

    @cached_property
    def final(self) -> dict[str, float]:
        return dict(zip(self.entries, self.scores.final.tolist(), strict=True))

    @cached_property
    def ranks(self) -> dict[str, int]:
        return rank_by_entry(self.final)

    def win_rates(self, entry: str) -> dict[str, float]:
        """Return the entry's mean win rate by stage/scenario, where it has one."""
        row = self.entries.index(entry)
        return {
            f"{stage}/{scenario}": float(means[row])
            for stage, scenarios in self.scores.scenarios.items()
            for scenario, means in scenarios.items()
            if not np.isnan(means[row])
        }


@dataclass(frozen=True)
class _Step:
    """One change on the way from A to B, and the state after it."""

    change: str
    why: str
    state: _State
    why_of_entry: Mapping[str, str] = field(default_factory=dict)


def difference(a: Leaderboard, b: Leaderboard) -> Difference:
    """Explain every rank that moved from A to B.

    Changes are applied one at a time, in this order: entries that left, values, columns, convention and
    policy, weights, entries that joined. The effect of a change can depend on those before it.

    Raises:
        BadInput: the leaderboards belong to different competitions or tracks, or use a version of a
            convention that this version of Palio cannot compute.
    """
    if (a.competition, a.track) != (b.competition, b.track):
        tracks = f"{a.competition}/{a.track} and {b.competition}/{b.track}"
        raise BadInput("diff", why=f"the leaderboards are of {tracks}", fix="give two of one track")
    for board in (a, b):
        if CONVENTIONS[board.convention].version != board.convention_version:
            used = f"{board.convention} version {board.convention_version}"
            raise BadInput("diff", why=f"cannot compute {used}", fix="rescore that leaderboard first")
    start = _state_of(a)
    path = _path(a, b)
    states = [start, *(step.state for step in path)]
    rank_in_a = {scored.entry: scored.rank for scored in a.entries}
    moved = []
    for scored in b.entries:
        name = scored.entry
        if rank_in_a.get(name, scored.rank) != scored.rank:
            steps = [
                StepMove(
                    change=step.change,
                    before=before.ranks[name],
                    after=after.ranks[name],
                    why=step.why_of_entry.get(name, step.why),
                    effect=_effect(name, before, after),
                )
                for step, before, after in zip(path, states, states[1:], strict=False)
                if before.ranks[name] != after.ranks[name]
            ]
            moved.append(Move(entry=name, before=rank_in_a[name], after=scored.rank, steps=steps))
    scored_in_b = {scored.entry for scored in b.entries}
    return Difference(
        changes=[f"{step.change}: {step.why}" for step in path],
        joined=sorted(scored_in_b - rank_in_a.keys()),
        left=sorted(rank_in_a.keys() - scored_in_b),
        moved=moved,
    )


def _state_of(board: Leaderboard) -> _State:
    values = {
        (scored.entry, str(column)): np.nan if cell.value is None else cell.value
        for scored in board.entries
        for column, cell in zip(board.columns, scored.cells, strict=True)
    }
    entries = sorted(scored.entry for scored in board.entries)
    return _State(entries, board.columns, values, formula_of(board))


def _path(a: Leaderboard, b: Leaderboard) -> list[_Step]:
    """Return the changes from A to B."""
    state, end = _state_of(a), _state_of(b)
    both = sorted(set(state.entries) & set(end.entries))
    left, joined = (sorted(set(entries) - set(both)) for entries in (state.entries, end.entries))
    path: list[_Step] = []
    if left:
        state = replace(state, entries=both)
        path.append(_Step("entries that left", ", ".join(left), state))
    changed = _changed_values(both, a.columns, state.values, end.values)
    if changed:
        new = {(entry, column): end.values[entry, column] for entry in changed for column in changed[entry]}
        why = f"{len(new)} values of {', '.join(changed)} differ"
        why_of_entry = {entry: ", ".join(texts.values()) for entry, texts in changed.items()}
        state = replace(state, values={**state.values, **new})
        path.append(_Step("values", why, state, why_of_entry))
    if a.columns != b.columns:
        # A stage that only B scores has B's weight from here on.
        formula = replace(state.formula, stage_weights={**b.stage_weights, **a.stage_weights})
        state = replace(state, columns=b.columns, values={**state.values, **end.values}, formula=formula)
        path.append(_Step("columns", _column_changes(a.columns, b.columns), state))
    if (a.convention, a.missing) != (b.convention, b.missing):
        state = replace(state, formula=replace(end.formula, stage_weights=state.formula.stage_weights))
        why = f"{a.convention}, missing {a.missing} -> {b.convention}, missing {b.missing}"
        path.append(_Step("convention", why, state))
    if a.stage_weights != b.stage_weights:
        state = replace(state, formula=end.formula)
        path.append(_Step("weights", f"{weights_text(a)} -> {weights_text(b)}", state))
    if joined:
        path.append(_Step("entries that joined", ", ".join(joined), end))
    return path


def _changed_values(
    entries: Sequence[str], columns: Sequence[Column], before: Values, after: Values
) -> dict[str, dict[str, str]]:
    """Describe the values that differ, by entry and column, among the columns of both leaderboards."""
    changed: dict[str, dict[str, str]] = {}
    for entry in entries:
        for column in map(str, columns):
            old, new = before[entry, column], after.get((entry, column))
            if new is not None and not np.isclose(old, new, rtol=TIE, atol=0, equal_nan=True):
                changed.setdefault(entry, {})[column] = f"{column} {_value_text(old)} -> {_value_text(new)}"
    return changed


def _value_text(value: float) -> str:
    return "missing" if np.isnan(value) else f"{value:.4g}"


def _column_changes(a: Sequence[Column], b: Sequence[Column]) -> str:
    before, after = {str(column): column for column in a}, {str(column): column for column in b}
    changes = [f"{name} is new" for name in after if name not in before]
    changes += [f"{name} is gone" for name in before if name not in after]
    changes += [
        f"{name}: {'higher' if after[name].higher_is_better else 'lower'} is better now"
        for name in before
        if name in after and before[name] != after[name]
    ]
    return ", ".join(changes) or "another order"


def _effect(entry: str, before: _State, after: _State) -> str:
    """Describe the effect of a change on an entry's own score, and the scenario behind most of it."""
    old, new = before.final[entry], after.final[entry]
    if abs(old - new) < 5e-5:  # equal as printed
        return f"its score stays {new:.4f}, others' changed"
    text = f"its score {old:.4f} -> {new:.4f}"
    old_rates, new_rates = before.win_rates(entry), after.win_rates(entry)
    changes = {name: abs(new_rates[name] - old_rates[name]) for name in new_rates if name in old_rates}
    largest = max(changes, key=lambda name: changes[name], default=None)
    if largest is None or changes[largest] == 0:
        return text
    return f"{text}, most by its win rate in {largest} {old_rates[largest]:.3f} -> {new_rates[largest]:.3f}"
