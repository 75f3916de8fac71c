"""Train a finished entry again from its manifest and say how far adapter and scores are apart.

The organizers' check of winners: same base model, same dataset, same recipe, another folder.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file

from palio import steps
from palio.config import Competition, FinetuneRecipe, Metric, Scenario
from palio.errors import BadInput
from palio.files import link_or_copy
from palio.layout import EntryFolder, Results, Stage
from palio.pipeline import BY_NAME, steps_of
from palio.provenance import fingerprint, folder_sha256
from palio.records import AdapterManifest, BaseModelManifest, DatasetManifest, Part, Record, read_record
from palio.settings import (
    EvaluateSettings,
    FinetuneSettings,
    ImageSettings,
    PackageSettings,
    PlannedEntry,
    RunOptions,
    limits_of,
)
from palio.training.command import RECIPE_VERSION as COMMAND_VERSION
from palio.training.finetune import RECIPE_VERSION
from palio.workflow import Workflow

WEIGHT_NOISE = 0.5
"""Weight distance that other rounding may cause: set, not measured; far below that of other seeds."""
LOSS_NOISE = 0.02
"""Nats."""


class ScoreDifference(Part):
    """One scored column of the entry against that of the package trained again."""

    stage: str
    scenario: str
    metric: str
    first: float
    second: float
    n: int
    """Instances that both answered."""
    noise: float
    """Two standard errors of the mean difference, instance by instance; 0 where every answer scored alike."""

    @property
    def within_noise(self) -> bool:
        return abs(self.first - self.second) <= self.noise


class Reproduction(Record):
    """The entry's adapter against the one trained again."""

    track: str
    entry: str
    first_fingerprint: str
    second_fingerprint: str
    identical: bool
    """Every file has the same bytes: what to expect on a CPU with the same number of threads."""
    weight_distance: float | None
    """|a - b| / |a| over all trained weights: 0 if identical, about 1.4 for adapters unrelated in their
    directions, between them for the same training with other rounding; None for other weights than the
    first's, such as an adapter more."""
    loss_difference: float | None
    """Of the mean loss of the last steps, in nats; None for a team's own program, which reports none."""
    scores: tuple[ScoreDifference, ...] = ()

    @property
    def reproduced(self) -> bool:
        distance = math.inf if self.weight_distance is None else self.weight_distance
        near = distance <= WEIGHT_NOISE and (self.loss_difference or 0.0) <= LOSS_NOISE
        return (self.identical or near) and all(score.within_noise for score in self.scores)

    def lines(self) -> list[str]:
        """The comparison for people."""
        loss = "" if self.loss_difference is None else f", final loss {self.loss_difference:.4f} nats"
        apart = "not the same weights by name and shape"
        if self.weight_distance is not None:
            apart = f"weights {self.weight_distance:.3f}{loss} apart"
        return [
            f"adapter: {'identical' if self.identical else apart}",
            *(
                f"{score.stage} {score.scenario}, {score.metric}: {score.first:.3f}, again "
                f"{score.second:.3f} (noise {score.noise:.3f}, {score.n} instances)"
                for score in self.scores
            ),
        ]


