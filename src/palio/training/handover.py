"""The finished adapter of a training run, brought into the entry's folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from palio.errors import Crashed
from palio.provenance import atomic_path, folder_sha256
from palio.records import AdapterManifest, read_record


def publish(work: Path, entry_dir: Path) -> AdapterManifest:
    """Hard links to (copies of) adapter/, train.parquet and adapter.json of `work`, the manifest last."""
    manifest = read_record(AdapterManifest, work / "adapter.json")
    if folder_sha256(work / "adapter") != manifest.files:
        raise Crashed(f"the finished adapter in {work} was changed; delete that folder to train again")
    building = entry_dir / "work" / "adapter.tmp"
    shutil.rmtree(building, ignore_errors=True)
    shutil.copytree(work / "adapter", building, copy_function=_link)
    (entry_dir / "adapter.json").unlink(missing_ok=True)
    shutil.rmtree(entry_dir / "adapter", ignore_errors=True)
    building.rename(entry_dir / "adapter")
    with atomic_path(entry_dir / "train.parquet") as temporary:
        shutil.copyfile(work / "train.parquet", temporary)
    manifest.write(entry_dir / "adapter.json")
    return manifest


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
