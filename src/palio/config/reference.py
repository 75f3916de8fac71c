"""The reference of config files, generated from the models: JSON schemas, and the tables of config/README.md.

python -m palio.config.reference    write config/schemas/*.json, and the tables between the markers
                                    `<!-- fields of MODEL -->` and `<!-- end -->` of config/README.md
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import palio.config
from palio.config import Competition, Entry, RuleSet, Strict, operation_class, operation_names
from palio.layout import schema_file
from palio.provenance import write_text

README = Path("config/README.md")
FILES: dict[str, type[Strict]] = {"competition": Competition, "entry": Entry, "ruleset": RuleSet}
"""The model of each kind of file."""


def json_schema(kind: str) -> str:
    """Return the JSON schema of a kind of file."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **FILES[kind].model_json_schema()}
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def with_tables(readme: str) -> str:
    """Return config/README.md with its tables made anew."""
    return re.sub(
        r"(?<=<!-- fields of )(\w+)( -->\n).*?(?=<!-- end -->)",
        lambda marker: f"{marker[1]}{marker[2]}\n{_table(marker[1])}\n",
        readme,
        flags=re.DOTALL,
    )


def _table(name: str) -> str:
    """Return the table of a model's fields, or that of all operations."""
    if name == "operations":
        rows = [("op", "does", "settings"), ("---",) * 3, *map(_operation, operation_names())]
    else:
        rows = [("key", "value", "meaning"), ("---",) * 3, *_fields(getattr(palio.config, name))]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |\n" for row in rows)


def _fields(model: type[Strict]) -> Iterator[tuple[str, str, str]]:
    schema = model.model_json_schema()
    for name, field in schema["properties"].items():
        value = _value(field)
        if name in schema.get("required", ()):
            value += ", required"
        elif (default := field.get("default")) not in (None, "", [], {}):
            value += f", default `{default if isinstance(default, str) else json.dumps(default)}`"
        yield f"`{name}`", value, field["description"]


def _operation(op: str) -> tuple[str, str, str]:
    model = operation_class(op)
    settings = [f"{name} ({value}): {meaning}" for name, value, meaning in _fields(model) if name != "`op`"]
    return f"`{op}`", " ".join((model.__doc__ or "").split()), "<br>".join(settings)


_NAMES = {"boolean": "true or false", "array": "list", "object": "mapping", "string": "text"}


def _value(field: dict[str, Any]) -> str:
    """Return what a field may hold, in words."""
    if "enum" in field:
        return ", ".join(f"`{choice}`" for choice in field["enum"])
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_value(part) for part in field["anyOf"] if part != {"type": "null"}))
    if "const" in field:
        return f"`{field['const']}`"
    if "pattern" in field:
        return "duration"
    if "enum" in field.get("items", ()):
        return f"list of {_value(field['items'])}"
    kind = str(field.get("type", "object"))  # a reference to another section has no type
    return _NAMES.get(kind, kind)


def main() -> None:
    for kind in FILES:
        write_text(schema_file(kind), json_schema(kind))
    write_text(README, with_tables(README.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
