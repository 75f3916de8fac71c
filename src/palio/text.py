"""Texts for people: durations, Markdown tables, the end of a log."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any


def duration(seconds: float) -> str:
    """Return seconds as people say them: 41 s, 12 min, 16.2 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _cell(content: object) -> str:
    """Return a cell's own Markdown on one line."""
    return str(content).replace("|", "\\|").replace("\n", " ")


def markdown_table(
    head: Sequence[str],
    rows: Iterable[Sequence[object]],
    left: Collection[str] | None = None,
    cell: Callable[[Any], str] = _cell,
) -> str:
    """Return a Markdown table; columns other than those in `left`, if given, are aligned right."""
    align = ["---" if left is None or name in left else "---:" for name in head]
    first, *others = ([cell(content) for content in line] for line in (head, *rows))
    return "\n".join(f"| {' | '.join(line)} |" for line in (first, align, *others))


def last_lines(log: str, count: int = 5) -> str:
    """Return the end of a log for an error message: one line, printable, at most 500 characters."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return "".join(filter(str.isprintable, " | ".join(lines[-count:])))[-500:]
