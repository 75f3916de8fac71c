"""A package is a plain model folder that says what it was made from and answers as it was trained."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import requests
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GPT2Config, GPT2LMHeadModel

from palio.base_model import card_facts
from palio.config import Track
from palio.errors import Crashed
from palio.network import free_port
from palio.packaging.container import write_container
from palio.packaging.package import (
    DIVERGENCE,
    adapted_model,
    largest_difference,
    probe_logits,
)
from palio.packaging.publish import assemble
from palio.packaging.verify import verify_package
from palio.provenance import folder_sha256
from palio.records import AdapterManifest, BaseModelManifest, Cell, Column, PackageManifest, read_record
from palio.scoring.leaderboard import Candidate, score
from palio.tensors import mean_divergence
from tests.support.training import Entry, tiny_base_model

ROUNDING = 1e-3
"""Largest change of a logit of these small models, in fp32."""


def package(entry: Entry, *, adapter: bool = True) -> PackageManifest:
    return entry.package(adapter=adapter)


@pytest.fixture(scope="module")
def trained(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Entry:
    entry = Entry.create(tmp_path_factory.mktemp("trained") / "t/e", tiny)
    entry.finetune(max_steps=8, learning_rate=1e-2)
    package(entry)
    return entry


@pytest.fixture
def entry(trained: Entry, tmp_path: Path) -> Entry:
    """A copy of the trained and packaged entry that a test may spoil."""
    shutil.copytree(trained.folder, tmp_path / "t/e")
    return Entry(tmp_path / "t/e", trained.base)


def test_the_package_answers_as_base_plus_adapter_and_not_as_the_base(trained: Entry) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained.folder / "package")
    ours = probe_logits(AutoModelForCausalLM.from_pretrained(trained.folder / "package"), tokenizer)
    base = AutoModelForCausalLM.from_pretrained(trained.base / "model")
    untuned = probe_logits(base, tokenizer)
    adapted = probe_logits(PeftModel.from_pretrained(base, trained.folder / "adapter"), tokenizer)
    assert largest_difference(ours, adapted) < ROUNDING
    assert largest_difference(ours, untuned) > 10 * ROUNDING


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
    assert manifest.context == model.config.max_position_embeddings
    assert manifest.max_logit_difference is not None
    assert manifest.max_logit_difference <= ROUNDING
    card = (trained.folder / "package" / "README.md").read_text()
    for digest in (adapter.fingerprint, adapter.dataset_sha256, adapter.base_model_fingerprint):
        assert digest in card


def test_nothing_of_this_machine_is_in_the_package(trained: Entry) -> None:
    for path in (trained.folder / "package").iterdir():
        assert path.stat().st_mode & 0o777 == 0o644
        assert str(trained.folder.parent).encode() not in path.read_bytes()
        assert str(trained.base).encode() not in path.read_bytes()


def test_packaging_twice_gives_equal_bytes(entry: Entry) -> None:
    first = package(entry)
    assert package(entry) == first
    assert not list((entry.folder / "work").glob("package.tmp"))


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


def edited(base: Path, target: Path, *names: str, **keys: object) -> Path:
    """Copy a base model, some of its JSON files with other keys."""
    shutil.copytree(base, target)
    for name in names:
        add(target / "model" / name, **keys)
    manifest = read_record(BaseModelManifest, target / "manifest.json")
    files = folder_sha256(target / "model")
    manifest.model_copy(update={"files": files}).write(target / "manifest.json")
    return target


@pytest.mark.parametrize("adapter", [True, False])
def test_code_named_beside_a_family_that_transformers_knows_is_left_out_of_the_package(
    tiny: Path, tmp_path: Path, adapter: bool
) -> None:
    code = {"AutoModelForCausalLM": "modeling_llama.Evil", "AutoTokenizer": ["tokenization_llama.Evil", None]}
    base = edited(tiny, tmp_path / "base", "config.json", "tokenizer_config.json", auto_map=code)
    entry = Entry.create(tmp_path / "e", base)
    if adapter:
        entry.finetune(max_steps=1)
    package(entry, adapter=adapter)
    found = verify_package(entry.folder / "package", load=False)
    assert [one.state for one in found if one.check == "no code"] == ["pass"]
    for name in ("config.json", "tokenizer_config.json"):
        assert "auto_map" not in json.loads((entry.folder / "package" / name).read_text())
        assert "auto_map" in json.loads((base / "model" / name).read_text())


@pytest.mark.parametrize("named", [None, 5, [5, 6]])
def test_a_package_stops_at_the_trained_end_token_whatever_the_base_model_names(
    tiny: Path, tmp_path: Path, named: object
) -> None:
    base = edited(tiny, tmp_path / "base", "config.json", "generation_config.json", eos_token_id=named)
    entry = Entry.create(tmp_path / "e", base)
    entry.finetune(max_steps=1)
    package(entry)
    ends = GenerationConfig.from_pretrained(entry.folder / "package").eos_token_id
    end = AutoTokenizer.from_pretrained(base / "model").eos_token_id
    assert set(ends) == {end, *(named if isinstance(named, list) else [named] if named else [])}
    assert json.loads((base / "model/generation_config.json").read_text())["eos_token_id"] == named


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
    manifest_of_adapter = read_record(AdapterManifest, entry.folder / "adapter.json")
    _, trained = adapted_model(tiny / "model", entry.folder / "adapter", manifest_of_adapter)
    assert trained is not None
    assert mean_divergence(trained, probe_logits(plain, tokenizer)) > manifest.divergence


def test_transposed_layers_are_dequantised_as_they_were_trained(tiny: Path, tmp_path: Path) -> None:
    """GPT-2's, which are square for attention's output."""
    base = tmp_path / "base"
    shutil.copytree(tiny, base)
    (base / "model" / "model.safetensors").unlink()
    size = len(AutoTokenizer.from_pretrained(base / "model"))
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=size, n_embd=32, n_layer=2, n_head=4)
    GPT2LMHeadModel(config).save_pretrained(base / "model")
    entry = Entry.create(tmp_path / "e", base)
    entry.finetune(max_steps=30, learning_rate=1e-2, method="qlora")
    divergence = package(entry).divergence
    assert divergence is not None
    assert divergence < 1e-6


def test_an_adapter_that_differs_from_its_manifest_is_refused(entry: Entry) -> None:
    (entry.folder / "adapter" / "adapter_config.json").write_text("{}")
    before = entry.folder.joinpath("package.json").read_bytes()
    with pytest.raises(Crashed, match=r"differs from adapter\.json; run finetune again"):
        package(entry)
    assert entry.folder.joinpath("package.json").read_bytes() == before, "the earlier package stands"


def test_the_largest_difference_is_found_and_nan_is_not_lost() -> None:
    one, other = torch.zeros(3, 3), torch.zeros(3, 3)
    other[2, 2] = -0.5
    assert largest_difference(one, other) == 0.5
    other[1, 1] = torch.nan
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
    one, other = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert mean_divergence(one, one) == 0
    # Half a nat of log-odds on each side: ln((1 + e) / 2) - 1/2.
    assert mean_divergence(one, other) == pytest.approx(0.1201, abs=1e-4)


# --- verify, container, publish --------------------------------------------------------------------------


def states(folder: Path, base: Path, track: Track | None = None) -> dict[str, str]:
    found = verify_package(folder, base_models=base.parent, track=track)
    return {one.check: f"{one.state}: {one.why}" for one in found}


@pytest.fixture
def bases(trained: Entry, tmp_path: Path) -> Path:
    """A folder of base models in which the entry's lies under its id."""
    folder = tmp_path / "base_models"
    folder.mkdir()
    (folder / "tiny").symlink_to(trained.base)
    return folder


