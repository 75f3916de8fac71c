"""The program `vllm`, installed in its own environment whose bin folder is on PATH."""

from __future__ import annotations

import re
import shutil
import subprocess

from palio.errors import BadInput

PROGRAM = "vllm"
MIN_VERSION = (0, 17)
"""Older versions log prompts by default."""
VERSION_SECONDS = 300.0
"""Enough to import vllm from a slow disk."""


def vllm_version() -> str:
    """Return the version of `vllm` on PATH. Raises BadInput if there is none that we can use."""
    if shutil.which(PROGRAM) is None:
        raise BadInput(
            "engine",
            value=PROGRAM,
            why="there is no such program on PATH",
            fix="install it in its own environment and put that environment's bin folder on PATH",
        )
    try:
        answer = subprocess.run(
            [PROGRAM, "--version"], capture_output=True, text=True, timeout=VERSION_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BadInput(PROGRAM, why=f"--version fails ({error})", fix="install it again") from None
    version = re.search(r"^(\d+)\.(\d+)\S*$", answer.stdout, re.M)
    if not version:
        raise BadInput(PROGRAM, why="--version prints no version", fix="run it by hand to see why")
    if (int(version[1]), int(version[2])) < MIN_VERSION:
        fix = "upgrade to {}.{} or later".format(*MIN_VERSION)
        raise BadInput(PROGRAM, value=version[0], why="it is too old", fix=fix)
    return version[0]
