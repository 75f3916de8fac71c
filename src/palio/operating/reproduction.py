"""Train a finished entry again from its manifest and say how far adapter and scores are apart.

The organizers' check of winners: same base model, same dataset, same recipe, another folder.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file

from palio import steps
from palio.config import FinetuneRecipe, Metric, Scenario
from palio.errors import BadInput
from palio.files import link_or_copy
from palio.layout import EntryFolder, Results, Stage
from palio.provenance import fingerprint
from palio.records import AdapterManifest, BaseModelManifest, DatasetManifest, Part, Record, read_record
from palio.settings import EvaluateSettings, FinetuneSettings, PackageSettings, RunOptions, limits_of
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
    weight_distance: float
    """|a - b| / |a| over all trained weights: 0 if identical, about 1.4 for adapters unrelated in their
    directions, between them for the same training with other rounding."""
    loss_difference: float
    """Of the mean loss of the last steps, in nats."""
    scores: tuple[ScoreDifference, ...] = ()

    @property
    def reproduced(self) -> bool:
        near = self.weight_distance <= WEIGHT_NOISE and self.loss_difference <= LOSS_NOISE
        return (self.identical or near) and all(score.within_noise for score in self.scores)

    def lines(self) -> list[str]:
        """The comparison for people."""
        apart = f"weights {self.weight_distance:.3f}, final loss {self.loss_difference:.4f} nats apart"
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
    What was interrupted goes on. Returns the comparison, which is also written, and the new entry's folder.

    Raises:
        BadInput: base model, dataset or trainer are no longer those of the entry's manifest.
    """
    competition = workflow.competition
    first = EntryFolder.at(entry_dir, competition.store)
    trained = read_record(AdapterManifest, first.adapter_manifest)
    track = competition.tracks.get(trained.track)
    if track is None:
        why, fix = "is not a track in this competition", "give the entry's competition"
        raise BadInput(first.adapter_manifest, "track", trained.track, why=why, fix=fix)
    store = competition.store.reproduction(fingerprint(str(out.resolve()))[:16])
    again = Results(out, store).entry(first.track_id, first.entry_id)
    if again.path.resolve() == first.path.resolve():
        raise BadInput("--out", "", str(out), why="is the entry's own results folder", fix="give another")
    _require_the_same_inputs(first, trained)
    if not again.dataset.manifest.exists():
        shutil.copytree(
            first.dataset.path, again.dataset.path, copy_function=link_or_copy, dirs_exist_ok=True
        )
    options = RunOptions(threads=threads or track.cpus)
    common = {"competition_id": trained.competition, "base_model_id": trained.base_model}
    recipe = FinetuneRecipe.model_validate(trained.recipe)
    steps.run("finetune", again, FinetuneSettings(**common, track=limits_of(track), recipe=recipe), options)
    made = _compared(first, again)
    if stages:
        steps.run("package", again, PackageSettings(**common, adapter=True), options)
    for stage in stages:
        runs = workflow.stage_runs[stage]
        settings = EvaluateSettings.of_package(competition, runs, trained.track)
        steps.run(stage, again, settings, options)
        scores = score_differences(first, again, stage, competition.stage(stage).scenarios)
        made = made.model_copy(update={"scores": (*made.scores, *scores)})
    made.write(again.reproduction)
    return made, again


def _require_the_same_inputs(first: EntryFolder, trained: AdapterManifest) -> None:
    if trained.recipe_version.startswith("command"):
        why, fix = "was trained by the team's own program", "run its entry again in another folder"
        raise BadInput(first.adapter_manifest, "recipe_version", trained.recipe_version, why=why, fix=fix)
    base = read_record(BaseModelManifest, steps.RESOURCES.base_model(trained.base_model).manifest)
    data = read_record(DatasetManifest, first.dataset.manifest)
    for key, ours, theirs in (
        ("base_model_fingerprint", base.fingerprint, trained.base_model_fingerprint),
        ("dataset_sha256", data.sha256, trained.dataset_sha256),
        ("recipe_version", RECIPE_VERSION, trained.recipe_version),
    ):
        if ours != theirs:
            why, fix = f"here it is {ours}", "bring back what the entry was trained with"
            raise BadInput(first.adapter_manifest, key, theirs, why=why, fix=fix)


def _compared(first: EntryFolder, again: EntryFolder) -> Reproduction:
    """The adapters of two trainings."""
    one, other = (read_record(AdapterManifest, folder.adapter_manifest) for folder in (first, again))
    assert one.final_loss is not None  # a recipe's; a team's own program has another recipe_version
    assert other.final_loss is not None
    return Reproduction(
        track=one.track,
        entry=one.entry,
        first_fingerprint=one.fingerprint,
        second_fingerprint=other.fingerprint,
        identical=one.files == other.files,
        weight_distance=weight_distance(first.adapter, again.adapter),
        loss_difference=abs(one.final_loss - other.final_loss),
    )


def weight_distance(one: Path, other: Path) -> float:
    """|a - b| / |a| over the weights of two adapters (or models) of the same shape."""
    apart = length = 0.0
    for path in sorted(one.glob("*.safetensors")):
        ours, theirs = load_file(path), load_file(other / path.name)
        for name, tensor in ours.items():
            apart += (tensor.double() - theirs[name].double()).square().sum().item()
            length += tensor.double().square().sum().item()
    return float(torch.tensor(apart / length).sqrt())


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
