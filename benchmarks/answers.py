"""How long the pages of answers take at full size: `python -m benchmarks.answers`.

2 000 questions x 50 entries; the goal is 2 s from opening an address in Chromium to the list of questions,
or to a question of two entries side by side. The answers are made up; the files are as HELM writes them.
`--questions` and `--entries` change the size.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

from tests.support.chromium import Page, chromium_page
from tests.support.helm_runs import leave_runs, leave_stage_store, right
from tests.support.report import SCENARIOS, competition, leave_entry, write_entries

from palio.answers.pages import write_pages
from palio.layout import ReportFolder, Resources, Results

GOAL_SECONDS = 2.0
LISTED = "document.querySelector('#count').textContent !== ''"
SHOWN = "document.querySelectorAll('#question .columns section').length === 2"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument("--entries", type=int, default=50)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        pages, seconds = build(Path(folder), given.questions, given.entries)
        files = [path for path in pages.rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files) / 1e6
        print(
            f"{given.questions} questions x {given.entries} entries: {seconds:.1f} s to write {len(files)}"
            f" files, {size:.0f} MB; the page itself {(pages / 'laptop.html').stat().st_size / 1e6:.2f} MB"
        )
        with chromium_page() as page:
            measure(page, f"file://{pages}/laptop.html", given.questions)


def build(folder: Path, questions: int, entries: int) -> tuple[Path, float]:
    names = [f"entry{number:03}" for number in range(entries)]
    write_entries(folder, names)
    competition_ = competition(folder, withdrawn={})
    scenarios = dict.fromkeys(SCENARIOS["open"], questions // 2)
    leave_stage_store(Resources().open_store, scenarios)
    results = Results(folder / "results")
    for place, name in enumerate(names):
        leave_entry(folder, name, trained=False)

        def says(scenario: str, number: int, place: int = place) -> str:
            return right(number) if (number * 7 + place) % 3 else "a wrong answer in some words " * 4

        leave_runs(results.entry("laptop", name), "open", scenarios, says)
    report = ReportFolder(folder / "report")
    started = time.monotonic()
    write_pages(competition_, results, report.answers)
    return report.answers.path, time.monotonic() - started


def measure(page: Page, address: str, questions: int) -> None:
    last = f"{SCENARIOS['open'][1]}%2Fid{questions // 2 - 1}"
    for what, hash_, condition in (
        ("the list of one entry", "", LISTED),
        ("two entries compared", "#entry=entry001&with=entry000", LISTED),
        ("one question of two entries", f"#entry=entry001&with=entry000&question={last}", SHOWN),
    ):
        started = time.monotonic()
        page.open(address + hash_)
        while not page.do(condition):
            time.sleep(0.01)
        seconds = time.monotonic() - started
        goal = "within" if seconds < GOAL_SECONDS else "MISSES"
        print(f"{what}: {seconds:.2f} s, {goal} the goal of {GOAL_SECONDS:.0f} s")


if __name__ == "__main__":
    main()
