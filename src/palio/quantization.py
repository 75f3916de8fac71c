"""How QLoRA quantises a frozen base model: one definition for the steps that train and merge."""

from __future__ import annotations

from typing import Any

import torch
from transformers import BitsAndBytesConfig


def quantization(kind: str, compute: torch.dtype) -> BitsAndBytesConfig:
    """`kind` nf4 or fp4: 4 bits, double quantisation (QLoRA, arXiv 2305.14314); or int8.

    `compute` is the dtype that 4-bit weights are multiplied in.
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
    """`model.eval()`, but 4-bit layers go on computing as they do in training.

    In evaluation mode bitsandbytes repacks 4-bit weights on some CPUs for good and multiplies in bf16:
    training could not go on, and the logits would not be those that were trained.
    """
    model.eval()
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.train()
    return model
