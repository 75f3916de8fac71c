"""Palio's own trainer in the fine-tuning step (`palio.training.step`).

In the work folder also: checkpoints/, what a killed attempt goes on from.
"""

from __future__ import annotations

import math
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from palio.config import FinetuneRecipe
from palio.errors import BadInput, Crashed, Interrupted, OutOfMemory, TimeLimit
from palio.heartbeat import HeartbeatWriter
from palio.layout import TrainingFolder
from palio.provenance import atomic_path, library_versions
from palio.records import AdapterManifest
from palio.training.checkpoint import load_checkpoint, save_checkpoint
from palio.training.device import hardware, nvml_gpu, training_device
from palio.training.ledger import Ledger
from palio.training.model import load_model, save_adapter
from palio.training.rows import Row, split, tokenise
from palio.training.step import Trained, TrainingStep, adapter_of
from palio.training.telemetry import SCHEMA, Tell, console, dashboards, progress
from palio.training.trainer import NonFiniteLossError, StepReport, Trainer, peak_memory

RECIPE_VERSION = "1"
"""Raised when a change of the trainer changes what a recipe gives."""

FINAL_STEPS = 10
"""`final_loss` is the mean loss of this many last steps: one step's is noise."""

PROGRESS = ("telemetry", "best", "validations_since_best", "tokens", "slowest")
"""What a checkpoint holds beside the trainer's own state."""

OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""What torch on a CPU, the CUDA driver, bitsandbytes and cuBLAS say in a RuntimeError."""

TRACED = ("torch", "transformers", "peft", "bitsandbytes", "numpy")


def finetune(recipe: FinetuneRecipe, step: TrainingStep) -> AdapterManifest:
    """Train, resume or restore; leaves adapter/, train.parquet and adapter.json in the entry's folder.

    Raises BadInput, TimeLimit, OutOfMemory, Crashed or Interrupted; a rerun goes on from the last
    checkpoint.
    """
    disable_progress_bar()  # of transformers' loading and saving: only noise in a log
    folder, threads = step.folder, step.options.threads
    if threads is not None:
        torch.set_num_threads(threads)

    def train(work: TrainingFolder, base_model: str) -> Trained:
        training = _Training(recipe, step, work)
        with dashboards(
            step.options.telemetry.report_to,
            folder=folder.dashboards,
            run=f"{step.settings.competition_id}/{folder.track_id}/{folder.entry_id}",
            key=work.path.name,
            recipe=recipe.model_dump(mode="json"),
        ) as training.tell:
            return training.run(base_model)

    return adapter_of(step, recipe.model_dump(mode="json"), RECIPE_VERSION, train)


class _Training:
    """One attempt at one training run, in its work folder."""

    def __init__(self, recipe: FinetuneRecipe, step: TrainingStep, work: TrainingFolder) -> None:
        self.recipe, self.track, self.work = recipe, step.track, work
        self.device = training_device(step.track)
        self.gpu = nvml_gpu(self.device)
        self.hardware = hardware(self.device, self.gpu)
        self.model_folder, self.dataset = step.base_model.model, step.folder.dataset.rows
        self.checkpoints = work.checkpoints
        self.telemetry: list[dict[str, float]] = []
        self.held_out: list[Row] = []
        self.best: dict[str, Any] | None = None  # step, loss and parameters of the lowest validation loss
        self.validations_since_best = 0
        self.tokens = 0
        self.slowest = {"step": 0.0, "save": 0.0, "validation": 0.0}  # seconds
        self.tell: Tell = lambda row: None
        self.heartbeat_file = step.folder.heartbeat("finetune")

    def run(self, base_model: str) -> Trained:
        """Train to the end or to the budget, and save."""
        rows, too_long = self._rows()
        rows, self.held_out = split(rows, self.recipe.validation_rows, self.recipe.seed)
        try:
            trainer = self._trainer(rows)
            budget = float(self.track.training_budget)
            meter = self.gpu.joules if self.gpu else None
            with (
                _signals() as caught,
                Ledger(self.work.ledger, budget, meter=meter, **self.hardware) as ledger,
            ):
                self._resume(trainer, budget)
                state = self._train(trainer, ledger, caught)
                if ledger.left() < 0:  # what was last done took far longer than ever before
                    self._resume(trainer, budget)
                    state = "budget_reached"
                if trainer.step == 0:
                    raise TimeLimit(
                        f"the training budget of {budget:g} s ended before the first step was saved"
                    )
                self._save(trainer, base_model, ledger)
                ledger.outcome = state
                seconds = ledger.used()
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            peak = peak_memory(self.device) / 1e9
            raise OutOfMemory(
                f"out of memory after a peak of {peak:.1f} GB; lower finetune.batch_size (and raise "
                "gradient_accumulation), lower max_length, or set gradient_checkpointing: true"
            ) from error
        last = [line["loss"] for line in self.telemetry[-FINAL_STEPS:]]
        manifest = {
            "state": state,
            "steps": trainer.step,
            "planned_steps": trainer.steps,
            "rows": len(rows),
            "rows_too_long": too_long,
            "final_loss": sum(last) / len(last),
            "best_step": self.best["step"] if self.best else None,
            "validation_loss": self.best["loss"] if self.best else None,
        }
        facts = {
            "versions": library_versions(*TRACED),
            "threads": torch.get_num_threads(),
            "tokens": self.tokens,
            "peak_memory_bytes": peak_memory(self.device),
            **self.hardware,
        }
        return Trained(manifest, seconds, facts)

    def _rows(self) -> tuple[list[Row], int]:
        table = pq.read_table(self.dataset, columns=["history", "prompt", "completion"])
        tokenizer = AutoTokenizer.from_pretrained(self.model_folder)
        if tokenizer.eos_token_id is None:
            why, fix = "the tokenizer has no end-of-sequence token", "add eos_token to tokenizer_config.json"
            raise BadInput(self.model_folder, "eos_token", why=why, fix=fix)
        conversations = [
            (*history, prompt, completion)
            for history, prompt, completion in zip(
                *map(pa.ChunkedArray.to_pylist, table.columns), strict=True
            )
        ]
        if self.recipe.chat_template and tokenizer.chat_template is None:
            raise BadInput(
                "finetune",
                "chat_template",
                True,
                why="the base model's tokenizer has none",
                fix="leave it out",
            )
        chat = self.recipe.chat_template
        rows, too_long = tokenise(tokenizer, conversations, self.recipe.max_length, chat=chat)
        if not conversations:
            raise BadInput(self.dataset, why="has no rows", fix="loosen the dataset's operations")
        if not rows:
            why, fix = f"all {too_long} rows are longer", "raise it or shorten the data"
            raise BadInput("finetune", "max_length", self.recipe.max_length, why=why, fix=fix)
        if self.recipe.validation_rows >= len(rows):
            why, fix = f"the dataset has {len(rows)} rows", "hold out fewer"
            raise BadInput("finetune", "validation_rows", self.recipe.validation_rows, why=why, fix=fix)
        return rows, too_long

    def _trainer(self, rows: list[Row]) -> Trainer:
        try:
            model = load_model(self.model_folder, self.recipe, self.device)
        except ValueError as error:
            if "target modules" not in str(error).lower():
                raise
            why, fix = "matches no module of the base model", "name its linear layers or use all-linear"
            raise BadInput(
                "finetune", "target_modules", self.recipe.target_modules, why=why, fix=fix
            ) from None
        if self.recipe.lora_init == "pissa":
            model.save_pretrained(self.work.initial_adapter)
        return Trainer(model, rows, self.recipe, self.device)

    def _resume(self, trainer: Trainer, budget: float) -> None:
        """Go to the last complete checkpoint inside the budget, or to the start."""
        state, skipped = load_checkpoint(self.checkpoints, budget)
        for why in skipped:
            console.print(f"checkpoint {why} and left out", highlight=False)
        if state is not None:
            for name, value in state.pop("progress").items():
                setattr(self, name, value)
            trainer.restore(state)
            console.print(f"resumed from step {trainer.step} of {trainer.steps}", highlight=False)
        else:
            trainer.step = 0

    def _train(
        self, trainer: Trainer, ledger: Ledger, caught: set[int]
    ) -> Literal["finished", "budget_reached"]:
        heartbeat = HeartbeatWriter(self.heartbeat_file, trainer.steps, "steps")
        with progress(trainer.steps, trainer.step) as show:
            patience = self.recipe.patience or math.inf
            while trainer.step < trainer.steps and self.validations_since_best < patience:
                if ledger.left() <= self._reserve():
                    self._validate(trainer)
                    return "budget_reached"
                try:
                    report = trainer.train_step()
                except NonFiniteLossError as error:
                    self._checkpoint(trainer, ledger)
                    raise Crashed(
                        f"training diverged: {error}; lower finetune.learning_rate or mend those rows "
                        f"(the state before is saved in {self.checkpoints})"
                    ) from None
                self._note(report, ledger)
                show(report, ledger.left())
                heartbeat.beat(report.step, ledger.used())
                due = trainer.step % self.recipe.save_steps == 0
                if due:
                    self._validate(trainer)
                self.tell(self.telemetry[-1])
                seen = set(caught)
                caught -= seen
                # After the first step too: the reserve must know what a checkpoint costs.
                if due or seen or trainer.step == 1:
                    self._checkpoint(trainer, ledger)
                if signal.SIGTERM in seen:
                    ledger.outcome = "stopped"
                    raise Interrupted(
                        f"stopped by SIGTERM at step {trainer.step} of {trainer.steps}; "
                        "start again to go on from there"
                    )
            self._validate(trainer)
        return "finished"

    def _reserve(self) -> float:
        """Seconds kept to end in time: a step, a validation, two saves, and 2 s for what is not measured."""
        step = self.slowest["step"]
        # Until one is measured, a validation of as many rows as a step has is taken to last as long.
        rows = self.recipe.batch_size * self.recipe.gradient_accumulation
        validation = self.slowest["validation"] or step * len(self.held_out) / rows
        return step + validation + 2 * self.slowest["save"] + 2.0

    def _measured(self, what: str, seconds: float) -> None:
        self.slowest[what] = max(self.slowest[what], seconds)

    def _validate(self, trainer: Trainer) -> None:
        """Take the loss on the held-out rows, once for a step, and keep the best step's parameters."""
        if not self.held_out or not self.telemetry or "validation_loss" in self.telemetry[-1]:
            return
        clock = time.monotonic()
        loss = trainer.validation_loss(self.held_out)
        self.telemetry[-1]["validation_loss"] = loss
        self.validations_since_best += 1
        if self.best is None or loss < self.best["loss"]:
            parameters = {name: value.to("cpu", copy=True) for name, value in trainer.trained().items()}
            self.best = {"step": trainer.step, "loss": loss, "parameters": parameters}
            self.validations_since_best = 0
        self._measured("validation", time.monotonic() - clock)

    def _note(self, report: StepReport, ledger: Ledger) -> None:
        self._measured("step", report.seconds)
        self.tokens += report.tokens
        self.telemetry.append(
            {
                "step": report.step,
                "loss": report.loss,
                "learning_rate": report.learning_rate,
                "grad_norm": report.grad_norm,
                "tokens_per_second": round(report.tokens / report.seconds, 1),
                "elapsed_seconds": round(ledger.used(), 3),
                "memory_bytes": peak_memory(self.device),
            }
        )

    def _checkpoint(self, trainer: Trainer, ledger: Ledger) -> None:
        clock = time.monotonic()
        state = {**trainer.state(), "progress": {name: getattr(self, name) for name in PROGRESS}}
        save_checkpoint(self.checkpoints, trainer.step, ledger.used(), state)
        self._measured("save", time.monotonic() - clock)

    def _save(self, trainer: Trainer, base_model: str, ledger: Ledger) -> None:
        shutil.rmtree(self.work.adapter, ignore_errors=True)
        if self.best is not None:
            trainer.put(self.best["parameters"])
        try:
            save_adapter(trainer.model, self.work.adapter, base_model, self.work.initial_adapter)
            with atomic_path(self.work.telemetry) as temporary:
                pq.write_table(pa.Table.from_pylist(self.telemetry, SCHEMA), temporary)
        except (OSError, SafetensorError) as error:  # safetensors has its own for a full disk
            shutil.rmtree(self.work.adapter, ignore_errors=True)
            self._checkpoint(trainer, ledger)
            why = f"the adapter could not be saved ({error}); make room and start again"
            raise Interrupted(why) from error


@contextmanager
def _signals() -> Iterator[set[int]]:
    """Signals that came: SIGTERM (save and stop) and SIGUSR1 (save and go on)."""
    caught: set[int] = set()

    def note(number: int, frame: FrameType | None) -> None:
        caught.add(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(text in str(error) for text in OUT_OF_MEMORY)
