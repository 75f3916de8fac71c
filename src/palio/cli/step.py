"""`palio step`, hidden: what the workflow's rules call, one subcommand a step of the table.

`palio step finetune results/laptop/curated` works by hand too: without --settings it takes them from the config.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from palio.cli.group import ExistingPath, Verb, competition_file, competition_option, palio
from palio.errors import BadInput, PalioError, RuleViolation


@palio.group(hidden=True)
def step() -> None:
    """One step of the workflow, as its rules call it."""


def _run(
    name: str, entry_dir: Path, competition: str, settings: str | None, options: str, threads: int | None
) -> None:
    from palio import steps
    from palio.settings import RunOptions

    folder, given = planned_step(name, entry_dir, competition, settings)
    steps.run(name, folder, given, RunOptions.read(options, **({"threads": threads} if threads else {})))


def planned_step(name: str, entry_dir: Path, competition: str, text: str | None) -> tuple[Any, Any]:
    """Return the entry's folder, and the step's settings: those given as JSON, or those of the config."""
    from palio.layout import ClosedStore, EntryFolder
    from palio.pipeline import BY_NAME
    from palio.settings import EvaluateSettings

    model = BY_NAME[name].settings
    if text is None:
        from palio.workflow import Workflow

        workflow = Workflow(competition_file(competition), competition)
        if entry_dir.name not in workflow.entries:
            raise BadInput(competition, "entries", entry_dir.name, "no entry has this id; correct the folder")
        settings = model.of(workflow.planned(entry_dir.name), name)
    else:
        settings = model.read(text)
    store = settings.runs.closed if isinstance(settings, EvaluateSettings) else ClosedStore(Path())
    return EntryFolder.at(entry_dir, store), settings


def _command(name: str) -> click.Command:
    @click.argument("entry_dir", type=ExistingPath)
    @competition_option
    @click.option("--settings", metavar="JSON", help="The step's settings; default: those of the config.")
    @click.option("--options", metavar="JSON", default="{}", help="How it runs here; changes no result.")
    @click.option("--threads", type=click.IntRange(min=1), help="CPU threads; default: as many as there are.")
    def run(**given: Any) -> None:
        _run(name, **given)

    return click.command(name, cls=Verb, example=f"palio step {name} results/laptop/curated")(run)
