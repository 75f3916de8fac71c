"""The published tables of NeurIPS 2023: recomputed cell by cell, and read as Palio leaderboards.

A file is a list of [entry, {column: value}]. Metric columns are called "<scenario> - <metric>"; all
others are derived from them, and `recompute` derives them again from the metric columns alone:

    <track>_open_round_rank.json          groups Accuracy, Robustness, Fairness         helm2023
    <track>_hidden_round_rank.json        five scenarios                                 hidden2023
    <track>_full_ranks_final_round.json   five open and four hidden scenarios, 1/3, 2/3  final2023

An entry's name differs between the rounds; `stable_id` maps its names to one id. The tables do not give the
number of instances behind a value; `implied_instances` infers it from values that are proportions.
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
ASSUMED_INSTANCES = 100
"""Instances behind a published value that is not a proportion (ROUGE, a mean over subjects): a guess."""
MAX_INSTANCES = 1000
REMARK = (
    "The published tables do not give the number of instances behind a value: it is inferred where the "
    f"values are whole multiples of 1/n, and assumed to be {ASSUMED_INSTANCES} elsewhere."
)
"""Part of the explanation of these leaderboards' uncertainty."""
OPEN_SCENARIOS = ("MMLU", "TruthfulQA", "BIG-bench", "GSM8K", "BBQ")
LOWER_IS_BETTER = ("Stereotypes", "Representation")
HIGHER_IS_BETTER = ("EM", "ROUGE-2", "Equivalent")
WEIGHTS = {"open": 1 / 3, "closed": 2 / 3}
# An entry's name differs between the rounds' files: optional endings, and other spellings.
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
"""published name of an entry -> column -> value."""


@dataclass(frozen=True)
class Round:
    """A round of the competition, and the form of its files."""

    name: RoundName
    suffix: str
    """End of the files' names."""
    convention: str
    score_names: Mapping[str, str]
    """Derived score column -> the stage it scores, or "final"."""


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
    """Comparison of one file's derived cells with those recomputed from its metric columns."""

    file: str
    track: str
    round: RoundName
    convention: str
    entries: int
    cells: int
    """Derived cells: mean win rates and scores."""
    mismatches: int
    """Cells that differ by more than 1e-12, or do not exist."""
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
    """Pearson correlation by track, between the open and hidden scores of the entries in both rounds."""

    @property
    def cells(self) -> int:
        return sum(file.cells for file in self.files)

    @property
    def mismatches(self) -> int:
        return sum(file.mismatches for file in self.files)

    @property
    def max_abs_error(self) -> float:
        return max(file.max_abs_error for file in self.files)


@dataclass(frozen=True)
class Table:
    """The content of one published file."""

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
        BadInput: there is no published file, or one does not have this form.
    """
    tables = read_tables(folder)
    return Published(
        files=[recompute(table) for table in tables], open_against_hidden=_open_against_hidden(tables)
    )


def _open_against_hidden(tables: Sequence[Table]) -> dict[str, Correlation]:
    """Return the correlation of the published scores, over the entries in both rounds, by track."""
    correlations = {}
    for pair in _open_and_hidden(tables):
        before, after = (
            {scored.entry: scored.final_score for scored in _round_leaderboard(table).entries}
            for table in pair
        )
        both = sorted(before.keys() & after.keys())
        track = pair[0].track
        correlations[track] = pearson([before[name] for name in both], [after[name] for name in both])
    return correlations


def _open_and_hidden(tables: Sequence[Table]) -> list[tuple[Table, Table]]:
    hidden = {table.track: table for table in tables if table.round.name == "hidden"}
    opened = [table for table in tables if table.round.name == "open"]
    return [(table, hidden[table.track]) for table in opened if table.track in hidden]


def read_tables(folder: Path) -> list[Table]:
    """Read the published files in `folder`. Raises BadInput if there is none."""
    tables = [
        read_table(path, round_) for round_ in ROUNDS for path in sorted(folder.glob(f"*{round_.suffix}"))
    ]
    if not tables:
        forms = ", ".join(f"<track>{round_.suffix}" for round_ in ROUNDS)
        raise BadInput(folder, why="no published table here", fix=f"it needs files named {forms}")
    return tables


def read_table(path: Path, round_: Round) -> Table:
    """Read one published file. Raises BadInput if it does not have this form."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        values: Values = {}
        for name, cells in rows:
            if name in values:
                raise BadInput(path, str(name), why="is duplicated", fix="remove one")
            values[name] = dict(cells)
    except (ValueError, TypeError) as error:
        raise BadInput(path, why=f"is not a list of [entry, {{column: value}}]: {error}") from None
    if not values:
        raise BadInput(path, why="has no entries")
    names = [name for name in next(iter(values.values())) if " - " in name]
    for entry, cells in values.items():
        for name in names:
            value = cells.get(name, math.nan)
            if value is not None and not (isinstance(value, int | float) and math.isfinite(value)):
                raise BadInput(path, f"{entry}: {name}", why="has no value", fix="write a number or null")
    columns = tuple(_column(name, round_.name, path) for name in names)
    return Table(path, path.name.removesuffix(round_.suffix), round_, values, columns, tuple(names))


