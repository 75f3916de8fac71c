"""Which causal language models of transformers Palio can work with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig
from transformers.pytorch_utils import Conv1D
from transformers.utils.logging import disable_progress_bar

from palio.errors import BadInput
from palio.quantization import quantization, quantized_share
from palio.records import Layers, Unsupported
from palio.tensors import load_causal_model, meta_model
from palio.tokens import Tokens, load_tokenizer


def is_known(folder: Path) -> bool:
    """Return whether transformers has the family of a model's config."""
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return content.get("model_type") in CONFIG_MAPPING


def examine(folder: Path, *, weights: bool = True) -> Layers | Unsupported:
    """Return a model's layers or, if Palio cannot train, package and serve it, why and the way out.

    Judged from config, tokenizer and, with `weights`, the names of weights: the model is built on the meta
    device.
    """
    disable_progress_bar()  # transformers' bars are noise in a log
    family = "its config"
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        family = str(content.get("model_type"))
        if family not in CONFIG_MAPPING:
            why = f"transformers {transformers.__version__} does not know this family"
            fix = "use another base model, or train and serve it by programs of your own (command, server)"
            if "auto_map" in content:
                why += " and needs code of its own (auto_map)"
                fix += "; or the organizer approves the code: `palio model-code` prints how"
            raise _UnsupportedError(why, fix)
        _check_family(AutoConfig.from_pretrained(folder, trust_remote_code=False))
        _check_model(meta_model(folder), folder)
        if weights:
            _check_weights(folder)
        return _layers(folder)
    except (_UnsupportedError, BadInput) as error:
        return Unsupported(why=f"{family}: {error.why}", fix=error.fix)
    except Exception as error:  # the files are untrusted: loading them may raise anything
        cause = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        why = f"{family}: cannot be loaded ({cause})"
        return Unsupported(why=why, fix="fix its files, or use another base model")


class _UnsupportedError(Exception):
    def __init__(self, why: str, fix: str = "use a decoder-only model") -> None:
        super().__init__(why)
        self.why, self.fix = why, fix


def _check_family(config: Any) -> None:
    """Raise for a family that is no causal language model, as far as its config tells."""
    if config.is_encoder_decoder:
        raise _UnsupportedError("is an encoder-decoder, which predicts no next token of a prompt")
    if config.get_text_config() is not config:
        why = "wraps a language model for images or sound"
        raise _UnsupportedError(why, "use a text-only model, or save its text part as one")
    if getattr(config, "rescale_every", 0):  # RWKV
        why = "rescales its weights for inference in place (rescale_every), so what is saved depends on when"
        raise _UnsupportedError(why, "set rescale_every to 0 in its config.json")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise _UnsupportedError("has no causal language model in transformers")


def _check_model(model: Any, folder: Path) -> None:
    """Raise for a model that generates no text, or does not go with its tokenizer."""
    if not model.can_generate():
        raise _UnsupportedError("cannot generate text")
    causal = any(getattr(module, "is_causal", False) for module in model.modules())
    if getattr(model.config, "is_decoder", None) is False and not causal:
        raise _UnsupportedError("is an encoder, whose attention sees later tokens")
    tokenizer, rows = load_tokenizer(folder), model.get_input_embeddings().weight.shape[0]
    Tokens(tokenizer).ends(chat=False)
    if len(tokenizer) > rows:
        why = f"its tokenizer has {len(tokenizer)} tokens, its embedding {rows}"
        fix = "remove the added tokens from the tokenizer, or resize the embedding"
        raise _UnsupportedError(why, fix)


def _check_weights(folder: Path) -> None:
    """Raise for a model whose weights are incomplete."""
    model, loading = load_causal_model(folder, device_map="meta", output_loading_info=True)
    if lacking := sorted({*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])}):
        name = type(model).__name__
        why = f"lacks {len(lacking)} weights of {name} ({lacking[0]}), which would be random"
        raise _UnsupportedError(why, "give the whole model, saved as that class")


def _layers(folder: Path) -> Layers:
    quantized, left = quantized_share(
        meta_model(folder, quantization_config=quantization("nf4", torch.float32))
    )
    model = meta_model(folder)
    linear = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not model.get_output_embeddings()
    }
    tied = {name.split(".")[-2] for pair in model.all_tied_weights_keys.items() for name in pair}
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    names = {module: name.rpartition(".")[2] for name, module in model.named_modules()}
    all_linear, unsuited = _obstacle(folder, "all-linear"), set[str]()
    if all_linear:
        unsuited = {name for name in linear if _obstacle(folder, [name])}
    return Layers(
        parameters=model.num_parameters(),
        linear=tuple(sorted(linear - unsuited)),
        unsuited=tuple(sorted(unsuited)),
        tied=tuple(sorted(tied)),
        all_linear=all_linear,
        quantized=round(quantized, 4),
        embeddings=tuple(names[table] for table in tables if table is not None),
        left={kind: round(share, 4) for kind, share in sorted(left.items())},
    )


def _obstacle(folder: Path, targets: str | list[str]) -> str:
    """Return what keeps LoRA from adapting some layers; empty if nothing does."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    model = meta_model(folder)
    try:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=targets))
    except Exception as error:  # peft knows families of its own that it refuses
        return f"peft: {str(error).strip().partition(chr(10))[0].partition('. ')[0]}"
    for name, module in model.named_modules():
        layer = module.get_base_layer() if isinstance(module, LoraLayer) else None
        if isinstance(layer, torch.nn.Linear) and not _gives_tensor(layer):
            return f"{type(layer).__name__} ({name.rpartition('.')[2]}) returns more than a matrix product"
    return ""


def _gives_tensor(layer: torch.nn.Linear) -> bool:
    """Return whether a linear layer on the meta device returns a tensor, as not every subclass does."""
    if type(layer).forward is torch.nn.Linear.forward:
        return True
    try:
        return isinstance(layer(torch.empty(1, 1, layer.in_features, device="meta")), torch.Tensor)
    except Exception:  # a router may want another shape, or look at values
        return False
