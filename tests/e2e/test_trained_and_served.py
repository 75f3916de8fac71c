"""One entry, trained by the team's program and served by the team's server, end to end, and reproduced.

The workflow, HELM and both confinements are real; the model is tiny and its weights are random.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.folder import WorkingFolder
from tests.support.training import tiny_base_model

EXAMPLES = "config/entries/examples"
ENTRY = "results/laptop/trained_and_served"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, base_model: Path) -> Iterator[WorkingFolder]:
    base = tiny_base_model(tmp_path_factory.mktemp("base"), base_model) / "model"
    folder = WorkingFolder.create(tmp_path_factory.mktemp("e2e") / "competition")

    def competition(config: dict[str, Any]) -> None:
        config["entries"] = [EXAMPLES]
        for stage in config["stages"].values():
            name, scenario = next(iter(stage["scenarios"].items()))
            stage["scenarios"] = {name: scenario | {"max_eval_instances": 3}}

    def entry(content: dict[str, Any]) -> None:
        content["base_model"] = {"path": str(base)}
        content["command"]["run"] = ["python", "train.py", "--max-steps", "2", "--batch-size", "2"]

    folder.edit_yaml("config/config.yaml", competition)
    folder.edit_yaml(
        "config/rulesets/demo.yaml", lambda rules: rules["base_models"][0]["sources"].append(f"path:{base}")
    )
    folder.edit_yaml(f"{EXAMPLES}/trained_and_served.yaml", entry)
    done = folder.snakemake(f"{ENTRY}/closed.json", timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    yield folder


def read(folder: WorkingFolder, path: str) -> Any:
    return json.loads((folder.path / path).read_text())


def test_the_server_is_packaged_with_what_was_trained_for_it(finished: WorkingFolder) -> None:
    adapter = read(finished, f"{ENTRY}/adapter.json")
    package = read(finished, f"{ENTRY}/package.json")
    assert (adapter["recipe"]["kind"], package["kind"]) == ("command", "server")
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


def test_it_is_reproduced_as_a_whole(finished: WorkingFolder) -> None:
    done = finished.run("palio", "reproduce", ENTRY, "--out", "again", "--stage", "open", timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    again = read(finished, "again/laptop/trained_and_served/reproduction.json")
    assert [score["stage"] for score in again["scores"]] == ["open"]
    assert again["loss_difference"] is None
    package = read(finished, "again/laptop/trained_and_served/package.json")
    assert package["kind"] == "server"
    assert (package["files"] == read(finished, f"{ENTRY}/package.json")["files"]) == again["identical"]


def test_another_program_is_no_reproduction(finished: WorkingFolder) -> None:
    program = finished.path / EXAMPLES / "peft_script" / "train.py"
    before = program.read_text()
    program.write_text(before + "# another\n")
    done = finished.run("palio", "reproduce", ENTRY, "--out", "other", timeout=300)
    program.write_text(before)
    assert done.returncode == 2
    assert "recipe.files_sha256" in done.stderr
    assert "bring back the program that the entry was trained with" in done.stderr
