"""Gather a competition into a folder from which anyone can score it again.

    <out>/README.md                 what is here, and the one command
    <out>/ro-crate-metadata.json    the same for machines: every file with its sha256 (RO-Crate 1.1)
    <out>/config/                   the competition, its rules, every entry file, public run files
    <out>/results/<track>/<entry>/  records of every step, HELM's tables, telemetry; no weights, no data.
                                    replicates/<number>/ in it: those that the leaderboard counts
    <out>/results/leaderboard/      what is to be reproduced
    <out>/results/report/           as it was
    <out>/container/                what serves a package
    <out>/lock.txt                  versions of everything, where the workflow has a lock

The files are listed one by one, by the table of steps and below; nothing is taken because it happens to be
there. Then everything is read once more: a text of the closed stage or a credential in it stops the release.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow.parquet as pq
import yaml

from palio.config import Competition, expand
from palio.credentials import credentials
from palio.entries import Entries
from palio.errors import BadInput, PalioError
from palio.layout import (
    ENTRIES,
    ENVIRONMENT_LOCK,
    RULESET,
    STAGES,
    Boards,
    EntryFolder,
    Project,
    Results,
    replicate_name,
)
from palio.packaging.container import write_container
from palio.pipeline import STEPS
from palio.provenance import write_text
from palio.records import Leaderboard, read_record
from palio.records.tables import INSTANCES_SCHEMA, METRICS_SCHEMA
from palio.release.crate import METADATA, describe

TABLES = {"metrics.parquet": METRICS_SCHEMA, "instances.parquet": INSTANCES_SCHEMA}
"""HELM's tables of a stage. Their schemas hold ids and numbers; a table with another column is not taken."""
ANONYMOUS = {"host": None, "slurm_job_id": None}
"""Facts about a run that a release leaves out."""
LEADERBOARD_SUFFIXES = (
    *("json", "csv", "parquet", "md", "tex", "analysis.json", "analysis.md"),
    *("decision.json", "decision.md"),
)
REPORT_SUFFIXES = (".html", ".js", ".svg", ".png", ".csv", ".json", ".md", ".tex", ".parquet")
TEXT_SUFFIXES = (
    *(".json", ".yaml", ".conf", ".md", ".csv", ".tex"),
    *(".html", ".js", ".svg", ".txt", ".lock", ".py"),
)
SHORTEST_TEXT = 20
"""Characters of the shortest line of a closed instance to search for: shorter ones occur in ordinary text."""
README = """\
# {title}

Entries: {entries}. Tracks: {tracks}. Score it again, with Palio installed:

```
palio verify .
```

That holds every file against the sha256 in {metadata}, computes every leaderboard from the
records and HELM tables under results/, and says whether it is the one under results/leaderboard/. `lock.txt`
names the versions that made it; `container/` serves a package.

Not here: weights and training data (their sha256 are in package.json, adapter.json and the manifests; the
entry files say where the data comes from), and the texts of the closed stage.
"""


class Leak(PalioError):
    """What was to be handed out holds a secret, so it was not made."""


def gather(
    competition: Competition, *, results: Results, leaderboards: Boards, report: Path, out: Path
) -> Path:
    """Make the release in the folder `out`, which must not exist or be an earlier release.

    Raises:
        BadInput: a leaderboard is missing, or `out` holds something else.
        Leak: a file holds a text of the closed stage or a credential.
    """
    if out.exists() and any(out.iterdir()) and not (out / METADATA).is_file():
        raise BadInput(out, why="already exists and is not a release", fix="name another folder")
    building = Project(out.with_name(f".{out.name}.tmp"))
    shutil.rmtree(building.path, ignore_errors=True)
    building.path.mkdir(parents=True)
    try:
        entries = Entries(competition)
        _config(competition, entries.files, building)
        for track_id in competition.tracks:
            _leaderboard(track_id, leaderboards, building.results.leaderboards)
            for name in [*entries, *_scored_replicates(leaderboards.leaderboard(track_id))]:
                _entry(results.entry(track_id, name), building.results.entry(track_id, name))
        _take_tree(report, building.results.report)
        write_container(building.container)
        if ENVIRONMENT_LOCK.is_file():
            _take(ENVIRONMENT_LOCK, building.environment_lock)
        write_text(building.readme, _readme(competition, list(entries)))
        search_for_leaks(building.path, closed_lines(competition))
        describe(building.path, competition)
        shutil.rmtree(out, ignore_errors=True)
        building.path.rename(out)
    finally:
        shutil.rmtree(building.path, ignore_errors=True)
    return out