def _column(name: str, round_: RoundName, path: Path) -> Column:
    scenario, _, metric = name.partition(" - ")
    kind = metric.split(" (")[0]
    if kind not in LOWER_IS_BETTER + HIGHER_IS_BETTER:
        known = ", ".join(HIGHER_IS_BETTER + LOWER_IS_BETTER)
        raise BadInput(
            path, name, why="unknown metric, so unknown direction", fix=f"the known metrics are {known}"
        )
    group = "MATH" if scenario.startswith("MATH") else scenario
    stage = "open" if scenario in OPEN_SCENARIOS else "closed"
    if scenario.startswith("ethics_"):  # one scenario with five subsets
        group, metric = "ethics", f"{scenario.removeprefix('ethics_')} {metric}"
    if round_ == "open":  # groups of metrics instead of scenarios
        kind_of_metric = re.search(r"\((Robustness|Fairness)\)", metric)
        group, metric = (kind_of_metric[1] if kind_of_metric else "Accuracy"), scenario
    return Column(stage=stage, scenario=group, metric=metric, higher_is_better=kind not in LOWER_IS_BETTER)


def recompute(table: Table) -> PublishedFile:
    """Derive every mean win rate and score from the metric columns, and compare it with the published one."""
    entries = sorted(table.values)
    # dtype float turns None into NaN
    values = np.array([[table.values[entry][name] for entry in entries] for name in table.names], dtype=float)
    formula = Formula(CONVENTIONS[table.round.convention], "worst", WEIGHTS)
    result = scores(table.columns, values, formula)
    derived = {
        f"{scenario} Mean Win Rate": means
        for scenarios in result.scenarios.values()
        for scenario, means in scenarios.items()
    }
    for name, part in table.round.score_names.items():
        derived[name] = result.final if part == "final" else result.stages[part]
    names = {name for cells in table.values.values() for name in cells} - set(table.names) | set(derived)
    errors = []
    for name in sorted(names):
        for row, entry in enumerate(entries):
            value = table.values[entry].get(name)
            errors.append(
                math.inf if value is None or name not in derived else abs(value - float(derived[name][row]))
            )
    return PublishedFile(
        file=table.path.name,
        track=table.track,
        round=table.round.name,
        convention=table.round.convention,
        entries=len(entries),
        cells=len(errors),
        mismatches=sum(error > TOLERANCE for error in errors),
        max_abs_error=max(filter(math.isfinite, errors), default=0.0),
    )


# --- as Palio leaderboards -----------------------------------------------------------------------------


def stable_id(published_name: str) -> str:
    """Return the id of an entry whatever the round: without optional endings, aliases resolved."""
    name = published_name
    for ending in ENDINGS:
        name = name.removesuffix(ending)
    return ALIASES.get(name, name)


def stable_ids(published_names: Collection[str]) -> dict[str, str]:
    """Return the id by published name within one table; names that share an id only lose `_hidden`."""
    ids = {name: stable_id(name) for name in published_names}
    counts = Counter(ids.values())
    return {name: id_ if counts[id_] == 1 else name.removesuffix("_hidden") for name, id_ in ids.items()}


def implied_instances(values: Sequence[float]) -> int | None:
    """Return the smallest n up to 1000 for which every value is a multiple of 1/n, or None."""
    candidates = range(1, MAX_INSTANCES + 1)
    return next((n for n in candidates if all(abs(v * n - round(v * n)) < 1e-7 for v in values)), None)


def published_leaderboards(folder: Path, convention: str | None = None) -> list[Leaderboard]:
    """Return every file as a leaderboard, `<track>_<round>`, and open with hidden as `<track>_rounds`.

    The last one pairs the two rounds' tables over the entries in both, weighted 1/3 and 2/3: it shows how
    well the open stage predicted the hidden one.

    Args:
        convention: default: the one with which each file was made, and midrank for `<track>_rounds`.
    """
    tables = read_tables(folder)
    boards = [_round_leaderboard(table, convention) for table in tables]
    return boards + [
        _leaderboard(pair, "rounds", convention or "midrank") for pair in _open_and_hidden(tables)
    ]


def _round_leaderboard(table: Table, convention: str | None = None) -> Leaderboard:
    return _leaderboard([table], table.round.name, convention or table.round.convention)


def _leaderboard(tables: Sequence[Table], name: str, convention: str) -> Leaderboard:
    """Return the entries in all of `tables`, with the columns of all of them."""
    columns = [column for table in tables for column in table.columns]
    rows: list[dict[str, list[float | None]]] = []
    counts: list[int] = []
    for table in tables:
        ids = stable_ids(table.values)
        rows.append({ids[name]: [cells[key] for key in table.names] for name, cells in table.values.items()})
        by_column = zip(*rows[-1].values(), strict=True)
        counts += [_instances(*pair) for pair in zip(table.columns, by_column, strict=True)]
    candidates = []
    for entry in sorted(rows[0].keys() & rows[-1].keys()):
        values = [value for table_rows in rows for value in table_rows[entry]]
        candidates.append(Candidate(entry, entry.partition("_")[0], [*map(_cell, columns, values, counts)]))
    stages = {column.stage for column in columns}
    return score(
        competition="neurips2023",
        track=f"{tables[0].track}_{name}",
        columns=columns,
        candidates=candidates,
        stage_weights=WEIGHTS if stages == set(WEIGHTS) else dict.fromkeys(stages, 1.0),
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
    state = State.NOT_RUN if column.higher_is_better else State.NO_MENTION
    return Cell(value=None, state=state, reason="no value was published")
