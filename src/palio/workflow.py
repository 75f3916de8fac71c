"""What the Snakemake rules ask of a competition: targets, inputs, settings and resources.

The rules hold no logic of their own. A broken entry file does not stop the workflow: the entry's
`check_entry` fails and the standings say why.

Which steps run is decided in `palio.planning`, and Snakemake is told by a step's inputs. A step that is due
has its inputs, and among them, if it has a record already, a file that is newer than every record. A step
that is not due has none, so nothing makes Snakemake run it. The jobs of a run see what its controller
planned: a file that is edited while they wait changes the next plan.
"""

from __future__ import annotations

import atexit
import functools
import os
import pickle
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from palio.config import (
    BaseModelSource,
    Competition,
    Entry,
    load_competition,
    load_rules,
)
from palio.demo.data import FAMILIES as DEMO_FAMILIES
from palio.eligibility.check import approved_model
from palio.entries import AnyEntry, BrokenEntry, Entries
from palio.errors import BadInput
from palio.evaluation.helm import check_directions, stage_runs
from palio.layout import RUNS, STAGES, EntryFolder, Resources, Results, Stage, entry_and_replicate
from palio.pipeline import BY_NAME, Step, steps_of
from palio.planning import due, made_of, shared_due
from palio.provenance import atomic_path, canonical_json, fingerprint
from palio.records import Leaderboard, Made, read_record
from palio.settings import EntryFolders, PlannedEntry, RunOptions, slice_of

MB_PER_GB = 1024
BUILD_MARGIN_MINUTES = 30
"""What the job of a build gets on top, to copy the folder and the image."""
OPERATING = {"notify", "stalled_after", "retries", "shards", "site"}
"""Keys of a competition that neither scores nor reports depend on."""


