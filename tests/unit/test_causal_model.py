"""A base model that Palio cannot train, package and serve is named before any GPU time, with the way out."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BloomConfig,
    BloomForCausalLM,
    CLIPVisionConfig,
    FalconConfig,
    FalconForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    RwkvConfig,
    RwkvForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from palio.base_model import fetch_base_model
from palio.causal_model import examine
from palio.config import BaseModelSource, FinetuneRecipe
from palio.errors import BadInput
from palio.records import Layers, Unsupported
from tests.unit.test_tokens import byte_level

VOCABULARY = 400
SIZE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
VISION = {k: v for k, v in SIZE.items() if k != "vocab_size"} | {"image_size": 8, "patch_size": 4}

SUPPORTED: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZE)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=4)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZE)),
    "bloom": lambda: BloomForCausalLM(
        BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=1, n_head=4)
    ),
    "rwkv": lambda: RwkvForCausalLM(
        RwkvConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, rescale_every=0)
    ),
    "mamba": lambda: MambaForCausalLM(
        MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, state_size=4)
    ),
}
UNSUPPORTED: dict[str, tuple[Callable[[], Any], str]] = {
    "t5": (
        lambda: T5ForConditionalGeneration(
            T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
        ),
        "t5: is an encoder-decoder",
    ),
    "bart": (
        lambda: BartForConditionalGeneration(
            BartConfig(
                vocab_size=VOCABULARY, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=64,
                decoder_ffn_dim=64, encoder_attention_heads=4, decoder_attention_heads=4,
            )
        ),
        "bart: is an encoder-decoder",
    ),
    "bert": (lambda: BertForMaskedLM(BertConfig(**SIZE)), "bert: is an encoder, whose attention"),
    "roberta": (lambda: RobertaForMaskedLM(RobertaConfig(**SIZE)), "roberta: is an encoder, whose attention"),
    "rwkv": (
        lambda: RwkvForCausalLM(RwkvConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2)),
        "rwkv: rescales its weights for inference in place",
    ),
    "llama without a head": (
        lambda: LlamaModel(LlamaConfig(**SIZE)),
        r"llama: lacks 1 weights of LlamaForCausalLM \(lm_head.weight\), which would be random",
    ),
    "llava": (
        lambda: LlavaForConditionalGeneration(
            LlavaConfig(text_config=LlamaConfig(**SIZE), vision_config=CLIPVisionConfig(**VISION))
        ),
        "llava: wraps a language model for images",
    ),
    "gemma3": (
        lambda: Gemma3ForConditionalGeneration(
            Gemma3Config(text_config={**SIZE, "head_dim": 8}, vision_config=VISION, mm_tokens_per_image=4)
        ),
        "gemma3: wraps a language model for images",
    ),
}  # fmt: skip


def saved(model: Any, folder: Path) -> Path:
    """Save a model with a tokenizer of its vocabulary."""
    model.save_pretrained(folder)
    byte_level("<|begin|>", "<|end|>").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", SUPPORTED)
def test_a_causal_model_with_its_tokenizer_is_supported(name: str, tmp_path: Path) -> None:
    assert isinstance(examine(saved(SUPPORTED[name](), tmp_path)), Layers)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_model_of_another_kind_is_named_with_the_way_out(name: str, tmp_path: Path) -> None:
    model, why = UNSUPPORTED[name]
    found = examine(saved(model(), tmp_path))
    assert isinstance(found, Unsupported)
    assert re.match(why, found.why), found
    assert found.fix
    assert "\n" not in found.why


def edit(path: Path, **keys: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def spoil_family(folder: Path) -> None:
    edit(folder / "config.json", model_type="qwen", auto_map={"AutoModelForCausalLM": "modeling_qwen.QWen"})
    (folder / "modeling_qwen.py").write_text("raise SystemExit('this code must not run')")


def spoil_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def spoil_shape(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(7)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def spoil_end(folder: Path) -> None:
    tokenizer = byte_level("<|begin|>", "<|end|>")
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)


def spoil_size(folder: Path) -> None:
    tokenizer = byte_level("<|begin|>", "<|end|>")
    tokenizer.add_tokens([f"<extra {n}>" for n in range(VOCABULARY)])
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (spoil_family, "qwen: transformers .* does not know this family and needs code of its own"),
        (spoil_weights, r"llama: lacks 1 weights .*\(model.layers.0.mlp.up_proj.weight\)"),
        (spoil_shape, "llama: .*model.norm.weight|llama: cannot be loaded"),
        (spoil_end, "llama: .*no end-of-sequence token; add eos_token"),
        (spoil_size, r"llama: its tokenizer has \d+ tokens, its embedding 400; remove"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "llama: cannot be loaded"),
        (lambda folder: (folder / "config.json").write_text("["), "its config: cannot be loaded"),
    ],
)
def test_what_is_wrong_with_a_models_files_is_named(
    spoil: Callable[[Path], object], why: str, tmp_path: Path
) -> None:
    folder = saved(SUPPORTED["llama"](), tmp_path)
    spoil(folder)
    found = examine(folder)
    assert isinstance(found, Unsupported)
    assert re.match(why, f"{found.why}; {found.fix}"), found


def test_a_base_model_is_fetched_with_what_keeps_it_from_being_trained(tmp_path: Path) -> None:
    """A team's own server may use it."""
    model, _ = UNSUPPORTED["bert"]
    folder = saved(model(), tmp_path / "bert")
    manifest = fetch_base_model(BaseModelSource(path=str(folder)), tmp_path / "out")
    with pytest.raises(BadInput, match=r"base_model: path is .*bert: is an encoder, whose .*; use a decoder"):
        manifest.require_supported()


