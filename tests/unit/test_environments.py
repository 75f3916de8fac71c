"""The environments of the nodes agree: the virtual environment, conda and the container."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml

from tests.support.folder import ROOT

ENVS = ROOT / "envs"
INSTALLS = re.compile(r"pip install .*--requirement\s+(?:\S*/)?envs/lock\.txt")


def container(section: str) -> str:
    return (ENVS / "palio.def").read_text().split(f"%{section}\n")[1].split("\n%")[0]


def test_all_of_them_have_the_python_that_the_package_asks_for() -> None:
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    minor = re.search(r"3\.\d+", asked)
    assert minor
    assert f"python={minor[0]}" in yaml.safe_load((ENVS / "palio.yaml").read_text())["dependencies"]
    assert f"From: python:{minor[0]}-" in (ENVS / "palio.def").read_text()


def test_all_of_them_install_the_lock_and_resolve_nothing() -> None:
    for recipe in (
        (ROOT / "Makefile").read_text(),
        (ENVS / "palio.post-deploy.sh").read_text(),
        container("post"),
    ):
        (line,) = (line for line in recipe.splitlines() if INSTALLS.search(line))
        assert "--no-deps" in line


def test_every_file_of_the_container_is_there() -> None:
    files = [line.split() for line in container("files").splitlines() if line.strip()]
    assert files
    for source, target in files:
        assert (ROOT / source).exists(), source
        assert Path(target) == Path("/opt/palio") / source
