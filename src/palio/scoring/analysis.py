"""Everything that says how far a leaderboard can be trusted, in one record.

`analyse` is pure; `analyse_track` reads the instances tables and contamination reports that belong to
the leaderboard. `palio.scoring.tables` writes it beside the leaderboard.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from palio.config import Competition, Metric
from palio.errors import BadInput
from palio.layout import Results, Stage, stage_named
from palio.provenance import file_sha256, fingerprint
from palio.records import Analysis, Contamination, Leaderboard, read_record
from palio.scoring.overfitting import overfitting
from palio.scoring.robustness import robustness
from palio.scoring.uncertainty import (
    REPLICATES,
    Answers,
    AnswersByScenario,
    ScenarioAnswers,
    uncertainty,
)


def analyse(
    board: Leaderboard,
    answers: AnswersByScenario | None = None,
    contamination: Mapping[str, Contamination | str] | None = None,
    *,
    replicates: int = REPLICATES,
    seed: int = 0,
    panel: Sequence[str] = (),
    remark: str = "",
) -> Analysis:
    """Args as of `uncertainty`, `robustness` and `overfitting`."""
    sureness = uncertainty(board, answers or {}, replicates=replicates, seed=seed, remark=remark)
    return Analysis(
        competition=board.competition,
        track=board.track,
        final=board.final,
        convention=board.convention,
        convention_version=board.convention_version,
        leaderboard_fingerprint=fingerprint(board.model_dump(mode="json")),
        uncertainty=sureness,
        robustness=robustness(board, panel),
        overfitting=overfitting(board, sureness, contamination or {}),
    )


def analyse_track(
    competition: Competition,
    board: Leaderboard,
    results: Results,
    *,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> Analysis:
    """Analyse a leaderboard made by `score_track` from the same results folder.

    Raises:
        BadInput: a table is not the one that was scored.
    """
    panel = competition.scoring.reference_panel
    there = {one.entry for one in board.entries}
    return analyse(
        board,
        read_answers(competition, board, results),
        _contamination(board, results),
        replicates=replicates,
        seed=seed,
        panel=[entry for entry in panel if entry in there],
    )


def _contamination(board: Leaderboard, results: Results) -> dict[str, Contamination | str]:
    found: dict[str, Contamination | str] = {}
    for one in board.entries:
        folder = results.entry(board.track, one.entry)
        if folder.contamination.exists():
            found[one.entry] = read_record(Contamination, folder.contamination)
        elif folder.dataset.manifest.exists():
            found[one.entry] = "no contamination report yet"
        else:
            found[one.entry] = "no training data"
    return found


# --- instances tables ----------------------------------------------------------------------------------


def read_answers(competition: Competition, board: Leaderboard, results: Results) -> AnswersByScenario:
    """Every scored entry's value on every question, by (stage, scenario), from the instances tables.

    Raises:
        BadInput: a table is absent or not the one that was scored, or holds a value that is no number.
    """
    entries = sorted(one.entry for one in board.entries)
    found: dict[tuple[str, str], ScenarioAnswers] = {}
    for stage in dict.fromkeys(stage_named(column.stage) for column in board.columns):
        scenarios = competition.stage(stage).scenarios
        columns = [column for column in board.columns if column.stage == stage]
        metrics = [scenarios[column.scenario].metrics[column.metric] for column in columns]
        questions: dict[str, dict[Question, int]] = {scenario: {} for scenario in scenarios}
        # Compact as soon as read: one table of strings at a time.
        answered = []
        for entry in entries:
            table = _Instances(_scored_table(board, results, entry, stage), {one.metric for one in metrics})
            answered.append(
                [
                    table.answers(column.scenario, metric, questions[column.scenario])
                    for column, metric in zip(columns, metrics, strict=True)
                ]
            )
        for scenario, numbers in questions.items():
            places = [place for place, column in enumerate(columns) if column.scenario == scenario]
            found[stage, scenario] = _scenario_answers(
                numbers, [[of_entry[place] for of_entry in answered] for place in places]
            )
    return found


Question = tuple[str, str]
"""HELM run, instance id."""
EntryAnswers = tuple[NDArray[np.int64], NDArray[np.float32]]
"""Numbers of the questions that an entry has a value for, and the values."""


def _scored_table(board: Leaderboard, results: Results, entry: str, stage: Stage) -> Path:
    path = results.entry(board.track, entry).tables(stage).instances
    key = path.relative_to(results.path).as_posix()
    if not path.exists() or file_sha256(path) != board.inputs.get(key):
        raise BadInput(path, "", None, "is not the table that was scored; run `palio score` again")
    return path


class _Instances:
    """One instances table with every text as a number: comparing a column of numbers is cheap."""

    def __init__(self, path: Path, scored_metrics: Collection[str]) -> None:
        texts = ["scenario", "run", "instance", "metric", "split", "perturbation"]
        wanted = [("metric", "in", sorted(scored_metrics))]
        table = pq.read_table(path, columns=[*texts, "value"], filters=wanted)
        self.values = table["value"].to_numpy().astype(float)
        if np.isinf(self.values).any():
            raise BadInput(path, "value", "inf", "is no number; run the stage again")
        self.codes: dict[str, NDArray[np.int64]] = {}
        self.words: dict[str, list[str]] = {}
        for name in texts:
            coded = table[name].combine_chunks().dictionary_encode()
            self.codes[name] = coded.indices.fill_null(ABSENT).to_numpy().astype(np.int64)
            self.words[name] = coded.dictionary.to_pylist()

    def _is(self, name: str, word: str) -> NDArray[np.bool_]:
        words = self.words[name]
        wanted = words.index(word) if word in words else UNKNOWN
        return np.asarray(self.codes[name] == wanted)

    def answers(self, scenario: str, metric: Metric, questions: dict[Question, int]) -> EntryAnswers:
        """The entry's values in one column; questions not met before get the next number.

        Several perturbed forms of one question count as one answer: their mean.
        """
        rows = (
            self._is("scenario", scenario)
            & self._is("metric", metric.metric)
            & self._is("split", metric.split)
            & ~np.isnan(self.values)
        )
        if metric.perturbation is None:
            rows &= self.codes["perturbation"] == ABSENT
        else:
            rows &= self._is("perturbation", metric.perturbation)
        if metric.run is not None:
            named = [place for place, run in enumerate(self.words["run"]) if metric.run in run]
            rows &= np.isin(self.codes["run"], named)
        runs, instances = self.words["run"], self.words["instance"]
        pairs = self.codes["run"][rows] * len(instances) + self.codes["instance"][rows]
        asked, place = np.unique(pairs, return_inverse=True)
        means = np.bincount(place, weights=self.values[rows]) / np.bincount(place)
        numbers = [
            questions.setdefault(
                (runs[pair // len(instances)], instances[pair % len(instances)]), len(questions)
            )
            for pair in asked.tolist()
        ]
        return np.array(numbers, dtype=np.int64), means.astype(np.float32)


ABSENT, UNKNOWN = -1, -2


def _scenario_answers(
    questions: Mapping[Question, int], columns: Sequence[Sequence[EntryAnswers]]
) -> ScenarioAnswers:
    """Arrays over the questions in the order of run and instance id, whatever order they were read in."""
    ordered = sorted(questions)
    place = np.empty(len(ordered), dtype=np.int64)
    place[[questions[question] for question in ordered]] = np.arange(len(ordered))
    run_number = {run: number for number, run in enumerate(sorted({run for run, _ in ordered}))}
    arrays: list[Answers | None] = []
    for entries in columns:
        values = np.full((len(entries), len(ordered)), np.nan, dtype=np.float32)
        for row, (numbers, known) in zip(values, entries, strict=True):
            row[place[numbers]] = known
        arrays.append(None if np.isnan(values).all() else values)
    return ScenarioAnswers(np.array([run_number[run] for run, _ in ordered], dtype=np.int64), arrays)
