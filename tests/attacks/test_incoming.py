"""Attacks by names: links and indexes that lead from a team's files to another team's, or to a secret."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from palio.base_model import fetch_base_model
from palio.config import BaseModelSource, load_competition
from palio.eligibility.entry_file import check_file
from palio.errors import Crashed, PalioError, RuleViolation
from palio.incoming import Incoming, copy_files
from palio.packaging.verify import verify_package
from palio.provenance import folder_sha256
from palio.records import PackageManifest, read_record
from palio.settings import CheckedAgainst
from tests.support.curation import curate, pairs_of, recipe, write_jsonl
from tests.support.folder import ROOT
from tests.support.programs import HANDS_IN, program_of, run_command
from tests.support.training import Entry

INDEX = "model.safetensors.index.json"
SHARD = "model-0000{}-of-00002.safetensors"


# --- what a training program leaves ----------------------------------------------------------------------


def swaps_its_result_for(target: Path | str) -> str:
    return f"""
import os
os.rmdir(os.environ["PALIO_OUTPUT"])
os.symlink({str(target)!r}, os.environ["PALIO_OUTPUT"])
"""


def test_a_result_that_is_a_link_to_another_teams_adapter_is_refused(entry: Entry, tmp_path: Path) -> None:
    victim = Entry.create(tmp_path / "victim", entry.base)
    run_command(victim, program_of(tmp_path / "honest", HANDS_IN + "hand_in()"))
    thief = program_of(tmp_path / "files", swaps_its_result_for(victim.folder / "adapter"))
    with pytest.raises(RuleViolation, match=r"entry/work/.*/program/result is a symbolic link"):
        run_command(entry, thief)
    assert not (entry.folder / "adapter.json").exists()


def test_a_result_that_is_a_link_to_a_home_tells_no_name_of_it(entry: Entry, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "diary.txt").write_text("secret")
    with pytest.raises(RuleViolation) as stop:
        run_command(entry, program_of(tmp_path / "files", swaps_its_result_for(tmp_path / "home")))
    assert "diary" not in str(stop.value)


def test_a_program_that_left_a_link_and_is_started_again_is_still_judged(
    entry: Entry, tmp_path: Path
) -> None:
    code = """
import os, sys
if os.path.islink(os.environ["PALIO_OUTPUT"]):
    sys.exit(0)
"""
    code += swaps_its_result_for("/nowhere") + "\nsys.exit(1)"
    program = program_of(tmp_path / "files", code)
    with pytest.raises(Crashed):
        run_command(entry, program)
    with pytest.raises(RuleViolation, match="result is a symbolic link"):
        run_command(entry, program)


HANDS_IN_SHARDS = """
import json, os, shutil
from pathlib import Path
from safetensors.numpy import load_file, save_file
base, result = Path(os.environ["PALIO_BASE_MODEL"]), Path(os.environ["PALIO_OUTPUT"])
shutil.copy(base / "config.json", result)
weights = load_file(base / "model.safetensors")
names = sorted(weights)
weight_map = {}
for number, part in enumerate((names[::2], names[1::2]), start=1):
    file = SHARD.format(number)
    save_file({name: weights[name] for name in part}, result / file, metadata={"format": "pt"})
    weight_map |= dict.fromkeys(part, file)
index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
""".replace("SHARD", repr(SHARD))


def test_an_index_that_names_another_teams_weights_is_refused(entry: Entry, tmp_path: Path) -> None:
    stolen = "../../../../../victim/adapter/model.safetensors"
    code = (
        HANDS_IN_SHARDS
        + f"""
weight_map[names[0]] = {stolen!r}
(result / {INDEX!r}).write_text(json.dumps(index))
"""
    )
    with pytest.raises(RuleViolation, match=rf"result/{INDEX} names '{stolen}'; it may name only files"):
        run_command(entry, program_of(tmp_path / "files", code))
    assert not (entry.folder / "adapter.json").exists()


@pytest.mark.parametrize(
    "last_line",
    ["index['weight_map'] = dict.fromkeys(names, weight_map[names[0]])", "index = None"],
    ids=["an index that is wrong", "no index"],
)
def test_the_index_of_a_package_is_palios_own(entry: Entry, tmp_path: Path, last_line: str) -> None:
    code = (
        HANDS_IN_SHARDS
        + f"""
{last_line}
if index:
    index["weight_map"]["more"] = weight_map[names[1]]
    (result / {INDEX!r}).write_text(json.dumps(index))
