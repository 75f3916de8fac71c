"""The steps of an entry: one function each, of the entry's folder, its settings, and how to run here.

`palio.pipeline` names them; `palio step`, `palio reproduce` and the workflow call them. Imports stand inside,
since each step has heavy libraries of its own.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from palio import planning
from palio.config import Isolation
from palio.errors import BadInput, Interrupted, PalioError, RuleViolation
from palio.layout import EntryFolder, Resources
from palio.operating.attempt import set_aside
from palio.operating.kept import keep
from palio.pipeline import BY_NAME
from palio.settings import (
    CheckSettings,
    ContaminationSettings,
    CurateSettings,
    EvaluateSettings,
    FinetuneSettings,
    ImageSettings,
    PackageSettings,
    RunOptions,
    StepSettings,
)

if TYPE_CHECKING:
    from palio.evaluation.evaluate import Server
    from palio.records import PackageManifest

RESOURCES = Resources()
DEFAULT_ENGINE = "transformers"
"""Palio's own."""


def run(name: str, folder: EntryFolder, settings: StepSettings, options: RunOptions) -> None:
    """Run a step as one attempt, on record whatever ends it, and within the limits of its job if given."""
    from palio.limits import in_child
    from palio.operating.attempt import attempt

    step = BY_NAME[name]
    work = partial(globals()[step.function], folder, settings, options)
    with attempt(name, folder):
        if gone := planning.vanished(step, folder, settings):
            raise Interrupted(f"{gone[0]} was read before and is gone; bring it back and start again")
        made = planning.made(step, folder, settings, RESOURCES)  # of what it is about to read
        if options.memory_mb is not None and options.minutes is not None:
            # The limit counts reserved memory, too: about 1.5 times what a process really uses.
            in_child(work, memory=2 * options.memory_mb << 20, seconds=60 * options.minutes)
        else:
            work()
        planning.stamp(step, folder, settings, made)
        with suppress(OSError):
            keep(step, folder)  # Snakemake deletes outputs of a job that is cancelled in its last seconds


def check(folder: EntryFolder, settings: CheckSettings, options: RunOptions) -> None:
    from palio.eligibility.entry_file import check_file

    checked = check_file(Path(settings.file), settings.against, options.among)
    for line in checked.lines():
        print(line)
    checked.require_clean().write(folder.check)


def curate(folder: EntryFolder, settings: CurateSettings, options: RunOptions) -> None:
    from palio.curation.curate import curate_dataset
    from palio.curation.inspection import account
    from palio.curation.progress import progress_bar
    from palio.records import CurateRun, timed_run

    run = CurateRun(shards=options.shards)
    with timed_run(folder.run_facts("curate"), run), progress_bar() as progress:
        manifest = curate_dataset(
            settings.dataset,
            base_model=RESOURCES.base_model(settings.base_model_id).model,
            team_folders=[Path(folder) for folder in settings.team_folders],
            competition=settings.competition_id,
            track=folder.track_id,
            entry=folder.entry_id,
            out=folder.dataset.path,
            work=folder.curation,
            workers=options.threads or 1,
            progress=progress,
        )
    for line in account(manifest):
        print(line)


def curate_ahead(
    folder: EntryFolder,
    settings: CurateSettings,
    options: RunOptions,
    *,
    shard: tuple[int, int] | None,
    join: int,
) -> None:
    """Do a part of `curate` ahead of it: a shard of the rows, or the joining of shards. A part that is killed
    for good is a failure of the step, which will never start."""
    from palio.curation.curate import curate_ahead as work_ahead
    from palio.operating.attempt import attempt

    with attempt("curate", folder, "{}-of-{}".format(*shard) if shard else f"{join}.joined"):
        try:
            work_ahead(
                settings.dataset,
                base_model=RESOURCES.base_model(settings.base_model_id).model,
                team_folders=[Path(folder) for folder in settings.team_folders],
                entry=folder.entry_id,
                work=folder.curation,
                shard=shard,
                join=join,
                workers=options.threads or 1,
            )
        except PalioError as fault:
            # The whole step meets the same fault, and its word is on record.
            print(f"left to the whole step: {fault}")


def contamination(folder: EntryFolder, settings: ContaminationSettings, options: RunOptions) -> None:
    from palio.curation.contamination import contamination as measure

    stages = {"open": settings.open, "closed": settings.closed}
    record = measure(
        folder.dataset.path,
        {stage: runs.store.instances for stage, runs in stages.items()},
        competition=settings.competition_id,
        track=folder.track_id,
        entry=folder.entry_id,
    )
    record.write(folder.contamination)


