"""The published tables of NeurIPS 2023: recomputed cell by cell, and read as Palio leaderboards.

A file is a list of [entry, {column: value}]. Metric columns are called "<scenario> - <metric>"; all
others are derived from them, and `recompute` derives them again from the metric columns alone:

    <track>_open_round_rank.json          groups Accuracy, Robustness, Fairness         helm2023
    <track>_hidden_round_rank.json        five scenarios                                 hidden2023
    <track>_full_ranks_final_round.json   five open and four hidden scenarios, 1/3, 2/3  final2023

Names of one entry differ between the rounds; `stable_id` maps them to one id. The tables do not say
how many instances stand behind a value; `implied_instances` reads it off the values where they are
proportions.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from palio.errors import BadInput, State
from palio.provenance import file_sha256
from palio.records import Cell, Column, Correlation, Leaderboard, Part
from palio.scoring.conventions import CONVENTIONS
from palio.scoring.formula import Formula, scores
from palio.scoring.leaderboard import Candidate, score
from palio.scoring.overfitting import pearson

TOLERANCE = 1e-12
REMARK = (
    "The published tables do not say how many instances stand behind a value: the number is read off the "
    "values where they are whole multiples of 1/n, and taken as 100 elsewhere."
)
"""For the explanation of these leaderboards' uncertainty."""
ASSUMED_INSTANCES = 100
"""Behind a published value that is no proportion (ROUGE, a mean over subjects): a guess, and said so."""
MOST_INSTANCES = 1000
OPEN_SCENARIOS = ("MMLU", "TruthfulQA", "BIG-bench", "GSM8K", "BBQ")
LOWER_IS_BETTER = ("Stereotypes", "Representation")
HIGHER_IS_BETTER = ("EM", "ROUGE-2", "Equivalent")
WEIGHTS = {"open": 1 / 3, "closed": 2 / 3}
# Names of one entry differ between the rounds' files: endings that come and go, and other spellings.
ENDINGS = ("_hidden", "_reproduce_eval", "_lit_gpt")
ALIASES = {
    "tvergho_lm_neurips_train": "tvergho_llm_neurips_train",
    "datta0_neurips_submission_1": "datta0_neurips_submission",
    "mrigankramanllm_compa100_submissionsa100_1st_submission": (
        "mrigankraman_llm_comp_a100_submissions_a100_1st_submission"
    ),
}

RoundName = Literal["open", "hidden", "final"]

Values = dict[str, dict[str, float | None]]
"""entry as published -> column -> value."""


@dataclass(frozen=True)
class Round:
    name: RoundName
    suffix: str
    convention: str
    score_names: Mapping[str, str]
    """Derived score column -> "final", or the stage it is the score of."""


ROUNDS = (
    Round("open", "_open_round_rank.json", "helm2023", {"Score": "final"}),
    Round("hidden", "_hidden_round_rank.json", "hidden2023", {"Score": "final"}),
    Round(
        "final",
        "_full_ranks_final_round.json",
        "final2023",
        {"Score_full": "final", "Score_open": "open", "Score_hidden": "closed"},
    ),
)


class PublishedFile(Part):
    """How one file compares with what its own metric columns give."""

    file: str
    track: str
    round: RoundName
    convention: str
    entries: int
    cells: int
    """Derived cells: mean win rates and scores."""
    mismatches: int
    """Cells that differ by more than 1e-12, or are absent."""
    max_abs_error: float

    def __str__(self) -> str:
        return (
            f"{self.file}: entries {self.entries}, cells {self.cells}, mismatches {self.mismatches}, "
            f"max_abs_error {self.max_abs_error:.2e}"
        )


class Published(Part):
    """All published files of a folder, recomputed."""

    files: list[PublishedFile]
    open_against_hidden: dict[str, Correlation]
    """Pearson's correlation by track, between the open and hidden scores of the entries in both rounds."""

    @property
    def cells(self) -> int:
        return sum(one.cells for one in self.files)

    @property
    def mismatches(self) -> int:
        return sum(one.mismatches for one in self.files)

    @property
    def max_abs_error(self) -> float:
        return max(one.max_abs_error for one in self.files)


@dataclass(frozen=True)
class Table:
    """One published file, read."""

    path: Path
    track: str
    round: Round
    values: Values
    columns: tuple[Column, ...]
    names: tuple[str, ...]
    """Published name of each of `columns`."""


