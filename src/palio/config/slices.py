"""Slices of a competition: what one step needs of it, so that only its own changes re-run it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import PositiveInt

from palio.config.common import Strict, expand


class CheckedAgainst(Strict):
    """What an entry file is checked against."""

    competition: str
    rules: str
    tracks: tuple[str, ...]


class EntryFolders(Strict):
    """Where the entries are that an entry is seen beside."""

    folders: tuple[str, ...]
    withdrawn: tuple[str, ...] = ()


class ScenarioRuns(Strict):
    """A scenario's HELM runs. The digest stands for the run file's content, which may be secret."""

    run_entries: str
    max_eval_instances: PositiveInt | None = None
    questions: PositiveInt | None = None
    split: Literal["test", "valid"] | None = None
    """The one split that its metrics look at; None if they look at both."""
    sha256: str


class StageRuns(Strict):
    """What decides a stage's evaluation instances."""

    competition: str
    stage: Literal["open", "closed"]
    closed_store: str
    scenarios: dict[str, ScenarioRuns]

    @property
    def store(self) -> Path:
        """Folder of the prepared stage; the closed one's shows prompts and lies in the closed store."""
        if self.stage == "open":
            return Path("resources/stages/open/store")
        return expand(self.closed_store) / self.competition / "stage"


class StageLimits(Strict):
    """How a prepared stage is asked, see `Stage`."""

    time_limit: PositiveInt
    """Seconds."""
    threads: PositiveInt
    engine: Literal["transformers", "vllm"] = "transformers"
    unanswered: Literal["missing", "wrong"] = "missing"
    cut_at_stop_sequences: bool = True
