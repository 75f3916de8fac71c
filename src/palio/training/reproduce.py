"""Train a finished entry again from its manifest and say how far adapter and scores are apart.

The organizers' check of winners: same base model, same dataset, same recipe, another folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file

from palio.config import FinetuneRecipe, Metric, Scenario, Track
from palio.errors import BadInput
from palio.records import AdapterManifest, BaseModelManifest, DatasetManifest, Part, Record, read_record
from palio.training.finetune import RECIPE_VERSION, finetune
from palio.training.step import TrainingStep

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


def reproduce(
    *, entry_dir: Path, base_model: Path, track: Track, out: Path, threads: int | None = None
) -> Reproduction:
    """Train the entry of `entry_dir` again in `out`. Nothing in `entry_dir` changes; a training that was
    interrupted goes on.

    Raises BadInput if base model, dataset or trainer are no longer those of the entry's manifest.
    """
    file = entry_dir / "adapter.json"
    first = read_record(AdapterManifest, file)
    if first.recipe_version.startswith("command"):
        fix = "was trained by the team's own program; run its entry again in another folder"
        raise BadInput(file, "recipe_version", first.recipe_version, fix)
    base = read_record(BaseModelManifest, base_model / "manifest.json")
    data = read_record(DatasetManifest, entry_dir / "dataset" / "manifest.json")
    for key, ours, theirs in (
        ("base_model_fingerprint", base.fingerprint, first.base_model_fingerprint),
        ("dataset_sha256", data.sha256, first.dataset_sha256),
        ("recipe_version", RECIPE_VERSION, first.recipe_version),
    ):
        if ours != theirs:
            raise BadInput(
                file, key, theirs, f"here it is {ours}; bring back what the entry was trained with"
            )
    if out.resolve() == entry_dir.resolve():
        raise BadInput("out", "", str(out), "is the entry's own folder; give another")
    again = TrainingStep(
        competition=first.competition,
        track_id=first.track,
        entry=first.entry,
        track=track,
        base_model=base_model,
        dataset=entry_dir / "dataset",
        entry_dir=out,
        threads=threads,
    )
    second = finetune(FinetuneRecipe.model_validate(first.recipe), again)
    assert first.final_loss is not None  # a recipe's; a team's own program has another recipe_version
    assert second.final_loss is not None
    return Reproduction(
        track=first.track,
        entry=first.entry,
        first_fingerprint=first.fingerprint,
        second_fingerprint=second.fingerprint,
        identical=first.files == second.files,
        weight_distance=weight_distance(entry_dir / "adapter", out / "adapter"),
        loss_difference=abs(first.final_loss - second.final_loss),
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
    first: Path, second: Path, stage: str, scenarios: Mapping[str, Scenario]
) -> list[ScoreDifference]:
    """The scored columns of one stage of two entry folders, paired by instance."""
    tables = [pq.read_table(folder / "helm" / stage / "instances.parquet") for folder in (first, second)]
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
