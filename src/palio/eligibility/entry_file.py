"""Check entry files as they lie on disk: schema, rules, neighbours, where sources lie, the base model's card.

Works offline: of the base model it reads what is there of resources/base_models/<id>/model.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from palio.config import (
    DOCKERFILES,
    ID_PATTERN,
    Entry,
    Fault,
    RuleSet,
    faults,
    load_entry,
    load_rules,
    read_yaml,
)
from palio.credentials import FIX, credentials, credentials_in
from palio.demo.data import FAMILIES as DEMO_FAMILIES
from palio.eligibility.check import approved_model, violations
from palio.eligibility.dockerfile import START_BYTES, dockerfile_notices, dockerfile_violations
from palio.eligibility.lineage import base_model_violations, lineage_violations, model_facts
from palio.eligibility.neighbours import Participants, violations_among
from palio.errors import BadInput, RuleViolation
from palio.incoming import Incoming, saved_tables
from palio.layout import Resources
from palio.markup import terminal
from palio.records import BaseModelManifest, Check, Violation, read_record
from palio.settings import CheckedAgainst, EntryFolders

RESOURCES = Resources()
CLOCKS_APART = 60
"""Seconds that a file may be dated in the future: the clocks of two machines differ."""
HEAD = 1 << 16
"""Bytes of a source that, with its size, tell it from others."""


class EntryViolations(RuleViolation):
    """An entry breaks rules; the message is one line with each."""

    def __init__(self, file: Path, found: list[Violation]) -> None:
        super().__init__("; ".join(f"{file}: {violation}" for violation in found))


@dataclass(frozen=True)
class Checked:
    """One entry file and every finding about it."""

    file: Path
    violations: list[Violation]
    notices: list[Violation] = field(default_factory=list)
    record: Check | None = None
    """None with violations."""

    def require_clean(self) -> Check:
        """The record of a clean entry. Raises EntryViolations otherwise."""
        if self.record is None:
            raise EntryViolations(self.file, self.violations)
        return self.record

    def lines(self) -> list[str]:
        """One line for each violation and notice, or that the file is clean."""
        lines = [f"notice: {self.file}: {notice}" for notice in self.notices]
        lines += [f"error: {self.file}: {violation}" for violation in self.violations]
        lines += [f"{self.file}: clean"] if self.record is not None else []
        return [terminal(line) for line in lines]


def check_file(
    file: Path, against: CheckedAgainst, among: EntryFolders | None = None, *, by_hand: bool = False
) -> Checked:
    """Check one entry file against the rules, among the given entries (default: those of its folder).

    Args:
        by_hand: also whether its sources exist. In the workflow curation finds that out: a dataset that has
            been made outlives its sources.
    """
    found = list(_schema(file))
    if found:
        return Checked(file, found)
    entry = load_entry(file)
    rules = _rules(Path(against.rules))
    others = participants(among or EntryFolders(folders=(str(file.parent.resolve()),)))
    broken, notices = violations_among(file.stem, entry, rules, others.beside(file.stem))
    given = {"tracks": against.track_ids, "vllm_stages": against.vllm_stages}
    found = [*violations(entry, rules, **given), *broken, *_places(entry, rules)]
    found += _credentials(file, entry, rules)
    broken, likely = _dockerfile(entry, rules)
    found, notices = [*found, *broken], [*notices, *likely]
    found += _absent(entry) if by_hand else ()
    for folder in (
        RESOURCES.base_model(entry.base_model.id).model,
        Path(entry.base_model.path or os.devnull),
    ):
        if folder.is_dir():
            found += lineage_violations(entry.base_model, model_facts(folder), rules)
            break
    manifest = RESOURCES.base_model(entry.base_model.id).manifest
    family = approved_model(entry.base_model, rules)
    if manifest.is_file() and family is not None:
        approved = family.code or {}
        found += base_model_violations(read_record(BaseModelManifest, manifest), entry, approved)
    if found or family is None:
        return Checked(file, found, notices)
    record = Check(
        competition=against.competition_id,
        track=entry.track,
        entry=file.stem,
        rules_version=rules.version,
        base_model_family=family.family,
        notices=notices,
    )
    return Checked(file, [], notices, record)


@functools.cache
def participants(among: EntryFolders) -> Participants:
    """Read the valid entry files of the folders, once a process."""
    entries = {}
    for path in (path for folder in among.folders for path in sorted(Path(folder).glob("*.yaml"))):
        if path.stem not in among.withdrawn:
            with suppress(BadInput):  # reported by its own check
                entries[path.stem] = load_entry(path)
    return Participants(entries, source_content)


def source_content(path: str) -> str:
    """Return a short digest of a source's file: size and hash of its head; its path if it does not exist."""
    try:
        with Incoming(Path(path).parent, Path(path).name).open() as stream:
            head = hashlib.sha256(stream.read(HEAD)).hexdigest()
            return f"{stream.seek(0, os.SEEK_END)}:{head}"
    except (OSError, RuleViolation):
        return path


