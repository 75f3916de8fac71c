"""Packaging of a trained model: base model and adapter in, one folder out that plain transformers loads.

    package/    safetensors weights, configs, tokenizer, chat template, README.md (the model card),
                DATA_CARD.md (the dataset's card)

The adapter is merged in fp32, and the merged model must give the logits of base plus adapter; only then are
the weights cast to the base model's dtype.

A QLoRA adapter is merged into the base model as it was in training: quantized, then dequantized to plain
weights. On the demo's model (25 steps, NF4) the KL divergence of that package from the trained model is below
1e-6, at the same loss on its task (0.0015 nats a token); merged into the unquantized base model, the
divergence would be 0.33 and the loss 0.021.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig
from transformers.pytorch_utils import Conv1D
from transformers.utils.logging import disable_progress_bar

from palio.base_model import card_facts
from palio.errors import Crashed, RuleViolation
from palio.files import let_others_read, link_or_copy
from palio.layout import BaseModelFolder, EntryFolder
from palio.packaging.card import model_card
from palio.packaging.confined import merge_confined, serving_of_confined
from palio.packaging.step import package_of, trained_adapter
from palio.quantization import evaluation_mode, quantization
from palio.records import (
    AdapterManifest,
    BaseModelManifest,
    PackageManifest,
)
from palio.settings import PackageSettings
from palio.tensors import add_embeddings, last_bits_flipped, load_causal_model, mean_divergence
from palio.tokens import Tokens, load_tokenizer

TOLERANCE = 10.0
"""Largest change of a logit by the merge, in units of fp32's rounding noise: `last_bits_flipped`."""

DIVERGENCE = 1e-2
"""Largest mean KL divergence of the package from the trained model, in nats."""

TOKENS = ("bos_token_id", "decoder_start_token_id", "eos_token_id", "pad_token_id")
"""Keys of generation_config.json that a package keeps."""

PROBE = (
    "The capital of France is Paris.\nQuestion: What is 17 + 25?\nAnswer: 42\n"
    "def f(n):\n    return n\nGerman: Guten Morgen\n1 2 3 4 5"
)
"""Compared by the logits at all its positions. One text, so that one pass reads the weights, and short enough
for a small context and a tokenizer of bytes."""


def build_package(
    folder: EntryFolder,
    settings: PackageSettings,
    base_model: BaseModelFolder,
    serving_of: Callable[[Path], tuple[str, int]],
    threads: int | None = None,
) -> PackageManifest:
    """Make package/ and package.json in the entry's folder; without an adapter, package the base model.

    `serving_of` tries to serve a package and returns how, and its context; it raises if that is impossible. A
    base model with code of its own is merged and tried in a room.

    Raises:
        Crashed: the package differs from what was trained.
        RuleViolation: several adapters were trained, for a server of the team's own.
    """
    trained = trained_adapter(folder) if settings.adapter else None
    if trained is not None and (several := trained.recipe.get("adapters")):
        why = f"the program left adapters {', '.join(several)} in folders, and Palio's server serves one"
        raise RuleViolation(why, "leave one in PALIO_OUTPUT itself, or give the entry a server of its own")
    disable_progress_bar()  # transformers' bars are noise in a log

    def fill(building: Path, base: BaseModelManifest) -> dict[str, Any]:
        base.require_supported()
        difference = divergence = None
        if base.code and trained is not None and trained.recipe["method"] != "full":
            difference, divergence = merge_confined(folder, base_model, trained, building, threads)
        elif trained is not None:
            difference, divergence = write_tuned(base_model.model, folder.adapter, trained, building)
            if trained.recipe.get("extra_tokens"):
                _link_tokenizer(folder.adapter, building)
        _link_files(base_model.model, building, weights=trained is None)
        _complete(building, _ends(base_model.model, trained), code=bool(base.code))
        _write_cards(folder, settings, base, trained, base_model.model, building)
        let_others_read(building)
        parameters, dtype = _shape(building)
        if base.code:
            way, context = serving_of_confined(folder, building, base.code, threads)
        else:
            way, context = serving_of(building)
        return {
            "code": base.code,
            "adapter_fingerprint": trained.fingerprint if trained else None,
            "dtype": dtype,
            "parameters": parameters,
            "max_logit_difference": difference,
            "divergence": divergence,
            "served": way,
            "context": context,
        }

    return package_of(folder, settings, base_model, fill)


