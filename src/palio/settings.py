"""Settings of the steps: the slice of a competition and an entry that decides a step's result.

Their `of` is the only place that makes them. A rule passes them on as canonical JSON, and the step's record
names their fingerprint: it is void once they change (`palio.planning`). How a step runs here (`RunOptions`)
is not among them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar

from pydantic import PositiveInt

from palio.config import (
    Competition,
    DatasetRecipe,
    Entry,
    FinetuneRecipe,
    Isolation,
    Probe,
    Program,
    RuleSet,
    ServerProgram,
    Strict,
    Telemetry,
    Track,
    expand,
    parse,
)
from palio.config import Stage as StageConfig
from palio.cpu import CpuDtype
from palio.entries import AnyEntry
from palio.errors import BadInput
from palio.layout import STAGES, ClosedStore, Resources, Stage, StageStore, replicate_name, stage_named
from palio.provenance import canonical_json, fingerprint
from palio.records import Made


def slice_of(model: Strict) -> str:
    """Return the canonical JSON of a model, without its fields that are None."""
    return canonical_json(model.model_dump(mode="json", exclude_none=True))


Model = TypeVar("Model", bound=Strict)


def read_slice(model: type[Model], text: str, option: str) -> Model:
    """Parse what `slice_of` wrote and a command's `option` passed on. Raises BadInput."""
    try:
        content = json.loads(text)
    except ValueError as error:
        raise BadInput(option, why=f"is not JSON ({error})", fix="copy it from the rule") from None
    return parse(model, content, option)


def limits_of(track: Track) -> Track:
    """Return the limits of a track that decide a result: not which SLURM type its GPU is."""
    names = ("title", "gpu_memory_gb", "ram_gb", "cpus", "training_budget")
    return Track.model_construct(**{name: getattr(track, name) for name in names})


@dataclass(frozen=True)
class PlannedEntry:
    """One entry in its competition: everything that settings are made from."""

    competition: Competition
    rules: RuleSet
    stage_runs: Mapping[Stage, StageRuns]
    file: Path
    entry_id: str
    entry: AnyEntry
    replicate: int | None = None
    """Number of the replicate, from 2; None: the entry's own training."""
    runs_model_code: bool = False
    """Whether the rules approve code of its base model."""

    @property
    def valid(self) -> Entry | None:
        """The entry, if its file is valid."""
        return self.entry if isinstance(self.entry, Entry) else None

    @property
    def base_model_id(self) -> str:
        return self.valid.base_model.id if self.valid else "unknown"

    @property
    def limits(self) -> Track:
        return limits_of(self.competition.tracks[self.entry.track])

    @property
    def isolation(self) -> Isolation | None:
        """Confinement of what the entry runs that is not Palio's, if it may run any."""
        foreign = self.valid and (self.valid.programs or self.runs_model_code)
        return self.competition.isolation if foreign else None

    def fresh_start(self, step: str) -> int | None:
        """How many fresh starts of the step `palio retry` has granted."""
        name = replicate_name(self.entry_id, self.replicate) if self.replicate else self.entry_id
        return self.competition.retries.get(name, {}).get(step)

    @property
    def recipe(self) -> FinetuneRecipe | None:
        """The recipe; of the replicates with the seeds after the entry's own."""
        recipe = self.valid.finetune if self.valid else None
        if recipe is None or self.replicate is None:
            return recipe
        return recipe.model_copy(update={"seed": recipe.seed + self.replicate - 1})


