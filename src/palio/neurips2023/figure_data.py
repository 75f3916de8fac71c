"""What the figures of the competition's paper (arXiv 2503.13507) show, recomputed from the published tables.

The paper's "mean win rate" of an entry in a round is **not** a score of that round. As found by recomputing
its published correlations (figure 7: -0.086 and 0.182), it is the mean over *all* cells of the entry's
row, derived ones (mean win rates, scores) included, of the share of values it exceeds strictly in a
pool of every row of every round and both tracks that has a column of that name; lower-is-better columns
count as higher-is-better, and a missing value exceeds nothing. It is here to rebuild those figures; to ask
whether open scores tell closed ones, use `Published.open_against_hidden`, or the analysis of a leaderboard.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from palio.neurips2023.tables import RoundName, Table, read_tables, stable_ids
from palio.records import Correlation, Part
from palio.scoring.conventions import tie_groups
from palio.scoring.overfitting import pearson

PAIRS: tuple[tuple[RoundName, RoundName], ...] = (("open", "hidden"), ("hidden", "final"), ("open", "final"))


class RoundPoint(Part):
    """One entry in one round: a dot of the scatter plots."""

    track: str
    round: RoundName
    entry: str
    mean_win_rate: float


class RoundPair(Part):
    """How two rounds of a track agree, over the entries in both."""

    track: str
    x: RoundName
    y: RoundName
    pearson: Correlation


class ColumnPoint(Part):
    """One entry's value in one metric column: final round against the earlier round that has it."""

    track: str
    entry: str
    column: str
    earlier: float
    final: float


class FinalistPoint(Part):
    """One finalist's win rate in one metric column, in the pool of all rounds and tracks."""

    track: str
    entry: str
    column: str
    win_rate: float


class PublishedFigures(Part):
    """Data of the paper's figures. With only one track's files, pools are that track's, and values differ."""

    points: list[RoundPoint]
    pairs: list[RoundPair]
    columns: list[ColumnPoint]
    finalists: list[FinalistPoint]


def published_figures(folder: Path) -> PublishedFigures:
    """Return the data of the figures, from the tables in `folder`. Raises BadInput as `published` does."""
    tables = read_tables(folder)
    rates = _pooled_win_rates(tables)
    points = [
        RoundPoint(
            track=table.track,
            round=table.round.name,
            entry=entry,
            mean_win_rate=float(np.mean([rates[number][published][name] for name in cells])),
        )
        for number, table in enumerate(tables)
        for published, entry, cells in _rows(table)
    ]
    finalists = [
        FinalistPoint(track=table.track, entry=entry, column=name, win_rate=rates[number][published][name])
        for number, table in enumerate(tables)
        if table.round.name == "final"
        for published, entry, _ in _rows(table)
        for name in table.names
    ]
    return PublishedFigures(
        points=points, pairs=_pairs(points), columns=_column_points(tables), finalists=finalists
    )


def _rows(table: Table) -> list[tuple[str, str, dict[str, float | None]]]:
    """(published name, stable id, all cells) of every row."""
    ids = stable_ids(table.values)
    return [(name, ids[name], cells) for name, cells in table.values.items()]


def _pooled_win_rates(tables: Sequence[Table]) -> list[Mapping[str, Mapping[str, float]]]:
    """By table, published name and column: the share of all tables' values that are strictly smaller."""
    pools: dict[str, list[float]] = {}
    for table in tables:
        for cells in table.values.values():
            for name, value in cells.items():
                pools.setdefault(name, []).append(np.nan if value is None else float(value))
    exceeded: dict[str, dict[float, float]] = {}
    for name, values in pools.items():
        known = np.array([value for value in values if not np.isnan(value)])
        smaller, _ = tie_groups(known)
        rate = smaller / max(len(values) - 1, 1)
        exceeded[name] = dict(zip(known.tolist(), rate.tolist(), strict=True))
    return [
        {
            entry: {
                name: 0.0 if value is None else exceeded[name][float(value)] for name, value in cells.items()
            }
            for entry, cells in table.values.items()
        }
        for table in tables
    ]


def _pairs(points: Sequence[RoundPoint]) -> list[RoundPair]:
    found = []
    for track in sorted({point.track for point in points}):
        for x, y in PAIRS:
            of = {
                round_: {
                    point.entry: point.mean_win_rate
                    for point in points
                    if (point.track, point.round) == (track, round_)
                }
                for round_ in (x, y)
            }
            both = sorted(of[x].keys() & of[y].keys())
            if both:
                agreement = pearson([of[x][name] for name in both], [of[y][name] for name in both])
                found.append(RoundPair(track=track, x=x, y=y, pearson=agreement))
    return found


def _column_points(tables: Sequence[Table]) -> list[ColumnPoint]:
    found = []
    for final in (table for table in tables if table.round.name == "final"):
        earlier: dict[str, dict[str, float | None]] = {}
        for table in tables:
            if table.track == final.track and table.round.name != "final":
                for _, entry, cells in _rows(table):
                    for name in table.names:
                        earlier.setdefault(name, {})[entry] = cells[name]
        for _, entry, cells in _rows(final):
            for name in final.names:
                before, after = earlier.get(name, {}).get(entry), cells[name]
                if before is not None and after is not None:
                    found.append(
                        ColumnPoint(track=final.track, entry=entry, column=name, earlier=before, final=after)
                    )
    return found
