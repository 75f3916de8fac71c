"""Fine-tuning by Palio's own trainer.

Besides the files of `palio.training.step`, the work folder holds checkpoints/.
"""

from __future__ import annotations

import math
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError
from transformers.utils.logging import disable_progress_bar

from palio.config import FinetuneRecipe, Track
from palio.errors import BadInput, Crashed, Interrupted, OutOfMemory, TimeLimit
from palio.heartbeat import HeartbeatWriter
from palio.layout import TrainingFolder
from palio.provenance import atomic_path, library_versions
from palio.quantization import quantized_share
from palio.records import AdapterManifest, BaseModelManifest, read_record
from palio.tokens import extended_tokenizer
from palio.training.batching import choose_batching
from palio.training.checkpoint import load_checkpoint, save_checkpoint
from palio.training.confined import train_confined
from palio.training.device import hardware, nvml_gpu, training_device
from palio.training.ledger import Ledger
from palio.training.model import load_model, save_adapter
from palio.training.rows import Row, TooLong, dataset_rows, split
from palio.training.step import Trained, TrainingStep, adapter_of, caught_signals
from palio.training.telemetry import SCHEMA, Sink, console, dashboards, progress
from palio.training.trainer import NonFiniteLossError, StepReport, Trainer, peak_memory

RECIPE_VERSION = "2"
"""Raised when a change of the trainer changes the result of a recipe."""

FINAL_STEPS = 10
"""Steps at the end whose mean loss is `final_loss`: a single step's is noise."""

PROGRESS = ("telemetry", "best", "validations_since_best", "tokens", "slowest")
"""Attributes that a checkpoint holds besides the trainer's own state."""

OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""Texts of RuntimeError by torch on a CPU, the CUDA driver, bitsandbytes and cuBLAS."""

TRACED = ("torch", "transformers", "peft", "bitsandbytes", "numpy")


def finetune(recipe: FinetuneRecipe, step: TrainingStep) -> AdapterManifest:
    """Train, resume or restore; writes adapter/, train.parquet and adapter.json into the entry's folder.

    Restarted, it resumes from the last checkpoint.

    Raises BadInput, TimeLimit, OutOfMemory, Crashed or Interrupted.
    """
    disable_progress_bar()  # transformers' bars are noise in a log
    folder = step.folder
    torch.set_num_threads(step.options.threads or torch.get_num_threads())
    model = read_record(BaseModelManifest, step.base_model.manifest)

    def train(work: TrainingFolder, base_model: str) -> Trained:
        if model.code:
            return train_confined(recipe, step, work, model)
        training = Training(
            recipe,
            step.track,
            work,
            model=step.base_model.model,
            rows=folder.dataset.rows,
            heartbeat=folder.heartbeat("finetune"),
        )
        with dashboards(
            step.options.telemetry.report_to,
            folder=folder.dashboards,
            run=f"{step.settings.competition_id}/{folder.track_id}/{folder.name}",
            key=work.path.name,
            recipe=recipe.model_dump(mode="json"),
        ) as training.dashboards:
            return training.run(base_model)

    for fault in model.recipe_faults(recipe):
        raise fault
    return adapter_of(step, recipe.model_dump(mode="json"), RECIPE_VERSION, train)


class Training:
    """One attempt at a training run, in its work folder: of the base model in the folder `model`, on the rows
    of the dataset in the file `rows`."""

    def __init__(
        self,
        recipe: FinetuneRecipe,
        track: Track,
        work: TrainingFolder,
        *,
        model: Path,
        rows: Path,
        heartbeat: Path,
    ) -> None:
        self.recipe, self.track, self.work = recipe, track, work
        self.device = training_device(track)
        self.gpu = nvml_gpu(self.device)
        self.hardware = hardware(self.device, self.gpu)
        self.model_folder, self.dataset = model, rows
        self.telemetry: list[dict[str, float]] = []
        self.held_out: list[Row] = []
        self.best: dict[str, Any] | None = None  # step, loss and parameters of the lowest validation loss
        self.validations_since_best = 0
        self.tokens = 0
        self.quantized: float | None = None
        self.slowest = {"step": 0.0, "save": 0.0, "validation": 0.0}  # seconds
        self.dashboards: Sink = lambda row: None
        self.heartbeat_file = heartbeat
        self.before_clock: Callable[[], None] = lambda: None
        """Called when everything is loaded, before the budget starts."""

    def run(self, base_model: str) -> Trained:
        """Train to the end or until the budget runs out, and save."""
        rows, self.held_out, too_long = self._rows()
        try:
            trainer = self._trainer(rows)
            state, seconds = self._within_budget(trainer, base_model)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            peak = peak_memory(self.device) / 1e9
            raise OutOfMemory(
                f"out of memory after a peak of {peak:.1f} GB; lower finetune.batch_size (and raise "
                "gradient_accumulation), lower max_length, or set gradient_checkpointing: true"
            ) from error
        facts = {
            "versions": library_versions(*TRACED),
            "threads": torch.get_num_threads(),
            "tokens": self.tokens,
            "peak_memory_bytes": peak_memory(self.device),
            **self.hardware,
        }
        return Trained({"state": state, **self._figures(trainer, too_long)}, seconds, facts)

    def _within_budget(self, trainer: Trainer, base_model: str) -> tuple[str, float]:
        """Train and save under the budget's clock; return how training ended and the seconds used."""
        budget = float(self.track.training_budget)
        meter = self.gpu.joules if self.gpu else None
        self.before_clock()
        with (
            caught_signals() as caught,
            Ledger(self.work.ledger, budget, meter=meter, **self.hardware) as ledger,
        ):
            self._resume(trainer, budget)
            state = self._train(trainer, ledger, caught)
            if ledger.left() < 0:  # the last action took far longer than ever before
                self._resume(trainer, budget)
                state = "budget_reached"
            if trainer.step == 0:
                raise TimeLimit(f"the training budget of {budget:g} s ended before the first step was saved")
            self._save(trainer, base_model, ledger)
            ledger.outcome = state
            return state, ledger.used()

    def _figures(self, trainer: Trainer, too_long: TooLong) -> dict[str, Any]:
        """Return what the manifest says of a training that has ended."""
        last = [line["loss"] for line in self.telemetry[-FINAL_STEPS:]]
        return {
            "steps": trainer.step,
            "planned_steps": trainer.steps,
            "rows": len(trainer.rows),
            "rows_too_long": too_long.dropped,
            "rows_cut": too_long.cut,
            "answers_left_out": too_long.answers,
            "rows_held_out": len(self.held_out),
            "final_loss": sum(last) / len(last),
            "quantized": self.quantized,
            "batching": self.batching.rows,
            "batching_difference": float(f"{self.batching.difference:.2g}"),
            "best_step": self.best["step"] if self.best else None,
            "validation_loss": self.best["loss"] if self.best else None,
        }

    def _rows(self) -> tuple[list[Row], list[Row], TooLong]:
        """Return the tokenized rows to train on and to hold out, and what was too long; refuse unusable
        input."""
        rows, too_long = dataset_rows(self.dataset, self.model_folder, self.recipe)
        if not rows:
            why, fix = f"all {too_long.dropped} rows are longer", "raise it or shorten the data"
            raise BadInput("finetune", "max_length", self.recipe.max_length, why=why, fix=fix)
        count = len({row.number for row in rows})
        held_out = self.recipe.held_out_of(count)
        if held_out >= count:
            why, fix = f"the dataset has {count} rows", "hold out fewer"
            raise BadInput("finetune", "validation_rows", self.recipe.validation_rows, why=why, fix=fix)
        return *split(rows, held_out, self.recipe.order_seed), too_long

    def _trainer(self, rows: list[Row]) -> Trainer:
        model = load_model(self.model_folder, self.recipe, self.device)
        if self.recipe.method == "qlora":
            self.quantized = round(quantized_share(model.get_base_model())[0], 4)
        if self.recipe.lora_init == "pissa":
            model.save_pretrained(self.work.initial_adapter)
        every = [*rows, *self.held_out]
        self.batching = choose_batching(model, every, self.recipe.batch_size, self.device)
        if self.batching.reason:
            console.print(f"rows are padded: {self.batching.reason}", highlight=False, markup=False)
        flat = self.batching.rows == "end to end"
        return Trainer(model, rows, self.recipe, self.device, flat=flat)

    def _resume(self, trainer: Trainer, budget: float) -> None:
        """Restore the last complete checkpoint within the budget, or start from step 0."""
        state, skipped = load_checkpoint(self.work.checkpoints, budget)
        for reason in skipped:
            console.print(f"checkpoint {reason}; skipped", highlight=False)
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
                        f"training diverged: {error}; lower finetune.learning_rate or fix those rows "
                        f"(the state before this step is saved in {self.work.checkpoints})"
                    ) from None
                self._note(report, ledger)
                show(report, ledger.left())
                heartbeat.beat(report.step, ledger.used())
                due = trainer.step % self.recipe.save_steps == 0
                if due:
                    self._validate(trainer)
                self.dashboards(self.telemetry[-1])
                seen = set(caught)
                caught -= seen
                # Also after the first step: the reserve needs the cost of a checkpoint.
                if due or seen or trainer.step == 1:
                    self._checkpoint(trainer, ledger)
                if signal.SIGTERM in seen:
                    ledger.outcome = "stopped"
                    raise Interrupted(
                        f"stopped by SIGTERM at step {trainer.step} of {trainer.steps}; "
                        "start again to resume from there"
                    )
            self._validate(trainer)
        return "finished"

    def _reserve(self) -> float:
        """Return the seconds kept in reserve: a step, a validation, two saves, and 2 s for the unmeasured."""
        step = self.slowest["step"]
        # Until measured, a validation is assumed to take as long per row as a training step.
        rows = self.recipe.batch_size * self.recipe.gradient_accumulation
        validation = self.slowest["validation"] or step * len(self.held_out) / rows
        return step + validation + 2 * self.slowest["save"] + 2.0

    def _measured(self, what: str, seconds: float) -> None:
        self.slowest[what] = max(self.slowest[what], seconds)

    def _validate(self, trainer: Trainer) -> None:
        """Measure the loss on the held-out rows, once per step, and keep the best step's parameters."""
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
        save_checkpoint(self.work.checkpoints, trainer.step, ledger.used(), state)
        self._measured("save", time.monotonic() - clock)

    def _save(self, trainer: Trainer, base_model: str, ledger: Ledger) -> None:
        shutil.rmtree(self.work.adapter, ignore_errors=True)
        if self.best is not None:
            trainer.put(self.best["parameters"])
        try:
            extra = self.recipe.extra_tokens
            tokenizer = extended_tokenizer(self.model_folder, extra) if extra else None
            save_adapter(trainer.model, self.work.adapter, base_model, self.work.initial_adapter, tokenizer)
            with atomic_path(self.work.telemetry) as temporary:
                pq.write_table(pa.Table.from_pylist(self.telemetry, SCHEMA), temporary)
        except (OSError, SafetensorError) as error:  # safetensors' error for a full disk
            shutil.rmtree(self.work.adapter, ignore_errors=True)
            self._checkpoint(trainer, ledger)
            why = f"the adapter could not be saved ({error}); make room and start again"
            raise Interrupted(why) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Return True for every library's way to report that memory ran out."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or any(text in str(error) for text in OUT_OF_MEMORY)
