"""Quantization of a frozen base model for QLoRA, shared by fetching, training and merging."""

from __future__ import annotations

from typing import Any

import torch
from transformers import BitsAndBytesConfig

QUANTIZED = ("Linear4bit", "Linear8bitLt")
"""Names of bitsandbytes' quantized layers."""


def quantization(kind: str, compute: torch.dtype) -> BitsAndBytesConfig:
    """Return the settings of nf4 or fp4 (4 bits, double quantization: QLoRA, arXiv 2305.14314) or int8.

    `compute` is the dtype in which 4-bit weights are multiplied.
    """
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def quantized_share(model: Any) -> tuple[float, dict[str, float]]:
    """Return the share of a loaded model's parameters that are quantized, and by class of layer the share of
    the other matrices.

    Embeddings, the output layer and vectors (norms, biases) belong to neither: QLoRA never quantizes them.
    bitsandbytes replaces plain linear layers alone, not their subclasses, nor experts stored as one tensor.
    """
    parts = {model.get_input_embeddings(), model.get_output_embeddings()}
    quantized, left, seen, total = 0, dict[str, int](), set[int](), 0
    for name, module in model.named_modules():
        if "lora_" in name or ".modules_to_save." in name:  # the adapter's
            continue
        if type(module).__name__ in QUANTIZED:
            quantized += module.in_features * module.out_features
            total += module.in_features * module.out_features
            continue
        for parameter in module.parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            total += parameter.numel()
            if parameter.ndim > 1 and module not in parts and not isinstance(module, torch.nn.Embedding):
                kind = type(module).__name__
                left[kind] = left.get(kind, 0) + parameter.numel()
    return quantized / total, {kind: count / total for kind, count in left.items()}


def evaluation_mode(model: Any) -> Any:
    """Call `model.eval()`, but let 4-bit layers compute as in training.

    In evaluation mode bitsandbytes permanently repacks 4-bit weights on some CPUs and multiplies in bf16:
    training could not continue, and the logits would differ from those that were trained.
    """
    model.eval()
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.train()
    return model
