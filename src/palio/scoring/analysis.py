"""How far a leaderboard can be trusted, in one record.

`analyze` is pure; `analyze_track` reads the instances tables and contamination reports behind the
leaderboard. `palio.scoring.tables` writes the record beside the leaderboard.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from palio.config import Competition, Metric
from palio.errors import BadInput
from palio.layout import STAGES, EntryFolder, Results, Stage, replicate_name, stage_named
from palio.provenance import file_sha256, fingerprint
from palio.records import Analysis, Contamination, Leaderboard, ScoredEntry, read_record
from palio.scoring.columns import scored_metrics
from palio.scoring.conventions import Array
from palio.scoring.fall import NO_DATA
from palio.scoring.overfitting import overfitting
from palio.scoring.robustness import robustness
from palio.scoring.uncertainty import (
    REPLICATES,
    Answers,
    AnswersByScenario,
    Question,
    ScenarioAnswers,
    draw,
    interaction,
    mean_of_trainings,
    uncertainty_of,
)


def analyze(
    board: Leaderboard,
    answers: AnswersByScenario | None = None,
    contamination: Mapping[str, Contamination | str] | None = None,
    *,
    replicates: int = REPLICATES,
    panel: Sequence[str] = (),
    remark: str = "",
    training_noise: float | None = None,
) -> Analysis:
    """Analyze a leaderboard; for the arguments see `uncertainty`, `robustness` and `overfitting`."""
    drawn = intervals = None
    if board.entries:
        drawn = draw(board, answers or {}, replicates=replicates, training_noise=training_noise)
        intervals = uncertainty_of(board, drawn, remark)
    return Analysis(
        competition=board.competition,
        track=board.track,
        final=board.final,
        convention=board.convention,
        convention_version=board.convention_version,
        leaderboard_fingerprint=fingerprint(board.model_dump(mode="json")),
        uncertainty=intervals,
        robustness=robustness(board, panel, drawn.usable if drawn else None),
        overfitting=overfitting(board, intervals, contamination or {}, drawn),
    )


def analyze_track(competition: Competition, board: Leaderboard, results: Results) -> Analysis:
    """Analyze a leaderboard that `score_track` made from the same results folder.

    Raises:
        BadInput: a table is not the one that was scored.
    """
    scored = {entry.entry for entry in board.entries}
    return analyze(
        board,
        read_answers(competition, board, results),
        {name: _contamination(results.entry(board.track, name)) for name in scored},
        panel=[name for name in competition.scoring.reference_panel if name in scored],
        training_noise=competition.scoring.training_noise,
    )


def _contamination(folder: EntryFolder) -> Contamination | str:
    if folder.contamination.exists():
        return read_record(Contamination, folder.contamination)
    return "no contamination report yet" if folder.dataset.manifest.exists() else NO_DATA


# --- instances tables ----------------------------------------------------------------------------------


EntryAnswers = tuple[NDArray[np.int64], NDArray[np.float32]]
"""Numbers of the questions for which an entry has a value, and the values."""


def read_answers(competition: Competition, board: Leaderboard, results: Results) -> AnswersByScenario:
    """Read every scored entry's value on every question, over all its trainings, from the instances tables.

    Raises:
        BadInput: a table does not exist, is not the one that was scored, or holds an infinite value.
    """
    trainings = [_trainings(scored) for scored in sorted(board.entries, key=lambda scored: scored.entry)]
    answers: dict[tuple[str, str], ScenarioAnswers] = {}
    for stage in dict.fromkeys(stage_named(column.stage) for column in board.columns):
        scored = {str(of.column): of for of in scored_metrics(competition, stage)}
        columns = [column for column in board.columns if column.stage == stage]
        metrics = [scored[str(column)] for column in columns]
        questions: dict[str, dict[Question, int]] = {column.scenario: {} for column in columns}
        # Tables of strings are large: each becomes numbers before the next one is read.
        by_entry = []
        for names in trainings:
            of_entry: list[list[EntryAnswers]] = [[] for _ in columns]
            for name in names:
                path = _scored_table(board, results, name, stage)
                table = _InstancesTable(path, {of.metric.metric for of in metrics})
                for of_column, column, of in zip(of_entry, columns, metrics, strict=True):
                    of_column.append(table.answers(of.scenario, of.metric, questions[column.scenario]))
            by_entry.append(of_entry)
        for scenario, numbers in questions.items():
            indexes = [index for index, column in enumerate(columns) if column.scenario == scenario]
            by_column = [[entry_answers[index] for entry_answers in by_entry] for index in indexes]
            answers[stage, scenario] = _scenario_answers(numbers, by_column)
    return answers


def _trainings(scored: ScoredEntry) -> list[str]:
    """Return where the results of all trainings of an entry are: its id, and the names of its replicates."""
    return [scored.entry, *(replicate_name(scored.entry, one.number) for one in scored.replicates)]


def has_instances(board: Leaderboard, results: Results) -> bool:
    """Return whether a leaderboard was scored from instances tables; a published one has only its values."""
    return any(
        _table_key(results.entry(board.track, scored.entry).tables(stage).instances, results) in board.inputs
        for scored in board.entries
        for stage in STAGES
    )


def _table_key(path: Path, results: Results) -> str:
    """Return the name of a table in a leaderboard's inputs."""
    return path.relative_to(results.path).as_posix()


