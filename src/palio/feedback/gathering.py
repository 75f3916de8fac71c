"""What a team may see of its entry, from the records, logs and scores that are there now."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from palio.answers.comparison import Decision, decisions, full_marks, shortfall
from palio.answers.reading import Answer, AskedStage
from palio.config import Metric
from palio.credentials import credentials
from palio.entries import AnyEntry
from palio.errors import BadInput
from palio.layout import Boards, EntryFolder, Results, Stage
from palio.operating.status import EntryStatus, Status, StepStatus, competition_status
from palio.pipeline import BY_NAME, STEPS
from palio.records import (
    Analysis,
    Cell,
    Column,
    EntryUncertainty,
    Leaderboard,
    ScoredEntry,
    StepFailure,
    read_record,
)
from palio.report.build import entry_report, read_board, with_leaderboard
from palio.report.files import open_only
from palio.report.page import EntryReport
from palio.workflow import Workflow

CLOSED: Stage = "closed"
"""The stage whose logs, records and questions a team never sees."""
LOG_LINES = 40
LOG_BYTES = 64_000
"""Read of the end of a log."""
LISTED_ROWS = 200
"""Dropped rows listed for each operation."""


@dataclass(frozen=True)
class Log:
    """The last lines of a log of the entry's own."""

    step: str
    path: str
    text: str


@dataclass(frozen=True)
class ColumnLead:
    """One column of an entry beside the next better entry's."""

    column: Column
    mine: Cell
    other: Cell
    lost: int = 0
    """Questions of the open stage on which the other did better."""
    won: int = 0


@dataclass(frozen=True)
class NextBetter:
    """The entry one rank above, and where it is ahead."""

    entry: str
    final_score: float
    columns: list[ColumnLead]
    """The largest loss in win rate first."""
    lost: list[Decision]
    """Questions of the open stage on which it did better, the largest difference first."""


@dataclass(frozen=True)
class Feedback:
    """All that a team may see."""

    competition: str
    track: str
    title: str
    """Of the track."""
    status: EntryStatus
    logs: list[Log]
    report: EntryReport
    board: Leaderboard | None
    """None: nothing is scored yet."""
    analysis: Analysis | None
    next_better: NextBetter | None
    answers: list[Answer]
    """Of the open stage, those without full marks first; empty if there are none yet."""
    metrics: dict[str, dict[str, Metric]]
    """Of the open stage, by scenario and title."""

    @property
    def limits(self) -> EntryUncertainty | None:
        return self.analysis.entry_uncertainty.get(self.report.id) if self.analysis else None

    @property
    def wrong(self) -> list[Answer]:
        return [one for one in self.answers if not full_marks(one, self.metrics[one.question.scenario])]


