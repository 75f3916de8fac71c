"""What Snakemake plans, from a dry run: nothing is trained here."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from palio.layout import CONFIG
from palio.operating.attempt import RUN_VARIABLE
from palio.workflow import Workflow
from tests.support.folder import DEMO_ENTRIES, WorkingFolder

STEPS = {"check_entry", "build_package", "helm_open", "helm_closed"}
TRAINING = {"curate_dataset", "finetune", "measure_contamination"}


def test_a_fresh_clone_plans_every_step_of_every_entry(folder: WorkingFolder) -> None:
    plan = folder.plan()
    for entry in ("curated", "raw", "open_only"):
        assert {rule for rule, of in plan if of == entry} == STEPS | TRAINING
    assert {rule for rule, of in plan if of == "untuned"} == STEPS
    assert {rule for rule, of in plan if not of} >= {"fetch_base_model", "prepare_stage", "score", "report"}


def test_a_server_entry_is_neither_curated_nor_trained(folder: WorkingFolder) -> None:
    folder.edit_yaml("config/config.yaml", lambda config: config.update(entries=["config/entries/examples"]))
    plan = folder.plan()
    assert {rule for rule, of in plan if of == "peft_script"} == STEPS | TRAINING
    assert {rule for rule, of in plan if of == "server2023"} == STEPS


def test_the_slurm_profile_plans_the_same_as_the_local_one(folder: WorkingFolder) -> None:
    assert folder.plan(profile="slurm") == folder.plan()


def test_the_competition_of_2023_plans_from_a_fresh_clone(folder: WorkingFolder) -> None:
    plan = folder.plan("--configfile", "config/neurips2023.yaml")
    trained = {entry for rule, entry in plan if rule == "finetune"}
    assert len(trained) == 2
    assert "curated" not in trained, "--configfile must replace the demo, not be merged into it"


def test_gpu_steps_ask_for_one_gpu_memory_and_the_budget_with_its_margin(folder: WorkingFolder) -> None:
    done = folder.snakemake("--configfile", "config/neurips2023.yaml", "--dry-run", "--verbose")
    blocks = (done.stdout + done.stderr).split("\nrule ")
    limits = {"finetune": 26 * 60, "helm_open": 330, "helm_closed": 630}
    for rule, minutes in limits.items():
        found = [block for block in blocks if block.startswith(f"{rule}:")]
        assert found
        for block in found:
            resources = next(line for line in block.splitlines() if "resources:" in line)
            assert "gpu=1" in resources
            assert f"runtime={minutes}" in resources
            assert "mem_mb=131072" in resources


def test_a_broken_entry_file_does_not_stop_the_plan_of_the_others(folder: WorkingFolder) -> None:
    (folder.path / DEMO_ENTRIES / "broken.yaml").write_text("team: x\ntrack: laptop\nbase_modell: {}\n")
    folder.edit_yaml("config/config.yaml", lambda config: config.update(site="public"))
    plan = folder.plan()
    assert {rule for rule, entry in plan if entry == "broken"} == {"check_entry"}, "no GPU job either"
    assert ("finetune", "curated") in plan


def test_a_job_of_one_entry_reads_no_other_entrys_file(
    folder: WorkingFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A SLURM job parses the rules twice: reading all entries there would cost with the square of them."""
    monkeypatch.chdir(folder.path)
    rules = Workflow(yaml.safe_load(Path("config/config.yaml").read_text()))
    for file in (folder.path / DEMO_ENTRIES).glob("*.yaml"):
        if file.stem != "curated":
            file.unlink()
    curated = SimpleNamespace(track="laptop", entry="curated")
    assert "learning_rate" in rules.settings("finetune")(curated)
    assert rules.base_model_manifest(curated)
    assert len(rules.faults) == 3, "only now are the others missed"


def test_a_job_does_what_its_run_planned_whatever_the_files_say_now(
    folder: WorkingFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.path)
    Workflow(CONFIG).save("tonight")
    (folder.path / CONFIG).write_text("competition: [in the middle of an edit")
    (folder.path / DEMO_ENTRIES / "raw.yaml").unlink()
    job = ("--target-jobs", "check_entry:track=laptop,entry=raw", "--allowed-rules", "check_entry", "--force")
    inside = (
        "--mode",
        "remote",
        "--executor",
        "local",
        "--cores",
        "1",
        "--nolock",
        "--dry-run",
        "--printshellcmds",
    )
    done = folder.run(
        "snakemake",
        "--snakefile",
        "Snakefile",
        *job,
        *inside,
        environment=os.environ | {RUN_VARIABLE: "tonight"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "exec palio step check results/laptop/raw --settings" in done.stdout + done.stderr


def test_data_held_against_the_open_stage_waits_for_its_instances(folder: WorkingFolder) -> None:
    """Even where curation is all that is asked for."""

    def decontaminate(entry: dict[str, Any]) -> None:
        entry["dataset"]["operations"].append({"op": "decontaminate"})

    dataset = "results/laptop/curated/dataset/manifest.json"
    assert ("prepare_stage", "") not in folder.plan(dataset)
    folder.edit_entry("curated", decontaminate)
    assert ("prepare_stage", "") in folder.plan(dataset)


def test_a_withdrawn_entry_is_not_planned(folder: WorkingFolder) -> None:
    folder.edit_yaml("config/config.yaml", lambda config: config.update(withdrawn={"raw": "asked to"}))
    assert "raw" not in {entry for _, entry in folder.plan()}


@pytest.mark.parametrize(
    ("file", "before", "after", "line"),
    [
        (
            "config/config.yaml",
            "title: Palio demo",
            "titel: Palio demo",
            "titel is 'Palio demo': unknown key",
        ),
        (
            "config/config.yaml",
            "config/helm/demo/parity",
            "config/helm/demo/party",
            "no such run-entries file",
        ),
        ("config/config.yaml", "weight: 1/3", "weight: 1/2", "make them add up to 1"),
        ("config/config.yaml", "config/rulesets/demo.yaml", "config/rulesets/none.yaml", "no such file"),
        ("config/helm/demo/parity.conf", "=0", "=0,model=x", "drop model="),
        ("config/helm/demo/parity.conf", "simple_c", "simpel_c", "did you mean simple_classification?"),
    ],
)
def test_a_wrong_config_stops_with_one_line_and_no_traceback(
    folder: WorkingFolder, file: str, before: str, after: str, line: str
) -> None:
    path = folder.path / file
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))
    done = folder.snakemake("--dry-run")
    assert done.returncode != 0
    said = done.stdout + done.stderr  # a dry run says it on the first
    assert line in said
    assert "Traceback" not in said
