"""Every path of the project, relative to roots that it is given: the only module that spells one.

    results/<track>/<entry>/     `EntryFolder`; logs/ and work/ inside it
    results/{leaderboard,standings,report,published}/
    resources/base_models/<id>/  `BaseModelFolder`, fetched once for all entries
    resources/stages/<stage>/    records of the prepared stages; the open stage's `StageStore`
    <closed_store>/<id>/         `ClosedStore`: everything of the closed stage that shows a prompt

A reproduction or a rehearsal is the same layout under another root, closed store included, so it can
neither read nor write another run's work. The rules in rules/*.smk name the same paths literally, since
that is how Snakemake reads them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Stage = Literal["open", "closed"]
STAGES: tuple[Stage, ...] = ("open", "closed")


def stage_named(name: str) -> Stage:
    return "open" if name == "open" else "closed"


RESULTS = Path("results")
CONFIG = Path("config/config.yaml")
"""The demo's competition: the default of every command."""
RULESET, ENTRIES = "config/rules.yaml", "config/entries"
"""Of a `Project`, relative to it."""
EXAMPLES = Path("config/entries/examples")
LOCK = Path(".snakemake/palio.lock")
ENVIRONMENT_LOCK = Path("envs/lock.txt")
SLURM_PROFILE = Path("profiles/slurm/config.yaml")
REHEARSALS = Path("try")
TEAMS = "resources/teams"
"""Where rule sets let teams' data and programs lie, unless they say otherwise."""
OPEN_INSTANCES = "resources/stages/open/store/instances.parquet"
"""As entry files name the open stage's instances."""


@dataclass(frozen=True)
class Folder:
    """A folder of known content."""

    path: Path


def overrides(competition_id: str) -> Path:
    """Where `palio withdraw` and `palio retry` write down the organizer's decisions."""
    return Path("config/overrides") / f"{competition_id}.yaml"


def panel(competition_id: str, track_id: str) -> Path:
    """The published reference panel of a track."""
    return Path("config/panel") / competition_id / f"{track_id}.json"


class StageStore(Folder):
    """A prepared stage. The closed stage's shows prompts and lies in the closed store."""

    @property
    def instances(self) -> Path:
        """scenario, run, instance, text and reference of every evaluation instance."""
        return self.path / "instances.parquet"

    @property
    def runs(self) -> Path:
        """HELM's run entries and planned runs (ids and counts only)."""
        return self.path / "runs.json"

    @property
    def data(self) -> Path:
        """Downloads in the layout of HELM's caches: scenarios/ and perturbations/."""
        return self.path / "data"

    @property
    def data_digests(self) -> Path:
        """sha256 of every file in `data`."""
        return self.path / "data.json"

    def dry_run(self, key: str) -> Path:
        """HELM's dry run of one set of run entries."""
        return self.path / "helm" / key


class ClosedStore(Folder):
    """<closed_store>/<competition>: mode 0700, outside the repository."""

    @property
    def stage(self) -> StageStore:
        return StageStore(self.path / "stage")

    def runs(self, track_id: str, entry_id: str) -> Path:
        """HELM's runs of one entry, a folder for each package."""
        return self.path / "runs" / track_id / entry_id

    def reproduction(self, key: str) -> ClosedStore:
        """The closed store of a reproduction: it shares no run with the competition's own."""
        return ClosedStore(self.path / "reproductions" / key)


NO_STORE = ClosedStore(Path("private"))
"""For those who look at nothing of the closed stage's runs."""


class BaseModelFolder(Folder):
    """A fetched base model."""

    @property
    def model(self) -> Path:
        """Weights, configuration and tokenizer in Hugging Face format."""
        return self.path / "model"

    @property
    def manifest(self) -> Path:
        return self.path / "manifest.json"


@dataclass(frozen=True)
class Resources:
    """resources/: what all entries share."""

    root: Path = Path("resources")

    @property
    def base_models(self) -> Path:
        return self.root / "base_models"

    def base_model(self, model_id: str) -> BaseModelFolder:
        return BaseModelFolder(self.base_models / model_id)

    def stage_record(self, stage: Stage) -> Path:
        return self.root / "stages" / stage / "stage.json"

    @property
    def open_stage(self) -> Path:
        return self.root / "stages" / "open"

    @property
    def open_store(self) -> StageStore:
        return StageStore(self.open_stage / "store")

    @property
    def demo_sources(self) -> Path:
        """Where the rule `generate_demo_data` puts its files."""
        return self.root / "demo_sources"

    @property
    def teams(self) -> Path:
        """Teams' data and programs."""
        return self.root / "teams"

    def team_program(self, name: str) -> Path:
        return self.teams / name / "program"


