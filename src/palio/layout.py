"""Every path of the project, relative to roots that it is given: the only module that spells one.

    results/<track>/<entry>/     `EntryFolder`; logs/ and work/ inside it
    results/<track>/<entry>/replicates/<number>/    the same, of the entry trained again with another seed
    results/{leaderboard,standings,report,site,published}/
    resources/base_models/<id>/  `BaseModelFolder`, fetched once for all entries
    resources/stages/<stage>/    records of the prepared stages; the open stage's `StageStore`
    <closed_store>/<id>/         `ClosedStore`: everything of the closed stage that shows a prompt

A reproduction or a rehearsal is the same layout under another root, closed store included, so it can
neither read nor write another run's work. The rules in rules/*.smk name the same paths literally, since
that is how Snakemake reads them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol, Self, overload

Stage = Literal["open", "closed"]
STAGES: tuple[Stage, ...] = ("open", "closed")

CONFIG = Path("config/config.yaml")  # the demo's competition: the default of every command
RULESET, ENTRIES = "config/rules.yaml", "config/entries"  # of a `Project`
EXAMPLES = Path("config/entries/examples")
LOCK = Path(".snakemake/palio.lock")
ENDED = Path(".snakemake/palio.ended")  # touched as a job ends: see `palio.operating.hooks`
RUNS = Path(".snakemake/palio")  # <run>.plan, <token>.due: see `palio.workflow`
ENVIRONMENT_LOCK = Path("envs/lock.txt")
SLURM_PROFILE = Path("profiles/slurm/config.yaml")
REHEARSALS = Path("try")
TEAMS = "resources/teams"  # where rule sets let teams' data and programs lie, unless they say otherwise
OPEN_INSTANCES = "resources/stages/open/store/instances.parquet"  # as entry files name them


def stage_named(name: str) -> Stage:
    return "open" if name == "open" else "closed"


def overrides(competition_id: str) -> Path:
    """Where `palio withdraw` and `palio retry` write down the organizer's decisions."""
    return Path("config/overrides") / f"{competition_id}.yaml"


def schema_file(kind: str) -> Path:
    """The JSON schema of entry files, competitions or rule sets."""
    return Path("config/schemas") / f"{kind}.json"


def panel(competition_id: str, track_id: str) -> Path:
    """The published reference panel of a track."""
    return Path("config/panel") / competition_id / f"{track_id}.json"


class _HasPath(Protocol):
    @property
    def path(self) -> Path: ...


@dataclass(frozen=True)
class At:
    """A path below a folder, as an attribute of its class."""

    name: str

    @overload
    def __get__(self, folder: None, owner: type) -> Self: ...
    @overload
    def __get__(self, folder: _HasPath, owner: type) -> Path: ...
    def __get__(self, folder: _HasPath | None, owner: type) -> Self | Path:
        return self if folder is None else folder.path / self.name


@dataclass(frozen=True)
class Folder:
    """A folder of known content."""

    path: Path


class StageStore(Folder):
    """A prepared stage. The closed stage's shows prompts and lies in the closed store."""

    # scenario, run, instance, text, reference of every evaluation instance
    instances = At("instances.parquet")
    # the same of every request, with its prompt, before a model's window shortens it
    prompts = At("prompts.parquet")
    runs = At("runs.json")  # HELM's run entries and planned runs: ids and counts only
    data = At("data")  # downloads in the layout of HELM's caches: scenarios/ and perturbations/
    data_digests = At("data.json")  # sha256 of every file in data/

    def dry_run(self, key: str) -> HelmFolder:
        """HELM's dry run of one set of run entries."""
        return HelmFolder(self.path / "helm" / key)


class ClosedStore(Folder):
    """<closed_store>/<competition>: mode 0700, outside the repository."""

    @property
    def stage(self) -> StageStore:
        return StageStore(self.path / "stage")

    def runs(self, track_id: str, entry_id: str, replicate: int | None = None) -> Path:
        """HELM's runs of one entry, or of a replicate of it: a folder for each package."""
        if replicate is None:
            return self.path / "runs" / track_id / entry_id
        return self.path / "replicates" / track_id / entry_id / str(replicate)

    def reproduction(self, key: str) -> ClosedStore:
        """The closed store of a reproduction, which shares no run with the competition's own."""
        return ClosedStore(self.path / "reproductions" / key)


NO_STORE = ClosedStore(Path("private"))
"""For readers who need nothing of the closed stage's runs."""


class BaseModelFolder(Folder):
    """A fetched base model."""

    model = At("model")  # weights, configuration and tokenizer in Hugging Face format
    manifest = At("manifest.json")


