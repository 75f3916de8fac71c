"""From a Dockerfile to the leaderboard: one on a Debian that mmdebstrap makes, one that cannot be built, and
a server without an image beside them. The workflow, buildah, HELM and the confinement are real; no
registry is asked, and builds have no network."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.dockerfiles import SERVER, SERVES, require_builds
from tests.support.folder import WorkingFolder
from tests.support.training import tiny_base_model

pytestmark = pytest.mark.timeout(1500)
TEAMS, ENTRIES = "resources/teams", "config/entries/dockerfiles"
BUILT, BROKEN, PLAIN = "built", "broken", "server2023"


def debian(path: Path) -> None:
    """Put the smallest Debian with Python at `path`, as a tar file. It is made once and kept outside the
    repository between test sessions."""
    made = Path(os.environ.get("XDG_CACHE_HOME", tempfile.gettempdir())) / "palio-tests" / "debian-python.tar"
    made.parent.mkdir(parents=True, exist_ok=True)
    with made.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            _mmdebstrap(made)
    shutil.copyfile(made, path)


def _mmdebstrap(made: Path) -> None:
    if shutil.which("mmdebstrap") is None:
        pytest.skip("no mmdebstrap here; envs/debian.txt names the package")
    # its /proc is busy now and then when it is to be unmounted, and nothing that is installed needs it
    options = ["--variant=minbase", "--include=python3", "--skip=chroot/mount/proc"]
    building = made.with_name("building.tar")
    line = ["mmdebstrap", *options, "bookworm", str(building)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    building.rename(made)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, base_model: Path) -> Iterator[WorkingFolder]:
    require_builds()
    base = tiny_base_model(tmp_path_factory.mktemp("base"), base_model) / "model"
    folder = WorkingFolder.create(tmp_path_factory.mktemp("e2e") / "competition")

    def competition(config: dict[str, Any]) -> None:
        config["entries"] = [ENTRIES]
        for stage in config["stages"].values():
            name, scenario = next(iter(stage["scenarios"].items()))
            stage["scenarios"] = {name: scenario | {"max_eval_instances": 3}}

    folder.edit_yaml("config/config.yaml", competition)
    folder.edit_yaml(
        "config/rulesets/demo.yaml", lambda rules: rules["base_models"][0]["sources"].append(f"path:{base}")
    )
    (folder.path / ENTRIES).mkdir()
    for name, server in {
        BUILT: {"dockerfile": f"{TEAMS}/{BUILT}"},
        BROKEN: {"dockerfile": f"{TEAMS}/{BROKEN}"},
        PLAIN: {
            "files": "config/entries/examples/server2023",
            "run": "python -m uvicorn main:app --host 127.0.0.1 --port $PORT",
        },
    }.items():
        entry = {"team": name, "track": "laptop", "kind": "server", "base_model": {"path": str(base)}}
        (folder.path / ENTRIES / f"{name}.yaml").write_text(yaml.safe_dump(entry | {"server": server}))
    for name in (BUILT, BROKEN):
        (folder.path / TEAMS / name).mkdir(parents=True)
    debian(folder.path / TEAMS / BUILT / "base.tar")
    (folder.path / TEAMS / BUILT / "Dockerfile").write_text(
        SERVES.replace("RUN mkdir", "RUN python3 -V && mkdir")
    )
    (folder.path / TEAMS / BUILT / "main.py").write_text(SERVER)
    (folder.path / TEAMS / BROKEN / "Dockerfile").write_text("FROM nvcr.io/nvidia/pytorch:23.09-py3\n")
    done = folder.snakemake(timeout=1800)
    assert done.returncode != 0, done.stdout + done.stderr  # one entry has no result
    assert folder.snakemake("standings").returncode == 0
    yield folder


def read(folder: WorkingFolder, path: str) -> Any:
    return json.loads((folder.path / path).read_text())


@pytest.mark.parametrize("entry", [BUILT, PLAIN])
def test_what_was_built_and_what_needs_no_image_have_a_score(finished: WorkingFolder, entry: str) -> None:
    for stage in ("open", "closed"):
        record = read(finished, f"results/laptop/{entry}/{stage}.json")
        assert record["state"] == "finished"
        assert [run["answered"] for run in record["runs"]] == [run["instances"] for run in record["runs"]]
    board = read(finished, "results/standings/laptop.json")
    assert entry in {row["entry"] for row in board["entries"]}


def test_the_package_holds_the_image_that_was_built(finished: WorkingFolder) -> None:
    image = read(finished, f"results/laptop/{BUILT}/image.json")
    assert image["builder"].startswith("buildah ")
    assert image["network"] is False
    package = read(finished, f"results/laptop/{BUILT}/package.json")
    assert package["files"]["image.tar"] == image["archive_sha256"]


def test_a_dockerfile_that_cannot_be_built_is_a_dnf_with_its_kind(finished: WorkingFolder) -> None:
    failure = read(finished, f"results/laptop/{BROKEN}/work/failures/image.json")
    assert failure["state"] == "crashed"
    assert failure["reason"].startswith("the image could not be built (no network): ")
    assert Path(finished.path / failure["log"]).name == "build.log"
    board = read(finished, "results/standings/laptop.json")
    (lost,) = (row for row in board["did_not_finish"] if row["entry"] == BROKEN)
    assert "(no network)" in lost["reason"]
    assert not (finished.path / f"results/laptop/{BROKEN}/package.json").exists()
