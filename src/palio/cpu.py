"""What this machine's CPU computes in."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from palio.errors import BadInput

CPU_INFO = Path("/proc/cpuinfo")
BF16 = {"avx512_bf16", "amx_bf16", "bf16"}
"""Flags of CPUs that multiply in bfloat16: x86 with AVX512-BF16 or AMX, and ARM."""

CpuDtype = Literal["float32", "bfloat16"]


def multiplies_bf16() -> bool:
    """Return whether the CPU has instructions for products in bfloat16, which is slow without them."""
    return not BF16.isdisjoint(CPU_INFO.read_text(encoding="utf-8").split())


def check_cpu_dtype(dtype: str, where: str = "--cpu-dtype", key: str = "") -> None:
    """Raises BadInput if this CPU does not compute in a dtype; the error names `where` and `key`."""
    if dtype == "bfloat16" and not multiplies_bf16():
        raise BadInput(
            where,
            key,
            dtype,
            why="this machine's CPU has neither AVX512-BF16 nor AMX",
            fix="use float32, or another machine",
        )