class DatasetFolder(Folder):
    """A curated dataset."""

    manifest = At("manifest.json")
    rows = At("train.parquet")
    dropped = At("dropped.parquet")  # every row that an operation dropped, with the operation and the reason
    quarantine = At("quarantine.jsonl")  # malformed records of the sources, with line and reason
    card = At("card.md")

    @property
    def work(self) -> Path:
        """Intermediate files of a dataset that belongs to no entry's folder: beside it, kept for reruns."""
        return self.path.parent / "work/curate"


class TrainingFolder(Folder):
    """Work of one training, named by the fingerprint of what decides its result; survives every retry."""

    ledger = At("ledger.jsonl")  # seconds of the budget used, over all attempts
    adapter = At("adapter")
    manifest = At("adapter.json")  # of the finished adapter, written last
    telemetry = At("train.parquet")
    facts = At("training.json")  # what trained it and how long; goes into finetune.run.json
    checkpoints = At("checkpoints")
    initial_adapter = At("checkpoints/initial")  # PiSSA's adapter before training
    program = At("program")  # /output of a team's own training program, or of a model with its own code
    program_result = At("program/result")
    program_log = At("program.log")


class RoomFolder(Folder):
    """Work on a model with code of its own, in a room."""

    output = At("output")  # the only folder that the room writes to
    model = At("output/model")
    log = At("room.log")


class BuildFolder(Folder):
    """One build of a team's Dockerfile, named by the fingerprint of its folder."""

    context = At("context")  # our copy of the folder
    output = At("output")  # what the build writes
    built = At("output/image.tar")
    archive = At("image.tar")
    log = At("build.log")


class HelmFolder(Folder):
    """One package in one stage: what is asked, HELM's files, and everything that was answered."""

    run_entries = At("run_entries.conf")
    config = At("config")  # registration of the model with HELM
    window = At("config/window.json")  # counts tokens of prompts (`palio.evaluation.window`)
    output = At("output")  # HELM's own: links to the data, and the runs
    runs = At("output/runs/stage")  # <run>/*.json
    journal = At("answers.jsonl")  # answers as they came (`palio.evaluation.client`)
    used_seconds = At("used_seconds.json")  # of the stage's limit, over all attempts
    asked = At("asked.json")  # questions by run (`palio.evaluation.earlier`)
    log = At("helm.log")  # may show prompts, and is never copied
    server_log = At("server.log")


class HelmSuite(Folder):
    """Runs of several entries for HELM's own viewer, in the layout of its output folder."""

    schema = At("schema.yaml")
    config = At("config")
    export = At("static")

    def run(self, suite: str, name: str) -> Path:
        return self.path / "runs" / suite / name


class StageTables(Folder):
    """HELM's results of one stage as two tidy tables."""

    metrics = At("metrics.parquet")
    instances = At("instances.parquet")


class PublishedPackage(Folder):
    """A package as it goes to the hub, its companions, which are not part of the model, under palio/."""

    companions = At("palio")
    manifest = At("palio/package.json")
    container = At("palio/container")
    scores = At("palio/scores.json")
    score_card = At("palio/SCORES.md")


def replicate_name(entry_id: str, number: int) -> str:
    """Where the rules' wildcard `entry` says a replicate is: results/<track>/<entry>/replicates/<number>."""
    return f"{entry_id}/replicates/{number}"


def entry_and_replicate(name: str) -> tuple[str, int | None]:
    """Return entry id and number of the replicate, None if the name is the entry's own."""
    entry_id, _, number = name.partition("/replicates/")
    return entry_id, int(number) if number.isdecimal() else None


