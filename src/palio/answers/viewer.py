"""The open stage's runs of all entries for HELM's own viewer."""

from __future__ import annotations

import shlex
import shutil
from contextlib import suppress

from palio.answers.reading import helm_folder
from palio.config import Competition
from palio.entries import Entries
from palio.errors import BadInput
from palio.evaluation import helm
from palio.layout import HelmSuite, Results


def write_helm_suite(competition: Competition, results: Results, suite: HelmSuite) -> list[str]:
    """Write the complete runs of all entries as a suite of HELM, and return the commands that show it.

    Raises:
        BadInput: no entry has such a run, or the folder holds something else.
    """
    if suite.path.exists() and not (suite.schema.is_file() and suite.config.is_dir()):
        raise BadInput(suite.path, why="already exists", fix="name another folder")
    models = []
    for track_id, entries in Entries(competition).by_track().items():
        for entry_id, entry in entries.items():
            with suppress(BadInput):  # it has not come so far
                folder = helm_folder(results.entry(track_id, entry_id), "open")
                runs = [run for run in helm.run_folders(folder) if run.complete]
                models.append(helm.SuiteModel(f"{track_id}/{entry_id}", entry.team, runs))
    if not any(model.runs for model in models):
        fix = "ask once an entry has run it; `palio status` says where they are"
        raise BadInput(results.path, why="no entry has a run of the open stage", fix=fix)
    shutil.rmtree(suite.path, ignore_errors=True)
    stage = competition.stage("open")
    helm.write_suite(suite, competition.competition, stage.title, models, stage.scenarios)
    return commands(suite, competition.competition)


def commands(suite: HelmSuite, name: str) -> list[str]:
    """Return the commands that summarize a suite, serve it, and export it as a static site."""
    common = f"--output-path {shlex.quote(str(suite.path))} --suite {name}"
    schema, config = (shlex.quote(str(path)) for path in (suite.schema, suite.config))
    return [
        f"helm-summarize {common} --schema-path {schema} --local-path {config}",
        f"helm-server {common}",
        f"helm-server {common} --export-path {shlex.quote(str(suite.export))}",
    ]
