"""Steps that only write their records: a competition's life in milliseconds."""

from __future__ import annotations

import shutil
from pathlib import Path

from palio import planning
from palio.layout import EntryFolder, Stage
from palio.pipeline import Step, steps_of
from palio.provenance import write_json
from palio.settings import StepSettings
from palio.workflow import Workflow


def leave_record(step: Step, folder: EntryFolder, settings: StepSettings, workflow: Workflow) -> None:
    """What a step leaves: its payload, then its record, then what it was made with."""
    made = planning.made(step, folder, settings, workflow.resources)
    leave_payload(step, folder)
    write_json(step.record(folder), {"step": step.name, "of": made.settings})
    planning.stamp(step, folder, settings, made)


def leave_payload(step: Step, folder: EntryFolder) -> None:
    for path in step.payload(folder):
        if path.suffix:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        else:
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir(parents=True)


def leave_released(step: Step, folder: EntryFolder) -> None:
    for path in step.released(folder):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def leave_base_model(workflow: Workflow, base_model: str) -> None:
    write_json(workflow.resources.base_model(base_model).manifest, {"id": base_model})


def leave_stage(workflow: Workflow, stage: Stage) -> None:
    made = workflow.stage_runs[stage].made.model_dump(mode="json")
    write_json(workflow.resources.stage_record(stage), {"made": made})


def leave_leaderboard(workflow: Workflow, track: str) -> None:
    made = workflow.scored_with(track).model_dump(mode="json")
    write_json(workflow.results.leaderboards.leaderboard(track), {"made": made})


def leave_tables(folder: Path, track: str) -> None:
    """Leave what `palio score` writes beside a leaderboard."""
    folder.mkdir(parents=True, exist_ok=True)
    for suffix in ("csv", "parquet", "md", "tex", "analysis.json"):
        (folder / f"{track}.{suffix}").touch()


def leave_report() -> None:
    page = Path("results/report/index.html")
    for name in ("figures", "answers"):
        (page.parent / name).mkdir(parents=True, exist_ok=True)
    page.write_text("a report")


def leave_shared_records(workflow: Workflow) -> None:
    """Leave the records of base models, stages and leaderboards."""
    for entry_id in workflow.entries:
        leave_base_model(workflow, workflow.planned(entry_id).base_model_id)
    for stage in workflow.stage_runs:
        leave_stage(workflow, stage)
    for track in workflow.tracks:
        leave_leaderboard(workflow, track)


def leave_all_records(workflow: Workflow) -> None:
    """Every record of a finished competition, in the order of the steps."""
    leave_shared_records(workflow)
    for folder in workflow.folders():
        planned = workflow.planned(folder.name)
        for step in steps_of(planned.entry, replicate=folder.replicate is not None):
            leave_record(step, folder, step.settings.of(planned, step.name), workflow)
