"""Data of the figures of the competition's paper (arXiv 2503.13507), recomputed from the published tables.

The paper's "mean win rate" of an entry in a round is **not** a score of that round. Its published
correlations (figure 7: -0.086 and 0.182) are reproduced by the mean over *all* cells of the entry's row,
derived ones (mean win rates, scores) included, of the share of values that the cell strictly exceeds, in a
pool of every row of every round and both tracks that has a column of that name; lower-is-better columns count
as higher-is-better, and a missing value exceeds nothing. It is here to rebuild those figures. To see whether
open scores predict closed ones, use `Published.open_against_hidden`, or the analysis of a leaderboard.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from palio.neurips2023.tables import RoundName, Table, read_tables, stable_ids
from palio.records import Correlation, Part
from palio.scoring.conventions import tie_groups
from palio.scoring.overfitting import pearson

PAIRS: tuple[tuple[RoundName, RoundName], ...] = (("open", "hidden"), ("hidden", "final"), ("open", "final"))


class RoundPoint(Part):
    """One entry in one round: a dot in the scatter plots."""

    track: str
    round: RoundName
    entry: str
    mean_win_rate: float


class RoundPair(Part):
    """Agreement of two rounds of a track, over the entries in both."""

    track: str
    x: RoundName
    y: RoundName
    pearson: Correlation


class ColumnPoint(Part):
    """One entry's value in one metric column, in the final round and in the earlier round that has it."""

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
    """Data of the paper's figures. With one track's files only, the pools are smaller and values differ."""

    points: list[RoundPoint]
    pairs: list[RoundPair]
    columns: list[ColumnPoint]
    finalists: list[FinalistPoint]


def published_figures(folder: Path) -> PublishedFigures:
    """Return the data of the figures from the tables in `folder`. Raises BadInput as `published` does."""
    tables = read_tables(folder)
    exceeded = _exceeded_shares(tables)
    points, finalists = [], []
    for table in tables:
        for entry, cells in _rows(table).items():
            rates = {name: exceeded[name][value] for name, value in cells.items()}
            points.append(
                RoundPoint(
                    track=table.track,
                    round=table.round.name,
                    entry=entry,
                    mean_win_rate=float(np.mean(list(rates.values()))),
                )
            )
            if table.round.name == "final":
                finalists += [
                    FinalistPoint(track=table.track, entry=entry, column=name, win_rate=rates[name])
                    for name in table.names
                ]
    return PublishedFigures(
        points=points, pairs=_pairs(points), columns=_column_points(tables), finalists=finalists
    )


def _rows(table: Table) -> dict[str, dict[str, float | None]]:
    """Return all cells of every row, by stable id."""
    ids = stable_ids(table.values)
    return {ids[name]: cells for name, cells in table.values.items()}


def _exceeded_shares(tables: Sequence[Table]) -> dict[str, dict[float | None, float]]:
    """Return, by column and value, the share of all tables' other values that are strictly smaller."""
    pools: dict[str, list[float | None]] = {}
    for table in tables:
        for cells in table.values.values():
            for name, value in cells.items():
                pools.setdefault(name, []).append(value)
    shares: dict[str, dict[float | None, float]] = {}
    for name, values in pools.items():
        known = [value for value in values if value is not None]
        smaller, _ = tie_groups(np.array(known, dtype=float), tolerance=0)
        rates = smaller / max(len(values) - 1, 1)
        shares[name] = {None: 0.0, **dict(zip(known, rates.tolist(), strict=True))}
    return shares


def _pairs(points: Sequence[RoundPoint]) -> list[RoundPair]:
    rates: dict[tuple[str, RoundName], dict[str, float]] = {}
    for point in points:
        rates.setdefault((point.track, point.round), {})[point.entry] = point.mean_win_rate
    pairs = []
    for track in sorted({point.track for point in points}):
        for x, y in PAIRS:
            in_x, in_y = rates.get((track, x), {}), rates.get((track, y), {})
            both = sorted(in_x.keys() & in_y.keys())
            if both:
                agreement = pearson([in_x[name] for name in both], [in_y[name] for name in both])
                pairs.append(RoundPair(track=track, x=x, y=y, pearson=agreement))
    return pairs


def _column_points(tables: Sequence[Table]) -> list[ColumnPoint]:
    points = []
    for final in (table for table in tables if table.round.name == "final"):
        earlier: dict[tuple[str, str], float | None] = {}
        for table in tables:
            if table.track == final.track and table.round.name != "final":
                for entry, cells in _rows(table).items():
                    earlier |= {(entry, name): cells[name] for name in table.names}
        for entry, cells in _rows(final).items():
            for name in final.names:
                before, after = earlier.get((entry, name)), cells[name]
                if before is not None and after is not None:
                    points.append(
                        ColumnPoint(track=final.track, entry=entry, column=name, earlier=before, final=after)
                    )
    return points