def _scored_table(board: Leaderboard, results: Results, entry: str, stage: Stage) -> Path:
    path = results.entry(board.track, entry).tables(stage).instances
    if not path.exists() or file_sha256(path) != board.inputs.get(_table_key(path, results)):
        raise BadInput(path, why="is not the table that was scored", fix="run `palio score` again")
    return path


ABSENT, UNKNOWN = -1, -2
"""Codes of a null, and of a word that is not in the table."""


class _InstancesTable:
    """An instances table with its strings as integer codes, which are fast to compare."""

    def __init__(self, path: Path, metrics: Collection[str]) -> None:
        texts = ["scenario", "run", "instance", "metric", "split", "perturbation"]
        filters = [("metric", "in", sorted(metrics))]
        table = pq.read_table(path, columns=[*texts, "value"], filters=filters)
        self.values = table["value"].to_numpy().astype(float)
        if np.isinf(self.values).any():
            raise BadInput(path, "value", "inf", why="is not a finite number", fix="run the stage again")
        self.codes: dict[str, NDArray[np.int64]] = {}
        self.words: dict[str, list[str]] = {}
        for name in texts:
            encoded = table[name].combine_chunks().dictionary_encode()
            self.codes[name] = encoded.indices.fill_null(ABSENT).to_numpy().astype(np.int64)
            self.words[name] = encoded.dictionary.to_pylist()

    def _is(self, name: str, word: str | None) -> NDArray[np.bool_]:
        words = self.words[name]
        code = ABSENT if word is None else words.index(word) if word in words else UNKNOWN
        return np.asarray(self.codes[name] == code)

    def answers(self, scenario: str, metric: Metric, questions: dict[Question, int]) -> EntryAnswers:
        """Return the entry's values in one column; new questions are added to `questions`.

        Perturbed forms of one question count as one answer: their mean.
        """
        rows = (
            self._is("scenario", scenario)
            & self._is("metric", metric.metric)
            & self._is("split", metric.split)
            & self._is("perturbation", metric.perturbation)
            & ~np.isnan(self.values)
        )
        runs, instances = self.words["run"], self.words["instance"]
        if metric.run is not None:
            rows &= np.isin(self.codes["run"], [code for code, run in enumerate(runs) if metric.run in run])
        pairs = self.codes["run"][rows] * len(instances) + self.codes["instance"][rows]
        distinct, inverse = np.unique(pairs, return_inverse=True)
        means = np.bincount(inverse, weights=self.values[rows]) / np.bincount(inverse)
        numbers = []
        for run, instance in (divmod(pair, len(instances)) for pair in distinct.tolist()):
            numbers.append(questions.setdefault((runs[run], instances[instance]), len(questions)))
        return np.array(numbers, dtype=np.int64), means.astype(np.float32)


def _scenario_answers(
    questions: Mapping[Question, int], columns: Sequence[Sequence[Sequence[EntryAnswers]]]
) -> ScenarioAnswers:
    """Return arrays over the questions sorted by run and instance id, in whatever order they were read.

    `columns` has the answers by column, entry, and training of the entry.
    """
    ordered = sorted(questions)
    position = np.empty(len(ordered), dtype=np.int64)
    position[[questions[question] for question in ordered]] = np.arange(len(ordered))
    run_number = {run: number for number, run in enumerate(sorted({run for run, _ in ordered}))}
    runs = np.array([run_number[run] for run, _ in ordered], dtype=np.int64)
    arrays: list[Answers | None] = []
    interactions: list[Array] = []
    for entries in columns:
        values = np.full((len(entries), len(ordered)), np.nan, dtype=np.float32)
        of_questions = np.full(len(entries), np.nan)
        for row, trainings in enumerate(entries):
            each = np.full((len(trainings), len(ordered)), np.nan, dtype=np.float32)
            for one, (numbers, known) in zip(each, trainings, strict=True):
                one[position[numbers]] = known
            values[row] = mean_of_trainings(each)
            of_questions[row] = interaction(each, runs) if len(each) > 1 else np.nan
        arrays.append(None if np.isnan(values).all() else values)
        interactions.append(of_questions)
    return ScenarioAnswers(runs, arrays, interactions, ordered)
