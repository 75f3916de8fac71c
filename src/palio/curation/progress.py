"""Progress of a curation on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int | None, int], None]]:
    """A bar for each step on a terminal, nothing in a log. A step that looks twice begins again."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        tasks: dict[str, Any] = {}

        def advance(step: str, total: int | None, rows: int) -> None:
            if step not in tasks:
                tasks[step] = bars.add_task(step, total=total)
            if bars.tasks[tasks[step]].finished:
                bars.reset(tasks[step])
            bars.advance(tasks[step], rows)

        yield advance
