"""The page of the report: its content. It works without scripts, which only sort and search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from palio.records import (
    Analysis,
    Award,
    Decision,
    DidNotFinish,
    FinetuneRun,
    Leaderboard,
    ScoredEntry,
    StageInstances,
)
from palio.records.decision_words import Section, decision_sections
from palio.report import entry_figures, figures
from palio.report.drawing import Drawing, Plate
from palio.report.figures import NARROW, WIDE, BudgetUse, Size
from palio.report.files import EntryFiles, Missing
from palio.report.rendering import render


@dataclass(frozen=True)
class Links:
    """Where a page of the report leads to."""

    overview: str = ""
    """The page with the leaderboards; empty on that page."""
    entries: str = "#{track}.{entry}"
    """An entry."""
    answer_pages: str = "answers/{track}.html"
    """The answers of a track's entries."""

    def track(self, track: str) -> str:
        return f"{self.overview}#{track}"

    def entry(self, track: str, entry: str) -> str:
        return self.entries.format(track=track, entry=entry)

    def answers(self, track: str) -> str:
        return self.answer_pages.format(track=track)


REPORT = Links()
"""All on one page."""


@dataclass(frozen=True)
class EntryReport:
    """One entry on the page."""

    id: str
    team: str
    title: str = ""
    score: ScoredEntry | None = None
    """None if it did not finish."""
    stopped: DidNotFinish | None = None
    files: EntryFiles | None = None
    """None if there are only published values."""
    used: BudgetUse | None = None
    answers: bool = False
    """Whether a page of its answers lies beside the report."""


@dataclass(frozen=True)
class TrackReport:
    """One track on the page."""

    id: str
    title: str
    board: Leaderboard
    analysis: Analysis | None
    entries: list[EntryReport]
    """In the order of the leaderboard, then those that did not finish."""
    decision: Decision | None = None
    """Who gets the prizes; None if there are none."""

    @property
    def decision_sections(self) -> list[Section]:
        return decision_sections(self.decision) if self.decision else []

    def doubts(self, award: Award) -> str:
        """Return why an award is not sure; empty if its rank depends on no choice and can be told apart from
        its neighbors."""
        if award.outcome != "awarded":
            return award.outcome.replace("_", " ")
        robustness = self.analysis.robustness if self.analysis else None
        verdicts = {verdict.entry: verdict for verdict in robustness.verdicts} if robustness else {}
        verdict = verdicts.get(award.entries[0])
        if not self.analysis or not verdict:
            return "awarded; what its rank depends on is not known"
        if not verdict.stable:
            return "awarded; its rank depends on a choice"
        return "" if self.analysis.holds(verdict) else "awarded; cannot be told apart from a neighbor"

    @cached_property
    def figures(self) -> dict[str, Drawing]:
        return self._figures(WIDE)

    @cached_property
    def narrow_figures(self) -> dict[str, Drawing]:
        """The same for a narrow screen."""
        return self._figures(NARROW)

    def _figures(self, size: Size) -> dict[str, Drawing]:
        used = [entry.used for entry in self.entries if entry.used]
        efforts = [effort_of(entry.id, entry.files) for entry in self.entries if entry.files]
        return figures.figures_of_track(self.board, self.analysis, used, efforts, size)


def effort_of(entry: str, files: EntryFiles) -> figures.Effort:
    """Return what an entry took: training over all attempts, and the size of what it made."""
    tuned, package = files.runs.get("finetune"), files.package
    run = tuned if isinstance(tuned, FinetuneRun) else FinetuneRun()
    training = run.training
    joules = training.energy_joules if training else None
    parameters = None if isinstance(package, Missing) else package.parameters
    return figures.Effort(
        entry,
        {
            "hours of training": training.training_seconds / 3600 if training else None,
            "kWh of training": joules / 3.6e6 if joules is not None else None,
            "USD of training": run.cost_usd,
            "million parameters": parameters / 1e6 if parameters is not None else None,
        },
    )


def page(
    title: str,
    tracks: Sequence[TrackReport],
    appendix: Sequence[Plate] = (),
    asked: Sequence[StageInstances] = (),
) -> str:
    """Return the page as HTML."""
    return render("index.html.j2", "page.js", **overview(title, tracks, appendix, asked), **ENTRY_FIGURES)


def overview(
    title: str,
    tracks: Sequence[TrackReport],
    appendix: Sequence[Plate] = (),
    asked: Sequence[StageInstances] = (),
    links: Links = REPORT,
) -> dict[str, Any]:
    """Return what the template of the overview needs."""
    return {
        "title": title,
        "tracks": tracks,
        "appendix": appendix,
        "asked": [record for record in asked if record.counts],
        "final": all(track.board.final for track in tracks),
        "heat_step": figures.heat_step,
        "links": links,
    }


ENTRY_FIGURES: dict[str, Any] = {
    "training_curve": entry_figures.training_curve,
    "row_flow": entry_figures.row_flow,
    "length_histogram": entry_figures.length_histogram,
}
"""What the templates of an entry need."""
