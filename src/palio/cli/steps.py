"""Verbs that the workflow's rules call, one a step; `check`, `curate` and `score` serve people too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from palio.cli.group import (
    ExistingPath,
    Verb,
    competition_id_option,
    competition_of,
    competition_option,
    entry_dir_option,
    entry_step,
    fresh_start_option,
    isolation_option,
    palio,
    track_and_entry,
)
from palio.errors import RuleViolation


@palio.command(
    "fetch-base-model",
    cls=Verb,
    example='palio fetch-base-model --source \'{"hub": "org/name@<commit>"}\' --approved-as GPT2 --out DIR',
)
@click.option("--source", required=True, help="JSON with one of hub, path, gguf.")
@click.option("--approved-as", required=True, help="Approved family; empty: not approved, and refused.")
@click.option("--offline", is_flag=True, help="Use what is there; download nothing.")
@click.option("--out", type=ExistingPath, required=True, help="Folder for the model and manifest.json.")
def fetch_base_model_verb(source: str, approved_as: str, offline: bool, out: Path) -> None:
    """Bring a base model into a folder of safetensors with a manifest of hashes."""
    from palio.base_model import fetch_base_model
    from palio.config import BaseModelSource, parse

    wanted = parse(BaseModelSource, json.loads(source), "base_model")
    if not approved_as:
        raise RuleViolation(f"base_model: {wanted.address} is not approved; it is not downloaded")
    fetch_base_model(wanted, out, offline=offline)


@palio.command("fetch-data", cls=Verb, example="palio fetch-data --stage open")
@competition_option
@click.option("--stage", type=click.Choice(["open", "closed"]), required=True)
@click.option("--source", type=ExistingPath, help="Folder of data that is there already, as HELM caches it.")
def fetch_data_verb(competition: str, stage: str, source: Path | None) -> None:
    """Bring all data of a stage into its store, on a machine with a network; the rest runs without."""
    from palio.evaluation.helm import stage_runs
    from palio.evaluation.stage import fetch_data

    digests = fetch_data(stage_runs(competition_of(competition), stage), source)
    for name in sorted({"/".join(path.split("/")[:2]) for path in digests}):
        of = [digest for path, digest in digests.items() if path.startswith(f"{name}/")]
        print(f"{stage} {name}: {len(of)} files")


@palio.command(
    "prepare-stage", cls=Verb, example="snakemake --profile local resources/stages/open/stage.json"
)
@click.option("--runs", required=True, help="JSON slice: competition, stage, closed_store, scenarios.")
@click.option("--out", type=ExistingPath, required=True, help="The stage's record.")
def prepare_stage_verb(runs: str, out: Path) -> None:
    """Let HELM make a stage's evaluation instances once, before any entry needs them."""
    from palio.config import StageRuns, parse
    from palio.evaluation.stage import prepare_stage

    record = prepare_stage(parse(StageRuns, json.loads(runs), "--runs"), out)
    for scenario, count in record.scenarios.items():
        print(f"{record.stage} {scenario}: {count} instances")


@palio.command(
    "measure-contamination",
    cls=Verb,
    example="snakemake --profile local results/laptop/curated/contamination.json",
)
@competition_id_option
@entry_dir_option
@click.option("--open-store", type=ExistingPath, required=True, help="Store of the open stage.")
@click.option("--closed-store", type=ExistingPath, required=True, help="Store of the closed stage.")
def measure_contamination(competition_id: str, entry_dir: Path, open_store: Path, closed_store: Path) -> None:
    """Count the evaluation instances of both stages that stand in an entry's training data."""
    from palio.curation.contamination import contamination

    track, entry = track_and_entry(entry_dir)
    with entry_step("contamination", entry_dir):
        record = contamination(
            entry_dir / "dataset",
            {
                stage: store / "instances.parquet"
                for stage, store in (("open", open_store), ("closed", closed_store))
            },
            competition=competition_id,
            track=track,
            entry=entry,
        )
        record.write(entry_dir / "contamination.json")


