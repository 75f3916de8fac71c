"""Attacks by what a model's files say: settings that make a loader build, compute or import what is not
theirs to decide, and weight files that lie about themselves."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from palio.errors import RuleViolation
from palio.packaging.verify import Finding, verify_package
from palio.provenance import folder_sha256
from palio.records import PackageManifest, read_record
from palio.sandbox.handed_in import take_model
from palio.sandbox.model_files import adapter_settings, check_tokenizer, tensors
from tests.support.training import Entry

SECONDS = 5.0
MODULE = "base_model.model.model.layers.0.self_attn.q_proj"
SETTINGS: dict[str, Any] = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}


def refusal(content: object) -> str:
    with pytest.raises(RuleViolation) as stop:
        adapter_settings(content, "base", 32)
    return str(stop.value)


# --- adapter_config.json ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"r": 10**9},
        {"r": 10**400},
        {"r": 0},
        {"r": True},
        {"r": 4.0},
        {"lora_alpha": float("nan")},
        {"lora_alpha": float("inf")},
        {"target_modules": "(a+)+$"},
        {"target_modules": [".*"]},
        {"target_modules": ["../x"]},
        {"target_modules": []},
        {"target_modules": ["q_proj"] * 3000},
        {"exclude_modules": "(a|a)*b"},
        {"modules_to_save": ["lm_head; import os"]},
        {"layers_to_transform": list(range(10**5))},
        {"layers_to_transform": -1},
        {"layers_pattern": ["(x+x+)+y"]},
        {"rank_pattern": {"(a+)+$": 4}},
        {"rank_pattern": {"q_proj": 10**9}},
        {"alpha_pattern": {"q_proj": -1}},
        {"init_lora_weights": "pissa_niter_1000000"},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "loftq"},
        {"layer_replication": [[0, 30]] * 1000},
        {"trainable_token_indices": list(range(1000))},
        {"target_parameters": ["x"]},
        {"use_dora": "yes"},
        {"bias": "everything"},
        {"megatron_config": {"a": 1}},
        {"a setting\x1b[2J of tomorrow": 1},
    ],
    ids=lambda change: next(iter(change.items())).__repr__()[:50],
)
def test_a_setting_of_an_adapter_that_is_out_of_bounds_is_named(change: dict[str, Any]) -> None:
    began = time.monotonic()
    said = refusal(SETTINGS | change)
    assert time.monotonic() - began < SECONDS
    assert said.isprintable()
    assert said.startswith("adapter_config.json: ") or said.startswith("init_lora")
    assert next(iter(change)).split("\x1b")[0] in said
    assert len(said) < 500


def test_an_adapters_config_is_written_anew(tmp_path: Path) -> None:
    rewritten = adapter_settings(
        SETTINGS | {"lora_dropout": 0.1, "runtime_config": {"x": 1}, "loftq_config": {}, "use_dora": None},
        "base",
        32,
    )
    assert rewritten == SETTINGS | {
        "use_dora": None,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "base_model_name_or_path": "base",
    }


# --- weight files ----------------------------------------------------------------------------------------


def header(tensors: dict[str, Any], data: bytes) -> bytes:
    text = json.dumps(tensors).encode()
    return len(text).to_bytes(8, "little") + text + data


def described(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


FILES = {
    "overlapping": header({"a": described(0, 8, [2]), "b": described(4, 12, [2])}, bytes(12)),
    "a_gap": header({"a": described(0, 4, [1]), "b": described(8, 12, [1])}, bytes(12)),
    "negative": header({"a": described(-4, 4, [2])}, bytes(8)),
    "beyond_the_end": header({"a": described(0, 1 << 40, [1 << 38])}, bytes(8)),
    "wrong_size": header({"a": described(0, 8, [1000])}, bytes(8)),
    "overflowing_shape": header({"a": described(0, 8, [1 << 62, 1 << 62])}, bytes(8)),
    "huge_number": header({"a": described(0, 10**30, [2])}, bytes(8)),
    "unknown_dtype": header({"a": described(0, 8, [2], "PICKLE")}, bytes(8)),
    "integers": header({"a": described(0, 8, [2], "I32")}, bytes(8)),
    "duplicate_keys": b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":1}',
    "a_list": header([1, 2], b""),  # type: ignore[arg-type]
    "nested": (200_000).to_bytes(8, "little") + b"[" * 200_000,
    "a_long_header": (1 << 40).to_bytes(8, "little") + b"{}",
    "no_tensor": header({}, b""),
    "empty": b"",
    "zeros": bytes(4096),
}


@pytest.mark.parametrize("name", FILES)
def test_a_weight_file_that_lies_is_refused_and_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(FILES[name])
    began = time.monotonic()
    with pytest.raises(RuleViolation, match=r"^model\.safetensors"):
        tensors(path)
    assert time.monotonic() - began < SECONDS


# --- a result as a whole ---------------------------------------------------------------------------------


@pytest.fixture
def result(tmp_path: Path, tiny: Path) -> Path:
    """A whole model that would be taken: the base model's own files, without its tokenizer."""
    shutil.copytree(tiny / "model", tmp_path / "result", ignore=shutil.ignore_patterns("token*", "chat*"))
    return tmp_path / "result"