"""
    )
    run_command(entry, program_of(tmp_path / "files", code))
    manifest = entry.package()
    folder = entry.folder / "package"
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    for shard in (SHARD.format(1), SHARD.format(2)):
        held = {name for name, file in weight_map.items() if file == shard}
        assert held == set(load_file(folder / shard))
    loaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all((loaded[name].numpy() == weights).all() for name, weights in
               load_file(entry.base / "model" / "model.safetensors").items())  # fmt: skip
    findings = {one.check: one for one in verify_package(folder, load=False)}
    assert (findings["files"].state, manifest.files[INDEX]) == ("pass", folder_sha256(folder)[INDEX])


def test_two_files_with_the_same_tensor_are_refused(entry: Entry, tmp_path: Path) -> None:
    code = HANDS_IN_SHARDS + "shutil.copy(result / weight_map[names[0]], result / 'other.safetensors')"
    with pytest.raises(RuleViolation, match=r"both hold the tensor .*; leave one model in the result"):
        run_command(entry, program_of(tmp_path / "files", code))


def test_a_result_larger_than_the_programs_disk_is_not_copied(tmp_path: Path) -> None:
    with (tmp_path / "sparse.safetensors").open("wb") as stream:
        stream.truncate(1 << 40)
    (tmp_path / "taken").mkdir()
    with pytest.raises(RuleViolation, match="1048576 MB, more than the 1024 allowed"):
        copy_files([Incoming(tmp_path, "sparse.safetensors")], tmp_path / "taken", limit=1 << 30)
    assert list((tmp_path / "taken").iterdir()) == []


# --- packages and base models ----------------------------------------------------------------------------


def test_a_package_whose_index_leaves_it_is_refused_and_not_loaded(entry: Entry) -> None:
    entry.package(adapter=False)
    folder = entry.folder / "package"
    (folder / "model.safetensors").rename(entry.folder / "model.safetensors")
    weight_map = dict.fromkeys(load_file(entry.folder / "model.safetensors"), "../model.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    manifest = read_record(PackageManifest, entry.folder / "package.json")
    manifest.model_copy(update={"files": folder_sha256(folder)}).write(entry.folder / "package.json")
    findings = {one.check: one for one in verify_package(folder)}
    assert findings["files"].state == "fail"
    assert f"{INDEX} names '../model.safetensors'" in findings["files"].why
    assert findings["loads without Palio"].state == "skipped"


def test_a_base_model_whose_index_leaves_its_folder_is_refused(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny / "model", tmp_path / "base")
    (tmp_path / "base" / INDEX).write_text(json.dumps({"weight_map": {"a": "/secret.safetensors"}}))
    with pytest.raises(RuleViolation, match=rf"base/{INDEX} names '/secret\.safetensors'"):
        fetch_base_model(BaseModelSource(path=str(tmp_path / "base")), tmp_path / "out")


# --- sources ---------------------------------------------------------------------------------------------

TEAMS = Path("resources/teams")
ROWS = [{"prompt": f"{number}?", "completion": "yes"} for number in range(20)]
SECRET = [{"prompt": "The closed stage's 42nd question?", "completion": "secret"}]


@pytest.fixture
def competition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a team's folder, beside a saved dataset and a file that no team may read."""
    Dataset.from_list(SECRET).save_to_disk(tmp_path / "closed" / "saved")
    write_jsonl(tmp_path / "closed" / "rows.jsonl", SECRET)
    (tmp_path / "competition" / TEAMS / "acme").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "competition")
    return tmp_path


def refusals(source: str) -> list[str]:
    """What `palio check` says of an entry with this source."""
    against = CheckedAgainst.of(load_competition(ROOT / "config/neurips2023.yaml"))
    rules = against.model_copy(update={"rules": str(ROOT / "config/rulesets/neurips2023.yaml")})
    entry: dict[str, Any] = {
        "team": "acme",
        "track": "a100",
        "base_model": {"hub": f"mistralai/Mistral-7B-v0.1@{'0' * 40}"},
        "dataset": {"sources": [{"path": source, "licence": "MIT", "url": "https://example.org/a"}]},
        "finetune": {"learning_rate": 2e-4},
    }
    Path("acme.yaml").write_text(yaml.safe_dump(entry))
    return [f"{one.rule}: {one.why}" for one in check_file(Path("acme.yaml"), rules).violations]


def curated(source: str) -> list[tuple[str, str]]:
    """The rows that `palio curate` makes of the source."""
    curate(recipe([{"path": source}]), Path("dataset"), team_folders=[TEAMS])
    return sorted(pairs_of(Path("dataset/train.parquet")))


def refused_by_check_and_curation(source: str, why: str) -> None:
    (line,) = refusals(source)
    assert line.startswith("data.path: ")
    assert why in line
    with pytest.raises(RuleViolation) as stop:
        curated(source)
    assert why in str(stop.value)


def saved_dataset(*, shards: int = 1) -> Path:
    folder = TEAMS / "acme" / "saved"
    Dataset.from_list(ROWS).save_to_disk(folder, num_shards=shards)
    return folder