@dataclass(frozen=True)
class EntryFolder:
    """results/<track>/<entry>: one entry's records, logs and work.

    A replicate, the entry trained again with another seed, has a folder of its own inside. It shares the
    entry's check, image and dataset.
    """

    results: Path
    track_id: str
    entry_id: str
    store: ClosedStore
    """Where HELM's runs of the closed stage lie: they show prompts."""
    replicate: int | None = None
    """Number of the replicate, from 2; None: the entry's own training."""

    adapter = At("adapter")
    adapter_manifest = At("adapter.json")
    telemetry = At("train.parquet")  # loss, speed and memory of every training step
    package = At("package")
    package_manifest = At("package.json")
    probe = At("probe.json")
    reproduction = At("reproduction.json")
    # what must survive a retry, never a declared output
    work = At("work")
    attempts = At("work/attempts.jsonl")
    failures = At("work/failures")
    curation = At("work/curate")  # batches of rows under curation
    shards = At("work/shards")  # marks of the jobs that share a curation
    trainings = At("work/train")
    builds = At("work/builds")
    dashboards = At("work/dashboards")
    publication = At("work/publish")  # what `palio publish` would push

    @classmethod
    def at(cls, path: Path, store: ClosedStore = NO_STORE) -> EntryFolder:
        """The entry's folder at a path that ends in <track>/<entry>."""
        path = path.absolute() if len(path.parts) < 3 else path
        if path.parent.name == "replicates" and path.name.isdecimal():
            return replace(cls.at(path.parent.parent, store), replicate=int(path.name))
        return cls(path.parent.parent, path.parent.name, path.name, store)

    @property
    def name(self) -> str:
        """The entry's id, of a replicate with its number."""
        return self.entry_id if self.replicate is None else replicate_name(self.entry_id, self.replicate)

    @property
    def path(self) -> Path:
        return self.results / self.track_id / self.name

    @property
    def own(self) -> EntryFolder:
        """The folder of the entry's own training."""
        return replace(self, replicate=None)

    def replicates(self) -> list[EntryFolder]:
        """Folders of the entry's replicates, as far as they exist."""
        folder = self.own.path / "replicates"
        found = folder.iterdir() if folder.is_dir() else ()
        numbers = sorted(int(path.name) for path in found if path.name.isdecimal())
        return [replace(self, replicate=number) for number in numbers]

    @property
    def check(self) -> Path:
        return self.own.path / "check.json"

    @property
    def image(self) -> Path:
        """Built from a team's Dockerfile, an OCI archive."""
        return self.own.path / "image.tar"

    @property
    def image_manifest(self) -> Path:
        return self.own.path / "image.json"

    @property
    def contamination(self) -> Path:
        return self.own.path / "contamination.json"

    @property
    def dataset(self) -> DatasetFolder:
        return DatasetFolder(self.own.path / "dataset")

    def stage_record(self, stage: Stage) -> Path:
        return self.path / f"{stage}.json"

    def tables(self, stage: Stage) -> StageTables:
        return StageTables(self.path / "helm" / stage)

    def run_facts(self, step: str) -> Path:
        """When, where and how long: the sidecar of a step's record."""
        return self.path / f"{step}.run.json"

    def log(self, step: str) -> Path:
        return self.path / "logs" / f"{step}.log"

    def attempt_log(self, step: str, number: int) -> Path:
        return self.work / "logs" / f"{step}.{number}.log"

    def settings(self, step: str) -> Path:
        """The settings that a step last ended with, to tell what differs from the config."""
        return self.work / "settings" / f"{step}.json"

    def room(self, task: str) -> RoomFolder:
        return RoomFolder(self.work / "rooms" / task)

    def kept(self, step: str) -> Path:
        """What a step has made, until the run ends (`palio.operating.kept`)."""
        return self.work / "kept" / step

    def failure(self, step: str) -> Path:
        return self.failures / f"{step}.json"

    def heartbeat(self, step: str) -> Path:
        return self.work / "heartbeats" / f"{step}.json"

    def training(self, key: str) -> TrainingFolder:
        return TrainingFolder(self.trainings / key)

    def build(self, key: str) -> BuildFolder:
        return BuildFolder(self.builds / key)

    @property
    def program_files(self) -> Path:
        """Our copy of the folder of a team's own training program."""
        return self.work / "files"

    def program_image(self, suffix: str) -> Path:
        """Our copy of the image of a team's own training program."""
        return self.work / f"image{suffix}"

    def unfinished(self, name: str) -> Path:
        """A folder in the making, moved to its place when it is complete."""
        return self.work / f"{name}.tmp"

    def helm_runs(self, stage: Stage) -> Path:
        """HELM's runs of a stage, a folder for each package."""
        return (
            self.work / "helm" / stage
            if stage == "open"
            else self.store.runs(self.track_id, self.entry_id, self.replicate)
        )

    def helm(self, stage: Stage, key: str) -> HelmFolder:
        return HelmFolder(self.helm_runs(stage) / key)


class DemoSources(Folder):
    """The demo's training data."""

    def source(self, family: str) -> Path:
        return self.path / f"{family}.jsonl"


@dataclass(frozen=True)
class Resources(Folder):
    """resources/: what all entries share."""

    path: Path = Path("resources")
    base_models = At("base_models")
    open_stage = At("stages/open")
    demo_sources = At("demo_sources")  # where the rule generate_demo_data puts its files
    teams = At("teams")  # teams' data and programs

    def demo_source(self, family: str) -> Path:
        return DemoSources(self.demo_sources).source(family)

    def base_model(self, model_id: str) -> BaseModelFolder:
        return BaseModelFolder(self.base_models / model_id)

    def stage_record(self, stage: Stage) -> Path:
        return self.path / "stages" / stage / "stage.json"

    @property
    def open_store(self) -> StageStore:
        return StageStore(self.open_stage / "store")

    def team_program(self, name: str) -> Path:
        return self.teams / name / "program"

    def window(self, fingerprint: str) -> Path:
        """A tokenizer that counts a prompt's tokens, by its content and what made it."""
        return self.path / "windows" / f"{fingerprint}.json"


