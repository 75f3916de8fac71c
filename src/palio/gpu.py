"""The one GPU of a training, read through NVML: looking at it takes none of its memory."""

from __future__ import annotations

from typing import Any

import pynvml

from palio.config import Track
from palio.errors import BadInput


class Gpu:
    """A GPU by its number or its UUID. Raises pynvml.NVMLError if there is no such GPU or no NVML."""

    def __init__(self, address: str) -> None:
        pynvml.nvmlInit()
        by_number = address.isdigit()
        self._handle: Any = (
            pynvml.nvmlDeviceGetHandleByIndex(int(address))
            if by_number
            else pynvml.nvmlDeviceGetHandleByUUID(address)
        )

    def facts(self) -> dict[str, str]:
        """Return the values of `TrainingFacts` that name the GPU."""
        return {
            "device": str(pynvml.nvmlDeviceGetName(self._handle)),
            "gpu_uuid": str(pynvml.nvmlDeviceGetUUID(self._handle)),
            "driver": str(pynvml.nvmlSystemGetDriverVersion()),
        }

    def joules(self) -> float | None:
        """Return the energy drawn since the driver was loaded; None before Volta and on a MIG slice."""
        try:
            return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1000  # millijoules
        except pynvml.NVMLError:
            return None

    def memory(self) -> int:
        """Return the bytes that it has."""
        return int(pynvml.nvmlDeviceGetMemoryInfo(self._handle).total)

    def memory_used(self) -> int:
        """Return the bytes in use, by all processes."""
        return int(pynvml.nvmlDeviceGetMemoryInfo(self._handle).used)


def require_one_gpu(track: Track, count: int, visible: str | None) -> None:
    """Raise BadInput unless exactly one of `count` GPUs is visible on a track with a GPU."""
    if count == 0:
        why, fix = "no CUDA GPU is visible", "run on a node with one"
        raise BadInput("track", "gpu_memory_gb", track.gpu_memory_gb, why=why, fix=fix)
    if count > 1:
        why, fix = f"{count} GPUs are visible and the rules allow one", "set it to one GPU"
        raise BadInput("environment", "CUDA_VISIBLE_DEVICES", visible, why=why, fix=fix)
