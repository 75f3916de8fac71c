"""benchmarks/finetune.py runs, in small."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.support.training import tiny_base_model

ROOT = Path(__file__).parents[2]


def test_the_benchmark_prints_ratio_bound_and_loss_difference(tmp_path: Path, base_model: Path) -> None:
    model = tiny_base_model(tmp_path / "model", base_model)
    data = tmp_path / "questions.jsonl"
    data.write_text('{"question": "What is 1 + 1?", "answer": "It is 2."}\n' * 20)
    size = ["--model", str(model), "--data", str(data), "--rows", "40", "--steps", "3", "--without", "trl"]
    command = [sys.executable, str(ROOT / "benchmarks" / "finetune.py"), *size]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"over transformers.Trainer: [\d.]+; packing bound [\d.]+", done.stdout)
    assert re.search(r"ledger and telemetry: [\d.]+% of training", done.stdout)
    difference = re.search(r"largest difference of the two losses at a step: (\S+)", done.stdout)
    assert difference
    assert float(difference[1]) < 1e-4, "the two trainers no longer compute the same"
