"""Facts that a downloaded base model states: licence and lineage, from its model card and config.

A model whose name is approved may still be a fine-tuned one, or under a licence of its own. Its files are
untrusted: an unreadable one says nothing, and is not an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from palio.base_model import card_facts
from palio.config import BaseModelSource, Entry, RuleSet
from palio.eligibility.check import approved_address, approved_model, first_match
from palio.files import json_object
from palio.model_code import code_differences
from palio.records import BaseModelManifest, Violation


@dataclass(frozen=True)
class ModelFacts:
    licences: tuple[str, ...] = ()
    """As the card names them; empty if it names none."""
    made_from: tuple[str, ...] = ()
    """Models of the hub that this one was made from, `org/name`."""
    relation: str = ""
    """How, as the hub calls it: finetune, adapter, merge, quantized."""
    trained_as: str = ""
    """Name or path that the config was saved from."""


def model_facts(folder: Path) -> ModelFacts:
    """Of a model folder; all empty where there is neither card nor config."""
    card = card_facts(folder)
    config = json_object(folder / "config.json")
    named = config.get("_name_or_path")
    relation = card.get("base_model_relation")
    return ModelFacts(
        licences=(*_texts(card.get("license")), *_texts(card.get("license_name"))),
        made_from=_texts(card.get("base_model")),
        relation=relation if isinstance(relation, str) else "",
        trained_as=named if isinstance(named, str) else "",
    )


def lineage_violations(source: BaseModelSource, facts: ModelFacts, rules: RuleSet) -> Iterator[Violation]:
    """What a base model's own words break of the rules; nothing for a model that is not approved anyway."""
    model = approved_model(source, rules)
    if model is None:
        return
    key = f"base_model.{source.kind}"
    approved = {licence.casefold() for licence in model.licences}
    if facts.licences and not approved & {licence.casefold() for licence in facts.licences}:
        yield Violation(
            rule="base_model.licence",
            key=key,
            why=f"its model card says licence {', '.join(facts.licences)}",
            fix=f"use a model of {model.family} under {' or '.join(model.licences)}",
        )
    for origin in facts.made_from:
        quantised = facts.relation == "quantized" and approved_address(f"hub:{origin}", rules) is not None
        if not quantised:
            yield Violation(
                rule="base_model.lineage",
                key=key,
                why=f"its model card says that it was made from {origin} ({facts.relation or 'finetune'})",
                fix="start from a base model, trained from nothing",
            )
    refused = first_match(rules.refused_names, facts.trained_as)
    if refused:
        yield Violation(
            rule="base_model.lineage",
            key=key,
            why=f"its config was saved from {facts.trained_as}, which matches {refused}",
            fix="start from the family's base model",
        )


def base_model_violations(
    manifest: BaseModelManifest, entry: Entry, approved: Mapping[str, str]
) -> Iterator[Violation]:
    """Yield what keeps Palio from training a base model with the entry's recipe, packaging and serving it.

    `approved`: sha256 by name of its own Python files, as the rule set approves them.
    """
    if wrong := code_differences(approved, manifest.code):
        why = f"it was fetched with other code than the rules approve: {'; '.join(wrong)}"
        fix = f"delete resources/base_models/{manifest.id}/manifest.json and start again"
        yield Violation(rule="base_model.code", key="base_model", why=why, fix=fix)
    elif manifest.unsupported is not None and (entry.finetune or entry.server is None):
        key = f"base_model.{manifest.source.kind}"
        yield Violation(rule="base_model.unsupported", key=key, **manifest.unsupported.model_dump())
    for fault in manifest.recipe_faults(entry.finetune) if entry.finetune else ():
        key, why = f"{fault.file}.{fault.key}", f"is {fault.value!r}: {fault.why}"
        yield Violation(rule="finetune.base_model", key=key, why=why, fix=fault.fix)


def _texts(value: object) -> tuple[str, ...]:
    """A text, or the texts of a list."""
    values = value if isinstance(value, list) else [value]
    return tuple(one for one in values if isinstance(one, str) and one)
