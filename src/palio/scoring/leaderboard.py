"""All entries of a track -> a Leaderboard.

`score` is the pure function; `score_track` reads the workflow's results and explains why an entry is not on
the leaderboard.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

import numpy as np
import pyarrow.parquet as pq

from palio.config import Competition, Entry
from palio.entries import AnyEntry, BrokenEntry
from palio.errors import BadInput, PalioError, State
from palio.layout import STAGES, EntryFolder, Results, Stage
from palio.pipeline import steps_of
from palio.provenance import file_sha256
from palio.records import (
    AdapterManifest,
    Cell,
    Column,
    DidNotFinish,
    Leaderboard,
    Replicate,
    ScoredEntry,
    StageRecord,
    StepFailure,
    read_record,
)
from palio.scoring.columns import columns_of, stage_cells
from palio.scoring.conventions import CONVENTIONS, Convention, Missing
from palio.scoring.formula import Formula, Scores, ranks, scores_of_win_rates
from palio.scoring.pool import values_of


@dataclass(frozen=True)
class Candidate:
    """A finished entry before it is compared with others."""

    entry: str
    team: str
    cells: Sequence[Cell]
    """In the order of the columns."""
    trained: bool = True
    """False for a base model as it is."""
    replicates: Sequence[Replicate] = ()
    notes: Sequence[str] = ()
    """Footnotes besides those that follow from the cells."""

    def unscored(self, step: str, state: State, reason: str) -> DidNotFinish:
        return DidNotFinish(entry=self.entry, team=self.team, step=step, state=state, reason=reason)


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
    """Rank the candidates, in whatever order they are given.

    Raises:
        BadInput: an entry or a column is duplicated, a value is NaN or infinite, cells do not match the
            columns, or a column's stage has no weight.
        PalioError: `missing` is `block` and a value is missing.
    """
    pool = sorted(candidates, key=lambda candidate: candidate.entry)
    _validate(columns, pool, stage_weights)
    rule = CONVENTIONS[convention]
    if missing == "block":
        _refuse_missing(columns, pool)
    unscored = list(did_not_finish)
    if missing == "exclude" and rule.fills_missing is None:
        unscored += [stopped for candidate in pool if (stopped := _empty_stage(columns, candidate))]
        pool = [candidate for candidate in pool if not _empty_stage(columns, candidate)]
    return Leaderboard(
        competition=competition,
        track=track,
        final=final,
        convention=rule.name,
        convention_version=rule.version,
        missing=missing if rule.fills_missing is None or missing == "block" else _fill_policy(rule),
        stage_weights=dict(stage_weights),
        columns=list(columns),
        entries=_scored(columns, pool, Formula(rule, missing, stage_weights)) if pool else [],
        did_not_finish=sorted(unscored, key=lambda stopped: stopped.entry),
        inputs=dict(sorted((inputs or {}).items())),
    )


def _fill_policy(rule: Convention) -> str:
    assert rule.fills_missing is not None
    higher, lower = rule.fills_missing
    return f"as in 2023: counts as {higher:g}" + (
        f", {lower:g} if lower is better" if lower != higher else ""
    )


def _validate(columns: Sequence[Column], pool: Sequence[Candidate], weights: Mapping[str, float]) -> None:
    def refuse(key: str, value: object, why: str, fix: str = "") -> NoReturn:
        raise BadInput("leaderboard", key, value, why=why, fix=fix)

    for name, count in Counter(candidate.entry for candidate in pool).items():
        if count > 1:
            refuse("entries", name, "is duplicated", "give each entry its own id")
    if not columns:
        refuse("columns", None, "is empty", "give at least one column")
    for name, count in Counter(str(column) for column in columns).items():
        if count > 1:
            refuse("columns", name, "is duplicated", "name each column once")
    for column in columns:
        if column.stage not in weights:
            refuse("stage_weights", None, f"has no weight for stage {column.stage}", "add one")
    for candidate in pool:
        if len(candidate.cells) != len(columns):
            refuse(candidate.entry, None, f"has {len(candidate.cells)} cells for {len(columns)} columns")
        for column, cell in zip(columns, candidate.cells, strict=True):
            if cell.value is not None and not np.isfinite(cell.value):
                where = f"{candidate.entry}: {column.scenario}, {column.metric}"
                refuse(where, cell.value, "is not a finite number", "run the stage again")


def _first_missing(columns: Sequence[Column], cells: Sequence[Cell]) -> tuple[Column, Cell] | None:
    pairs = zip(columns, cells, strict=True)
    return next(
        ((column, cell) for column, cell in pairs if cell.value is None and column.missing is None), None
    )


def _refuse_missing(columns: Sequence[Column], pool: Sequence[Candidate]) -> None:
    for candidate in pool:
        if missing := _first_missing(columns, candidate.cells):
            column, cell = missing
            raise PalioError(
                f"{candidate.entry}: {column.scenario}, {column.metric} is missing ({_why(cell)}) and "
                "scoring.missing is block; finish it, withdraw the entry, or change the policy"
            )


def _empty_stage(columns: Sequence[Column], candidate: Candidate) -> DidNotFinish | None:
    """Return the first stage without any value: under `exclude` the entry has no score there."""
    for stage in dict.fromkeys(column.stage for column in columns):
        cells = [cell for column, cell in zip(columns, candidate.cells, strict=True) if column.stage == stage]
        if all(cell.value is None for cell in cells):
            reason = f"no column of the {stage} stage has a value: {_why(cells[0])}"
            return candidate.unscored(stage, cells[0].state, reason)
    return None


def _scored(columns: Sequence[Column], pool: Sequence[Candidate], formula: Formula) -> list[ScoredEntry]:
    values = values_of([candidate.cells for candidate in pool])
    rates = np.stack(
        [formula.win_rates(column, values[:, index]) for index, column in enumerate(columns)],
        axis=1,
    )
    result = scores_of_win_rates(columns, rates.T, formula)
    rank = ranks(result.final)
    entries = [
        ScoredEntry(
            entry=candidate.entry,
            team=candidate.team,
            rank=int(rank[row]),
            final_score=float(result.final[row]),
            stage_scores={stage: float(scores[row]) for stage, scores in result.stages.items()},
            scenario_win_rates={
                stage: {
                    name: float(means[row]) for name, means in scenarios.items() if not np.isnan(means[row])
                }
                for stage, scenarios in result.scenarios.items()
            },
            cells=[
                cell.model_copy(update={"win_rate": None if np.isnan(rate) else float(rate)})
                for cell, rate in zip(candidate.cells, rates[row], strict=True)
            ],
            notes=[*_notes(columns, candidate, result, row, len(pool), formula), *candidate.notes],
            trained=candidate.trained,
            replicates=list(candidate.replicates),
        )
        for row, candidate in enumerate(pool)
    ]
    return sorted(entries, key=lambda scored: (scored.rank, scored.entry))


# --- footnotes ---------------------------------------------------------------------------------------


def _why(cell: Cell) -> str:
    state = cell.state.value.replace("_", " ")
    return f"{state}: {cell.reason}" if cell.reason else state


def _treatment(formula: Formula, column: Column) -> str:
    """Say how a missing value counts."""
    fills = formula.convention.fills_missing
    if fills is not None:
        fill = fills[0 if column.higher_is_better else 1]
        return f"counted as {fill:g}, the rule of {formula.convention.name}"
    if formula.missing_in(column) == "exclude":
        return "left out of the entry's mean"
    return "counted as worse than every value"


def _notes(
    columns: Sequence[Column], candidate: Candidate, result: Scores, row: int, n: int, formula: Formula
) -> list[str]:
    notes = []
    if n == 1:
        notes.append("The only entry: it has no rival, so every win rate is 1/2 by definition.")
    for column, cell in zip(columns, candidate.cells, strict=True):
        if cell.value is None:
            notes.append(
                f"{column.stage}, {column.scenario}: {column.metric} is missing ({_why(cell)}); "
                f"{_treatment(formula, column)}."
            )
    for stage, scores in result.stages.items():
        if scores[row] == 0:
            notes += [
                _zero_note(columns, candidate, stage, scenario)
                for scenario, means in result.scenarios[stage].items()
                if means[row] == 0
            ]
    return notes


def _zero_note(columns: Sequence[Column], candidate: Candidate, stage: str, scenario: str) -> str:
    values = [
        f"{column.metric} {'missing' if cell.value is None else format(cell.value, '.4g')}"
        for column, cell in zip(columns, candidate.cells, strict=True)
        if column.scenario_key == (stage, scenario)
    ]
    return (
        f"The {stage} score is 0 because the entry beats nobody in {scenario} ({', '.join(values)}): "
        "a geometric mean with a 0 in it is 0, whatever the other scenarios are."
    )


# --- from results on disk ------------------------------------------------------------------------------


@dataclass(frozen=True)
class FinishedEntry:
    """An entry with results in both stages."""

    candidate: Candidate
    records: Mapping[Stage, StageRecord]
    inputs: Mapping[str, str]
    """sha256 by path relative to the results folder."""
    number: int = 1
    """Of the training: 1 is the entry's own, the others are replicates."""