def take(result: Path, tiny: Path) -> Path:
    out = result.parent / "taken"
    take_model(result, out, base_model=tiny / "model", base_model_id="base", limit=1 << 30)
    return out


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_model_as_save_pretrained_writes_it_is_taken_with_its_tokenizer(result: Path, tiny: Path) -> None:
    shutil.copytree(tiny / "model", result, dirs_exist_ok=True)
    taken = take(result, tiny)
    assert {path.name for path in taken.iterdir()} == {path.name for path in result.iterdir()}
    kept = json.loads((taken / "config.json").read_text())
    given = json.loads((result / "config.json").read_text())
    assert {key for key in given if given[key] != kept.get(key)} == set()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 1_000_000),
        ("hidden_size", 1 << 40),
        ("vocab_size", 10**18),
        ("intermediate_size", 65),
        ("num_attention_heads", 0),
        ("max_position_embeddings", 10**12),
        ("head_dim", 1),
        ("rope_parameters", {"rope_type": "yarn", "factor": 1e9}),
        ("quantization_config", {"quant_method": "awq"}),
        ("model_type", "qwen2"),
        ("architectures", ["Evil"]),
        ("auto_map", {"AutoModel": "modeling.Evil"}),
        ("layer_types", ["full_attention"] * 10_000),
        ("hidden_act", "os.system"),
        ("a\x1b[2J", 1),
    ],
)
def test_a_config_that_is_not_the_base_models_is_refused_with_the_key(
    result: Path, tiny: Path, key: str, value: object
) -> None:
    edit(result / "config.json", lambda config: config.update({key: value}))
    began = time.monotonic()
    with pytest.raises(RuleViolation, match=r"^config\.json") as stop:
        take(result, tiny)
    assert time.monotonic() - began < SECONDS
    assert key.split("\x1b", maxsplit=1)[0] in str(stop.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("_attn_implementation", "evil/kernel"),
        ("_name_or_path", "/etc"),
        ("num_labels", 10**9),
        ("id2label", {"0": "x"}),
        ("eos_token_id", 10**9),
        ("pad_token_id", "\x1b"),
        ("torch_dtype", "os.system"),
    ],
)
def test_what_a_config_says_beside_the_model_is_not_kept(
    result: Path, tiny: Path, key: str, value: object
) -> None:
    edit(result / "config.json", lambda config: config.update({key: value}))
    assert json.loads((take(result, tiny) / "config.json").read_text()).get(key) != value


def test_a_generation_config_says_which_tokens_end_and_nothing_else(result: Path, tiny: Path) -> None:
    content = {"eos_token_id": 2, "num_beams": 10**6, "custom_generate": "evil/code", "pad_token_id": 10**9}
    (result / "generation_config.json").write_text(json.dumps(content))
    kept = json.loads((take(result, tiny) / "generation_config.json").read_text())
    assert kept == {"eos_token_id": 2}


