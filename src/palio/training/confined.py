"""Fine-tuning of a base model with code of its own: Palio's trainer in a room, its clock and result outside.

The room has the base model and the dataset, and writes to program/ in the work folder: checkpoints, and the
adapter. Loading the model counts as training time: the clock outside starts with the room.
"""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError, create_model

from palio.config import FinetuneRecipe, Track
from palio.errors import Crashed, Interrupted, RuleViolation
from palio.heartbeat import Heartbeat
from palio.incoming import Incoming
from palio.layout import DatasetFolder, TrainingFolder
from palio.provenance import atomic_path, write_text
from palio.records import AdapterManifest, BaseModelManifest, Contained, Record, TrainingFacts
from palio.sandbox.gpu import track_gpu
from palio.sandbox.handed_in import take_model, take_weights
from palio.sandbox.model_files import folder_tensors
from palio.sandbox.model_room import BASE_MODEL, Call, run
from palio.sandbox.process import Confined
from palio.sandbox.room import GIB, OUTPUT, Limits
from palio.training.checkpoint import KEPT
from palio.training.ledger import Ledger
from palio.training.step import Trained, TrainingStep, caught_signals
from palio.training.telemetry import SCHEMA

LATE_SECONDS = 600.0
"""After the end of the budget the room is ended: the trainer inside stops at it, and needs time to save."""
STATE_BYTES = 16
"""Of a parameter in a checkpoint of full fine-tuning, in fp32: its value, two moments, its best value."""
DATASET = "/dataset"
HEARTBEAT = "heartbeat.json"
FIELDS = frozenset(
    {
        "answers_left_out", "batching", "batching_difference", "best_step", "final_loss", "planned_steps",
        "quantized", "rows", "rows_cut", "rows_held_out", "rows_too_long", "state", "steps",
        "validation_loss",
    }
)  # fmt: skip
"""Of the AdapterManifest, that the trainer inside decides."""
FACTS = frozenset({"peak_memory_bytes", "threads", "tokens", "versions"})
"""Of the TrainingFacts."""


def train_confined(
    recipe: FinetuneRecipe, step: TrainingStep, work: TrainingFolder, model: BaseModelManifest
) -> Trained:
    """Train, or resume, in a room; leaves adapter/ and train.parquet in the work folder.

    Raises PalioError as the trainer does, and TimeLimit, OutOfMemory or Crashed for what the room did.
    """
    if step.options.telemetry.report_to:
        print("dashboards are off: the model brings code, and is trained without a network", file=sys.stderr)
    work.program.mkdir(parents=True, exist_ok=True)
    gpu, limits = track_gpu(step.track), _limits(recipe, step)
    facts, meter = gpu.facts() if gpu else {"device": "cpu"}, gpu.joules if gpu else None
    budget = float(step.track.training_budget)
    with caught_signals() as caught, Ledger(work.ledger, budget, meter=meter, **facts) as ledger:

        def watch(running: Confined) -> None:
            _copy_heartbeat(work, step.folder.heartbeat("finetune"))
            for number in set(caught):
                caught.remove(number)
                running.send(number)
                if number == signal.SIGTERM:
                    ledger.outcome = "stopped"

        call = _call(recipe, step, model, ledger.before)
        room = call.room(limits, work.program, step.isolation.visible)
        left = max(0.0, ledger.left()) + LATE_SECONDS
        try:
            report = run(call, room, work.program_log, seconds=left, watch=watch)
        except Crashed:
            if ledger.outcome == "stopped":  # before the trainer inside could say so
                raise Interrupted("stopped by SIGTERM; start again") from None
            raise
        trained = _checked(report, ledger, facts)
        ledger.outcome = trained.manifest["state"]
    _take(recipe, step, work, model, limits)
    with atomic_path(work.telemetry) as temporary:
        pq.write_table(_telemetry(report), temporary)
    contained = Contained.beside(work.program_log).counts
    return replace(trained, manifest=trained.manifest | {"contained": contained})


def _call(recipe: FinetuneRecipe, step: TrainingStep, model: BaseModelManifest, used: float) -> Call:
    """`used` are the seconds of the budget that earlier attempts took."""
    given = {
        "recipe": recipe.model_dump(mode="json"),
        "track": step.track.model_dump(mode="json"),
        "base_model": model.id,
        "used": used,
        "launched": time.time(),
        "threads": step.options.threads,
    }
    inputs = {BASE_MODEL: step.base_model.model, DATASET: step.folder.dataset.path}
    return Call("train", given, model.code, inputs)


