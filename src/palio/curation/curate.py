"""From a recipe to a dataset: read the sources, apply the operations in order, shuffle, account.

    <out>/quarantine.jsonl   malformed lines of the sources, with line and reason
    <out>/dropped.parquet    every row that an operation dropped, with operation and reason
    <out>/train.parquet      the dataset, shuffled
    <out>/card.md            what a reader needs to know of it
    <out>/manifest.json      DatasetManifest, written last

Between two operations the rows lie in batches in a folder of the work folder, named by the hash of
everything that decides their content. So an operation holds a batch of rows in memory, and a rerun (after a
crash, or with another last operation) starts behind the last batch whose result is there. Jobs on several
machines share the work folder: each works ahead on a shard of the batches as far as it needs no others,
`curate_dataset` does what is left.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from palio.base_model import weight_files
from palio.config import (
    DatasetRecipe,
    Input,
)
from palio.curation.card import card
from palio.curation.dataset import write_dropped, write_shuffled
from palio.curation.operations import OperationContext
from palio.curation.reading import Progress, Sources, find_sources, read_sources
from palio.curation.step import Step
from palio.curation.store import Pool, Stored, Tick, batch_file, pool, unheard
from palio.errors import BadInput
from palio.incoming import Incoming, copy_files
from palio.layout import DatasetFolder
from palio.provenance import file_sha256, fingerprint, folder_sha256, write_text
from palio.records import DatasetManifest, OperationReport
from palio.sandbox.model_files import check_claims, folder_tensors

MODEL_FILES = (".safetensors", ".json", ".txt", ".model")
MODEL_BYTES = 20 << 30
"""The most that an operation's model has."""
RECIPE_VERSION = "4"
"""Raised when equal recipes give other rows than before."""


def _silent(step: str, total: int | None, rows: int, /) -> None: ...


def curate_dataset(
    recipe: DatasetRecipe,
    *,
    base_model: Path,
    competition: str,
    track: str,
    entry: str,
    out: Path,
    team_folders: Sequence[Path] = (),
    work: Path | None = None,
    limit: int | None = None,
    workers: int = 1,
    progress: Progress = _silent,
) -> DatasetManifest:
    """Curate the dataset of one entry into the folder `out`.

    Args:
        base_model: model folder of the entry's base model, for its tokenizer.
        team_folders: folders below which the team's files must lie, through no link; without them only a
            source itself and what is in it may not be a link.
        work: folder of the intermediate files, kept for reruns; default: work/curate beside `out`.
        limit: rows to read of each source, for a preview; omit to read all.
        workers: processes that work on batches; no part of the result.
        progress: called with the operation under way, rows in all where known, and rows just seen.

    Raises:
        BadInput: a source is absent or broken, too much of it is malformed, or no row is left.
        RuleViolation: a file of the team is outside the team folders, or a link.
    """
    folder = DatasetFolder(out)
    work = work or folder.work
    sources = read_sources(recipe, team_folders, work, limit, RECIPE_VERSION, progress)
    steps = _steps(recipe, sources, base_model, team_folders, work)
    with pool(workers) as processes:
        reports = _carry_out(steps, sources, processes, entry, progress)

    folders = [sources.folder, *(step.folder for step in steps)]
    quarantine = DatasetFolder(sources.folder).quarantine.read_text(encoding="utf-8")
    write_text(folder.quarantine, quarantine)
    write_dropped(((step.name, step.dropped(sources.batches)) for step in steps), folder.dropped)
    rows = Stored([batch_file(folders[-1], number) for number in sources.batches])
    written = write_shuffled(rows, folder.rows, recipe.seed, scratch=work)
    manifest = DatasetManifest(
        competition=competition,
        track=track,
        entry=entry,
        recipe_version=RECIPE_VERSION,
        seed=recipe.seed,
        rows=written.rows,
        sha256=file_sha256(folder.rows),
        sources=sources.reports,
        operations=reports,
        rows_by_source=dict(sorted(written.by_source.items())),
        characters=written.characters(),
    )
    write_text(folder.card, card(manifest, written.examples))
    manifest.write(folder.manifest)
    _tidy(work, folders)
    return manifest


def curate_ahead(
    recipe: DatasetRecipe,
    *,
    base_model: Path,
    entry: str,
    work: Path,
    shard: tuple[int, int] | None = None,
    join: int = 0,
    team_folders: Sequence[Path] = (),
    workers: int = 1,
) -> None:
    """Do a part of `curate_dataset` ahead of it, in the same work folder.

    Args:
        shard: (number from 1, of how many). Works on every so many-th batch, up to the first operation
            that needs all rows and has not decided.
        join: without a shard: 0 reads the sources, n decides for the nth operation that needs all rows.

    Raises:
        BadInput, RuleViolation: as `curate_dataset`.
    """
    found = find_sources(recipe, work, RECIPE_VERSION)
    sources = found or read_sources(recipe, team_folders, work, None, RECIPE_VERSION, _silent)
    steps = _steps(recipe, sources, base_model, team_folders, work)
    with pool(workers) as processes:
        if shard:
            number, shards = shard
            _carry_out_alone(steps, sources.batches[number - 1 :: shards], processes)
        elif needing_all := [step for step in steps if step.operation.needs_all_rows][:join]:
            _carry_out(steps[: needing_all[-1].index], sources, processes, entry, _silent)
            _decide(needing_all[-1], sources.batches, processes)


