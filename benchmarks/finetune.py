"""How fast the trainer is: real tokens per second and peak memory, beside plain Trainer + peft.

    python benchmarks/finetune.py --model resources/base_models/<id>/model --data gsm_data_train
    python benchmarks/finetune.py --device cuda --shape 7b --seconds 60

On a CPU: the same model, rows, order, steps and dtype through Palio's trainer and through
transformers.Trainer with peft and padded batches, each in a process of its own, in CPU-seconds; the
losses of both are printed side by side. The bound is 1/(1 - padding share): what leaving out padding
alone can give.

On a GPU: a model of random weights in a Llama shape (no download), bf16 LoRA or QLoRA, and the model
FLOPs utilisation. FLOPs counted are those LoRA needs: 4 per frozen weight and token (forward, and the
gradient of activations), 6 per trained one, attention's own, and the LM head at label positions.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))  # where Palio is not installed

from palio.quantization import quantization
from palio.training.attention import NAME, row_bounds
from palio.training.model import adapt, base_dtype, load_model
from palio.training.rows import Row, flat_batch, step_rows, tokenise
from palio.training.trainer import Trainer, peak_memory

SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4},
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
    },
    "7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
}
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "4090": 165e12}
"""Dense bf16 with fp32 accumulation, from the makers' data sheets."""


@dataclass(frozen=True)
class Recipe:
    """The fields of palio.config.FinetuneRecipe, for machines without pydantic."""

    method: str = "lora"
    learning_rate: float = 2e-4
    epochs: float = 1.0
    max_steps: int | None = None
    batch_size: int = 8
    gradient_accumulation: int = 1
    max_length: int = 2048
    warmup_ratio: float = 0.03
    scheduler: str = "cosine"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    optimizer: str = "adamw_torch"
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    modules_to_save: tuple[str, ...] = ()
    rslora: bool = False
    dora: bool = False
    quantization: str = "nf4"
    neftune_alpha: float | None = None
    gradient_checkpointing: bool = False
    seed: int = 0


# --- CPU: Palio beside transformers.Trainer ---------------------------------------------------------


