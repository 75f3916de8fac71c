"""Attacks by what a program leaves: links out of its folder, pickles, code, weights that are none."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from palio.errors import RuleViolation
from palio.records import StepFailure, read_record
from palio.sandbox.handed_in import HandedIn, take_files, take_model
from tests.support.programs import program_of, start_command
from tests.support.training import Entry, tiny_base_model

MODULE = "base_model.model.model.layers.0.self_attn.q_proj"
SETTINGS = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}


class Marker:
    """Unpickled, it makes a file: what a pickle can do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, ...]]:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def left(tmp_path: Path, tiny: Path) -> Path:
    """A result that would be taken, beside its base model."""
    folder = tmp_path / "result"
    folder.mkdir()
    (tmp_path / "base").symlink_to(tiny / "model")
    (folder / "adapter_config.json").write_text(json.dumps(SETTINGS))
    weights = {f"{MODULE}.lora_A.weight": np.zeros((4, 32), "f4")}
    weights[f"{MODULE}.lora_B.weight"] = np.zeros((32, 4), "f4")
    save_file(weights, folder / "adapter_model.safetensors")
    return folder


def take(left: Path) -> HandedIn:
    base = left.parent / "base"
    return take_model(left, left.parent / "taken", base_model=base, base_model_id="base", limit=1 << 30)


def taken(left: Path) -> set[str]:
    return {path.name for path in (left.parent / "taken").iterdir()}


def test_a_plain_adapter_is_taken_and_nothing_beside_it(left: Path) -> None:
    (left / "training_args.bin").write_bytes(pickle.dumps({}))
    (left / "modeling.py").write_text("import os")
    assert take(left) == HandedIn("lora", ["training_args.bin"])
    assert taken(left) == {"adapter_config.json", "adapter_model.safetensors"}


@pytest.fixture
def two(left: Path) -> Path:
    """A result of two adapters, each in a folder of its own, beside a checkpoint that is none."""
    both = left.parent / "both"
    for name in ("sums", "words"):
        shutil.copytree(left, both / name)
    (both / "checkpoint").mkdir()
    (both / "log.txt").write_text("step 1")
    return both


def test_several_adapters_are_taken_each_by_the_same_rules(two: Path) -> None:
    (two / "words" / "optimizer.pt").write_bytes(pickle.dumps({}))
    assert take(two) == HandedIn("lora", ["words/optimizer.pt"], ("sums", "words"))
    files = {path.relative_to(two.parent / "taken").as_posix() for path in taken_files(two)}
    names = ("adapter_config.json", "adapter_model.safetensors")
    assert files == {f"{folder}/{name}" for folder in ("sums", "words") for name in names}


def taken_files(left: Path) -> list[Path]:
    return [path for path in (left.parent / "taken").rglob("*") if path.is_file()]


def test_one_of_several_adapters_that_is_refused_is_named(two: Path) -> None:
    weights = two / "words" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(RuleViolation, match=r"adapter words: adapter_model\.safetensors is torn"):
        take(two)


def test_an_adapter_that_is_a_link_to_a_folder_is_refused(two: Path) -> None:
    shutil.move(two / "words", two.parent / "elsewhere")
    (two / "words").symlink_to(two.parent / "elsewhere")
    with pytest.raises(RuleViolation, match="both/words is a symbolic link"):
        take(two)


def test_several_adapters_share_the_limit_of_bytes(two: Path) -> None:
    size = sum(path.stat().st_size for path in (two / "words").iterdir())
    base = two.parent / "base"
    with pytest.raises(RuleViolation, match="more than the 0 allowed"):
        take_model(two, two.parent / "taken", base_model=base, base_model_id="base", limit=2 * size - 1)


@pytest.mark.parametrize("names", [["a b"], [f"a{number}" for number in range(65)]])
def test_adapters_too_many_or_of_odd_names_are_refused(left: Path, names: list[str]) -> None:
    for name in names:
        shutil.copytree(left, left.parent / "many" / name)
    with pytest.raises(RuleViolation, match=r"left \d+ adapters: .*; leave at most 64, in folders named by"):
        take(left.parent / "many")


def test_an_adapter_names_no_path_and_no_module(left: Path) -> None:
    settings = SETTINGS | {"base_model_name_or_path": "/etc", "auto_mapping": {"parent_library": "os"}}
    (left / "adapter_config.json").write_text(json.dumps(settings))
    take(left)
    kept = json.loads((left.parent / "taken" / "adapter_config.json").read_text())
    assert kept["base_model_name_or_path"] == "base"
    assert "auto_mapping" not in kept


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "tokenizer.json"])
def test_a_link_out_of_the_folder_is_not_followed(left: Path, tmp_path: Path, name: str) -> None:
    closed = tmp_path / "closed.json"
    closed.write_text('{"prompt": "secret"}')
    (left / name).unlink(missing_ok=True)
    (left / name).symlink_to(closed)
    with pytest.raises(RuleViolation, match=f"result/{name} is a symbolic link"):
        take(left)
    assert "secret" not in "".join(
        path.read_text(errors="replace") for path in (tmp_path / "taken").iterdir()
    )


def test_a_folder_or_a_pipe_in_place_of_a_file_is_refused(left: Path) -> None:
    os.mkfifo(left / "tokenizer.json")
    with pytest.raises(RuleViolation, match=r"tokenizer\.json is neither a file nor a folder"):
        take(left)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.safetensors"])
def test_a_pickle_is_named_and_never_opened(left: Path, tmp_path: Path, name: str) -> None:
    (left / "adapter_model.safetensors").unlink()
    (left / name).write_bytes(pickle.dumps(Marker(tmp_path / "ran")))
    with pytest.raises(RuleViolation, match=r"adapter_model\.(bin'|safetensors is not safetensors)"):
        take(left)
    assert not (tmp_path / "ran").exists()


def test_torn_weights_are_named(left: Path) -> None:
    weights = left / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(RuleViolation, match=r"adapter_model\.safetensors is torn"):
        take(left)


def test_config_files_are_bounded_and_json(left: Path) -> None:
    (left / "tokenizer.json").write_text("[" * 200_000)
    with pytest.raises(RuleViolation, match=r"tokenizer\.json is not JSON"):
        take(left)
    with (left / "tokenizer.json").open("wb") as stream:
        stream.truncate(65 << 20)
    with pytest.raises(RuleViolation, match="has 65 MB; at most 64 are taken"):
        take(left)


@pytest.mark.parametrize("target", ["/etc", "../closed"])
def test_links_among_the_files_a_team_hands_in_are_refused(tmp_path: Path, target: str) -> None:
    files = tmp_path / "files"
    (files / "data").mkdir(parents=True)
    (files / "data" / "link").symlink_to(target)
    with pytest.raises(RuleViolation, match="data/link is a symbolic link"):
        take_files(str(files), "command.files", tmp_path / "copy", roots=[], limit=1 << 20)


def test_what_was_refused_is_on_record_with_its_reason(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, base_model: Path
) -> None:
    entry = Entry.create(tmp_path / "entry", tiny_base_model(tmp_path_factory.mktemp("base"), base_model))
    code = """
import os
result = os.environ["PALIO_OUTPUT"]
os.symlink("/etc/passwd", result + "/adapter_config.json")
"""
    step = start_command(entry, program_of(tmp_path / "files", code))
    _, said = step.communicate(timeout=60)
    failure = read_record(StepFailure, entry.folder / "work" / "failures" / "finetune.json")
    assert (step.returncode, failure.state) == (RuleViolation.exit_code, "rule_violation")
    assert "result/adapter_config.json is a symbolic link; put the file" in failure.reason
    assert failure.reason in said
