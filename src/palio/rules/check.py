"""Hold one entry against the competition's rules. Each check is a pure function that yields violations.

Sources: the competition's rules page and arXiv 2503.13507, sections 2 and 3; the values themselves
stand in config/rules/*.yaml.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator

from palio.config import REVISION_PATTERN, ApprovedModel, BaseModelSource, Entry, RuleSet
from palio.records import Violation


def matches(pattern: str, text: str) -> bool:
    return fnmatch.fnmatchcase(text.casefold(), pattern.casefold())


def approved_model(source: BaseModelSource, rules: RuleSet) -> ApprovedModel | None:
    """The approved family that a base model belongs to, if any."""
    address = source.address
    if any(matches(pattern, address) for pattern in rules.refused_names):
        return None
    for model in rules.base_models:
        if any(matches(pattern, address) for pattern in model.sources):
            return model
    return None


def violations(
    entry: Entry, rules: RuleSet, *, tracks: tuple[str, ...], entries_of_team: int
) -> list[Violation]:
    """Every rule that `entry` breaks; empty if it may run.

    `entries_of_team` counts the team's entries in the same track, this one included.
    """
    return [
        *_track(entry, tracks),
        *_base_model(entry, rules),
        *_data(entry, rules),
        *_length(entry, rules),
        *_entries_of_team(entry, rules, entries_of_team),
    ]


def _track(entry: Entry, tracks: tuple[str, ...]) -> Iterator[Violation]:
    if entry.track not in tracks:
        yield Violation(
            rule="track",
            key="track",
            why=f"{entry.track!r} is no track of the competition",
            fix=f"use one of {', '.join(tracks)}",
        )


def _base_model(entry: Entry, rules: RuleSet) -> Iterator[Violation]:
    source = entry.base_model
    refused = [pattern for pattern in rules.refused_names if matches(pattern, source.address)]
    families = ", ".join(sorted({model.family for model in rules.base_models}))
    if refused:
        yield Violation(
            rule="base_model.instruction_tuned",
            key=f"base_model.{source.kind}",
            why=f"{source.address} matches {refused[0]}: instruction-tuned models are not base models",
            fix="start from the family's base model",
        )
    elif approved_model(source, rules) is None:
        yield Violation(
            rule="base_model.approved",
            key=f"base_model.{source.kind}",
            why=f"{source.address} is not approved",
            fix=f"use a base model of: {families}",
        )
    if rules.require_revision and source.hub and not REVISION_PATTERN.fullmatch(source.revision or ""):
        yield Violation(
            rule="base_model.revision",
            key="base_model.hub",
            why=f"{source.hub} has no fixed revision",
            fix="give the 40-character commit id: org/name@<commit>",
        )


def _data(entry: Entry, rules: RuleSet) -> Iterator[Violation]:
    for index, source in enumerate(entry.dataset.sources if entry.dataset else ()):
        key = f"dataset.sources.{index}"
        if source.licence not in rules.data_licences:
            yield Violation(
                rule="data.licence",
                key=f"{key}.licence",
                why=f"{source.licence!r} is not an approved licence for {source.label}",
                fix=f"use data under one of {', '.join(rules.data_licences)}",
            )
        for pattern in rules.refused_generators:
            if source.generator and matches(pattern, source.generator):
                yield Violation(
                    rule="data.generator",
                    key=f"{key}.generator",
                    why=f"output of {source.generator} must not be trained on",
                    fix="remove this source",
                )


def _length(entry: Entry, rules: RuleSet) -> Iterator[Violation]:
    if entry.finetune and entry.finetune.max_length > rules.max_length:
        yield Violation(
            rule="length",
            key="finetune.max_length",
            why=f"{entry.finetune.max_length} tokens are more than the limit of {rules.max_length}",
            fix=f"set it to at most {rules.max_length}",
        )


def _entries_of_team(entry: Entry, rules: RuleSet, entries_of_team: int) -> Iterator[Violation]:
    if entries_of_team > rules.max_entries_per_team:
        yield Violation(
            rule="team.entries",
            key="team",
            why=f"{entry.team} has {entries_of_team} entries in track {entry.track}",
            fix=f"keep at most {rules.max_entries_per_team}",
        )