def reproduce(
    workflow: Workflow, entry_dir: Path, out: Path, *, stages: Sequence[Stage], threads: int | None
) -> tuple[Reproduction, EntryFolder]:
    """Train the entry of `entry_dir` again under the results folder `out`, and evaluate it in `stages`.

    Nothing in `entry_dir` changes, and no work of it is used: the reproduction has a closed store of its own.
    What was interrupted goes on. A recipe is the manifest's; a team's own programs are run again, confined as
    before. Returns the comparison, which is also written, and the new entry's folder.

    Raises:
        BadInput: base model, dataset, trainer or program are no longer those of the entry's manifest.
    """
    competition = workflow.competition
    first = EntryFolder.at(entry_dir, competition.store)
    trained = read_record(AdapterManifest, first.adapter_manifest)
    track = competition.tracks.get(trained.track)
    if track is None:
        why, fix = "is not a track in this competition", "give the entry's competition"
        raise BadInput(first.adapter_manifest, "track", trained.track, why=why, fix=fix)
    again = _folder_of_its_own(competition, first, out)
    _require_the_same_inputs(first, trained)
    if not again.dataset.manifest.exists():
        shutil.copytree(
            first.dataset.path, again.dataset.path, copy_function=link_or_copy, dirs_exist_ok=True
        )
    options = RunOptions(threads=threads or track.cpus)
    common = {"competition_id": trained.competition, "base_model_id": trained.base_model}
    isolation = competition.isolation if trained.code else None
    planned = _with_own_programs(workflow, first)
    if planned and planned.valid and planned.valid.command:
        training = FinetuneSettings.of(planned, "finetune")
        _require_the_same_program(first, trained, training)
    else:
        recipe = FinetuneRecipe.model_validate(trained.recipe)
        training = FinetuneSettings(**common, track=limits_of(track), recipe=recipe, isolation=isolation)
    steps.run("finetune", again, _afresh(training), options)
    made = _compared(first, again)
    if stages:
        if planned and BY_NAME["image"] in steps_of(planned.entry):
            steps.run("image", again, ImageSettings.of(planned, "image"), options)
        package = PackageSettings(**common, adapter=True)
        steps.run("package", again, PackageSettings.of(planned, "package") if planned else package, options)
    for stage in stages:
        evaluated = EvaluateSettings.of(planned, stage) if planned else _of_model(workflow, trained, stage)
        steps.run(stage, again, _afresh(evaluated), options)
        scores = score_differences(first, again, stage, competition.stage(stage).scenarios)
        made = made.model_copy(update={"scores": (*made.scores, *scores)})
    made.write(again.reproduction)
    return made, again


def _of_model(workflow: Workflow, trained: AdapterManifest, stage: Stage) -> EvaluateSettings:
    """Return how a stage evaluates the model of an entry without programs of its own."""
    competition = workflow.competition
    settings = EvaluateSettings.of_package(competition, workflow.stage_runs[stage], trained.track)
    return settings.model_copy(update={"isolation": competition.isolation if trained.code else None})


def _folder_of_its_own(competition: Competition, first: EntryFolder, out: Path) -> EntryFolder:
    """Return the reproduction's folder under `out`, whose closed store is named after `out`."""
    store = competition.store.reproduction(fingerprint(str(out.resolve()))[:16])
    again = Results(out, store).entry(first.track_id, first.entry_id)
    if again.path.resolve() == first.path.resolve():
        raise BadInput("--out", "", str(out), why="is the entry's own results folder", fix="give another")
    return again


def _with_own_programs(workflow: Workflow, first: EntryFolder) -> PlannedEntry | None:
    """Return the entry as the competition plans it, if it brings programs of its own."""
    if first.entry_id not in workflow.entries:
        return None
    planned = workflow.planned(first.entry_id)
    return planned if planned.valid and planned.valid.programs else None


AnySettings = TypeVar("AnySettings", FinetuneSettings, EvaluateSettings)


def _afresh(settings: AnySettings) -> AnySettings:
    """Return settings without the fresh starts that the entry was granted: here there is no earlier work."""
    return settings.model_copy(update={"fresh_start": None})


def _require_the_same_program(
    first: EntryFolder, trained: AdapterManifest, training: FinetuneSettings
) -> None:
    program = training.program
    assert program is not None
    files = fingerprint(folder_sha256(Path(program.files))) if program.files else None
    now = {"kind": "command", **program.model_dump(mode="json", exclude_none=True), "files_sha256": files}
    for key, value in now.items():
        if trained.recipe.get(key) != value:
            why, fix = f"here it is {value}", "bring back the program that the entry was trained with"
            raise BadInput(first.adapter_manifest, f"recipe.{key}", trained.recipe.get(key), why=why, fix=fix)


