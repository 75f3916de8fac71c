"""The competition's columns, and one entry's cells in them, from the tidy table of HELM's statistics.

A column's value is the mean over the scenario's HELM runs (those whose name contains `Metric.run`, if
given) of the run's mean at (metric, split, perturbation). It exists only if **every** planned run gave
one: a mean over the runs that were done in time would compare different questions, so a partly
answered column is missing, with the state of the first run that is not there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pyarrow as pa

from palio.config import Competition, Metric
from palio.errors import BadInput, State
from palio.layout import STAGES
from palio.records import Cell, Column, HelmRun

StatisticKey = tuple[str, str, str, str | None]
"""run, metric, split, perturbation."""


def columns_of(competition: Competition, stage: str | None = None) -> list[Column]:
    """The scored columns of one stage, or of all, by name: the order of keys in a config decides nothing."""
    return [
        Column(stage=name, scenario=scenario, metric=metric, higher_is_better=settings.higher_is_better)
        for name in ([stage] if stage else STAGES)
        for scenario, of in sorted(competition.stage(name).scenarios.items())
        for metric, settings in sorted(of.metrics.items())
    ]


def stage_cells(
    competition: Competition, stage: str, runs: Sequence[HelmRun], metrics: pa.Table, source: str = "metrics"
) -> list[Cell]:
    """One entry's cells in the order of `columns_of(competition, stage)`.

    Args:
        runs: the planned HELM runs and how they ended, from the stage's record.
        metrics: the entry's table of the stage, METRICS_SCHEMA.
        source: names the table in an error.

    Raises:
        BadInput: a statistic stands twice, or is NaN or infinite.
    """
    statistics = _statistics(metrics, source)
    scenarios = competition.stage(stage).scenarios
    columns = [
        (one.scenario, scenarios[one.scenario].metrics[one.metric]) for one in columns_of(competition, stage)
    ]
    return [_cell(settings, planned_runs(runs, name, settings), statistics) for name, settings in columns]


def planned_runs(runs: Sequence[HelmRun], scenario: str, metric: Metric) -> list[HelmRun]:
    """The runs a column is the mean of."""
    return [run for run in runs if run.scenario == scenario and (metric.run is None or metric.run in run.run)]


def _statistics(metrics: pa.Table, source: str) -> dict[StatisticKey, tuple[float | None, int]]:
    found: dict[StatisticKey, tuple[float | None, int]] = {}
    for row in metrics.select(["run", "metric", "split", "perturbation", "value", "n"]).to_pylist():
        key = (row["run"], row["metric"], row["split"], row["perturbation"])
        if key in found:
            raise BadInput(source, f"{key[1]} of {key[0]}", None, "stands twice; run the stage again")
        value = row["value"]
        if value is not None and not math.isfinite(value):
            raise BadInput(source, f"{key[1]} of {key[0]}", value, "is no number; run the stage again")
        found[key] = (value, row["n"])
    return found


def _cell(
    metric: Metric, runs: Sequence[HelmRun], statistics: dict[StatisticKey, tuple[float | None, int]]
) -> Cell:
    if not runs:
        which = f"whose name contains {metric.run!r}" if metric.run else "at all"
        return Cell(value=None, state=State.NOT_RUN, reason=f"the scenario has no HELM run {which}")
    missing = [run for run in runs if run.state is not State.FINISHED]
    if missing:
        done = len(runs) - len(missing)
        first = missing[0]
        why = first.reason or first.state.value.replace("_", " ")
        return Cell(value=None, state=first.state, reason=f"{done} of {len(runs)} runs done: {why}")
    values: list[float] = []
    n = 0
    for run in runs:
        value, count = statistics.get((run.run, metric.metric, metric.split, metric.perturbation), (None, -1))
        if value is None:
            return _no_statistic(metric, run, recorded=count >= 0)
        values.append(value)
        n += count or run.answered  # HELM keeps no instance values of worst cases
    return Cell(value=math.fsum(values) / len(values), n=n)


def _no_statistic(metric: Metric, run: HelmRun, *, recorded: bool) -> Cell:
    if recorded and metric.metric.startswith("bias_metric"):
        return Cell(
            value=None, state=State.NO_MENTION, reason=f"no completion of {run.run} mentions the groups"
        )
    name = f"{metric.metric} ({metric.split}{', ' + metric.perturbation if metric.perturbation else ''})"
    return Cell(value=None, state=State.NOT_RUN, reason=f"HELM reports no {name} for {run.run}")
