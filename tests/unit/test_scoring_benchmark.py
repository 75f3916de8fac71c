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


def test_the_benchmark_of_coverage_has_a_line_for_each_way_to_analyze_each_kind_of_world() -> None:
    size = ["--worlds", "2", "--entries", "5", "--questions", "40", "--replicates", "50"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/coverage.py"), *size],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stderr == ""
    kinds = re.findall(r"^(\w.*):$", done.stdout, re.MULTILINE)
    assert len(kinds) == 6
    found = re.findall(r"^  (\w[\w ]*?) +scores covered ([\d.]+), ranks ([\d.]+)", done.stdout, re.MULTILINE)
    assert [name for name, _, _ in found] == ["as before", "lent", "replicated", "assumed"] * 6
    assert all(0 <= float(share) <= 1 for _, *shares in found for share in shares)
