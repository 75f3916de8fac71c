"""Estimates of the full run on its track, from the rehearsal's measurements, with their grounds.

Time on a GPU: 6 floating-point operations a parameter and token (arXiv 2001.08361; with LoRA 4, since frozen
weights need no gradient) at a share of the GPU's bf16 peak. On a CPU track: the rehearsal's own speed.
Memory: weights as the method keeps them, 16 bytes a trained parameter (gradient, two moments, fp32 copy),
activations of one forward pass, logits in fp32 with their gradient. Share and activations are those of LoRA
on a 7B Llama shape, measured on an H200 by benchmarks/finetune.py (arXiv 2205.05198 counts 34 bytes without
the attention matrix).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from palio.config import FinetuneRecipe, Track
from palio.incoming import Incoming
from palio.layout import EntryFolder

PEAK_TFLOPS = {"a100": 312.0, "rtx4090": 165.2, "h100": 989.0, "h200": 989.0, "a6000": 154.8, "l40s": 362.0}
"""Dense bf16 with fp32 accumulation, from the makers' data sheets."""
MFU, MFU_COMPILED = 0.35, 0.45
"""Share of the peak that fine-tuning reaches; the second with `compile_layers`."""
ACTIVATIONS, ACTIVATIONS_COMPILED, ACTIVATIONS_CHECKPOINTED = 42, 33, 2
"""Bytes a hidden unit, layer and token, in bf16."""
WEIGHT_BYTES = {"nf4": 0.52, "fp4": 0.52, "int8": 1.0}
"""A quantized parameter, with its share of the scales (double quantization: arXiv 2305.14314); others: 2."""


@dataclass(frozen=True)
class Measured:
    """Measurements of the rehearsal."""

    parameters: int
    trained_parameters: int
    rows_kept: float
    """Share of the sources' rows that curation keeps."""
    tokens_per_row: float
    seconds_per_token: float
    """Of training, on this machine."""
    quantized: float = 0.0
    """Share of the parameters that are quantized in training."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a model."""

    hidden: int
    layers: int
    vocabulary: int

    @classmethod
    def of(cls, config: Any) -> Shape:
        """Read a transformers config; a size that it does not name is 0."""
        names = ("hidden_size", "num_hidden_layers", "vocab_size")
        return cls(*(int(getattr(config, name, None) or 0) for name in names))


@dataclass(frozen=True)
class Estimate:
    steps: int
    training_seconds: float
    training_bytes: float
    grounds: str


def estimate(
    recipe: FinetuneRecipe, track: Track, measured: Measured, source_rows: int, shape: Shape
) -> Estimate:
    """Estimate the full training. `source_rows`: rows of the sources."""
    rows = max(1.0, source_rows * measured.rows_kept)
    per_step = recipe.batch_size * recipe.gradient_accumulation
    steps = recipe.max_steps or max(1, math.ceil(rows * recipe.epochs / per_step))
    tokens = steps * per_step * min(measured.tokens_per_row, recipe.max_length)
    peak = PEAK_TFLOPS.get((track.gpu_model or "").lower())
    if peak:
        operations = 6 if recipe.method == "full" else 4
        operations += 2 if recipe.gradient_checkpointing else 0  # the forward pass again
        share = MFU_COMPILED if recipe.compile_layers else MFU
        seconds = operations * measured.parameters * tokens / (share * peak * 1e12)
        grounds = f"{operations} operations a parameter and token at {share:.0%} of {peak:g} Tflop/s"
    else:
        seconds = tokens * measured.seconds_per_token
        grounds = "this machine's speed"
    # The longest rows decide: batches are padded or packed up to max_length.
    longest = recipe.batch_size * min(recipe.max_length, 4 * measured.tokens_per_row)
    memory = training_bytes(recipe, measured, shape, longest, gpu=peak is not None)
    return Estimate(steps, seconds, memory, grounds)


def training_bytes(
    recipe: FinetuneRecipe, measured: Measured, shape: Shape, tokens: float, *, gpu: bool
) -> float:
    """Estimate the memory of training with so many tokens in a forward pass."""
    width = 4.0
    if gpu:
        width = 2.0 * (1 - measured.quantized) + WEIGHT_BYTES[recipe.quantization] * measured.quantized
    unit = ACTIVATIONS_COMPILED if recipe.compile_layers else ACTIVATIONS
    unit = (ACTIVATIONS_CHECKPOINTED if recipe.gradient_checkpointing else unit) * (1 if gpu else 2)
    return (
        width * measured.parameters
        + 16 * measured.trained_parameters
        + unit * shape.hidden * shape.layers * tokens
        + 8 * shape.vocabulary * tokens
    )


def measure(folder: EntryFolder) -> Measured | None:
    """Read a rehearsal's records; None unless Palio's own trainer trained."""
    from palio.records import AdapterManifest, DatasetManifest, FinetuneRun, PackageManifest, read_record

    run_facts = folder.run_facts("finetune")
    if not folder.adapter_manifest.is_file() or not run_facts.is_file():
        return None
    training = read_record(FinetuneRun, run_facts).training
    if training is None or not training.tokens:
        return None
    adapter = read_record(AdapterManifest, folder.adapter_manifest)
    dataset = read_record(DatasetManifest, folder.dataset.manifest)
    package = read_record(PackageManifest, folder.package_manifest)
    parameters = package.parameters
    if parameters is None or adapter.steps is None:
        return None
    weights = folder.adapter / "adapter_model.safetensors"
    read = sum(source.rows for source in dataset.sources)
    rows_trained = adapter.steps * int(adapter.recipe.get("batch_size", 1))
    return Measured(
        parameters=parameters,
        trained_parameters=weights.stat().st_size // 4 if weights.is_file() else parameters,
        rows_kept=dataset.rows / read if read else 1.0,
        tokens_per_row=training.tokens / max(1, rows_trained),
        seconds_per_token=training.training_seconds / training.tokens,
        quantized=adapter.quantized or 0.0,
    )


def rows_of(path: Path) -> int:
    """Count a source file's records."""
    import pyarrow.parquet as pq

    from palio.curation.files import file_records

    if path.suffix == ".parquet":
        return int(pq.ParquetFile(path).metadata.num_rows)
    return sum(1 for _ in file_records(Incoming.locate(path, [])))
