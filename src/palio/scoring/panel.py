"""The organizer's reference panel: entries' open values, published so that a team can place itself.

palio panel results/leaderboard/laptop.json     → config/panel/<competition>/<track>.json
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from palio.errors import BadInput
from palio.records import Cell, Column, Leaderboard, Panel, PanelEntry
from palio.scoring.conventions import CONVENTIONS
from palio.scoring.formula import Formula
from palio.scoring.pool import Pool
from palio.scoring.robustness import against_panel, reference_panel

STAGE = "open"


def panel_of(board: Leaderboard, members: Sequence[str] = ()) -> Panel:
    """The open columns of `members` (default: entries at evenly spaced ranks). Nothing of the closed stage.

    Raises:
        BadInput: a member is not in the leaderboard.
    """
    by_id = {one.entry: one for one in board.entries}
    unknown = [name for name in members if name not in by_id]
    if unknown:
        raise BadInput("scoring", "reference_panel", unknown[0], "is not in the leaderboard; correct it")
    places = [place for place, column in enumerate(board.columns) if column.stage == STAGE]
    return Panel(
        competition=board.competition,
        track=board.track,
        columns=[board.columns[place] for place in places],
        entries=[
            PanelEntry(
                entry=name,
                values=[by_id[name].cells[place].value for place in places],
                instances=[by_id[name].cells[place].n for place in places],
            )
            for name in (members or reference_panel(board))
        ],
    )


def placed(panel: Panel, columns: Sequence[Column], cells: Sequence[Cell], name: str) -> dict[str, float]:
    """Open score against the panel, of `name` and of each member against the others; best first.

    Raises:
        BadInput: the columns are not the panel's.
    """
    if list(columns) != panel.columns:
        fix = "was made for other columns than the competition's; get the organizers' newer one"
        raise BadInput("panel", panel.track, None, fix)
    names = (*(one.entry for one in panel.entries), name)
    rows = [*((one.values, one.instances) for one in panel.entries)]
    rows.append(([cell.value for cell in cells], [cell.n for cell in cells]))
    pool = Pool(
        names,
        names,
        tuple(columns),
        np.array(
            [[np.nan if value is None else value for value in values] for values, _ in rows], dtype=float
        ),
        np.array([counts for _, counts in rows], dtype=np.int64),
    )
    formula = Formula(CONVENTIONS["midrank"], "worst", {STAGE: 1.0})
    scores = against_panel(pool, formula, [one.entry for one in panel.entries])
    return dict(sorted(scores.items(), key=lambda item: -item[1]))
