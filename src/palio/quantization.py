"""Quantization of a frozen base model for QLoRA, shared by training and merging."""

from __future__ import annotations

from typing import Any

import torch
from transformers import BitsAndBytesConfig


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
