"""Teams bring their own programs: one trains and serves with its own, one serves as many did in 2023, one is
built from a Dockerfile on a Debian that mmdebstrap makes, and the Dockerfile of one cannot be built.

The workflow, buildah, HELM and both confinements are real; no registry is asked, and builds have no network.
The models are tiny and their weights are random; among the slow tests the first team trains and serves the
demo's own model, to a score and once more as a reproduction.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.dockerfiles import SERVER as SERVES_ON_PORT_80
from tests.support.dockerfiles import SERVES, builds, debian, require_builds
from tests.support.folder import WorkingFolder
from tests.support.training import tiny_base_model

EXAMPLES = "config/entries/examples"
ENTRY = "results/laptop/trained_and_served"
TRAINED = "results/laptop/peft_script"
SERVER = "results/laptop/server2023"
BUILT, BROKEN = "results/laptop/built", "results/laptop/broken"
DOCKERFILES, TEAMS = "config/entries/dockerfiles", "resources/teams"


def bring_dockerfiles(folder: WorkingFolder, base: Path) -> None:
    """The entries `built` and `broken`."""
    for name in ("built", "broken"):
        entry = {"team": name, "track": "laptop", "kind": "server", "base_model": {"path": str(base)}}
        server = {"dockerfile": f"{TEAMS}/{name}"}
        (folder.path / DOCKERFILES / f"{name}.yaml").write_text(yaml.safe_dump(entry | {"server": server}))
        (folder.path / TEAMS / name).mkdir(parents=True)
    built = folder.path / TEAMS / "built"
    debian(built / "base.tar")
    (built / "Dockerfile").write_text(SERVES.replace("RUN mkdir", "RUN python3 -V && mkdir"))
    (built / "main.py").write_text(SERVES_ON_PORT_80)
    (folder.path / TEAMS / "broken/Dockerfile").write_text("FROM nvcr.io/nvidia/pytorch:23.09-py3\n")


@pytest.fixture(
    scope="module", params=["tiny", pytest.param("demo", marks=pytest.mark.slow)], ids=["tiny", "demo"]
)
def finished(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, base_model: Path
) -> Iterator[WorkingFolder]:
    base = tiny_base_model(tmp_path_factory.mktemp("base"), base_model) / "model"
    folder = WorkingFolder.create(tmp_path_factory.mktemp("e2e") / "competition")

    def competition(config: dict[str, Any]) -> None:
        config["entries"] = [EXAMPLES, DOCKERFILES]
        for stage in config["stages"].values():
            name, scenario = next(iter(stage["scenarios"].items()))
            stage["scenarios"] = {name: scenario | {"max_eval_instances": 3}}

    def start_from_tiny(content: dict[str, Any]) -> None:
        content["base_model"] = {"path": str(base)}

    def train_less(content: dict[str, Any]) -> None:
        content["command"]["run"] = ["python", "train.py", "--max-steps", "2", "--batch-size", "2"]

    folder.edit_yaml("config/config.yaml", competition)
    folder.edit_yaml(
        "config/rulesets/demo.yaml", lambda rules: rules["base_models"][0]["sources"].append(f"path:{base}")
    )
    for entry in ("server2023", "peft_script", *(["trained_and_served"] if request.param == "tiny" else [])):
        folder.edit_yaml(f"{EXAMPLES}/{entry}.yaml", start_from_tiny)
    for entry in ("trained_and_served", "peft_script"):
        folder.edit_yaml(f"{EXAMPLES}/{entry}.yaml", train_less)
    targets = [f"{ENTRY}/closed.json", f"{SERVER}/closed.json", f"{TRAINED}/package.json"]
    (folder.path / DOCKERFILES).mkdir()
    if builds():
        bring_dockerfiles(folder, base)
        assert folder.snakemake(f"{BROKEN}/package.json", timeout=1400).returncode != 0
        targets.append(f"{BUILT}/closed.json")
    for arguments in (targets, ["standings"]):
        done = folder.snakemake(*arguments, timeout=1400)
        assert done.returncode == 0, done.stdout + done.stderr
    yield folder


def read(folder: WorkingFolder, path: str) -> Any:
    return json.loads((folder.path / path).read_text())


def test_the_server_is_packaged_with_what_was_trained_for_it(finished: WorkingFolder) -> None:
    adapter = read(finished, f"{ENTRY}/adapter.json")
    package = read(finished, f"{ENTRY}/package.json")
    assert (adapter["state"], adapter["recipe"]["kind"], package["kind"]) == ("finished", "command", "server")
    assert read(finished, f"{ENTRY}/finetune.run.json")["training"]["training_seconds"] > 0
    assert package["adapter_fingerprint"] == adapter["fingerprint"]
    assert {"server.json", "files/main.py", "adapter/adapter_model.safetensors"} <= set(package["files"])
    for name, digest in adapter["files"].items():
        assert package["files"][f"adapter/{name}"] == digest


def test_it_passes_the_probe_and_answers_every_question_of_both_stages(finished: WorkingFolder) -> None:
    probe = read(finished, f"{ENTRY}/probe.json")
    assert [
        check["name"] for check in probe["checks"] if check["state"] == "fail" and check["required"]
    ] == []
    for stage in ("open", "closed"):
        record = read(finished, f"{ENTRY}/{stage}.json")
        assert record["state"] == "finished"
        assert [run["answered"] for run in record["runs"]] == [run["instances"] for run in record["runs"]]


def test_it_is_scored_beside_those_that_only_serve(finished: WorkingFolder) -> None:
    board = read(finished, "results/standings/laptop.json")
    scored = {"trained_and_served", "server2023", *(["built"] if builds() else [])}
    assert {row["entry"] for row in board["entries"]} == scored
    for row in board["entries"]:
        assert [(cell["state"], cell["n"]) for cell in row["cells"]] == [("finished", 3)] * len(row["cells"])


@pytest.mark.slow
def test_it_is_reproduced_as_a_whole(finished: WorkingFolder) -> None:
    stages = ("--stage", "open", "--stage", "closed")
    done = finished.run("palio", "reproduce", ENTRY, "--out", "again", *stages, timeout=1400)
    assert done.returncode == 0, done.stdout + done.stderr
    again = read(finished, "again/laptop/trained_and_served/reproduction.json")
    assert [(score["stage"], score["n"]) for score in again["scores"]] == [("open", 3), ("closed", 3)]
    assert again["loss_difference"] is None
    package = read(finished, "again/laptop/trained_and_served/package.json")
    assert package["kind"] == "server"
    assert (package["files"] == read(finished, f"{ENTRY}/package.json")["files"]) == again["identical"]


@pytest.mark.slow
def test_another_program_is_no_reproduction(finished: WorkingFolder) -> None:
    program = finished.path / EXAMPLES / "peft_script" / "train.py"
    before = program.read_text()
    program.write_text(before + "# another\n")
    done = finished.run("palio", "reproduce", ENTRY, "--out", "other", timeout=1400)
    program.write_text(before)
    assert done.returncode == 2
    assert "recipe.files_sha256" in done.stderr
    assert "bring back the program that the entry was trained with" in done.stderr


def test_a_package_of_the_teams_own_adapter_is_a_model_as_any(finished: WorkingFolder) -> None:
    """After its package it is as any entry, so its stages are not run."""
    package = read(finished, f"{TRAINED}/package.json")
    assert package["kind"] == "model"
    assert package["adapter_fingerprint"] == read(finished, f"{TRAINED}/adapter.json")["fingerprint"]


def test_the_servers_defects_are_named_and_cost_it_no_run(finished: WorkingFolder) -> None:
    probe = read(finished, f"{SERVER}/probe.json")
    failed = {check["name"] for check in probe["checks"] if check["state"] == "fail"}
    assert {"odd_prompts", "stop_sequences", "request_time"} <= failed
    for stage in ("open", "closed"):
        record = read(finished, f"{SERVER}/{stage}.json")
        assert record["state"] == "finished"
        assert ("HTTP 500 of the server's own" in record["contained"]) == (stage == "open")
    assert not (finished.path / f"{SERVER}/adapter.json").exists()


def test_a_server_from_a_dockerfile_is_built_and_answers_every_question(
    finished: WorkingFolder,
) -> None:
    require_builds()
    image = read(finished, f"{BUILT}/image.json")
    assert image["builder"].startswith("buildah ")
    assert image["network"] is False
    assert read(finished, f"{BUILT}/package.json")["files"]["image.tar"] == image["archive_sha256"]
    for stage in ("open", "closed"):
        record = read(finished, f"{BUILT}/{stage}.json")
        assert record["state"] == "finished"
        assert [run["answered"] for run in record["runs"]] == [run["instances"] for run in record["runs"]]


def test_a_dockerfile_that_cannot_be_built_is_a_dnf_with_its_kind(finished: WorkingFolder) -> None:
    require_builds()
    failure = read(finished, f"{BROKEN}/work/failures/image.json")
    assert failure["state"] == "crashed"
    assert failure["reason"].startswith("the image could not be built (no network): ")
    assert Path(finished.path / failure["log"]).name == "build.log"
    board = read(finished, "results/standings/laptop.json")
    (lost,) = (row for row in board["did_not_finish"] if row["entry"] == "broken")
    assert "(no network)" in lost["reason"]
    assert not (finished.path / f"{BROKEN}/package.json").exists()


def test_the_server_of_the_closed_stage_leaves_nothing_with_the_entry(finished: WorkingFolder) -> None:
    logs = list((finished.path / "results").rglob("server.log"))
    assert [path for path in logs if "helm/open" in path.as_posix()] == logs