@palio.command(cls=Verb, example="snakemake --profile local results/laptop/curated/adapter.json")
@competition_id_option
@entry_dir_option
@click.option("--recipe", help="JSON of the entry's finetune section.")
@click.option("--program", help="JSON of the entry's command section, instead.")
@isolation_option
@click.option("--network", is_flag=True, help="Let the program reach the network.")
@click.option("--track", "track_limits", required=True, help="JSON of the track's limits.")
@click.option("--base-model", type=ExistingPath, required=True, help="Folder of the base model.")
@click.option("--threads", type=int, help="CPU threads; default: torch's choice.")
@click.option("--telemetry", default="{}", help="JSON of the competition's telemetry section.")
@click.option("--retrain", is_flag=True, help="Replace a finished adapter that was trained otherwise.")
@fresh_start_option
def finetune(
    competition_id: str,
    entry_dir: Path,
    recipe: str | None,
    program: str | None,
    isolation: str,
    network: bool,
    track_limits: str,
    base_model: Path,
    threads: int | None,
    telemetry: str,
    retrain: bool,
    fresh_start: int | None,
) -> None:
    """Fine-tune the base model on the entry's dataset inside the track's budget. Resumes where it stopped."""
    from palio.config import FinetuneRecipe, Isolation, Program, Telemetry, Track, parse
    from palio.operating.attempt import set_aside

    if (recipe is None) == (program is None):
        raise click.UsageError("give either --recipe or --program")
    track, entry = track_and_entry(entry_dir)
    with entry_step("finetune", entry_dir):
        if fresh_start:
            set_aside(entry_dir / "work" / "train", fresh_start)
        from palio.training.step import TrainingStep

        step = TrainingStep(
            competition=competition_id,
            track_id=track,
            entry=entry,
            track=parse(Track, json.loads(track_limits), "track"),
            base_model=base_model,
            dataset=entry_dir / "dataset",
            entry_dir=entry_dir,
            threads=threads,
            telemetry=parse(Telemetry, json.loads(telemetry), "--telemetry"),
            retrain=retrain,
        )
        if program is not None:
            from palio.training.command import finetune_by_command

            handed_in = parse(Program, json.loads(program), "command")
            confinement = parse(Isolation, json.loads(isolation), "isolation")
            finetune_by_command(handed_in, step, confinement, network=network)
        elif recipe is not None:
            from palio.training.finetune import finetune as run

            run(parse(FinetuneRecipe, json.loads(recipe), "finetune"), step)


@palio.command(cls=Verb, example="snakemake --profile local results/laptop/curated/package.json")
@competition_id_option
@entry_dir_option
@click.option("--base-model", type=ExistingPath, required=True, help="Folder of the base model.")
@click.option("--adapter/--no-adapter", default=True, help="Without: package the untuned base model.")
@click.option("--server", help="JSON of the entry's server section: package the team's own server.")
def package(
    competition_id: str, entry_dir: Path, base_model: Path, adapter: bool, server: str | None
) -> None:
    """Merge the adapter into the base model, verify the logits, write a folder that transformers loads."""
    track, entry = track_and_entry(entry_dir)
    with entry_step("package", entry_dir):
        if server is not None:
            from palio.config import ServerProgram, parse
            from palio.packaging.server import package_server

            package_server(
                parse(ServerProgram, json.loads(server), "server"),
                base_model=base_model,
                entry_dir=entry_dir,
                competition=competition_id,
                track_id=track,
                entry=entry,
            )
            return
        from palio.packaging.package import build_package

        build_package(
            base_model=base_model,
            entry_dir=entry_dir,
            adapter=adapter,
            competition=competition_id,
            track_id=track,
            entry=entry,
        )


@palio.command(cls=Verb, example="snakemake --profile local results/laptop/curated/open.json")
@entry_dir_option
@click.option("--runs", required=True, help="JSON slice of the stage: what to run.")
@click.option("--limits", required=True, help="JSON slice of the stage: time limit and threads.")
@click.option("--track", "track_limits", required=True, help="JSON of the track's limits.")
@click.option("--instances", type=ExistingPath, required=True, help="The stage's record.")
@click.option("--threads", type=int, help="CPU threads of the model server.")
@click.option("--base-model", type=ExistingPath, help="Folder of the base model, for a team's own server.")
@isolation_option
@fresh_start_option
def evaluate(
    entry_dir: Path,
    runs: str,
    limits: str,
    track_limits: str,
    instances: Path,
    threads: int | None,
    base_model: Path | None,
    isolation: str,
    fresh_start: int | None,
) -> None:
    """Serve an entry's package and run HELM on it for one stage, inside the stage's time limit."""
    from palio.config import Isolation, StageLimits, StageRuns, Track, parse
    from palio.evaluation.evaluate import StartServer, work_folder
    from palio.evaluation.evaluate import evaluate as run
    from palio.operating.attempt import set_aside

    stage = parse(StageRuns, json.loads(runs), "--runs")
    track = parse(Track, json.loads(track_limits), "track")
    settings = parse(StageLimits, json.loads(limits), "--limits")

    with entry_step(stage.stage, entry_dir):
        if fresh_start:
            set_aside(work_folder(stage, entry_dir, "key").parent, fresh_start)
        from palio.records import PackageManifest, read_record
        from palio.sandbox.room import Limits
        from palio.sandbox.server import ConfinedServer
        from palio.serving.process import ServerProcess

        handed_in = read_record(PackageManifest, entry_dir / "package.json")

        def start_server(package: Path, log: Path) -> Any:
            if handed_in.kind == "server":
                if base_model is None:
                    raise click.UsageError("a team's own server needs --base-model")
                confinement = parse(Isolation, json.loads(isolation), "isolation")
                return ConfinedServer(
                    package,
                    base_model=base_model / "model",
                    limits=Limits.of(track, confinement, threads),
                    isolation=confinement,
                    log=log,
                    work=entry_dir / "work",
                )
            return ServerProcess(
                package,
                log=log,
                threads=threads,
                gpu_memory_gb=track.gpu_memory_gb,
                engine=settings.engine,
            )

        starter: StartServer = start_server
        run(stage, settings, instances, entry_dir, starter)
