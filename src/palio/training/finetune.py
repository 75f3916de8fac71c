"""The fine-tuning step: base model and dataset in, adapter out, inside the track's budget.

All training happens in a folder named by the fingerprint of what decides its result:

    work/train/<fingerprint[:16]>/
        ledger.jsonl      seconds of the budget used, over all attempts
        checkpoints/      what a killed attempt goes on from
        adapter/          the finished adapter
        train.parquet     its telemetry
        training.json     what trained it, and how long: goes into finetune.run.json
        adapter.json      its manifest, written last
    adapter/, train.parquet, adapter.json    hard links to (copies of) the recipe's own

so going back to an earlier recipe restores its adapter in seconds, and a run that ended at its budget
stays ended.
"""

from __future__ import annotations

import json
import math
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from palio.config import FinetuneRecipe, Track
from palio.errors import BadInput, Crashed, OutOfMemory, TimeLimit
from palio.provenance import atomic_path, fingerprint, folder_sha256, library_versions, timed_run, write_json
from palio.records import TELEMETRY_SCHEMA, AdapterManifest, BaseModelManifest, DatasetManifest, read_record
from palio.training.checkpoint import load_checkpoint, save_checkpoint
from palio.training.device import energy_meter, hardware, training_device
from palio.training.handover import publish
from palio.training.ledger import Ledger, joules, read_ledger, sole_process
from palio.training.model import load_model, save_adapter
from palio.training.rows import Row, split, tokenise
from palio.training.trainer import NonFiniteLossError, StepReport, Trainer, peak_memory

RECIPE_VERSION = "1"
"""Raised when a change of the trainer changes what a recipe gives."""

FINAL_STEPS = 10
"""`final_loss` is the mean loss of this many last steps: one step's is noise."""

TRACED = ("torch", "transformers", "peft", "bitsandbytes", "numpy")

_console = Console(stderr=True)


def finetune(
    *,
    recipe: FinetuneRecipe,
    track: Track,
    base_model: Path,
    dataset: Path,
    entry_dir: Path,
    competition: str,
    track_id: str,
    entry: str,
    threads: int | None = None,
) -> AdapterManifest:
    """Train, resume or restore; leaves adapter/, train.parquet and adapter.json in `entry_dir`.

    `base_model` and `dataset` are folders with a manifest.json. `threads` are CPU threads of torch.
    Raises BadInput, TimeLimit, OutOfMemory or Crashed; a rerun goes on from the last checkpoint.
    """
    model_manifest = read_record(BaseModelManifest, base_model / "manifest.json")
    data_manifest = read_record(DatasetManifest, dataset / "manifest.json")
    key = fingerprint(
        {
            "recipe": recipe.model_dump(mode="json"),
            "recipe_version": RECIPE_VERSION,
            "base_model": model_manifest.fingerprint,
            "dataset": data_manifest.sha256,
        }
    )
    disable_progress_bar()  # of transformers' loading and saving: only noise in a log
    work = entry_dir / "work" / "train" / key[:16]
    if threads is not None:
        torch.set_num_threads(threads)
    with timed_run(entry_dir / "finetune.run.json", fingerprint=key) as run, sole_process(work):
        run["restored"] = (work / "adapter.json").is_file()
        if not run["restored"]:
            device = training_device(track)
            training = _Training(recipe, track, device, base_model / "model", dataset / "train.parquet", work)
            result = training.run(model_manifest.id)
            facts = {
                "versions": library_versions(*TRACED),
                "threads": torch.get_num_threads(),
                "training_seconds": round(result.pop("seconds"), 3),
                "tokens": training.tokens,
                "energy_joules": joules(read_ledger(work / "ledger.jsonl")),
                "peak_memory_bytes": peak_memory(device),
                "memory_cap_gb": track.gpu_memory_gb,
                **hardware(device),
            }
            write_json(work / "training.json", facts)
            AdapterManifest(
                competition=competition,
                track=track_id,
                entry=entry,
                fingerprint=key,
                recipe_version=RECIPE_VERSION,
                base_model=model_manifest.id,
                base_model_fingerprint=model_manifest.fingerprint,
                dataset_sha256=data_manifest.sha256,
                recipe=recipe.model_dump(mode="json"),
                files=folder_sha256(work / "adapter"),
                **result,
            ).write(work / "adapter.json")
            shutil.rmtree(work / "checkpoints", ignore_errors=True)
        run.update(json.loads((work / "training.json").read_text(encoding="utf-8")))
        return publish(work, entry_dir)