def _limits(recipe: FinetuneRecipe, step: TrainingStep) -> Limits:
    limits = Limits.of(step.track, step.isolation, step.options.threads)
    if recipe.method != "full":
        return limits
    return replace(limits, output=max(limits.output, full_output(step.base_model.model)))


def full_output(model: Path) -> int:
    """Return the bytes that full fine-tuning of a model may write: its checkpoints, one more while that is
    written, and the weights. The trainer is ours, so teams' `output_gb` does not bound it."""
    parameters = sum(math.prod(tensor.shape) for tensor in folder_tensors(model).values())
    return ((KEPT + 1) * STATE_BYTES + 4) * parameters + GIB


def train_inside(
    recipe: dict[str, Any],
    track: dict[str, Any],
    base_model: str,
    used: float,
    launched: float,
    threads: int | None,
) -> dict[str, Any]:
    """In the room: train, and return what `train_confined` reads.

    `used`: seconds of the budget that earlier attempts used; `launched`: when this one began, since 1970.
    """
    import torch

    from palio.training.finetune import Training

    torch.set_num_threads(threads or torch.get_num_threads())
    work = TrainingFolder(Path(OUTPUT))
    work.ledger.unlink(missing_ok=True)
    training = Training(
        FinetuneRecipe.model_validate(recipe),
        Track.model_validate(track),
        work,
        model=Path(BASE_MODEL),
        rows=DatasetFolder(Path(DATASET)).rows,
        heartbeat=Path(OUTPUT, HEARTBEAT),
    )
    training.before_clock = lambda: _begin_ledger(work.ledger, used + time.time() - launched)
    trained = training.run(base_model)
    return {"manifest": trained.manifest, "facts": trained.facts, "telemetry": training.telemetry}


def _begin_ledger(path: Path, seconds: float) -> None:
    """Charge the seconds that were used before the trainer's own clock starts."""
    write_text(path, json.dumps({"event": "end", "attempt": "before", "seconds": seconds}) + "\n")


def _checked(report: Any, ledger: Ledger, facts: dict[str, Any]) -> Trained:
    """Return what the room reports of the training; time and device are what is known outside."""
    try:
        if report["manifest"].keys() != FIELDS:
            raise KeyError
        manifest = typed(AdapterManifest, FIELDS, report["manifest"])
        reported = typed(TrainingFacts, FACTS, report["facts"])
    except (AttributeError, TypeError, KeyError, ValidationError):
        raise Crashed("the process with the model's own code did not report its training") from None
    return Trained(manifest, ledger.used(), reported | facts)


def typed(record: type[Record], names: frozenset[str], values: Any) -> dict[str, Any]:
    """Return the values of some fields of a record. Raises ValidationError if they are of other types."""
    fields: dict[str, Any] = {name: (record.model_fields[name].annotation, ...) for name in names}
    reported: Any = create_model("Reported", **fields)
    return dict(reported.model_validate(values).model_dump())


def _take(
    recipe: FinetuneRecipe, step: TrainingStep, work: TrainingFolder, model: BaseModelManifest, limits: Limits
) -> None:
    """Copy the adapter, or after full fine-tuning the weights, out of the room's folder, like a team's."""
    left, base = TrainingFolder(work.program).adapter, step.base_model.model
    if recipe.method == "full":
        take_weights(left, work.adapter, base_model=base, limit=limits.output)
    else:
        found = take_model(left, work.adapter, base_model=base, base_model_id=model.id, limit=limits.output)
        if (found.kind, found.adapters) != ("lora", ()):
            raise Crashed("the process with the model's own code left no adapter, or several")


def _telemetry(report: Any) -> pa.Table:
    try:
        return pa.Table.from_pylist(report["telemetry"], SCHEMA)
    except (TypeError, KeyError, AttributeError, OverflowError, pa.ArrowException):
        raise Crashed("the process with the model's own code did not report its steps") from None


def _copy_heartbeat(work: TrainingFolder, target: Path) -> None:
    """Show `palio status` how far the room is."""
    try:
        text = (Incoming(work.program) / HEARTBEAT).read()
        Heartbeat.model_validate_json(text)
    except (OSError, ValidationError, RuleViolation):
        return
    if not target.is_file() or target.read_bytes() != text:
        write_text(target, text.decode())