@pytest.mark.parametrize(
    "change",
    [
        lambda weights: weights.pop("model.norm.weight"),
        lambda weights: weights.update({"model.layers.2.extra": np.zeros(4, "f4")}),
        lambda weights: weights.update({"model.norm.weight": np.zeros((1, 32), "f4")}),
        lambda weights: weights.update({"lm_head.weight": np.zeros((2, 32), "f4")}),
    ],
    ids=["one is missing", "one more", "another rank", "another vocabulary"],
)
def test_weights_that_are_not_the_base_models_by_name_and_shape_are_refused(
    result: Path, tiny: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    weights = dict(load_file(result / "model.safetensors"))
    change(weights)
    save_file(weights, result / "model.safetensors")
    with pytest.raises(RuleViolation, match=r"the base model|shape"):
        take(result, tiny)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (f"{MODULE}.lora_A.weight", (4, 64)),
        (f"{MODULE}.lora_A.weight", (8, 32)),
        (f"{MODULE}.lora_A.weight", (4, 32, 1)),
        ("base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight", (4, 32)),
        ("base_model.model.evil.lora_A.weight", (4, 32)),
        ("base_model.model.lm_head.weight", (7, 32)),
        ("\x1b[2J", (4, 32)),
    ],
)
def test_an_adapters_tensor_that_fits_no_module_is_refused(
    tmp_path: Path, tiny: Path, name: str, shape: tuple[int, ...]
) -> None:
    result = tmp_path / "result"
    result.mkdir()
    (result / "adapter_config.json").write_text(json.dumps(SETTINGS))
    weights = {f"{MODULE}.lora_{part}.weight": np.zeros(size, "f4") for part, size in
               {"A": (4, 32), "B": (32, 4)}.items()}  # fmt: skip
    save_file(weights | {name: np.zeros(shape, "f4")}, result / "adapter_model.safetensors")
    with pytest.raises(RuleViolation, match=r"^the adapter's ") as stop:
        take(result, tiny)
    assert str(stop.value).isprintable()


# --- tokenizers and chat templates -------------------------------------------------------------------------


def chat_template(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "chat_template.jinja").write_text(text)

    return write


def broken(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"model": {}}')


def token_out_of_range(folder: Path) -> None:
    def change(tokenizer: dict[str, Any]) -> None:
        tokenizer["model"]["vocab"] = {
            token: number + 10**6 for token, number in tokenizer["model"]["vocab"].items()
        }

    edit(folder / "tokenizer.json", change)


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
TOKENIZERS: dict[str, Callable[[Path], None]] = {
    "took more than 8 s": chat_template(LOOP),
    "MemoryError": chat_template("{{ 'x' * 10**10 }}"),
    "a page for two words": chat_template("{{ 'x' * 10**7 }}"),
    "SecurityError": chat_template("{{ ''.__class__.__mro__[1].__subclasses__() }}"),
    "does not load: ": broken,
    "no embedding": token_out_of_range,
}


@pytest.mark.parametrize("line", TOKENIZERS)
def test_a_tokenizer_or_template_without_end_is_refused(result: Path, tiny: Path, line: str) -> None:
    shutil.copytree(tiny / "model", result, dirs_exist_ok=True)
    TOKENIZERS[line](result)
    vocabulary = json.loads((tiny / "model" / "config.json").read_text())["vocab_size"]
    with pytest.raises(RuleViolation, match=rf"^the tokenizer .*{line}.*; hand in the base model's"):
        check_tokenizer(result, vocabulary, seconds=8)


# --- packages --------------------------------------------------------------------------------------------


def findings(entry: Entry) -> dict[str, Finding]:
    """What `palio verify` says of a package whose manifest was made to fit."""
    folder = entry.folder / "package"
    manifest = read_record(PackageManifest, entry.folder / "package.json")
    manifest.model_copy(update={"files": folder_sha256(folder)}).write(entry.folder / "package.json")
    return {one.check: one for one in verify_package(folder)}


@pytest.mark.parametrize(
    ("key", "value"), [("num_hidden_layers", 1_000_000), ("vocab_size", 1 << 50), ("hidden_size", 10**9)]
)
def test_a_package_that_claims_a_million_layers_is_not_loaded(entry: Entry, key: str, value: int) -> None:
    entry.package(adapter=False)
    folder = entry.folder / "package"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()  # a link to the base model's
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    began = time.monotonic()
    found = findings(entry)
    assert time.monotonic() - began < SECONDS
    assert found["weights"].state == "fail"
    assert key in found["weights"].why
    assert found["loads without Palio"].state == "skipped"


def test_a_package_with_torn_weights_is_not_loaded(entry: Entry) -> None:
    entry.package(adapter=False)
    weights = entry.folder / "package" / "model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(content[:-8])
    found = findings(entry)
    assert found["weights"].why.startswith("model.safetensors is torn")
    assert found["loads without Palio"].state == "skipped"