class _Training:
    """One attempt at one training run, in its work folder."""

    def __init__(
        self,
        recipe: FinetuneRecipe,
        track: Track,
        device: torch.device,
        model: Path,
        dataset: Path,
        work: Path,
    ) -> None:
        self.recipe, self.track, self.device, self.work = recipe, track, device, work
        self.model_folder, self.dataset = model, dataset
        self.checkpoints = work / "checkpoints"
        self.telemetry: list[dict[str, float]] = []
        self.held_out: list[Row] = []
        self.best: dict[str, Any] | None = None  # step, loss and parameters of the lowest validation loss
        self.validations_since_best = 0
        self.tokens = 0
        self.slowest_step = self.slowest_save = self.slowest_validation = 0.0

    def run(self, base_model: str) -> dict[str, Any]:
        """Train to the end or to the budget and save; the values of the manifest that training decides."""
        rows, too_long = self._rows()
        rows, self.held_out = split(rows, self.recipe.validation_rows, self.recipe.seed)
        try:
            trainer = self._trainer(rows)
            budget = float(self.track.training_budget)
            ledger_file, meter = self.work / "ledger.jsonl", energy_meter(self.device)
            with (
                _signals() as caught,
                Ledger(ledger_file, budget, meter=meter, **hardware(self.device)) as ledger,
            ):
                self._resume(trainer)
                state = self._train(trainer, ledger, caught)
                self._save(trainer, base_model)
                ledger.outcome = state
                seconds = ledger.used()
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            peak = peak_memory(self.device) / 1e9
            raise OutOfMemory(
                f"out of memory after a peak of {peak:.1f} GB; lower finetune.batch_size (and raise "
                "gradient_accumulation), lower max_length, or set gradient_checkpointing: true"
            ) from error
        last = [line["loss"] for line in self.telemetry[-FINAL_STEPS:]]
        return {
            "state": state,
            "steps": trainer.step,
            "planned_steps": trainer.steps,
            "rows": len(rows),
            "rows_too_long": too_long,
            "final_loss": sum(last) / len(last),
            "best_step": self.best["step"] if self.best else None,
            "validation_loss": self.best["loss"] if self.best else None,
            "seconds": seconds,
        }

    def _rows(self) -> tuple[list[Row], int]:
        table = pq.read_table(self.dataset, columns=["prompt", "completion"])
        tokenizer = AutoTokenizer.from_pretrained(self.model_folder)
        if tokenizer.eos_token_id is None:
            fix = "the tokenizer has no end-of-sequence token; add eos_token to tokenizer_config.json"
            raise BadInput(self.model_folder, "eos_token", None, fix)
        prompts, completions = table["prompt"].to_pylist(), table["completion"].to_pylist()
        rows, too_long = tokenise(tokenizer, prompts, completions, self.recipe.max_length)
        if not prompts:
            raise BadInput(self.dataset, "", None, "has no rows; loosen the dataset's operations")
        if not rows:
            longest = f"all {too_long} rows are longer; raise it or shorten the data"
            raise BadInput("finetune", "max_length", self.recipe.max_length, longest)
        if self.recipe.validation_rows >= len(rows):
            few = f"the dataset has {len(rows)} rows; hold out fewer"
            raise BadInput("finetune", "validation_rows", self.recipe.validation_rows, few)
        return rows, too_long

    def _trainer(self, rows: list[Row]) -> Trainer:
        try:
            model = load_model(self.model_folder, self.recipe, self.device)
        except ValueError as error:
            if "target modules" not in str(error).lower():
                raise
            fix = "matches no module of the base model; name its linear layers or use all-linear"
            raise BadInput("finetune", "target_modules", self.recipe.target_modules, fix) from None
        return Trainer(model, rows, self.recipe, self.device)

    def _resume(self, trainer: Trainer) -> None:
        state, torn = load_checkpoint(self.checkpoints, self.device)
        for name in torn:
            _console.print(f"checkpoint {name} is torn and left out", highlight=False)
        if state is not None:
            self.telemetry = state.pop("telemetry")
            self.best = state.pop("best")
            self.validations_since_best = state.pop("validations_since_best")
            self.tokens = state.pop("tokens")
            trainer.restore(state)
            _console.print(f"resumed from step {trainer.step} of {trainer.steps}", highlight=False)

    def _train(
        self, trainer: Trainer, ledger: Ledger, caught: set[int]
    ) -> Literal["finished", "budget_reached"]:
        with _progress(trainer.steps, trainer.step) as show:
            patience = self.recipe.patience or math.inf
            while trainer.step < trainer.steps and self.validations_since_best < patience:
                # Kept in reserve: the slowest step, two saves, a validation, 2 s for what is not measured.
                reserve = self.slowest_step + 2 * self.slowest_save + self.slowest_validation + 2.0
                if ledger.left() <= reserve:
                    if trainer.step == 0:
                        raise TimeLimit(
                            f"the training budget of {ledger.budget:g} s ended before the first step"
                        )
                    self._validate(trainer)
                    return "budget_reached"
                try:
                    report = trainer.train_step()
                except NonFiniteLossError as error:
                    raise Crashed(
                        f"training diverged: {error}; lower finetune.learning_rate or mend those rows"
                    ) from None
                self._note(report, ledger)
                show(report, ledger.left())
                due = trainer.step % self.recipe.save_steps == 0
                if due:
                    self._validate(trainer)
                seen = set(caught)
                caught -= seen
                if due or seen:
                    self._checkpoint(trainer)
                if signal.SIGTERM in seen:
                    ledger.outcome = "stopped"
                    raise Crashed(
                        f"stopped by SIGTERM at step {trainer.step} of {trainer.steps}; "
                        "start again to go on from there"
                    )
            self._validate(trainer)
        return "finished"

    def _validate(self, trainer: Trainer) -> None:
        """Take the loss on the held-out rows, once for a step, and keep the best step's parameters."""
        if not self.held_out or "validation_loss" in self.telemetry[-1]:
            return
        clock = time.monotonic()
        loss = trainer.validation_loss(self.held_out)
        self.telemetry[-1]["validation_loss"] = loss
        self.validations_since_best += 1
        if self.best is None or loss < self.best["loss"]:
            parameters = {name: value.clone() for name, value in trainer.trained().items()}
            self.best = {"step": trainer.step, "loss": loss, "parameters": parameters}
            self.validations_since_best = 0
        self.slowest_validation = max(self.slowest_validation, time.monotonic() - clock)

    def _note(self, report: StepReport, ledger: Ledger) -> None:
        self.slowest_step = max(self.slowest_step, report.seconds)
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

    def _checkpoint(self, trainer: Trainer) -> None:
        clock = time.monotonic()
        progress = {
            "telemetry": self.telemetry,
            "best": self.best,
            "validations_since_best": self.validations_since_best,
            "tokens": self.tokens,
        }
        save_checkpoint(self.checkpoints, trainer.step, {**trainer.state(), **progress})
        self.slowest_save = max(self.slowest_save, time.monotonic() - clock)

    def _save(self, trainer: Trainer, base_model: str) -> None:
        shutil.rmtree(self.work / "adapter", ignore_errors=True)
        if self.best is not None:
            trainer.put(self.best["parameters"])
        try:
            save_adapter(trainer.model, self.work / "adapter", base_model)
            with atomic_path(self.work / "train.parquet") as temporary:
                pq.write_table(pa.Table.from_pylist(self.telemetry, TELEMETRY_SCHEMA), temporary)
        except OSError as error:
            self._checkpoint(trainer)
            raise Crashed(f"the adapter could not be saved ({error}); make room and start again") from error


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


@contextmanager
def _progress(steps: int, done: int) -> Iterator[Any]:
    """A bar on a terminal; elsewhere a line for about every twentieth of the steps."""
    if sys.stderr.isatty():
        columns = (
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=_console) as bar:
            task = bar.add_task("training", total=steps, completed=done, note="")

            def draw(report: StepReport, left: float) -> None:
                bar.update(task, completed=report.step, note=_line(report, left))

            yield draw
        return
    every = max(1, steps // 20)

    def write(report: StepReport, left: float) -> None:
        if report.step % every == 0 or report.step in (1, steps):
            _console.print(f"step {report.step}/{steps} {_line(report, left)}", highlight=False)

    yield write


def _line(report: StepReport, left: float) -> str:
    speed = report.tokens / report.seconds
    return f"loss {report.loss:.3f} {speed:.0f} tokens/s budget left {left:.0f} s"


def _is_out_of_memory(error: BaseException) -> bool:
    """torch says it on a CPU only by the text of a RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return "can't allocate memory" in str(error) or "not enough memory" in str(error)
