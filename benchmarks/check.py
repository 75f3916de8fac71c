"""How fast entries are checked: `python benchmarks/check.py`.

Goals on two cores: `palio --help` 0.5 s, one entry 2 s, 200 entries 60 s, near-duplicates among 500 entries
30 s. The 500 are the worst case: one track, one base model, equal choices, so that every pair is compared.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from palio.config import Entry, parse
from palio.eligibility.neighbours import Participants

ROOT = Path(__file__).parents[1]
COMPETITION = ROOT / "config/neurips2023.yaml"
SOURCES, OPERATIONS = 8, ("clean_markup", "drop_refusals", "drop_disagreement", "drop_exact_duplicates")


def made_up_entry(number: int) -> dict[str, object]:
    """Entries differ in a source and in the learning rate."""
    paths = [f"resources/teams/t{number if place == 0 else 0}/{place}.jsonl" for place in range(SOURCES)]
    return {
        "team": f"team {number}",
        "track": "a100",
        "base_model": {"hub": f"mistralai/Mistral-7B-v0.1@{'0' * 40}"},
        "dataset": {
            "sources": [{"path": path, "licence": "MIT", "url": "https://example.org"} for path in paths],
            "operations": [{"op": op} for op in OPERATIONS],
        },
        "finetune": {"learning_rate": 1e-6 * 1.01**number},
    }


def seconds(*command: str) -> float:
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "palio.cli", *command], cwd=ROOT, capture_output=True, check=False
    )
    assert done.returncode in (0, 3), done.stderr.decode()
    return time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--files", type=int, default=200, help="entry files in the folder that is checked")
    parser.add_argument(
        "--entries", type=int, default=500, help="entries among which near-duplicates are sought"
    )
    given = parser.parse_args()
    check = ("check", "--competition", str(COMPETITION))
    with tempfile.TemporaryDirectory() as name:
        files = [Path(name) / f"e{number}.yaml" for number in range(given.files)]
        for number, file in enumerate(files):
            file.write_text(yaml.safe_dump(made_up_entry(number)))
        shown = {
            "palio --help": (seconds("--help"), 0.5),
            "one entry": (seconds(*check, str(ROOT / "config/entries/neurips2023/birbal.yaml")), 2),
            f"{given.files} entries": (seconds(*check, name), 60),
        }
    entries = {f"e{n}": parse(Entry, made_up_entry(n), "") for n in range(given.entries)}
    started = time.monotonic()
    participants = Participants(entries)
    found = [participants.beside(name) for name in entries]
    shown[f"near-duplicates among {given.entries}"] = (time.monotonic() - started, 30)
    for what, (taken, goal) in shown.items():
        print(f"{what:30} {taken:7.2f} s   goal {goal:g} s")
    print(f"{sum(bool(one.alike) for one in found)} entries have a near-duplicate")


if __name__ == "__main__":
    main()
