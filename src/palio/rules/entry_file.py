"""Check one entry file as it lies on disk: schema, rules, its team's other entries, its sources."""

from __future__ import annotations

from pathlib import Path

from palio.config import CheckedAgainst, Entry, load_entry, load_rules
from palio.errors import BadInput, RuleViolation
from palio.records import Check, Violation
from palio.rules.check import approved_model, violations


class EntryViolations(RuleViolation):
    """An entry breaks rules; `violations` holds each."""

    def __init__(self, file: Path, found: list[Violation]) -> None:
        super().__init__("; ".join(f"{file}: {violation}" for violation in found))
        self.violations = found


def check_file(file: Path, against: CheckedAgainst, entries_of_team: int | None = None) -> Check:
    """The record of a clean entry. `entries_of_team` is counted in the file's folder if not given.

    Raises:
        BadInput: the file is no valid entry.
        EntryViolations: it is one, and breaks rules.
    """
    entry = load_entry(file)
    rules = load_rules(Path(against.rules))
    if entries_of_team is None:
        entries_of_team = _entries_of_team(entry, file)
    found = violations(entry, rules, tracks=against.tracks, entries_of_team=entries_of_team)
    family = approved_model(entry.base_model, rules)
    if found or family is None:
        raise EntryViolations(file, found)
    return Check(
        competition=against.competition,
        track=entry.track,
        entry=file.stem,
        rules_version=rules.version,
        base_model_family=family.family,
    )


def _entries_of_team(entry: Entry, file: Path) -> int:
    """Entries of the same team and track in the folder of `file`, `file` included."""
    count = 1
    for path in file.parent.glob("*.yaml"):
        if path.name == file.name:
            continue
        try:
            other = load_entry(path)
        except BadInput:  # reported by its own check
            continue
        count += (other.team, other.track) == (entry.team, entry.track)
    return count
