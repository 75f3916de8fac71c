"""What the Snakemake rules ask of a competition: entries, inputs, parameters and resources.

The rules hold no logic of their own. Parameters are canonical JSON of the slice that decides a step,
so that a step re-runs when its own content changes and at no other time. A broken entry file does
not stop the workflow: the entry's `check_entry` fails and the standings say why.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from palio.config import (
    STAGES,
    BaseModelSource,
    Competition,
    Entry,
    StageLimits,
    entry_files,
    load_competition,
    load_entry,
    load_rules,
)
from palio.errors import BadInput
from palio.evaluation.helm import check_directions, stage_runs
from palio.provenance import canonical_json, fingerprint
from palio.rules.check import approved_model

GIB = 1024
DEMO_SOURCES = "resources/demo_sources"
"""Where the rule `generate_demo_data` puts its files."""


def slice_of(model: BaseModel) -> str:
    """Canonical JSON of a model without the fields that were left at their defaults' `None`."""
    return canonical_json(model.model_dump(mode="json", exclude_none=True))


@dataclass(frozen=True)
class _EntryFile:
    """What an entry file says; a broken one is shown in the first track."""

    track: str
    entry: Entry | None
    fault: str = ""
    """Why there is no entry."""


class Workflow:
    """One competition as the rules see it. Wildcards: `track`, `entry`, `stage`, `base_model`."""

    def __init__(self, config: Mapping[str, Any], file: str = "config") -> None:
        self.competition: Competition = load_competition(config, file)
        self.rules = load_rules(Path(self.competition.rules))
        self.files = {
            name: path
            for name, path in entry_files(self.competition, file).items()
            if name not in self.competition.withdrawn
        }
        self._read: dict[str, _EntryFile] = {}
        check_directions(self.competition, file)
        self.stage_runs = {stage: stage_runs(self.competition, stage) for stage in STAGES}

    # --- entries: each file is read when it is asked for, since a job of one entry needs no other's

    def _file(self, name: str) -> _EntryFile:
        if name not in self._read:
            path, tracks = self.files[name], self.tracks
            try:
                entry = load_entry(path)
                if entry.track not in tracks:
                    raise BadInput(path, "track", entry.track, f"use one of {', '.join(tracks)}")
                self._read[name] = _EntryFile(entry.track, entry)
            except BadInput as fault:
                self._read[name] = _EntryFile(tracks[0], None, str(fault))
        return self._read[name]

    @functools.cached_property
    def entries(self) -> dict[tuple[str, str], Entry | None]:
        """All, by track and id."""
        return {(self._file(name).track, name): self._file(name).entry for name in self.files}

    @property
    def faults(self) -> list[str]:
        """What is wrong with broken entry files."""
        return [fault for name in self.files if (fault := self._file(name).fault)]

    # --- wildcards and targets

    @property
    def tracks(self) -> list[str]:
        return list(self.competition.tracks)

    def entries_of(self, track: str) -> list[str]:
        return sorted(name for at, name in self.entries if at == track)

    def entry(self, wildcards: Any) -> Entry | None:
        found = self._file(wildcards.entry)
        if found.track != wildcards.track:
            raise KeyError(f"{wildcards.entry} is an entry of track {found.track}")
        return found.entry

    def base_model_source(self, model: str) -> BaseModelSource:
        return self._base_models()[model]

    def _base_models(self) -> dict[str, BaseModelSource]:
        return {entry.base_model.id: entry.base_model for entry in self.entries.values() if entry}

    def base_model_id(self, wildcards: Any) -> str:
        entry = self.entry(wildcards)
        return entry.base_model.id if entry else "unknown"

    # --- inputs

    def finetuned(self, wildcards: Any) -> bool:
        """Whether the entry is trained here: it is not an untuned base model or a team's server."""
        entry = self.entry(wildcards)
        return entry is not None and entry.trained

    def source_files(self, wildcards: Any) -> list[str]:
        """Data that is there or that a rule makes. A team's missing file does not stop the others' plan:
        `curate` names it."""
        entry = self.entry(wildcards)
        if entry is None or entry.dataset is None:
            return []
        paths = [source.path for source in entry.dataset.sources if source.path]
        return [path for path in paths if path.startswith(f"{DEMO_SOURCES}/") or Path(path).exists()]

    def held_against(self, wildcards: Any) -> list[str]:
        """The open stage, where the entry's data is to hold none of its instances."""
        entry = self.entry(wildcards)
        inputs = entry.dataset.inputs if entry and entry.dataset else ()
        wanted = any(given.kind == "open_stage" for _, given in inputs)
        return ["resources/stages/open/stage.json"] if wanted else []

    def program_files(self, wildcards: Any) -> list[str]:
        """What the team hands in to be run: a change of it is a change of the entry."""
        entry = self.entry(wildcards)
        if entry is None or entry.program is None:
            return []
        files, image = entry.program.files, entry.program.image or ""
        found = [str(path) for path in Path(files).rglob("*") if path.is_file()] if files else []
        return sorted(found) + ([image] if image.endswith(".sif") and Path(image).exists() else [])

    def base_model_manifest(self, wildcards: Any) -> list[str]:
        """None for a broken entry file: its check fails, and says why."""
        known = self.entry(wildcards) is not None
        return [f"resources/base_models/{self.base_model_id(wildcards)}/manifest.json"] if known else []

    def checked_model(self, wildcards: Any) -> list[str]:
        """The base model whose card the check reads; nothing for an entry that is refused without it."""
        entry = self.entry(wildcards)
        approved = entry is not None and approved_model(entry.base_model, self.rules) is not None
        return self.base_model_manifest(wildcards) if approved else []

    def adapter_manifest(self, wildcards: Any) -> list[str]:
        entry_dir = f"results/{wildcards.track}/{wildcards.entry}"
        return [f"{entry_dir}/adapter.json"] if self.finetuned(wildcards) else []

    def of_entries(self, track: str, files: tuple[str, ...]) -> list[str]:
        return [f"results/{track}/{entry}/{file}" for entry in self.entries_of(track) for file in files]

    def datasets(self, track: str) -> list[str]:
        """Contamination reports of the entries that have a dataset, or are too broken to tell."""
        return [
            f"results/{track}/{entry}/contamination.json"
            for entry in self.entries_of(track)
            if (found := self.entries[track, entry]) is None or found.dataset
        ]

    # --- jobs that share a curation: read, shards of phase 1, join 1, shards of phase 2, …, curate_dataset

    def shard_count(self, wildcards: Any) -> int:
        """How many jobs share the entry's curation, 0 if one does it all. A dataset keeps the number that it
        was made with while its recipe is the same: for other jobs Snakemake would make it again."""
        made = Path(f"results/{wildcards.track}/{wildcards.entry}/curate.run.json")
        run = json.loads(made.read_text(encoding="utf-8")) if made.exists() else {}
        if run.get("recipe") == fingerprint(self.dataset_recipe(wildcards)):
            return int(run["shards"])
        return self.competition.shards.get(wildcards.entry, 0)

    def last_shards(self, wildcards: Any) -> list[str]:
        """What curate_dataset waits for."""
        entry = self.entry(wildcards)
        return self._shards(wildcards, entry.dataset.phases if entry and entry.dataset else 0)

    def shards(self, wildcards: Any) -> list[str]:
        """What a join waits for; the sources (0) are read before there are shards."""
        return self._shards(wildcards, int(wildcards.phase))

    def _shards(self, wildcards: Any, phase: int) -> list[str]:
        count = self.shard_count(wildcards) if phase else 0
        folder = f"results/{wildcards.track}/{wildcards.entry}/work/shards"
        return [f"{folder}/{phase}.{number}-of-{count}" for number in range(1, count + 1)]

    def join_before(self, wildcards: Any) -> str:
        phase = int(wildcards.phase) - 1
        return f"results/{wildcards.track}/{wildcards.entry}/work/shards/{phase}.joined"

    # --- parameters

    def identity(self, wildcards: Any) -> str:
        """What the rules look at, so that a learning rate does not re-run the check."""
        entry = self.entry(wildcards)
        if entry is None:
            return self._file(wildcards.entry).fault
        looked_at = entry.model_dump(mode="json", exclude_none=True, exclude={"finetune", "title", "dataset"})
        looked_at["max_length"] = entry.finetune.max_length if entry.finetune else None
        looked_at["sources"] = (
            [source.model_dump(mode="json", exclude_none=True) for source in entry.dataset.sources]
            if entry.dataset
            else []
        )
        looked_at["inputs"] = entry.dataset.inputs if entry.dataset else []
        return fingerprint([looked_at, self.rules.model_dump(mode="json")])

    def against(self) -> str:
        return slice_of(self.competition.checked_against)

    def among(self) -> str:
        """Where the entries are that an entry is seen beside."""
        return slice_of(self.competition.entry_folders)

    def entry_file(self, wildcards: Any) -> str:
        return str(self.files[wildcards.entry])

    def base_model(self, wildcards: Any) -> str:
        return slice_of(self.base_model_source(wildcards.base_model))

    def approved_as(self, wildcards: Any) -> str:
        """The base model's approved family; empty if it has none, and then nothing is downloaded."""
        found = approved_model(self.base_model_source(wildcards.base_model), self.rules)
        return found.family if found else ""

    def dataset_recipe(self, wildcards: Any) -> str:
        entry = self.entry(wildcards)
        return slice_of(entry.dataset) if entry and entry.dataset else ""

    def training(self, wildcards: Any) -> list[str]:
        """Options of `palio finetune`: the recipe, or the team's own program and its confinement."""
        entry = self.entry(wildcards)
        if entry and entry.command:
            network = ["--network"] if self.rules.network_in_training else []
            return ["--program", slice_of(entry.command), *self.isolation(wildcards), *network]
        return ["--recipe", slice_of(entry.finetune)] if entry and entry.finetune else []

    def handed_in(self, wildcards: Any) -> list[str]:
        """Options of `palio package`: what the package is made of."""
        entry = self.entry(wildcards)
        if entry and entry.server:
            return ["--server", slice_of(entry.server)]
        return ["--adapter" if self.finetuned(wildcards) else "--no-adapter"]

    def own_server(self, wildcards: Any) -> list[str]:
        """Options of `palio evaluate` for a team's own server."""
        entry = self.entry(wildcards)
        if entry is None or entry.server is None:
            return []
        base_model = f"resources/base_models/{entry.base_model.id}"
        return ["--base-model", base_model, *self.isolation(wildcards)]

    def isolation(self, wildcards: Any) -> list[str]:
        """The confinement of the entry's own program, if it has one."""
        entry = self.entry(wildcards)
        return ["--isolation", slice_of(self.competition.isolation)] if entry and entry.program else []

    def track_limits(self, wildcards: Any) -> str:
        track = self.competition.tracks[wildcards.track]
        limits = {"title", "gpu_memory_gb", "ram_gb", "cpus", "training_budget"}
        return canonical_json(track.model_dump(mode="json", include=limits, exclude_none=True))

    def runs(self, stage: str) -> str:
        return slice_of(self.stage_runs[stage])

    def limits(self, stage: str) -> str:
        settings = self.competition.stage(stage)
        return slice_of(StageLimits(**{name: getattr(settings, name) for name in StageLimits.model_fields}))

    def again(self, step: str) -> Callable[[Any], list[str]]:
        """Options that give a step a fresh start, where `palio retry` granted one."""

        def options(wildcards: Any) -> list[str]:
            granted = self.competition.retries.get(wildcards.entry, {}).get(step)
            return ["--fresh-start", str(granted)] if granted else []

        return options

    def whole(self) -> str:
        """All that scores and reports depend on."""
        operating = {"notify", "stalled_after", "retries", "shards"}
        return canonical_json(self.competition.model_dump(mode="json", exclude_none=True, exclude=operating))

    def teams(self, track: str) -> str:
        """Entry -> team and title: what leaderboard and report show of the entry files."""
        return canonical_json(
            {
                name: [entry.team, entry.title] if entry else self._file(name).fault
                for (at, name), entry in self.entries.items()
                if at == track
            }
        )

    @property
    def telemetry(self) -> str:
        return slice_of(self.competition.telemetry)

    # --- resources

    def cpus(self, wildcards: Any) -> int:
        return self.competition.tracks[wildcards.track].cpus

    def mem_mb(self, wildcards: Any) -> int:
        return self.competition.tracks[wildcards.track].ram_gb * GIB

    def gpu_model(self, wildcards: Any) -> str:
        return self.competition.tracks[wildcards.track].gpu_model or ""

    def finetune_minutes(self, wildcards: Any) -> int:
        track = self.competition.tracks[wildcards.track]
        return _minutes(track.training_budget + track.training_margin)

    def stage_minutes(self, stage: Literal["open", "closed"]) -> int:
        settings = self.competition.stage(stage)
        return _minutes(settings.time_limit + settings.margin)


def _minutes(seconds: int) -> int:
    return -(-seconds // 60)
