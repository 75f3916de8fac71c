"""A package is a plain model folder that says what it was made from and answers as it was trained."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from palio.errors import Crashed
from palio.packaging.package import (
    DIVERGENCE,
    TOLERANCE,
    build_package,
    largest_difference,
    mean_divergence,
    probe_logits,
    verify_package,
)
from palio.provenance import folder_sha256
from palio.records import AdapterManifest, PackageManifest, read_record
from tests.training import Entry, tiny_base_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, base_model: Path) -> Path:
    return tiny_base_model(tmp_path_factory.mktemp("base"), base_model)


def package(entry: Entry, *, adapter: bool = True) -> PackageManifest:
    return build_package(
        base_model=entry.base,
        entry_dir=entry.folder,
        adapter=adapter,
        competition="c",
        track_id="t",
        entry="e",
    )


@pytest.fixture(scope="module")
def trained(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Entry:
    entry = Entry.create(tmp_path_factory.mktemp("trained") / "e", tiny)
    entry.finetune(max_steps=8, learning_rate=1e-2)
    package(entry)
    return entry


@pytest.fixture
def entry(trained: Entry, tmp_path: Path) -> Entry:
    """A copy of the trained and packaged entry that a test may spoil."""
    shutil.copytree(trained.folder, tmp_path / "e")
    return Entry(tmp_path / "e", trained.base)


def test_the_package_answers_as_base_plus_adapter_and_not_as_the_base(trained: Entry) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained.folder / "package")
    ours = probe_logits(AutoModelForCausalLM.from_pretrained(trained.folder / "package"), tokenizer)
    base = AutoModelForCausalLM.from_pretrained(trained.base / "model")
    untuned = probe_logits(base, tokenizer)
    adapted = probe_logits(PeftModel.from_pretrained(base, trained.folder / "adapter"), tokenizer)
    assert largest_difference(ours, adapted) < TOLERANCE
    assert largest_difference(ours, untuned) > 10 * TOLERANCE


def test_transformers_alone_loads_the_package_offline(trained: Entry) -> None:
    code = (
        "import sys; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "AutoTokenizer.from_pretrained(sys.argv[1]); AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "assert not any(name.split('.')[0] in ('palio', 'peft') for name in sys.modules)"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, str(trained.folder / "package")]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 0, run.stderr


def test_the_manifest_names_the_lineage_and_every_file(trained: Entry) -> None:
    manifest = read_record(PackageManifest, trained.folder / "package.json")
    adapter = read_record(AdapterManifest, trained.folder / "adapter.json")
    assert manifest.adapter_fingerprint == adapter.fingerprint
    assert manifest.base_model_fingerprint == adapter.base_model_fingerprint
    assert manifest.files == folder_sha256(trained.folder / "package")
    assert manifest.dtype == "float32"
    model = AutoModelForCausalLM.from_pretrained(trained.folder / "package")
    assert manifest.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert manifest.max_logit_difference is not None
    assert manifest.max_logit_difference <= TOLERANCE
    card = (trained.folder / "package" / "README.md").read_text()
    for digest in (adapter.fingerprint, adapter.dataset_sha256, adapter.base_model_fingerprint):
        assert digest in card


def test_nothing_of_this_machine_is_in_the_package(trained: Entry) -> None:
    for path in (trained.folder / "package").iterdir():
        assert path.stat().st_mode & 0o777 == 0o644
        assert str(trained.folder.parent).encode() not in path.read_bytes()
        assert str(trained.base).encode() not in path.read_bytes()


def test_packaging_twice_gives_equal_bytes(entry: Entry) -> None:
    first = read_record(PackageManifest, entry.folder / "package.json")
    assert package(entry) == first
    assert not list((entry.folder / "work").glob("package.tmp"))


def test_a_flipped_byte_is_found(entry: Entry) -> None:
    manifest = read_record(PackageManifest, entry.folder / "package.json")
    folder = entry.folder / "package"
    assert verify_package(folder, manifest) == []
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-100] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "stray.txt").write_text("?")
    (folder / "tokenizer.json").unlink()
    assert verify_package(folder, manifest) == [
        "model.safetensors: differs from the manifest",
        "stray.txt: is not in the manifest",
        "tokenizer.json: is missing",
    ]


def test_an_untuned_entry_is_its_base_model_and_takes_no_space(tiny: Path, tmp_path: Path) -> None:
    entry = Entry.create(tmp_path / "e", tiny)
    manifest = package(entry, adapter=False)
    assert manifest.adapter_fingerprint is None
    assert manifest.max_logit_difference is None
    weights = entry.folder / "package" / "model.safetensors"
    assert weights.stat().st_ino == (tiny / "model" / "model.safetensors").stat().st_ino
    AutoModelForCausalLM.from_pretrained(entry.folder / "package")


def test_a_fully_fine_tuned_model_is_packaged_as_it_is(tiny: Path, tmp_path: Path) -> None:
    entry = Entry.create(tmp_path / "e", tiny)
    entry.finetune(max_steps=2, method="full")
    manifest = package(entry)
    trained = load_file(entry.folder / "adapter" / "model.safetensors")
    packaged = load_file(entry.folder / "package" / "model.safetensors")
    assert all(torch.equal(packaged[name], trained[name]) for name in trained)
    assert {"tokenizer.json", "config.json", "README.md"} <= manifest.files.keys()


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_a_package_answers_as_the_quantised_model_that_was_trained(
    tiny: Path, tmp_path: Path, kind: str
) -> None:
    entry = Entry.create(tmp_path / "e", tiny)
    entry.finetune(max_steps=30, learning_rate=1e-2, method="qlora", quantization=kind)
    manifest = package(entry)
    assert manifest.dtype == "float32"
    assert "quantization_config" not in json.loads((entry.folder / "package/config.json").read_text())
    assert manifest.divergence is not None
    assert manifest.divergence <= DIVERGENCE
    # Merged into the base model that was never quantised, it would be further from what was trained.
    base = AutoModelForCausalLM.from_pretrained(tiny / "model")
    plain = PeftModel.from_pretrained(base, entry.folder / "adapter").merge_and_unload()
    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    ours = probe_logits(AutoModelForCausalLM.from_pretrained(entry.folder / "package"), tokenizer)
    assert mean_divergence(ours, probe_logits(plain, tokenizer)) > manifest.divergence


def test_an_adapter_that_differs_from_its_manifest_is_refused(entry: Entry) -> None:
    (entry.folder / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(Crashed, match=r"differs from adapter\.json; run finetune again"):
        package(entry)
    assert not (entry.folder / "package.json").exists()


def test_the_largest_difference_is_found_and_nan_is_not_lost() -> None:
    one, other = [torch.zeros(2, 3), torch.zeros(1, 3)], [torch.zeros(2, 3), torch.zeros(1, 3)]
    other[1][0, 2] = -0.5
    assert largest_difference(one, other) == 0.5
    other[0][1, 1] = torch.nan
    assert not largest_difference(one, other) <= 0.5


def test_a_merge_whose_logits_are_not_the_adapters_is_refused(entry: Entry) -> None:
    adapter = entry.folder / "adapter" / "adapter_model.safetensors"
    spoiled_weights = load_file(adapter)
    next(iter(spoiled_weights.values()))[0, 0] = torch.nan
    adapter.unlink()
    save_file(spoiled_weights, adapter, metadata={"format": "pt"})
    manifest = read_record(AdapterManifest, entry.folder / "adapter.json")
    spoiled = manifest.model_copy(update={"files": folder_sha256(entry.folder / "adapter")})
    spoiled.write(entry.folder / "adapter.json")
    with pytest.raises(Crashed, match="the merged model differs"):
        package(entry)


def test_a_package_keeps_the_dtype_of_its_base_model(
    tmp_path_factory: pytest.TempPathFactory, base_model: Path
) -> None:
    base = tiny_base_model(tmp_path_factory.mktemp("bf16"), base_model, torch.bfloat16)
    entry = Entry.create(tmp_path_factory.mktemp("entry") / "e", base)
    entry.finetune(max_steps=3)
    manifest = package(entry)
    assert manifest.dtype == "bfloat16"
    assert manifest.divergence is not None
    assert 0 < manifest.divergence < DIVERGENCE
    assert AutoModelForCausalLM.from_pretrained(entry.folder / "package").dtype == torch.bfloat16


def test_equal_predictions_have_no_divergence_and_others_have() -> None:
    one, other = [torch.tensor([[0.0, 0.0]])], [torch.tensor([[0.0, 1.0]])]
    assert mean_divergence(one, one) == 0
    # Half a nat of log-odds on each side: ln((1 + e) / 2) - 1/2.
    assert mean_divergence(one, other) == pytest.approx(0.1201, abs=1e-4)
