"""What a step has made, kept until the run ends.

    results/<track>/<entry>/work/kept/<step>/       hard links to its record and tables
    results/<track>/<entry>/work/kept/<step>.json   written last: which they are, and its folders as they were

Snakemake deletes a step's outputs before it runs. If the step then fails, or its controller dies, the old
ones are put back: they still hold if the change that made the step due is taken back. It also deletes those
of a job that is cancelled, even where the step has ended and only Snakemake has not. A folder (an adapter, a
package) is no output, so it stays; once the step has replaced it, the old record would describe another one,
and is not put back.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from palio.files import link_or_copy
from palio.layout import EntryFolder
from palio.pipeline import STEPS, Step
from palio.provenance import write_json


def keep(step: Step, folder: EntryFolder) -> None:
    """Keep what a step has made: before it runs again, and when it has."""
    kept, record = folder.kept(step.name), step.record(folder)
    if not record.exists():
        return
    shutil.rmtree(kept, ignore_errors=True)
    others = {path for path in (*step.payload(folder), *step.released(folder)) if path.is_file()} - {record}
    files = [str(path.relative_to(folder.path)) for path in (*sorted(others), record)]
    for name in files:
        _link(folder.path / name, kept / name)
    write_json(_list_of(kept), {"files": files, "folders": _folders(step, folder)})


def put_back(folder: EntryFolder) -> None:
    """Put back what is no longer there. Only while no step runs."""
    for step in STEPS:
        kept = folder.kept(step.name)
        if not _list_of(kept).exists():
            continue
        listed = json.loads(_list_of(kept).read_text(encoding="utf-8"))
        if not step.record(folder).exists() and listed["folders"] == _folders(step, folder):
            for name in listed["files"]:  # the record comes last
                _link(kept / name, folder.path / name)


def let_go(folder: EntryFolder) -> None:
    """Keep nothing any longer: the run has ended, and what is deleted from now on is meant to be."""
    for step in STEPS:
        kept = folder.kept(step.name)
        _list_of(kept).unlink(missing_ok=True)
        shutil.rmtree(kept, ignore_errors=True)


def _list_of(kept: Path) -> Path:
    return kept.with_suffix(".json")


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    link_or_copy(source, target)


def _folders(step: Step, folder: EntryFolder) -> dict[str, list[int]]:
    """Return what changes when a step replaces one of its folders."""
    folders = [path for path in step.payload(folder) if path.is_dir()]
    return {str(path): [(about := path.stat()).st_ino, about.st_mtime_ns] for path in folders}
