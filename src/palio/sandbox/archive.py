"""A container image as one file, an OCI archive or what `docker save` writes: its config and its layers.

Nothing in it is trusted: every blob is held against the digest that names it, and a config has plain, bounded
values only. Formats: https://github.com/opencontainers/image-spec (config.md, image-layout.md), and the
`manifest.json` of `docker save`.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import platform
import re
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar, cast

import zstandard

from palio.errors import RuleViolation
from palio.provenance import CHUNK
from palio.records import ImageConfig

JSON_BYTES = 8 << 20
"""The most that an index, a manifest or a config has."""
TEXT_BYTES = 1 << 20
"""The most that all text of a config has together; the kernel takes about so much for a program's start."""
LAYERS = 512
MEMBERS = 10_000
"""Files in the archive itself, which holds blobs."""
MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}
"""Names of machines in images."""
INDEX, DOCKER = "index.json", "manifest.json"
SAVE_AGAIN = "save it again, with docker save or as an OCI archive, uncompressed"
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"


@dataclass(frozen=True)
class Layer:
    """A layer's tar file, compressed or not, in the archive."""

    blob: str
    """Name in the archive."""
    sha256: str | None
    """Of the blob; None where the format names none, as `docker save` does."""


@dataclass(frozen=True)
class ImageArchive:
    """An open archive."""

    members: dict[str, tarfile.TarInfo]
    tar: tarfile.TarFile
    digest: str
    """sha256 of the image's manifest (OCI) or its config (docker save): its name in registries."""
    config: ImageConfig
    layers: tuple[Layer, ...]

    @contextmanager
    def opened(self, layer: Layer) -> Iterator[IO[bytes]]:
        """Open a layer's tar file, decompressed. Raises RuleViolation if it is not what its digest says."""
        if layer.sha256 is not None and _sha256(_blob(self, layer.blob)) != layer.sha256:
            raise RuleViolation(f"{layer.blob} of the image is not what its digest says", SAVE_AGAIN)
        with _blob(self, layer.blob) as blob:
            magic = blob.read(4)
            blob.seek(0)
            if magic[:2] == _GZIP:
                yield cast(IO[bytes], gzip.GzipFile(fileobj=blob))
            elif magic == _ZSTD:
                yield zstandard.ZstdDecompressor().stream_reader(blob)
            else:
                yield blob


@contextmanager
def image_archive(path: Path) -> Iterator[ImageArchive]:
    """Open an image's archive.

    Raises:
        RuleViolation: it is no image for this machine, or its metadata is not what it has to be.
    """
    try:
        tar = tarfile.open(path, mode="r:")  # noqa: SIM115 (closed below)
    except (tarfile.TarError, OSError, ValueError):
        raise RuleViolation(f"{path.name} is not an image's archive", SAVE_AGAIN) from None
    with tar:
        members: dict[str, tarfile.TarInfo] = {}
        archive = ImageArchive(members, tar, "", ImageConfig(), ())
        try:
            for member in tar:
                members[member.name.removeprefix("./")] = member
                if len(members) > MEMBERS:
                    raise RuleViolation(f"{path.name} holds more than {MEMBERS} files", SAVE_AGAIN)
            read = _read_oci if INDEX in members else _read_docker
            digest, config, layers = read(archive)
        except (
            tarfile.TarError,
            EOFError,
            OSError,
            ValueError,
            KeyError,
            TypeError,
            RecursionError,
        ) as error:
            raise RuleViolation(
                f"{path.name} is not an image's archive ({type(error).__name__}: {error})", SAVE_AGAIN
            ) from None
        if len(layers) > LAYERS:
            raise RuleViolation(f"{path.name} has {len(layers)} layers, more than {LAYERS}", "squash them")
        yield ImageArchive(members, tar, digest, config, layers)


def _blob(archive: ImageArchive, name: str) -> IO[bytes]:
    """Open a file of the archive. `docker save` has links among layers, which stay inside."""
    stream = archive.tar.extractfile(archive.members[name])
    if stream is None:
        raise ValueError(f"{name} is not a file")
    return stream


def _sha256(stream: IO[bytes]) -> str:
    digest = hashlib.sha256()
    with stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _json(archive: ImageArchive, name: str) -> tuple[Any, str]:
    """A JSON file of the archive, and its sha256."""
    with _blob(archive, name) as stream:
        content = stream.read(JSON_BYTES + 1)
    if len(content) > JSON_BYTES:
        raise ValueError(f"{name} has more than {JSON_BYTES >> 20} MB")
    return json.loads(content), hashlib.sha256(content).hexdigest()


