"""A competition in progress with secrets in it: a canary in every place of the closed stage.

An entry has failed at each step.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from palio.layout import EntryFolder, Resources, Results
from palio.pipeline import STEPS as ALL_STEPS
from palio.records import StepFailure
from tests.support.helm_runs import leave_runs, leave_stage_store, right
from tests.support.report import (
    HOSTILE,
    QUESTIONS,
    RIGHT,
    SCENARIOS,
    competition,
    competition_content,
    leave_entry,
    score_competition,
    write_competition,
    write_entries,
)

CANARY = "canary-7f3a: what nobody may see"
ROOT = Path(__file__).parents[2]
STEPS = [step for step in ALL_STEPS if step.name != "image"]  # of entries without a Dockerfile
FAILED = [f"fails_{step.name}" for step in STEPS]


def leave_competition(folder: Path, secret: Path) -> None:
    """Leave it in `folder`, which is the working folder, with its closed store in `secret`."""
    write_competition(folder)
    shutil.copy(ROOT / "config/rulesets/demo.yaml", "rules.yaml")
    (folder / "x.conf").write_text('entries: [{description: "synthetic_reasoning:mode=pattern_match"}]')
    (folder / "closed.txt").write_text(str(secret))
    write_entries(folder, FAILED, trained=FAILED)
    given = competition(folder, closed_store=str(secret))
    for stage in ("open", "closed"):
        leave_stage_store(
            Resources().open_store if stage == "open" else given.store.stage,
            dict.fromkeys(SCENARIOS[stage], QUESTIONS),
            text=None if stage == "open" else CANARY,
        )
    results = Results(folder / "results", given.store)
    for name in RIGHT:
        leave_answers(results.entry("laptop", name), name)
    for step in STEPS:
        leave_failure(folder, results.entry("laptop", f"fails_{step.name}"), step.name)
    score_competition(folder, given, final=False)


def content_of(folder: Path) -> dict[str, Any]:
    """The config of a competition that `leave_competition` left."""
    return competition_content(folder, closed_store=(folder / "closed.txt").read_text())


def leave_answers(folder: EntryFolder, name: str) -> None:
    for stage in ("open", "closed"):
        count = dict(zip(SCENARIOS[stage], RIGHT[name][stage], strict=True))

        def says(
            scenario: str, number: int, count: dict[str, int] = count, secret: bool = stage == "closed"
        ) -> str:
            wrong = CANARY if secret else f"{HOSTILE}\x1b[2J {number}"
            return right(number) if number < count[scenario] else wrong

        leave_runs(folder, stage, dict.fromkeys(SCENARIOS[stage], QUESTIONS), says)
        leave_log(folder, stage, CANARY if stage == "closed" else "asked 80 questions")


def leave_log(folder: EntryFolder, step: str, text: str) -> Path:
    path = folder.log(step)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{step} begins\n{text}\n")
    return path


def leave_failure(home: Path, folder: EntryFolder, failed: str) -> None:
    """Records and logs of all steps before this one; of this one a failure and a log."""
    names = [step.name for step in STEPS]
    leave_entry(home, folder.entry_id, trained=False)
    for step in STEPS[names.index(failed) :]:
        step.record(folder).unlink(missing_ok=True)
    for step in STEPS[: names.index(failed) + 1]:
        leave_log(folder, step.name, CANARY if step.name == "closed" else f"last words of {step.name}\x1b[2J")
    failure = StepFailure(step=failed, state="crashed", reason=f"{failed} went wrong {HOSTILE}", log="x.log")
    failure.write(folder.failure(failed))