class Gathering:
    """Gathers feedback for the entries of a competition; what they share is read once."""

    def __init__(self, workflow: Workflow, results: Results, boards: Boards) -> None:
        """`boards` are of the final leaderboards; a track without one is looked up in the standings."""
        self.workflow, self.competition = workflow, workflow.competition
        self.results, self.boards = results, boards

    @cached_property
    def status(self) -> Status:
        return competition_status(self.workflow, self.results)

    @cached_property
    def asked(self) -> AskedStage | None:
        """The open stage; None if it is not prepared here."""
        with suppress(BadInput):
            return AskedStage(self.competition, "open")
        return None

    def feedback(self, entry_id: str) -> Feedback:
        """Return the feedback for one entry.

        Raises:
            BadInput: a leaderboard is not readable.
        """
        entry = self.workflow.entries[entry_id]
        folder = self.results.entry(entry.track, entry_id)
        board, analysis = self._board(entry.track)
        answers = self._answers(folder)
        report = self._report(folder, entry, board)
        return Feedback(
            competition=self.competition.title,
            track=entry.track,
            title=self.competition.tracks[entry.track].title,
            status=_public(next(one for one in self.status.entries if one.entry == entry_id)),
            logs=list(_logs(folder)),
            report=report,
            board=board,
            analysis=analysis,
            next_better=self._next_better(board, report.score, answers) if board else None,
            answers=sorted(answers, key=lambda one: -shortfall(one, self._metrics[one.question.scenario])),
            metrics=self._metrics,
        )

    @cached_property
    def _metrics(self) -> dict[str, dict[str, Metric]]:
        scenarios = self.competition.stage("open").scenarios
        return {name: dict(scenario.metrics) for name, scenario in scenarios.items()}

    def _board(self, track_id: str) -> tuple[Leaderboard | None, Analysis | None]:
        boards = with_leaderboard(track_id, self.boards, self.results.standings)
        return read_board(boards, track_id) if boards else (None, None)

    def _answers(self, folder: EntryFolder) -> list[Answer]:
        with suppress(BadInput):  # no run yet
            return list(self.asked.answers(folder)) if self.asked else []
        return []

    def _report(self, folder: EntryFolder, entry: AnyEntry, board: Leaderboard | None) -> EntryReport:
        name = folder.entry_id
        scored = next((one for one in board.entries if one.entry == name), None) if board else None
        stopped = next((one for one in board.did_not_finish if one.entry == name), None) if board else None
        stopped = stopped and stopped.model_copy(update={"log": None})
        given = EntryReport(name, entry.team, score=scored, stopped=stopped)
        report = entry_report(self.competition, given, entry, folder, LISTED_ROWS)
        assert report.files is not None
        return replace(report, files=open_only(report.files))

    def _next_better(
        self, board: Leaderboard, score: ScoredEntry | None, answers: list[Answer]
    ) -> NextBetter | None:
        ahead = [one for one in board.entries if score and one.rank < score.rank]
        if score is None or not ahead:
            return None
        other = ahead[-1]
        theirs = self._answers(self.results.entry(board.track, other.entry))
        found = decisions(answers, theirs, self._metrics)
        lost = [one for one in found if one.difference < 0]
        counts = Counter((one.question.scenario, one.difference < 0) for one in found)
        columns = [
            ColumnLead(
                column,
                mine,
                its,
                lost=counts[column.scenario, True] if column.stage == "open" else 0,
                won=counts[column.scenario, False] if column.stage == "open" else 0,
            )
            for column, mine, its in zip(board.columns, score.cells, other.cells, strict=True)
        ]
        columns.sort(key=lambda lead: (lead.mine.win_rate or 0.0) - (lead.other.win_rate or 0.0))
        return NextBetter(other.entry, other.final_score, columns, lost)


def _public(status: EntryStatus) -> EntryStatus:
    """Leave out where steps ran, and the log of the closed stage."""
    steps = [replace(step, node="", job=None, obstacle="", log=_shown_log(step)) for step in status.steps]
    return replace(status, steps=steps)


def _shown_log(step: StepStatus) -> str:
    return "" if step.step == CLOSED else step.log


# --- logs ------------------------------------------------------------------------------------------------


def _logs(folder: EntryFolder) -> Iterator[Log]:
    """Yield the ends of the entry's logs, by step, the closed stage's never."""
    for step in STEPS:
        if step.name == CLOSED:
            continue
        paths = [_newest_log(folder, step.name)]
        if (failure := folder.failure(step.name)).exists():
            named = read_record(StepFailure, failure).log
            paths.append(Path(named) if named else None)
        for path in dict.fromkeys(path for path in paths if path and path.is_file()):
            if path.resolve().is_relative_to(folder.path.resolve()) and (text := last_log_lines(path)):
                yield Log(BY_NAME[step.name].title or step.name, path.name, text)


def _newest_log(folder: EntryFolder, step: str) -> Path | None:
    """Return a step's log; Snakemake deletes it when the step fails, and the attempt's remains."""
    attempts = folder.attempt_log(step, 0).parent.glob(f"{step}.*.log")
    kept = max(attempts, key=lambda path: path.stat().st_mtime, default=None)
    return folder.log(step) if folder.log(step).exists() else kept


def last_log_lines(path: Path) -> str:
    """Return the last lines of a log, up to the first that holds what looks like a credential."""
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - LOG_BYTES))
        lines = stream.read().decode("utf-8", "replace").splitlines()[-LOG_LINES:]
    if found := next(credentials("\n".join(lines).encode()), None):
        lines[found.line - 1 :] = [f"(the rest is left out: it holds what looks like a {found.kind})"]
    return "\n".join(lines)
