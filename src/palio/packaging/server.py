"""Packaging of a server entry: the team's files, frozen.

package/server.json   the entry's server section
package/files/        a copy of the team's folder
package/image.sif     the image, if any
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from palio.config import ServerProgram
from palio.layout import BaseModelFolder, EntryFolder
from palio.packaging.step import package_of
from palio.provenance import write_json
from palio.records import BaseModelManifest, PackageManifest
from palio.sandbox.handed_in import take_files
from palio.sandbox.image import fetch_image
from palio.sandbox.server import FILES, IMAGE, PROGRAM
from palio.settings import PackageSettings

NOT_A_MODEL = ("adapter_fingerprint", "dtype", "parameters", "max_logit_difference")
SERVER_BYTES = 200 << 30
"""The most that a server's files have, and its image."""


def package_server(
    program: ServerProgram, folder: EntryFolder, settings: PackageSettings, base_model: BaseModelFolder
) -> PackageManifest:
    """Make package/ and package.json in the entry's folder. Raises BadInput for files that are refused."""

    def fill(building: Path, base: BaseModelManifest) -> dict[str, Any]:
        roots = settings.team_folders
        if program.files is not None:
            take_files(program.files, "server.files", building / FILES, roots=roots, limit=SERVER_BYTES)
        if program.image is not None and not program.image.startswith("docker://"):
            take_files(program.image, "server.image", building / IMAGE, roots=roots, limit=SERVER_BYTES)
        elif program.image is not None:
            fetch_image(program.image, building / IMAGE)
        write_json(building / PROGRAM, program.model_dump(mode="json", exclude_none=True))
        return {"kind": "server", **dict.fromkeys(NOT_A_MODEL)}

    return package_of(folder, settings, base_model, fill)