def test_a_package_as_it_was_made_passes_every_check(trained: Entry, bases: Path) -> None:
    track = Track.model_validate({"title": "t", "ram_gb": 4, "training_budget": "1h"})
    found = states(trained.folder / "package", bases / "tiny", track)
    assert [name for name, state in found.items() if state.startswith("fail")] == []
    assert [name for name, state in found.items() if state.startswith("skipped")] == ["container"]
    assert "logits of base plus adapter within" in found["is what was trained"]


@pytest.mark.parametrize(
    ("spoil", "check", "why"),
    [
        (lambda folder: flip(folder / "model.safetensors"), "files", "model.safetensors differs"),
        (lambda folder: flip(folder / "tokenizer.json"), "files", "tokenizer.json differs"),
        (lambda folder: (folder / "stray.txt").write_text("?"), "files", "stray.txt is not in the manifest"),
        (lambda folder: (folder / "model.bin").write_bytes(b"?"), "no code", "could run code"),
        (lambda folder: add(folder / "config.json", auto_map={"x": "y"}), "no code", "asks for custom code"),
        (lambda folder: (folder / "generation_config.json").unlink(), "complete", "generation_config.json"),
        (lambda folder: (folder / "README.md").write_text("# A model\n"), "cards", "does not name the base"),
        (lambda folder: (folder / "DATA_CARD.md").unlink(), "cards", "DATA_CARD.md is missing"),
    ],
)
def test_what_is_wrong_with_a_package_is_named_and_nothing_of_it_is_loaded(
    entry: Entry, spoil: Callable[[Path], object], check: str, why: str
) -> None:
    spoil(entry.folder / "package")
    found = states(entry.folder / "package", entry.base)
    assert found[check].startswith("fail")
    assert why in found[check]
    assert found["loads without Palio"].startswith("skipped: nothing is loaded while 'files' fails")


