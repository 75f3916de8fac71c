"""Container images made by hand, in both formats, and the host's own files to put in them."""

from __future__ import annotations

import hashlib
import io
import json
import re
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from palio.sandbox.archive import MACHINES

Member = tuple[tarfile.TarInfo, bytes]


def member(name: str, content: bytes = b"", **fields: Any) -> Member:
    """A file of a layer; `type`, `linkname` and `mode` make it something else."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def folder(name: str, mode: int = 0o755) -> Member:
    return member(name, type=tarfile.DIRTYPE, mode=mode)


def symlink(name: str, target: str) -> Member:
    return member(name, type=tarfile.SYMTYPE, linkname=target)


def layer(members: Iterable[Member]) -> bytes:
    """A layer's tar file."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def _config(config: Mapping[str, Any]) -> bytes:
    machine = MACHINES.get(sysconfig.get_platform().removeprefix("linux-"), "amd64")
    return json.dumps({"architecture": machine, "os": "linux", "config": dict(config)}).encode()


def _archive(path: Path, files: Mapping[str, bytes]) -> Path:
    path.write_bytes(layer(member(name, content) for name, content in files.items()))
    return path


def oci_archive(path: Path, layers: Iterable[bytes], config: Mapping[str, Any] | None = None) -> Path:
    blobs: dict[str, bytes] = {}

    def blob(content: bytes) -> dict[str, Any]:
        digest = hashlib.sha256(content).hexdigest()
        blobs[f"blobs/sha256/{digest}"] = content
        return {"digest": f"sha256:{digest}", "size": len(content)}

    manifest = {"config": blob(_config(config or {})), "layers": [blob(content) for content in layers]}
    index = {"manifests": [blob(json.dumps(manifest).encode())]}
    return _archive(path, {**blobs, "oci-layout": b"{}", "index.json": json.dumps(index).encode()})


def docker_archive(path: Path, layers: Iterable[bytes], config: Mapping[str, Any] | None = None) -> Path:
    files = {f"{number}/layer.tar": content for number, content in enumerate(layers)}
    manifest = [{"Config": "config.json", "Layers": list(files), "RepoTags": ["team/server:1"]}]
    named = {"config.json": _config(config or {}), "manifest.json": json.dumps(manifest).encode()}
    return _archive(path, files | named)


def host_files(*programs: str, python: bool = False) -> list[Member]:
    """Programs of this machine with the libraries that they load; `python` adds Python and what of its
    standard library a small HTTP server imports."""
    paths = [Path(program) for program in ("/bin/sh", *programs)]
    found = {str(path): path.read_bytes() for path in paths}
    if python:
        found["/usr/bin/python3"] = Path(sys._base_executable).resolve().read_bytes()  # type: ignore[attr-defined]
        paths.append(Path(sys._base_executable))  # type: ignore[attr-defined]
        found |= _standard_library()
        paths += (Path(sysconfig.get_path("stdlib")) / "lib-dynload").glob("*.so")
    listed = subprocess.run(["ldd", *paths], capture_output=True, text=True, check=False).stdout
    found |= {library: Path(library).read_bytes() for library in re.findall(r"(/\S+) \(0x", listed)}
    return [member(name.lstrip("/"), content, mode=0o755) for name, content in found.items()]


def _standard_library() -> dict[str, bytes]:
    code = "import http.server, json, socketserver, sys; print(*sys.modules, sep='\\n')"
    listed = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True
    )
    home = Path(sysconfig.get_path("stdlib"))
    tops = {name.partition(".")[0] for name in listed.stdout.split()} | {"encodings", "stringprep"}
    wanted = [home / f"{name}.py" for name in tops]
    wanted += [path for name in tops for path in (home / name).rglob("*.py") if "test" not in path.parts]
    wanted += [*(home / "lib-dynload").glob("*.so")]
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return {
        f"/usr/lib/{version}/{path.relative_to(home)}": path.read_bytes() for path in wanted if path.is_file()
    }