def _named(descriptor: dict[str, Any]) -> tuple[str, str]:
    """The blob that an OCI descriptor names, and its sha256."""
    found = _DIGEST.fullmatch(descriptor["digest"])
    if found is None:
        raise ValueError("a digest is not a sha256")
    return f"blobs/sha256/{found[1]}", found[1]


def _described(archive: ImageArchive, descriptor: dict[str, Any]) -> tuple[Any, str]:
    name, expected = _named(descriptor)
    content, found = _json(archive, name)
    if found != expected:
        raise ValueError(f"{name} is not what its digest says")
    return content, found


def _read_oci(archive: ImageArchive) -> tuple[str, ImageConfig, tuple[Layer, ...]]:
    index, _ = _json(archive, INDEX)
    descriptor = _for_this_machine(index["manifests"])
    content, digest = _described(archive, descriptor)
    if "manifests" in content:  # one index more, of an image for several machines
        content, digest = _described(archive, _for_this_machine(content["manifests"]))
    config, _ = _described(archive, content["config"])
    layers = [_named(layer) for layer in content["layers"]]
    return digest, image_config(config), tuple(Layer(name, sha256) for name, sha256 in layers)


def _for_this_machine(manifests: list[dict[str, Any]]) -> dict[str, Any]:
    ours = {"os": "linux", "architecture": _machine()}
    fitting = [one for one in manifests if ours.items() <= one.get("platform", ours).items()]
    if len(fitting) != 1:
        raise ValueError(f"it holds {len(fitting)} images for linux/{_machine()}, not one")
    return fitting[0]


def _read_docker(archive: ImageArchive) -> tuple[str, ImageConfig, tuple[Layer, ...]]:
    manifests, _ = _json(archive, DOCKER)
    (manifest,) = manifests
    config, digest = _json(archive, manifest["Config"])
    return digest, image_config(config), tuple(Layer(name, None) for name in manifest["Layers"])


def _machine() -> str:
    return MACHINES.get(platform.machine(), platform.machine())


# --- config ------------------------------------------------------------------------------------------------


def image_config(content: dict[str, Any]) -> ImageConfig:
    """Return what an image says of its program. Raises RuleViolation with the key that is wrong."""
    if content.get("os", "linux") != "linux" or content.get("architecture", _machine()) != _machine():
        where = f"{content.get('os')}/{content.get('architecture')}"
        raise RuleViolation(f"the image is for {where!r:.60}", f"build it for linux/{_machine()}")
    config = content.get("config") or {}
    if len(json.dumps(config)) > TEXT_BYTES:
        raise RuleViolation(f"the image's config has more than {TEXT_BYTES >> 20} MB", "make it smaller")
    variables = dict(_checked("Env", _variable, config.get("Env")))
    arguments = [
        *_checked("Entrypoint", _text, config.get("Entrypoint")),
        *_checked("Cmd", _text, config.get("Cmd")),
    ]
    (directory,) = _checked("WorkingDir", _text, [config.get("WorkingDir") or "/"])
    (user,) = _checked("User", _text, [config.get("User") or ""])
    ports = _checked("ExposedPorts", _port, config.get("ExposedPorts") or {})
    return ImageConfig(
        variables=variables,
        arguments=tuple(arguments),
        directory=f"/{directory.lstrip('/')}",
        user=user,
        ports=tuple(sorted({port for port in ports if port})),
    )


T = TypeVar("T")


def _checked(key: str, check: Callable[[Any], T], values: Any) -> list[T]:
    """Check every value of a list, or key of a mapping."""
    try:
        if not isinstance(values, list | dict | None):
            raise ValueError("it is no list")
        return [check(value) for value in values or ()]
    except ValueError as error:
        raise RuleViolation(f"{key} of the image's config is refused: {error}", "correct it") from None


def _text(value: Any) -> str:
    """A string that can be an argument or a variable: with a null byte, it would be two."""
    if not isinstance(value, str):
        raise ValueError("it holds something else than text")
    if "\0" in value:
        raise ValueError("it holds a null byte")
    value.encode()  # UnicodeEncodeError is a ValueError
    return value


def _variable(value: Any) -> tuple[str, str]:
    name, separator, content = _text(value).partition("=")
    if not name or not separator:
        raise ValueError("a variable is not NAME=value")
    return name, content


def _port(value: Any) -> int:
    """A TCP port; 0 for one of UDP."""
    number, _, protocol = _text(value).partition("/")
    if not (number.isdecimal() and 0 < int(number) < 1 << 16 and protocol in ("", "tcp", "udp")):
        raise ValueError(f"{value!r:.30} is no port")
    return 0 if protocol == "udp" else int(number)
