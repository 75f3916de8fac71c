"""Check, before pip starts, that this machine can hold the environment: python3 envs/preflight.py .venv cuda

It is run by the Python that will own the environment, which may be too old for it: standard library only, and
no syntax newer than Python 3.7.
"""

from __future__ import annotations

import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

OLDEST, NEWEST = (3, 11), (3, 13)  # fasttext-predict has no wheel for 3.14
DOWNLOAD_GB = {"cuda": 3.6, "cpu": 0.8}  # by the torch that is installed
INSTALLED_GB = {"cuda": 7.8, "cpu": 3.0}


def problem(version: tuple[int, int], has_ensurepip: bool, free_gb: float, torch: str) -> str | None:
    """Return what keeps the environment from being installed, and the fix, on one line."""
    python = "Python {}.{}".format(*version)
    if not OLDEST <= version <= NEWEST:
        supported = "{}.{} to {}.{}".format(*OLDEST, *NEWEST)
        return f"{python}: envs/lock.txt is for Python {supported}; run make env PYTHON=python3.11"
    if not has_ensurepip:
        return f"{python} cannot create a virtual environment; run apt-get install python{python[7:]}-venv"
    needed_gb = DOWNLOAD_GB[torch] + INSTALLED_GB[torch]
    if free_gb < needed_gb:
        return (
            f"{free_gb:.1f} GB of disk free, {needed_gb:.1f} GB needed ({INSTALLED_GB[torch]} GB to keep, "
            f"{DOWNLOAD_GB[torch]} GB of downloads meanwhile); free some, or clone onto a larger disk"
        )
    return None


def main() -> None:
    folder, torch = Path(sys.argv[1]).resolve(), sys.argv[2]
    free_gb = shutil.disk_usage(folder.parent).free / 1e9
    fault = problem(sys.version_info[:2], find_spec("ensurepip") is not None, free_gb, torch)
    if fault:
        sys.exit(f"error: {folder}: {fault}")
    print(f"Installing into {folder}: {DOWNLOAD_GB[torch]} GB to download, {INSTALLED_GB[torch]} GB on disk")


if __name__ == "__main__":
    main()
