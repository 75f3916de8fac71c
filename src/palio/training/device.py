"""The one device that trains: chosen, capped at the track's memory, named, its energy metered."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pynvml
import torch

from palio.config import Track
from palio.errors import BadInput


def training_device(track: Track) -> torch.device:
    """The one GPU, capped at the track's memory; on a track without a GPU the CPU, whatever the node has.

    Raises BadInput where a track with a GPU finds none or more than one.
    """
    if track.gpu_memory_gb is None:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        fix = "no CUDA GPU is visible; run on a node with one"
        raise BadInput("track", "gpu_memory_gb", track.gpu_memory_gb, fix)
    if torch.cuda.device_count() > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        fix = f"{torch.cuda.device_count()} GPUs are visible and the rules allow one; set it to one GPU"
        raise BadInput("environment", "CUDA_VISIBLE_DEVICES", visible, fix)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, track.gpu_memory_gb * 1e9 / total))
    return torch.device("cuda")


def hardware(device: torch.device) -> dict[str, str]:
    """What trains: for the ledger and the run's sidecar, never for a record."""
    if device.type != "cuda":
        return {"device": "cpu"}
    facts = {"device": torch.cuda.get_device_name(), "gpu_uuid": _uuid(), "cuda": str(torch.version.cuda)}
    if _nvml() is not None:
        facts["driver"] = str(pynvml.nvmlSystemGetDriverVersion())
    return facts


def energy_meter(device: torch.device) -> Callable[[], float | None]:
    """Reads the joules the GPU has drawn since its driver was loaded: None before Volta, on a MIG slice
    and on a CPU."""
    gpu = _nvml() if device.type == "cuda" else None

    def read() -> float | None:
        if gpu is None:
            return None
        try:
            return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu)) / 1000  # it counts millijoules
        except pynvml.NVMLError:
            return None

    return read


def _uuid() -> str:
    return f"GPU-{torch.cuda.get_device_properties(0).uuid}"


def _nvml() -> Any | None:
    """NVML's handle of the GPU that torch uses: their numbers may differ, the uuid does not."""
    try:
        pynvml.nvmlInit()
        return pynvml.nvmlDeviceGetHandleByUUID(_uuid())
    except pynvml.NVMLError:
        return None
