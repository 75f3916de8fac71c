"""Fine-tuning by a team's own program, confined. Its contract is docs/command_entries.md.

Besides the files of `palio.training.step`, the work folder holds:

    program/                  the program's /output: result/ and checkpoints/
    program.log               its output
    program.contained.json    what its confinement blocked
"""

from __future__ import annotations

import math
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Literal

import pyarrow.parquet as pq

from palio.config import Program
from palio.errors import Crashed, Interrupted, TimeLimit
from palio.layout import TrainingFolder
from palio.provenance import atomic_path, file_sha256, fingerprint, folder_sha256
from palio.records import AdapterManifest, Contained
from palio.sandbox.gpu import track_gpu
from palio.sandbox.handed_in import take_files, take_model
from palio.sandbox.image import image_folder
from palio.sandbox.process import Confined
from palio.sandbox.room import GIB, OUTPUT, Limits, Room
from palio.text import duration, last_lines
from palio.training.ledger import Ledger
from palio.training.step import Trained, TrainingStep, adapter_of, caught_signals
from palio.training.telemetry import SCHEMA

RECIPE_VERSION = "command 1"
"""Version of the contract; raised when a change of ours changes what a program is given."""
NOTICE_SECONDS, NOTICE_SHARE = 60.0, 1 / 20
"""A program gets SIGTERM this long before its deadline, or this share of the budget if that is less."""
STOP_SECONDS = 20.0
"""Time to save its work when the job itself is stopped; SLURM kills after 30 s."""
POLL_SECONDS = 0.2


def finetune_by_command(program: Program, step: TrainingStep) -> AdapterManifest:
    """Run, resume or restore; writes adapter/, train.parquet and adapter.json into the entry's folder.

    Restarted, the program finds its own checkpoints and the rest of the budget.

    Raises BadInput, RuleViolation, TimeLimit, OutOfMemory, Crashed or Interrupted.
    """
    files, image, digests = _taken_over(program, step)
    gpu = track_gpu(step.track)
    recipe = {
        "kind": "command",
        **program.model_dump(mode="json", exclude_none=True),
        **digests,
        "network": step.settings.network,
    } | ({"seed": step.settings.seed} if step.settings.seed else {})

    def train(work: TrainingFolder, base_model: str) -> Trained:
        room = _room(step, work, files, image)
        facts, log = gpu.facts() if gpu else {"device": "cpu"}, work.program_log
        budget, meter = float(step.track.training_budget), gpu.joules if gpu else None
        with Ledger(work.ledger, budget, meter=meter, **facts) as ledger:
            state = _run(program, room, ledger, log, step.isolation.unconfined, step.settings.seed)
            if state == "budget_reached" and _is_empty(work.program_result):
                ledger.outcome = state
                raise _too_slow(budget)
            handed_in = take_model(
                work.program_result,
                work.adapter,
                base_model=step.base_model.model,
                base_model_id=base_model,
                limit=room.limits.output,
            )
            ledger.outcome = state
            seconds = ledger.used()
        with atomic_path(work.telemetry) as temporary:  # steps are the program's own affair
            pq.write_table(SCHEMA.empty_table(), temporary)
        adapters = {"adapters": list(handed_in.adapters)} if handed_in.adapters else {}
        manifest = {
            "recipe": recipe | {"method": handed_in.kind} | adapters,
            "state": state,
            **dict.fromkeys(("steps", "planned_steps", "rows_too_long", "final_loss")),
            "contained": Contained.beside(log).counts
            | {f"a pickle that was not taken: {name!r}": 1 for name in handed_in.pickles},
        }
        return Trained(manifest, seconds, facts)

    return adapter_of(step, recipe, RECIPE_VERSION, train)


