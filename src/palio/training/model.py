"""The model that is trained: the base model in the device's dtype, with the recipe's adapter on it."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM

from palio.quantization import quantization

if TYPE_CHECKING:
    from palio.config import FinetuneRecipe


def base_dtype(device: torch.device, method: str) -> torch.dtype:
    """Of the frozen base model: bf16 on a GPU that has it, else fp32. What is trained is always fp32.

    On a CPU without bf16 instructions bf16 is many times slower than fp32.
    """
    if method != "full" and device.type == "cuda" and torch.cuda.is_bf16_supported():
        return torch.bfloat16
    return torch.float32


def load_model(folder: Path, recipe: FinetuneRecipe, device: torch.device) -> Any:
    """The base model of `folder`, adapted as the recipe says. `LoRA modules that match nothing` is a
    ValueError of peft's."""
    settings: dict[str, Any] = {"dtype": base_dtype(device, recipe.method), "device_map": str(device)}
    if recipe.method == "qlora":
        settings["quantization_config"] = quantization(recipe.quantization, settings["dtype"])
    model = AutoModelForCausalLM.from_pretrained(folder, **settings)
    return adapt(model, recipe)


def adapt(model: Any, recipe: FinetuneRecipe) -> Any:
    """`model` with the recipe's trainable parameters: an adapter initialised from the seed, or all."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(recipe.seed)
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if recipe.method == "full":
        return model.requires_grad_(True)
    targets = recipe.target_modules
    settings = LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.lora_r,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        modules_to_save=list(recipe.modules_to_save) or None,
        use_rslora=recipe.rslora,
        use_dora=recipe.dora,
    )
    adapted = get_peft_model(model, settings)
    _fuse(adapted)
    return adapted


def _fuse(model: Any) -> None:
    """Add each adapter's output to its base layer's in one matrix product.

    peft's own forward takes three more passes over activations as wide as the layer (scale, add, cast to
    fp32 and back under autocast): an eighth of a training step on the demo's model.
    """
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        plain = isinstance(module, LoraLayer) and "default" in module.lora_A
        if plain and not module.lora_variant:  # DoRA has a forward of its own
            module.forward = partial(_adapted_forward, module)


def _adapted_forward(layer: Any, x: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = layer.base_layer(x)
    low = torch.nn.functional.linear(layer.lora_dropout["default"](x), layer.lora_A["default"].weight)
    up = layer.lora_B["default"].weight.t()
    scale = layer.scaling["default"]
    return torch.addmm(out.flatten(0, -2), low.flatten(0, -2), up, alpha=scale).view(out.shape)


def save_adapter(model: Any, folder: Path, base_model: str) -> None:
    """Save what was trained: an adapter in peft's format or, after full fine-tuning, the model.

    The files hold no path and no set in random order, so equal training gives equal bytes.
    """
    model.save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)
    config = folder / "adapter_config.json"
    if config.exists():
        (folder / "README.md").unlink(missing_ok=True)
        settings = json.loads(config.read_text(encoding="utf-8"))
        settings["base_model_name_or_path"] = base_model
        for key in ("target_modules", "modules_to_save"):
            if isinstance(settings[key], list):
                settings[key] = sorted(settings[key])
        config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