class Boards(Folder):
    """A folder of leaderboards: <track>.json and the same as tables."""

    report = At("report")  # on them, where it has no place of its own

    def leaderboard(self, name: str) -> Path:
        return self.path / f"{name}.json"

    def analysis(self, name: str) -> Path:
        return self.path / f"{name}.analysis.json"

    def decision(self, name: str) -> Path:
        return self.path / f"{name}.decision.json"

    def table(self, name: str, suffix: str) -> Path:
        """`suffix` such as csv or analysis.md."""
        return self.path / f"{name}.{suffix}"

    @property
    def versions(self) -> Boards:
        return Boards(self.path / "versions")


class AnswerPages(Folder):
    """Pages of the open stage's answers beside a report, and scripts that hold their data in parts."""

    def page(self, track_id: str) -> Path:
        return self.path / f"{track_id}.html"

    def questions(self, track_id: str, part: int) -> Path:
        return self.path / track_id / "questions" / f"{part}.js"

    def marks(self, track_id: str, entry_id: str) -> Path:
        return self.path / track_id / "entries" / entry_id / "marks.js"

    def answers(self, track_id: str, entry_id: str, part: int) -> Path:
        return self.path / track_id / "entries" / entry_id / f"{part}.js"


class FeedbackFiles(Folder):
    """Where `palio feedback` writes."""

    def page(self, entry_id: str) -> Path:
        return self.path / f"{entry_id}.html"

    def archive(self, entry_id: str) -> Path:
        return self.path / f"{entry_id}.zip"


class FeedbackFolder(Folder):
    """What one team may see, before it becomes a zip."""

    page = At("index.html")
    answer_lines = At("answers.jsonl")
    records = At("records")

    @property
    def answers(self) -> AnswerPages:
        return AnswerPages(self.path / "answers")


class ReportFolder(Folder):
    """A report: its page, and what lies beside it."""

    page = At("index.html")
    figures = At("figures")

    @property
    def answers(self) -> AnswerPages:
        return AnswerPages(self.path / "answers")


class SiteFolder(Folder):
    """A static site: the only names in the folder that `palio publish-site` writes or replaces."""

    mark = At(".palio-site")  # says whose the names below are
    page = At("index.html")
    entries = At("entries")
    history = At("history")  # every leaderboard that was published, oldest first by name

    @property
    def answers(self) -> AnswerPages:
        return AnswerPages(self.path / "answers")

    @property
    def downloads(self) -> Boards:
        return Boards(self.path / "downloads")

    def entry(self, track_id: str, entry_id: str) -> Path:
        return self.entries / track_id / f"{entry_id}.html"

    def published(self, track_id: str) -> Path:
        return self.history / track_id

    @property
    def parts(self) -> tuple[Path, ...]:
        """What is replaced as a whole, the page that leads to the rest last."""
        return (self.entries, self.answers.path, self.downloads.path, self.history, self.page)


@dataclass(frozen=True)
class Results(Folder):
    """results/ of one competition."""

    path: Path = Path("results")
    store: ClosedStore = NO_STORE
    report = At("report")

    def entry(self, track_id: str, name: str) -> EntryFolder:
        """The folder of an entry, or of a replicate by its `replicate_name`."""
        entry_id, replicate = entry_and_replicate(name)
        return EntryFolder(self.path, track_id, entry_id, self.store, replicate)

    @property
    def leaderboards(self) -> Boards:
        return Boards(self.path / "leaderboard")

    @property
    def standings(self) -> Boards:
        return Boards(self.path / "standings")

    def site_mark(self, track_id: str, entry_id: str) -> Path:
        """Says that the site has been published since the entry has finished."""
        return self.path / "site" / track_id / entry_id

    @property
    def published(self) -> Boards:
        """The tables of NeurIPS 2023, recomputed."""
        return Boards(self.path / "published")


class Project(Folder):
    """A folder with a competition of its own: a rehearsal, a release."""

    config = At("config/config.yaml")
    ruleset = At(RULESET)
    entries = At(ENTRIES)
    log = At("snakemake.log")
    readme = At("README.md")
    environment_lock = At("lock.txt")
    container = At("container")  # what serves a package

    def entry_file(self, entry_id: str) -> Path:
        return self.entries / f"{entry_id}.yaml"

    @property
    def resources(self) -> Resources:
        return Resources(self.path / Resources.path)

    @property
    def results(self) -> Results:
        return Results(self.path / Results.path, ClosedStore(self.path / NO_STORE.path))