def published(folder: Path) -> Published:
    """Recompute every derived cell of every published file in `folder`.

    Raises:
        BadInput: no published file there, or one that is not of this form.
    """
    tables = read_tables(folder)
    return Published(
        files=[recompute(table) for table in tables], open_against_hidden=_open_against_hidden(tables)
    )


def _open_against_hidden(tables: Sequence[Table]) -> dict[str, Correlation]:
    """By track, over the published scores of the entries that stand in both rounds."""
    score_of: dict[tuple[str, RoundName], dict[str, float]] = {}
    for table in tables:
        board = _leaderboard([table], table.round.name, table.round.convention)
        score_of[table.track, table.round.name] = {one.entry: one.final_score for one in board.entries}
    found = {}
    for track, round_ in score_of:
        if round_ == "open" and (track, "hidden") in score_of:
            before, after = score_of[track, "open"], score_of[track, "hidden"]
            both = sorted(before.keys() & after.keys())
            found[track] = pearson([before[name] for name in both], [after[name] for name in both])
    return found


def read_tables(folder: Path) -> list[Table]:
    found = [
        read_table(path, round_) for round_ in ROUNDS for path in sorted(folder.glob(f"*{round_.suffix}"))
    ]
    if not found:
        forms = ", ".join(f"<track>{round_.suffix}" for round_ in ROUNDS)
        raise BadInput(folder, "", None, f"no published table here; it needs files named {forms}")
    return found


def read_table(path: Path, round_: Round) -> Table:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        values: Values = {}
        for name, cells in rows:
            if name in values:
                raise BadInput(path, str(name), None, "is duplicated; remove one")
            values[name] = dict(cells)
    except (ValueError, TypeError) as error:
        raise BadInput(path, "", None, f"is no list of [entry, {{column: value}}]: {error}") from None
    if not values:
        raise BadInput(path, "", None, "holds no entry")
    names = [name for name in next(iter(values.values())) if " - " in name]
    for entry, cells in values.items():
        for name in names:
            value = cells.get(name, math.nan)
            if value is not None and not (isinstance(value, int | float) and math.isfinite(value)):
                raise BadInput(path, f"{entry}: {name}", None, "has no value; write a number or null")
    columns = tuple(_column(name, round_.name, path) for name in names)
    return Table(path, path.name.removesuffix(round_.suffix), round_, values, columns, tuple(names))


def _column(name: str, round_: RoundName, path: Path) -> Column:
    scenario, _, metric = name.partition(" - ")
    kind = metric.split(" (")[0]
    if kind not in LOWER_IS_BETTER + HIGHER_IS_BETTER:
        known = ", ".join(HIGHER_IS_BETTER + LOWER_IS_BETTER)
        raise BadInput(path, name, None, f"unknown metric, so unknown direction; known are {known}")
    group = "MATH" if scenario.startswith("MATH") else scenario
    stage = "open" if scenario in OPEN_SCENARIOS else "closed"
    if scenario.startswith("ethics_"):  # one scenario of five subsets
        group, metric = "ethics", f"{scenario.removeprefix('ethics_')} {metric}"
    if round_ == "open":  # groups of metrics take the place of scenarios
        kind_of_metric = re.search(r"\((Robustness|Fairness)\)", metric)
        group, metric = (kind_of_metric[1] if kind_of_metric else "Accuracy"), scenario
    return Column(stage=stage, scenario=group, metric=metric, higher_is_better=kind not in LOWER_IS_BETTER)


def recompute(table: Table) -> PublishedFile:
    """Derive every mean win rate and score from the metric columns and hold it against the published one."""
    entries = sorted(table.values)
    values = np.array(
        [[_number(table.values[entry][name]) for name in table.names] for entry in entries], dtype=float
    )
    formula = Formula(CONVENTIONS[table.round.convention], "worst", WEIGHTS)
    result = scores(table.columns, values.T, formula)
    derived = {
        f"{scenario} Mean Win Rate": rates
        for of in result.scenarios.values()
        for scenario, rates in of.items()
    }
    for name, part in table.round.score_names.items():
        derived[name] = result.final if part == "final" else result.stages[part]
    published_names = {name for cells in table.values.values() for name in cells} - set(table.names)
    cells, mismatches, worst = 0, 0, 0.0
    for name in sorted(published_names | set(derived)):
        for place, entry in enumerate(entries):
            cells += 1
            told = table.values[entry].get(name)
            if name not in derived or told is None:
                mismatches += 1
                continue
            error = abs(told - float(derived[name][place]))
            worst = max(worst, error)
            mismatches += error > TOLERANCE
    return PublishedFile(
        file=table.path.name,
        track=table.track,
        round=table.round.name,
        convention=table.round.convention,
        entries=len(entries),
        cells=cells,
        mismatches=mismatches,
        max_abs_error=worst,
    )


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