def flip(path: Path) -> None:
    """One bit of one byte."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)


def add(path: Path, **keys: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def forge(entry: Entry) -> None:
    """A manifest that agrees with whatever is in the folder."""
    manifest = read_record(PackageManifest, entry.folder / "package.json")
    files = folder_sha256(entry.folder / "package")
    manifest.model_copy(update={"files": files}).write(entry.folder / "package.json")


def test_other_weights_under_a_forged_manifest_are_found_by_their_answers(entry: Entry, bases: Path) -> None:
    shutil.copyfile(bases / "tiny/model/model.safetensors", entry.folder / "package/model.safetensors")
    forge(entry)
    found = states(entry.folder / "package", bases / "tiny")
    assert found["files"].startswith("pass")
    assert found["is what was trained"].startswith("fail: differs from base plus adapter")


def test_weights_that_are_no_numbers_are_found_when_they_are_loaded(entry: Entry) -> None:
    weights = load_file(entry.folder / "package/model.safetensors")
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], torch.nan)
    save_file(weights, entry.folder / "package/model.safetensors", metadata={"format": "pt"})
    forge(entry)
    assert states(entry.folder / "package", entry.base)["loads without Palio"] == (
        "fail: its logits are not finite"
    )


def test_a_package_too_large_for_its_track_is_refused(trained: Entry) -> None:
    track = Track.model_validate({"title": "t", "ram_gb": 4, "gpu_memory_gb": 1e-3, "training_budget": "1h"})
    (memory,) = [
        one
        for one in verify_package(trained.folder / "package", track=track, load=False)
        if one.check == "memory"
    ]
    assert memory.state == "fail"
    assert "the track has 0.001 GB of GPU memory" in memory.why


def test_the_command_names_the_flipped_byte_and_fails(entry: Entry) -> None:
    flip(entry.folder / "package/model.safetensors")
    command = [sys.executable, "-m", "palio.cli", "verify", str(entry.folder / "package")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 6
    assert "fail     files: model.safetensors differs from the manifest" in run.stdout
    assert "Traceback" not in run.stderr


def test_the_model_card_carries_the_hubs_metadata_and_the_licence_of_the_base_model(
    entry: Entry, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(entry.base, base)
    (base / "model" / "README.md").write_text("---\nlicense: llama2\n---\n# The base model\n")
    manifest = read_record(BaseModelManifest, base / "manifest.json")
    manifest.model_copy(update={"files": folder_sha256(base / "model")}).write(base / "manifest.json")
    package(Entry(entry.folder, base), adapter=False)
    facts = card_facts(entry.folder / "package")
    assert facts["license"] == "llama2"
    assert facts["tags"] == ["palio", "c"]
    assert "2048 tokens" in (entry.folder / "package/README.md").read_text()


def test_the_container_pins_image_and_packages_and_its_code_serves_the_package(
    trained: Entry, tmp_path: Path
) -> None:
    write_container(tmp_path)
    assert re.search(r"^FROM \S+@sha256:[0-9a-f]{64}$", (tmp_path / "Containerfile").read_text(), re.M)
    lock = (tmp_path / "requirements.lock").read_text().splitlines()
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+", line) for line in lock)
    assert {"torch", "transformers", "fastapi", "safetensors"} <= {line.partition("==")[0] for line in lock}
    assert not {"crfm-helm", "snakemake", "pandas"} & {line.partition("==")[0] for line in lock}
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "palio.cli", "serve", str(trained.folder / "package"), "--port"]
    with subprocess.Popen(
        [*command, str(free_port())], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stderr is not None
            log = ""
            for line in server.stderr:
                log += line
                if line.startswith("palio serves on "):
                    break
            else:
                pytest.fail(log)
            reply = requests.post(
                f"{line.split()[-1]}/process", json={"prompt": "Say red 5:", "max_new_tokens": 2}, timeout=60
            )
            assert reply.status_code == 200
            assert reply.json()["tokens"]
        finally:
            server.terminate()


def test_of_a_teams_own_server_the_files_are_checked_and_nothing_is_run(entry: Entry) -> None:
    manifest = read_record(PackageManifest, entry.folder / "package.json")
    (entry.folder / "package" / "serve.py").write_text("raise SystemExit\n")
    files = folder_sha256(entry.folder / "package")
    manifest.model_copy(update={"kind": "server", "files": files}).write(entry.folder / "package.json")
    assert states(entry.folder / "package", entry.base) == {
        "files": f"pass: {len(files)} files have the sha256 of the manifest"
    }


def test_publishing_shows_what_it_would_push_and_pushes_nothing(entry: Entry) -> None:
    command = [sys.executable, "-m", "palio.cli", "publish", str(entry.folder), "--repo", "acme/tiny"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "would be pushed to acme/tiny; add --push to do it" in run.stderr
    folder = entry.folder / "work/publish"
    assert {"README.md", "DATA_CARD.md", "model.safetensors"} <= {path.name for path in folder.iterdir()}
    found = {one.check: one.state for one in verify_package(folder, load=False)}
    assert found["files"] == found["container"] == found["cards"] == "pass"


def test_a_published_package_tells_its_scores(entry: Entry, tmp_path: Path) -> None:
    columns = [Column(stage="open", scenario="s", metric="EM")]
    candidates = [Candidate("e", "A", [Cell(value=0.5, n=10)]), Candidate("f", "B", [Cell(value=0.25, n=10)])]
    track = read_record(PackageManifest, entry.folder / "package.json").track
    board = score(
        competition="c", track=track, columns=columns, candidates=candidates, stage_weights={"open": 1.0}
    )
    board.write(tmp_path / "t.json")
    card = (assemble(entry.at, tmp_path / "t.json") / "palio/SCORES.md").read_text()
    assert f"Rank 1 of 2 in track {track} of c (provisional)" in card
    assert "| open | s | EM | 0.5000 | 10 | 1.000 |" in card


def test_a_damaged_package_is_not_published(entry: Entry) -> None:
    flip(entry.folder / "package/model.safetensors")
    with pytest.raises(Crashed, match="differs from the manifest; package the entry again"):
        assemble(entry.at)
