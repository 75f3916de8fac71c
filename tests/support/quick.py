"""`palio` whose steps only write records, for the real Snakemake: what runs is tested, not what it makes.

program(path)      installs it as path/palio
$PALIO_SLOW        `<entry> <step> <seconds>`, several with commas between: that step first takes so long
$PALIO_FAULTY      `<entry> <step>`, several likewise: that step breaks a rule
ran.jsonl          a line for each step that was begun
published.jsonl    a line for each `palio standings` and `publish-site`: its arguments without the config
done.jsonl         a line for each step that was completed, with what its record was made with

A record's content follows from the step's settings and from the content that it read, a leaderboard's from
its entries' records: two competitions that end alike ran the same settings on the same inputs, step by step.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import palio.cli
from palio import planning
from palio.errors import PalioError, RuleViolation
from palio.files import append_json_line
from palio.layout import BaseModelFolder, EntryFolder, Resources
from palio.operating.attempt import attempt
from palio.operating.kept import keep
from palio.pipeline import BY_NAME, steps_of
from palio.provenance import write_json
from palio.settings import RunOptions, StageRuns, StepSettings
from tests.support.records import leave_payload, leave_released, leave_report, leave_tables

RESOURCES = Resources()
RAN, DONE, PUBLISHED = Path("ran.jsonl"), Path("done.jsonl"), Path("published.jsonl")


def program(folder: Path) -> dict[str, str]:
    """Install it in `folder`; return the environment in which Snakemake finds it."""
    folder.mkdir(exist_ok=True)
    path = folder / "palio"
    root = Path(__file__).parents[2]
    path.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(root)!r})\n"
        "from tests.support.quick import main\nmain()\n"
    )
    path.chmod(0o755)
    return os.environ | {"PATH": f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"}


def main() -> None:
    if sys.argv[1] in ("standings", "publish-site"):
        words = [word for word in sys.argv[1:] if not word.startswith("{") and word != "--competition"]
        append_json_line(PUBLISHED, {"words": words})
        return
    if sys.argv[1] == "report":
        leave_report()
        return
    replace()
    palio.cli.main()


def replace() -> None:
    """Put what is here in the place of what the command is about to import, and of nothing else: imports are
    most of what a stand-in costs."""
    if sys.argv[1:3] == ["step", "fetch-base-model"]:
        import palio.base_model

        palio.base_model.fetch_base_model = fetch
    elif sys.argv[1:3] == ["step", "prepare-stage"]:
        import palio.evaluation.stage

        palio.evaluation.stage.prepare_stage = prepare
    elif sys.argv[1] == "score":
        import palio.cli.organizer

        palio.cli.organizer._score = score
    elif sys.argv[1] == "step":
        import palio.steps

        palio.steps.run = run


def run(name: str, folder: EntryFolder, settings: StepSettings, options: RunOptions) -> None:
    step = BY_NAME[name]
    with attempt(name, folder):
        append_json_line(RAN, {"entry": folder.entry_id, "step": name})
        for slow in os.environ.get("PALIO_SLOW", "").split(","):
            if slow.split()[:2] == [folder.entry_id, name]:
                time.sleep(float(slow.split()[2]))
        if f"{folder.entry_id} {name}" in os.environ.get("PALIO_FAULTY", "").split(","):
            raise RuleViolation("is not allowed")
        made = planning.made(step, folder, settings, RESOURCES)
        leave_payload(step, folder)
        leave_released(step, folder)
        write_json(step.record(folder), {"step": name, "of": made.settings, "from": made.inputs})
        planning.stamp(step, folder, settings, made)
        keep(step, folder)
        append_json_line(DONE, {"entry": folder.entry_id, "step": name, "made": made.model_dump(mode="json")})


def fetch(source: Any, out: Path, *, code: Any = None, offline: bool = False) -> Any:
    write_json(BaseModelFolder(out).manifest, {"id": out.name})


def prepare(runs: StageRuns, out: Path) -> Any:
    write_json(out, {"made": runs.made.model_dump(mode="json")})
    sys.exit()


def score(workflow: Any, tracks: list[str], results: Path, out: Path, *, final: bool) -> None:
    for track in tracks:
        for entry_id in workflow.active[track]:
            if due := workflow.due_in(workflow.results.entry(track, entry_id)):
                raise PalioError(f"{entry_id} is neither finished nor withdrawn: {due}")
        leave_tables(out, track)
        made = workflow.scored_with(track).model_dump(mode="json")
        entries = {
            entry_id: [
                json.loads(step.record(workflow.results.entry(track, entry_id)).read_text())
                for step in steps_of(entry)
            ]
            for entry_id, entry in workflow.active[track].items()
        }
        write_json(out / f"{track}.json", {"made": made, "entries": entries})


def ran(folder: Path) -> list[tuple[str, str]]:
    """Return (entry, step) of every step that was begun."""
    lines = (folder / RAN).read_text().splitlines()
    return [(line["entry"], line["step"]) for line in map(json.loads, lines)]
