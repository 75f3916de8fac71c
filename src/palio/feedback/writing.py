"""Feedback as a page and as a zip, equal for equal feedback.

<out>/<entry>.html            the page: opens anywhere, loads nothing
<out>/<entry>.zip
    index.html                the same page
    answers.jsonl             every answer of the open stage, a line each
    answers/<track>.html      the same to look through (`palio.answers.pages`)
    records/…                 records and tables of the entry's steps, the closed stage's left out
"""

from __future__ import annotations

import json
import shutil
import tempfile
import zipfile
from dataclasses import asdict
from pathlib import Path

from palio.answers.pages import write_pages
from palio.answers.reading import Answer
from palio.feedback.gathering import CLOSED, Feedback, Gathering
from palio.layout import EntryFolder, FeedbackFiles, FeedbackFolder
from palio.pipeline import STEPS
from palio.provenance import atomic_path, write_text
from palio.release.gather import closed_lines, search_for_leaks
from palio.report.files import Missing
from palio.report.page import ENTRY_FIGURES
from palio.report.rendering import render

SHOWN_ANSWERS = 60
"""Answers without full marks shown on the page; the zip has all."""
SHOWN_LOST = 30
"""Questions lost to the next better entry shown on the page."""
EPOCH = (1980, 1, 1, 0, 0, 0)
"""Date of every file in a zip: the earliest that one can have."""


def write_feedback(gathering: Gathering, entry_id: str, out: Path) -> tuple[Path, Path]:
    """Write page and zip for one entry and return their paths.

    Raises:
        Leak: they would have held a text of the closed stage or a credential; nothing is written.
    """
    feedback = gathering.feedback(entry_id)
    folder = gathering.results.entry(feedback.track, entry_id)
    with tempfile.TemporaryDirectory() as name:
        content = FeedbackFolder(Path(name))
        write_text(content.page, page(feedback))
        if feedback.answers:
            write_text(content.answer_lines, "".join(map(_answer_line, feedback.answers)))
            write_pages(gathering.competition, gathering.results, content.answers, only=entry_id)
        _copy_records(folder, feedback, content)
        search_for_leaks(content.path, closed_lines(gathering.competition))
        files = FeedbackFiles(out)
        with atomic_path(files.archive(entry_id)) as temporary:
            _zip(content.path, temporary)
        write_text(files.page(entry_id), content.page.read_text(encoding="utf-8"))
    return files.page(entry_id), files.archive(entry_id)


def page(feedback: Feedback) -> str:
    """Return the page of one entry's feedback."""
    return render(
        "feedback.html.j2",
        "page.js",
        feedback=feedback,
        shown_answers=SHOWN_ANSWERS,
        shown_lost=SHOWN_LOST,
        **ENTRY_FIGURES,
    )


def _answer_line(answer: Answer) -> str:
    line = {
        "scenario": answer.question.scenario,
        "run": answer.question.run,
        "instance": answer.question.instance,
        "references": [asdict(reference) for reference in answer.references],
        "replies": [asdict(reply) for reply in answer.replies],
        "shortened": answer.shortened,
        "values": dict(answer.values),
    }
    return json.dumps(line, ensure_ascii=False) + "\n"


def _copy_records(folder: EntryFolder, feedback: Feedback, content: FeedbackFolder) -> None:
    """Copy what a release takes of the entry, the closed stage's left out."""
    for step in STEPS:
        for path in (path for path in step.released(folder) if path.is_file() and step.name != CLOSED):
            target = content.records / path.relative_to(folder.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    counted = content.records / folder.contamination.relative_to(folder.path)
    counted.unlink(missing_ok=True)
    if feedback.report.files and not isinstance(feedback.report.files.contamination, Missing):
        feedback.report.files.contamination.write(counted)


def _zip(folder: Path, path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(one for one in folder.rglob("*") if one.is_file()):
            info = zipfile.ZipInfo(file.relative_to(folder).as_posix(), EPOCH)
            info.compress_type, info.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            archive.writestr(info, file.read_bytes())
