"""The packaging step of a server entry: what the team hands in, frozen with the hash of every file.

package/server.json   the entry's server section
package/files/        a copy of the team's folder
package/image.sif     the image, if there is one
package.json          PackageManifest, written last
"""

from __future__ import annotations

import shutil

from palio.config import ServerProgram
from palio.layout import BaseModelFolder, EntryFolder
from palio.provenance import folder_sha256, write_json
from palio.records import BaseModelManifest, PackageManifest, RunFacts, read_record, timed_run
from palio.sandbox.handed_in import take_files
from palio.sandbox.image import fetch_image
from palio.sandbox.server import FILES, IMAGE, PROGRAM
from palio.settings import PackageSettings

SERVER_BYTES = 200 << 30
"""The most that a server's files have, and its image."""


def package_server(
    program: ServerProgram, folder: EntryFolder, settings: PackageSettings, base_model: BaseModelFolder
) -> PackageManifest:
    """Leave package/ and package.json in the entry's folder. Raises BadInput for files that are refused."""
    base = read_record(BaseModelManifest, base_model.manifest)
    building = folder.unfinished("package")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    roots = settings.team_folders
    folder.package_manifest.unlink(missing_ok=True)
    with timed_run(folder.run_facts("package"), RunFacts()):
        if program.files is not None:
            take_files(program.files, "server.files", building / FILES, roots=roots, limit=SERVER_BYTES)
        if program.image is not None and not program.image.startswith("docker://"):
            take_files(program.image, "server.image", building / IMAGE, roots=roots, limit=SERVER_BYTES)
        elif program.image is not None:
            fetch_image(program.image, building / IMAGE)
        write_json(building / PROGRAM, program.model_dump(mode="json", exclude_none=True))
        shutil.rmtree(folder.package, ignore_errors=True)
        building.rename(folder.package)
        manifest = PackageManifest(
            kind="server",
            competition=settings.competition_id,
            track=folder.track_id,
            entry=folder.entry_id,
            base_model=base.id,
            base_model_fingerprint=base.fingerprint,
            adapter_fingerprint=None,
            dtype=None,
            parameters=None,
            max_logit_difference=None,
            files=folder_sha256(folder.package),
        )
        manifest.write(folder.package_manifest)
    return manifest
