"""The GPU driver's libraries for an image, which has everything but them: they belong to the kernel's module.

They lie among the system's libraries, whose folder would hide the image's own libc. So each is shown as a
single file in a folder of the room's, which is searched first and holds nothing else. The list is that of
computing in NVIDIA's container toolkit (`libnvidia-container`, nvc_info.c) and apptainer (nvliblist.conf),
which do the same.
"""

from __future__ import annotations

import platform
import re
import subprocess
from pathlib import Path

from palio.errors import Interrupted

PLACE = "/.palio/gpu"
"""In the room."""
LIBRARIES = (
    "libcuda.so",
    "libcudadebugger.so",
    "libnvidia-allocator.so",
    "libnvidia-cfg.so",
    "libnvidia-compiler.so",
    "libnvidia-fatbinaryloader.so",
    "libnvidia-gpucomp.so",
    "libnvidia-ml.so",
    "libnvidia-nvvm.so",
    "libnvidia-nvvm70.so",
    "libnvidia-opencl.so",
    "libnvidia-ptxjitcompiler.so",
)
NEEDED = "libcuda.so.1"
"""What every CUDA program loads."""
_ABI = {"x86_64": "x86-64", "aarch64": "AArch64"}
_LISTED = re.compile(r"^\s*(\S+) \(([^)]*)\) => (/.+)$")
SYSTEM_LDCONFIG = "/sbin/ldconfig"


def libraries_in(listed: str, machine: str) -> dict[str, Path]:
    """Return file by name of those libraries that the loader's cache has, as `ldconfig -p` lists it: of each
    name the first for this machine."""
    found: dict[str, Path] = {}
    for line in listed.splitlines():
        match = _LISTED.match(line)
        if match and _ABI.get(machine, "") in match[2].split(","):
            name, path = match[1], Path(match[3])
            if name.partition(".so")[0] + ".so" in LIBRARIES:
                found.setdefault(name, path)
    return found


def driver_libraries() -> dict[str, Path]:
    """Return place in the room -> file of the host. Raises Interrupted without a driver."""
    done = subprocess.run([SYSTEM_LDCONFIG, "-p"], capture_output=True, text=True, check=False)
    found = libraries_in(done.stdout, platform.machine())
    if NEEDED not in found:
        raise Interrupted(f"this machine has no {NEEDED}, which an image needs on a GPU; install the driver")
    return {f"{PLACE}/{name}": path.resolve() for name, path in sorted(found.items())}


def search_path(of_image: str | None) -> str:
    """Return LD_LIBRARY_PATH: the driver's libraries, then those that the image asks for."""
    return f"{PLACE}:{of_image}" if of_image else PLACE