Due = Callable[[EntryFolder, AnyEntry], Mapping[str, str]]
"""Step -> why an entry has no result of it (`palio.planning.due`)."""


def unmade(folder: EntryFolder, entry: AnyEntry) -> Mapping[str, str]:
    """Return the steps that have no record, where there is no config to compare records with."""
    return {step.name: "not run yet" for step in steps_of(entry) if not step.record(folder).exists()}


Replicates = Callable[[EntryFolder], Sequence[EntryFolder]]
"""An entry's folder -> those of the replicates that count (`palio.workflow.Workflow.replicates`)."""


def score_track(
    competition: Competition,
    track: str,
    results: Results,
    entries: Mapping[str, AnyEntry],
    *,
    final: bool,
    due: Due = unmade,
    replicates: Replicates = EntryFolder.replicates,
) -> Leaderboard:
    """Score the results of a track's entries. What was made with other settings than the config's counts as
    not finished.

    Standings (`final=False`) score the entries that have finished; a final leaderboard needs every entry
    finished or withdrawn. A replicate that has not finished stops nobody: a footnote says why.

    Raises:
        PalioError: `final`, and an entry is neither finished nor withdrawn, or its tables do not match
            its records, or entries answered different instances.
    """
    outcomes = [
        _outcome(competition, results.entry(track, name), entry, due, replicates, final=final)
        for name, entry in entries.items()
    ]
    finished = [outcome for outcome in outcomes if isinstance(outcome, FinishedEntry)]
    columns = columns_of(competition)
    excluded = _on_other_instances(finished)
    if competition.scoring.missing == "block" and not final:
        excluded = _with_missing_values(columns, finished) | excluded
    stopped = [outcome for outcome in outcomes if isinstance(outcome, DidNotFinish)] + [*excluded.values()]
    unfinished = [one for one in stopped if one.state is not State.WITHDRAWN]
    if final and unfinished:
        listed = "; ".join(f"{one.entry} ({one.step}: {one.reason})" for one in unfinished)
        raise PalioError(
            f"{len(unfinished)} of {len(entries)} entries of {track} are neither finished nor withdrawn: "
            f"{listed}. Finish them, or list them under withdrawn in the config; "
            "`palio standings` scores the entries that have finished"
        )
    scored = [entry for entry in finished if entry.candidate.entry not in excluded]
    return score(
        competition=competition.competition,
        track=track,
        columns=columns,
        candidates=[entry.candidate for entry in scored],
        stage_weights=competition.stage_weights,
        convention=competition.scoring.convention,
        missing=competition.scoring.missing,
        final=final,
        did_not_finish=stopped,
        inputs={path: digest for entry in scored for path, digest in entry.inputs.items()},
    )


