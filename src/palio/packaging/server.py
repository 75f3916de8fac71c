"""Packaging of an entry with a server of its own: the team's files, frozen, and what was trained for it.

package/server.json           the entry's server section
package/files/                a copy of the team's folder
package/image.tar or .sif     the image, if any
package/adapter/ or model/    what a `recipe` or `command` trained, as it was handed in
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from palio.config import ServerProgram
from palio.files import link_or_copy
from palio.layout import BaseModelFolder, EntryFolder
from palio.packaging.image import built_image
from palio.packaging.step import package_of, trained_adapter
from palio.provenance import write_json
from palio.records import BaseModelManifest, PackageManifest
from palio.sandbox.handed_in import take_files
from palio.sandbox.image import check_image, fetch_image
from palio.sandbox.server import FILES, IMAGES, PROGRAM
from palio.settings import PackageSettings

NOT_A_MODEL = ("dtype", "parameters", "max_logit_difference")
SERVER_BYTES = 200 << 30
"""The most that a server's files have, and its image."""


def package_server(
    program: ServerProgram, folder: EntryFolder, settings: PackageSettings, base_model: BaseModelFolder
) -> PackageManifest:
    """Make package/ and package.json in the entry's folder.

    Raises:
        BadInput, RuleViolation: files are refused.
        Crashed: the adapter is not the one that was trained.
    """
    trained = trained_adapter(folder) if settings.adapter else None

    def fill(building: Path, base: BaseModelManifest) -> dict[str, Any]:
        roots = settings.team_folders
        if program.files is not None:
            take_files(program.files, "server.files", building / FILES, roots=roots, limit=SERVER_BYTES)
        if program.brings_image:
            _take_image(program, folder, building, roots)
        write_json(building / PROGRAM, program.model_dump(mode="json", exclude_none=True))
        if trained is not None:
            kind = "model" if trained.recipe["method"] == "full" else "adapter"
            shutil.copytree(folder.adapter, building / kind, copy_function=link_or_copy)
            for path in (building / kind).rglob("*"):  # the server runs as another user
                path.chmod(path.stat().st_mode | (0o555 if path.is_dir() else 0o444))
        made = trained.fingerprint if trained else None
        return {"kind": "server", "adapter_fingerprint": made, **dict.fromkeys(NOT_A_MODEL)}

    return package_of(folder, settings, base_model, fill)


def _take_image(program: ServerProgram, folder: EntryFolder, building: Path, roots: Sequence[str]) -> None:
    """Bring the image into the package: built here, handed in as a file, or fetched from a registry."""
    archive, sif = (building / name for name in IMAGES)
    image = program.image
    if image is None:
        link_or_copy(built_image(folder), archive)
    elif image.startswith("docker://"):
        fetch_image(image, sif)
    else:
        target = sif if image.endswith(sif.suffix) else archive
        take_files(image, "server.image", target, roots=roots, limit=SERVER_BYTES)
    if archive.exists():
        check_image(archive, program.run, program.port)
