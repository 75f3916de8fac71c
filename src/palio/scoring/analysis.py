"""Everything that says how far a leaderboard can be trusted, in one record.

`analyse` is pure; `analyse_track` reads the instances tables and contamination reports that belong to
the leaderboard; `write_analysis` writes <track>.analysis.json beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from palio.config import Competition, Metric
from palio.errors import BadInput
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
    results: Path,
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


def write_analysis(analysis: Analysis, folder: Path, name: str | None = None) -> Path:
    """<folder>/<name>.analysis.json; the name is the track's by default."""
    path = folder / f"{name or analysis.track}.analysis.json"
    analysis.write(path)
    return path


def _contamination(board: Leaderboard, results: Path) -> dict[str, Contamination | str]:
    found: dict[str, Contamination | str] = {}
    for one in board.entries:
        folder = results / board.track / one.entry
        path = folder / "contamination.json"
        if path.exists():
            found[one.entry] = read_record(Contamination, path)
        elif (folder / "dataset" / "manifest.json").exists():
            found[one.entry] = "no contamination report yet"
        else:
            found[one.entry] = "no training data"
    return found


# --- instances tables ----------------------------------------------------------------------------------


def read_answers(competition: Competition, board: Leaderboard, results: Path) -> AnswersByScenario:
    """Every scored entry's value on every question, by (stage, scenario), from the instances tables.

    Raises:
        BadInput: a table is absent or not the one that was scored, or holds a value that is no number.
    """
    entries = sorted(one.entry for one in board.entries)
    found: dict[tuple[str, str], ScenarioAnswers] = {}
    for stage in dict.fromkeys(column.stage for column in board.columns):
        tables = [_instances_table(competition, stage, board, results, entry) for entry in entries]
        for scenario, of in competition.stage(stage).scenarios.items():
            columns = [
                column for column in board.columns if (column.stage, column.scenario) == (stage, scenario)
            ]
            mine = [table[table["scenario"] == scenario] for table in tables]
            found[stage, scenario] = _scenario_answers(
                mine, [of.metrics[column.metric] for column in columns]
            )
    return found


def _instances_table(
    competition: Competition, stage: str, board: Leaderboard, results: Path, entry: str
) -> pd.DataFrame:
    """Columns scenario, question, run, metric, split, perturbation, value; only metrics that are scored."""
    path = results / board.track / entry / "helm" / stage / "instances.parquet"
    key = path.relative_to(results).as_posix()
    if not path.exists() or file_sha256(path) != board.inputs.get(key):
        raise BadInput(path, "", None, "is not the table that was scored; run `palio score` again")
    scored = {
        metric.metric for of in competition.stage(stage).scenarios.values() for metric in of.metrics.values()
    }
    wanted = ["scenario", "run", "instance", "metric", "split", "perturbation", "value"]
    frame: pd.DataFrame = pq.read_table(
        path, columns=wanted, filters=[("metric", "in", sorted(scored))]
    ).to_pandas()
    if np.isinf(frame["value"].to_numpy(dtype=float)).any():
        raise BadInput(path, "value", "inf", "is no number; run the stage again")
    frame["question"] = frame["run"] + "\n" + frame["instance"]
    return frame


def _scenario_answers(tables: Sequence[pd.DataFrame], metrics: Sequence[Metric]) -> ScenarioAnswers:
    questions = pd.Index(sorted(set().union(*(table["question"].unique() for table in tables))))
    run_of = [str(question).partition("\n")[0] for question in questions]
    number = {run: place for place, run in enumerate(sorted(set(run_of)))}
    columns: list[Answers | None] = []
    for metric in metrics:
        values = np.full((len(tables), len(questions)), np.nan, dtype=np.float32)
        for place, table in enumerate(tables):
            rows = table[_of_metric(table, metric)]
            # Several perturbed forms of one question count as one answer: their mean.
            by_question = rows.groupby("question")["value"].mean()
            values[place, questions.get_indexer(by_question.index)] = by_question.to_numpy()
        columns.append(None if np.isnan(values).all() else values)
    return ScenarioAnswers(np.array([number[run] for run in run_of], dtype=np.int64), columns)


def _of_metric(table: pd.DataFrame, metric: Metric) -> pd.Series[bool]:
    plain = table["perturbation"].isna()
    asked = plain if metric.perturbation is None else table["perturbation"] == metric.perturbation
    wanted = (table["metric"] == metric.metric) & (table["split"] == metric.split) & asked
    if metric.run is not None:
        wanted &= table["run"].str.contains(metric.run, regex=False)
    return wanted