def _is_saved(folder: Path) -> bool:
    try:
        return bool(saved_tables(Incoming(folder.parent, folder.name)))
    except (OSError, ValueError, RuleViolation):
        return False


_rules = functools.cache(load_rules)


# --- schema --------------------------------------------------------------------------------------------


def _schema(file: Path) -> Iterator[Violation]:
    """Everything that keeps the file from being an entry."""
    if not ID_PATTERN.fullmatch(file.stem) or file.suffix != ".yaml":
        yield Violation(
            rule="schema.id",
            key="",
            why=f"the file name {file.name!r} is not an entry id",
            fix="rename it to <id>.yaml, the id of letters, digits, - and _",
        )
    try:
        content = read_yaml(file)
    except BadInput as error:
        why = f"{error.key}: {error.why}" if error.key else error.why
        yield Violation(rule="schema.file", key="", why=why, fix=error.fix or "correct it")
        return
    for fault in faults(Entry, content):
        yield _schema_violation(fault)


_SCHEMA_RULES = {"missing": "schema.missing", "extra_forbidden": "schema.unknown_key"}


def _schema_violation(fault: Fault) -> Violation:
    why = fault.why or ("is wrong" if fault.value is None else f"is {fault.value!r}")
    return Violation(
        rule=_SCHEMA_RULES.get(fault.kind, "schema.value"), key=fault.key, why=why, fix=fault.fix
    )


# --- where an entry's files may lie ---------------------------------------------------------------------


def _places(entry: Entry, rules: RuleSet) -> Iterator[Violation]:
    """Check that a team's files lie in the teams' folders: not in a stage's store or somebody's home."""
    folders = rules.folders_of(entry.team)
    for index, source in enumerate(entry.dataset.sources if entry.dataset else ()):
        if source.path and (refused := _refused(source.path, folders)):
            key = f"dataset.sources.{index}.path"
            yield Violation(rule="data.path", key=key, why=refused.why, fix=refused.fix)
    inputs = entry.dataset.inputs if entry.dataset else []
    brought = [
        ("data.path", f"dataset.{key}", given.path) for key, given in inputs if given.kind == "model_folder"
    ]
    for section, program in entry.programs.items():
        brought += [("program.path", f"{section}.{key}", path) for key, path in program.paths.items()]
    for rule, key, path in brought:
        if path and (refused := _refused(path, folders)):
            fix = refused.fix or f"put it into a folder of your team, {folders[0]}"
            yield Violation(rule=rule, key=key, why=refused.why, fix=fix)
    for key, given in inputs:
        if given.kind == "open_stage" and not _inside(given.path, (str(RESOURCES.open_stage),)):
            yield Violation(
                rule="data.path",
                key=f"dataset.{key}",
                why=f"{given.path} is not the open stage's",
                fix="leave it out: the open stage's instances are the default",
            )


