"""The examples for teams that test_own_programs.py does not run, and a base model with code of its own: each
from its entry file to the leaderboard.

The workflow, HELM and the confinements are real; the models are tiny and their weights are random.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from palio.layout import STAGES
from palio.provenance import fingerprint
from palio.records import (
    AdapterManifest,
    Contained,
    Leaderboard,
    PackageManifest,
    ProbeReport,
    StageRecord,
    read_record,
)
from tests.support.folder import DEMO_ENTRIES, WorkingFolder
from tests.support.own_code import approved, siena
from tests.support.training import tiny_base_model

pytestmark = pytest.mark.slow

EXAMPLES = "config/entries/examples"
NAMES = ("adapter_router", "lit_gpt", "siena", "yaml_trainer")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, base_model: Path) -> Iterator[WorkingFolder]:
    models = tmp_path_factory.mktemp("models")
    base = tiny_base_model(models / "base", base_model) / "model"
    siena(models / "siena", base_model)
    own = {"family": "Siena", "sources": [f"path:{models / 'siena'}"], "licences": ["apache-2.0"]}
    folder = WorkingFolder.create(tmp_path_factory.mktemp("e2e") / "competition")
    entries = folder.path / EXAMPLES
    (folder.path / DEMO_ENTRIES / "curated.yaml").rename(entries / "siena.yaml")
    for path in entries.glob("*.yaml"):
        if path.stem not in NAMES:
            path.unlink()

    def competition(config: dict[str, Any]) -> None:
        config["entries"] = [EXAMPLES]
        for stage in config["stages"].values():
            name, scenario = next(iter(stage["scenarios"].items()))
            stage["scenarios"] = {name: scenario | {"max_eval_instances": 3}}

    def rules(content: dict[str, Any]) -> None:
        content["base_models"][0]["sources"].append(f"path:{base}")
        content["base_models"].append(own | {"code": approved(models / "siena")})

    folder.edit_yaml("config/config.yaml", competition)
    folder.edit_yaml("config/rulesets/demo.yaml", rules)
    for name in NAMES:
        model = models / "siena" if name == "siena" else base
        start = {"base_model": {"path": str(model)}}
        folder.edit_yaml(f"{EXAMPLES}/{name}.yaml", partial(_update, start))
    training = {"max_steps": 2, "batch_size": 2, "target_modules": ["value", "gate", "out"]}
    folder.edit_yaml(f"{EXAMPLES}/siena.yaml", lambda content: content["finetune"].update(training))
    for name in ("lora", "two_adapters"):
        folder.edit_yaml(f"{EXAMPLES}/yaml_trainer/{name}.yml", lambda content: content.update(max_steps=2))
    done = folder.snakemake(timeout=2900)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    yield folder


def _update(new: dict[str, Any], content: dict[str, Any]) -> None:
    content.update(new)


def at(finished: WorkingFolder, name: str) -> Path:
    return finished.path / "results/laptop" / name


def test_all_of_them_are_on_the_leaderboard_with_every_question_answered(finished: WorkingFolder) -> None:
    board = read_record(Leaderboard, finished.path / "results/leaderboard/laptop.json")
    assert board.final
    assert sorted(entry.entry for entry in board.entries) == [*NAMES]
    for entry in board.entries:
        assert all(cell.n == 3 for cell in entry.cells)
        for stage in STAGES:
            record = read_record(StageRecord, at(finished, entry.entry) / f"{stage}.json")
            assert record.state == "finished"
            assert [(run.answered, run.instances) for run in record.runs] == [(3, 3)]


@pytest.mark.parametrize("name", ["adapter_router", "lit_gpt"])
def test_the_examples_servers_keep_to_the_whole_contract(finished: WorkingFolder, name: str) -> None:
    assert read_record(PackageManifest, at(finished, name) / "package.json").kind == "server"
    probe = read_record(ProbeReport, at(finished, name) / "probe.json")
    assert probe.conforms
    assert probe.failed == []


def test_the_router_serves_both_adapters_that_its_training_handed_in(finished: WorkingFolder) -> None:
    entry = at(finished, "adapter_router")
    adapter = read_record(AdapterManifest, entry / "adapter.json")
    assert adapter.recipe["adapters"] == ["patterns", "variables"]
    package = read_record(PackageManifest, entry / "package.json")
    assert package.adapter_fingerprint == adapter.fingerprint
    (log,) = entry.glob("work/helm/open/*/server.log")
    asked = re.findall(r"^adapter (\w+)$", log.read_text(), re.MULTILINE)
    assert len(asked) >= 3
    assert set(asked) <= {"patterns", "variables"}


def test_what_the_yaml_trainer_trained_is_served_as_any_model(finished: WorkingFolder) -> None:
    package = read_record(PackageManifest, at(finished, "yaml_trainer") / "package.json")
    adapter = read_record(AdapterManifest, at(finished, "yaml_trainer") / "adapter.json")
    assert (adapter.recipe["kind"], adapter.recipe["method"]) == ("command", "lora")
    assert (package.kind, package.adapter_fingerprint) == ("model", adapter.fingerprint)


def test_the_models_own_code_is_on_record_at_every_step_and_ran_confined(finished: WorkingFolder) -> None:
    entry = at(finished, "siena")
    package = read_record(PackageManifest, entry / "package.json")
    code = fingerprint(package.code)
    assert package.code.keys() == {"configuration_siena.py", "modeling_siena.py"}
    assert read_record(AdapterManifest, entry / "adapter.json").code == code
    for stage in STAGES:
        assert read_record(StageRecord, entry / f"{stage}.json").code == code
    (training,) = entry.glob("work/train/*/program.log")
    (serving,) = entry.glob("work/helm/open/*/server.log")
    for log in (training, serving):
        assert Contained.file(log).is_file(), "left by the sandbox"