def _steps(
    recipe: DatasetRecipe, sources: Sources, base_model: Path, team_folders: Sequence[Path], work: Path
) -> list[Step]:
    models: dict[str, Path] = {}
    context = OperationContext(
        base_model=base_model, team_folders=team_folders, seed=recipe.seed, scratch=work, models=models
    )
    steps: list[Step] = []
    rows, key = sources.folder, sources.key
    for index, operation in enumerate(recipe.operations):
        digests = []
        for given in operation.inputs:
            if given.kind == "model_folder":
                models[given.path] = _model_copy(operation.op, given, context)
                digests.append(fingerprint(folder_sha256(models[given.path])))
            else:
                digests.append(_digest(operation.op, given, context))
        key = fingerprint([key, recipe.seed, operation.model_dump(mode="json"), digests])
        folder = work / f"{index:02}-{operation.op}-{key[:16]}"
        steps.append(Step(index, operation, rows, folder, context))
        rows = folder
    return steps


def _digest(op: str, given: Input, context: OperationContext) -> str:
    """Return a digest of an operation's input.

    Raises:
        BadInput: there is no such input.
    """
    if given.kind == "tokenizer":
        files = sorted(context.base_model.glob("token*"))
        if not files:
            raise BadInput(
                context.base_model, why=f"has no tokenizer for {op}", fix="fetch the base model first"
            )
        return fingerprint({path.name: file_sha256(path) for path in files})
    path = Path(given.path)
    if not path.is_file():
        raise BadInput(path, why="no such table of instances", fix="prepare the open stage first")
    return file_sha256(path)


def _model_copy(op: str, given: Input, context: OperationContext) -> Path:
    """Copy an operation's model into the work folder, once for each content.

    Raises:
        BadInput: it is no model, or its config claims more than its weights hold.
        RuleViolation: a file of it is outside the team folders, a link, or not what its name says.
    """
    where = ("dataset", f"{op}.{given.key}", given.path)
    folder = Incoming.locate(Path(given.path), context.team_folders)
    try:
        files = [folder / name for name in folder.names()]
        files = [file for file in files if file.name.endswith(MODEL_FILES) and not file.is_folder()]
    except (FileNotFoundError, NotADirectoryError):
        files = []
    names = {Path(file.name).name for file in files}
    why, fix = "no model with safetensors weights in this folder", "give one in Hugging Face format"
    # Given an adapter, transformers would load the base model from wherever its config says.
    if "config.json" not in names or "adapter_config.json" in names:
        raise BadInput(*where, why=why, fix=fix)
    building = context.scratch / f"model-{os.getpid()}.tmp"
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    copy_files(files, building, MODEL_BYTES)
    if not weight_files(building):
        raise BadInput(*where, why=why, fix=fix)
    try:
        config = json.loads((building / "config.json").read_text(encoding="utf-8"))
        check_claims(config if isinstance(config, dict) else {}, folder_tensors(building))
    except (ValueError, RecursionError):
        raise BadInput(*where, why="its config.json is not JSON", fix="save the model again") from None
    kept = context.scratch / f"model-{fingerprint(folder_sha256(building))[:16]}"
    if kept.exists():
        shutil.rmtree(building)
    else:
        building.rename(kept)
    return kept


def _carry_out(
    steps: Sequence[Step], sources: Sources, processes: Pool, entry: str, progress: Progress
) -> list[OperationReport]:
    """Every step on all batches, as far as it is not done."""
    reports: list[OperationReport] = []
    rows = sum(source.rows for source in sources.reports)
    for step in steps:
        tick = partial(progress, step.name, rows)
        _decide(step, sources.batches, processes, tick)
        processes.each(step.apply, step.without_outcome(sources.batches), tick)
        report = step.report(sources.batches)
        if report.rows_out == 0:
            why, fix = f"dropped the last of {report.rows_in} rows", "loosen it or add sources"
            raise BadInput(
                f"entry {entry}", f"dataset.operations.{step.index}", step.operation.op, why=why, fix=fix
            )
        reports.append(report)
        rows = report.rows_out
    return reports


def _carry_out_alone(steps: Sequence[Step], batches: range, processes: Pool) -> None:
    """The steps on these batches, as far as they need no others."""
    for step in steps:
        if step.undecided:
            processes.each(step.sketch, step.without_sketch(batches))
            return
        processes.each(step.apply, step.without_outcome(batches))


def _decide(step: Step, batches: range, processes: Pool, tick: Tick = unheard) -> None:
    if step.undecided:
        processes.each(step.sketch, step.without_sketch(batches), tick)
        step.decide(batches)


def _tidy(work: Path, kept: Sequence[Path]) -> None:
    """Remove results of earlier recipes and what killed processes left; nothing else that may lie there."""
    for folder in work.iterdir():
        if re.fullmatch(r"(sources|\d\d-\w+)-[0-9a-f]{16}", folder.name):
            if folder not in kept:
                shutil.rmtree(folder)
            else:
                for left in folder.glob(".*"):
                    left.unlink()
