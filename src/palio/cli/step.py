"""`palio step`, hidden: what the workflow's rules call, one subcommand a step of the table.

`palio step finetune results/laptop/curated` works by hand too: without --settings it reads the config.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from palio.cli.group import ExistingPath, competition_content, palio
from palio.errors import BadInput, RuleViolation, Withdrawn
from palio.layout import CONFIG, NO_STORE, EntryFolder

if TYPE_CHECKING:
    from palio.settings import StepSettings


class Steps(click.Group):
    """The steps of `palio.pipeline`, which is imported only when one is asked for, and what they need."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        from palio.pipeline import STEPS

        return [*(step.name for step in STEPS), *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        from palio.pipeline import BY_NAME

        return super().get_command(ctx, cmd_name) or (_command(cmd_name) if cmd_name in BY_NAME else None)


@palio.group(cls=Steps, hidden=True)
def step() -> None:
    """One step of the workflow, as its rules call it."""
    from palio.guard import CONTROLLER_VARIABLE, end_with

    if controller := os.environ.get(CONTROLLER_VARIABLE):
        end_with(int(controller))


def _command(name: str) -> click.Command:
    parameters: list[click.Parameter] = [
        click.Argument(["entry_dir"], type=ExistingPath),
        click.Option(["--competition"], default=str(CONFIG), help="Where settings are taken from."),
        click.Option(["--settings"], metavar="JSON", help="The step's settings; default: the config's."),
        click.Option(["--options"], metavar="JSON", default="{}", help="How it runs here."),
        click.Option(["--threads"], type=click.IntRange(min=1), help="CPU threads; default: all."),
        click.Option(["--memory-mb"], type=click.IntRange(min=1), help="Memory of each of its processes."),
        click.Option(["--minutes"], type=click.IntRange(min=1), help="Time, with --memory-mb."),
    ]
    if name == "curate":
        parameters += [
            click.Option(["--shard"], metavar="I-of-N", help="Only work ahead: on this share of the rows."),
            click.Option(["--join"], type=click.IntRange(min=0), help="Only work ahead: join the shards."),
        ]

    def run(
        entry_dir: Path,
        competition: str,
        settings: str | None,
        options: str,
        shard: str | None = None,
        join: int | None = None,
        **here: int | None,
    ) -> None:
        from palio import steps
        from palio.config import load_overrides
        from palio.settings import CurateSettings, RunOptions

        folder, step_settings = _planned(name, entry_dir, competition, settings)
        if why := load_overrides(step_settings.competition_id).withdrawn.get(folder.entry_id):
            raise Withdrawn(f"{folder.entry_id} was withdrawn: {why}")
        given = RunOptions.read(options, **{key: value for key, value in here.items() if value})
        if isinstance(step_settings, CurateSettings) and (shard or join is not None):
            steps.curate_ahead(
                folder, step_settings, given, shard=shard_of(shard) if shard else None, join=join or 0
            )
        else:
            steps.run(name, folder, step_settings, given)

    return click.Command(name, params=parameters, callback=run)


def _planned(
    name: str, entry_dir: Path, competition: str, settings: str | None
) -> tuple[EntryFolder, StepSettings]:
    """Return the entry's folder, and the step's settings: those given, or those of the config."""
    from palio.pipeline import BY_NAME
    from palio.settings import EvaluateSettings

    model = BY_NAME[name].settings
    if settings is None:
        from palio.workflow import Workflow

        workflow = Workflow(competition_content(competition), competition)
        folder = EntryFolder.at(entry_dir)
        if folder.entry_id not in workflow.entries:
            raise BadInput(
                competition, "entries", folder.entry_id, why="no entry has this id", fix="correct the folder"
            )
        planned = model.of(workflow.planned(folder.name), name)
    else:
        planned = model.read(settings)
    store = planned.runs.closed if isinstance(planned, EvaluateSettings) else NO_STORE
    return EntryFolder.at(entry_dir, store), planned


def shard_of(given: str) -> tuple[int, int]:
    """Parse 2-of-8 as (2, 8)."""
    number, _, count = given.partition("-of-")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise click.UsageError(f"--shard {given}: write it as 2-of-8")
    return int(number), int(count)


@step.command("fetch-base-model")
@click.argument("out", type=ExistingPath)
@click.option("--source", required=True, help="JSON with one of hub, path, gguf.")
@click.option("--approved-as", required=True, help="Approved family; empty: not approved, and refused.")
@click.option("--code", default="{}", help="JSON: sha256 by name of the model's approved Python files.")
def fetch_base_model_step(out: Path, source: str, approved_as: str, code: str) -> None:
    """Bring a base model into the folder OUT, as safetensors with a manifest of hashes."""
    from palio.base_model import fetch_base_model
    from palio.config import BaseModelSource
    from palio.settings import read_slice

    wanted = read_slice(BaseModelSource, source, "--source")
    if not approved_as:
        raise RuleViolation(f"base_model: {wanted.address} is not approved; it is not downloaded")
    fetch_base_model(wanted, out, code=json.loads(code))


@step.command("prepare-stage")
@click.argument("record", type=ExistingPath)
@click.option("--runs", required=True, help="JSON: competition, stage, closed_store, scenarios.")
def prepare_stage_step(record: Path, runs: str) -> None:
    """Let HELM make a stage's evaluation instances once, before any entry needs them."""
    from palio.evaluation.stage import prepare_stage, summary
    from palio.settings import StageRuns, read_slice

    made = prepare_stage(read_slice(StageRuns, runs, "--runs"), record)
    for line in summary(made):
        print(line)
