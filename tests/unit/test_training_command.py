"""The fine-tuning step with a team's own program: what it is given, what is taken, what its time costs."""

from __future__ import annotations

import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from palio.config import Program
from palio.errors import BadInput, Crashed, Interrupted, OutOfMemory, RuleViolation, TimeLimit
from palio.records import AdapterManifest, read_record
from palio.training import command
from palio.training.ledger import charged, read_ledger
from tests.support.programs import HANDS_IN, program_of, run_command, start_command
from tests.support.training import Entry

ROOT = Path(__file__).parents[2]


def work_of(entry: Entry) -> Path:
    (work,) = (entry.folder / "work" / "train").iterdir()
    return work


def wait_for(text: str, entry: Entry, step: subprocess.Popen[str]) -> None:
    """Until the program has printed `text`."""
    while not any(text in log.read_text() for log in entry.folder.glob("work/train/*/program.log")):
        assert step.poll() is None
        time.sleep(0.1)


def log_of(entry: Entry) -> str:
    return (work_of(entry) / "program.log").read_text()


def test_the_example_trains_with_another_trainer_and_is_packaged_as_any_entry(entry: Entry) -> None:
    files = ROOT / "config/entries/examples/peft_script"
    run = ("python", "train.py", "--max-steps", "4", "--save-steps", "2")
    manifest = run_command(entry, Program(run=run, files=str(files)))
    assert read_record(AdapterManifest, entry.folder / "adapter.json") == manifest
    assert (manifest.state, manifest.recipe["method"], manifest.rows) == ("finished", "lora", 64)
    assert set(manifest.files) == {"adapter_config.json", "adapter_model.safetensors"}
    package = entry.package()
    assert package.adapter_fingerprint == manifest.fingerprint
    AutoModelForCausalLM.from_pretrained(entry.folder / "package")


def test_a_program_is_given_what_the_contract_says(entry: Entry, tmp_path: Path) -> None:
    code = (
        HANDS_IN
        + """
import time
import pyarrow.parquet as pq
given = {name: value for name, value in os.environ.items() if name.startswith("PALIO_")}
print(sorted(given))
columns = pq.read_schema(Path(given["PALIO_DATASET"], "train.parquet")).names
assert {"prompt", "completion", "history", "source"} <= set(columns)
assert Path(given["PALIO_BASE_MODEL"], "model.safetensors").exists()
assert 0 < float(given["PALIO_DEADLINE"]) - time.time() <= float(given["PALIO_SECONDS"]) + 1 <= 61
Path(given["PALIO_CHECKPOINTS"], "step1").write_text("x")
hand_in()
"""
    )
    run_command(entry, program_of(tmp_path / "files", code))
    for name in ("BASE_MODEL", "CHECKPOINTS", "CONTRACT", "CPUS", "DATASET", "DEADLINE", "OUTPUT", "SECONDS"):
        assert f"PALIO_{name}" in log_of(entry)


def test_a_replicates_program_finds_its_seed_and_leaves_another_record(entry: Entry, tmp_path: Path) -> None:
    program = program_of(
        tmp_path / "files", f"{HANDS_IN}\nhand_in(float(os.environ.get('PALIO_SEED', 0)) / 8)\n"
    )
    own = run_command(entry, program)
    again = run_command(entry, program, seed=2, replace=True)
    assert "seed" not in own.recipe
    assert again.recipe == own.recipe | {"seed": 2}
    assert again.files["adapter_model.safetensors"] != own.files["adapter_model.safetensors"]


def test_at_the_end_of_the_budget_the_last_result_is_taken_and_nothing_is_trained_again(
    entry: Entry, tmp_path: Path
) -> None:
    code = HANDS_IN + "import time\nhand_in()\nprint('started', flush=True)\nwhile True: time.sleep(0.1)\n"
    program = program_of(tmp_path / "files", code)
    began = time.monotonic()
    manifest = run_command(entry, program, budget="4s")
    assert time.monotonic() - began < 20
    assert manifest.state == "budget_reached"
    assert run_command(entry, program, budget="4s") == manifest
    assert log_of(entry).count("started") == 1


def test_a_program_that_has_left_nothing_at_the_end_of_its_budget_was_too_slow(
    entry: Entry, tmp_path: Path
) -> None:
    program = program_of(tmp_path / "files", "import time\nwhile True: time.sleep(0.1)\n")
    for _ in range(2):  # the second attempt has no budget left
        with pytest.raises(
            TimeLimit, match=r"the budget of 4 s ran out before the program had left a result"
        ):
            run_command(entry, program, budget="4s")


