"""What a base model is, and what its training and serving take: from its config and tokenizer alone.

The model is built on the meta device, so a laptop tells it of any model, without the weights.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from palio.base_model import fetch_configs
from palio.causal_model import examine, is_known
from palio.config import Entry, FinetuneRecipe, RuleSet, Track
from palio.eligibility.check import approved_model
from palio.errors import BadInput
from palio.evaluation.helm.folder import CONTEXT_TOKENS
from palio.layout import BaseModelFolder, Resources
from palio.model_code import named_classes
from palio.participant.estimate import Measured, Shape, training_bytes
from palio.records import Layers, Unsupported
from palio.sandbox.model_room import look
from palio.serving.model import context_of
from palio.tensors import cache_bytes, meta_model
from palio.tokens import Tokens, load_tokenizer
from palio.training.model import adapt


def preview(entry: Entry, track: Track, rules: RuleSet) -> Iterator[str]:
    """Yield lines about the entry's base model; fetch its config and tokenizer if they are not here.

    Code of its own that the rules approve is run in a room.

    Raises BadInput if Palio cannot train it with the entry's recipe, or cannot package and serve it.
    """
    family = approved_model(entry.base_model, rules)
    code = (family.code if family else None) or {}
    fetched = Resources().base_model(entry.base_model.id)
    if fetched.manifest.is_file():
        yield from _preview(fetched.model, code, entry, track)
        return
    with tempfile.TemporaryDirectory() as work:
        folder = BaseModelFolder(Path(work)).model
        folder.mkdir()
        fetch_configs(entry.base_model, folder, code)
        yield from _preview(folder, code, entry, track)


def _preview(folder: Path, code: Mapping[str, str], entry: Entry, track: Track) -> Iterator[str]:
    if not code or is_known(folder):
        yield from preview_of(folder, entry, track)
        return
    yield f"base model: its own code, in the sandbox: {', '.join(sorted(code))}"
    named_classes(folder)
    given = {"entry": entry.model_dump(mode="json"), "track": track.model_dump(mode="json")}
    yield from map(str, look("preview", folder, code, **given))


def preview_of(folder: Path, entry: Entry, track: Track) -> Iterator[str]:
    """Yield the lines of a folder that has at least config and tokenizer. Raises as `preview` does."""
    layers = examine(folder, weights=False)
    if isinstance(layers, Unsupported):
        if entry.finetune or entry.server is None:
            source = entry.base_model
            raise BadInput("base_model", source.kind, source.address, why=layers.why, fix=layers.fix)
        yield f"base model: {layers.why}; served by the entry's own server"
        return
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    context = context_of(config)
    yield (
        f"base model: {config.model_type}, {_billions(layers.parameters)} parameters, {config.vocab_size} "
        f"tokens; context: {min(context, CONTEXT_TOKENS)} of its {context} tokens"
    )
    yield _tokens(folder, chat=bool(entry.finetune and entry.finetune.chat_template))
    if entry.finetune:
        yield from _training(folder, layers, entry.finetune, track)
    yield _serving(config, layers.parameters, track)


def _tokens(folder: Path, *, chat: bool) -> str:
    """Describe what is put before a prompt and what ends an answer."""
    tokenizer = load_tokenizer(folder)
    tokens = Tokens(tokenizer)
    first, last = (
        " ".join(tokenizer.convert_ids_to_tokens(sorted(ids)))
        for ids in (tokens.prefix, tokens.ends(chat=chat))
    )
    return f"tokens: before a prompt {first or 'none'}, after an answer {last}"


def _training(folder: Path, layers: Layers, recipe: FinetuneRecipe, track: Track) -> Iterator[str]:
    for fault in layers.recipe_faults(recipe):
        raise fault
    plain = recipe.model_copy(update={"lora_init": "default"})  # the others start from the weights
    adapted = adapt(meta_model(folder), plain)
    measured = Measured(
        parameters=layers.parameters,
        trained_parameters=sum(each.numel() for each in adapted.parameters() if each.requires_grad),
        rows_kept=1.0,
        tokens_per_row=recipe.max_length,
        seconds_per_token=0.0,
        quantized=layers.quantized if recipe.method == "qlora" else 0.0,
    )
    if recipe.method == "qlora":
        left = "".join(f", not the {share:.0%} in {kind}" for kind, share in layers.left.items())
        yield f"qlora: {layers.quantized:.0%} of the parameters are quantized{left}"
    yield f"{recipe.method}: {_billions(measured.trained_parameters)} parameters are trained"
    shape = Shape.of(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    longest = recipe.batch_size * recipe.max_length
    still, busy = (
        training_bytes(recipe, measured, shape, tokens, gpu=track.gpu_memory_gb is not None) / 1e9
        for tokens in (0, longest)
    )
    yield (
        f"training: about {still:.1f} GB for weights and optimizer, up to {busy - still:.1f} GB for a pass "
        f"of {recipe.batch_size} rows of {recipe.max_length} tokens; the track has {_memory(track):g} GB"
    )


def _serving(config: Any, parameters: int, track: Track) -> str:
    """Describe the memory of serving: in 2 bytes a parameter on a GPU, 4 on a CPU."""
    itemsize = 2 if track.gpu_memory_gb else 4
    context = min(context_of(config), CONTEXT_TOKENS)
    try:
        sequence = context * cache_bytes(config, itemsize)
    except AttributeError:  # a model without attention, which is served without a cache
        sequence = 0
    return (
        f"serving: about {parameters * itemsize / 1e9:.1f} GB for weights, {sequence / 1e9:.2f} GB for a "
        f"request of {context} tokens; the track has {_memory(track):g} GB"
    )


def _memory(track: Track) -> float:
    return track.gpu_memory_gb or track.ram_gb


def _billions(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e8 else f"{count / 1e6:.2f} M"
