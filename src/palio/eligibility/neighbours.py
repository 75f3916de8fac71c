"""Compare an entry with the others: how many its team has in the track, and which are nearly the same.

Two entries are nearly the same if they start from the same base model, share 90 % of their sources and
operations (Jaccard; the settings of an operation count as one), and train alike: equal choices, and
numbers within 10 % of each other. Names, licences, seeds and the order of sources do not tell them apart.
"""

from __future__ import annotations

import functools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from palio.config import Entry, RuleSet, team_id, team_skeleton
from palio.provenance import canonical_json
from palio.records import Violation

SHARED_DATA = 0.9
NUMBERS_WITHIN = 0.1
_SEEDS = frozenset({"seed", "save_steps"})


@dataclass(frozen=True)
class Alike:
    """Another entry of the track that is nearly the same as one's own."""

    entry: str
    team: str
    differs: tuple[str, ...]
    """Keys in which the two differ, besides names and seeds."""


@dataclass(frozen=True)
class Neighbours:
    """The facts about other entries that the rules look at."""

    entries_of_team: int
    """Entries of the same team in the same track, this one included."""
    alike: tuple[Alike, ...]
    """By entry id."""
    lookalikes: tuple[str, ...] = ()
    """Names of other teams that can be taken for this one's."""


class Participants:
    """The entries of a competition, to compare one with the rest.

    `content` names what a source's path holds: equal names, equal data.
    """

    def __init__(
        self, entries: Mapping[str, Entry], content: Callable[[str], str] = lambda path: path
    ) -> None:
        self.entries = entries
        self._of_team = Counter((team_id(entry.team), entry.track) for entry in entries.values())
        self._lookalikes: defaultdict[str, set[str]] = defaultdict(set)
        for entry in entries.values():
            self._lookalikes[team_skeleton(entry.team)].add(entry.team)
        self._training = {name: _training(entry) for name, entry in entries.items()}
        # Opens files of data: of entries that choose alike only, and once.
        self._data = functools.cache(lambda name: _data(entries[name], content))
        self._groups: defaultdict[tuple[str, str, str], list[str]] = defaultdict(list)
        for name in sorted(entries):
            self._groups[self._group(name)].append(name)

    def beside(self, name: str) -> Neighbours:
        """The neighbours of one entry; one comparison for each entry that makes the same choices."""
        entry = self.entries[name]
        alike = [
            Alike(other, self.entries[other].team, differs)
            for other in self._groups[self._group(name)]
            if other != name and (differs := self._differs(name, other)) is not None
        ]
        own_id = team_id(entry.team)
        others = {team for team in self._lookalikes[team_skeleton(entry.team)] if team_id(team) != own_id}
        return Neighbours(self._of_team[own_id, entry.track], tuple(alike), tuple(sorted(others)))

    def _group(self, name: str) -> tuple[str, str, str]:
        entry = self.entries[name]
        return entry.track, entry.base_model.id, self._training[name].choices

    def _differs(self, name: str, other: str) -> tuple[str, ...] | None:
        """Return the keys in which two entries of equal choices differ; None if they are not nearly the
        same."""
        own, numbers = self._training[name].numbers, self._training[other].numbers
        if not all(math.isclose(value, numbers[key], rel_tol=NUMBERS_WITHIN) for key, value in own.items()):
            return None
        data, others = self._data(name), self._data(other)
        both = len(data & others)
        if both < SHARED_DATA * (len(data) + len(others) - both):
            return None
        changed = [f"finetune.{key}" for key, value in own.items() if value != numbers[key]]
        return (*(("dataset",) if data != others else ()), *changed)


def violations_among(
    name: str, entry: Entry, rules: RuleSet, around: Neighbours
) -> tuple[list[Violation], list[Violation]]:
    """Return the rules broken in comparison with the other entries, and notices for the organizers.

    An entry nearly the same as an earlier one (by id) of its own team is refused. One nearly the same as
    another team's is only a notice: otherwise anyone could stop an entry by copying it.
    """
    broken: list[Violation] = []
    notices: list[Violation] = []
    if around.entries_of_team > rules.max_entries_per_team:
        broken.append(
            Violation(
                rule="team.entries",
                key="team",
                why=f"{entry.team} has {around.entries_of_team} entries in track {entry.track}",
                fix=f"keep at most {rules.max_entries_per_team}",
            )
        )
    for team in around.lookalikes:
        notices.append(
            Violation(
                rule="team.name",
                key="team",
                why=f"{entry.team!a} looks like {team!a}, another team's name",
                fix="ask both teams",
            )
        )
    for other in around.alike:
        what = f" but for {', '.join(other.differs)}" if other.differs else ""
        own = team_id(other.team) == team_id(entry.team)
        if own and other.entry > name:
            continue
        (broken if own else notices).append(
            Violation(
                rule="entry.duplicate",
                key="",
                why=f"is nearly the same as {other.entry} of {other.team}{what}",
                fix="withdraw one of them" if own else "ask both teams",
            )
        )
    return broken, notices


class _Training(NamedTuple):
    """How an entry is trained, as far as two entries are compared by it."""

    choices: str
    numbers: Mapping[str, float]


def _training(entry: Entry) -> _Training:
    settings = entry.finetune.model_dump(mode="json", exclude=set(_SEEDS)) if entry.finetune else {}
    numbers = {key: float(value) for key, value in settings.items() if _is_number(value)}
    choices = {key: value for key, value in settings.items() if key not in numbers}
    choices |= {name: program.model_dump(mode="json") for name, program in entry.programs.items()}
    return _Training(canonical_json(choices), numbers)


def _data(entry: Entry, content: Callable[[str], str]) -> frozenset[str]:
    """Return an entry's sources and operations."""
    data: list[str] = []
    if entry.dataset:
        for source in entry.dataset.sources:
            shape = source.model_dump(mode="json", include={"config", "split", "format", "template", "text"})
            held = content(source.path) if source.path else source.address
            data.append(canonical_json(["source", held, shape]))
        data += [
            canonical_json(["operation", operation.model_dump(mode="json")])
            for operation in entry.dataset.operations
        ]
    return frozenset(data)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
