"""Two teams bring their own programs: one trains with its own script, one serves as many did in 2023.

The workflow, HELM and the confinement are real; the model is tiny and its weights are random.
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


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, base_model: Path) -> Iterator[WorkingFolder]:
    """The trained example up to its package, after which it is as any; the server through both stages."""
    base = tiny_base_model(tmp_path_factory.mktemp("base"), base_model) / "model"
    folder = WorkingFolder.create(tmp_path_factory.mktemp("e2e") / "competition")

    def competition(config: dict[str, Any]) -> None:
        config["entries"] = [EXAMPLES]
        for stage in config["stages"].values():
            name, scenario = next(iter(stage["scenarios"].items()))
            stage["scenarios"] = {name: scenario | {"max_eval_instances": 3}}

    def approve(rules: dict[str, Any]) -> None:
        rules["base_models"][0]["sources"].append(f"path:{base}")

    def start_from_tiny(entry: dict[str, Any]) -> None:
        entry["base_model"] = {"path": str(base)}

    def train_less(entry: dict[str, Any]) -> None:
        entry["command"]["run"] = ["python", "train.py", "--max-steps", "2", "--batch-size", "2"]

    folder.edit_yaml("config/config.yaml", competition)
    folder.edit_yaml("config/rulesets/demo.yaml", approve)
    for entry in ("peft_script", "server2023"):
        folder.edit_yaml(f"{EXAMPLES}/{entry}.yaml", start_from_tiny)
    folder.edit_yaml(f"{EXAMPLES}/peft_script.yaml", train_less)
    results = "results/laptop"
    done = folder.snakemake(
        f"{results}/peft_script/package.json", f"{results}/server2023/closed.json", timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    yield folder


def read(folder: WorkingFolder, path: str) -> Any:
    return json.loads((folder.path / path).read_text())


def test_the_trained_entry_has_the_records_of_any_other(finished: WorkingFolder) -> None:
    adapter = read(finished, "results/laptop/peft_script/adapter.json")
    assert (adapter["state"], adapter["recipe"]["kind"]) == ("finished", "command")
    package = read(finished, "results/laptop/peft_script/package.json")
    assert package["adapter_fingerprint"] == adapter["fingerprint"]
    assert read(finished, "results/laptop/peft_script/finetune.run.json")["training"]["training_seconds"] > 0


def test_the_servers_defects_are_named_and_cost_it_no_run(finished: WorkingFolder) -> None:
    probe = read(finished, "results/laptop/server2023/probe.json")
    failed = {check["name"] for check in probe["checks"] if check["state"] == "fail"}
    assert {"odd_prompts", "stop_sequences", "request_time"} <= failed
    for stage in ("open", "closed"):
        record = read(finished, f"results/laptop/server2023/{stage}.json")
        assert record["state"] == "finished"
        assert ("HTTP 500 of the server's own" in record["contained"]) == (stage == "open")
    assert not (finished.path / "results/laptop/server2023/adapter.json").exists()


def test_the_server_of_the_closed_stage_leaves_nothing_with_the_entry(finished: WorkingFolder) -> None:
    logs = list((finished.path / "results").rglob("server.log"))
    assert [path for path in logs if "helm/open" in path.as_posix()] == logs
