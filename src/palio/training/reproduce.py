"""Train a finished entry again from its manifest and say how far the two adapters are apart.

The organizers' check of winners: same base model, same dataset, same recipe, another folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from palio.config import FinetuneRecipe, Track
from palio.errors import BadInput
from palio.records import AdapterManifest, BaseModelManifest, DatasetManifest, read_record
from palio.training.finetune import RECIPE_VERSION, finetune


@dataclass(frozen=True)
class Reproduction:
    """The entry's adapter against the one trained again."""

    first: AdapterManifest
    second: AdapterManifest
    identical: bool
    """Every file has the same bytes: what to expect on a CPU with the same number of threads."""
    weight_distance: float
    """|a - b| / |a| over all trained weights: 0 if identical, about 1.4 for adapters unrelated in their
    directions, between them for the same training with other rounding."""
    loss_difference: float
    """Of the mean loss of the last steps, in nats."""


def reproduce(
    *, entry_dir: Path, base_model: Path, track: Track, out: Path, threads: int | None = None
) -> Reproduction:
    """Train the entry of `entry_dir` again in `out`, an empty folder. Nothing in `entry_dir` changes.

    Raises BadInput if base model, dataset or trainer are no longer those of the entry's manifest.
    """
    first = read_record(AdapterManifest, entry_dir / "adapter.json")
    base = read_record(BaseModelManifest, base_model / "manifest.json")
    data = read_record(DatasetManifest, entry_dir / "dataset" / "manifest.json")
    file = entry_dir / "adapter.json"
    for key, ours, theirs in (
        ("base_model_fingerprint", base.fingerprint, first.base_model_fingerprint),
        ("dataset_sha256", data.sha256, first.dataset_sha256),
        ("recipe_version", RECIPE_VERSION, first.recipe_version),
    ):
        if ours != theirs:
            raise BadInput(
                file, key, theirs, f"here it is {ours}; bring back what the entry was trained with"
            )
    if out.resolve() == entry_dir.resolve() or (out / "adapter.json").exists():
        raise BadInput("out", "", str(out), "holds an adapter; give an empty folder")
    second = finetune(
        recipe=FinetuneRecipe.model_validate(first.recipe),
        track=track,
        base_model=base_model,
        dataset=entry_dir / "dataset",
        entry_dir=out,
        competition=first.competition,
        track_id=first.track,
        entry=first.entry,
        threads=threads,
    )
    assert first.final_loss is not None  # a recipe's; a team's own program has another recipe_version
    assert second.final_loss is not None
    return Reproduction(
        first=first,
        second=second,
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
