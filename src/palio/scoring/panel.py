"""The organizers' reference panel: open values of some entries, published for teams to compare with.

palio panel results/leaderboard/laptop.json     → config/panel/<competition>/<track>.json
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from palio.errors import BadInput
from palio.records import Cell, Column, Leaderboard, Panel, PanelEntry
from palio.scoring.conventions import CONVENTIONS
from palio.scoring.formula import Formula
from palio.scoring.pool import Pool, values_of
from palio.scoring.robustness import against_panel, reference_panel

STAGE = "open"


def panel_of(board: Leaderboard, members: Sequence[str] = ()) -> Panel:
    """Return the open values of `members` (default: entries at evenly spaced ranks), no closed ones.

    Raises:
        BadInput: a member is not on the leaderboard.
    """
    by_id = {scored.entry: scored for scored in board.entries}
    unknown = [name for name in members if name not in by_id]
    if unknown:
        raise BadInput(
            "scoring", "reference_panel", unknown[0], why="is not on the leaderboard", fix="correct it"
        )
    keep = [index for index, column in enumerate(board.columns) if column.stage == STAGE]
    return Panel(
        competition=board.competition,
        track=board.track,
        columns=[board.columns[index] for index in keep],
        entries=[
            PanelEntry(
                entry=name,
                values=[by_id[name].cells[index].value for index in keep],
                instances=[by_id[name].cells[index].n for index in keep],
            )
            for name in (members or reference_panel(board))
        ],
    )


def placed(panel: Panel, columns: Sequence[Column], cells: Sequence[Cell], name: str) -> dict[str, float]:
    """Return the open score of `name`, and of each panel member, against the panel; best first.

    Raises:
        BadInput: the columns are not the panel's.
    """
    if list(columns) != panel.columns:
        why, fix = "was made for other columns than the competition's", "get the organizers' current one"
        raise BadInput("panel", panel.track, why=why, fix=fix)
    members = [entry.entry for entry in panel.entries]
    rows = [
        [Cell(value=value, n=n) for value, n in zip(entry.values, entry.instances, strict=True)]
        for entry in panel.entries
    ]
    rows.append(list(cells))
    counts = np.array([[cell.n for cell in row] for row in rows], dtype=np.int64)
    pool = Pool((*members, name), tuple(columns), values_of(rows), counts)
    scores = against_panel(pool, Formula(CONVENTIONS["midrank"], "worst", {STAGE: 1.0}), members)
    return dict(sorted(scores.items(), key=lambda item: -item[1]))
