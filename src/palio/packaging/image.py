"""The step `image`: a team's Dockerfile, built on the organizer's side.

image.tar                     the image, an OCI archive
image.json                    ImageManifest
work/builds/<key>/            one build, named by the content of the folder: image.tar, build.log
"""

from __future__ import annotations

import shutil
from pathlib import Path
from subprocess import run

from palio.config import DOCKERFILES, Isolation
from palio.errors import BadInput, Crashed, Interrupted, OutOfMemory, PalioError, TimeLimit
from palio.files import link_or_copy
from palio.incoming import Incoming
from palio.layout import BuildFolder, EntryFolder
from palio.provenance import file_sha256, fingerprint, folder_sha256
from palio.records import ImageManifest, RunFacts, read_record, timed_run
from palio.sandbox.build import BUILD, Building, clear
from palio.sandbox.build_log import MEMORY, lost_network, reason
from palio.sandbox.handed_in import take_files
from palio.sandbox.image import check_image
from palio.sandbox.room import GIB, Limits, Room
from palio.settings import ImageSettings
from palio.text import duration

STORAGE_FILES = 4_000_000
"""Files and folders of a build: every layer of its base image, and its own."""


def build_image(folder: EntryFolder, settings: ImageSettings, threads: int | None = None) -> ImageManifest:
    """Make image.tar and image.json in the entry's folder. What was built of the same folder is used again.

    Raises:
        BadInput, RuleViolation: the folder has no Dockerfile, or is refused.
        Crashed, TimeLimit, OutOfMemory: it cannot be built, and why.
        Interrupted: this machine cannot build it now.
    """
    with timed_run(folder.run_facts("image"), RunFacts()):
        folder.image_manifest.unlink(missing_ok=True)
        taken = folder.unfinished("context")
        limit = int(settings.isolation.image_gb * GIB)
        roots = settings.team_folders
        take_files(settings.dockerfile, "server.dockerfile", taken, roots=roots, limit=limit)
        if not any((taken / name).is_file() for name in DOCKERFILES):
            why, fix = "has no Dockerfile", "put one there, or correct the path"
            raise BadInput("entry", "server.dockerfile", settings.dockerfile, why=why, fix=fix)
        context = fingerprint(folder_sha256(taken))
        work = folder.build(fingerprint([context, settings.network])[:16])
        if not work.archive.exists():
            _place_context(taken, work)
            _build(work, settings, threads)
        folder.image.unlink(missing_ok=True)
        link_or_copy(work.archive, folder.image)
        manifest = ImageManifest(
            competition=settings.competition_id,
            track=folder.track_id,
            entry=folder.entry_id,
            context_sha256=context,
            digest=check_image(folder.image, "checked with the package", None),
            archive_sha256=file_sha256(folder.image),
            builder=_builder(),
            network=settings.network,
        )
        manifest.write(folder.image_manifest)
    return manifest


def built_image(folder: EntryFolder) -> Path:
    """Return the image of the entry. Raises Crashed if it is another one than its record's."""
    built = read_record(ImageManifest, folder.image_manifest)
    if file_sha256(folder.image) != built.archive_sha256:
        raise Crashed(f"{folder.image} differs from image.json; run image again")
    return folder.image


def _place_context(taken: Path, work: BuildFolder) -> None:
    shutil.rmtree(work.context, ignore_errors=True)
    work.path.mkdir(parents=True, exist_ok=True)
    taken.rename(work.context)


def _build(work: BuildFolder, settings: ImageSettings, threads: int | None) -> None:
    room = _room(work, settings, threads)
    clear(room, work.log)
    work.output.mkdir()
    log_start = work.log.stat().st_size if work.log.exists() else 0
    seconds = settings.isolation.build_time
    try:
        with Building(BUILD, room, work.log) as building:
            code = building.wait(seconds)
        if building.broken is not None:
            raise type(building.broken)(f"the image could not be built (over a limit): {building.broken}")
        if code is None:
            raise TimeLimit(f"the image could not be built (timeout): it took more than {duration(seconds)}")
        if code != 0:
            with work.log.open("rb") as stream:
                stream.seek(log_start)
                raise _failure(stream.read().decode("utf-8", "replace"), settings.network)
        Incoming(work.output, work.built.name).size()  # refuses a link
        work.built.replace(work.archive)
        work.archive.chmod(0o644)
    except PalioError as error:
        error.log = work.log
        raise
    finally:
        clear(room, work.log)
        shutil.rmtree(work.context, ignore_errors=True)


def _failure(log: str, network: bool) -> PalioError:
    if network and lost_network(log):
        return Interrupted(
            f"the network was lost while the image was built: {reason(log, network=True).said}"
        )
    why = reason(log, network=network)
    return OutOfMemory(str(why)) if why.kind.name == MEMORY else Crashed(str(why))


def _room(work: BuildFolder, settings: ImageSettings, threads: int | None) -> Room:
    limits = limits_of_build(settings.isolation, threads)
    return Room(limits, files=work.context, output=work.output, network=settings.network)


def limits_of_build(isolation: Isolation, threads: int | None) -> Limits:
    return Limits(
        memory=int(isolation.build_ram_gb * GIB),
        processes=isolation.processes,
        scratch=int(isolation.scratch_gb * GIB),
        output=int(isolation.image_gb * GIB),
        cpus=threads or 1,
        files=STORAGE_FILES,
    )


def _builder() -> str:
    said = run(["buildah", "--version"], capture_output=True, text=True, check=False).stdout
    return " ".join(said.split()[:3]).replace(" version", "")