def _absent(entry: Entry) -> Iterator[Violation]:
    """Find sources that do not exist, other than the demo's, which the workflow makes."""
    made = {RESOURCES.demo_source(family) for family in DEMO_FAMILIES}
    for index, source in enumerate(entry.dataset.sources if entry.dataset else ()):
        path = Path(source.path or os.devnull)
        key = f"dataset.sources.{index}.path"
        if path.is_dir() and not _is_saved(path):
            why = f"{path} is a folder, and not one that the library datasets saved"
            yield Violation(rule="data.missing", key=key, why=why, fix="name the file in it")
        if path.exists() or path in made:
            continue
        there = [other.name for other in {*made, *path.parent.glob("*")} if other.parent == path.parent]
        near = difflib.get_close_matches(path.name, there, 1, cutoff=0.75)
        fix = f"did you mean {path.parent / near[0]}?" if near else "put the file there, or correct the path"
        yield Violation(rule="data.missing", key=key, why=f"{path} does not exist", fix=fix)


def _credentials(path: Path, entry: Entry, rules: RuleSet) -> Iterator[Violation]:
    """Look for tokens and keys in the entry file and in the files of its program."""
    for found in credentials(path.read_bytes()):
        yield Violation(rule="credentials", key="", why=found.why, fix=FIX)
    roots = [Path(folder) for folder in rules.folders_of(entry.team)]
    for section, program in entry.programs.items():
        for key, brought in program.paths.items():
            with suppress(
                RuleViolation, OSError
            ):  # a path that is refused, or absent: another check names it
                for file, found in credentials_in(Incoming.locate(Path(brought), roots)):
                    why = f"{file}: {found.why}"
                    yield Violation(rule="credentials", key=f"{section}.{key}", why=why, fix=FIX)


def _dockerfile(entry: Entry, rules: RuleSet) -> tuple[list[Violation], list[Violation]]:
    """Return violations and notices of the Dockerfile that an entry brings, if it does."""
    if entry.server is None or entry.server.dockerfile is None:
        return [], []
    key, roots = "server.dockerfile", [Path(folder) for folder in rules.folders_of(entry.team)]
    texts = {}
    try:
        folder = Incoming.locate(Path(entry.server.dockerfile), roots)
        for file in folder.files():
            name = PurePosixPath(file.name).relative_to(folder.name).as_posix()
            if (name in DOCKERFILES or name.endswith((".py", ".sh", ".txt"))) and file.size() <= START_BYTES:
                texts[name] = file.read().decode("utf-8", "replace")
    except (RuleViolation, OSError):  # as above
        return [], []
    text = next((texts.pop(name) for name in DOCKERFILES if name in texts), None)
    if text is None:
        why = f"{entry.server.dockerfile} has no Dockerfile"
        return [
            Violation(rule="program.path", key=key, why=why, fix="put one there, or correct the path")
        ], []
    return [*dockerfile_violations(text, key)], [*dockerfile_notices(text, texts, key)]


def _refused(source: str, folders: tuple[str, ...]) -> RuleViolation | None:
    """Return why a step would refuse to open a team's file or folder, or Snakemake could not go by its date;
    None if neither, or it is absent."""
    try:
        given = Incoming.locate(Path(source), [Path(folder) for folder in folders])
        folder = given.is_folder()
        latest = _file_system_now() + CLOCKS_APART
        for file in given.files() if folder else (given,):
            if (modified := file.modified()) > latest:  # every result would be older, and be removed
                when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(modified))
                return RuleViolation(f"{file} is dated in the future ({when} UTC)", f"run touch {file}")
        for table in saved_tables(given) if folder else ():
            table.size()
    except RuleViolation as refused:
        return refused
    except (OSError, ValueError):  # absent or broken: curation names it
        pass
    return None


def _file_system_now() -> float:
    """By the clock that dates files here: this machine's own may be wrong."""
    try:
        with tempfile.TemporaryFile(dir=Path.cwd()) as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:  # nothing can be written here
        return time.time()


def _inside(path: str, folders: tuple[str, ...]) -> bool:
    real = Path(path).resolve()
    return any(real.is_relative_to(Path(folder).resolve()) for folder in folders)
