"""Checkpoints, complete or absent: a torn one is skipped and the one before it is used.

checkpoints/step-000050/state.pt       tensors and numbers (loaded with weights_only)
checkpoints/step-000050/checkpoint.json  sha256 of state.pt and seconds of the budget used, written last
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from palio.errors import Interrupted
from palio.provenance import file_sha256, write_json

KEPT = 2
"""Checkpoints kept: the newest, and one more in case the newest is torn."""


def save_checkpoint(folder: Path, step: int, seconds: float, state: dict[str, Any]) -> None:
    """Save the checkpoint of `step`, reached after `seconds` of the budget; keep the newest `KEPT`.

    Raises Interrupted if it cannot be written.
    """
    target = folder / f"step-{step:06d}"
    building = folder / f".step-{step:06d}.tmp"
    try:
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        # We open the file, because torch leaves its own open after a failure and the disk stays full.
        with (building / "state.pt").open("wb") as stream:
            torch.save(state, stream)
            stream.flush()
            os.fsync(stream.fileno())
        sha256 = file_sha256(building / "state.pt")
        write_json(building / "checkpoint.json", {"step": step, "seconds": seconds, "sha256": sha256})
        shutil.rmtree(target, ignore_errors=True)
        building.rename(target)
    except (OSError, RuntimeError) as error:  # torch's error for a full disk
        shutil.rmtree(building, ignore_errors=True)
        free = shutil.disk_usage(folder).free // 2**20
        raise Interrupted(
            f"the checkpoint of step {step} could not be saved in {folder} ({free} MiB free: "
            f"{str(error).partition(chr(10))[0]}); make room and start again, "
            "training resumes from the previous checkpoint"
        ) from error
    for old in sorted(folder.glob("step-*"))[:-KEPT]:
        shutil.rmtree(old)


def load_checkpoint(folder: Path, budget: float) -> tuple[dict[str, Any] | None, list[str]]:
    """Return the newest complete checkpoint within the budget (None without one), and why newer ones were
    skipped. Tensors are on the CPU: a GPU may have no memory for a second copy."""
    skipped: list[str] = []
    for path in sorted(folder.glob("step-*"), reverse=True):
        seconds = _seconds(path)
        if seconds is not None and seconds <= budget:
            return torch.load(path / "state.pt", map_location="cpu", weights_only=True), skipped
        skipped.append(f"{path.name} is {'torn' if seconds is None else 'over the budget'}")
    return None, skipped


def _seconds(path: Path) -> float | None:
    """Return the seconds of the budget used when it was saved; None if the checkpoint is torn."""
    try:
        manifest = json.loads((path / "checkpoint.json").read_text(encoding="utf-8"))
        return float(manifest["seconds"]) if manifest["sha256"] == file_sha256(path / "state.pt") else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
