"""How fast a large competition is analyzed: `python benchmarks/scoring.py`.

500 entries x 50 columns, 1000 bootstrap replicates of 5000 instances; the goal is 20 s and 2 GB on two
cores. The 50 columns are 10 scenarios of 5 metrics, 500 instances each, in HELM runs of 50 (drawn by
whole runs) or of 100 (drawn by instances). Baselines compute the same replicates, a few of them:

With `--trainings 3`, every entry has replicates, and the intervals cover the noise of training too.

    naive   a Python loop over replicates, entries, columns and instances
    pandas  resampling by numpy indices, means by pandas, scipy.stats.rankdata along each column

Timings differ between machines; the ratios are what carries over. `--replicates`, `--entries` and
`--instances` change the size; `--growth` prints time per entry x instance x replicate for several sizes;
`--long` also takes every one of the 50 columns over all 5000 instances, ten times the work.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from palio.records import Cell, Column, Leaderboard, Replicate
from palio.scoring.analysis import analyze
from palio.scoring.leaderboard import Candidate, score
from palio.scoring.uncertainty import ScenarioAnswers, uncertainty

SCENARIOS = 10
METRICS = 5
GOAL_SECONDS, GOAL_GB = 20, 2
Answers = dict[tuple[str, str], ScenarioAnswers]


def made_up_answers(entries: int, instances: int, seed: int = 0) -> tuple[list[Column], Answers]:
    """0/1 answers of entries of different skill to questions of different difficulty."""
    generator = np.random.default_rng(seed)
    skill = generator.normal(size=(entries, 1))
    per_scenario = instances // SCENARIOS
    columns, answers = [], {}
    for number in range(SCENARIOS):
        stage = "open" if number < SCENARIOS // 2 else "closed"
        key = (stage, f"scenario{number}")
        size = per_scenario // 10 if number % 2 else per_scenario // 5
        runs = np.arange(per_scenario) // max(size, 1)
        of_scenario = []
        for metric in range(METRICS):
            columns.append(Column(stage=stage, scenario=key[1], metric=f"metric{metric}"))
            difficulty = generator.normal(size=(1, per_scenario))
            right = generator.random((entries, per_scenario)) < 1 / (1 + np.exp(difficulty - skill))
            of_scenario.append(right.astype(np.float32))
        answers[key] = ScenarioAnswers(runs.astype(np.int64), of_scenario)
    return columns, answers


def long_columns(entries: int, instances: int) -> tuple[list[Column], Answers]:
    """Two scenarios whose 50 columns each hold a value for every instance, in HELM runs of a fifth."""
    generator = np.random.default_rng(0)
    runs = np.arange(instances) * 5 // instances
    columns, answers = [], {}
    for stage in ("open", "closed"):
        of_stage = []
        for metric in range(SCENARIOS * METRICS // 2):
            columns.append(Column(stage=stage, scenario=stage, metric=f"metric{metric}"))
            of_stage.append(
                (generator.random((entries, instances), dtype=np.float32) < 0.5).astype(np.float32)
            )
        answers[stage, stage] = ScenarioAnswers(runs, of_stage)
    return columns, answers


def leaderboard(columns: list[Column], answers: Answers, trainings: int = 1) -> Leaderboard:
    """Scores of the first training; the others are as much better as worse, so the answers are their mean."""
    generator = np.random.default_rng(1)

    def replicates(row: int) -> list[Replicate]:
        shift = generator.normal(scale=0.01, size=(trainings - 1, values.shape[1]))
        shift -= shift.mean(axis=0) if trainings > 1 else 0
        return [
            Replicate(number=number + 2, cells=[Cell(value=float(value), n=1) for value in values[row] + of])
            for number, of in enumerate(shift)
        ]

    values = np.stack(
        [of.mean(axis=1) for scenario in answers.values() for of in scenario.columns if of is not None],
        axis=1,
    )
    candidates = [
        Candidate(
            f"entry{row:04}",
            f"team{row // 3}",
            [Cell(value=float(value), n=1) for value in of],
            replicates=replicates(row),
        )
        for row, of in enumerate(values)
    ]
    return score(
        competition="benchmark",
        track="benchmark",
        columns=columns,
        candidates=candidates,
        stage_weights={"open": 1 / 3, "closed": 2 / 3},
        final=True,
    )


def naive_replicate(columns: list[Column], answers: Answers, generator: random.Random) -> list[float]:
    """One replicate in plain Python: every loop written out."""
    rates: dict[tuple[str, str], list[list[float]]] = {}
    for key, scenario in answers.items():
        drawn = [generator.randrange(len(scenario.runs)) for _ in scenario.runs]
        for column in scenario.columns:
            assert column is not None
            rows = column.tolist()
            values = [sum(row[place] for place in drawn) / len(drawn) for row in rows]
            rate = []
            for own in values:
                worse = sum(other < own for other in values)
                ties = sum(other == own for other in values)
                rate.append((worse + (ties - 1) / 2) / (len(values) - 1))
            rates.setdefault(key, []).append(rate)
    return final_of([(stage, np.mean(of, axis=0)) for (stage, _), of in rates.items()])


def pandas_replicate(columns: list[Column], answers: Answers, generator: np.random.Generator) -> list[float]:
    means = []
    for (stage, _), scenario in answers.items():
        drawn = generator.integers(len(scenario.runs), size=len(scenario.runs))
        frame = pd.DataFrame(
            {
                number: pd.DataFrame(of[:, drawn]).mean(axis=1)
                for number, of in enumerate(scenario.columns)
                if of is not None
            }
        )
        rate = frame.apply(lambda values: (stats.rankdata(values) - 1) / (len(values) - 1))
        means.append((stage, rate.mean(axis=1).to_numpy()))
    return final_of(means)


def final_of(means: list[tuple[str, np.ndarray]]) -> list[float]:
    weight = {"open": 1 / 3, "closed": 2 / 3}
    return list(
        sum(
            share * stats.gmean([of for at, of in means if at == stage], axis=0)
            for stage, share in weight.items()
        )
    )


def seconds(work: Callable[[], object], times: int = 1) -> float:
    started = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - started) / times


def peak_gb() -> float:
    """Of this process alone: ru_maxrss would count what started it, too."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) / 1024**2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--entries", type=int, default=500)
    parser.add_argument("--instances", type=int, default=5000)
    parser.add_argument("--replicates", type=int, default=1000)
    parser.add_argument("--trainings", type=int, default=1)
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--long", action="store_true")
    options = parser.parse_args()

    columns, answers = made_up_answers(options.entries, options.instances)
    board = leaderboard(columns, answers, options.trainings)
    process = time.process_time()
    wall = seconds(lambda: analyze(board, answers, replicates=options.replicates))
    cpu = time.process_time() - process
    memory = peak_gb()
    print(
        f"{options.entries} entries x {len(columns)} columns, {options.replicates} replicates of "
        f"{options.instances} instances: {wall:.1f} s wall, {cpu:.1f} s CPU, {memory:.2f} GB at most "
        f"(goal {GOAL_SECONDS} s, {GOAL_GB} GB)"
    )
    bootstrap = seconds(lambda: uncertainty(board, answers, replicates=options.replicates))
    ours = bootstrap / options.replicates
    naive = seconds(lambda: naive_replicate(columns, answers, random.Random(0)))
    by_pandas = seconds(lambda: pandas_replicate(columns, answers, np.random.default_rng(0)), times=3)
    print(f"bootstrap alone: {bootstrap:.1f} s, {ours * 1000:.1f} ms a replicate")
    print(f"naive Python loop: {naive * 1000:.0f} ms a replicate, {naive / ours:.0f} x ours")
    print(f"numpy + pandas + scipy: {by_pandas * 1000:.0f} ms a replicate, {by_pandas / ours:.1f} x ours")
    if options.growth:
        for entries, instances, replicates in (
            (250, 5000, 500),
            (500, 2500, 500),
            (500, 5000, 250),
            (500, 5000, 500),
        ):
            fewer, some = made_up_answers(entries, instances)
            small = leaderboard(fewer, some)
            took = seconds(partial(uncertainty, small, some, replicates=replicates))
            each = took / (entries * instances * replicates) * 1e9
            print(f"{entries} x {instances} x {replicates}: {took:.2f} s, {each:.2f} ns each")
    if options.long:
        columns, answers = long_columns(options.entries, options.instances)
        board = leaderboard(columns, answers)
        took = seconds(lambda: uncertainty(board, answers, replicates=options.replicates))
        peak = peak_gb()
        print(f"every column over all instances, bootstrap: {took:.1f} s, {peak:.2f} GB at most")
    return 0 if wall <= GOAL_SECONDS and memory <= GOAL_GB else 1


if __name__ == "__main__":
    sys.exit(main())
