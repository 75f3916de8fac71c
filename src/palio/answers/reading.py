"""One entry's answers in one stage, read from HELM's runs.

The open stage's lie in the entry's work folder, the closed stage's in the closed store.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import pyarrow.parquet as pq

from palio.config import Competition, Metric
from palio.errors import BadInput
from palio.evaluation import helm
from palio.evaluation.helm import InstanceAnswer, Reference, Reply
from palio.evaluation.journal import JournalReader
from palio.evaluation.stage import PromptKey, StagePlan
from palio.layout import EntryFolder, HelmFolder, Resources, Stage, StageStore
from palio.records import PackageManifest, StageRecord, read_record

Shortened = Literal["", "examples left out", "question cut"]


@dataclass(frozen=True)
class Question:
    """An evaluation instance of a prepared stage."""

    scenario: str
    run: str
    """HELM's run."""
    instance: str
    """HELM's id of it in the run."""
    text: str
    reference: str
    """Correct answers, one a line."""
    share: float
    """Weight in its scenario's value: a mean over runs of means over instances."""

    @property
    def key(self) -> str:
        return f"{self.run}/{self.instance}"


@dataclass(frozen=True)
class Answer:
    """One entry's answer to one question."""

    question: Question
    references: tuple[Reference, ...]
    replies: tuple[Reply, ...]
    """One a request: more than one where HELM perturbs the input or asks for each choice."""
    shortened: tuple[Shortened, ...]
    """What the model's window took of each prompt."""
    values: Mapping[str, float | None]
    """By metric as the competition names it; None where HELM has no value."""

    @property
    def unanswered(self) -> bool:
        return any(reply.text is None for reply in self.replies)


class AskedStage:
    """The questions of a prepared stage, those of scenarios that the competition no longer has left out."""

    def __init__(self, competition: Competition, stage: Stage) -> None:
        """Find the stage's store.

        Raises:
            BadInput: the stage is not prepared here, or its store is closed to whoever asks.
        """
        self.competition, self.stage = competition, stage
        store = Resources().open_store if stage == "open" else competition.store.stage
        scenarios = competition.stage(stage).scenarios
        self.questions = [one for one in _questions(store) if one.scenario in scenarios]
        self._plan = StagePlan(store)

    @cached_property
    def prompts(self) -> Mapping[PromptKey, str]:
        """Every prompt before a model's window shortens it."""
        return self._plan.prompts()

    def metrics(self, scenario: str) -> Mapping[str, Metric]:
        """Return the columns of a scenario, by title."""
        return self.competition.stage(self.stage).scenarios[scenario].metrics

    def answers(self, folder: EntryFolder) -> Iterator[Answer]:
        """Yield an entry's answers, a HELM run at a time: all those of runs that are complete.

        Raises:
            BadInput: the entry has no HELM run here.
        """
        runs = helm_folder(folder, self.stage)
        cut = frozenset(answer.key for answer in JournalReader(runs.journal).answers() if answer.cut)
        by_key = {question.key: question for question in self.questions}
        for run in helm.run_folders(runs):
            if not run.complete:
                continue
            for given in helm.instance_answers(run, cut):
                if question := by_key.get(f"{run.name}/{given.instance}"):
                    yield self._answer(question, given)

    def _answer(self, question: Question, given: InstanceAnswer) -> Answer:
        values = {
            title: given.values[metric.metric, metric.split, metric.perturbation]
            for title, metric in self.metrics(question.scenario).items()
            if (metric.metric, metric.split, metric.perturbation) in given.values
            and (metric.run is None or metric.run in question.run)
        }
        shortened = tuple(self._shortened(question, reply) for reply in given.replies)
        return Answer(question, given.references, given.replies, shortened, values)

    def _shortened(self, question: Question, reply: Reply) -> Shortened:
        whole = self.prompts.get((question.run, question.instance, reply.variant), reply.prompt)
        if reply.prompt == whole:
            return ""
        return "examples left out" if helm.question_kept(reply.prompt, whole) else "question cut"


def _questions(store: StageStore) -> list[Question]:
    """Return all questions, by run and in HELM's order."""
    try:
        rows = pq.read_table(store.instances).to_pylist()
    except PermissionError:
        raise BadInput(store.path, why="is open to the organizer only", fix="ask who owns it") from None
    except FileNotFoundError:
        why, fix = "the stage is not prepared here", "start the workflow, which prepares it"
        raise BadInput(store.instances, why=why, fix=fix) from None
    in_run = Counter(row["run"] for row in rows)
    runs = Counter(scenario for scenario, _ in {(row["scenario"], row["run"]) for row in rows})
    return [Question(**row, share=1 / (runs[row["scenario"]] * in_run[row["run"]])) for row in rows]


def helm_folder(folder: EntryFolder, stage: Stage) -> HelmFolder:
    """Return the folder with HELM's runs that the stage's record was made of; without a record the newest.

    Raises:
        BadInput: there is none, or it is closed to whoever asks.
    """
    where = folder.helm_runs(stage)
    try:
        found = _scored_runs(folder, stage) or _newest_runs(folder, stage)
        if found and found.runs.is_dir():
            return found
    except PermissionError:
        raise BadInput(where, why="is open to the organizer only", fix="ask who owns it") from None
    why = f"no HELM run of the {stage} stage of {folder.entry_id}"
    raise BadInput(where, why=why, fix="ask once the stage has run; `palio status` says where the entry is")


def _scored_runs(folder: EntryFolder, stage: Stage) -> HelmFolder | None:
    record = folder.stage_record(stage)
    if not (record.exists() and folder.package_manifest.exists()):
        return None
    made = read_record(StageRecord, record)
    package = read_record(PackageManifest, folder.package_manifest)
    served = (made.package_fingerprint, package.base_model_fingerprint, made.engine)
    asked = (made.instances_sha256, made.helm_version, made.cut_at_stop_sequences)
    return helm.package_folder(folder, stage, *served, *asked)


def _newest_runs(folder: EntryFolder, stage: Stage) -> HelmFolder | None:
    runs = sorted(folder.helm_runs(stage).glob("*"), key=lambda path: path.stat().st_mtime)
    return HelmFolder(runs[-1]) if runs else None
