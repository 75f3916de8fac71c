"""What can go wrong in 24 hours of training, each in its documented state, and the next start after it."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from palio.errors import Crashed, Interrupted, PalioError, TimeLimit
from palio.records import AdapterManifest, BaseModelManifest, StepFailure, read_record
from palio.training.ledger import charged, read_ledger
from palio.training.trainer import StepReport, Trainer
from tests.support.training import Entry, wait_for_step


@pytest.fixture
def entry(tiny: Path, tmp_path: Path) -> Entry:
    return Entry.create(tmp_path / "results" / "t" / "e", tiny)


def failure(entry: Entry) -> StepFailure:
    return read_record(StepFailure, entry.folder / "work" / "failures" / "finetune.json")


def attempts(entry: Entry) -> int:
    """Attempts whose clock has started."""
    ledgers = (entry.folder / "work" / "train").glob("*/ledger.jsonl")
    return sum(line["event"] == "start" for path in ledgers for line in read_ledger(path))


def newest_checkpoint(entry: Entry) -> int:
    """Step of the newest complete checkpoint."""
    complete = (entry.work() / "checkpoints").glob("step-*/checkpoint.json")
    return max(int(path.parent.name.partition("-")[2]) for path in complete)


def test_three_kills_change_no_byte_and_no_second(entry: Entry, tiny: Path, tmp_path: Path) -> None:
    recipe: dict[str, Any] = {
        "max_steps": 60,
        "save_steps": 4,
        "lora_dropout": 0.1,
        "batch_size": 4,
        "validation_rows": 8,
    }
    undisturbed = Entry.create(tmp_path / "results" / "t" / "undisturbed", tiny)
    expected = undisturbed.finetune(**recipe)
    draw = random.Random(time.time_ns())
    trained = 0.0
    for step in sorted(draw.sample(range(5, 55), 3)):
        process = entry.start(**recipe)
        known = attempts(entry)
        while attempts(entry) == known:
            assert process.poll() is None
            time.sleep(0.02)
        started = time.monotonic()
        wait_for_step(process, step)
        process.kill()
        process.wait()
        trained += time.monotonic() - started
        assert process.stderr is not None
        process.stderr.close()
        assert not (entry.folder / "adapter.json").exists()
    seconds = sum(charged(read_ledger(entry.work() / "ledger.jsonl")).values())
    assert seconds == pytest.approx(trained, abs=2)
    assert entry.finetune(**recipe).files == expected.files
    steps = pq.read_table(entry.folder / "train.parquet")["step"].to_pylist()
    assert steps == list(range(1, 61))  # replayed steps are not told twice


def test_sigterm_saves_at_once_and_the_next_start_goes_on(entry: Entry) -> None:
    process = entry.start(max_steps=80, save_steps=1000)
    wait_for_step(process, 10)
    process.send_signal(signal.SIGTERM)
    assert process.stderr is not None
    rest = process.stderr.read()
    assert process.wait() == Interrupted.exit_code
    assert "stopped by SIGTERM at step" in rest
    assert "Traceback" not in rest
    assert "start again to resume" in failure(entry).reason
    reached = newest_checkpoint(entry)
    assert reached >= 10
    again = entry.start(max_steps=80, save_steps=1000)
    assert again.stderr is not None
    assert f"resumed from step {reached} of 80" in again.stderr.read()
    assert again.wait() == 0


def test_sigusr1_saves_and_goes_on(entry: Entry) -> None:
    process = entry.start(max_steps=80, save_steps=1000)
    wait_for_step(process, 10)
    process.send_signal(signal.SIGUSR1)
    assert process.stderr is not None
    deadline = time.monotonic() + 20
    while newest_checkpoint(entry) < 10:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.stderr.read()
    assert process.wait() == 0
    assert read_record(AdapterManifest, entry.folder / "adapter.json").state == "finished"


def test_a_budget_too_small_ends_in_an_adapter_inside_it_and_stays_ended(entry: Entry) -> None:
    recipe: dict[str, Any] = {"max_steps": 100_000, "save_steps": 50}
    manifest = entry.finetune(track={"training_budget": "10s"}, **recipe)
    assert manifest.state == "budget_reached"
    assert manifest.steps is not None
    assert manifest.planned_steps is not None
    assert 0 < manifest.steps < manifest.planned_steps
    lines = read_ledger(entry.work() / "ledger.jsonl")
    assert sum(charged(lines).values()) < 10
    model = AutoModelForCausalLM.from_pretrained(entry.base / "model")
    PeftModel.from_pretrained(model, entry.folder / "adapter")
    assert entry.finetune(track={"training_budget": "10s"}, **recipe) == manifest
    assert read_ledger(entry.work() / "ledger.jsonl") == lines


def test_a_run_killed_with_its_budget_used_hands_in_its_last_checkpoint(entry: Entry) -> None:
    recipe: dict[str, Any] = {"max_steps": 100_000, "save_steps": 5}
    process = entry.start(budget="30s", **recipe)
    wait_for_step(process, 1)
    checkpoints = entry.work() / "checkpoints"
    while not list(checkpoints.glob("step-*/checkpoint.json")):
        time.sleep(0.02)
    process.kill()
    process.wait()
    with (entry.work() / "ledger.jsonl").open("a") as stream:
        stream.write(json.dumps({"event": "end", "attempt": "lost", "seconds": 29.0}) + "\n")
    last = newest_checkpoint(entry)
    manifest = entry.finetune(track={"training_budget": "30s"}, **recipe)
    assert (manifest.state, manifest.steps) == ("budget_reached", last)


def test_a_budget_gone_before_the_first_step_is_a_time_limit(entry: Entry) -> None:
    with pytest.raises(TimeLimit, match="ended before the first step"):
        entry.finetune(max_steps=5, track={"training_budget": "1s"})


def test_what_was_trained_over_the_budget_is_not_handed_in(
    entry: Entry, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, clock, passed = Trainer.train_step, time.monotonic, [0.0]

    def sometimes_slow(trainer: Trainer) -> StepReport:
        if trainer.step == 13:
            passed[0] = 700  # seconds: far longer than any step before
        return step(trainer)

    monkeypatch.setattr(Trainer, "train_step", sometimes_slow)
    monkeypatch.setattr(time, "monotonic", lambda: clock() + passed[0])
    manifest = entry.finetune(max_steps=100_000, save_steps=5, track={"training_budget": "600s"})
    assert (manifest.state, manifest.steps) == ("budget_reached", 10)
    assert pq.read_table(entry.folder / "train.parquet")["step"].to_pylist() == list(range(1, 11))


def test_a_raised_budget_goes_on_where_the_smaller_one_ended_also_after_a_crash(
    entry: Entry, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe: dict[str, Any] = {"max_steps": 40, "save_steps": 5}
    step = Trainer.train_step

    def slow(trainer: Trainer) -> StepReport:
        time.sleep(0.5)
        return step(trainer)

    def lost(trainer: Trainer) -> StepReport:
        raise RuntimeError("node lost")

    with monkeypatch.context() as context:
        context.setattr(Trainer, "train_step", slow)
        first = entry.finetune(**recipe, track={"training_budget": "8s"})
        context.setattr(Trainer, "train_step", lost)
        with pytest.raises(RuntimeError, match="node lost"):
            entry.finetune(**recipe, track={"training_budget": "600s"})
    assert first.state == "budget_reached"
    second = entry.finetune(**recipe, track={"training_budget": "600s"})
    assert (second.state, second.steps) == ("finished", 40)
    assert attempts(entry) == 3


def test_a_torn_checkpoint_is_skipped_for_the_one_before(entry: Entry, tiny: Path, tmp_path: Path) -> None:
    recipe: dict[str, Any] = {"max_steps": 60, "save_steps": 5}
    undisturbed = Entry.create(tmp_path / "results" / "t" / "undisturbed", tiny)
    expected = undisturbed.finetune(**recipe)
    process = entry.start(**recipe)
    wait_for_step(process, 18)
    process.kill()
    process.wait()
    first, newest = sorted((entry.work() / "checkpoints").glob("step-*"))
    state = newest / "state.pt"
    state.write_bytes(state.read_bytes()[:-1000])
    again = entry.start(**recipe)
    assert again.stderr is not None
    log = again.stderr.read()
    assert again.wait() == 0
    assert f"checkpoint {newest.name} is torn; skipped" in log
    assert f"resumed from step {int(first.name.partition('-')[2])} of 60" in log
    assert read_record(AdapterManifest, entry.folder / "adapter.json").files == expected.files


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 30 MB; a checkpoint of full fine-tuning takes 38."""
    folder = tmp_path / "results" / "small"
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=30m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("needs to mount a tmpfs: run as root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_stops_with_the_place_and_the_next_start_goes_on(tiny: Path, small_disk: Path) -> None:
    entry = Entry.create(small_disk / "e", tiny)
    with pytest.raises(Interrupted, match=r"checkpoint of step 1 could not be saved in .*make room"):
        entry.finetune(max_steps=6, save_steps=2, method="full")
    assert not list((entry.work() / "checkpoints").iterdir())
    subprocess.run(["mount", "-o", "remount,size=300m", str(small_disk)], check=True)
    assert entry.finetune(max_steps=6, save_steps=2, method="full").state == "finished"


def test_a_disk_too_full_for_the_adapter_says_so_and_the_next_start_hands_it_in(
    tiny: Path, small_disk: Path
) -> None:
    subprocess.run(["mount", "-o", "remount,size=23m", str(small_disk)], check=True)
    entry = Entry.create(small_disk / "e", tiny)
    # 6 MB of an adapter, and 19 of the checkpoint
    recipe: dict[str, Any] = {"max_steps": 3, "save_steps": 1000, "modules_to_save": ["lm_head"]}
    with pytest.raises(PalioError, match="make room"):
        entry.finetune(**recipe)
    assert not (entry.folder / "adapter.json").exists()
    subprocess.run(["mount", "-o", "remount,size=300m", str(small_disk)], check=True)
    assert entry.finetune(**recipe).state == "finished"


def test_a_loss_that_is_not_a_number_names_step_and_rows(tiny: Path, tmp_path: Path) -> None:
    # A weight that overflows for one token only, so that one row of the dataset breaks the loss.
    base = tmp_path / "broken"
    (base / "model").mkdir(parents=True)
    for path in (tiny / "model").iterdir():
        (base / "model" / path.name).write_bytes(path.read_bytes())
    weights = load_file(tiny / "model" / "model.safetensors")
    tokenizer_row = 6000
    weights["model.embed_tokens.weight"][tokenizer_row] = torch.nan
    save_file(weights, base / "model" / "model.safetensors", metadata={"format": "pt"})
    manifest = read_record(BaseModelManifest, tiny / "manifest.json")
    manifest.write(base / "manifest.json")
    from transformers import AutoTokenizer

    word = AutoTokenizer.from_pretrained(tiny / "model").decode([tokenizer_row])
    entry = Entry.create(tmp_path / "results" / "t" / "e", base, rows=16)
    rows = pq.read_table(entry.folder / "dataset" / "train.parquet").to_pylist()
    rows[5]["prompt"] = f"x{word}"
    entry.write_rows(rows)
    with pytest.raises(Crashed, match=r"diverged: the loss is nan at step \d+, on rows \[[\d, ]*\b5\b"):
        entry.finetune(max_steps=8, batch_size=4)
    assert 0 <= newest_checkpoint(entry) < 8  # the state before that step is saved


LIMITED = """
    import resource, sys
    from pathlib import Path
    import psutil
    from palio.errors import OutOfMemory
    from tests.support.training import Entry
    import palio.training.finetune

    entry = Entry(Path(sys.argv[1]), Path(sys.argv[2]))
    entry.finetune(max_steps=1, batch_size=1)  # libraries are loaded before the limit counts
    entry.write_rows([{"prompt": "a", "completion": " b" * 500}] * 64)
    now = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (now + 2**30, now + 2**30))
    try:
        entry.finetune(max_steps=1, batch_size=64)
    except OutOfMemory as error:
        print(error)
"""


def test_memory_run_out_is_a_state_with_the_peak_and_advice(entry: Entry) -> None:
    command = [sys.executable, "-c", textwrap.dedent(LIMITED), str(entry.folder), str(entry.base)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert "out of memory after a peak of" in run.stdout, run.stderr
    assert "lower finetune.batch_size" in run.stdout


def test_two_processes_do_not_train_in_one_folder(entry: Entry) -> None:
    process = entry.start(max_steps=200)
    wait_for_step(process, 1)
    with pytest.raises(Interrupted, match="another process is training"):
        entry.finetune(max_steps=200)
    process.kill()
    process.wait()
