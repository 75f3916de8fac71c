"""The model to train: the base model in the device's dtype, with the recipe's adapter."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.pytorch_utils import Conv1D

from palio.errors import BadInput
from palio.quantization import quantization
from palio.records import extra_tokens_faults
from palio.tensors import add_embeddings, load_causal_model
from palio.tokens import extended_tokenizer

if TYPE_CHECKING:
    from palio.config import FinetuneRecipe


def compute_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of matrix products: bf16 on a GPU that has it, fp16 on an older one, fp32 on a CPU.

    On a CPU without bf16 instructions bf16 is many times slower than fp32.
    """
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def base_dtype(device: torch.device, method: str) -> torch.dtype:
    """Return the base model's dtype: that of computation if frozen; trained parameters are always fp32."""
    return torch.float32 if method == "full" else compute_dtype(device)


def load_model(folder: Path, recipe: FinetuneRecipe, device: torch.device) -> Any:
    """Load the base model of `folder`, adapted according to the recipe.

    Raises BadInput as `adapt` does.
    """
    settings: dict[str, Any] = {"dtype": base_dtype(device, recipe.method), "device_map": str(device)}
    if recipe.method == "qlora":
        settings["quantization_config"] = quantization(recipe.quantization, settings["dtype"])
    model = load_causal_model(folder, **settings)
    tokenizer = extended_tokenizer(folder, recipe.extra_tokens)
    add_embeddings(model, tokenizer.convert_tokens_to_ids(list(recipe.extra_tokens)))
    adapted = adapt(model, recipe)
    if recipe.lora_init == "loftq":
        _loftq(adapted, folder)
    return adapted


def adapt(model: Any, recipe: FinetuneRecipe) -> Any:
    """Return `model` with the recipe's trainable parameters: an adapter initialized from the seed, or all.

    Raises BadInput if peft cannot adapt the target modules, if the base model ties one to another module, or
    if the recipe's extra tokens would not be trained.
    """
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
        init_lora_weights="pissa_niter_16" if recipe.lora_init == "pissa" else True,
    )
    embeddings = [model.get_input_embeddings(), model.get_output_embeddings()]
    tied = embeddings[1] is not None and embeddings[0].weight is embeddings[1].weight
    names = [name.rpartition(".")[2] for name, module in model.named_modules() if module in embeddings]
    for fault in extra_tokens_faults(recipe, names, tied):
        raise fault
    try:
        adapted = get_peft_model(model, settings)
    except (ValueError, TypeError, NotImplementedError) as error:
        why = f"peft cannot adapt it: {str(error).strip().partition(chr(10))[0]}"
        fix = "name linear layers of the base model"
        raise BadInput("finetune", "target_modules", targets, why=why, fix=fix) from error
    if tied:
        _refuse_tied(adapted, embeddings, recipe)
    _fuse(adapted)
    return adapted


def _refuse_tied(adapted: Any, embeddings: Sequence[Any], recipe: FinetuneRecipe) -> None:
    """Refuse to train one of two tied modules: in the package both would have the same weights."""
    keys = {"base_layer": "target_modules", "original_module": "modules_to_save"}  # as peft wraps modules
    for name, module in adapted.get_base_model().named_modules():
        path, _, role = name.rpartition(".")
        if role in keys and any(module is tied for tied in embeddings):
            shared = path.rpartition(".")[2]
            why, fix = f"the base model ties the weights of {shared} to another module's", f"remove {shared}"
            raise BadInput("finetune", keys[role], getattr(recipe, keys[role]), why=why, fix=fix)


@torch.no_grad()
def _loftq(adapted: Any, folder: Path) -> None:
    """Initialize each adapter to the best low-rank approximation of the quantization error.

    LoftQ (arXiv 2310.08659) with one alternation; peft's own needs a GPU and ignores the adapter's scale.
    """
    import bitsandbytes
    from peft.tuners.lora import LoraLayer

    whole = load_causal_model(folder, dtype="auto")
    for name, layer in adapted.get_base_model().named_modules():
        base = layer.get_base_layer() if isinstance(layer, LoraLayer) else None
        if not isinstance(base, bitsandbytes.nn.Linear4bit):
            continue
        dequantized = bitsandbytes.functional.dequantize_4bit(
            base.weight.data, base.weight.quant_state
        ).float()
        plain = whole.get_submodule(name)
        weight = plain.weight.T if isinstance(plain, Conv1D) else plain.weight
        error = weight.to(dequantized) - dequantized
        rank = layer.r["default"]
        left, values, right = torch.svd_lowrank(error, q=min(2 * rank, *error.shape), niter=4)
        root = (values[:rank] / layer.scaling["default"]).sqrt()
        layer.lora_A["default"].weight.copy_((right[:, :rank] * root).T)
        layer.lora_B["default"].weight.copy_(left[:, :rank] * root)


def _fuse(model: Any) -> None:
    """Add each adapter's output to its base layer's in one matrix product.

    peft's forward makes three more passes over activations as wide as the layer (scale, add, cast to fp32
    and back under autocast), an eighth of a training step of the demo's model.
    """
    from peft.tuners import lora

    kinds = {lora.Linear, *(getattr(lora, name, None) for name in ("Linear4bit", "Linear8bitLt"))}
    for module in model.modules():
        if type(module) in kinds and not module.lora_variant:  # DoRA and experts have a forward of their own
            module.__class__ = _fused(type(module))  # type: ignore[arg-type]


@cache
def _fused(kind: type) -> type:
    """Return one class for all layers of a kind: torch.compile recompiles for each new forward, and gives up
    after eight."""
    return type(kind.__name__, (kind,), {"forward": _adapted_forward})


def _adapted_forward(layer: Any, x: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = layer.base_layer(x.flatten(0, -2))  # flat: to add to a view would copy its gradient
    low = torch.nn.functional.linear(layer.lora_dropout["default"](x), layer.lora_A["default"].weight)
    up = layer.lora_B["default"].weight.t().to(out.dtype)  # autocast knows no operation in place
    out.addmm_(low.flatten(0, -2).to(out.dtype), up, alpha=layer.scaling["default"])
    return out.view(*x.shape[:-1], -1)


def save_adapter(
    model: Any, folder: Path, base_model: str, initial: Path, tokenizer: Any | None = None
) -> None:
    """Save the adapter in peft's format or, after full fine-tuning, the model; beside it a tokenizer that is
    not the base model's.

    A PiSSA adapter is converted, by its difference from the adapter in `initial`, to one of twice the rank
    for the original base model. The files hold no path and no set in random order, so equal training gives
    equal bytes.
    """
    options: dict[str, Any] = {}
    if initial.exists():
        options["path_initial_model_for_weight_conversion"] = str(initial)
    if tokenizer is not None and hasattr(model, "peft_config"):
        options["save_embedding_layers"] = False  # they are among the modules to save
    model.save_pretrained(folder, **options)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
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