# --- what goes in ------------------------------------------------------------------------------------


def _config(competition: Competition, files: Mapping[str, Path], release: Project) -> None:
    """The config with paths inside the release. A run file from outside the workflow's folder stays away."""
    content = competition.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
    content |= {"entries": [ENTRIES], "rules": RULESET, "closed_store": "~/palio-closed"}
    for stage in STAGES:
        for name, scenario in content["stages"][stage]["scenarios"].items():
            path = expand(scenario["run_entries"])
            inside = f"config/helm/{stage}/{name}.conf"
            if path.is_file() and path.resolve().is_relative_to(Path.cwd().resolve()):
                _take(path, release.path / inside)
            scenario["run_entries"] = inside
    write_text(release.config, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    _take(Path(competition.rules), release.ruleset)
    for entry_id, path in files.items():
        _take(path, release.entry_file(entry_id))


def _scored_replicates(leaderboard: Path) -> list[str]:
    """Return the names of the replicates that are in a leaderboard."""
    return [
        replicate_name(scored.entry, replicate.number)
        for scored in read_record(Leaderboard, leaderboard).entries
        for replicate in scored.replicates
    ]


def _entry(folder: EntryFolder, out: EntryFolder) -> None:
    for step in (step for step in STEPS if step.replicated or folder.replicate is None):
        for path in (path for path in step.released(folder) if path.is_file()):
            schema = TABLES.get(path.name)
            if schema and not pq.read_schema(path).equals(schema):
                raise Leak(f"{path} has other columns than the tables of a stage; run {step.rule} again")
            _take(path, out.path / path.relative_to(folder.path))
        if step.facts and (path := folder.run_facts(step.name)).is_file():
            facts = read_record(step.facts, path)
            facts.model_copy(update=ANONYMOUS).write(out.run_facts(step.name))
        if (path := folder.failure(step.name)).is_file():
            _take(path, out.failure(step.name))


def _leaderboard(track_id: str, boards: Boards, out: Boards) -> None:
    if not boards.leaderboard(track_id).is_file():
        raise BadInput(
            boards.leaderboard(track_id), why="no such leaderboard", fix="run the workflow to its end"
        )
    for suffix in LEADERBOARD_SUFFIXES:
        if (path := boards.table(track_id, suffix)).is_file():
            _take(path, out.table(track_id, suffix))


def _take_tree(folder: Path, out: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix in REPORT_SUFFIXES:
            _take(path, out / path.relative_to(folder))


def _take(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, target)


def _readme(competition: Competition, entries: list[str]) -> str:
    return README.format(
        title=competition.title, entries=len(entries), tracks=len(competition.tracks), metadata=METADATA
    )


# --- what must not ---------------------------------------------------------------------------------------


def closed_lines(competition: Competition) -> list[bytes]:
    """The longest line of every closed instance, where the closed store is at hand."""
    instances = competition.store.stage.instances
    if not instances.is_file():
        return []
    texts = pq.read_table(instances, columns=["text"])["text"].to_pylist()
    lines = {max(text.splitlines() or [""], key=len).strip() for text in texts}
    return sorted(line.encode() for line in lines if len(line) >= SHORTEST_TEXT)


def search_for_leaks(folder: Path, secret_lines: list[bytes]) -> None:
    """Raise Leak, naming file and kind but not the text, for the first file that holds what it must not."""
    for path in _text_files(folder):
        content = path.read_bytes()
        name = path.relative_to(folder)
        if found := next(credentials(content), None):
            raise Leak(f"{name}: {found.why}; remove it and try again")
        # JSON writes quotes and newlines otherwise, HTML more: lines are compared without either.
        if any(line in content or _escaped(line) in content for line in secret_lines):
            raise Leak(f"{name} contains a text of the closed stage; find out how it got there")


def _escaped(line: bytes) -> bytes:
    return json.dumps(line.decode(), ensure_ascii=False)[1:-1].encode()


def _text_files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix in TEXT_SUFFIXES:
            yield path