class StepSettings(Strict):
    """What decides the result of one step of one entry."""

    LIMITS: ClassVar[dict[str, Any]] = {}
    """The fields that only bound a step, as pydantic's `exclude`: a finished result holds without them."""

    competition_id: str

    @classmethod
    def of(cls, planned: PlannedEntry, step: str) -> Self:
        raise NotImplementedError

    @classmethod
    def read(cls, text: str) -> Self:
        """Parse what `slice_of` wrote. Raises BadInput."""
        return read_slice(cls, text, "--settings")

    @property
    def decisive(self) -> dict[str, Any]:
        """The settings that decide the result of a step that finishes: all but its limits."""
        return self.model_dump(mode="json", exclude_none=True, exclude=self.LIMITS)

    @property
    def bounds(self) -> dict[str, Any]:
        """The limits. A track's title is none."""
        bounds = self.model_dump(mode="json", exclude_none=True, include=self.LIMITS)
        bounds.get("track", {}).pop("title", None)
        return bounds

    def records(self, resources: Resources) -> dict[str, Path]:
        """Return the shared records that the step reads, by name."""
        return {}

    def files(self) -> tuple[str, ...]:
        """Return the files and folders of the team that the step reads."""
        return ()


class EntryFolders(Strict):
    """Folders of entry files, among which a check sees an entry."""

    folders: tuple[str, ...]
    withdrawn: tuple[str, ...] = ()

    @classmethod
    def of(cls, competition: Competition) -> Self:
        return cls(folders=competition.entries, withdrawn=tuple(sorted(competition.withdrawn)))


class CheckedAgainst(Strict):
    """What an entry file is checked against."""

    competition_id: str
    rules: str
    """The rule set's file."""
    track_ids: tuple[str, ...]
    vllm_stages: tuple[str, ...] = ()
    """Stages that vllm serves."""

    @classmethod
    def of(cls, competition: Competition) -> Self:
        return cls(
            competition_id=competition.competition,
            rules=competition.rules,
            track_ids=tuple(competition.tracks),
            vllm_stages=tuple(name for name in STAGES if competition.stage(name).engine == "vllm"),
        )


class CheckSettings(StepSettings):
    file: str
    """The entry file."""
    against: CheckedAgainst
    looked_at: str
    """Fingerprint of the rule set and of what it looks at in the entry: a learning rate re-runs no check."""

    @classmethod
    def of(cls, planned: PlannedEntry, step: str) -> Self:
        return cls(
            competition_id=planned.competition.competition,
            file=str(planned.file),
            against=CheckedAgainst.of(planned.competition),
            looked_at=_looked_at(planned),
        )


def _looked_at(planned: PlannedEntry) -> str:
    entry = planned.valid
    if entry is None:
        return str(planned.entry.fault)  # type: ignore[union-attr]  # a broken one
    seen = entry.model_dump(mode="json", exclude_none=True, exclude={"finetune", "title", "dataset"})
    seen["max_length"] = entry.finetune.max_length if entry.finetune else None
    dataset = entry.dataset
    sources = dataset.sources if dataset else ()
    seen["sources"] = [source.model_dump(mode="json", exclude_none=True) for source in sources]
    seen["inputs"] = dataset.inputs if dataset else []
    return fingerprint([seen, planned.rules.model_dump(mode="json", exclude={"prizes"})])


class CurateSettings(StepSettings):
    dataset: DatasetRecipe
    base_model_id: str
    """Its tokenizer counts tokens."""
    team_folders: tuple[str, ...]
    """Folders below which the team's files must lie, through no link."""

    @classmethod
    def of(cls, planned: PlannedEntry, step: str) -> Self:
        entry = planned.valid
        assert entry is not None
        assert entry.dataset is not None
        return cls(
            competition_id=planned.competition.competition,
            dataset=entry.dataset,
            base_model_id=planned.base_model_id,
            team_folders=planned.rules.folders_of(entry.team),
        )

    def records(self, resources: Resources) -> dict[str, Path]:
        stage = {"open stage": resources.stage_record("open")}
        decontaminated = any(given.kind == "open_stage" for _, given in self.dataset.inputs)
        return {"base model": resources.base_model(self.base_model_id).manifest} | (
            stage if decontaminated else {}
        )

    def files(self) -> tuple[str, ...]:
        return tuple(source.path for source in self.dataset.sources if source.path)


class ScenarioRuns(Strict):
    """HELM runs of a scenario. The digest represents the run file's content, which may be secret."""

    run_entries: str
    max_eval_instances: PositiveInt | None = None
    questions: PositiveInt | None = None
    split: Literal["test", "valid"] | None = None
    """The only split that its metrics look at; None if they look at both."""
    shortfall: Literal["refuse", "accept"] = "refuse"
    sha256: str


