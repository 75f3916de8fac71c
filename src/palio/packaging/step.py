"""The packaging step, shared by models and servers: package/, then package.json, then package.run.json."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from palio.errors import Crashed
from palio.layout import BaseModelFolder, EntryFolder
from palio.provenance import folder_sha256
from palio.records import (
    AdapterManifest,
    BaseModelManifest,
    PackageManifest,
    RunFacts,
    read_record,
    timed_run,
)
from palio.settings import PackageSettings


def trained_adapter(folder: EntryFolder) -> AdapterManifest:
    """Return the record of the entry's adapter. Raises Crashed if the adapter is another one."""
    trained = read_record(AdapterManifest, folder.adapter_manifest)
    if folder_sha256(folder.adapter) != trained.files:
        raise Crashed(f"{folder.adapter} differs from adapter.json; run finetune again")
    return trained


def package_of(
    folder: EntryFolder,
    settings: PackageSettings,
    base_model: BaseModelFolder,
    fill: Callable[[Path, BaseModelManifest], dict[str, Any]],
) -> PackageManifest:
    """Make package/ and package.json in the entry's folder, replacing an earlier package at the end.

    `fill` writes the files into the empty folder that it is given, and returns the manifest's other fields.
    """
    base = read_record(BaseModelManifest, base_model.manifest)
    building = folder.unfinished("package")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    folder.package_manifest.unlink(missing_ok=True)
    with timed_run(folder.run_facts("package"), RunFacts()):
        fields = fill(building, base)
        shutil.rmtree(folder.package, ignore_errors=True)
        building.rename(folder.package)
        manifest = PackageManifest(
            competition=settings.competition_id,
            track=folder.track_id,
            entry=folder.entry_id,
            base_model=base.id,
            base_model_fingerprint=base.fingerprint,
            files=folder_sha256(folder.package),
            **fields,
        )
        manifest.write(folder.package_manifest)
    return manifest
