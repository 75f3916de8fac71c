"""Check one entry against the competition's rules. Each check is a pure function that yields violations.

Sources: the competition's rules page and arXiv 2503.13507, sections 2 and 3; the values themselves
stand in config/rulesets/*.yaml.
"""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Iterator

from palio.config import REVISION_PATTERN, ApprovedModel, BaseModelSource, DataSource, Entry, RuleSet
from palio.records import Violation


@functools.cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(fnmatch.translate(pattern.casefold()))


def matches(pattern: str, text: str) -> bool:
    return _compiled(pattern).match(text.casefold()) is not None


def first_match(patterns: tuple[str, ...], text: str) -> str | None:
    return next((pattern for pattern in patterns if matches(pattern, text)), None)


def approved_model(source: BaseModelSource, rules: RuleSet) -> ApprovedModel | None:
    """Return the approved family that a base model belongs to, if any."""
    return approved_address(source.address, rules)


def approved_address(address: str, rules: RuleSet) -> ApprovedModel | None:
    """As `approved_model`, of `kind:address`."""
    if first_match(rules.refused_names, address):
        return None
    return next((model for model in rules.base_models if first_match(model.sources, address)), None)


def violations(
    entry: Entry, rules: RuleSet, *, tracks: tuple[str, ...], vllm_stages: tuple[str, ...] = ()
) -> list[Violation]:
    """Return every rule that `entry` breaks on its own; none if it may run."""
    return [
        *_track(entry, tracks),
        *_team(entry, rules),
        *_base_model(entry, rules),
        *_engine(entry, rules, vllm_stages),
        *_data(entry, rules),
        *_length(entry, rules),
    ]


def _track(entry: Entry, tracks: tuple[str, ...]) -> Iterator[Violation]:
    if entry.track not in tracks:
        yield Violation(
            rule="track",
            key="track",
            why=f"{entry.track!r} is not a track in this competition",
            fix=f"use one of {', '.join(tracks)}",
        )


def _team(entry: Entry, rules: RuleSet) -> Iterator[Violation]:
    members = len(set(entry.team_members))
    if rules.max_team_size is not None and members > rules.max_team_size:
        yield Violation(
            rule="team.size",
            key="team_members",
            why=f"{entry.team} has {members} members",
            fix=f"a team has at most {rules.max_team_size}",
        )


# --- base model --------------------------------------------------------------------------------------


def _base_model(entry: Entry, rules: RuleSet) -> Iterator[Violation]:
    source = entry.base_model
    refused = first_match(rules.refused_names, source.address)
    if refused:
        yield Violation(
            rule="base_model.instruction_tuned",
            key=f"base_model.{source.kind}",
            why=f"{source.address} matches {refused}: instruction-tuned models are not base models",
            fix="start from the family's base model",
        )
    elif approved_model(source, rules) is None:
        families = ", ".join(sorted({model.family for model in rules.base_models}))
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


def _engine(entry: Entry, rules: RuleSet, vllm_stages: tuple[str, ...]) -> Iterator[Violation]:
    family = approved_model(entry.base_model, rules)
    if vllm_stages and family is not None and family.code and entry.server is None:
        yield Violation(
            rule="base_model.engine",
            key=f"base_model.{entry.base_model.kind}",
            why=f"has code of its own, which vllm does not run, and vllm serves: {', '.join(vllm_stages)}",
            fix="serve it by a server of your own, or ask the organizers for the engine transformers",
        )


# --- data --------------------------------------------------------------------------------------------


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
        if source.generator:
            yield from _generator(entry, source, source.generator, f"{key}.generator", rules)
        elif rules.require_url and not (source.url or source.hub):
            yield Violation(
                rule="data.public",
                key=f"{key}.url",
                why=f"nobody can tell where {source.label} comes from; training data must be public",
                fix="give the address where the public finds it",
            )


def _generator(
    entry: Entry, source: DataSource, generator: str, key: str, rules: RuleSet
) -> Iterator[Violation]:
    """Generated data comes from an approved base model, under that model's licence."""
    if first_match(rules.refused_generators, generator):
        yield Violation(
            rule="data.generator",
            key=key,
            why=f"output of {generator} must not be trained on",
            fix="remove this source",
        )
        return
    if first_match(rules.approved_generators, generator):
        return
    if first_match(rules.refused_names, f"hub:{generator}"):
        yield Violation(
            rule="data.generator_tuned",
            key=key,
            why=f"{generator} is instruction-tuned, and {source.label} may come from a base model only",
            fix="remove this source, or generate it with the family's base model",
        )
        return
    model = approved_address(f"hub:{generator}", rules)
    if model is None:
        yield Violation(
            rule="data.generator_approved",
            key=key,
            why=f"{generator} is not an approved base model, and {source.label} must come from one",
            fix="write the generator as org/name of the hub; if that is what it is, remove this source",
        )
        return
    own = approved_model(entry.base_model, rules)
    trainable = model.outputs_train
    if trainable is not None and own is not None and own.family not in trainable:
        families = ", ".join(trainable)
        yield Violation(
            rule="data.generator_licence",
            key=key,
            why=f"the licence of {generator} lets its output train {families} only, not {own.family}",
            fix="remove this source, or start from such a model",
        )


def _length(entry: Entry, rules: RuleSet) -> Iterator[Violation]:
    if entry.finetune and entry.finetune.max_length > rules.max_length:
        yield Violation(
            rule="length",
            key="finetune.max_length",
            why=f"{entry.finetune.max_length} tokens are more than the limit of {rules.max_length}",
            fix=f"set it to at most {rules.max_length}",
        )