def mixed_rows(model: Path, data: Path, count: int) -> list[Row]:
    """Half GSM8K questions with worked answers, half short table look-ups as the demo trains on."""
    from transformers import AutoTokenizer

    random = np.random.default_rng(0)
    lines = data.read_text(encoding="utf-8").splitlines()
    prompts, completions = [], []
    for index in random.permutation(len(lines))[: count // 2]:
        item = json.loads(lines[index])
        prompts.append(f"Question: {item['question']}\nAnswer:")
        completions.append(f" {item['answer']}")
    for _ in range(count - count // 2):
        keys = random.choice(list("abcdefghijklmnopqrstuvwxyz"), 6, replace=False)
        values = random.integers(10, 100, 6)
        table = "\n".join(f"{key}: {value}" for key, value in zip(keys, values, strict=True))
        prompts.append(f"Look up the value.\n{table}\nKey: {keys[0]}\nValue:")
        completions.append(f" {values[0]}")
    return tokenise(AutoTokenizer.from_pretrained(model), prompts, completions, 2048)[0]


def run_palio(model: Path, rows: list[Row], recipe: Any) -> dict[str, Any]:
    device = torch.device("cpu")
    trainer = Trainer(load_model(model, recipe, device), rows, recipe, device)
    cpu, clock = time.process_time(), time.monotonic()
    losses = [trainer.train_step().loss for _ in range(recipe.max_steps)]
    return {"losses": losses, "cpu": time.process_time() - cpu, "wall": time.monotonic() - clock}


def run_transformers(model: Path, rows: list[Row], recipe: Any) -> dict[str, Any]:
    """transformers.Trainer + peft on the same rows in the same order, padded, labels masked."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments
    from transformers import Trainer as Reference

    adapter = LoraConfig(
        r=recipe.lora_r, lora_alpha=recipe.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    torch.manual_seed(recipe.seed)  # as Palio does: the adapter's first values decide the loss curve
    adapted = get_peft_model(base, adapter)
    ordered = [row for step in range(recipe.max_steps) for row in step_rows(rows, recipe, step)]

    def collate(batch: list[Row]) -> dict[str, torch.Tensor]:
        longest = max(len(row.ids) for row in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for place, row in enumerate(batch):
            tokens = torch.from_numpy(row.ids.astype(np.int64))
            ids[place, : len(tokens)], mask[place, : len(tokens)] = tokens, 1
            labels[place, row.prompt : len(tokens)] = tokens[row.prompt :]
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    class InOrder(Reference):  # type: ignore[misc]
        def get_train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(
                ordered, batch_size=recipe.batch_size, collate_fn=collate, shuffle=False
            )

    class Losses(TrainerCallback):  # type: ignore[misc]
        values: ClassVar[list[float]] = []

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **unused: Any) -> None:
            if "loss" in logs:
                self.values.append(float(logs["loss"]))

    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder,
            max_steps=recipe.max_steps,
            per_device_train_batch_size=recipe.batch_size,
            learning_rate=recipe.learning_rate,
            lr_scheduler_type=recipe.scheduler,
            weight_decay=recipe.weight_decay,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        reference = InOrder(model=adapted, args=settings, train_dataset=ordered, callbacks=[Losses()])
        cpu, clock = time.process_time(), time.monotonic()
        reference.train()
    return {"losses": Losses.values, "cpu": time.process_time() - cpu, "wall": time.monotonic() - clock}


def padding_share(rows: list[Row], recipe: Any) -> float:
    padded = real = 0
    for step in range(recipe.max_steps):
        lengths = [len(row.ids) for row in step_rows(rows, recipe, step)]
        padded += max(lengths) * len(lengths)
        real += sum(lengths)
    return 1 - real / padded


def compare(options: argparse.Namespace) -> None:
    rows = mixed_rows(options.model, options.data, options.rows)
    # A constant rate: the first of transformers' warm-up steps has a rate of zero, ours does not.
    recipe = Recipe(
        max_steps=options.steps, learning_rate=1e-3, scheduler="constant_with_warmup", warmup_ratio=0.0
    )
    if options.only:
        run = {"palio": run_palio, "transformers": run_transformers}[options.only]
        result = run(options.model, rows, recipe)
        result["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        Path(options.out).write_text(json.dumps(result), encoding="utf-8")
        return
    results = {}
    for name in ("transformers", "palio"):
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            command = [sys.executable, __file__, *sys.argv[1:], "--only", name, "--out", file.name]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            results[name] = json.loads(Path(file.name).read_text(encoding="utf-8"))
    tokens = sum(len(row.ids) for step in range(options.steps) for row in step_rows(rows, recipe, step))
    share = padding_share(rows, recipe)
    print(f"{options.steps} steps of {recipe.batch_size} rows, {tokens} tokens, padding {share:.1%}, fp32")
    print(f"{'':>14} {'tokens/CPU-s':>13} {'tokens/s':>9} {'peak GB':>8}  loss first, last")
    for name, result in results.items():
        losses = result["losses"]
        print(
            f"{name:>14} {tokens / result['cpu']:13.1f} {tokens / result['wall']:9.1f} "
            f"{result['memory'] / 1e9:8.2f}  {losses[0]:.4f}, {losses[-1]:.4f}"
        )
    ratio = results["transformers"]["cpu"] / results["palio"]["cpu"]
    bound = 1 / (1 - share)
    pairs = zip(results["palio"]["losses"], results["transformers"]["losses"], strict=True)
    apart = max(abs(a - b) for a, b in pairs)
    print(f"ratio {ratio:.2f}, packing bound {bound:.2f}, ratio/bound {ratio / bound:.2f}")
    print(f"largest difference of the two losses at a step: {apart:.1e}")


# --- GPU: utilisation -------------------------------------------------------------------------------


def random_model(shape: str, method: str, device: torch.device) -> Any:
    """A Llama of random weights; for QLoRA saved once to disk, since quantising happens at loading."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(vocab_size=32000, max_position_embeddings=4096, **SHAPES[shape])
    dtype = base_dtype(device, method)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if method != "qlora":
        return model
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        del model
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, device_map=str(device), quantization_config=quantization("nf4", dtype)
        )


def step_flops(model: Any, rows: list[Row]) -> float:
    """FLOPs that one LoRA step needs on these rows."""
    config = model.config
    hidden, layers = config.hidden_size, config.num_hidden_layers
    frozen = layers * hidden * (4 * hidden + 3 * config.intermediate_size)  # no grouped heads in SHAPES
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    tokens = sum(len(row.ids) for row in rows)
    labels = sum(len(row.ids) - row.prompt for row in rows)
    # Causal scores and their use: 2 · l · hidden a token and layer forward, twice that backward.
    attention = sum(6 * len(row.ids) ** 2 * hidden * layers for row in rows)
    return tokens * (4 * frozen + 6 * trained) + attention + 4 * labels * hidden * config.vocab_size


def rows_apart(device: torch.device) -> float:
    """Largest difference of a logit between rows end to end and rows alone, relative to the largest."""
    model = random_model("tiny", "lora", device).eval()
    rows = random_rows(count=5)
    with torch.inference_mode():
        ids = [torch.from_numpy(row.ids.astype(np.int64))[None].to(device) for row in rows]
        alone = torch.cat([model(input_ids=row).logits[0] for row in ids]).float()
        model.set_attn_implementation(NAME)
        batch = flat_batch(rows, device)
        with row_bounds(batch.bounds, device):
            out = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
    return float((out.logits[0].float() - alone).abs().max() / alone.abs().max())


def random_rows(count: int) -> list[Row]:
    """Rows of random tokens, 60 % prompt, their lengths spread as in instruction data (median 400)."""
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(6.0, 0.6, count), 32, 2048).astype(int)
    return [
        Row(number, random.integers(5, 31999, length).astype(np.int32), int(length * 0.6))
        for number, length in enumerate(lengths)
    ]


