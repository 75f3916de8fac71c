"""A container image as a folder, which the room shows in place of the organizer's system.

apptainer reads and unpacks it; what runs is confined by bubblewrap, as every team's program.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from palio.errors import PalioError
from palio.provenance import file_sha256, fingerprint


def image_folder(image: str | None, work: Path) -> Path | None:
    """The unpacked image below `work`, made once. None without an image."""
    if image is None:
        return None
    identity = image if image.startswith("docker://") else file_sha256(Path(image))
    folder = work / "images" / fingerprint(identity)[:16]
    if not folder.is_dir():
        building = folder.with_suffix(".tmp")
        shutil.rmtree(building, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        _apptainer("build", "--sandbox", str(building), image)
        building.rename(folder)
    return folder


def fetch_image(image: str, target: Path) -> None:
    """Pull an image from a registry, as one `.sif` file."""
    _apptainer("pull", str(target), image)


def _apptainer(*arguments: str) -> None:
    try:
        done = subprocess.run(
            ["apptainer", *arguments],
            env=os.environ | {"APPTAINER_BINDPATH": ""},
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        raise PalioError(
            "images need apptainer, which is not installed here; install it, or hand in files alone"
        ) from None
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise PalioError(f"apptainer {arguments[0]} {arguments[-1]} failed: {lines[-1]}")
