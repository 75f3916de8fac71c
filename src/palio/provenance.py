"""Content addresses and atomic files: what makes a record trustworthy and a rerun harmless."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

CHUNK = 1 << 20


def canonical_json(payload: Any) -> str:
    """JSON with sorted keys and no spaces: equal content gives equal text."""
    return json.dumps(payload, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def fingerprint(payload: Any) -> str:
    """sha256 (64 hex digits) of the canonical JSON of `payload`."""
    return hashlib.sha256(canonical_json(payload).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def folder_sha256(folder: Path) -> dict[str, str]:
    """sha256 of every file below `folder`, by its path relative to it, sorted."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}


def file_differences(found: Mapping[str, str], expected: Mapping[str, str], source: str) -> list[str]:
    """Return what is wrong with files, both by path with their sha256; `source` names what lists them."""
    wrong = [f"{path} is missing" for path in expected.keys() - found.keys()]
    wrong += [f"{path} is not in {source}" for path in found.keys() - expected.keys()]
    both = found.keys() & expected.keys()
    wrong += [f"{path} differs from {source}" for path in both if found[path] != expected[path]]
    return sorted(wrong)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, moved onto it when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, payload: Any) -> None:
    """Pretty, sorted, atomic."""
    text = json.dumps(payload, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


@cache
def code_sha256() -> str:
    """Of Palio's own code. It decides nothing, recipe versions do: it tells which code made a result."""
    package = Path(__file__).parent
    sources = sorted(package.rglob("*.py"))
    return fingerprint({path.relative_to(package).as_posix(): file_sha256(path) for path in sources})


def library_versions(*names: str) -> dict[str, str]:
    return {name: metadata.version(name) for name in names}