def _taken_over(
    program: Program, step: TrainingStep
) -> tuple[Path | None, str | None, dict[str, str | None]]:
    """Copy a program's files and image into the entry's folder; return where they are, and their digests. An
    image in a registry stays there."""

    def taken(path: str, key: str, target: Path) -> Path:
        limit = int(step.isolation.output_gb * GIB)
        return take_files(path, key, target, roots=step.settings.team_folders, limit=limit)

    files, image = None, program.image
    if program.files is not None:
        files = taken(program.files, "command.files", step.folder.program_files)
    digests = {"files_sha256": fingerprint(folder_sha256(files)) if files else None}
    if image and not image.startswith("docker://"):
        image = str(taken(image, "command.image", step.folder.program_image(Path(image).suffix)))
        digests["image_sha256"] = file_sha256(Path(image))
    return files, image, digests


def _room(step: TrainingStep, work: TrainingFolder, files: Path | None, image: str | None) -> Room:
    isolation = step.isolation
    return Room(
        limits=Limits.of(step.track, isolation, step.options.threads),
        files=files,
        inputs={"/base_model": step.base_model.model, "/dataset": step.folder.dataset.path},
        output=work.program,
        network=step.settings.network,
        visible=isolation.visible,
        image=image_folder(image, step.folder.work, int(isolation.image_gb * GIB)),
    )


def _too_slow(budget: float) -> TimeLimit:
    return TimeLimit(
        f"the budget of {duration(budget)} ran out before the program had left a result; "
        "save one early, and again whenever it is better"
    )


def _is_empty(result: Path) -> bool:
    """Whether a program has left nothing; what else it may have made of the folder, `take_model` judges."""
    return result.is_dir() and not result.is_symlink() and not any(result.iterdir())


def _run(
    program: Program, room: Room, ledger: Ledger, log: Path, unconfined: bool, seed: int | None
) -> Literal["finished", "budget_reached"]:
    """Let the program train within the rest of the budget."""
    assert room.output is not None
    room.output.mkdir(parents=True, exist_ok=True)
    for name in ("result", "checkpoints"):
        with suppress(FileExistsError):  # whatever an earlier attempt left by that name: take_model judges it
            (room.output / name).mkdir()
    left = ledger.left()
    if left <= POLL_SECONDS:
        return "budget_reached"  # by an earlier attempt, whose result is used
    notice = min(NOTICE_SECONDS, ledger.budget * NOTICE_SHARE)
    room = _with_contract(room, left, seed)
    print(f"{left:.0f} s of the budget left; the program's output goes to {log}", file=sys.stderr, flush=True)
    with caught_signals() as caught, Confined(program, room, log, unconfined=unconfined) as running:
        asked = False
        while (code := running.wait(POLL_SECONDS)) is None:
            left = ledger.left()
            if signal.SIGTERM in caught:
                running.ask_to_stop()
                running.wait(min(STOP_SECONDS, max(0.0, left)))
                ledger.outcome = "stopped"
                raise Interrupted("stopped by SIGTERM; start again to resume from the program's checkpoints")
            if left <= 0:
                break
            if left <= notice and not asked:
                running.ask_to_stop()
                asked = True
        running.end()
        if running.broken is not None:
            raise running.broken
    if code is None or (asked and code != 0):
        return "budget_reached"
    if code != 0:
        last = last_lines(log.read_bytes()[-4096:].decode(errors="replace"), 1) or "it printed nothing"
        raise Crashed(f"the program exited with code {code}; {log}: {last}")
    return "finished"


def _with_contract(room: Room, left: float, seed: int | None) -> Room:
    """Add the environment variables of contract 1, and a replicate's seed."""
    variables = {
        "PALIO_CONTRACT": "1",
        "PALIO_BASE_MODEL": "/base_model",
        "PALIO_DATASET": "/dataset",
        "PALIO_OUTPUT": f"{OUTPUT}/result",
        "PALIO_CHECKPOINTS": f"{OUTPUT}/checkpoints",
        "PALIO_SECONDS": str(math.floor(left)),
        "PALIO_DEADLINE": str(math.floor(time.time() + left)),
        "PALIO_CPUS": str(room.limits.cpus),
        "PALIO_MEMORY_BYTES": str(room.limits.memory),
        "PALIO_GPU_MEMORY_BYTES": str(room.limits.gpu_memory or 0),
    } | ({"PALIO_SEED": str(seed)} if seed else {})
    return Room(**{**vars(room), "variables": variables})
