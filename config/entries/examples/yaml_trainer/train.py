"""A trainer driven by a YAML file, in the manner of axolotl: `python train.py lora.yml`.

Its keys are axolotl's, as far as they go. Base model, dataset, the folder of the result, the time and the
seed of a replicate are Palio's to say (docs/command_entries.md). With `adapters` it trains one on the rows of
each named list of sources, and the time is divided among them.
"""

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

BASE_MODEL = os.environ["PALIO_BASE_MODEL"]
OUTPUT = Path(os.environ["PALIO_OUTPUT"])
CHECKPOINTS = Path(os.environ["PALIO_CHECKPOINTS"])
DEADLINE = float(os.environ["PALIO_DEADLINE"])
CUDA = torch.cuda.is_available()


@dataclass
class Settings:
    """What the YAML file may say; another key is an error."""

    adapters: dict[str, list[str]] | None = None
    sequence_len: int = 2048
    train_on_inputs: bool = False
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    learning_rate: float = 2e-4
    lr_scheduler: str = "cosine"
    warmup_ratio: float = 0.03
    micro_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    num_epochs: float = 1.0
    max_steps: int = -1
    save_steps: int = 50
    seed: int = 0


class StopInTime(TrainerCallback):
    """Ends training on SIGTERM, or when three times the slowest step so far would pass the deadline.

    A tenth of the time, at most a minute, is for saving and for the end of the process.
    """

    def __init__(self, deadline):
        self.deadline = deadline - min(60.0, (deadline - time.time()) / 10)
        self.asked = False
        self.slowest = 0.0
        self.began = time.time()
        signal.signal(signal.SIGTERM, self.ask)

    def ask(self, number, frame):
        self.asked = True

    def on_step_begin(self, args, state, control, **kwargs):
        self.began = time.time()

    def on_step_end(self, args, state, control, **kwargs):
        self.slowest = max(self.slowest, time.time() - self.began)
        if self.asked or time.time() + 3 * self.slowest > self.deadline:
            control.should_save = control.should_training_stop = True


def rows_of(sources, settings, tokenizer):
    """Return the tokenised rows of these sources, or of all; a row over `sequence_len` is left out."""
    table = pq.read_table(Path(os.environ["PALIO_DATASET"], "train.parquet"))
    chosen = [row for row in table.to_pylist() if sources is None or row["source"] in sources]
    rows = [tokenised(row, settings.train_on_inputs, tokenizer) for row in chosen]
    rows = [row for row in rows if len(row["input_ids"]) <= settings.sequence_len]
    if not rows:
        sys.exit(f"no rows of {sources or 'the dataset'} fit into sequence_len = {settings.sequence_len}")
    return rows


def tokenised(row, train_on_inputs, tokenizer):
    """Return a row's tokens and labels, turn by turn: user, model, user, model …"""
    ids, labels = [], []
    for number, turn in enumerate([*row["history"], row["prompt"], row["completion"]]):
        tokens = tokenizer(turn, add_special_tokens=number == 0)["input_ids"]
        answer = number % 2 == 1
        tokens += [tokenizer.eos_token_id] if answer else []
        ids += tokens
        labels += tokens if answer or train_on_inputs else [-100] * len(tokens)
    return {"input_ids": ids, "labels": labels}


def train(sources, settings, checkpoints, deadline):
    """Train an adapter on these sources, from the last checkpoint on."""
    tokenizer = AutoTokenizer.from_pretrained(BASE_MODEL)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    set_seed(settings.seed)  # the adapter's first weights are drawn before Trainer seeds anything
    dtype = torch.bfloat16 if CUDA else torch.float32
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules="all-linear",
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(BASE_MODEL, dtype=dtype), lora)
    checkpoints.mkdir(parents=True, exist_ok=True)
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        seed=settings.seed,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.lr_scheduler,
        warmup_steps=settings.warmup_ratio,  # below 1 it is a share of the steps
        per_device_train_batch_size=settings.micro_batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        num_train_epochs=settings.num_epochs,
        max_steps=settings.max_steps,
        save_steps=settings.save_steps,
        save_total_limit=2,
        logging_steps=5,
        report_to="none",
        disable_tqdm=True,
        use_cpu=not CUDA,
        dataloader_pin_memory=CUDA,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=rows_of(sources, settings, tokenizer),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        callbacks=[StopInTime(deadline)],
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(checkpoints)))
    return model


def hand_in(model, result):
    """Save beside the result, then move: a kill while saving leaves no half of a file there."""
    building = OUTPUT.with_name("result.building")
    model.save_pretrained(building)
    result.mkdir(exist_ok=True)
    for path in sorted(building.iterdir(), reverse=True):  # the weights, then the config that names them
        path.replace(result / path.name)


def main():
    settings = Settings(**yaml.safe_load(Path(sys.argv[1]).read_text()))
    settings.seed = int(os.environ.get("PALIO_SEED", settings.seed))
    wanted = {OUTPUT / name: sources for name, sources in (settings.adapters or {}).items()} or {OUTPUT: None}
    missing = [result for result in wanted if not (result / "adapter_config.json").exists()]
    for number, result in enumerate(missing):
        deadline = time.time() + (DEADLINE - time.time()) / (len(missing) - number)
        hand_in(train(wanted[result], settings, CHECKPOINTS / result.name, deadline), result)


if __name__ == "__main__":
    main()