def _outcome(
    competition: Competition,
    folder: EntryFolder,
    entry: AnyEntry,
    due: Due,
    replicates: Replicates,
    *,
    final: bool,
) -> FinishedEntry | DidNotFinish:
    """Read an entry's results, or say why it has none."""
    name = folder.entry_id
    if name in competition.withdrawn:
        return Candidate(name, entry.team, ()).unscored("", State.WITHDRAWN, competition.withdrawn[name])
    try:
        if stopped := _unfinished_step(folder, entry, due(folder, entry)):
            return stopped
        own = read_finished(competition, folder, entry.team, trained=_is_trained(entry))
        found = [_replicate_outcome(competition, one, entry, due, own) for one in replicates(folder)]
        return with_replicates(own, found)
    except (PalioError, FileNotFoundError) as error:
        if final:
            raise
        # A job beside the standings may replace a table while it is read.
        return Candidate(name, entry.team, ()).unscored("open", State.CRASHED, str(error))


def _unfinished_step(folder: EntryFolder, entry: AnyEntry, due: Mapping[str, str]) -> DidNotFinish | None:
    """Return the first step without a result that holds, and why; None if the entry has finished."""
    steps = steps_of(entry, replicate=folder.replicate is not None)
    for step in (step for step in steps if step.ranked and step.name in due):
        state, reason, log = State.NOT_RUN, due[step.name], None
        if (path := folder.failure(step.name)).exists():
            failure = read_record(StepFailure, path)
            state, reason, log = failure.state, failure.reason, failure.log
        elif isinstance(entry, BrokenEntry):
            reason = "the entry file is not valid; run `palio check` to see why"
        elif step.record(folder).exists():
            reason = f"{reason}; run again, or restore the config"
        return DidNotFinish(
            entry=folder.entry_id, team=entry.team, step=step.name, state=state, reason=reason, log=log
        )
    return None


def _is_trained(entry: AnyEntry) -> bool:
    """Return whether a training decides the entry's results: here, or where the team's server was made."""
    return isinstance(entry, Entry) and (entry.trained or entry.server is not None)


# --- replicates ------------------------------------------------------------------------------------------


