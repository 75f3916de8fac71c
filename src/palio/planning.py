"""Which steps of an entry are due: those whose record does not hold, and those that read what is made again.

A record names the settings and inputs that it was made with (`Made`). It holds while they are those of the
config, whatever Snakemake remembers of it: a controller that died leaves no memory at all. Planning, scores,
standings and status ask here, so they never disagree.

    due(planned, folder)   step -> why it is due
    shared_due(planned, …) the same of the steps that a replicate shares with its entry
    made(step, …)          what a step is about to make its record with
    stamp(step, …)         that, written into the record

A limit only decides where an unfinished step ended, so it makes no finished one due. What nobody needs any
more is not due either: a dataset that was deleted after its adapter was trained, a team's file that has gone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

from palio.errors import PalioError, State
from palio.layout import EntryFolder, Resources
from palio.pipeline import BY_NAME, Step, steps_of
from palio.provenance import file_sha256, fingerprint, write_json, write_text
from palio.records import Made
from palio.settings import PlannedEntry, StepSettings, slice_of

NOT_RUN = "not run yet"
LARGE = 1_000_000
"""Bytes. Larger files of a team are told apart by size and time: hashing them would delay every start."""
DIFFERENCES_SHOWN = 2
DIGEST_LENGTH = 64


# --- what a record was made with ---------------------------------------------------------------------------


def made(step: Step, folder: EntryFolder, settings: StepSettings, resources: Resources) -> Made:
    """Return what `step` is about to make its record with: its settings, and what it finds to read."""
    decided: dict[str, str] = {}
    for name in step.reads:
        if before := _made(_content(BY_NAME[name].record(folder))):
            decided |= before.settings
    return Made(
        settings=decided | {step.name: fingerprint(settings.decisive)},
        limits=fingerprint(settings.bounds),
        inputs=dict(_inputs(step, folder, settings, resources)),
    )


def stamp(step: Step, folder: EntryFolder, settings: StepSettings, with_: Made) -> None:
    """Write into a step's record what it was made with. A record without it does not hold."""
    record = step.record(folder)
    write_text(folder.settings(step.name), slice_of(settings))
    write_json(record, _content(record) | {"made": with_.model_dump(mode="json")})


def vanished(step: Step, folder: EntryFolder, settings: StepSettings) -> list[str]:
    """Return the team's files that a step needs, that are gone, and that it has read before."""
    try:
        before = type(settings).read(folder.settings(step.name).read_text(encoding="utf-8")).files()
    except (OSError, PalioError):
        return []
    return [file for file in settings.files() if file in before and not Path(file).exists()]


