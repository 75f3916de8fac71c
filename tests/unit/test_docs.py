"""The documentation says everything the models accept."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from palio.config import Competition, Entry, RuleSet, Strict

ROOT = Path(__file__).parents[2]
KEYS = ROOT / "config/README.md"


def models_of(annotation: Any) -> Iterator[type[BaseModel]]:
    """Every config model that a field's type mentions, at any depth."""
    if isinstance(annotation, type) and issubclass(annotation, Strict):
        yield annotation
        for field in annotation.model_fields.values():
            yield from models_of(field.annotation)
    for part in get_args(annotation):
        yield from models_of(part)


MODELS = sorted(
    {*models_of(Competition), *models_of(Entry), *models_of(RuleSet)}, key=lambda one: one.__name__
)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_every_key_stands_in_the_readme_of_the_config(model: type[BaseModel]) -> None:
    """As `key`, or in a path such as `dataset.seed` or `base_models[].family`."""
    text = KEYS.read_text()
    missing = [
        name for name in model.model_fields if not re.search(rf"`([\w.<>\[\]-]+\.)?{name}(\[\])?[`:.]", text)
    ]
    assert not missing, f"config/README.md does not explain {', '.join(missing)} of {model.__name__}"


def test_every_operation_stands_in_the_readme_of_the_config() -> None:
    operations = [
        get_args(one.model_fields["op"].annotation)[0] for one in MODELS if "op" in one.model_fields
    ]
    assert operations
    text = KEYS.read_text()
    assert [op for op in operations if f"| `{op}` |" not in text] == []


@pytest.mark.parametrize(
    "page", sorted([*ROOT.glob("*.md"), *ROOT.glob("*/*.md")]), ids=lambda page: page.name
)
def test_every_link_between_pages_leads_to_a_file(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?://|#)([^)#\s]+)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_every_verb_shows_an_example() -> None:
    from palio.cli import palio

    for name, command in palio.commands.items():
        if command.hidden:
            continue
        assert command.epilog is not None, name
        assert "Example" in command.epilog, name