def _require_the_same_inputs(first: EntryFolder, trained: AdapterManifest) -> None:
    by_program = trained.recipe_version.startswith("command")
    base = read_record(BaseModelManifest, steps.RESOURCES.base_model(trained.base_model).manifest)
    data = read_record(DatasetManifest, first.dataset.manifest)
    for key, ours, theirs in (
        ("base_model_fingerprint", base.fingerprint, trained.base_model_fingerprint),
        ("dataset_sha256", data.sha256, trained.dataset_sha256),
        ("recipe_version", COMMAND_VERSION if by_program else RECIPE_VERSION, trained.recipe_version),
    ):
        if ours != theirs:
            why, fix = f"here it is {ours}", "bring back what the entry was trained with"
            raise BadInput(first.adapter_manifest, key, theirs, why=why, fix=fix)


def _compared(first: EntryFolder, again: EntryFolder) -> Reproduction:
    """The adapters of two trainings."""
    one, other = (read_record(AdapterManifest, folder.adapter_manifest) for folder in (first, again))
    losses = [manifest.final_loss for manifest in (one, other)]
    return Reproduction(
        track=one.track,
        entry=one.entry,
        first_fingerprint=one.fingerprint,
        second_fingerprint=other.fingerprint,
        identical=one.files == other.files,
        weight_distance=weight_distance(first.adapter, again.adapter),
        loss_difference=None if None in losses else abs(losses[0] - losses[1]),  # type: ignore[operator]
    )


def weight_distance(one: Path, other: Path) -> float | None:
    """Return |a - b| / |a| over the weights of two adapters (or sets of them, or models); None if one of them
    has weights that the other lacks or has in another shape."""
    files = _weight_files(one)
    if files != _weight_files(other):
        return None
    apart = length = 0.0
    for name in files:
        ours, theirs = load_file(one / name), load_file(other / name)
        if _shapes(ours) != _shapes(theirs):
            return None
        for key, tensor in ours.items():
            apart += (tensor.double() - theirs[key]).square().sum().item()
            length += tensor.double().square().sum().item()
    return math.sqrt(apart / (length or apart)) if apart else 0.0


def _weight_files(folder: Path) -> list[Path]:
    return sorted(path.relative_to(folder) for path in folder.rglob("*.safetensors"))


def _shapes(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in weights.items()}


def score_differences(
    first: EntryFolder, second: EntryFolder, stage: Stage, scenarios: Mapping[str, Scenario]
) -> list[ScoreDifference]:
    """The scored columns of one stage of two entry folders, paired by instance."""
    tables = [pq.read_table(folder.tables(stage).instances) for folder in (first, second)]
    found = []
    for scenario, settings in scenarios.items():
        for name, metric in settings.metrics.items():
            ours, theirs = (_values(table.to_pylist(), scenario, metric) for table in tables)
            both = sorted(ours.keys() & theirs.keys())
            if not both:
                continue
            one, other = (np.array([values[key] for key in both]) for values in (ours, theirs))
            error = (other - one).std(ddof=1) / len(both) ** 0.5 if len(both) > 1 else 0.0
            found.append(
                ScoreDifference(
                    stage=stage,
                    scenario=scenario,
                    metric=name,
                    first=one.mean(),
                    second=other.mean(),
                    n=len(both),
                    noise=2 * error,
                )
            )
    return found


def _values(rows: list[dict[str, object]], scenario: str, metric: Metric) -> dict[tuple[str, str], float]:
    """Value by HELM run and instance."""
    wanted = (scenario, metric.metric, metric.split, metric.perturbation)
    return {
        (str(row["run"]), str(row["instance"])): float(str(row["value"]))
        for row in rows
        if (row["scenario"], row["metric"], row["split"], row["perturbation"]) == wanted
        and row["value"] is not None
        and (metric.run is None or metric.run in str(row["run"]))
    }