def finetune(folder: EntryFolder, settings: FinetuneSettings, options: RunOptions) -> None:
    if settings.fresh_start:
        set_aside(folder.trainings, settings.fresh_start)
    from palio.training.step import TrainingStep

    step = TrainingStep(folder, settings, options, RESOURCES.base_model(settings.base_model_id))
    if settings.program is not None:
        from palio.training.command import finetune_by_command

        finetune_by_command(settings.program, step)
    elif settings.recipe is not None:
        from palio.training.finetune import finetune as train

        train(settings.recipe, step)


def image(folder: EntryFolder, settings: ImageSettings, options: RunOptions) -> None:
    from palio.packaging.image import build_image

    build_image(folder, settings, options.threads)


def package(folder: EntryFolder, settings: PackageSettings, options: RunOptions) -> None:
    base_model = RESOURCES.base_model(settings.base_model_id)
    if settings.server is not None:
        from palio.packaging.server import package_server

        package_server(settings.server, folder, settings, base_model)
    else:
        import torch

        from palio.packaging.package import build_package
        from palio.serving.model import serving_of

        torch.set_num_threads(options.threads or torch.get_num_threads())
        build_package(folder, settings, base_model, serving_of, options.threads)


def evaluate(folder: EntryFolder, settings: EvaluateSettings, options: RunOptions) -> None:
    from palio.evaluation.evaluate import evaluate as run_stage
    from palio.evaluation.window import Window
    from palio.records import PackageManifest, read_record

    if settings.fresh_start:
        set_aside(folder.helm_runs(settings.runs.stage), settings.fresh_start)
    handed_in = read_record(PackageManifest, folder.package_manifest)
    engine, tokenizer = "", folder.package
    if handed_in.kind == "model":
        engine = _engine(settings)
        if handed_in.code and settings.limits.engine != DEFAULT_ENGINE:
            why, fix = "runs no model with code of its own", f"use {DEFAULT_ENGINE}"
            key, value = f"{settings.runs.stage}.engine", settings.limits.engine
            raise BadInput("config", key, value, why=why, fix=fix)
    elif settings.base_model_id is not None:
        tokenizer = RESOURCES.base_model(settings.base_model_id).model
    prepared = RESOURCES.stage_record(settings.runs.stage)
    start_server = partial(_server, folder, handed_in, settings, options)
    window = Window.kept(tokenizer, RESOURCES)
    run_stage(folder, settings, prepared, start_server, window, engine)


def _server(
    folder: EntryFolder,
    handed_in: PackageManifest,
    settings: EvaluateSettings,
    options: RunOptions,
    log: Path,
) -> AbstractContextManager[Server]:
    """Return a context in which the package is served: a model by us, confined if it brings code, or a team's
    own server."""
    from palio.evaluation.helm.folder import CONTEXT_TOKENS
    from palio.sandbox.room import Limits
    from palio.sandbox.server import model_server, team_server
    from palio.serving.app import DEADLINE_SECONDS
    from palio.serving.process import ServerProcess

    if handed_in.kind == "model" and not handed_in.code:
        return ServerProcess(
            folder.package,
            log=log,
            threads=options.threads,
            gpu_memory_gb=settings.track.gpu_memory_gb,
            max_context=CONTEXT_TOKENS,
            engine=settings.limits.engine,
            cpu_dtype=settings.limits.cpu_dtype,
        )
    isolation, exact = settings.isolation or Isolation(), settings.runs.stage == "open"
    limits = Limits.of(settings.track, isolation, options.threads)
    if handed_in.code:
        return model_server(
            folder.package,
            handed_in.code,
            limits=limits,
            isolation=isolation,
            log=log,
            reply_seconds=DEADLINE_SECONDS,
            exact=exact,
            settings={"max_context": CONTEXT_TOKENS, "cpu_dtype": settings.limits.cpu_dtype},
        )
    if settings.base_model_id is None:
        raise RuleViolation(f"{folder.package} is a server, which the entry is not; run its package again")
    return team_server(
        folder.package,
        base_model=RESOURCES.base_model(settings.base_model_id).model,
        limits=limits,
        isolation=isolation,
        log=log,
        work=folder.work,
        exact=exact,
    )


def _engine(settings: EvaluateSettings) -> str:
    """Return the name and version of what serves models, and its dtype if it is not the usual one. Raises
    BadInput if it cannot be used here."""
    from importlib.metadata import version

    from palio.cpu import check_cpu_dtype
    from palio.vllm import PROGRAM, vllm_version

    name, dtype = settings.limits.engine, settings.limits.cpu_dtype
    known = f"{name} {vllm_version() if name == PROGRAM else version(name)}"
    if settings.track.gpu_memory_gb or dtype == "float32":
        return known
    check_cpu_dtype(dtype, "config", f"{settings.runs.stage}.cpu_dtype")
    return f"{known} in {dtype}"
