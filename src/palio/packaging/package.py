"""The packaging step: base model and adapter in, one folder out that transformers loads by itself.

    package/          safetensors weights, configs, tokenizer, chat template, README.md (model card),
                      DATA_CARD.md (of the dataset it was trained on)
    package.json      PackageManifest, written last
    package.run.json  when, where, how long

The adapter is merged in fp32 and the merged model must give the logits of base plus adapter; only then
are the weights cast to the base model's own dtype.

A QLoRA adapter is merged into the base model as it was when it was trained: quantised, then dequantised
to plain weights. On the demo's model (25 steps, NF4) that package is at a KL divergence below 1e-6 from
the trained model, with the same loss on its task (0.0015 nats a token); merged into the base model that
was never quantised it would be at 0.33, with a loss of 0.021.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils.logging import disable_progress_bar

from palio.base_model import card_facts
from palio.errors import Crashed
from palio.files import link_or_copy
from palio.layout import BaseModelFolder, EntryFolder
from palio.packaging.card import model_card
from palio.provenance import folder_sha256
from palio.quantization import evaluation_mode, quantization
from palio.records import (
    AdapterManifest,
    BaseModelManifest,
    PackageManifest,
    RunFacts,
    read_record,
    timed_run,
)
from palio.settings import PackageSettings
from palio.tensors import mean_divergence

TOLERANCE = 1e-3
"""Largest difference of a logit that the merge may make, in fp32."""

DIVERGENCE = 1e-2
"""Largest mean KL divergence, in nats, of the package from the model as it was trained."""

PROBES = (
    "The capital of France is",
    "Question: What is 17 + 25?\nAnswer:",
    "def fibonacci(n):\n    ",
    "Translate to German: Good morning, how are you today?\n",
    "1 2 3 4 5 6 7 8 9 10 11 12",
)
"""Short texts of different kinds; the logits of all their positions are compared."""


def build_package(
    folder: EntryFolder, settings: PackageSettings, base_model: BaseModelFolder
) -> PackageManifest:
    """Leave package/ and package.json in the entry's folder; without an adapter the base model is packaged.

    Raises Crashed if the merged model differs.
    """
    base = read_record(BaseModelManifest, base_model.manifest)
    trained = read_record(AdapterManifest, folder.adapter_manifest) if settings.adapter else None
    disable_progress_bar()  # of transformers' loading and saving: only noise in a log
    building = folder.unfinished("package")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    folder.package_manifest.unlink(missing_ok=True)
    difference = divergence = None
    with timed_run(folder.run_facts("package"), RunFacts()):
        if trained is None:
            _link_files(base_model.model, building, weights=True)
        else:
            if folder_sha256(folder.adapter) != trained.files:
                raise Crashed(f"{folder.adapter} differs from adapter.json; run finetune again")
            difference, divergence = _write_tuned(base_model.model, folder.adapter, trained, building)
            _link_files(base_model.model, building, weights=False)
        _complete(building)
        _write_cards(folder, settings, base, trained, base_model.model, building)
        for path in building.iterdir():
            if path.stat().st_nlink == 1:  # a linked file is the base model's, its mode is not ours to change
                path.chmod(0o644)
        parameters, dtype = _shape(building)
        shutil.rmtree(folder.package, ignore_errors=True)
        building.rename(folder.package)
        manifest = PackageManifest(
            competition=settings.competition_id,
            track=folder.track_id,
            entry=folder.entry_id,
            base_model=base.id,
            base_model_fingerprint=base.fingerprint,
            adapter_fingerprint=trained.fingerprint if trained else None,
            dtype=dtype,
            parameters=parameters,
            max_logit_difference=difference,
            divergence=divergence,
            files=folder_sha256(folder.package),
        )
        manifest.write(folder.package_manifest)
    return manifest


def _write_cards(
    folder: EntryFolder,
    settings: PackageSettings,
    base: BaseModelManifest,
    trained: AdapterManifest | None,
    model: Path,
    building: Path,
) -> None:
    """Write the model card, and the data card of what it was trained on."""
    card = model_card(folder.entry_id, settings.competition_id, base, trained, card_facts(model))
    cards = {"README.md": card}
    if trained is not None and folder.dataset.card.is_file():
        cards["DATA_CARD.md"] = folder.dataset.card.read_text(encoding="utf-8")
    for name, text in cards.items():
        (building / name).unlink(missing_ok=True)  # a link to the base model's
        (building / name).write_text(text, encoding="utf-8")


def _write_tuned(
    base: Path, adapter: Path, trained: AdapterManifest, target: Path
) -> tuple[float | None, float | None]:
    """Save the tuned model's weights and configs.

    Returns the largest logit difference that the merge made, and the divergence from the model as it was
    trained; None for what needed no check.
    """
    if trained.recipe["method"] == "full":
        _link_files(adapter, target, weights=True)
        return None, None
    stored = AutoConfig.from_pretrained(base).dtype or torch.float32
    tokenizer = AutoTokenizer.from_pretrained(base)
    adapted, as_trained = adapted_model(base, adapter, trained)
    before = probe_logits(adapted, tokenizer)
    merged = adapted.merge_and_unload()
    difference = largest_difference(before, probe_logits(merged, tokenizer))
    if not difference <= TOLERANCE:  # also when it is not a number
        raise Crashed(
            f"the merged model differs from base plus adapter by {difference:.2g} in a logit "
            f"(at most {TOLERANCE:g} is rounding): the adapter is huge or not finite; lower learning_rate"
        )
    divergence = None
    if as_trained is not None or stored != torch.float32:
        merged.to(stored)
        merged.config.dtype = stored
        divergence = mean_divergence(as_trained or before, probe_logits(merged, tokenizer))
        if not divergence <= DIVERGENCE:
            raise Crashed(
                f"the package in {stored} predicts otherwise than the trained model (KL {divergence:.2g}, at "
                f"most {DIVERGENCE:g}); the adapter is huge or overflows; lower learning_rate"
            )
    merged.save_pretrained(target)
    return difference, divergence


def adapted_model(
    base: Path, adapter: Path, trained: AdapterManifest
) -> tuple[Any, list[torch.Tensor] | None]:
    """Base model plus adapter in fp32, to be merged; after qlora also the logits of what was trained."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    as_trained = None
    if trained.recipe["method"] == "qlora":
        quantised = _requantise(model, base, trained.recipe["quantization"])
        with_adapter = evaluation_mode(PeftModel.from_pretrained(quantised, adapter))
        as_trained = probe_logits(with_adapter, AutoTokenizer.from_pretrained(base))
    return PeftModel.from_pretrained(model, adapter).eval(), as_trained


