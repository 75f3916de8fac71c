"""What a competition finds on this machine: the GPU, disk, models of the hub, the stages' data.

What is only not here yet is no fault: a login node has no GPU, a compute node no network.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pynvml

from palio.base_model import require_on_hub
from palio.config import Competition, Entry, Track
from palio.entries import Entries
from palio.errors import BadInput
from palio.gpu import Gpu
from palio.layout import STAGES, Resources, Results
from palio.sandbox.doctor import Finding
from palio.sandbox.gpu import device_files

SPARE_GB = 20.0
"""Free disk that any competition needs: logs, HELM's files, checkpoints of one small training."""

AT_ONCE = 8
"""Base models that the hub is asked about at the same time."""


@dataclass(frozen=True)
class SeenGpu:
    """A GPU as its driver and torch show it."""

    name: str
    memory_gb: float
    cuda_of_driver: str
    """The newest CUDA that the driver runs, as `13.0`."""
    cuda_of_torch: str
    fault: str = ""
    """What torch said when it put a tensor on it."""


def machine_findings(competition: Competition, file: str | Path) -> Iterator[Finding]:
    """Yield what this machine has for the competition that `file` describes, the cheap first."""
    yield from gpu_findings(competition.tracks)
    yield from disk_findings(Results().path, competition.store.path)
    yield from data_findings(competition)
    yield from model_findings(Entries(competition, file))


# --- the GPU ---------------------------------------------------------------------------------------------


def gpu_findings(tracks: Mapping[str, Track]) -> Iterator[Finding]:
    """Check that the GPU of this machine, if it has one, serves the tracks that train on one."""
    needed = {name: track.gpu_memory_gb for name, track in tracks.items() if track.gpu_memory_gb is not None}
    if not needed:
        return
    import torch

    names = ", ".join(needed)
    if torch.version.cuda is None:
        what = f"torch {torch.__version__} is for CPUs alone, and a GPU trains on {names}"
        yield Finding(False, what, "rm -r .venv; make env TORCH=cuda")
    elif not device_files():
        what = f"no GPU on this machine; the nodes that train on {names} need one, see --slurm"
        yield Finding(True, what)
    else:
        try:
            yield from judged(look(torch.version.cuda), needed)
        except pynvml.NVMLError as error:
            what = f"a GPU is here, and its driver does not answer ({error})"
            yield Finding(False, what, "make nvidia-smi work first")


def look(cuda_of_torch: str) -> SeenGpu:
    """Raises pynvml.NVMLError if there is no GPU or no driver."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    gpu = Gpu(visible)
    driver = pynvml.nvmlSystemGetCudaDriverVersion_v2()
    try:
        torch.ones(1, device="cuda").add_(1).item()
        fault = ""
    except (RuntimeError, AssertionError) as error:
        fault = str(error).partition("\n")[0]
    return SeenGpu(
        gpu.facts()["device"],
        gpu.memory() / 1e9,
        f"{driver // 1000}.{driver % 1000 // 10}",
        cuda_of_torch,
        fault,
    )


def judged(gpu: SeenGpu, needed: Mapping[str, float]) -> Iterator[Finding]:
    """Compare a GPU with the memory in GB that tracks need, by track."""
    versions = f"its driver runs CUDA {gpu.cuda_of_driver}, torch is for {gpu.cuda_of_torch}"
    old = int(gpu.cuda_of_driver.partition(".")[0]) < int(gpu.cuda_of_torch.partition(".")[0])
    if old or gpu.fault:
        fix = (
            "install a newer NVIDIA driver" if old else "make a program of PyTorch's tutorial run on it first"
        )
        yield Finding(False, f"{gpu.name}: {versions}{gpu.fault and f'; torch said: {gpu.fault}'}", fix)
        return
    yield Finding(True, f"{gpu.name}: {versions}; tried with a tensor")
    for name, memory in needed.items():
        small = gpu.memory_gb < memory
        what = f"{name} trains in {memory:g} GB, this GPU has {gpu.memory_gb:.1f} GB"
        yield Finding(not small, what, "run the track on another GPU" if small else "")


# --- disk, data and models ---------------------------------------------------------------------------------


def disk_findings(*folders: Path) -> Iterator[Finding]:
    """Check the free space of the disks that folders, which need not exist yet, lie on."""
    seen = set()
    for folder in folders:
        there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        if (device := there.stat().st_dev) in seen:
            continue
        seen.add(device)
        free = shutil.disk_usage(there).free / 1e9
        what = f"{free:.0f} GB free for {folder}"
        fix = f"free some: {SPARE_GB:.0f} GB and, for each entry that is at work, twice its base model"
        yield Finding(free >= SPARE_GB, what, fix)


def data_findings(competition: Competition) -> Iterator[Finding]:
    """Say which stages' questions are here."""
    for stage in STAGES:
        here = Resources().stage_record(stage).is_file()
        missing = (
            f"not here yet; the workflow prepares it from what palio fetch-data --stage {stage} --list names"
        )
        yield Finding(True, f"{stage} stage: {'prepared' if here else missing}")


def model_findings(entries: Entries) -> Iterator[Finding]:
    """Check that every base model is here, or that the hub gives it to this machine."""
    wanted: dict[str, list[str]] = {}
    for name, entry in entries.items():
        source = entry.base_model if isinstance(entry, Entry) else None
        if source and source.hub and not Resources().base_model(source.id).manifest.is_file():
            wanted.setdefault(source.hub, []).append(name)
    if not wanted:
        yield Finding(True, "base models: none is missing that comes from the hub")
        return
    with ThreadPoolExecutor(AT_ONCE) as pool:  # without a network each waits for its time-out
        yield from pool.map(_model_finding, *zip(*sorted(wanted.items()), strict=True))


def _model_finding(address: str, names: list[str]) -> Finding:
    try:
        require_on_hub(address)
        return Finding(True, f"base model {address}: the hub gives it")
    except BadInput as error:
        some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        return Finding(False, f"base model {address} of {some}: {error.why}", error.fix)
