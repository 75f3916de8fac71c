"""A competition's status as a table for the terminal and as one HTML page."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from palio.operating.status import EntryStatus, Status, StepStatus
from palio.pipeline import STEPS
from palio.text import duration

REASON_WIDTH = 24
"""Characters of SLURM's reason why a job waits: some are sentences."""
NARROW = 100
"""Columns below which a terminal shows one line for each entry."""
STYLES = {
    "waiting": "dim",
    "queued": "cyan",
    "running": "bold yellow",
    "done": "green",
    "failed": "bold red",
    "withdrawn": "dim italic",
}


def cell(step: StepStatus) -> str:
    """Describe a step in a few words: node, share of the budget used, expected end."""
    if step.state == "done":
        took = f" {duration(step.seconds)}" if step.seconds is not None else ""
        return f"done{took}{' *' if step.reason else ''}"
    if step.state == "running":
        return ", ".join(filter(None, [_node(step), duration(step.seconds or 0), _used(step), _end(step)]))
    if step.state == "failed":
        return step.reason.partition(":")[0]
    if step.state == "queued":
        return f"queued ({_cut(step.reason, REASON_WIDTH)})"
    if step.state == "withdrawn" or step.wait.startswith("behind"):
        return step.wait or step.state
    return f"waiting {step.wait}".rstrip()


def _short_cell(step: StepStatus) -> str:
    """The same for the end of a line that may be cut there."""
    if step.state != "running":
        return cell(step)
    since = f"{duration(step.seconds or 0)} on {_node(step)}"
    return ", ".join(filter(None, [_used(step), _end(step), since]))


def _node(step: StepStatus) -> str:
    return step.node.partition(".")[0]


def _used(step: StepStatus) -> str:
    return f"{100 * step.used / step.budget:.0f} % used" if step.used is not None and step.budget else ""


def _end(step: StepStatus) -> str:
    if step.ends is None:
        return ""
    today = time.localtime(step.ends)[:3] == time.localtime()[:3]
    return time.strftime("ends %H:%M" if today else "ends %a %H:%M", time.localtime(step.ends))


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"


def summary(status: Status) -> str:
    """Count all entries by their state, whatever is shown of them."""
    counts: dict[str, int] = {}
    for entry in status.entries:
        counts[entry.state] = counts.get(entry.state, 0) + 1
    parts = [f"{counts[state]} {state}" for state in STYLES if state in counts]
    running = f"run by {status.controller}" if status.controller else "no run in progress"
    if status.last_run:
        running += f"; {status.last_run}"
    shown = f"; {len(status.shown)} shown" if len(status.shown) < len(status.entries) else ""
    return f"{len(status.entries)} entries: {', '.join(parts)}{shown}; {running}"


def reasons(status: Status) -> list[tuple[str, str]]:
    """Return (entry and step, reason and log) of every step with a reason, and the notes."""
    lines: list[tuple[str, str]] = []
    for entry in status.shown:
        for step in entry.steps:
            reason = step.reason if step.state != "queued" else ""
            log = f" (log: {step.log})" if step.state == "failed" else ""
            what = f"{entry.entry} {step.step}"
            lines += [(what, why) for why in (reason and reason + log, step.before, step.obstacle) if why]
    return lines + [("note", note) for note in status.notes]


def _cells(entry: EntryStatus) -> list[StepStatus | None]:
    by_step = {step.step: step for step in entry.steps}
    return [by_step.get(step.name) for step in STEPS]


def _short_view(status: Status, width: int) -> RenderableType:
    """Each entry on one line, by the step that decides its state; its track is in the line above."""
    names = max((len(entry.entry) for entry in status.shown), default=0)
    names = min(names, width // 3)
    lines = _head(status)
    for track in dict.fromkeys(entry.track for entry in status.shown):
        lines.append(Text(track, "bold"))
        for entry in (entry for entry in status.shown if entry.track == track):
            done = f"{sum(step.state == 'done' for step in entry.steps)}/{len(entry.steps)}"
            line = f"  {_cut(entry.entry, names):{names}}  {done}  {_deciding(entry)}"
            lines.append(Text(_cut(line, width), STYLES[entry.state]))
    return Group(*lines, *_remarks(status))


def _head(status: Status) -> list[Text]:
    return [Text(status.title, "italic"), Text(summary(status), "italic")]


def _deciding(entry: EntryStatus) -> str:
    step = next((step for step in entry.steps if step.state == entry.state), None)
    if step is None or step.state in ("done", "withdrawn"):
        running = [step for step in entry.steps if step.state in ("running", "queued")]
        return ", ".join([entry.state, *(f"{step.step} still {step.state}" for step in running)])
    return f"{step.step}: {_short_cell(step)}"


def _remarks(status: Status) -> list[Text]:
    return [Text(f"{what}: {why}", "red") for what, why in reasons(status)]


def terminal_view(status: Status, width: int) -> RenderableType:
    """Return a table of entries by steps; a line for each entry where the terminal is narrow."""
    if width < NARROW:
        return _short_view(status, width)
    table = Table()
    for column in ("track", "entry"):
        table.add_column(column, no_wrap=True)  # a narrow terminal wraps the steps, not the names
    for step in STEPS:
        table.add_column(step.title or step.name)
    for entry in status.shown:
        steps = [Text(cell(step), STYLES[step.state]) if step else Text("–", "dim") for step in _cells(entry)]
        table.add_row(entry.track, entry.entry, *steps)
    return Group(*_head(status), table, *_remarks(status))


def print_status(status: Status) -> None:
    console = Console()
    console.print(terminal_view(status, console.width))


def watch_status(look: Callable[[], Status], every: float = 5.0) -> None:
    """Refresh the table until Ctrl-C."""
    console = Console()
    first = terminal_view(look(), console.width)
    with Live(first, console=console, auto_refresh=False, screen=True) as live, suppress(KeyboardInterrupt):
        while True:
            time.sleep(every)
            live.update(terminal_view(look(), console.width), refresh=True)


def html_page(status: Status) -> str:
    """Return one self-contained page that loads itself again every 30 seconds, if it is let."""
    from palio.report.rendering import render

    rows = [
        (entry, [(step, cell(step) if step else "–") for step in _cells(entry)]) for entry in status.shown
    ]
    return render(
        "status.html.j2",
        "page.js",
        status=status,
        at=time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(status.time)),
        summary=summary(status),
        columns=STEPS,
        rows=rows,
        reasons=reasons(status),
    )
