"""Score a release again: every file against its sha256, every leaderboard against what its records give."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

from palio.config import load_competition
from palio.entries import Entries
from palio.errors import PalioError
from palio.layout import CONFIG, Results
from palio.records import Leaderboard, read_record
from palio.release.crate import changed_files
from palio.scoring.leaderboard import score_track
from palio.scoring.versions import difference


def verify_release(folder: Path) -> Iterator[str]:
    """Yield a line for each leaderboard and each file that differs.

    Raises:
        PalioError: after the lines, if anything differs.
    """
    with chdir(folder):
        wrong = changed_files(Path())
        yield from (f"fail     files: {line}" for line in wrong)
        competition = load_competition(CONFIG)
        results = Results(store=competition.store)
        for track_id, entries in Entries(competition).by_track().items():
            shipped = read_record(Leaderboard, results.leaderboards.leaderboard(track_id))
            board = score_track(competition, track_id, results, entries, final=shipped.final)
            if board == shipped.model_copy(update={"made": None}):
                yield f"pass     {track_id}: the identical leaderboard, {len(board.entries)} entries"
            else:
                wrong.append(track_id)
                yield f"fail     {track_id}: another leaderboard\n{difference(shipped, board)}"
    if wrong:
        raise PalioError(f"{folder} is not the release that was made: {wrong[0]}")