def test_a_program_is_asked_to_stop_before_its_deadline(
    entry: Entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "NOTICE_SHARE", 0.5)  # a busy machine needs its seconds to save
    code = (
        HANDS_IN
        + """
import signal, sys, time
def stop(*_):
    hand_in()
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
while True: time.sleep(0.1)
"""
    )
    assert run_command(entry, program_of(tmp_path / "files", code), budget="30s").state == "finished"


def test_a_killed_step_goes_on_from_the_programs_checkpoints_with_the_budget_it_had_left(
    entry: Entry, tmp_path: Path
) -> None:
    code = (
        HANDS_IN
        + """
import time
steps = Path(os.environ["PALIO_CHECKPOINTS"])
print("left", os.environ["PALIO_SECONDS"], flush=True)
for step in range(8):
    if (steps / str(step)).exists():
        continue
    time.sleep(0.5)
    (steps / str(step)).touch()
    print("step", step, flush=True)
hand_in()
"""
    )
    program = program_of(tmp_path / "files", code)
    first = start_command(entry, program)
    wait_for("step 2", entry, first)
    first.send_signal(signal.SIGKILL)
    first.wait()
    manifest = run_command(entry, program)
    log = log_of(entry)
    assert [line for line in log.splitlines() if line.startswith("step")] == [f"step {n}" for n in range(8)]
    left = [int(line.split()[1]) for line in log.splitlines() if line.startswith("left")]
    assert left[0] - left[1] >= 1
    seconds = charged(read_ledger(work_of(entry) / "ledger.jsonl"))
    assert len(seconds) == 2
    assert manifest.state == "finished"


def test_sigterm_lets_the_program_save_before_the_step_ends(entry: Entry, tmp_path: Path) -> None:
    code = """
import os, signal, sys, time
from pathlib import Path
def stop(*_):
    Path(os.environ["PALIO_CHECKPOINTS"], "saved").touch()
    sys.exit(1)
signal.signal(signal.SIGTERM, stop)
print("ready", flush=True)
while True: time.sleep(0.1)
"""
    step = start_command(entry, program_of(tmp_path / "files", code))
    wait_for("ready", entry, step)
    step.send_signal(signal.SIGTERM)
    _, said = step.communicate(timeout=30)
    assert "stopped by SIGTERM; start again" in said
    assert step.returncode == Interrupted.exit_code
    assert (work_of(entry) / "program" / "checkpoints" / "saved").exists()


def test_a_program_that_fails_is_named_with_its_code_and_last_line(entry: Entry, tmp_path: Path) -> None:
    program = program_of(tmp_path / "files", "raise SystemExit('out of ideas \\x1b[31m')")
    with pytest.raises(Crashed, match=r"the program exited with code 1; .*program.log: out of ideas \[31m"):
        run_command(entry, program)


def test_what_was_held_back_of_a_program_is_in_the_record_of_the_attempt_that_finished(
    entry: Entry, tmp_path: Path
) -> None:
    code = (
        HANDS_IN
        + """
import time
asked = Path(os.environ["PALIO_CHECKPOINTS"], "asked")
if not asked.exists():
    asked.touch()
    for _ in range(2):
        if os.fork() == 0:
            kept = b"x" * (700 << 20)
            time.sleep(20)
            os._exit(0)
    time.sleep(20)
Path(os.environ["PALIO_OUTPUT"], "optimizer.pt").write_bytes(b"")
hand_in()
"""
    )
    program = program_of(tmp_path / "files", code)
    with pytest.raises(OutOfMemory):
        run_command(entry, program, track={"ram_gb": 1})
    pickle, killed = run_command(entry, program, track={"ram_gb": 1}).contained
    assert re.fullmatch(r"ended: used \S+ GiB of memory, 1.0 GiB are allowed", killed)
    assert pickle == "a pickle that was not taken: 'optimizer.pt'"


def test_a_link_among_the_teams_files_is_refused(entry: Entry, tmp_path: Path) -> None:
    program = program_of(tmp_path / "files", "")
    (tmp_path / "files" / "data").symlink_to("/etc")
    with pytest.raises(RuleViolation, match="is a symbolic link; put the file or folder itself there"):
        run_command(entry, program)


def test_a_changed_program_is_another_run_and_replaces_nothing_unasked(entry: Entry, tmp_path: Path) -> None:
    first = run_command(entry, program_of(tmp_path / "files", HANDS_IN + "hand_in(0.01)"))
    changed = program_of(tmp_path / "files", HANDS_IN + "hand_in(0.02)")
    with pytest.raises(BadInput, match="remove this file to replace it"):
        run_command(entry, changed)
    second = run_command(entry, changed, replace=True)
    assert first.fingerprint != second.fingerprint
    assert first.files != second.files