class DatasetFolder(Folder):
    """A curated dataset."""

    @property
    def manifest(self) -> Path:
        return self.path / "manifest.json"

    @property
    def rows(self) -> Path:
        return self.path / "train.parquet"

    @property
    def dropped(self) -> Path:
        """Every row that an operation dropped, with the operation and the reason."""
        return self.path / "dropped.parquet"

    @property
    def quarantine(self) -> Path:
        """Malformed records of the sources, with line and reason."""
        return self.path / "quarantine.jsonl"

    @property
    def card(self) -> Path:
        return self.path / "card.md"

    @property
    def work(self) -> Path:
        """Intermediate files of a dataset that belongs to no entry's folder."""
        return self.path / "work"


class PublishedPackage(Folder):
    """A package as it goes to the hub, with what is no part of the model under palio/."""

    @property
    def companions(self) -> Path:
        return self.path / "palio"

    @property
    def manifest(self) -> Path:
        return self.companions / "package.json"

    @property
    def container(self) -> Path:
        return self.companions / "container"

    @property
    def scores(self) -> Path:
        return self.companions / "scores.json"

    @property
    def score_card(self) -> Path:
        return self.companions / "SCORES.md"


class TrainingFolder(Folder):
    """Work of one training, named by the fingerprint of what decides its result; survives every retry."""

    LEDGER = "ledger.jsonl"

    @property
    def ledger(self) -> Path:
        """Seconds of the budget used, over all attempts."""
        return self.path / self.LEDGER

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def manifest(self) -> Path:
        """Manifest of the finished adapter, written last."""
        return self.path / "adapter.json"

    @property
    def telemetry(self) -> Path:
        return self.path / "train.parquet"

    @property
    def facts(self) -> Path:
        """What trained it and how long; goes into finetune.run.json."""
        return self.path / "training.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def initial_adapter(self) -> Path:
        """PiSSA's adapter before training."""
        return self.checkpoints / "initial"

    @property
    def program(self) -> Path:
        """/output of a team's own training program: result/ and checkpoints/."""
        return self.path / "program"

    @property
    def program_result(self) -> Path:
        return self.program / "result"

    @property
    def program_checkpoints(self) -> Path:
        return self.program / "checkpoints"

    @property
    def program_log(self) -> Path:
        return self.path / "program.log"


class HelmFolder(Folder):
    """One package in one stage: what is asked, HELM's files, and everything that was answered."""

    @property
    def run_entries(self) -> Path:
        return self.path / "run_entries.conf"

    @property
    def config(self) -> Path:
        """Registration of the model with HELM."""
        return self.path / "config"

    @property
    def output(self) -> Path:
        """HELM's own: links to the data, and runs/stage/<run>/*.json."""
        return self.path / "output"

    @property
    def journal(self) -> Path:
        """Answers as they came (see `palio.evaluation.client`)."""
        return self.path / "answers.jsonl"

    USED_SECONDS = "used_seconds.json"

    @property
    def used_seconds(self) -> Path:
        """Seconds of the stage's limit used, over all attempts."""
        return self.path / self.USED_SECONDS

    @property
    def log(self) -> Path:
        """HELM's log. It may show prompts and is never copied."""
        return self.path / "helm.log"

    @property
    def server_log(self) -> Path:
        return self.path / "server.log"


class StageTables(Folder):
    """HELM's results of one stage as two tidy tables."""

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.parquet"

    @property
    def instances(self) -> Path:
        return self.path / "instances.parquet"