class StageRuns(Strict):
    """What decides a stage's evaluation instances."""

    competition: str
    stage: Stage
    closed_store: str
    scenarios: dict[str, ScenarioRuns]

    @property
    def closed(self) -> ClosedStore:
        return ClosedStore(expand(self.closed_store) / self.competition)

    @property
    def store(self) -> StageStore:
        """The prepared stage."""
        return Resources().open_store if self.stage == "open" else self.closed.stage

    @property
    def made(self) -> Made:
        """What the record of the prepared stage is made with."""
        return Made(settings={"prepare": fingerprint(self.model_dump(mode="json", exclude_none=True))})


class ContaminationSettings(StepSettings):
    open: StageRuns
    closed: StageRuns

    @classmethod
    def of(cls, planned: PlannedEntry, step: str) -> Self:
        return cls(
            competition_id=planned.competition.competition,
            open=planned.stage_runs["open"],
            closed=planned.stage_runs["closed"],
        )

    def records(self, resources: Resources) -> dict[str, Path]:
        return {f"{stage} stage": resources.stage_record(stage) for stage in STAGES}


class FinetuneSettings(StepSettings):
    """Either `recipe`, or a team's own `program` with its confinement."""

    LIMITS: ClassVar = {"track": True, "isolation": True}

    base_model_id: str
    track: Track
    recipe: FinetuneRecipe | None = None
    program: Program | None = None
    isolation: Isolation | None = None
    seed: PositiveInt | None = None
    """What a replicate's program finds in PALIO_SEED; a recipe has its seed in it."""
    network: bool = False
    """Whether the program may reach the network."""
    team_folders: tuple[str, ...] = ()
    """Folders that the program's files must be in."""
    fresh_start: PositiveInt | None = None

    @classmethod
    def of(cls, planned: PlannedEntry, step: str) -> Self:
        entry = planned.valid
        assert entry is not None
        return cls(
            competition_id=planned.competition.competition,
            base_model_id=planned.base_model_id,
            track=planned.limits,
            recipe=planned.recipe,
            program=entry.command,
            seed=planned.replicate if entry.command else None,
            isolation=planned.isolation if entry.command or planned.runs_model_code else None,
            network=entry.command is not None and planned.rules.network_in_training,
            team_folders=planned.rules.folders_of(entry.team) if entry.command else (),
            fresh_start=planned.fresh_start(step),
        )

    def records(self, resources: Resources) -> dict[str, Path]:
        return {"base model": resources.base_model(self.base_model_id).manifest}

    def files(self) -> tuple[str, ...]:
        return tuple(self.program.paths.values()) if self.program else ()


class ImageSettings(StepSettings):
    LIMITS: ClassVar = {"isolation": True}

    dockerfile: str
    """The folder with it."""
    isolation: Isolation
    network: bool
    """Whether the build may reach the network."""
    team_folders: tuple[str, ...]
    """Folders that the folder must be in."""

    @classmethod
    def of(cls, planned: PlannedEntry, step: str) -> Self:
        entry = planned.valid
        assert entry is not None
        assert entry.server is not None
        assert entry.server.dockerfile is not None
        return cls(
            competition_id=planned.competition.competition,
            dockerfile=entry.server.dockerfile,
            isolation=planned.competition.isolation,
            network=planned.rules.network_in_build,
            team_folders=planned.rules.folders_of(entry.team),
        )

    def files(self) -> tuple[str, ...]:
        return (self.dockerfile,)