def _write_cards(
    folder: EntryFolder,
    settings: PackageSettings,
    base: BaseModelManifest,
    trained: AdapterManifest | None,
    model: Path,
    building: Path,
) -> None:
    """Write the model card and a copy of the dataset's card."""
    card = model_card(folder.entry_id, settings.competition_id, base, trained, card_facts(model))
    cards = {"README.md": card}
    if trained is not None and folder.dataset.card.is_file():
        cards["DATA_CARD.md"] = folder.dataset.card.read_text(encoding="utf-8")
    for name, text in cards.items():
        (building / name).unlink(missing_ok=True)  # it may be a link to the base model's
        (building / name).write_text(text, encoding="utf-8")


def write_tuned(
    base: Path, adapter: Path, trained: AdapterManifest, target: Path
) -> tuple[float | None, float | None]:
    """Save the tuned model's weights and configs.

    Returns the largest change of a logit by the merge, and the divergence from the trained model; None where
    no check is needed.
    """
    if trained.recipe["method"] == "full":
        _link_files(adapter, target, weights=True)
        return None, None
    stored = AutoConfig.from_pretrained(base, trust_remote_code=False).dtype or torch.float32
    tokenizer = load_tokenizer(base)
    adapted, as_trained = adapted_model(base, adapter, trained)
    before = probe_logits(adapted, tokenizer)
    bound = rounding_bound(adapted, tokenizer, before)
    merged = adapted.merge_and_unload()
    difference = largest_difference(before, probe_logits(merged, tokenizer))
    if not difference <= bound:  # also true of NaN
        raise Crashed(
            f"the merged model differs from base plus adapter by {difference:.2g} in a logit "
            f"(at most {bound:.2g} is rounding): the adapter is huge or not finite; lower learning_rate"
        )
    divergence = None
    if as_trained is not None or stored != torch.float32:
        merged.to(stored)
        merged.config.dtype = stored
        divergence = mean_divergence(
            before if as_trained is None else as_trained, probe_logits(merged, tokenizer)
        )
        if not divergence <= DIVERGENCE:
            raise Crashed(
                f"the package in {stored} differs from the trained model (KL {divergence:.2g}, at most "
                f"{DIVERGENCE:g}): the adapter is huge or overflows; lower learning_rate"
            )
    merged.save_pretrained(target)
    return difference, divergence


def rounding_bound(model: Any, tokenizer: Any, logits: torch.Tensor) -> float:
    """Return the largest change of a logit by the merge of a model in fp32, whose logits these are.

    It is `TOLERANCE` times what rounding moves them, at least one unit in the last place of the largest.
    """
    with last_bits_flipped(model, torch.float32):
        flipped = largest_difference(logits, probe_logits(model, tokenizer))
    return TOLERANCE * max(flipped, torch.finfo(torch.float32).eps * float(logits.abs().max()))


def adapted_model(base: Path, adapter: Path, trained: AdapterManifest) -> tuple[Any, torch.Tensor | None]:
    """Return base model plus adapter in fp32, ready to merge; after QLoRA also the trained model's logits."""
    from peft import PeftModel  # a second of CPU time that a package without an adapter need not pay

    model = load_causal_model(base, dtype=torch.float32)
    extra = list(trained.recipe.get("extra_tokens", ()))
    tokens = load_tokenizer(adapter).convert_tokens_to_ids(extra) if extra else []
    as_trained = None
    if trained.recipe["method"] == "qlora":
        quantised = _requantise(model, base, trained.recipe["quantization"])
        add_embeddings(quantised, tokens)
        with_adapter = evaluation_mode(PeftModel.from_pretrained(quantised, adapter))
        as_trained = probe_logits(with_adapter, load_tokenizer(base))
    add_embeddings(model, tokens)
    return PeftModel.from_pretrained(model, adapter).eval(), as_trained