def _content(record: Path) -> dict[str, Any]:
    """Return a record as it was written; nothing if there is none, or if it is no JSON object."""
    try:
        content = json.loads(record.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _made(content: Mapping[str, Any]) -> Made | None:
    return Made.model_validate(content["made"]) if content.get("made") else None


def _inputs(
    step: Step, folder: EntryFolder, settings: StepSettings, resources: Resources
) -> Iterator[tuple[str, str]]:
    """Yield name and identity of everything that a step reads, as far as it exists."""
    records = {name: BY_NAME[name].record(folder) for name in step.reads} | settings.records(resources)
    for name, path in records.items():
        if content := _content(path):
            yield name, fingerprint({key: value for key, value in content.items() if key != "made"})
    for name in settings.files():
        if (path := Path(name)).exists():
            yield name, _files_identity(path)


def _files_identity(path: Path) -> str:
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return fingerprint([[str(file), *_file_identity(file)] for file in files if file.is_file()])


def _file_identity(file: Path) -> tuple[str | int, ...]:
    about = file.stat()
    return (file_sha256(file),) if about.st_size < LARGE else (about.st_size, about.st_mtime_ns)


def made_of(record: Path) -> Made | None:
    """Return what a record says it was made with."""
    return _made(_content(record))


# --- whether it holds --------------------------------------------------------------------------------------


def due(planned: PlannedEntry, folder: EntryFolder, resources: Resources) -> dict[str, str]:
    """Return why each step of an entry, or of a replicate, is due, in the order of its life. Other steps are
    left out."""
    reasons = _reasons(planned, folder, resources)
    own = steps_of(planned.entry, replicate=planned.replicate is not None)
    return {step.name: reasons[step.name] for step in own if step.name in reasons}


def shared_due(planned: PlannedEntry, folder: EntryFolder, resources: Resources) -> dict[str, str]:
    """Return why a replicate needs steps of its entry again: a dataset that was deleted after its use."""
    reasons = _reasons(planned, folder, resources)
    own = steps_of(planned.entry, replicate=True)
    read = {name for step in own if step.name in reasons for name in step.reads} - {step.name for step in own}
    return {name: reasons[name] for name in read if name in reasons}


def _reasons(planned: PlannedEntry, folder: EntryFolder, resources: Resources) -> dict[str, str]:
    """Return why each step is due of those that an entry, or a replicate, has or shares."""
    steps = steps_of(planned.entry)
    settings = {step.name: step.settings.of(planned, step.name) for step in steps}
    readers = {step.name: [other.name for other in steps if step.name in other.reads] for step in steps}
    missing = {step.name for step in steps if not _exists(step, folder)}
    reasons = {
        step.name: why
        for step in steps
        if step.name not in missing and (why := _mismatch(step, folder, settings, resources))
    }
    while True:
        known = len(reasons)
        for step in reversed(steps):  # what is missing is due if it is an end, or somebody needs it
            needed_by = readers[step.name]
            if step.name in missing and (not needed_by or any(name in reasons for name in needed_by)):
                reasons.setdefault(step.name, NOT_RUN)
        for step in steps:
            if again := [name for name in step.reads if name in reasons]:
                reasons.setdefault(step.name, f"{again[0]} runs again" if _exists(step, folder) else NOT_RUN)
        if len(reasons) == known:
            return {step.name: reasons[step.name] for step in steps if step.name in reasons}


def sources_gone(planned: PlannedEntry) -> list[str]:
    """Return the team's files that an entry's steps read and that no longer exist."""
    files = (
        file for step in steps_of(planned.entry) for file in step.settings.of(planned, step.name).files()
    )
    return sorted({file for file in files if not Path(file).exists()})


def _exists(step: Step, folder: EntryFolder) -> bool:
    return all(path.exists() for path in (step.record(folder), *step.payload(folder)))


def _mismatch(
    step: Step, folder: EntryFolder, settings: Mapping[str, StepSettings], resources: Resources
) -> str:
    """Return why a record is not the one that the config asks for; empty if it is."""
    content = _content(step.record(folder))
    found = _made(content)
    if found is None:
        return "its record does not say what it was made with"
    expected = {name: fingerprint(settings[name].decisive) for name in _deciding(step.name, settings)}
    for name, wanted in expected.items():
        if (before := found.settings.get(name)) != wanted:
            difference = _difference(folder, name, before, settings[name])
            return difference if name == step.name else f"{name} was {difference}"
    if surplus := found.settings.keys() - expected.keys():
        return f"made after {min(surplus)}, which the entry no longer has"
    unfinished = content.get("state", State.FINISHED) != State.FINISHED
    if unfinished and found.limits != fingerprint(settings[step.name].bounds):
        return "stopped at a limit that has changed since"
    for name, identity in _inputs(step, folder, settings[step.name], resources):
        if found.inputs.get(name) != identity:
            return f"{name} has changed since"
    return ""


def _deciding(name: str, settings: Mapping[str, StepSettings]) -> list[str]:
    """Return the steps whose settings decide a step's record, itself last."""
    before = [step for read in BY_NAME[name].reads if read in settings for step in _deciding(read, settings)]
    return [*dict.fromkeys(before), name]


def _difference(folder: EntryFolder, name: str, before: str | None, settings: StepSettings) -> str:
    """Say in words how the settings that a record was made with differ from the config's."""
    if before is None:
        return "made without this step"
    try:
        old = type(settings).read(folder.settings(name).read_text(encoding="utf-8"))
    except (OSError, PalioError):
        return "made with other settings than the config's"
    if fingerprint(old.decisive) != before:
        return "made with other settings than the config's"
    changed = [
        f"made with another {key}"
        if isinstance(one, str) and len(one) == DIGEST_LENGTH
        else f"made with {key} {_shown(one)}, the config says {_shown(other)}"
        for key, one, other in _pairs(old.decisive, settings.decisive)
        if one != other
    ]
    more = len(changed) - DIFFERENCES_SHOWN
    return "; ".join(changed[:DIFFERENCES_SHOWN]) + (f"; and {more} more" if more > 0 else "")


def _pairs(one: Any, other: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield dotted key and both values, down to where one of them is no container."""
    if isinstance(one, dict) and isinstance(other, dict):
        for name in dict.fromkeys([*one, *other]):
            yield from _pairs(one.get(name), other.get(name), f"{key}.{name}" if key else str(name))
    elif isinstance(one, list) and isinstance(other, list):
        for index, (first, second) in enumerate(zip_longest(one, other)):
            yield from _pairs(first, second, f"{key}.{index}")
    else:
        yield key, one, other


def _shown(value: Any) -> str:
    if value is None:
        return "unset"
    return json.dumps(value, ensure_ascii=False)[:80]