# --- as Palio leaderboards -----------------------------------------------------------------------------


def stable_id(published_name: str) -> str:
    """One id per entry, whatever the round: without the endings that come and go, aliases resolved."""
    name = published_name
    for ending in ENDINGS:
        name = name.removesuffix(ending)
    return ALIASES.get(name, name)


def stable_ids(published_names: Collection[str]) -> dict[str, str]:
    """Id by published name within one table; two names of one id keep their own (but for `_hidden`)."""
    ids = {name: stable_id(name) for name in published_names}
    counts = Counter(ids.values())
    return {name: one if counts[one] == 1 else name.removesuffix("_hidden") for name, one in ids.items()}


def implied_instances(values: Sequence[float]) -> int | None:
    """The smallest n for which every value is a whole number of n-ths; None if there is none up to 1000."""
    for n in range(1, MOST_INSTANCES + 1):
        if all(abs(value * n - round(value * n)) < 1e-7 for value in values):
            return n
    return None


def published_leaderboards(folder: Path, convention: str | None = None) -> list[Leaderboard]:
    """Every file as a leaderboard of its own, `<track>_<round>`, and open with hidden as `<track>_rounds`.

    The last one pairs the two rounds' tables of the entries that stand in both, weighted 1/3 and 2/3: on
    it one sees what the open stage told about the hidden one.

    Args:
        convention: default: the one each file was made with; `<track>_rounds` has midrank then.
    """
    tables = read_tables(folder)
    boards = [
        _leaderboard([table], table.round.name, convention or table.round.convention) for table in tables
    ]
    for track in sorted({table.track for table in tables}):
        rounds = {table.round.name: table for table in tables if table.track == track}
        if "open" in rounds and "hidden" in rounds:
            boards.append(_leaderboard([rounds["open"], rounds["hidden"]], "rounds", convention or "midrank"))
    return boards


def _leaderboard(tables: Sequence[Table], name: str, convention: str) -> Leaderboard:
    rows = []
    for table in tables:
        ids = stable_ids(table.values)
        rows.append({ids[entry]: cells for entry, cells in table.values.items()})
    shared = set(rows[0]).intersection(*rows[1:])
    columns = [column for table in tables for column in table.columns]
    counts = [
        _instances(column, [cells[published_name] for cells in of.values()])
        for table, of in zip(tables, rows, strict=True)
        for published_name, column in zip(table.names, table.columns, strict=True)
    ]
    candidates = []
    for entry in sorted(shared):
        values = [
            of[entry][published_name]
            for table, of in zip(tables, rows, strict=True)
            for published_name in table.names
        ]
        cells = [_cell(*of_column) for of_column in zip(columns, values, counts, strict=True)]
        candidates.append(Candidate(entry, entry.partition("_")[0], cells))
    stages = {column.stage for column in columns}
    weights = {stage: weight for stage, weight in WEIGHTS.items() if stage in stages}
    return score(
        competition="neurips2023",
        track=f"{tables[0].track}_{name}",
        columns=columns,
        candidates=candidates,
        stage_weights=weights if len(weights) > 1 else dict.fromkeys(weights, 1.0),
        convention=convention,
        final=True,
        inputs={table.path.name: file_sha256(table.path) for table in tables},
    )


def _instances(column: Column, values: Sequence[float | None]) -> int:
    proportion = "EM" in column.metric or column.scenario in ("Accuracy", "Robustness", "Fairness")
    known = [value for value in values if value is not None]
    return (implied_instances(known) if proportion else None) or ASSUMED_INSTANCES


def _cell(column: Column, value: float | None, instances: int) -> Cell:
    if value is not None:
        return Cell(value=value, n=instances)
    if not column.higher_is_better:
        return Cell(value=None, state=State.NO_MENTION, reason="no value was published")
    return Cell(value=None, state=State.NOT_RUN, reason="no value was published")
