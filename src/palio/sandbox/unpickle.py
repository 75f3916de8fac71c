"""Run in a sandbox by `palio.sandbox.pickled`, on its own: it imports nothing of Palio.

    python unpickle.py OUT WEIGHTS...

Write the tensors of pickled weight files as safetensors, in parts of about PART bytes, so that the memory it
takes does not grow with the model. Names, shapes, dtypes and values stay. Tensors of whole numbers and
booleans are left out: they are masks and counters that old versions of transformers saved, never weights.
"""

from __future__ import annotations

import re
import sys
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save_file

PART = 1 << 30
"""Bytes."""


def read(file: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a file, mapped rather than read where its format allows.

    Exits with a line if it holds anything else.
    """
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # of an untrusted file
        asked = re.search(r"GLOBAL (\S+)", str(error))
        cause = str(error).strip().partition("\n")[0] or type(error).__name__
        sys.exit(f"{file.name} asks for {asked[1]}, which is no tensor" if asked else f"{file.name}: {cause}")
    tensors = isinstance(state, dict) and all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    )
    if not tensors:
        sys.exit(f"{file.name} holds more than named tensors")
    return {name: value.detach() for name, value in state.items() if value.is_floating_point()}


def write(tensors: dict[str, torch.Tensor], out: Path, number: int) -> None:
    """Write the tensors of a model's file `number`; each gets memory of its own, tied ones too."""
    part: dict[str, torch.Tensor] = {}
    count = size = 0
    for name, tensor in tensors.items():
        part[name] = tensor.clone(memory_format=torch.contiguous_format)
        size += tensor.nbytes
        if size >= PART or len(part) + count == len(tensors):
            save_file(part, out / f"model-{number:05}-{count:05}.safetensors", metadata={"format": "pt"})
            count, size, part = count + len(part), 0, {}


if __name__ == "__main__":
    for number, name in enumerate(sys.argv[2:], start=1):
        write(read(Path(name)), Path(sys.argv[1]), number)
