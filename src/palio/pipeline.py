"""The table of steps, in the order of an entry's life. Whoever needs a list of steps reads this one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from palio.config import Competition, Entry
from palio.entries import AnyEntry
from palio.layout import STAGES, EntryFolder, Stage
from palio.records import CurateRun, FinetuneRun, RunFacts, StageRun
from palio.settings import (
    CheckSettings,
    ContaminationSettings,
    CurateSettings,
    EvaluateSettings,
    FinetuneSettings,
    ImageSettings,
    PackageSettings,
    StepSettings,
)


class Limit(NamedTuple):
    """Time that an entry gets for a step, in seconds."""

    seconds: int
    margin: int
    """What the job gets on top, to load and to save."""

    @property
    def job_minutes(self) -> int:
        return -(-(self.seconds + self.margin) // 60)


@dataclass(frozen=True)
class Step:
    name: str
    rule: str
    """Snakemake's rule, as SLURM's job comments name it."""
    function: str
    """Name of the function in `palio.steps`."""
    settings: type[StepSettings]
    record: Callable[[EntryFolder], Path]
    """Written last: its existence means done."""
    released: Callable[[EntryFolder], tuple[Path, ...]]
    """Files that a release takes, where they exist."""
    reads: tuple[str, ...] = ()
    """Earlier steps whose records decide this one's, where the entry has them."""
    payload: Callable[[EntryFolder], tuple[Path, ...]] = lambda folder: ()
    """What the record describes: a record without it is void."""
    facts: type[RunFacts] | None = None
    """Model of the record's sidecar, where it has one."""
    applies: Callable[[Entry], bool] = lambda entry: True
    """Whether an entry has this step."""
    limit: Callable[[Competition, str], Limit] | None = None
    """By competition and track id. A step with a limit takes a GPU, and keeps its work and its used time:
    only `palio retry` gives it a fresh start."""
    ranked: bool = True
    """Whether a rank needs it."""
    replicated: bool = False
    """Whether a replicate of an entry has its own: it shares the others with the entry."""
    title: str = ""
    """Heading in tables, where it is not the name."""


def _stage_step(stage: Stage) -> Step:
    def limit(competition: Competition, track_id: str) -> Limit:
        settings = competition.stage(stage)
        return Limit(settings.time_limit, settings.margin)

    def released(folder: EntryFolder) -> tuple[Path, ...]:
        probe = (folder.probe,) if stage == "open" else ()
        return (
            *probe,
            folder.stage_record(stage),
            folder.tables(stage).metrics,
            folder.tables(stage).instances,
        )

    return Step(
        name=stage,
        rule=f"helm_{stage}",
        function="evaluate",
        settings=EvaluateSettings,
        record=lambda folder: folder.stage_record(stage),
        released=released,
        reads=("package",),
        payload=lambda folder: (folder.tables(stage).metrics, folder.tables(stage).instances),
        facts=StageRun,
        limit=limit,
        replicated=True,
    )


def _training_limit(competition: Competition, track_id: str) -> Limit:
    track = competition.tracks[track_id]
    return Limit(track.training_budget, track.training_margin)


def _has_dataset(entry: Entry) -> bool:
    return entry.dataset is not None


STEPS = (
    Step(
        name="check",
        rule="check_entry",
        function="check",
        settings=CheckSettings,
        record=lambda folder: folder.check,
        released=lambda folder: (folder.check,),
    ),
    Step(
        name="image",
        rule="build_image",
        function="image",
        settings=ImageSettings,
        record=lambda folder: folder.image_manifest,
        released=lambda folder: (folder.image_manifest,),
        payload=lambda folder: (folder.image,),
        facts=RunFacts,
        applies=lambda entry: entry.server is not None and entry.server.dockerfile is not None,
    ),
    Step(
        name="curate",
        rule="curate_dataset",
        function="curate",
        settings=CurateSettings,
        record=lambda folder: folder.dataset.manifest,
        released=lambda folder: (folder.dataset.manifest, folder.dataset.card),
        payload=lambda folder: (folder.dataset.rows, folder.dataset.dropped),
        facts=CurateRun,
        applies=_has_dataset,
    ),
    Step(
        name="contamination",
        rule="measure_contamination",
        function="contamination",
        settings=ContaminationSettings,
        record=lambda folder: folder.contamination,
        released=lambda folder: (folder.contamination,),
        reads=("curate",),
        applies=_has_dataset,
        ranked=False,
        title="overlap",
    ),
    Step(
        name="finetune",
        rule="finetune",
        function="finetune",
        settings=FinetuneSettings,
        record=lambda folder: folder.adapter_manifest,
        released=lambda folder: (folder.adapter_manifest, folder.telemetry),
        reads=("curate",),
        payload=lambda folder: (folder.adapter, folder.telemetry),
        facts=FinetuneRun,
        applies=lambda entry: entry.trained,
        limit=_training_limit,
        replicated=True,
        title="fine-tune",
    ),
    Step(
        name="package",
        rule="build_package",
        function="package",
        settings=PackageSettings,
        record=lambda folder: folder.package_manifest,
        released=lambda folder: (folder.package_manifest,),
        reads=("finetune", "image"),
        payload=lambda folder: (folder.package,),
        facts=RunFacts,
        replicated=True,
    ),
    *(_stage_step(stage) for stage in STAGES),
)
BY_NAME = {step.name: step for step in STEPS}
BY_RULE = {step.rule: step for step in STEPS}
LIMITED = tuple(step for step in STEPS if step.limit)


def steps_of(entry: AnyEntry, *, replicate: bool = False) -> tuple[Step, ...]:
    """The steps of an entry, or those that a replicate of it has of its own; of a broken file only its
    check."""
    if not isinstance(entry, Entry):
        return STEPS[:1]
    return tuple(step for step in STEPS if step.applies(entry) and (step.replicated or not replicate))
