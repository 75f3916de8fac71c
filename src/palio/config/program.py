"""Programs that teams hand in: a training program, an inference server."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from palio.config.common import Strict

IMAGE_PATTERN = re.compile(r"docker://[\w./:-]+@sha256:[0-9a-f]{64}")


class Program(Strict):
    """A program that a team hands in. It sees its files, the inputs of its contract and the system."""

    contract: Literal[1] = 1
    """Version of the contract, docs/command_entries.md or docs/server_entries.md, that it is written for."""
    run: Annotated[str, Field(min_length=1)] | Annotated[tuple[str, ...], Field(min_length=1)]
    """A line for `sh -c`, or a list of program and arguments; starts in the folder of the files."""
    files: str | None = None
    """The team's folder, mounted read-only at `/entry`; must not contain symbolic links."""
    image: str | None = None
    """`docker://name@sha256:<digest>` or a `.sif` file (read with apptainer) instead of the host's system."""

    @model_validator(mode="after")
    def _something_to_run(self) -> Program:
        if self.files is None and self.image is None:
            raise ValueError("give files, image, or both")
        if self.image and not (self.image.endswith(".sif") or IMAGE_PATTERN.fullmatch(self.image)):
            raise ValueError(
                "write image as docker://name@sha256:<64 hex digits> or as a path to a .sif file"
            )
        return self


class ServerProgram(Program):
    """A team's own inference server."""

    port: Annotated[int, Field(ge=1024, le=65535)] = 8080
    """For `server` only: the port it listens on, in a network of its own; also given in `PORT`."""