def utilisation(options: argparse.Namespace) -> None:
    """LoRA and, with bitsandbytes, QLoRA; each as it is and with compiled layers; memory permitting."""
    device = torch.device(options.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    print(f"{name}, torch {torch.__version__}, shape {options.shape}, rows apart: {rows_apart(device):.1e}")
    methods = ["lora", "qlora"] if importlib.util.find_spec("bitsandbytes") else ["lora"]
    for method in options.methods or methods:
        for compiled in (False, True):
            batch_size = options.batch_size
            while batch_size:
                gc.collect()
                try:
                    if device.type == "cuda":
                        torch.cuda.empty_cache()
                        torch.cuda.reset_peak_memory_stats()
                    measure(options, method, compiled, batch_size, name)
                    break
                except torch.OutOfMemoryError:
                    print(f"{method}, compiled {compiled}, batch {batch_size}: out of memory")
                    batch_size //= 2
                except Exception as error:  # one variant that fails must not hide the others
                    cause = str(error).strip().partition("\n")[0]
                    print(f"{method}, compiled {compiled}: {type(error).__name__}: {cause}")
                    break


def measure(
    options: argparse.Namespace, method: str, compiled: bool, batch_size: int, device_name: str
) -> None:
    device = torch.device(options.device)
    checkpointing = options.gradient_checkpointing
    recipe: Any = Recipe(
        method=method, max_steps=10**6, batch_size=batch_size, gradient_checkpointing=checkpointing
    )
    rows = random_rows(count=4096)
    model = adapt(random_model(options.shape, method, device), recipe)
    trainer = Trainer(model, rows, recipe, device, compile_layers=compiled)
    for _ in range(options.warmup):
        trainer.train_step()
    clock, tokens, flops, steps, losses = time.monotonic(), 0, 0.0, 0, []
    while time.monotonic() - clock < options.seconds:
        flops += step_flops(model, step_rows(rows, recipe, trainer.step))
        report = trainer.train_step()
        tokens, steps = tokens + report.tokens, steps + 1
        losses.append(report.loss)
    rate = flops / (time.monotonic() - clock)
    peak = next((value for key, value in PEAK_FLOPS.items() if key in device_name), None)
    share = f", MFU {rate / peak:.1%}" if peak else ""
    print(
        f"{method}, compiled {compiled}, batch {batch_size}, checkpointing {checkpointing}: {steps} steps, "
        f"{tokens / (time.monotonic() - clock):.0f} tokens/s, {rate / 1e12:.3f} TFLOP/s{share}, "
        f"peak {peak_memory(device) / 1e9:.1f} GB, loss {losses[0]:.3f} to {losses[-1]:.3f}",
        flush=True,
    )


def main() -> None:
    shared = Path(os.environ.get("PALIO_SHARED", "../shared"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--model", type=Path, help="model folder of the comparison on a CPU")
    parser.add_argument("--data", type=Path, default=shared / "helm_data/gsm/gsm_data_train")
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--only", choices=("palio", "transformers"), help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    parser.add_argument("--shape", choices=SHAPES, help="random weights in this shape; measures utilisation")
    parser.add_argument("--methods", nargs="+", choices=("lora", "qlora"))
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument(
        "--warmup", type=int, default=8, help="steps before the clock starts; compiling falls in them"
    )
    options = parser.parse_args()
    if options.shape:
        utilisation(options)
    elif options.model:
        compare(options)
    else:
        parser.error("give --model for the comparison, or --shape for utilisation")


if __name__ == "__main__":
    main()
