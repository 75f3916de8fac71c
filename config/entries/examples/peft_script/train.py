"""A team's own training program: transformers' Trainer with a LoRA adapter of peft.

It reads what Palio gives it from the environment (docs/command_entries.md), saves checkpoints that the next
attempt goes on from, stops when it is asked to, and moves its adapter to the result when it is whole.
"""

import argparse
import os
import signal
import time
from pathlib import Path

import pyarrow.parquet as pq
import torch
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
DATASET = Path(os.environ["PALIO_DATASET"])
OUTPUT = Path(os.environ["PALIO_OUTPUT"])
CHECKPOINTS = os.environ["PALIO_CHECKPOINTS"]
DEADLINE = float(os.environ["PALIO_DEADLINE"])
SEED = int(os.environ.get("PALIO_SEED", "0"))


class StopInTime(TrainerCallback):
    """Ends training on SIGTERM, or when three times the slowest step so far would pass the deadline.

    A tenth of the time, at most a minute, is kept for the last checkpoint and the result.
    """

    def __init__(self):
        self.deadline = DEADLINE - min(60.0, (DEADLINE - time.time()) / 10)
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


def tokenised(tokenizer, row):
    """Tokens of prompt and completion, the loss on the completion; conversations need `history` too."""
    prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
    completion = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
    completion = [*completion, tokenizer.eos_token_id]
    return {"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion}


def main():
    options = argparse.ArgumentParser()
    options.add_argument("--max-steps", type=int, default=40)
    options.add_argument("--batch-size", type=int, default=8)
    options.add_argument("--learning-rate", type=float, default=1e-3)
    options.add_argument("--save-steps", type=int, default=20)
    options = options.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(BASE_MODEL)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    cuda = torch.cuda.is_available()
    set_seed(SEED)  # the adapter's first weights are drawn before Trainer seeds anything
    model = AutoModelForCausalLM.from_pretrained(BASE_MODEL, dtype=torch.bfloat16 if cuda else torch.float32)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear"))

    rows = pq.read_table(DATASET / "train.parquet", columns=["prompt", "completion"]).to_pylist()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=CHECKPOINTS,
            max_steps=options.max_steps,
            per_device_train_batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            save_steps=options.save_steps,
            seed=SEED,
            save_total_limit=2,
            logging_steps=5,
            report_to="none",
            disable_tqdm=True,
            use_cpu=not cuda,
            dataloader_pin_memory=cuda,
        ),
        train_dataset=[tokenised(tokenizer, row) for row in rows],
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        callbacks=[StopInTime()],
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(CHECKPOINTS))

    # Saved beside the result, then moved: a kill while saving leaves no half of a file there.
    building = OUTPUT.with_name("result.building")
    model.save_pretrained(building)
    for path in building.iterdir():
        path.replace(OUTPUT / path.name)


if __name__ == "__main__":
    main()