def _requantise(model: Any, base: Path, kind: str) -> Any:
    """The base model quantised as it was for training; `model`, in fp32, gets its dequantised weights."""
    from peft.utils.integrations import dequantize_module_weight

    quantised = AutoModelForCausalLM.from_pretrained(
        base,
        dtype=torch.float32,
        quantization_config=quantization(kind, torch.float32),
        device_map="cpu",  # transformers would put a quantised model, and no other, on a GPU that is there
    )
    with torch.no_grad():
        for name, module in quantised.named_modules():
            if type(module).__name__ in ("Linear4bit", "Linear8bitLt"):
                weight = model.get_submodule(name).weight
                weight.copy_(dequantize_module_weight(module).view_as(weight))
    return quantised


@torch.inference_mode()
def probe_logits(model: Any, tokenizer: Any) -> list[torch.Tensor]:
    """(positions, vocabulary) logits of each probe text."""
    batches = (tokenizer(text, add_special_tokens=False, return_tensors="pt") for text in PROBES)
    return [model(input_ids=batch["input_ids"]).logits[0].float() for batch in batches]


def largest_difference(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """Of two models' probe logits; NaN if one of them is NaN, which no tolerance accepts."""
    return torch.stack([(a - b).abs().max() for a, b in zip(one, other, strict=True)]).max().item()


def _complete(folder: Path) -> None:
    """A generation config, if neither base nor training left one: whoever loads the model then agrees."""
    if not (folder / "generation_config.json").is_file():
        GenerationConfig.from_model_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)


def _link_files(source: Path, target: Path, *, weights: bool) -> None:
    """Hard-link (or copy) a model's files; without `weights` only those the target lacks."""
    for path in sorted(source.iterdir()):
        if (target / path.name).exists():
            continue
        if not weights and (path.suffix == ".safetensors" or path.name.endswith(".index.json")):
            continue
        link_or_copy(path, target / path.name)


def _shape(folder: Path) -> tuple[int, str]:
    """Parameters stored in the safetensors files, and the dtype most of them have."""
    from safetensors import safe_open

    sizes: dict[str, int] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                part = tensors.get_slice(name)
                size = 1
                for length in part.get_shape():
                    size *= length
                sizes[part.get_dtype()] = sizes.get(part.get_dtype(), 0) + size
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    most = max(sizes, key=lambda dtype: sizes[dtype])
    return sum(sizes.values()), names.get(most, most)
