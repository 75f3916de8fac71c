"""Programs that teams hand in: a training program, an inference server."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from palio.config.common import PlainPath, Strict
from palio.errors import InvalidValue

DOCKERFILES = ("Containerfile", "Dockerfile")
"""Names that buildah looks for, in its order."""
IMAGE_PATTERN = re.compile(r"docker://[\w./:-]+@sha256:[0-9a-f]{64}")


class Program(Strict):
    """A program that a team hands in. It sees its files, the inputs of its contract and the system."""

    contract: Literal[1] = 1
    """Version of the contract, docs/command_entries.md or docs/server_entries.md, that it is written for."""
    run: Annotated[str, Field(min_length=1)] | Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """A line for `sh -c`, or a list of program and arguments; starts in the folder of the files. Without it
    an image's ENTRYPOINT and CMD start, in its WORKDIR."""
    files: PlainPath | None = None
    """The team's folder, mounted read-only at `/entry`; must not contain symbolic links."""
    image: PlainPath | None = None
    """A container image instead of the host's system: a `.tar` file, an OCI archive or what `docker save`
    writes, uncompressed; `docker://name@sha256:<digest>` or a `.sif` file, which need apptainer."""

    @model_validator(mode="after")
    def _something_to_run(self) -> Program:
        if not (self.files or self.brings_image):
            raise ValueError("give files, image, or both")
        if not (self.run or self.brings_image):
            raise InvalidValue(why="there is nothing to run", fix="give run")
        if self.image and not (self.image.endswith((".sif", ".tar")) or IMAGE_PATTERN.fullmatch(self.image)):
            raise ValueError(
                "write image as docker://name@sha256:<64 hex digits> or as a path to a .tar or .sif file"
            )
        return self

    @property
    def brings_image(self) -> bool:
        """Whether it runs in an image of its own."""
        return self.image is not None

    @property
    def paths(self) -> dict[str, str]:
        """What of the team's files it is made of, by key."""
        image = None if self.image and self.image.startswith("docker://") else self.image
        return {key: path for key, path in (("files", self.files), ("image", image)) if path}


class ServerProgram(Program):
    """A team's own inference server."""

    dockerfile: PlainPath | None = None
    """For `server` only: a folder with a `Dockerfile` and what it copies, from which the organizer builds the
    image, in place of `image`."""
    port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """For `server` only: the port it listens on, in a network of its own; also given in `PORT`. Omit it for
    the one that the image exposes, or 8080."""

    @model_validator(mode="after")
    def _one_image(self) -> ServerProgram:
        if self.image and self.dockerfile:
            raise InvalidValue(why="there are an image and a dockerfile", fix="remove one of them")
        return self

    @property
    def brings_image(self) -> bool:
        return self.image is not None or self.dockerfile is not None

    @property
    def paths(self) -> dict[str, str]:
        return super().paths | ({"dockerfile": self.dockerfile} if self.dockerfile else {})
