"""Torch helpers shared by training, packaging and serving."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.utils import logging


def load_causal_model(folder: Path, **settings: Any) -> Any:
    """Load a model folder: safetensors only, and no code from it."""
    return AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=False, use_safetensors=True, **settings
    )


@torch.no_grad()
def add_embeddings(model: Any, tokens: Sequence[int]) -> None:
    """Give a model embeddings for new tokens, each the mean of those of the tokens before."""
    if not tokens:
        return
    first, size = min(tokens), max(tokens) + 1
    if size > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(size, mean_resizing=False)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if module is not None:
            module.weight[list(tokens)] = module.weight[:first].float().mean(0).to(module.weight.dtype)


def meta_model(folder: Path, **settings: Any) -> Any:
    """Build the model of a folder's config on the meta device, which needs neither weights nor memory."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    kinds = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    kind = kinds[0] if isinstance(kinds, tuple) else kinds
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it would report every weight as missing
    try:
        return kind.from_pretrained(None, config=config, state_dict={}, device_map="meta", **settings)
    finally:
        logging.set_verbosity(verbosity)


def cache_bytes(config: Any, itemsize: int) -> int:
    """Return the memory of the keys and values of one token, by the heads that have their own.

    `itemsize` is that of the model's dtype. Raises AttributeError for a config without attention heads.
    """
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * size * itemsize)


def mean_divergence(reference: torch.Tensor, other: torch.Tensor) -> float:
    """Return the mean KL divergence, in nats, of the next-token distributions in `other` from `reference`'s.

    Both are logits of shape (positions, vocabulary): mean over positions of sum p (log p - log q).
    """
    log_p, log_q = (logits.double().log_softmax(-1) for logits in (reference, other))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


@contextmanager
def last_bits_flipped(model: Any, dtype: torch.dtype) -> Iterator[None]:
    """Change the embeddings of the passes inside by one unit in the last place of `dtype`, up or down at
    random: what it changes in the logits is how far rounding moves them."""
    generator = torch.Generator().manual_seed(0)

    def hook(module: Any, inputs: Any, embedded: torch.Tensor) -> torch.Tensor:
        signs = torch.randint(0, 2, embedded.shape, generator=generator).to(embedded) * 2 - 1
        return embedded * (1 + torch.finfo(dtype).eps * signs)

    handle = model.get_input_embeddings().register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def largest_difference(reference: torch.Tensor, other: torch.Tensor) -> float:
    """Return the largest difference of two (positions, vocabulary) logits where the reference is finite."""
    finite = reference.isfinite().all(-1)
    return float((reference - other)[finite].abs().max()) if finite.any() else 0.0


def gpu_memory_share(gpu_memory_gb: float) -> float:
    """Return the share of the GPU's memory that `gpu_memory_gb` is, at most 1."""
    return min(1.0, gpu_memory_gb * 1e9 / torch.cuda.get_device_properties(0).total_memory)


def cap_gpu_memory(gpu_memory_gb: float) -> None:
    """Let torch allocate no more than `gpu_memory_gb` on the GPU."""
    torch.cuda.set_per_process_memory_fraction(gpu_memory_share(gpu_memory_gb))
