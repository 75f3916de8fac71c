"""The competition's columns, and one entry's cells in them, from the tidy table of HELM's statistics.

A column's value is the mean over the scenario's HELM runs (those whose name contains `Metric.run`, if
given) of the run's mean at (metric, split, perturbation). It exists only if **every** planned run gave
one: a mean over the runs that finished in time would compare different questions. So a partly answered
column is missing, with the state of the first run that did not finish.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import pyarrow as pa

from palio.config import Competition, Metric
from palio.errors import BadInput, State
from palio.layout import STAGES, stage_named
from palio.records import Cell, Column, HelmRun
from palio.scoring.conventions import TIE

BIAS_METRICS = "bias_metric"
"""Begins HELM's names of metrics that have no value where no completion mentions the groups."""
Statistics = dict[tuple[str, str, str, str | None], tuple[float | None, int]]
"""(run, metric, split, perturbation) -> (mean, number of instances)."""


@dataclass(frozen=True)
class ScoredMetric:
    """A column, and what fills it."""

    column: Column
    scenario: str
    """Scenario whose runs are averaged; the column's own differs if its metric names a group."""
    metric: Metric


def scored_metrics(competition: Competition, stage: str | None = None) -> list[ScoredMetric]:
    """Return what one stage, or all, is scored by, sorted by the columns' names whatever the config's order.

    A stage of weight 0 and a scenario with `scored: false` have no columns.
    """
    found = [
        ScoredMetric(_column(name, scenario, title, metric), scenario, metric)
        for name in ([stage] if stage else STAGES)
        if competition.stage(name).weight > 0
        for scenario, settings in competition.stage(name).scenarios.items()
        if settings.scored
        for title, metric in settings.metrics.items()
    ]
    order = {name: place for place, name in enumerate(STAGES)}
    return sorted(
        found, key=lambda of: (order[stage_named(of.column.stage)], of.column.scenario, of.column.metric)
    )


def _column(stage: str, scenario: str, title: str, metric: Metric) -> Column:
    bias = metric.metric.startswith(BIAS_METRICS)
    return Column(
        stage=stage,
        scenario=metric.group or scenario,
        metric=f"{scenario} {title}" if metric.group else title,
        higher_is_better=metric.higher_is_better,
        missing=metric.missing or ("exclude" if bias else None),
    )


def columns_of(competition: Competition, stage: str | None = None) -> list[Column]:
    """Return the scored columns of one stage, or of all, sorted by name whatever the order in the config."""
    return [of.column for of in scored_metrics(competition, stage)]


def stage_cells(
    competition: Competition, stage: str, runs: Sequence[HelmRun], metrics: pa.Table, source: str = "metrics"
) -> list[Cell]:
    """Return one entry's cells in the order of `columns_of(competition, stage)`.

    Args:
        runs: the planned HELM runs and how they ended, from the stage's record.
        metrics: the entry's table of the stage, METRICS_SCHEMA.
        source: name of the table in errors.

    Raises:
        BadInput: a statistic is duplicated, NaN, or infinite.
    """
    statistics = _statistics(metrics, source)
    return [
        _cell(of.metric, planned_runs(runs, of.scenario, of.metric), statistics)
        for of in scored_metrics(competition, stage)
    ]


def planned_runs(runs: Sequence[HelmRun], scenario: str, metric: Metric) -> list[HelmRun]:
    """Return the runs whose values a column averages."""
    return [run for run in runs if run.scenario == scenario and (metric.run is None or metric.run in run.run)]


def _statistics(metrics: pa.Table, source: str) -> Statistics:
    statistics: Statistics = {}
    for row in metrics.select(["run", "metric", "split", "perturbation", "value", "n"]).to_pylist():
        key = (row["run"], row["metric"], row["split"], row["perturbation"])
        name, value = f"{row['metric']} of {row['run']}", row["value"]
        if key in statistics:
            raise BadInput(source, name, why="is duplicated", fix="run the stage again")
        if value is not None and not math.isfinite(value):
            raise BadInput(source, name, value, why="is not a finite number", fix="run the stage again")
        statistics[key] = (value, row["n"])
    return statistics


def _cell(metric: Metric, runs: Sequence[HelmRun], statistics: Statistics) -> Cell:
    if not runs:
        which = f"whose name contains {metric.run!r}" if metric.run else "at all"
        return Cell(value=None, state=State.NOT_RUN, reason=f"the scenario has no HELM run {which}")
    missing = [run for run in runs if run.state is not State.FINISHED]
    if missing:
        state = missing[0].state
        why = missing[0].reason or state.value.replace("_", " ")
        finished = len(runs) - len(missing)
        return Cell(value=None, state=state, reason=f"{finished} of {len(runs)} runs finished: {why}")
    means: list[tuple[float, int]] = []
    for run in runs:
        value, count = statistics.get((run.run, metric.metric, metric.split, metric.perturbation), (None, -1))
        if value is None:
            return _no_statistic(metric, run, recorded=count >= 0)
        means.append((value, count or run.answered))  # HELM keeps no instance values of worst cases
    return Cell(value=mean_of_runs(means), n=sum(n for _, n in means))


def mean_of_runs(means: Sequence[tuple[float, int]]) -> float:
    """Return the mean of (mean, number of instances) of the runs, such that equal results are equal floats.

    A run's mean that is a count over its instances is used as that fraction, so the result is exact. If one
    is not, as with ROUGE, the result is rounded to 12 significant digits: the others depend on the order of
    HELM's additions.
    """
    total, exact = Fraction(0), True
    for mean, n in means:
        count = round(mean * n)
        if n and math.isclose(mean * n, count, rel_tol=TIE):
            total += Fraction(count, n)
        else:
            total, exact = total + Fraction(mean), False
    value = float(total / len(means))
    return value if exact else float(f"{value:.12g}")


def _no_statistic(metric: Metric, run: HelmRun, *, recorded: bool) -> Cell:
    if recorded and metric.metric.startswith(BIAS_METRICS):
        state, reason = State.NO_MENTION, f"no completion of {run.run} mentions the groups"
    else:
        name = f"{metric.metric} ({metric.split}{', ' + metric.perturbation if metric.perturbation else ''})"
        state, reason = State.NOT_RUN, f"HELM reports no {name} for {run.run}"
    return Cell(value=None, state=state, reason=reason)