class PackageSettings(StepSettings):
    base_model_id: str
    adapter: bool
    """Whether an adapter is merged, or handed to the team's server; else the base model, or the server alone,
    is the package."""
    server: ServerProgram | None = None
    team_folders: tuple[str, ...] = ()
    """Folders that the server's files must be in."""

    @classmethod
    def of(cls, planned: PlannedEntry, step: str) -> Self:
        entry = planned.valid
        return cls(
            competition_id=planned.competition.competition,
            base_model_id=planned.base_model_id,
            adapter=entry is not None and entry.trained,
            server=entry.server if entry else None,
            team_folders=planned.rules.folders_of(entry.team) if entry and entry.server else (),
        )

    def records(self, resources: Resources) -> dict[str, Path]:
        return {"base model": resources.base_model(self.base_model_id).manifest}

    def files(self) -> tuple[str, ...]:
        """The folder of a Dockerfile is read by the step `image`."""
        return tuple(
            path for key, path in (self.server.paths if self.server else {}).items() if key != "dockerfile"
        )


class StageLimits(Strict):
    """How a prepared stage is asked; see `palio.config.Stage`."""

    time_limit: PositiveInt
    """Seconds."""
    threads: PositiveInt
    engine: Literal["transformers", "vllm"] = "transformers"
    cpu_dtype: CpuDtype = "float32"
    unanswered: Literal["missing", "wrong"] = "missing"
    cut_at_stop_sequences: bool = True

    @classmethod
    def of(cls, stage: StageConfig) -> Self:
        return cls(**{name: getattr(stage, name) for name in cls.model_fields})


class EvaluateSettings(StepSettings):
    LIMITS: ClassVar = {"track": True, "isolation": True, "limits": {"time_limit", "threads"}}

    runs: StageRuns
    """What is asked."""
    limits: StageLimits
    """How it is asked."""
    track: Track
    base_model_id: str | None = None
    """For a team's own server, which is given the base model."""
    isolation: Isolation | None = None
    metrics: dict[str, tuple[str, ...]] | None = None
    """Of the closed stage: HELM's names of the metrics that leave it, by scenario. Others could carry what
    the server makes of a prompt. None: all."""
    probe: Probe | None = None
    """Checks of the server before the open stage."""
    fresh_start: PositiveInt | None = None

    @classmethod
    def of(cls, planned: PlannedEntry, step: str) -> Self:
        settings = cls.of_package(
            planned.competition, planned.stage_runs[stage_named(step)], planned.entry.track
        )
        own_server = planned.valid is not None and planned.valid.server is not None
        return settings.model_copy(
            update={
                "base_model_id": planned.base_model_id if own_server else None,
                "isolation": planned.isolation if own_server or planned.runs_model_code else None,
                "fresh_start": planned.fresh_start(step),
            }
        )

    @classmethod
    def of_package(cls, competition: Competition, runs: StageRuns, track_id: str) -> Self:
        """Settings of a stage for any model's package of a track."""
        stage = competition.stage(runs.stage)
        metrics = {
            name: tuple(sorted({column.metric for column in scenario.metrics.values()}))
            for name, scenario in stage.scenarios.items()
        }
        return cls(
            competition_id=competition.competition,
            runs=runs,
            limits=StageLimits.of(stage),
            track=limits_of(competition.tracks[track_id]),
            metrics=metrics if runs.stage == "closed" else None,
            probe=competition.probe if runs.stage == "open" else None,
        )

    def records(self, resources: Resources) -> dict[str, Path]:
        return {f"{self.runs.stage} stage": resources.stage_record(self.runs.stage)}


class RunOptions(Strict):
    """How a step runs here. It changes no result, so a change of it re-runs nothing."""

    threads: PositiveInt | None = None
    """CPU threads; None: as many as there are."""
    shards: int = 0
    """How many jobs shared the curation, for the record."""
    telemetry: Telemetry = Telemetry()
    memory_mb: PositiveInt | None = None
    """Memory of the job in MB, for steps that run Palio's own code on a team's files: a process ends that
    reserves twice as much. None: no limit."""
    minutes: PositiveInt | None = None
    """Time for such a step; None: no limit."""
    among: EntryFolders | None = None
    """Where the entries are that a check sees the entry beside; None: in the file's own folder."""

    @classmethod
    def read(cls, text: str, **given: Any) -> RunOptions:
        return read_slice(cls, text, "--options").model_copy(update=given)
