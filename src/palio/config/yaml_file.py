"""Reading one YAML file that anybody may have written: bounded, and every fault of it a `BadInput`.

PyYAML composes and constructs recursively, so the file's events are counted first: a file that is too large,
too deep or unfolds too far through aliases is refused before a node of it is built.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import yaml

from palio.errors import BadInput

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
"""Nested lists and mappings; an honest file has fewer than ten."""
MAX_NODES = 50_000
"""Scalars, lists and mappings, each alias counted as all that it stands for."""
_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml, if installed


class _UniqueKeyLoader(_Base):  # type: ignore[misc]
    """Checks YAML's rule that the keys of a mapping differ, which PyYAML does not."""


def _mapping(loader: Any, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is duplicated", node.start_mark)
        seen.add(key)
    loader.flatten_mapping(node)
    return dict(loader.construct_pairs(node, deep=True))


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file.

    Raises:
        BadInput: the file is missing, not a regular file, not UTF-8, not YAML, or over a limit.
    """
    text = _text(path)
    try:
        _require_bounded(text, path)
        return yaml.load(text, Loader=_UniqueKeyLoader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}" if mark else ""
        why = f"is not YAML: {getattr(error, 'problem', error)}"
        raise BadInput(path, line, why=why, fix=_fix(why)) from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        # a date of no calendar, a number of thousands of digits, a list as a key, a tag on the wrong value
        why = f"holds a value that is not what YAML takes it for ({type(error).__name__})"
        raise BadInput(path, why=why, fix="put that value in quotes") from None


FIXES = {
    "tab character": "indent with spaces",
    "cannot start any token": "put the value in quotes, and indent with spaces",
    "mapping values are not allowed": "put a value with a colon in quotes, or indent as the lines around it",
    "is duplicated": "keep one of them",
}
"""By words of PyYAML's."""


def _fix(why: str) -> str:
    return next((fix for words, fix in FIXES.items() if words in why), "correct it")


def _text(path: Path) -> str:
    try:
        # a pipe that nobody writes to does not block
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as stream:
            if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                raise BadInput(path, why="is not a regular file", fix="put the file itself there")
            content = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise BadInput(path, why="no such file", fix="check the path") from None
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise BadInput(path, why=f"cannot be read ({why})", fix="check the path and its mode") from None
    if len(content) > MAX_BYTES:
        raise BadInput(path, why=f"is larger than {MAX_BYTES >> 20} MiB", fix="shorten it")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise BadInput(path, why="is not UTF-8 text", fix="save it as UTF-8") from None


def _require_bounded(text: str, path: Path) -> None:
    """Count the nodes that the text unfolds to, without building one."""
    total = 0
    sizes: dict[str, int] = {}
    """Nodes behind each anchor."""
    begun: list[tuple[str | None, int]] = []
    """Anchor and nodes before it, of each list and mapping that is open."""
    for event in yaml.parse(text, Loader=_Base):
        if isinstance(event, yaml.AliasEvent):
            total += sizes.get(event.anchor or "", 1)
        elif isinstance(event, yaml.CollectionStartEvent):
            total += 1
            begun.append((event.anchor, total))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = begun.pop()
            if anchor:
                sizes[anchor] = total - before + 1
        elif isinstance(event, yaml.ScalarEvent):
            total += 1
        if len(begun) > MAX_DEPTH:
            raise BadInput(path, why=f"is nested more than {MAX_DEPTH} deep", fix="flatten it")
        if total > MAX_NODES:
            raise BadInput(path, why=f"has more than {MAX_NODES} values", fix="shorten it")
