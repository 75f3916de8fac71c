"""benchmarks/scoring.py runs at reduced scale."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_benchmark_prints_time_memory_and_both_baselines() -> None:
    size = ["--entries", "20", "--instances", "500", "--replicates", "50"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/scoring.py"), *size],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"20 entries x 50 columns, 50 replicates of 500 instances: [\d.]+ s wall", done.stdout)
    naive = re.search(r"naive Python loop: \d+ ms a replicate, (\d+) x ours", done.stdout)
    assert naive
    assert int(naive[1]) > 1
    assert "numpy + pandas + scipy" in done.stdout
