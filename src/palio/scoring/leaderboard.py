"""All entries of a track -> a Leaderboard.

`score` is the pure function; `score_track` reads what the workflow left and says why an entry is not
in it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow.parquet as pq

from palio.config import Competition
from palio.entries import AnyEntry, BrokenEntry
from palio.errors import BadInput, PalioError, State
from palio.layout import STAGES, EntryFolder, Results, Stage
from palio.pipeline import steps_of
from palio.provenance import file_sha256
from palio.records import (
    Cell,
    Column,
    DidNotFinish,
    Leaderboard,
    ScoredEntry,
    StageRecord,
    StepFailure,
    read_record,
)
from palio.scoring.columns import columns_of, stage_cells
from palio.scoring.conventions import CONVENTIONS, Array, Convention, Missing, column_win_rates
from palio.scoring.formula import Formula, Scores, ranks, scores_of_win_rates


@dataclass(frozen=True)
class Candidate:
    """One finished entry, before it is compared."""

    entry: str
    team: str
    cells: Sequence[Cell]
    """In the order of the columns."""


def values_of(candidates: Sequence[Candidate]) -> Array:
    """Shape (entries, columns), NaN where a cell has no value."""
    return np.array(
        [[np.nan if cell.value is None else cell.value for cell in one.cells] for one in candidates],
        dtype=float,
    )


# --- the pure function -------------------------------------------------------------------------------


def score(
    *,
    competition: str,
    track: str,
    columns: Sequence[Column],
    candidates: Sequence[Candidate],
    stage_weights: Mapping[str, float],
    convention: str = "midrank",
    missing: Missing = "worst",
    final: bool = False,
    did_not_finish: Sequence[DidNotFinish] = (),
    inputs: Mapping[str, str] | None = None,
) -> Leaderboard:
    """Rank the candidates. The order in which they are given changes nothing.

    Raises:
        BadInput: an entry or a column stands twice, a value is NaN or infinite, cells do not match the
            columns, or a column's stage has no weight.
        PalioError: `missing` is `block` and a value is missing.
    """
    pool = sorted(candidates, key=lambda one: one.entry)
    _validate(columns, pool, stage_weights)
    rule = CONVENTIONS[convention]
    if missing == "block":
        _block(columns, pool)
    unscored = list(did_not_finish)
    if missing == "exclude" and rule.fills_missing is None:
        pool, without = _split_unscorable(columns, pool)
        unscored += without
    entries = _scored(columns, pool, Formula(rule, missing, stage_weights)) if pool else []
    return Leaderboard(
        competition=competition,
        track=track,
        final=final,
        convention=rule.name,
        convention_version=rule.version,
        missing=missing if rule.fills_missing is None or missing == "block" else _own_rule(rule),
        stage_weights=dict(stage_weights),
        columns=list(columns),
        entries=entries,
        did_not_finish=sorted(unscored, key=lambda one: one.entry),
        inputs=dict(sorted((inputs or {}).items())),
    )


def _own_rule(rule: Convention) -> str:
    assert rule.fills_missing is not None
    higher, lower = rule.fills_missing
    return f"as in 2023: counts as {higher:g}" + (
        f", {lower:g} if lower is better" if lower != higher else ""
    )


def _validate(columns: Sequence[Column], pool: Sequence[Candidate], weights: Mapping[str, float]) -> None:
    twice = [name for name, count in Counter(one.entry for one in pool).items() if count > 1]
    if twice:
        raise BadInput("leaderboard", "entries", twice[0], "stands twice; give each entry its own id")
    names = Counter((column.stage, column.scenario, column.metric) for column in columns)
    for name, count in names.items():
        if count > 1:
            raise BadInput("leaderboard", "columns", "/".join(name), "stands twice; name each column once")
        if name[0] not in weights:
            raise BadInput(
                "leaderboard", "stage_weights", None, f"stage {name[0]} has no weight; give it one"
            )
    if not columns:
        raise BadInput("leaderboard", "columns", None, "there is none; give at least one")
    for one in pool:
        if len(one.cells) != len(columns):
            raise BadInput(
                "leaderboard", one.entry, None, f"has {len(one.cells)} cells for {len(columns)} columns"
            )
        for column, cell in zip(columns, one.cells, strict=True):
            if cell.value is not None and not np.isfinite(cell.value):
                where = f"{one.entry}: {column.scenario}, {column.metric}"
                raise BadInput("leaderboard", where, cell.value, "is no number; run the stage again")


def _block(columns: Sequence[Column], pool: Sequence[Candidate]) -> None:
    for one in pool:
        for column, cell in zip(columns, one.cells, strict=True):
            if cell.value is None:
                raise PalioError(
                    f"{one.entry}: {column.scenario}, {column.metric} is missing ({_why(cell)}) and "
                    "scoring.missing is block; finish it, withdraw the entry, or change the policy"
                )


def _split_unscorable(
    columns: Sequence[Column], pool: Sequence[Candidate]
) -> tuple[list[Candidate], list[DidNotFinish]]:
    """Under `exclude`, an entry without any value in a stage has no score there: it did not finish."""
    kept, without = [], []
    for one in pool:
        empty = None
        for stage in dict.fromkeys(column.stage for column in columns):
            cells = [cell for column, cell in zip(columns, one.cells, strict=True) if column.stage == stage]
            if empty is None and all(cell.value is None for cell in cells):
                empty = DidNotFinish(
                    entry=one.entry,
                    team=one.team,
                    step=stage,
                    state=cells[0].state,
                    reason=f"no column of the {stage} stage has a value: {_why(cells[0])}",
                )
        if empty is None:
            kept.append(one)
        else:
            without.append(empty)
    return kept, without


def _scored(columns: Sequence[Column], pool: Sequence[Candidate], formula: Formula) -> list[ScoredEntry]:
    values = values_of(pool)
    rates = np.stack(
        [
            column_win_rates(values[:, place], column.higher_is_better, formula.convention, formula.missing)
            for place, column in enumerate(columns)
        ],
        axis=1,
    )
    result = scores_of_win_rates(columns, rates.T, formula)
    rank = ranks(result.final)
    entries = [
        ScoredEntry(
            entry=one.entry,
            team=one.team,
            rank=int(rank[place]),
            final_score=float(result.final[place]),
            stage_scores={stage: float(of[place]) for stage, of in result.stages.items()},
            scenario_win_rates={
                stage: {name: float(of[place]) for name, of in scenarios.items() if not np.isnan(of[place])}
                for stage, scenarios in result.scenarios.items()
            },
            cells=[
                cell.model_copy(update={"win_rate": None if np.isnan(rate) else float(rate)})
                for cell, rate in zip(one.cells, rates[place], strict=True)
            ],
            notes=_notes(columns, one, result, place, len(pool), formula),
        )
        for place, one in enumerate(pool)
    ]
    return sorted(entries, key=lambda one: (one.rank, one.entry))


# --- footnotes ---------------------------------------------------------------------------------------


def _why(cell: Cell) -> str:
    state = cell.state.value.replace("_", " ")
    return f"{state}: {cell.reason}" if cell.reason else state


def _cost(formula: Formula, column: Column) -> str:
    fills = formula.convention.fills_missing
    if fills is not None:
        fill = fills[0 if column.higher_is_better else 1]
        return f"counted as {fill:g}, the rule of {formula.convention.name}"
    if formula.missing == "exclude":
        return "left out of the entry's mean"
    return "counted as worse than every value"


def _notes(
    columns: Sequence[Column], one: Candidate, result: Scores, place: int, n: int, formula: Formula
) -> list[str]:
    notes = []
    if n == 1:
        notes.append("The only entry: it has no rival, so every win rate is 1/2 by definition.")
    for column, cell in zip(columns, one.cells, strict=True):
        if cell.value is None:
            notes.append(
                f"{column.stage}, {column.scenario}: {column.metric} is missing ({_why(cell)}); "
                f"{_cost(formula, column)}."
            )
    for stage, of in result.stages.items():
        if of[place] == 0:
            notes += [
                _zero(columns, one, stage, name)
                for name, rate in result.scenarios[stage].items()
                if rate[place] == 0
            ]
    return notes


def _zero(columns: Sequence[Column], one: Candidate, stage: str, scenario: str) -> str:
    shown = [
        f"{column.metric} {'missing' if cell.value is None else format(cell.value, '.4g')}"
        for column, cell in zip(columns, one.cells, strict=True)
        if (column.stage, column.scenario) == (stage, scenario)
    ]
    return (
        f"The {stage} score is 0 because the entry beats nobody in {scenario} ({', '.join(shown)}), "
        "and a geometric mean with one 0 is 0 whatever the other scenarios are."
    )


# --- from results on disk ------------------------------------------------------------------------------


def score_track(
    competition: Competition,
    track: str,
    results: Results,
    entries: Mapping[str, AnyEntry],
    *,
    final: bool,
) -> Leaderboard:
    """Score the results of a track's entries.

    Standings (`final=False`) score whatever is finished; a final leaderboard needs every entry finished
    or withdrawn.

    Raises:
        PalioError: `final`, and an entry is neither finished nor withdrawn, or its tables do not match
            its records, or entries answered different instances.
    """
    found: dict[str, FinishedEntry] = {}
    missing: list[DidNotFinish] = []
    for name, entry in entries.items():
        if name in competition.withdrawn:
            reason = competition.withdrawn[name]
            missing.append(
                DidNotFinish(entry=name, team=entry.team, step="", state=State.WITHDRAWN, reason=reason)
            )
            continue
        folder = results.entry(track, name)
        try:
            stopped = unfinished_step(entry, folder)
            if stopped is not None:
                missing.append(stopped)
                continue
            found[name] = read_finished(competition, folder)
        except (PalioError, FileNotFoundError) as error:
            # A table can vanish while it is read: a job beside the standings replaces it.
            if final:
                raise
            missing.append(_unreadable(name, entry.team, error))
    for name, reason in _other_instances(found).items():
        team = entries[name].team
        missing.append(DidNotFinish(entry=name, team=team, step="open", state=State.NOT_RUN, reason=reason))
        del found[name]
    unfinished = [one for one in missing if one.state is not State.WITHDRAWN]
    policy: Missing = competition.scoring.missing
    if not final and policy == "block":
        unfinished += (blocked := _blocked(competition, found, entries))
        missing += blocked
        for one in blocked:
            del found[one.entry]
    if final and unfinished:
        listed = "; ".join(f"{one.entry} ({one.step}: {one.reason})" for one in unfinished)
        raise PalioError(
            f"{len(unfinished)} of {len(entries)} entries of {track} are neither finished nor withdrawn: "
            f"{listed}. Finish them, or name them under withdrawn in the config; "
            "`palio standings` shows what there is"
        )
    return score(
        competition=competition.competition,
        track=track,
        columns=columns_of(competition),
        candidates=[
            Candidate(name, entries[name].team, [*of.cells["open"], *of.cells["closed"]])
            for name, of in found.items()
        ],
        stage_weights={stage: competition.stage(stage).weight for stage in STAGES},
        convention=competition.scoring.convention,
        missing=policy,
        final=final,
        did_not_finish=missing,
        inputs={path: digest for of in found.values() for path, digest in of.inputs.items()},
    )


@dataclass(frozen=True)
class FinishedEntry:
    """What both stages left of one entry."""

    records: Mapping[Stage, StageRecord]
    cells: Mapping[Stage, list[Cell]]
    inputs: dict[str, str]
    """sha256 by path relative to the results folder."""


def unfinished_step(entry: AnyEntry, folder: EntryFolder) -> DidNotFinish | None:
    """The first step without a result, and why; None if the entry is finished."""
    for step in (step for step in steps_of(entry) if step.ranked):
        state, reason, log = State.NOT_RUN, "not run yet", None
        if (failure := folder.failure(step.name)).exists():
            why = read_record(StepFailure, failure)
            state, reason, log = why.state, why.reason, why.log
        elif isinstance(entry, BrokenEntry):
            reason = "the entry file is not valid; `palio check` says why"
        elif step.record(folder).exists():
            continue
        return DidNotFinish(
            entry=folder.entry_id, team=entry.team, step=step.name, state=state, reason=reason, log=log
        )
    return None


def read_finished(competition: Competition, folder: EntryFolder) -> FinishedEntry:
    """Read both stages of one entry and hold its tables against its records.

    Raises:
        BadInput: a file is absent, differs from its record, or belongs to another entry.
    """
    records, cells, inputs = {}, {}, {}
    for stage in STAGES:
        path, tables = folder.stage_record(stage), folder.tables(stage)
        record = read_record(StageRecord, path)
        told = (record.competition, record.track, record.entry, record.stage)
        if told != (competition.competition, folder.track_id, folder.entry_id, stage):
            raise BadInput(path, "", None, f"is the record of {'/'.join(told)}; run helm_{stage} again")
        wanted = {
            tables.metrics: record.metrics_sha256,
            tables.instances: record.instances_table_sha256,
        }
        for table, digest in wanted.items():
            if not table.exists():
                raise BadInput(table, "", None, f"no such table; run helm_{stage} again")
            if file_sha256(table) != digest:
                raise BadInput(table, "", None, f"differs from {path.name}; run helm_{stage} again")
            inputs[table.relative_to(folder.results).as_posix()] = digest
        inputs[path.relative_to(folder.results).as_posix()] = file_sha256(path)
        table = pq.read_table(tables.metrics)
        records[stage] = record
        cells[stage] = stage_cells(competition, stage, record.runs, table, str(tables.metrics))
    return FinishedEntry(records, cells, inputs)


def _unreadable(name: str, team: str, error: Exception) -> DidNotFinish:
    return DidNotFinish(entry=name, team=team, step="open", state=State.CRASHED, reason=str(error))


def _other_instances(found: Mapping[str, FinishedEntry]) -> dict[str, str]:
    """Entries whose answers are to other questions, or by another HELM, than most entries' are."""
    other: dict[str, str] = {}
    for stage in STAGES:
        asked = {
            name: (of.records[stage].instances_sha256, of.records[stage].helm_version)
            for name, of in found.items()
        }
        counts = Counter(asked.values())
        if len(counts) > 1:
            usual = max(sorted(counts), key=lambda key: counts[key])
            reason = (
                f"its {stage} stage was run on other instances or by another HELM than the others' was; "
                f"run helm_{stage} again"
            )
            other |= {name: reason for name, key in asked.items() if key != usual}
    return other


def _blocked(
    competition: Competition, found: Mapping[str, FinishedEntry], entries: Mapping[str, AnyEntry]
) -> list[DidNotFinish]:
    """Under `block`, standings show an entry with a missing value as not finished."""
    blocked = []
    for name, of in found.items():
        for stage in STAGES:
            gaps = [
                (column, cell)
                for column, cell in zip(columns_of(competition, stage), of.cells[stage], strict=True)
                if cell.value is None
            ]
            if gaps:
                column, cell = gaps[0]
                reason = f"{column.scenario}, {column.metric} is missing: {cell.reason}"
                blocked.append(
                    DidNotFinish(
                        entry=name, team=entries[name].team, step=stage, state=cell.state, reason=reason
                    )
                )
                break
    return blocked
