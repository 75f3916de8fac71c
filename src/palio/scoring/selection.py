"""The winner's curse: the best of several is better than the others, and luckier.

Whoever is first of many, or the best of a team's entries (arXiv 2504.20879 counts what that gained on a
public leaderboard), was selected by a score that holds the luck of its questions and its training. Each draw
has its own first, whose drawn score differs from its score by this luck, less the pull towards 1/2 that noise
gives every win rate, which a first score has too. The mean of that is taken off, if it is luck.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from palio.records import Leaderboard, Selection
from palio.scoring.conventions import Array


def selections(board: Leaderboard, estimate: Array, final: Array) -> list[Selection]:
    """Return the corrected scores of the first, and of the best entry of each team that has several.

    Args:
        estimate: final scores by the order of the leaderboard, of the means over all trainings.
        final: drawn final scores, shape (replicates, entries).
    """
    everybody = list(range(len(board.entries)))
    found = [_selection(board, everybody, f"the first of {len(everybody)} entries", estimate, final)]
    teams: dict[str, list[int]] = {}
    for index, scored in enumerate(board.entries):
        teams.setdefault(scored.team, []).append(index)
    found += [
        _selection(board, of_team, f"the best of {len(of_team)} entries of {team}", estimate, final)
        for team, of_team in teams.items()
        if 1 < len(of_team) < len(everybody)
    ]
    return found if len(everybody) > 1 else []


def _selection(
    board: Leaderboard, among: Sequence[int], selected_as: str, estimate: Array, final: Array
) -> Selection:
    of_draw = final[:, among]
    selected = of_draw.argmax(axis=1)
    luck = float(np.mean(of_draw.max(axis=1) - estimate[among][selected]))
    best = among[int(np.argmax(estimate[among]))]
    return Selection(
        entry=board.entries[best].entry,
        selected_as=selected_as,
        score=float(estimate[best]),
        corrected_score=max(0.0, float(estimate[best]) - max(0.0, luck)),
    )


def in_words(selection: Selection) -> str:
    luck = selection.score - selection.corrected_score
    return (
        f"{selection.entry} was selected as {selection.selected_as}: of its final score of "
        f"{selection.score:.4f} about {luck:.4f} is the luck of the selected, which leaves "
        f"{selection.corrected_score:.4f}."
    )
