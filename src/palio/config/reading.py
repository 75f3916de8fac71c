"""Reading YAML files into models, or raising `BadInput` with one line: file, key, value and fix."""

from __future__ import annotations

import datetime
import difflib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ValidationError

from palio.config.common import ID_PATTERN, expand
from palio.config.competition import Competition, Overrides
from palio.config.entry import Entry
from palio.config.ruleset import RuleSet
from palio.config.yaml_file import read_yaml
from palio.errors import BadInput, InvalidValue
from palio.layout import STAGES, overrides

MAX_EXTENDS = 8
"""Files in a chain of `extends`."""

Model = TypeVar("Model", bound=BaseModel)


KEY = "[key]"
"""pydantic's mark of a fault of a key itself."""


class Fault(NamedTuple):
    """A fault of one key of a file."""

    kind: str
    """pydantic's name of the error, e.g. `missing`."""
    key: str
    value: str | int | float | bool | None
    """None for a whole section."""
    why: str
    """Empty where only the fix is known."""
    fix: str


def faults(model: type[BaseModel], data: object) -> list[Fault]:
    """Return everything that keeps `data` from being a `model`."""
    try:
        model.model_validate(data)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        # A list whose only item is wrong is also reported as empty: a consequence, not a fault.
        inner = {fault["loc"][:depth] for fault in errors for depth in range(1, len(fault["loc"]))}
        return [_fault(model, fault) for fault in errors if fault["loc"] not in inner]
    return []


def _fault(model: type[BaseModel], fault: Mapping[str, Any]) -> Fault:
    value = fault.get("input")
    why, fix = _why_and_fix(model, fault)
    return Fault(
        kind=fault["type"],
        key=".".join(str(part) for part in fault["loc"] if part != KEY),
        value=value if isinstance(value, str | int | float | bool) else None,
        why=why,
        fix=fix,
    )


def parse(model: type[Model], data: object, file: str | Path) -> Model:
    """Validate `data` as `model`; one fault becomes one `BadInput` line."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        # A misspelled key is also missing under its right name: the spelling is what to correct.
        first = next((fault for fault in errors if fault["type"] == "extra_forbidden"), errors[0])
        fault = _fault(model, first)
        raise BadInput(file, fault.key, fault.value, why=fault.why, fix=fault.fix) from None


def _why_and_fix(model: type[BaseModel], fault: Mapping[str, Any]) -> tuple[str, str]:
    if fault["type"] == "extra_forbidden":
        wrong = str(fault["loc"][-1])
        known = _known_fields(model)
        near = difflib.get_close_matches(wrong, known, n=1)
        return "unknown key", f"did you mean {near[0]}?" if near else "remove it"
    if fault["loc"][-1:] == (KEY,) or (
        fault["type"] == "string_type" and isinstance(fault["input"], int | float | datetime.date)
    ):
        quoted = 'the word, such as "no"' if isinstance(fault["input"], bool) else f'it: "{fault["input"]}"'
        return "is not text to YAML", f"put quotes around {quoted}"
    if fault["type"] == "missing":
        return "is missing", "add it"
    if fault["type"] == "model_type":
        what = "is empty" if fault["input"] is None else "is not a section"
        return what, "write it as lines of key: value"
    error = fault.get("ctx", {}).get("error")
    if isinstance(error, InvalidValue):
        return error.why, error.fix
    return "", str(fault["msg"]).removeprefix("Value error, ")


@cache  # a schema takes a tenth of a second, and a competition may have many misspelled keys
def _known_fields(model: type[BaseModel]) -> list[str]:
    return sorted(_field_names(model.model_json_schema()))


def _field_names(schema: Any) -> set[str]:
    """Return the names of all fields in a JSON schema, at any depth."""
    if not isinstance(schema, dict | list):
        return set()
    inner = schema.values() if isinstance(schema, dict) else schema
    names = set(schema.get("properties", ())) if isinstance(schema, dict) else set()
    return names.union(*map(_field_names, inner))


def load_entry(path: Path) -> Entry:
    return parse(Entry, read_yaml(path), path)


def team_and_track(path: Path) -> tuple[str | None, str | None]:
    """Return the team and the track named by an invalid entry file, None for each that is itself invalid."""
    try:
        content = read_yaml(path)
    except BadInput:
        return None, None
    if not isinstance(content, dict):
        return None, None
    invalid = {fault.key.partition(".")[0] for fault in faults(Entry, content)}
    team, track = (content[key] if key not in invalid else None for key in ("team", "track"))
    return team, track


def load_rules(path: Path) -> RuleSet:
    return parse(RuleSet, read_yaml(path), path)


def load_competition(data: Path | Mapping[str, Any], file: str | Path = "config") -> Competition:
    """Read a competition from its file, or from the mapping that Snakemake made of it (then named `file`)."""
    content: object = data
    if isinstance(data, Path):
        content, file = read_yaml(data), data
    competition = parse(Competition, _overridden(extended(content)), file)
    if not ID_PATTERN.fullmatch(competition.competition):
        raise BadInput(file, "competition", competition.competition, fix="use letters, digits, - and _ only")
    for kind in ("tracks", *(f"stages.{name}.scenarios" for name in STAGES)):
        stage = kind.split(".")[1] if "." in kind else None
        names = competition.stage(stage).scenarios if stage else competition.tracks
        for name in names:
            if not ID_PATTERN.fullmatch(name):
                raise BadInput(file, f"{kind}.{name}", name, fix="use letters, digits, - and _ only")
    inside = expand(competition.closed_store).resolve().is_relative_to(Path.cwd().resolve())
    if inside and not competition.demo:
        raise BadInput(
            file, "closed_store", competition.closed_store, fix="give a folder outside the repository"
        )
    return competition


def load_overrides(competition: str) -> Overrides:
    path = overrides(competition)
    return parse(Overrides, read_yaml(path), path) if path.exists() else Overrides()


def extended(content: object, depth: int = 0) -> object:
    """Return a competition's content, merged into that of the file it extends.

    Raises:
        BadInput: there is no such file, or it extends itself.
    """
    if not isinstance(content, Mapping) or not isinstance(content.get("extends"), str):
        return content
    path = Path(content["extends"])
    if depth > MAX_EXTENDS or not path.is_file():
        why = "extends itself" if path.is_file() else "no such file"
        raise BadInput("config", "extends", str(path), why=why, fix="name a competition's file")
    own = {key: value for key, value in content.items() if key != "extends"}
    return _merged(extended(read_yaml(path), depth + 1), own)


def _merged(base: object, own: Mapping[str, Any]) -> object:
    """Return `own` over `base`, mapping by mapping; null removes a key."""
    if not isinstance(base, Mapping):
        return own
    kept = {key: value for key, value in base.items() if key not in own or own[key] is not None}
    for key, value in own.items():
        if value is not None:
            kept[key] = _merged(base.get(key), value) if isinstance(value, Mapping) else value
    return kept


def _overridden(content: object) -> object:
    """Return a competition's content with its overrides, which take precedence."""
    name = content.get("competition") if isinstance(content, Mapping) else None
    if not isinstance(content, Mapping) or not isinstance(name, str) or not ID_PATTERN.fullmatch(name):
        return content  # the model says what is wrong
    decisions = load_overrides(name)
    withdrawn = {**(content.get("withdrawn") or {}), **decisions.withdrawn}
    retries = {**(content.get("retries") or {}), **decisions.retries}
    return {**content, "withdrawn": withdrawn, "retries": retries}
