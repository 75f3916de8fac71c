"""The one GPU of a team's program, as the sandbox sees and passes it."""

from __future__ import annotations

import os
from pathlib import Path

from palio.config import Track
from palio.gpu import Gpu, require_one_gpu


def _visible() -> str:
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0")


def track_gpu(track: Track) -> Gpu | None:
    """Return the GPU of a track with a GPU. Raises BadInput unless exactly one is visible."""
    if track.gpu_memory_gb is None:
        return None
    require_one_gpu(track, len(_visible().split(",")) if device_files() else 0, _visible())
    return program_gpu()


def program_gpu() -> Gpu:
    """Return the visible GPU, which is the program's alone."""
    return Gpu(_visible())


def device_files() -> list[str]:
    """Return the device files of the one GPU; of all, if CUDA_VISIBLE_DEVICES does not name it by number."""
    numbers = [_visible()] if _visible().isdigit() else [str(number) for number in range(16)]
    cards = [f"/dev/nvidia{number}" for number in numbers if Path(f"/dev/nvidia{number}").exists()]
    shared = ("/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools")
    return [*cards, *(path for path in shared if Path(path).exists())] if cards else []


def visible_inside() -> str:
    """Return CUDA_VISIBLE_DEVICES for the sandbox: with a single device file, the GPU is number 0."""
    return "0" if _visible().isdigit() else _visible()