def _requantise(model: Any, base: Path, kind: str) -> Any:
    """Return the base model quantized as for training; copy its dequantized weights into `model` (fp32)."""
    from peft.utils.integrations import dequantize_module_weight

    quantised = load_causal_model(
        base,
        dtype=torch.float32,
        quantization_config=quantization(kind, torch.float32),
        device_map="cpu",  # transformers puts quantized models, and only those, on a GPU by default
    )
    with torch.no_grad():
        for name, module in quantised.named_modules():
            if type(module).__name__ in ("Linear4bit", "Linear8bitLt"):
                plain, weight = model.get_submodule(name), dequantize_module_weight(module)
                # GPT-2's Conv1D stores the transpose of a linear layer's weight.
                plain.weight.copy_(weight.T if isinstance(plain, Conv1D) else weight)
    return quantised


def _ends(base: Path, trained: AdapterManifest | None) -> set[int]:
    """Return the end tokens that Palio's trainer taught; a team's own program may use any."""
    if trained is None or trained.recipe.get("kind") == "command":
        return set()
    return Tokens(load_tokenizer(base)).ends(chat=trained.recipe["chat_template"])


@torch.inference_mode()
def probe_logits(model: Any, tokenizer: Any) -> torch.Tensor:
    """Return the (positions, vocabulary) logits of the probe text."""
    batch = tokenizer(PROBE, add_special_tokens=False, return_tensors="pt")
    # Without a cache, which transformers makes wrong for some models of linear attention.
    logits: torch.Tensor = model(input_ids=batch["input_ids"], use_cache=False).logits[0].float()
    return logits


def largest_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the largest difference of two probe logits; NaN, which no tolerance accepts, if any is."""
    return (one - other).abs().max().item()


def _complete(folder: Path, ends: set[int], *, code: bool) -> None:
    """Make the generation config, which everyone who loads the model uses, stop at the trained end tokens.

    `code`: the model needs code of its own, which its configs name.

    It names tokens alone. Forced tokens, penalties and sampling defaults of the base model's would make
    `generate` answer otherwise than the server, which gives the model's own probabilities.
    """
    path = folder / "generation_config.json"
    if not path.is_file():
        config = (
            PreTrainedConfig.from_dict(PreTrainedConfig.get_config_dict(folder)[0])
            if code
            else AutoConfig.from_pretrained(folder, trust_remote_code=False)
        )
        GenerationConfig.from_model_config(config).save_pretrained(folder)
    content = json.loads(path.read_text(encoding="utf-8"))
    kept = {key: content[key] for key in TOKENS if content.get(key) is not None}
    named = kept.get("eos_token_id", [])
    known = set(named if isinstance(named, list) else [named])
    if not ends <= known:
        kept["eos_token_id"] = sorted(known | ends)
    _rewrite(path, content, kept)
    for name in () if code else ("config.json", "tokenizer_config.json"):
        path = folder / name
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        # Code of its own beside a family that transformers knows: nobody needs it, and loaders ask about it.
        _rewrite(path, content, {key: value for key, value in content.items() if key != "auto_map"})


def _rewrite(path: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Write a JSON file if its content changes; it may be a link to the base model's, which stays."""
    if new != old:
        path.unlink()
        path.write_text(json.dumps(new, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _link_files(source: Path, target: Path, *, weights: bool) -> None:
    """Link (or copy) the files that `target` lacks from a model's folder, weights only if asked for."""
    for path in sorted(source.iterdir()):
        if (target / path.name).exists():
            continue
        if not weights and (path.suffix == ".safetensors" or path.name.endswith(".index.json")):
            continue
        link_or_copy(path, target / path.name)


def _link_tokenizer(adapter: Path, target: Path) -> None:
    """Link the tokenizer that was trained with, which lies beside the adapter."""
    for path in sorted(adapter.iterdir()):
        if path.name.startswith(("tokenizer", "special_tokens", "added_tokens", "chat_template")):
            (target / path.name).unlink(missing_ok=True)
            link_or_copy(path, target / path.name)


def _shape(folder: Path) -> tuple[int, str]:
    """Return the number of parameters in the safetensors files, and the dtype of most of them."""
    from safetensors import safe_open

    sizes: dict[str, int] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                part = tensors.get_slice(name)
                sizes[part.get_dtype()] = sizes.get(part.get_dtype(), 0) + math.prod(part.get_shape())
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    most = max(sizes, key=lambda dtype: sizes[dtype])
    return sum(sizes.values()), names.get(most, most)
