"""Checkpoints: complete or absent. A torn one is skipped, the one before it is used.

checkpoints/step-000050/state.pt       tensors and numbers (loaded with weights_only)
checkpoints/step-000050/manifest.json  sha256 of state.pt, written last
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from palio.errors import Crashed
from palio.provenance import file_sha256, write_json

KEPT = 2
"""The newest, and the one before in case the newest is torn."""


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Write `state` as the checkpoint of `step` and drop all but the newest `KEPT`."""
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
        write_json(building / "manifest.json", {"step": step, "sha256": file_sha256(building / "state.pt")})
        shutil.rmtree(target, ignore_errors=True)
        building.rename(target)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        shutil.rmtree(building, ignore_errors=True)
        free = shutil.disk_usage(folder).free // 2**20
        raise Crashed(
            f"the checkpoint of step {step} could not be saved in {folder} ({free} MiB free: "
            f"{str(error).partition(chr(10))[0]}); make room and start again, "
            "training goes on from the checkpoint before"
        ) from error
    for old in sorted(folder.glob("step-*"))[:-KEPT]:
        shutil.rmtree(old)


def load_checkpoint(folder: Path, device: torch.device) -> tuple[dict[str, Any] | None, list[str]]:
    """State of the newest complete checkpoint, None without one; and the names of torn ones skipped."""
    torn: list[str] = []
    for path in sorted(folder.glob("step-*"), reverse=True):
        if _complete(path):
            return torch.load(path / "state.pt", map_location=device, weights_only=True), torn
        torn.append(path.name)
    return None, torn


def _complete(path: Path) -> bool:
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        return bool(manifest["sha256"] == file_sha256(path / "state.pt"))
    except (OSError, ValueError, KeyError, TypeError):
        return False
