"""Checkpoints: complete or absent. A torn one is skipped, the one before it is used.

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
"""The newest, and the one before in case the newest is torn."""


def save_checkpoint(folder: Path, step: int, seconds: float, state: dict[str, Any]) -> None:
    """Write `state` as the checkpoint of `step`, reached after `seconds` of the budget, and drop all but
    the newest `KEPT`."""
    target = folder / f"step-{step:06d}"
    building = folder / f".step-{step:06d}.tmp"
    try:
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        # An open file of our own: torch's stays open after a failure and would keep the disk full.
        with (building / "state.pt").open("wb") as stream:
            torch.save(state, stream)
            stream.flush()
            os.fsync(stream.fileno())
        sha256 = file_sha256(building / "state.pt")
        write_json(building / "checkpoint.json", {"step": step, "seconds": seconds, "sha256": sha256})
        shutil.rmtree(target, ignore_errors=True)
        building.rename(target)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        shutil.rmtree(building, ignore_errors=True)
        free = shutil.disk_usage(folder).free // 2**20
        raise Interrupted(
            f"the checkpoint of step {step} could not be saved in {folder} ({free} MiB free: "
            f"{str(error).partition(chr(10))[0]}); make room and start again, "
            "training goes on from the checkpoint before"
        ) from error
    for old in sorted(folder.glob("step-*"))[:-KEPT]:
        shutil.rmtree(old)


def load_checkpoint(folder: Path, budget: float) -> tuple[dict[str, Any] | None, list[str]]:
    """State of the newest checkpoint that is complete and inside the budget, None without one; and which
    newer ones were skipped, and why. Its tensors are on the CPU: a GPU may have no room for a second copy."""
    skipped: list[str] = []
    for path in sorted(folder.glob("step-*"), reverse=True):
        seconds = _seconds(path)
        if seconds is not None and seconds <= budget:
            return torch.load(path / "state.pt", map_location="cpu", weights_only=True), skipped
        skipped.append(f"{path.name} is {'torn' if seconds is None else 'over the budget'}")
    return None, skipped


def _seconds(path: Path) -> float | None:
    """Seconds of the budget at which the checkpoint was saved; None if it is torn."""
    try:
        manifest = json.loads((path / "checkpoint.json").read_text(encoding="utf-8"))
        return float(manifest["seconds"]) if manifest["sha256"] == file_sha256(path / "state.pt") else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
