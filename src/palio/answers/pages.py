"""Answers of the open stage as static pages, one for each track, that work from a disk or any web server.

    <out>/<track>.html                        all questions, and which entries there are
    <out>/<track>/questions/<part>.js         prompts and references of `PART` questions
    <out>/<track>/entries/<entry>/marks.js    marks and the beginning of every answer of an entry
    <out>/<track>/entries/<entry>/<part>.js   its answers to the questions of a part, in full

A page loads a part when somebody looks at one of its questions. The parts are scripts, since a page from a
disk may load nothing else; each only hands JSON to the page, which shows it as text.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from palio.answers.reading import Answer, AskedStage, Question
from palio.config import Competition
from palio.entries import Entries
from palio.errors import BadInput
from palio.evaluation.helm import Reference
from palio.layout import AnswerPages, Results
from palio.markup import visible
from palio.report.rendering import render

PART = 50
"""Questions of a part: some 100 KB of prompts."""
MAX_TEXT = 20_000
"""Characters shown of a text; a server that rambles fills no disk."""
MAX_HEAD = 200
"""Characters of a question or an answer in the list, which is what the search looks at."""
UNANSWERED, CUT, SHORTENED = 1, 2, 4
"""Bits of an answer's state."""
FEW_DIGITS = 4


def write_pages(
    competition: Competition, results: Results, out: AnswerPages, only: str | None = None
) -> Mapping[str, Collection[str]]:
    """Write the pages of all entries with answers, or of `only` one, and return their ids by track.

    A competition whose open stage is not prepared here has no page.
    """
    building = AnswerPages(out.path.with_name(f".{out.path.name}.tmp"))
    shutil.rmtree(building.path, ignore_errors=True)
    building.path.mkdir(parents=True)
    shown = {}
    with suppress(BadInput):  # the stage is not prepared
        asked = AskedStage(competition, "open")
        for track_id, entries in Entries(competition).by_track().items():
            teams = {name: entry.team for name, entry in entries.items() if only in (None, name)}
            if found := _write_track(asked, results, building, track_id, teams):
                shown[track_id] = found
    shutil.rmtree(out.path, ignore_errors=True)
    building.path.rename(out.path)
    return shown


def _write_track(
    asked: AskedStage, results: Results, out: AnswerPages, track_id: str, teams: Mapping[str, str]
) -> list[str]:
    references: dict[str, tuple[Reference, ...]] = {}
    shown = []
    for entry_id in teams:
        try:
            answers = {one.question.key: one for one in asked.answers(results.entry(track_id, entry_id))}
        except BadInput:  # it has not come so far
            continue
        references |= {key: answer.references for key, answer in answers.items() if key not in references}
        _write_entry(asked, out, track_id, entry_id, answers)
        shown.append(entry_id)
    if shown:
        _write_questions(asked, out, track_id, references)
        page = render("answers.html.j2", "answers.js", parts=True, **_index(asked, track_id, shown, teams))
        out.page(track_id).write_text(page, encoding="utf-8")
    return shown


def _index(asked: AskedStage, track_id: str, shown: list[str], teams: Mapping[str, str]) -> dict[str, Any]:
    """Return what the page itself holds."""
    competition = asked.competition
    runs = list(dict.fromkeys((one.run, one.scenario, one.share) for one in asked.questions))
    number = {run: place for place, (run, _, _) in enumerate(runs)}
    scenarios = list(dict.fromkeys(scenario for _, scenario, _ in runs))
    data = {
        "folder": track_id,
        "part": PART,
        "scenarios": scenarios,
        "metrics": [
            [[visible(title), metric.higher_is_better] for title, metric in asked.metrics(name).items()]
            for name in scenarios
        ],
        "runs": [[visible(run), scenarios.index(scenario), share] for run, scenario, share in runs],
        "questions": [[number[one.run], visible(one.instance), _head(one.text)] for one in asked.questions],
        "entries": [[entry_id, visible(teams[entry_id])] for entry_id in shown],
    }
    title = competition.tracks[track_id].title
    return {"competition": competition.title, "track": track_id, "title": title, "index": data}


# --- parts -----------------------------------------------------------------------------------------------


def _write_questions(
    asked: AskedStage, out: AnswerPages, track_id: str, references: Mapping[str, tuple[Reference, ...]]
) -> None:
    prompts: dict[str, list[tuple[str, str]]] = {}
    for (run, instance, variant), prompt in asked.prompts.items():
        prompts.setdefault(f"{run}/{instance}", []).append((visible(variant), _text(prompt)))

    def question(one: Question) -> Any:
        of = references.get(one.key) or (Reference(one.reference, correct=True),)
        choices = [[visible(choice.label), _text(choice.text), choice.correct] for choice in of]
        return [prompts.get(one.key, []), choices]

    _write_parts(asked.questions, question, lambda part: out.questions(track_id, part))


def _write_entry(
    asked: AskedStage, out: AnswerPages, track_id: str, entry_id: str, answers: Mapping[str, Answer]
) -> None:
    titles = {
        scenario: list(asked.metrics(scenario)) for scenario in {one.scenario for one in asked.questions}
    }

    def marks(one: Question) -> Any:
        answer = answers.get(one.key)
        if answer is None:
            return None
        values = [answer.values.get(title) for title in titles[one.scenario]]
        return [[_finite(value) for value in values], _state(answer), _head(answer.replies[0].text or "")]

    def replies(one: Question) -> Any:
        answer = answers.get(one.key)
        if answer is None:
            return None
        return [
            [
                visible(reply.variant),
                None if reply.text is None else _text(reply.text),
                visible(reply.why),
                reply.cut,
                shortened,
                _text(reply.prompt) if shortened else None,
                _finite(reply.logprob),
            ]
            for reply, shortened in zip(answer.replies, answer.shortened, strict=True)
        ]

    _write_script(out.marks(track_id, entry_id), [marks(one) for one in asked.questions])
    _write_parts(asked.questions, replies, lambda part: out.answers(track_id, entry_id, part))


def _state(answer: Answer) -> int:
    cut = CUT if any(reply.cut for reply in answer.replies) else 0
    return (UNANSWERED if answer.unanswered else 0) | cut | (SHORTENED if any(answer.shortened) else 0)


def _finite(number: float | None) -> float | None:
    """Return a number for JSON, which has no infinity."""
    return None if number is None or not math.isfinite(number) else round(number, FEW_DIGITS)


def _write_parts(
    questions: list[Question], content: Callable[[Question], Any], path: Callable[[int], Path]
) -> None:
    for part, start in enumerate(range(0, len(questions), PART)):
        _write_script(path(part), [content(one) for one in questions[start : start + PART]])


def _write_script(path: Path, payload: Any) -> None:
    """Write a script that hands JSON to the page, named by its path, since parts arrive in any order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    name = json.dumps("/".join(path.with_suffix("").parts[-3:]))
    text = json.dumps(payload, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    path.write_text(f"palioPart({name},{text});\n", encoding="utf-8")


def _text(text: str) -> str:
    rest = len(text) - MAX_TEXT
    return visible(text if rest <= 0 else f"{text[:MAX_TEXT]}… ({rest} characters more)")


def _head(text: str) -> str:
    line = " ".join(text.split())
    return visible(line if len(line) <= MAX_HEAD else f"{line[: MAX_HEAD - 1]}…")
