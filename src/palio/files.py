"""Links instead of copies, lines of JSON that survive a crash, and JSON that others wrote."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """Hard-link `source` as `target`, or copy it where the file system has no such link."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def let_others_read(folder: Path) -> None:
    """Make the files of a folder readable to other users' jobs: weights are saved as 0600."""
    for path in folder.iterdir():
        if path.stat().st_nlink == 1:  # what is linked is another folder's; its mode stays
            path.chmod(0o644)


def append_json_line(path: Path, values: Mapping[str, Any]) -> None:
    """Append `values` as one line, on disk before this returns. A line that a crash tore is closed first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+", buffering=0) as stream:
        end = stream.tell()
        torn = end > 0 and os.pread(stream.fileno(), 1, end - 1) != b"\n"
        stream.write(("\n" * torn + json.dumps(values) + "\n").encode())
        os.fsync(stream.fileno())


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a file, none if it does not exist; a line that a crash tore is left out."""
    lines = []
    for text in path.read_bytes().splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def json_object(path: Path) -> dict[str, Any]:
    """Read a JSON object that others wrote; empty if the file is missing, broken or holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
