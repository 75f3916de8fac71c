"""The documentation says everything the models accept."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from palio.config.reading import extended
from palio.config.reference import FILES, README, json_schema, with_tables
from palio.layout import schema_file
from tests.support.proven import PAGES
from tests.support.proven import with_tables as with_proven_tables

ROOT = Path(__file__).parents[2]


class Yaml12(yaml.SafeLoader):
    """Reads 1e-3 as a number, as YAML 1.2 and editors do and PyYAML does not."""


Yaml12.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"\d+(\.\d+)?e[+-]?\d+"), list("0123456789")
)


@pytest.mark.parametrize("kind", FILES)
def test_the_schemas_in_the_repository_are_those_of_the_models(kind: str) -> None:
    """Make them anew with `python -m palio.config.reference`."""
    assert (ROOT / schema_file(kind)).read_text() == json_schema(kind)


def test_the_tables_of_the_configs_readme_are_those_of_the_models() -> None:
    """Make them anew with `python -m palio.config.reference`."""
    readme = (ROOT / README).read_text()
    assert readme == with_tables(readme)


@pytest.mark.parametrize("page", PAGES)
def test_the_tables_of_what_runs_again_are_those_of_the_tests(page: str) -> None:
    """Make them anew with `python -m tests.support.proven`."""
    text = (ROOT / page).read_text()
    assert text == with_proven_tables(text)
    assert text.count("<!-- proven by") == 1


@pytest.mark.parametrize("kind", FILES)
def test_every_section_has_a_table_and_every_key_a_description(kind: str) -> None:
    schema = json.loads(json_schema(kind))
    sections = {FILES[kind].__name__: schema, **schema["$defs"]}
    tables = re.findall(r"<!-- fields of (\w+) -->", (ROOT / README).read_text())
    assert sections.keys() - {"Stages", "Program"} <= set(tables)  # two stages; a server's table has both
    for name, section in sections.items():
        for key, field in section["properties"].items():
            assert field.get("description"), f"{name}.{key}"


@pytest.mark.parametrize(
    ("kind", "file"),
    [
        *(("competition", path) for path in sorted(ROOT.glob("config/*.yaml"))),
        *(("entry", path) for path in sorted(ROOT.glob("config/entries/**/*.yaml"))),
        *(("ruleset", path) for path in sorted(ROOT.glob("config/rules/*.yaml"))),
    ],
    ids=lambda value: getattr(value, "stem", value),
)
def test_every_file_in_the_repository_is_valid_by_its_schema(kind: str, file: Path) -> None:
    content = extended(yaml.load(file.read_text(), Loader=Yaml12))  # noqa: S506 (a SafeLoader)
    jsonschema.validate(content, json.loads(json_schema(kind)))


@pytest.mark.parametrize("name", ["operation_setting_unknown", "threshold_low", "format_unknown"])
def test_a_schema_refuses_what_the_check_refuses(name: str) -> None:
    content = yaml.load((ROOT / f"tests/entries/bad/{name}.yaml").read_text(), Loader=Yaml12)  # noqa: S506
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(content, json.loads(json_schema("entry")))


def test_the_command_prints_the_schema() -> None:
    command = [sys.executable, "-m", "palio.cli", "schema", "entry"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed == json_schema("entry")


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
