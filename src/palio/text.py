"""Texts for people: durations, Markdown tables, the end of a log."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence


def duration(seconds: float) -> str:
    """Return seconds as people say them: 41 s, 12 min, 16.2 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def markdown_table(
    head: Sequence[str], rows: Iterable[Sequence[object]], left: Collection[str] | None = None
) -> str:
    """Return a Markdown table; columns other than those in `left`, if given, are aligned right."""
    align = ["---" if left is None or name in left else "---:" for name in head]
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in line) + " |"
        for line in (head, align, *rows)
    )


def last_lines(log: str, count: int = 5) -> str:
    """Return the end of a log for an error message: one line, printable, at most 500 characters."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return "".join(filter(str.isprintable, " | ".join(lines[-count:])))[-500:]
