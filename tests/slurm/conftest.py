"""One cluster for all tests here, and competitions to run on it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, missing_programs
from tests.training import tiny_base_model


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if missing := missing_programs():
        pytest.skip(f"{', '.join(missing)} not installed: apt-get install slurm-wlm munge")
    folder = tmp_path_factory.mktemp("cluster")
    with Cluster(folder) as running:
        yield running


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, base_model: Path) -> Path:
    """A model folder of random weights that a second trains and serves."""
    made = tiny_base_model(tmp_path_factory.mktemp("base"), base_model)
    return Path(shutil.move(made / "model", made / "tiny"))
