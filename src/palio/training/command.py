"""The fine-tuning step with a team's own program, confined: docs/command_entries.md is its contract.

The same budget ledger, folders and record as Palio's own trainer has:

    work/train/<fingerprint[:16]>/
        ledger.jsonl      seconds of the budget used, over all attempts
        program/          /output of the program: result/ and checkpoints/
        program.log       what it printed
        adapter/, train.parquet, training.json, adapter.json    as of the trainer's
"""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from palio.config import Isolation, Program, Track
from palio.errors import Crashed, Interrupted
from palio.provenance import atomic_path, fingerprint, folder_sha256, timed_run, write_json
from palio.records import AdapterManifest, BaseModelManifest, Contained, DatasetManifest, read_record
from palio.sandbox import gpu
from palio.sandbox.handed_in import check_files, take_model
from palio.sandbox.image import image_folder
from palio.sandbox.process import Confined
from palio.sandbox.room import OUTPUT, Limits, Room
from palio.training.handover import ended, publish, refuse_to_replace
from palio.training.ledger import Ledger, joules, read_ledger, sole_process
from palio.training.telemetry import SCHEMA

RECIPE_VERSION = "command 1"
"""Contract 1. Raised when a change of ours changes what a program is given."""
NOTICE_SECONDS, NOTICE_SHARE = 60.0, 1 / 20
"""A program gets SIGTERM this long before its deadline, or this share of the budget, if that is less."""
STOP_SECONDS = 20.0
"""To save what it has when the job itself is stopped; SLURM kills after 30 s."""
POLL_SECONDS = 0.2


def finetune_by_command(
    *,
    program: Program,
    isolation: Isolation,
    network: bool,
    track: Track,
    base_model: Path,
    dataset: Path,
    entry_dir: Path,
    competition: str,
    track_id: str,
    entry: str,
    threads: int | None = None,
    usd_per_hour: float | None = None,
    retrain: bool = False,
) -> AdapterManifest:
    """Run, go on or restore; leaves adapter/, train.parquet and adapter.json in `entry_dir`.

    Raises BadInput, RuleViolation, OutOfMemory, Crashed or Interrupted. Started again, the program finds its
    own checkpoints and what is left of the budget.
    """
    model_manifest = read_record(BaseModelManifest, base_model / "manifest.json")
    data_manifest = read_record(DatasetManifest, dataset / "manifest.json")
    files = Path(program.files) if program.files else None
    if files is not None:
        check_files(files, "command.files")
    gpu.check_gpu(track)
    recipe = {
        "kind": "command",
        **program.model_dump(mode="json", exclude_none=True),
        "files_sha256": fingerprint(folder_sha256(files)) if files else None,
        "network": network,
    }
    key = fingerprint(
        {
            "recipe": recipe,
            "recipe_version": RECIPE_VERSION,
            "base_model": model_manifest.fingerprint,
            "dataset": data_manifest.sha256,
        }
    )
    if not retrain:
        refuse_to_replace(entry_dir / "adapter.json", key)
    work = entry_dir / "work" / "train" / key[:16]
    with timed_run(entry_dir / "finetune.run.json", fingerprint=key) as run, sole_process(work):
        run["restored"] = ended(work, track)
        if not run["restored"]:
            (work / "adapter.json").unlink(missing_ok=True)  # of a smaller budget
            room = Room(
                limits=Limits.of(track, isolation, threads),
                files=files,
                inputs={"/base_model": base_model / "model", "/dataset": dataset},
                output=work / "program",
                network=network,
                visible=isolation.visible,
                system=image_folder(program.image, entry_dir / "work"),
            )
            facts, log = gpu.hardware(track), work / "program.log"
            with Ledger(
                work / "ledger.jsonl", float(track.training_budget), meter=gpu.energy_meter(track), **facts
            ) as ledger:
                state = _run(program, room, ledger, log, isolation.unconfined)
                method, pickles = take_model(
                    work / "program" / "result",
                    work / "adapter",
                    base_model=base_model / "model",
                    base_model_id=model_manifest.id,
                )
                ledger.outcome = state
                seconds = ledger.used()
            with atomic_path(work / "train.parquet") as temporary:  # its steps are its own
                pq.write_table(pa.Table.from_pylist([], SCHEMA), temporary)
            measured = {"training_seconds": round(seconds, 3), **facts}
            measured["energy_joules"] = joules(read_ledger(work / "ledger.jsonl"))
            write_json(work / "training.json", measured | {"memory_cap_gb": track.gpu_memory_gb})
            AdapterManifest(
                competition=competition,
                track=track_id,
                entry=entry,
                fingerprint=key,
                recipe_version=RECIPE_VERSION,
                base_model=model_manifest.id,
                base_model_fingerprint=model_manifest.fingerprint,
                dataset_sha256=data_manifest.sha256,
                recipe=recipe | {"method": method},
                state=state,
                steps=None,
                planned_steps=None,
                rows=data_manifest.rows,
                rows_too_long=None,
                final_loss=None,
                contained=Contained.beside(log).counts
                | {f"a pickle that was not taken: {name!r}": 1 for name in pickles},
                files=folder_sha256(work / "adapter"),
            ).write(work / "adapter.json")
        run.update(json.loads((work / "training.json").read_text(encoding="utf-8")))
        run["cost_usd"] = usd_per_hour and round(usd_per_hour * run["training_seconds"] / 3600, 4)
        return publish(work, entry_dir)


def _run(
    program: Program, room: Room, ledger: Ledger, log: Path, unconfined: bool
) -> Literal["finished", "budget_reached"]:
    """Let the program train inside what is left of the budget."""
    assert room.output is not None
    for name in ("result", "checkpoints"):
        (room.output / name).mkdir(parents=True, exist_ok=True)
    left = ledger.left()
    if left <= POLL_SECONDS:
        return "budget_reached"  # in an earlier attempt; what it left is taken
    notice = min(NOTICE_SECONDS, ledger.budget * NOTICE_SHARE)
    room = _with_contract(room, left)
    print(f"{left:.0f} s of the budget left; the program's output goes to {log}", file=sys.stderr, flush=True)
    with _stop_signal() as stopped, Confined(program, room, log, unconfined=unconfined) as running:
        asked = False
        while (code := running.wait(POLL_SECONDS)) is None:
            left = ledger.left()
            if stopped:
                running.ask_to_stop()
                running.wait(min(STOP_SECONDS, max(0.0, left)))
                ledger.outcome = "stopped"
                raise Interrupted("stopped by SIGTERM; start again and the program finds its checkpoints")
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
        raise Crashed(f"the program ended with code {code}; {log}: {_last_line(log)}")
    return "finished"


def _with_contract(room: Room, left: float) -> Room:
    """The variables of contract 1."""
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
    }
    return Room(**{**vars(room), "variables": variables})


@contextmanager
def _stop_signal() -> Iterator[set[int]]:
    """SIGTERM, noted instead of ending us; SIGUSR1, SLURM's early warning, says nothing new here."""
    caught: set[int] = set()
    before = {
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda number, frame: caught.add(number)),
        signal.SIGUSR1: signal.signal(signal.SIGUSR1, signal.SIG_IGN),
    }
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _last_line(log: Path) -> str:
    """Printable, and at most 200 characters: a program's output may hold anything."""
    lines = log.read_bytes()[-4096:].decode(errors="replace").strip().splitlines()
    return "".join(filter(str.isprintable, lines[-1]))[:200] if lines else "it printed nothing"
