"""The device that trains: selection, memory cap and name."""

from __future__ import annotations

import os

import pynvml
import torch

from palio.config import Track
from palio.errors import BadInput
from palio.gpu import Gpu, require_one_gpu
from palio.tensors import cap_gpu_memory


def training_device(track: Track) -> torch.device:
    """Return the one GPU, capped at the track's memory, or the CPU on a track without a GPU.

    Raises BadInput if a track with a GPU finds none or more than one, or a torch that is for CPUs alone.
    """
    if track.gpu_memory_gb is None:
        return torch.device("cpu")
    require_cuda()
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    require_one_gpu(track, count, os.environ.get("CUDA_VISIBLE_DEVICES"))
    cap_gpu_memory(track.gpu_memory_gb)
    return torch.device("cuda")


def require_cuda() -> None:
    """Raise BadInput if this torch was installed for CPUs alone (`make env TORCH=cpu`)."""
    if torch.version.cuda is None:
        why = "it was installed for CPUs alone, and the track has a GPU"
        raise BadInput(
            "environment", "torch", torch.__version__, why=why, fix="rm -r .venv; make env TORCH=cuda"
        )


def hardware(device: torch.device, gpu: Gpu | None) -> dict[str, str]:
    """Return the values of `TrainingFacts` that name the hardware."""
    if device.type != "cuda":
        return {"device": "cpu"}
    facts = gpu.facts() if gpu else {}
    name = torch.cuda.get_device_name()  # differs from NVML's on a MIG slice
    return facts | {"device": name, "gpu_uuid": _uuid(), "cuda": str(torch.version.cuda)}


def nvml_gpu(device: torch.device) -> Gpu | None:
    """Return the GPU that torch uses, by its UUID: torch and NVML may number GPUs differently."""
    try:
        return Gpu(_uuid()) if device.type == "cuda" else None
    except pynvml.NVMLError:
        return None


def _uuid() -> str:
    return f"GPU-{torch.cuda.get_device_properties(0).uuid}"
