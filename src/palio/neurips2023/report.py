"""Report on the published tables: every round as a leaderboard, and the paper's figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from palio.neurips2023.figure_data import PublishedFigures
from palio.neurips2023.figures import paper_figures
from palio.records import Analysis, Decision, Leaderboard
from palio.report.build import entry_reports, write_report
from palio.report.page import TrackReport

ROUND_TITLES = {
    "final": "final round",
    "hidden": "hidden round",
    "open": "open round",
    "rounds": "open and hidden rounds paired",
}
"""Title by round, in the order of the page."""


def published_report(
    boards: Sequence[tuple[Leaderboard, Analysis, Decision | None]], paper: PublishedFigures, out: Path
) -> Path:
    """Write the report on the published leaderboards and the paper's figures; return its path."""
    tracks = []
    for round_, round_title in ROUND_TITLES.items():
        for board, analysis, decision in boards:
            track, _, name = board.track.rpartition("_")
            if name == round_:
                title = f"{track}, {round_title}"
                tracks.append(
                    TrackReport(board.track, title, board, analysis, entry_reports(board), decision)
                )
    return write_report("NeurIPS 2023, recomputed", tracks, out, paper_figures(paper))