MIXTRAL = {**SIZE, "num_key_value_heads": 2, "num_local_experts": 4}
LAYERS: dict[str, Callable[[], Any]] = {
    "llama": SUPPORTED["llama"],
    "gpt2": SUPPORTED["gpt2"],
    "mamba": SUPPORTED["mamba"],
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**MIXTRAL)),
    "phimoe": lambda: PhimoeForCausalLM(PhimoeConfig(**MIXTRAL)),
    "falcon": lambda: FalconForCausalLM(
        FalconConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    ),
}


@pytest.mark.parametrize(
    ("name", "recipe", "line"),
    [
        ("llama", {"method": "qlora"}, None),
        ("gpt2", {"method": "qlora"}, None),  # its Conv1D is quantized
        (
            "falcon",
            {"method": "qlora"},
            r"method is 'qlora': bitsandbytes quantizes 0% .* in FalconLinear as",
        ),
        ("mixtral", {"method": "qlora"}, r"bitsandbytes quantizes \d+% .* leaves \d+% in MixtralExperts as"),
        ("mixtral", {"method": "lora"}, None),
        ("falcon", {"method": "lora"}, None),
        (
            "mamba",
            {"method": "lora"},
            r"target_modules is 'all-linear': peft: .*out_proj.*; name some of dt_proj, in_proj, x_proj$",
        ),
        ("mamba", {"method": "lora", "target_modules": ["x_proj"]}, None),
        (
            "mamba",
            {"target_modules": ["out_proj"]},
            r"\('out_proj',\): LoRA cannot adapt out_proj .*; name some",
        ),
        (
            "phimoe",
            {"method": "lora"},
            r"PhimoeTopKRouter \(router\) returns more than a matrix product; name .*q_proj, v_proj$",
        ),
        ("mamba", {"method": "full"}, None),
        ("gpt2", {"target_modules": ["lm_head"]}, r"ties the weights of lm_head .*; remove lm_head"),
        ("gpt2", {"modules_to_save": ["wte"]}, r"modules_to_save is .* ties the weights of wte"),
        ("llama", {"modules_to_save": ["lm_head"]}, None),  # not tied
        ("llama", {"extra_tokens": ["<a>"]}, r"extra_tokens is .*; add embed_tokens and lm_head to modules"),
        ("llama", {"extra_tokens": ["<a>"], "modules_to_save": ["embed_tokens", "lm_head"]}, None),
        ("gpt2", {"extra_tokens": ["<a>"]}, r"leaves their rows in wte and lm_head as .*; set method: full"),
        ("gpt2", {"extra_tokens": ["<a>"], "method": "full"}, None),
    ],
)
def test_a_recipe_that_a_base_model_does_not_allow_is_known_from_its_config(
    name: str, recipe: dict[str, Any], line: str | None, tmp_path: Path
) -> None:
    folder = saved(LAYERS[name](), tmp_path / "model")
    manifest = fetch_base_model(BaseModelSource(path=str(folder)), tmp_path / "out")
    found = [str(fault) for fault in manifest.recipe_faults(FinetuneRecipe.model_validate(recipe))]
    assert len(found) == (line is not None)
    if line is not None:
        assert re.search(line, found[0]), found


def test_the_share_that_is_quantized_is_of_all_parameters(tmp_path: Path) -> None:
    layers = examine(saved(SUPPORTED["llama"](), tmp_path))
    assert isinstance(layers, Layers)
    linear = 4 * 32 * 32 + 3 * 32 * 64
    assert layers.quantized == pytest.approx(linear / (linear + 2 * VOCABULARY * 32 + 3 * 32), abs=1e-4)
    assert layers.left == {}