@pytest.mark.parametrize("absolute", [False, True])
def test_a_saved_dataset_that_names_a_table_elsewhere_is_refused(competition: Path, absolute: bool) -> None:
    folder = saved_dataset()
    (secret,) = (competition / "closed" / "saved").glob("*.arrow")
    named = str(secret) if absolute else os.path.relpath(secret, folder)
    state = json.loads((folder / "state.json").read_text())
    state["_data_files"] = [{"filename": named}]
    (folder / "state.json").write_text(json.dumps(state))
    refused_by_check_and_curation(str(folder), f"{folder}/state.json names {named!r}")


@pytest.mark.parametrize("name", ["data-00000-of-00001.arrow", "state.json"])
def test_a_link_in_a_saved_dataset_is_refused(competition: Path, name: str) -> None:
    folder = saved_dataset()
    (folder / name).unlink()
    (folder / name).symlink_to(competition / "closed" / "saved" / name)
    refused_by_check_and_curation(str(folder), f"{folder}/{name} is a symbolic link")


def test_a_record_that_names_a_file_does_not_have_it_opened(competition: Path) -> None:
    folder = TEAMS / "acme" / "saved"
    image = {"bytes": None, "path": str(competition / "closed" / "rows.jsonl")}
    Dataset.from_list([row | {"image": image} for row in ROWS]).save_to_disk(folder)
    information = json.loads((folder / "dataset_info.json").read_text())
    information["features"]["image"] = {"_type": "Image"}
    (folder / "dataset_info.json").write_text(json.dumps(information))
    template = {"prompt": "{{ prompt }}", "completion": "{{ image.path }}"}
    curate(recipe([{"path": str(folder), "template": template}]), Path("dataset"), team_folders=[TEAMS])
    assert {completion for _, completion in pairs_of(Path("dataset/train.parquet"))} == {image["path"]}


@pytest.mark.parametrize(
    ("source", "swapped", "target"),
    [
        ("acme/rows.jsonl", "acme/rows.jsonl", "closed/rows.jsonl"),
        ("acme/rows.jsonl", "acme", "closed"),
        ("acme/data/rows.jsonl", "acme/data", "closed"),
        ("acme/saved", "acme/saved", "closed/saved"),
    ],
)
def test_a_source_that_becomes_a_link_after_the_check_is_not_read(
    competition: Path, source: str, swapped: str, target: str
) -> None:
    for file in ("acme/rows.jsonl", "acme/data/rows.jsonl"):
        write_jsonl(TEAMS / file, ROWS)
    saved_dataset()
    assert refusals(str(TEAMS / source)) == []
    (TEAMS / swapped).rename(TEAMS / "before")
    (TEAMS / swapped).symlink_to(competition / target)
    refused_by_check_and_curation(str(TEAMS / source), f"{TEAMS / swapped} is a symbolic link")
    assert not Path("dataset").exists()


@pytest.mark.parametrize("source", ["../closed/rows.jsonl", "resources/teams/../../../closed/rows.jsonl"])
def test_a_source_outside_the_team_folders_is_refused(competition: Path, source: str) -> None:
    refused_by_check_and_curation(source, f"{source} does not lie in resources/teams")


def test_a_pipe_as_a_source_is_refused_and_blocks_nobody(competition: Path) -> None:
    os.mkfifo(TEAMS / "acme" / "rows.jsonl")
    refused_by_check_and_curation(str(TEAMS / "acme/rows.jsonl"), "rows.jsonl is neither a file nor a folder")


def test_a_message_has_one_line_whatever_a_file_is_called(competition: Path) -> None:
    folder = saved_dataset()
    (folder / "line\nbreak").symlink_to("/etc")
    with pytest.raises(PalioError) as stop:
        curated(str(folder))
    assert "\n" not in str(stop.value)


# --- what honest teams and organizers do -----------------------------------------------------------------


def expected() -> list[tuple[str, str]]:
    return sorted((row["prompt"], row["completion"]) for row in ROWS)


def test_a_saved_dataset_of_two_tables_gives_all_its_rows(competition: Path) -> None:
    folder = saved_dataset(shards=2)
    assert len(list(folder.glob("*.arrow"))) == 2
    assert refusals(str(folder)) == []
    assert curated(str(folder)) == expected()


@pytest.mark.parametrize("link", ["resources", "resources/teams"])
@pytest.mark.parametrize("absolute", [False, True])
def test_links_above_the_teams_folders_are_the_organizers(
    competition: Path, link: str, absolute: bool
) -> None:
    write_jsonl(TEAMS / "acme/rows.jsonl", ROWS)
    Path(link).rename(competition / "storage")
    Path(link).symlink_to(competition / "storage")
    source = (TEAMS / "acme/rows.jsonl").resolve() if absolute else TEAMS / "acme/rows.jsonl"
    assert refusals(str(source)) == []
    assert curated(str(source)) == expected()