class Workflow:
    """One competition as the rules see it. Wildcards: `track`, `entry`, `stage`, `base_model`.

    A replicate runs by the rules of its entry: the wildcard `entry` is then its `replicate_name`, and the
    methods below take such a name wherever they take an entry's.
    """

    def __init__(self, config: Mapping[str, Any] | Path, file: str = "config") -> None:
        """Read the competition, its rule set and its stages' run files; entry files are read when needed.

        Raises:
            BadInput: any of them is wrong.
        """
        self.competition: Competition = load_competition(config, file)
        self.rules = load_rules(Path(self.competition.rules))
        self.entries = Entries(self.competition, file)
        self.resources = Resources()
        self.results = Results(store=self.competition.store)
        check_directions(self.competition, file)
        self.stage_runs = {stage: stage_runs(self.competition, stage) for stage in STAGES}
        self.barred: dict[str, str] = {}
        """Name -> why an entry or replicate that has something due is left out of this run."""
        self._due: dict[str, dict[str, str]] = {}

    # --- what a run planned

    @staticmethod
    def forced() -> bool:
        """Whether Snakemake was told to run finished steps (--forceall): their order needs their inputs. The
        rules replace it, since Snakemake knows only when it builds its graph."""
        return False

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "forced"}

    def save(self, run: str) -> None:
        """Write the plan down for the jobs of a run, and remove what earlier runs left."""
        for path in RUNS.glob("*"):
            if str(path) != self.__dict__.get("_newer"):
                path.unlink(missing_ok=True)
        with atomic_path(_plan_file(run)) as temporary:
            temporary.write_bytes(pickle.dumps(self))
        atexit.register(_plan_file(run).unlink, missing_ok=True)

    @classmethod
    def planned_by(cls, run: str | None) -> Workflow | None:
        """Return the workflow as this user's controller of `run` planned it; None without one."""
        file = _plan_file(run or "no run")
        if not file.exists() or file.stat().st_uid != os.getuid():
            return None
        found = pickle.loads(file.read_bytes())  # noqa: S301 (written by this user's controller)
        assert isinstance(found, cls)
        return found

    def due_steps(self) -> list[tuple[EntryFolder, Step]]:
        """Every step that is due, of every entry and replicate that takes part."""
        return [
            (folder, BY_NAME[step])
            for folder in self.folders()
            for step in self.due(folder.name)
            if folder.name not in self.barred
        ]

    def folders(self) -> Iterator[EntryFolder]:
        """The folders of all entries that take part, each before those of its replicates."""
        for track_id, entries in self.active.items():
            for entry_id in entries:
                folder = self.results.entry(track_id, entry_id)
                yield from (folder, *self.replicates(folder))

    # --- which steps are due

    def due(self, name: str) -> dict[str, str]:
        """Return why each step of an entry or replicate is due; steps that are not are left out.

        An entry's are also due that a replicate needs again.
        """
        if name not in self._due:
            entry_id, replicate = entry_and_replicate(name)
            folder = self.results.entry(self.entries[entry_id].track, name)
            found = self.due_in(folder)
            for other in self.replicates(folder) if replicate is None else ():
                found = shared_due(self.planned(other.name), other, self.resources) | found
            self._due[name] = found
        return self._due[name]

    def due_in(self, folder: EntryFolder) -> dict[str, str]:
        """Return why each step of the entry in `folder` is due by the records that it has now. A folder that
        cannot be read or written is the reason of them all."""
        planned = self.planned(folder.name)
        try:
            if found := due(planned, folder, self.resources):
                _require_writable(folder.path)
        except OSError as fault:
            self.barred[folder.name] = f"its folder cannot be used: {fault}"
            steps = steps_of(planned.entry, replicate=folder.replicate is not None)
            return {step.name: self.barred[folder.name] for step in steps}
        return found

    @functools.cached_property
    def _newer(self) -> str:
        """A file that is newer than every record: what reads it runs."""
        path = RUNS / f"{uuid.uuid4().hex[:12]}.due"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{path.stem}\n")  # unlike any before, or Snakemake takes it for unchanged
        atexit.register(path.unlink, missing_ok=True)
        return str(path)

    def _again(self, record: Path) -> list[str]:
        """Return the input that makes Snakemake run a step again, if there is a record."""
        if not record.exists():
            return []
        with suppress(OSError):
            if record.stat().st_mtime >= (now := time.time()) - 1:  # by another clock
                os.utime(record, (now - 1, now - 1))
        return [self._newer]

    def again(self, step: str) -> Callable[[Any], list[str]]:
        """What a step reads only if it is due though it has a record."""

        def of(wildcards: Any) -> list[str]:
            is_due = step in self.due(wildcards.entry)
            return self._again(BY_NAME[step].record(self.folder(wildcards))) if is_due else []

        return of

    def if_due(self, step: str, *inputs: str | Callable[[Any], Iterable[str]]) -> Callable[[Any], list[str]]:
        """What a step reads if it is due: files by name, with wildcards, or functions of them. `entry_id` is
        `entry`, and the entry itself where that is a replicate of it."""

        def of(wildcards: Any) -> list[str]:
            if not self.forced() and step not in self.due(wildcards.entry):
                return []
            entry_id, _ = entry_and_replicate(wildcards.entry)
            names = {"track": wildcards.track, "entry": wildcards.entry, "entry_id": entry_id}
            return [
                path
                for given in inputs
                for path in ([given.format(**names)] if isinstance(given, str) else given(wildcards))
            ]

        return of

    def again_if_changed(self, record: Path, now: Made) -> list[str]:
        """The same for a record that no entry owns: a stage's, or a leaderboard."""
        return self._again(record) if made_of(record) != now else []

    def stage_again(self, wildcards: Any) -> list[str]:
        stage: Stage = wildcards.stage
        return self.again_if_changed(self.resources.stage_record(stage), self.stage_runs[stage].made)

    def score_again(self, wildcards: Any) -> list[str]:
        """Also if results were deleted: Snakemake makes nothing for a leaderboard that is there."""
        board = self.results.leaderboards.leaderboard(wildcards.track)
        folders = (self.results.entry(wildcards.track, name) for name in self.active[wildcards.track])
        if any(not BY_NAME["closed"].record(one).exists() for one in folders if one.name not in self.barred):
            return self._again(board)
        return self.again_if_changed(board, self.scored_with(wildcards.track))

    # --- wildcards and targets

    @property
    def tracks(self) -> list[str]:
        return list(self.competition.tracks)

    @functools.cached_property
    def active(self) -> dict[str, dict[str, AnyEntry]]:
        """Track id -> entry id -> entry, without the withdrawn ones."""
        withdrawn = self.competition.withdrawn
        return {
            track_id: {entry_id: entry for entry_id, entry in entries.items() if entry_id not in withdrawn}
            for track_id, entries in self.entries.by_track().items()
        }

    # --- replicates

    def replicates(self, folder: EntryFolder) -> list[EntryFolder]:
        """Folders of the replicates that an entry is to have."""
        chosen, entry_id = self.competition.replicates, folder.entry_id
        if chosen is None or folder.replicate is not None:
            return []
        if chosen.entries == "finalists":
            wanted = entry_id in self._finalists[folder.track_id]
        else:
            wanted = chosen.entries == "all" or entry_id in chosen.entries
        entry = self.entries[entry_id] if wanted else None
        if not isinstance(entry, Entry) or not entry.trained:
            return []
        return [replace(folder, replicate=number) for number in range(2, chosen.seeds + 1)]

    @functools.cached_property
    def _finalists(self) -> dict[str, set[str]]:
        """By track, the first entries of the leaderboard that there is now. Its ranks are those of the
        entries' own training, so no replicate changes who is a finalist."""
        assert self.competition.replicates is not None
        places, found = self.competition.replicates.finalists, {}
        for track_id in self.tracks:
            entries = []
            with suppress(BadInput):  # no leaderboard yet
                entries = read_record(Leaderboard, self.results.leaderboards.leaderboard(track_id)).entries
            found[track_id] = {scored.entry for scored in entries if scored.rank <= places}
        return found

    @property
    def faults(self) -> list[str]:
        """One line for each broken entry file, and each entry that is left out of the run."""
        self.due_steps()  # finds the barred
        entries = (entry for of_track in self.active.values() for entry in of_track.values())
        broken = [str(entry.fault) for entry in entries if isinstance(entry, BrokenEntry)]
        left_out = [str(fault) for fault in self.entries.left_out]
        return [*broken, *left_out, *(f"{entry_id}: {why}" for entry_id, why in self.barred.items())]

    def entry(self, wildcards: Any) -> AnyEntry:
        entry = self.entries[entry_and_replicate(wildcards.entry)[0]]
        if entry.track != wildcards.track:
            raise KeyError(f"{wildcards.entry} is an entry of track {entry.track}")
        return entry

    def _valid(self, wildcards: Any) -> Entry | None:
        entry = self.entry(wildcards)
        return entry if isinstance(entry, Entry) else None

    def folder(self, wildcards: Any) -> EntryFolder:
        return self.results.entry(wildcards.track, wildcards.entry)

    # --- inputs

    def adapter(self, wildcards: Any) -> list[str]:
        """The adapter, where the entry is trained here."""
        entry = self._valid(wildcards)
        return [str(self.folder(wildcards).adapter_manifest)] if entry and entry.trained else []

    def image(self, wildcards: Any) -> list[str]:
        """The image, where it is built from a Dockerfile."""
        entry = self._valid(wildcards)
        built = entry is not None and BY_NAME["image"] in steps_of(entry)
        return [str(self.folder(wildcards).image_manifest)] if built else []

    def source_files(self, wildcards: Any) -> list[str]:
        """Data that exists or that a rule makes. A team's missing file does not stop the others' plan:
        `curate` names it."""
        entry = self._valid(wildcards)
        sources = entry.dataset.sources if entry and entry.dataset else ()
        made = {self.resources.demo_source(family) for family in DEMO_FAMILIES}
        paths = [Path(source.path) for source in sources if source.path]
        return [str(path) for path in paths if path in made or path.exists()]

    def held_against(self, wildcards: Any) -> list[str]:
        """The open stage, where the entry's data must hold none of its instances."""
        entry = self._valid(wildcards)
        inputs = entry.dataset.inputs if entry and entry.dataset else ()
        wanted = any(given.kind == "open_stage" for _, given in inputs)
        return [str(self.resources.stage_record("open"))] if wanted else []

    def base_model_manifest(self, wildcards: Any) -> list[str]:
        """Nothing for a broken entry file: its check fails, and says why."""
        entry = self._valid(wildcards)
        return [str(self.resources.base_model(entry.base_model.id).manifest)] if entry else []

    def checked_model(self, wildcards: Any) -> list[str]:
        """The base model whose card the check reads; nothing for an entry that is refused without it."""
        entry = self._valid(wildcards)
        approved = entry is not None and approved_model(entry.base_model, self.rules) is not None
        return self.base_model_manifest(wildcards) if approved else []

    def records(self, track_id: str) -> list[str]:
        """Records of both stages of every entry and replicate of a track, the contamination of those with a
        dataset, and checks that are due: of a broken entry file its check alone, which says why."""
        paths = []
        for entry_id, entry in self.active[track_id].items():
            folder, is_due = self.results.entry(track_id, entry_id), self.due(entry_id)
            if entry_id in self.barred:
                continue
            if "check" in is_due:
                paths.append(folder.check)
            if isinstance(entry, BrokenEntry):
                continue
            paths += [folder.stage_record(stage) for stage in STAGES]
            if BY_NAME["contamination"] in steps_of(entry):
                paths.append(folder.contamination)
            for replicate in self.replicates(folder):
                self.due(replicate.name)  # finds the barred
                stages = STAGES if replicate.name not in self.barred else ()
                paths += [replicate.stage_record(stage) for stage in stages]
        return [str(path) for path in paths]

    def site_marks(self, _: Any) -> list[str]:
        """What says of each entry that its results have been published."""
        self.due_steps()  # finds the barred
        return [
            str(self.results.site_mark(track_id, entry_id))
            for track_id, entries in self.active.items()
            for entry_id, entry in entries.items()
            if isinstance(entry, Entry) and entry_id not in self.barred
        ]

    # --- jobs that share a curation: read, shards of phase 1, join 1, shards of phase 2, …, curate_dataset

    def shard_count(self, wildcards: Any) -> int:
        """How many jobs share the entry's curation, 0 if one does it all."""
        return self.competition.shards.get(wildcards.entry, 0)

    def last_shards(self, wildcards: Any) -> list[str]:
        """What curate_dataset waits for."""
        entry = self._valid(wildcards)
        return self._shards(wildcards, entry.dataset.phases if entry and entry.dataset else 0)

    def shards(self, wildcards: Any) -> list[str]:
        """What a join waits for; the sources (0) are read before there are shards."""
        return self._shards(wildcards, int(wildcards.phase))

    def _shards(self, wildcards: Any, phase: int) -> list[str]:
        count = self.shard_count(wildcards) if phase else 0
        folder = self.folder(wildcards).shards
        return [str(folder / f"{phase}.{number}-of-{count}") for number in range(1, count + 1)]

    def join_before(self, wildcards: Any) -> str:
        return str(self.folder(wildcards).shards / f"{int(wildcards.phase) - 1}.joined")

    # --- parameters

    def planned(self, name: str) -> PlannedEntry:
        entry_id, replicate = entry_and_replicate(name)
        entry = self.entries[entry_id]
        family = approved_model(entry.base_model, self.rules) if isinstance(entry, Entry) else None
        return PlannedEntry(
            competition=self.competition,
            rules=self.rules,
            stage_runs=self.stage_runs,
            file=self.entries.files[entry_id],
            entry_id=entry_id,
            entry=entry,
            replicate=replicate,
            runs_model_code=family is not None and bool(family.code),
        )

    def settings(self, step: str) -> Callable[[Any], str]:
        """Settings of a step for an entry, as its rule passes them on; empty where it cannot run."""

        def of(wildcards: Any) -> str:
            if step != "check" and not isinstance(self.entry(wildcards), Entry):
                return ""
            return slice_of(BY_NAME[step].settings.of(self.planned(wildcards.entry), step))

        return of

    def options(self, *names: str) -> Callable[[Any], str]:
        """These `RunOptions` of a step: a resource and no parameter, since they re-run nothing."""

        def of(wildcards: Any) -> str:
            options = RunOptions(
                shards=self.shard_count(wildcards) if "shards" in names else 0,
                telemetry=self.competition.telemetry,
                among=EntryFolders.of(self.competition),
            )
            return canonical_json(options.model_dump(mode="json", exclude_none=True, include=set(names)))

        return of

    def runs(self, wildcards: Any) -> str:
        return slice_of(self.stage_runs[wildcards.stage])

    def base_model_source(self, wildcards: Any) -> BaseModelSource:
        entries = (entry for of_track in self.active.values() for entry in of_track.values())
        sources = {entry.base_model.id: entry.base_model for entry in entries if isinstance(entry, Entry)}
        return sources[wildcards.base_model]

    def base_model(self, wildcards: Any) -> str:
        return slice_of(self.base_model_source(wildcards))

    def approved_as(self, wildcards: Any) -> str:
        """The base model's approved family; empty if it has none, and then nothing is downloaded."""
        family = approved_model(self.base_model_source(wildcards), self.rules)
        return family.family if family else ""

    def approved_code(self, wildcards: Any) -> str:
        """The base model's own Python files that the rules approve: JSON, sha256 by name."""
        family = approved_model(self.base_model_source(wildcards), self.rules)
        return canonical_json((family.code if family else None) or {})

    def whole(self) -> str:
        """All that scores and reports depend on."""
        return canonical_json(self.competition.model_dump(mode="json", exclude_none=True, exclude=OPERATING))

    def teams(self, track_id: str) -> str:
        """What leaderboard and report show of the entry files."""
        return canonical_json(
            {
                entry_id: [entry.team, entry.title] if isinstance(entry, Entry) else str(entry.fault)
                for entry_id, entry in self.active[track_id].items()
            }
        )

    def scored_with(self, track_id: str) -> Made:
        """What a leaderboard of a track is made with."""
        prizes = [self.rules.prizes.model_dump(mode="json")] if self.rules.prizes else []
        return Made(settings={"score": fingerprint([self.whole(), self.teams(track_id), *prizes])})

    # --- resources

    def cpus(self, wildcards: Any) -> int:
        return self.competition.tracks[wildcards.track].cpus

    def mem_mb(self, wildcards: Any) -> int:
        return self.competition.tracks[wildcards.track].ram_gb * MB_PER_GB

    def build_mem_mb(self, wildcards: Any) -> int:
        return round(self.competition.isolation.build_ram_gb * MB_PER_GB)

    def build_minutes(self, wildcards: Any) -> int:
        return self.competition.isolation.build_time // 60 + BUILD_MARGIN_MINUTES

    def gpu_model(self, wildcards: Any) -> str:
        return self.competition.tracks[wildcards.track].gpu_model or ""

    def minutes(self, step: str) -> Callable[[Any], int]:
        """Job time of a step: its limit and the margin to load and save."""
        limit = BY_NAME[step].limit
        assert limit is not None

        def of(wildcards: Any) -> int:
            return limit(self.competition, wildcards.track).job_minutes

        return of


def _plan_file(run: str) -> Path:
    return RUNS / f"{run}.plan"


def _require_writable(folder: Path) -> None:
    """Raise OSError if a folder exists and cannot be written."""
    if folder.exists():
        with tempfile.TemporaryFile(dir=folder):
            pass