@dataclass(frozen=True)
class EntryFolder:
    """results/<track>/<entry>: one entry's records, logs and work."""

    results: Path
    track_id: str
    entry_id: str
    store: ClosedStore
    """Where HELM's runs of the closed stage lie: they show prompts."""

    @classmethod
    def at(cls, path: Path, store: ClosedStore = NO_STORE) -> EntryFolder:
        """The entry's folder at a path that ends in <track>/<entry>."""
        path = path.absolute() if len(path.parts) < 3 else path
        return cls(path.parent.parent, path.parent.name, path.name, store)

    @property
    def path(self) -> Path:
        return self.results / self.track_id / self.entry_id

    # records, in the order of an entry's life

    @property
    def check(self) -> Path:
        return self.path / "check.json"

    @property
    def dataset(self) -> DatasetFolder:
        return DatasetFolder(self.path / "dataset")

    @property
    def contamination(self) -> Path:
        return self.path / "contamination.json"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def adapter_manifest(self) -> Path:
        return self.path / "adapter.json"

    @property
    def telemetry(self) -> Path:
        """Loss, speed and memory of every training step."""
        return self.path / "train.parquet"

    @property
    def package(self) -> Path:
        return self.path / "package"

    @property
    def package_manifest(self) -> Path:
        return self.path / "package.json"

    @property
    def probe(self) -> Path:
        return self.path / "probe.json"

    def stage_record(self, stage: Stage) -> Path:
        return self.path / f"{stage}.json"

    def tables(self, stage: Stage) -> StageTables:
        return StageTables(self.path / "helm" / stage)

    @property
    def reproduction(self) -> Path:
        return self.path / "reproduction.json"

    def run_facts(self, step: str) -> Path:
        """When, where and how long: the sidecar of a step's record."""
        return self.path / f"{step}.run.json"

    def log(self, step: str) -> Path:
        return self.path / "logs" / f"{step}.log"

    # what must survive a retry; never a declared output

    @property
    def work(self) -> Path:
        return self.path / "work"

    @property
    def attempts(self) -> Path:
        return self.work / "attempts.jsonl"

    def attempt_log(self, step: str, number: int) -> Path:
        return self.work / "logs" / f"{step}.{number}.log"

    @property
    def failures(self) -> Path:
        return self.work / "failures"

    def failure(self, step: str) -> Path:
        return self.failures / f"{step}.json"

    def heartbeat(self, step: str) -> Path:
        return self.work / "heartbeats" / f"{step}.json"

    @property
    def curation(self) -> Path:
        """Batches of rows under curation."""
        return self.work / "curate"

    @property
    def shards(self) -> Path:
        """Marks of the jobs that share a curation."""
        return self.work / "shards"

    @property
    def trainings(self) -> Path:
        return self.work / "train"

    def training(self, key: str) -> TrainingFolder:
        return TrainingFolder(self.trainings / key)

    @property
    def dashboards(self) -> Path:
        return self.work / "dashboards"

    @property
    def publication(self) -> Path:
        """What `palio publish` would push."""
        return self.work / "publish"

    def unfinished(self, name: str) -> Path:
        """A folder in the making, moved to its place when it is complete."""
        return self.work / f"{name}.tmp"

    def helm_runs(self, stage: Stage) -> Path:
        """HELM's runs of a stage, a folder for each package."""
        if stage == "open":
            return self.work / "helm" / stage
        return self.store.runs(self.track_id, self.entry_id)

    def helm(self, stage: Stage, key: str) -> HelmFolder:
        return HelmFolder(self.helm_runs(stage) / key)


class Boards(Folder):
    """A folder of leaderboards: <track>.json and the same as tables."""

    def leaderboard(self, name: str) -> Path:
        return self.path / f"{name}.json"

    def analysis(self, name: str) -> Path:
        return self.path / f"{name}.analysis.json"

    def table(self, name: str, suffix: str) -> Path:
        """`suffix` such as csv or analysis.md."""
        return self.path / f"{name}.{suffix}"

    @property
    def versions(self) -> Boards:
        return Boards(self.path / "versions")

    @property
    def report(self) -> Path:
        """The report on them, where it has no place of its own."""
        return self.path / "report"


@dataclass(frozen=True)
class Results:
    """results/ of one competition."""

    root: Path = RESULTS
    store: ClosedStore = NO_STORE

    def entry(self, track_id: str, entry_id: str) -> EntryFolder:
        return EntryFolder(self.root, track_id, entry_id, self.store)

    @property
    def leaderboards(self) -> Boards:
        return Boards(self.root / "leaderboard")

    @property
    def standings(self) -> Boards:
        return Boards(self.root / "standings")

    @property
    def report(self) -> Path:
        return self.root / "report"

    @property
    def published(self) -> Boards:
        """The tables of NeurIPS 2023, recomputed."""
        return Boards(self.root / "published")


class Project(Folder):
    """A folder with a competition of its own: a rehearsal, a release."""

    @property
    def config(self) -> Path:
        return self.path / CONFIG

    @property
    def ruleset(self) -> Path:
        return self.path / RULESET

    @property
    def entries(self) -> Path:
        return self.path / ENTRIES

    def entry_file(self, entry_id: str) -> Path:
        return self.entries / f"{entry_id}.yaml"

    @property
    def resources(self) -> Resources:
        return Resources(self.path / "resources")

    @property
    def results(self) -> Results:
        return Results(self.path / RESULTS, ClosedStore(self.path / NO_STORE.path))

    @property
    def log(self) -> Path:
        return self.path / "snakemake.log"

    @property
    def readme(self) -> Path:
        return self.path / "README.md"

    @property
    def environment_lock(self) -> Path:
        return self.path / "lock.txt"

    @property
    def container(self) -> Path:
        """What serves a package."""
        return self.path / "container"
