"""`palio try`: the whole run of one entry at reduced scale, by the workflow that the organizers run.

Nothing here runs a step. A small competition is written into a folder of its own (the heads of the sources,
a few training steps, a few open instances; the closed stage is not touched) and Snakemake makes the entry's
`open.json` there with the rules of this folder.

    try/<entry>/
        config/                  the small competition, its rules, the small entry
        resources/, results/     as in a real run; the base models are shared with this folder
        snakemake.log
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import chdir
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from palio.config import (
    Competition,
    DatasetRecipe,
    Entry,
    RuleSet,
    expand,
    load_competition,
    load_entry,
    load_rules,
)
from palio.curation.files import file_records
from palio.curation.rows import Malformed
from palio.curation.source import SourceRow, read_source
from palio.demo.data import write_demo_sources
from palio.errors import BadInput, Crashed
from palio.incoming import Incoming
from palio.layout import CONFIG, ENTRIES, RULESET, TEAMS, EntryFolder, Project, Resources
from palio.provenance import write_text
from palio.records import StepFailure, read_record

SOURCE_ROWS = 200
STEPS = 3
INSTANCES = 4
"""Of each scenario of the open stage."""
PROGRAM_SECONDS = 120
"""What a team's own training program is given, in place of the track's budget."""


@dataclass(frozen=True)
class Rehearsal:
    """A rehearsed entry: where its records lie, and what was left out of it."""

    folder: EntryFolder
    competition: Competition
    """The competition at reduced scale."""


def rehearse(file: Path, competition: Competition, out: Path) -> Rehearsal:
    """Run the entry at reduced scale under `out`; a second call goes on where the first stopped.

    Raises:
        BadInput: this folder has no workflow, or a source is missing.
        Crashed: a step did not finish; with its reason and log.
    """
    if not Path("Snakefile").is_file():
        raise BadInput("Snakefile", why="no workflow in this folder", fix="run palio try in a clone of Palio")
    entry = load_entry(file)
    project = Project(out / file.stem)
    small = small_competition(competition, entry)
    shutil.rmtree(project.config.parent, ignore_errors=True)
    write_text(project.config, _yaml(small))
    rules = small_rules(load_rules(Path(competition.rules)))
    write_text(project.ruleset, _yaml(rules.model_dump(mode="json", exclude_none=True)))
    write_text(project.entry_file(file.stem), _yaml(small_entry(entry, project)))
    shared, own = Resources().base_models, project.resources.base_models
    shared.mkdir(parents=True, exist_ok=True)
    if not own.exists():
        own.parent.mkdir(parents=True, exist_ok=True)
        own.symlink_to(shared.resolve(), target_is_directory=True)
    folder = project.results.entry(entry.track, file.stem)
    _snakemake(project, folder)
    with chdir(project.path):
        return Rehearsal(folder, load_competition(CONFIG))


def _snakemake(project: Project, folder: EntryFolder) -> None:
    target = folder.stage_record("open").relative_to(project.path)
    command = [
        *(sys.executable, "-m", "snakemake", "--profile", "local", "--snakefile", "Snakefile"),
        *("--directory", str(project.path), "--configfile", str(project.config), "--", str(target)),
    ]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"}
    with project.log.open("w", encoding="utf-8") as log:
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False)
    if done.returncode == 0:
        return
    for path in sorted(folder.failures.glob("*.json")):
        why = read_record(StepFailure, path)
        where = f"; log: {project.path / why.log}" if why.log else ""  # the steps ran in that folder
        raise Crashed(f"step {why.step} did not finish ({why.state.value}): {why.reason}{where}")
    raise Crashed(f"the workflow did not finish: {_first_error(project.log)}")


def _first_error(log: Path) -> str:
    """Return the first error that a step reports, or else Snakemake, and the log."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    of_steps = (line.partition(": ")[2] for line in lines if line.startswith(("error: ", "Error: ")))
    its_own = (line for before, line in pairwise(lines) if before.startswith("WorkflowError"))
    return f"{next(of_steps, next(its_own, 'no reason given')).strip()}; see {log}"


# --- the small competition -----------------------------------------------------------------------------