def _replicate_outcome(
    competition: Competition, folder: EntryFolder, entry: AnyEntry, due: Due, own: FinishedEntry
) -> FinishedEntry | str:
    """Read a replicate's results, or say in words why it does not count."""
    name = f"Training {folder.replicate} does not count"
    if stopped := _unfinished_step(folder, entry, due(folder, entry)):
        return f"{name}: {stopped.step}, {stopped.state.value.replace('_', ' ')}: {stopped.reason}."
    try:
        found = read_finished(competition, folder, entry.team)
    except (PalioError, FileNotFoundError) as error:
        return f"{name}: {error}."
    if _same_weights(folder):
        return f"{name}: its adapter is the one of another training, so the program ignores PALIO_SEED."
    if any(_basis(found.records[stage]) != _basis(own.records[stage]) for stage in STAGES):
        return (
            f"{name}: it was evaluated on other instances, or by another HELM version; run its stages again."
        )
    return found


def _same_weights(folder: EntryFolder) -> bool:
    """Return whether an earlier training of the entry has the same adapter."""
    if not folder.adapter_manifest.exists():
        return False
    earlier = [one for one in folder.own.replicates() if (one.replicate or 0) < (folder.replicate or 0)]
    manifests = [one.adapter_manifest for one in (folder.own, *earlier)]
    files = [read_record(AdapterManifest, path).files for path in manifests if path.exists()]
    return read_record(AdapterManifest, folder.adapter_manifest).files in files


def with_replicates(own: FinishedEntry, found: Sequence[FinishedEntry | str]) -> FinishedEntry:
    """Return an entry with its replicates, and as footnotes why others do not count."""
    finished = [one for one in found if isinstance(one, FinishedEntry)]
    candidate = replace(
        own.candidate,
        replicates=[Replicate(number=one.number, cells=list(one.candidate.cells)) for one in finished],
        notes=[one for one in found if isinstance(one, str)],
    )
    inputs = {path: digest for one in (own, *finished) for path, digest in one.inputs.items()}
    return replace(own, candidate=candidate, inputs=inputs)


def read_finished(
    competition: Competition, folder: EntryFolder, team: str, *, trained: bool = True
) -> FinishedEntry:
    """Read both stages of one entry or replicate and check its tables against its records.

    Raises:
        BadInput: a file does not exist, differs from its record, or belongs to another entry.
    """
    cells: list[Cell] = []
    records, inputs = {}, {}
    for stage in STAGES:
        path, tables = folder.stage_record(stage), folder.tables(stage)
        again = f"run helm_{stage} again"
        record = read_record(StageRecord, path)
        owner = (record.competition, record.track, record.entry, record.stage)
        if owner != (competition.competition, folder.track_id, folder.entry_id, stage):
            raise BadInput(path, why=f"is the record of {'/'.join(owner)}", fix=again)
        digests = {tables.metrics: record.metrics_sha256, tables.instances: record.instances_table_sha256}
        for table, digest in digests.items():
            if not table.exists():
                raise BadInput(table, why="no such table", fix=again)
            if file_sha256(table) != digest:
                raise BadInput(table, why=f"differs from {path.name}", fix=again)
        for file, digest in {**digests, path: file_sha256(path)}.items():
            inputs[file.relative_to(folder.results).as_posix()] = digest
        records[stage] = record
        metrics = pq.read_table(tables.metrics)
        cells += stage_cells(competition, stage, record.runs, metrics, str(tables.metrics))
    candidate = Candidate(folder.entry_id, team, cells, trained)
    return FinishedEntry(candidate, records, inputs, folder.replicate or 1)


def _basis(record: StageRecord) -> tuple[str, str]:
    """Return what the results of a stage must have in common to be compared."""
    return record.instances_sha256, record.helm_version


def _on_other_instances(finished: Sequence[FinishedEntry]) -> dict[str, DidNotFinish]:
    """Return the entries that were evaluated on other instances, or by another HELM, than most."""
    stopped: dict[str, DidNotFinish] = {}
    for stage in STAGES:
        records = [entry.records[stage] for entry in finished]
        basis = [_basis(record) for record in records]
        counts = Counter(basis)
        usual = max(sorted(counts), key=lambda key: counts[key], default=None)
        reason = (
            f"its {stage} stage was run on other instances, or by another HELM version, than most entries'; "
            f"run helm_{stage} again"
        )
        for entry, key in zip(finished, basis, strict=True):
            if key != usual:
                stopped[entry.candidate.entry] = entry.candidate.unscored(stage, State.NOT_RUN, reason)
    return stopped


def _with_missing_values(
    columns: Sequence[Column], finished: Sequence[FinishedEntry]
) -> dict[str, DidNotFinish]:
    """Return the entries with a missing value: under `block`, standings show them as not finished."""
    stopped = {}
    for candidate in (entry.candidate for entry in finished):
        if missing := _first_missing(columns, candidate.cells):
            column, cell = missing
            reason = f"{column.scenario}, {column.metric} is missing: {cell.reason}"
            stopped[candidate.entry] = candidate.unscored(column.stage, cell.state, reason)
    return stopped
