"""The organizer's decisions in a running competition, in a file that can be read, reviewed and undone.

config/overrides/<competition>.yaml is part of the competition's config (`load_competition` reads it): the
next run of the workflow follows it.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path

import psutil
import yaml

from palio.config import Competition, Overrides, load_overrides
from palio.entries import Entries
from palio.errors import BadInput, PalioError
from palio.layout import EntryFolder, entry_and_replicate
from palio.layout import overrides as overrides_file
from palio.operating import slurm
from palio.operating.attempt import read_attempts
from palio.pipeline import LIMITED
from palio.provenance import write_text

HEADER = "# Written by palio withdraw and palio retry; they win over the competition's config.\n"


def withdraw(competition: Competition, entry: str, why: str) -> None:
    """Take an entry out: it no longer runs, and the leaderboard shows why."""
    Entries(competition).known(entry)
    overrides = load_overrides(competition.competition)
    _write(competition, overrides, {"withdrawn": {**overrides.withdrawn, entry: why}})


def end_work(folder: EntryFolder) -> Iterator[str]:
    """Cancel the SLURM jobs of an entry and of its replicates. Yield a line for each, and for each step that
    runs on this machine."""
    folders = [folder, *folder.replicates()]
    wildcards = {slurm.wildcards(one) for one in folders}
    try:
        for job in slurm.jobs(Path.cwd()) if slurm.available() else []:
            if job.comment.partition("_wildcards_")[2] in wildcards:
                slurm.ask("scancel", job.id)
                yield f"cancelled job {job.id} ({job.comment}, {job.state.lower()})"
    except PalioError as error:
        yield f"SLURM is not responding, so no job is cancelled: {error}"
    for attempt in (attempt for one in folders for attempt in read_attempts(one)):
        here = attempt.job is None and attempt.node == platform.node()
        if attempt.state is None and here and psutil.pid_exists(attempt.pid):
            yield f"{attempt.step} still runs; to end it: kill {attempt.pid}"


def retry(competition: Competition, entry: str, steps: list[str]) -> None:
    """Grant steps of an entry a fresh start: work, used budget and finished results are set aside."""
    Entries(competition).known(entry_and_replicate(entry)[0])
    for step in steps:
        if step not in (limited := [one.name for one in LIMITED]):
            why, fix = "runs again on its own in the next run", f"only {', '.join(limited)} need a grant"
            raise BadInput("--step", "", step, why=why, fix=fix)
    overrides = load_overrides(competition.competition)
    granted = dict(overrides.retries.get(entry, {}))
    for step in steps:
        granted[step] = granted.get(step, 0) + 1
    _write(competition, overrides, {"retries": {**overrides.retries, entry: granted}})


def _write(competition: Competition, overrides: Overrides, change: dict[str, object]) -> None:
    content = overrides.model_copy(update=change).model_dump(exclude_defaults=True)
    write_text(
        overrides_file(competition.competition),
        HEADER + yaml.safe_dump(content, sort_keys=True, allow_unicode=True),
    )