def small_competition(competition: Competition, entry: Entry) -> dict[str, Any]:
    """The competition's content with few instances and short limits, paths from anywhere, one track."""
    content = competition.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
    track = content["tracks"][entry.track] | {"training_margin": "10m"}
    if entry.kind == "command":
        track["training_budget"] = f"{PROGRAM_SECONDS}s"
    if not _cuda():  # the track's GPU is not this machine's
        track = {key: value for key, value in track.items() if key not in ("gpu_model", "gpu_memory_gb")}
    for stage in content["stages"].values():
        for scenario in stage["scenarios"].values():
            scenario["run_entries"] = str(expand(scenario["run_entries"]).resolve())
            scenario.pop("max_eval_instances", None)
            scenario["questions"] = INSTANCES
    return content | {
        "demo": True,  # the closed stage is not run, so there is nothing to protect
        "entries": [ENTRIES],
        "rules": RULESET,
        "closed_store": "private",
        "tracks": {entry.track: track},
        "withdrawn": {},
        "retries": {},
        "shards": {},
        "replicates": None,
    }


def small_rules(rules: RuleSet) -> RuleSet:
    """The same rules, for entries whose files are named by their whole path."""
    folders = [str(Path(folder).absolute()) for folder in rules.team_folders]
    return rules.model_copy(update={"team_folders": (*folders, TEAMS)})


def small_entry(entry: Entry, project: Project) -> dict[str, Any]:
    """The entry's content with the heads of its sources and few steps."""
    content = entry.model_dump(mode="json", exclude_none=True)
    heads, made = project.resources.teams / "heads", Resources().demo_sources
    cut = False
    for index, source in enumerate(content.get("dataset", {}).get("sources", [])):
        path = Path(source.get("path", ""))
        if "hub" in source or path.is_dir():  # read whole: a dataset of the library has no head to cut off
            if path.is_dir() and "path" in source:
                source["path"] = str(path.absolute())
            continue
        if not path.is_file() and path.parent == made:
            write_demo_sources(made, seed=7)
        head = heads / (f"{index}-{path.name}" + (".jsonl" if path.suffix != ".parquet" else ""))
        cut |= write_head(path, head, SOURCE_ROWS)
        source.setdefault("name", entry.dataset.sources[index].label if entry.dataset else "")
        source["path"] = str(head.relative_to(project.path))
    if cut and entry.dataset and entry.dataset.metadata_fields:
        with chdir(project.path):
            content["dataset"]["operations"] = _rehearsable(content["dataset"])
    if "finetune" in content:
        content["finetune"]["max_steps"] = min(content["finetune"].get("max_steps") or STEPS, STEPS)
        content["finetune"]["validation_rows"] = min(content["finetune"]["validation_rows"], 8)
        content["finetune"]["gradient_accumulation"] = 1
    for part, program in entry.programs.items():
        for key, brought in program.paths.items():
            content[part][key] = str(Path(brought).resolve())
    return content


def _rehearsable(dataset: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the operations without those on a field that no record of the heads has, which are named: later
    records may have it."""
    recipe = DatasetRecipe.model_validate(dataset)
    seen: set[str] = set()
    for source in recipe.sources:
        rows = islice(read_source(source, [], recipe.metadata_fields), SOURCE_ROWS)
        seen.update(*(row.metadata for row in rows if isinstance(row, SourceRow)))
    kept = []
    for index, (operation, content) in enumerate(zip(recipe.operations, dataset["operations"], strict=True)):
        unseen = [name for name in operation.metadata_fields if name not in seen]
        if not unseen:
            kept.append(content)
            continue
        why = f"the first {SOURCE_ROWS} records of each source have no {unseen[0]!r}"
        print(f"notice: operations.{index} ({operation.op}) is left out: {why}", file=sys.stderr)
    return kept


def write_head(source: Path, target: Path, rows: int) -> bool:
    """Write the first `rows` records of a source, Parquet as Parquet and any other file as JSON lines; return
    whether it has more. A broken record stays one, with the reason.

    Raises:
        BadInput: it is missing, or broken as a whole.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.suffix == ".parquet" and source.is_file():
        file = pq.ParquetFile(source)
        batch = next(file.iter_batches(batch_size=rows), None)
        if batch is not None:
            pq.write_table(pa.Table.from_batches([batch]), target)
        return bool(file.metadata.num_rows > rows)
    records = file_records(Incoming.locate(source, []))
    head = [str(one) if isinstance(one, Malformed) else one for _, one in islice(records, rows)]
    write_text(target, "".join(json.dumps(one) + "\n" for one in head))
    return next(records, None) is not None


def _yaml(content: dict[str, Any]) -> str:
    return yaml.safe_dump(content, sort_keys=False)


def _cuda() -> bool:
    import torch

    return bool(torch.cuda.is_available())
