"""A container that serves a package: the image is pinned by digest, every Python package by version.

    <out>/Containerfile        for podman or docker; its first lines show how to run it
    <out>/requirements.lock    the server's packages and their dependencies, as installed here
    <out>/palio/               the part of Palio's code that serves

The model is mounted, not copied: one image serves every package of a competition.
"""

from __future__ import annotations

import re
import shutil
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from palio.provenance import write_text

IMAGE = (
    "docker.io/library/python:3.11-slim-bookworm"
    "@sha256:b18992999dbe963a45a8a4da40ac2b1975be1a776d939d098c647482bcad5cba"
)
PINNED = re.compile(r"^FROM \S+@sha256:[0-9a-f]{64}$", re.M)
SERVES = ("torch", "transformers", "fastapi", "uvicorn", "pydantic", "click", "pyyaml", "psutil")
"""Packages that `palio serve` imports."""
_SHARED = ("cpu", "guard", "layout", "network", "provenance", "tensors", "text", "tokens", "vllm")
MODULES = ("__init__", "errors", *_SHARED)
CODE = ("cli", "config", "serving", *(f"{module}.py" for module in MODULES))
"""Parts of Palio that `palio serve` imports."""
CONTAINERFILE = f"""\
# Serves a package behind HELM's HTTP contract. Build here, then:
#   podman run --rm -p 8080:8080 -v /path/to/package:/package:ro <image>
# With a GPU add --device nvidia.com/gpu=all; the wheel of torch in requirements.lock brings its own CUDA.
FROM {IMAGE}
ENV HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=/opt
COPY requirements.lock /opt/
RUN pip install --no-cache-dir --no-deps -r /opt/requirements.lock
COPY palio /opt/palio
USER nobody
EXPOSE 8080
ENTRYPOINT ["python", "-m", "palio.cli", "serve", "/package", "--host", "0.0.0.0", "--port", "8080"]
"""


def write_container(out: Path) -> None:
    """Write the container's files into the folder `out`."""
    source = Path(__file__).parents[1]
    for name in CODE:
        target = out / source.name / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (source / name).is_dir():
            shutil.copytree(
                source / name, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            shutil.copyfile(source / name, target)
    write_text(out / "requirements.lock", "".join(f"{line}\n" for line in locked(*SERVES)))
    write_text(out / "Containerfile", CONTAINERFILE)


def locked(*roots: str) -> list[str]:
    """Return `name==version` of the installed packages `roots` and their dependencies here, sorted."""
    versions: dict[str, str] = {}
    waiting = [(root, "") for root in roots]
    seen: set[tuple[str, str]] = set()
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            package = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # for another platform, or optional
            continue
        versions[canonicalize_name(name)] = package.version
        for line in package.requires or ():
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                waiting += [(needed.name, option) for option in ("", *needed.extras)]
    return [f"{name}=={version.partition('+')[0]}" for name, version in sorted(versions.items())]
