"""The one GPU of a team's program, seen from outside through NVML: no memory of it is taken for looking."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pynvml

from palio.config import Track
from palio.errors import BadInput


def _visible() -> str:
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0")


def check_gpu(track: Track) -> None:
    """A track with a GPU finds one, and one only."""
    if track.gpu_memory_gb is None:
        return
    if not device_files():
        fix = "no NVIDIA GPU is visible; run on a node with one"
        raise BadInput("track", "gpu_memory_gb", track.gpu_memory_gb, fix)
    if "," in _visible():
        fix = "names several GPUs and the rules allow one; set it to one"
        raise BadInput("environment", "CUDA_VISIBLE_DEVICES", _visible(), fix)


def device_files() -> list[str]:
    """Of the one GPU; of all, if CUDA_VISIBLE_DEVICES does not name it by its number."""
    numbers = [_visible()] if _visible().isdigit() else [str(number) for number in range(16)]
    cards = [f"/dev/nvidia{number}" for number in numbers if Path(f"/dev/nvidia{number}").exists()]
    shared = ("/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools")
    return [*cards, *(path for path in shared if Path(path).exists())] if cards else []


def visible_inside() -> str:
    """CUDA_VISIBLE_DEVICES in the room: with one device file only, the GPU is the first."""
    return "0" if _visible().isdigit() else _visible()


def memory_used() -> int:
    """Bytes in use on the GPU, which is the program's alone."""
    return int(pynvml.nvmlDeviceGetMemoryInfo(_handle()).used)


def hardware(track: Track) -> dict[str, str]:
    """What trains: for the ledger and the run's sidecar, never for a record."""
    if track.gpu_memory_gb is None:
        return {"device": "cpu"}
    gpu = _handle()
    return {
        "device": str(pynvml.nvmlDeviceGetName(gpu)),
        "gpu_uuid": str(pynvml.nvmlDeviceGetUUID(gpu)),
        "driver": str(pynvml.nvmlSystemGetDriverVersion()),
    }


def energy_meter(track: Track) -> Callable[[], float] | None:
    """Reads the joules the GPU has drawn since its driver was loaded; None where NVML cannot tell."""
    if track.gpu_memory_gb is None:
        return None
    gpu = _handle()
    try:  # not before Volta, nor on a MIG slice
        last = float(pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu))
    except pynvml.NVMLError:
        return None

    def joules() -> float:
        nonlocal last
        with suppress(pynvml.NVMLError):  # a reading that fails must not stop the ledger
            last = float(pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu))
        return last / 1000  # it counts millijoules

    return joules


def _handle() -> Any:
    pynvml.nvmlInit()
    visible = _visible()
    if visible.isdigit():
        return pynvml.nvmlDeviceGetHandleByIndex(int(visible))
    return pynvml.nvmlDeviceGetHandleByUUID(visible)
