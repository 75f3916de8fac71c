"""A container image as a folder, which the room shows in place of the organizer's system, and what it says of
its program.

    <work>/images/<identity>/        mode 0700
        root/                        its files (`palio.sandbox.unpack`)
        image.json                   `Image`, written last

Archives (`.tar`) are unpacked here; `docker://` and `.sif` need apptainer, which unpacks them. What runs is
confined by bubblewrap, as every team's program.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from palio.errors import PalioError, RuleViolation
from palio.limits import in_child
from palio.provenance import file_sha256, fingerprint
from palio.records import ImageConfig, Record, read_record
from palio.sandbox.archive import image_archive
from palio.sandbox.unpack import add_what_runtimes_add, inside, open_to_all, unpack

ROOT, FACTS = "root", "image.json"
UNPACK_SECONDS, UNPACK_MEMORY = 7200.0, 16 << 30
"""Of unpacking; memory is what the process may reserve."""
ACCOUNT_BYTES = 1 << 20
"""Of /etc/passwd and /etc/group that are read."""
DEFAULT_PORT = 8080
MAX_ID = (1 << 31) - 1
APPTAINER_RUNS = ".singularity.d/runscript"
"""In an image that apptainer unpacked: starts its ENTRYPOINT and CMD."""


class _Facts(Record):
    """What is known of an unpacked image."""

    config: ImageConfig
    uid: int
    gid: int
    home: str
    left_out: dict[str, int] = {}
    """What was not unpacked, by kind."""


@dataclass(frozen=True)
class Image:
    """An unpacked image, with the numbers that its USER stands for."""

    root: Path
    config: ImageConfig = field(default_factory=ImageConfig)
    uid: int = 0
    gid: int = 0
    home: str = "/root"


def image_folder(image: str | None, work: Path, limit: int) -> Image | None:
    """Return the image unpacked below `work`, which is done once. None without an image.

    Raises:
        RuleViolation: the image is refused, e.g. for more than `limit` bytes.
        PalioError: it needs apptainer, which is not installed.
    """
    if image is None:
        return None
    identity = image if image.startswith("docker://") else file_sha256(Path(image))
    folder = work / "images" / fingerprint(identity)[:16]
    if not folder.is_dir():
        building = folder.with_suffix(".tmp")
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True, mode=0o700)
        in_child(lambda: _unpack(image, building, limit), memory=UNPACK_MEMORY, seconds=UNPACK_SECONDS)
        building.rename(folder)
    facts = read_record(_Facts, folder / FACTS)
    return Image(folder / ROOT, facts.config, facts.uid, facts.gid, facts.home)


def _unpack(image: str, folder: Path, limit: int) -> None:
    root, left_out = folder / ROOT, {}
    if image.startswith("docker://") or image.endswith(".sif"):
        _apptainer("build", "--sandbox", str(root), image)
        open_to_all(root)
        config = ImageConfig(arguments=(f"/{APPTAINER_RUNS}",) if (root / APPTAINER_RUNS).exists() else ())
    else:
        with image_archive(Path(image)) as archive:
            config, left_out = archive.config, dict(unpack(archive, root, limit))
    add_what_runtimes_add(root, config.directory)
    uid, gid, home = account(root, config.user)
    home = config.variables.get("HOME") or home
    _Facts(config=config, uid=uid, gid=gid, home=home, left_out=left_out).write(folder / FACTS)


def account(root: Path, user: str) -> tuple[int, int, str]:
    """Return user id, group id and home of an image's USER, by its own /etc/passwd and /etc/group.

    Raises RuleViolation for a name that is in neither.
    """
    name, _, group = (user or "0").partition(":")
    known = next((line for line in _lines(root, "passwd", 7) if name in (line[0], line[2])), None)
    try:
        uid = int(known[2]) if known else int(name)
        gid = int(known[3]) if known else 0
        if group:
            named = next((line for line in _lines(root, "group", 4) if group in (line[0], line[2])), None)
            gid = int(named[2]) if named else int(group)
        if not (0 <= uid <= MAX_ID and 0 <= gid <= MAX_ID):
            raise ValueError
    except ValueError:
        raise RuleViolation(
            f"USER {user!r:.100} of the image is no user of it", "add it, or correct USER"
        ) from None
    return uid, gid, known[5] if known and known[5].startswith("/") else ("/root" if uid == 0 else "/")


def _lines(root: Path, name: str, fields: int) -> list[list[str]]:
    """The entries of a table in /etc: lines with so many fields."""
    try:
        with inside(root, f"/etc/{name}").open("rb") as stream:
            text = stream.read(ACCOUNT_BYTES).decode("utf-8", "replace").replace("\0", "")
    except OSError:
        return []
    return [line for line in (one.split(":") for one in text.splitlines()) if len(line) == fields]


def check_image(path: Path, run: object, port: int | None) -> str:
    """Return the digest of an image's archive, once it says what is started and where it listens.

    Raises RuleViolation: it is no image, has nothing to start, or several ports.
    """
    with image_archive(path) as archive:
        config = archive.config
        if not run and not config.arguments:
            raise RuleViolation("the image has neither CMD nor ENTRYPOINT", "add one, or give run")
        if port is None and len(config.ports) > 1:
            ports = ", ".join(map(str, config.ports))
            raise RuleViolation(f"the image exposes the ports {ports}", "give one of them as server.port")
        return archive.digest


def served_port(image: Image | None, port: int | None) -> int:
    """Return the port that a server listens on: the entry's, the one that its image exposes, or 8080."""
    return port or next(iter(image.config.ports if image else ()), DEFAULT_PORT)


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
            "docker:// and .sif images need apptainer, which is not installed here; install it, or hand in "
            "an archive (.tar) that docker save makes"
        ) from None
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise PalioError(f"apptainer {arguments[0]} {arguments[-1]} failed: {lines[-1]}")
