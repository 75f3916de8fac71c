"""Answers as lines of a terminal. All texts are untrusted: nothing in them is a command to it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from palio.answers.comparison import Decision, decisions, full_marks, shortfall
from palio.answers.reading import Answer, AskedStage, Question, Shortened
from palio.config import Competition, Metric
from palio.entries import Entries
from palio.errors import BadInput
from palio.evaluation.helm import Reply
from palio.layout import EntryFolder, Results, Stage
from palio.markup import terminal, visible

INDENT = "  "


def entry_lines(
    competition: Competition,
    results: Results,
    entry: str,
    stage: Stage,
    scenario: str | None,
    wrong: bool,
    compare: str | None,
) -> Iterator[str]:
    """Return the lines of `palio answers`.

    Raises:
        BadInput: no such entry or scenario, the stage is not prepared or closed to whoever asks, or an entry
            has no HELM run of it.
    """
    scenarios = competition.stage(stage).scenarios
    if scenario is not None and scenario not in scenarios:
        raise BadInput("palio answers", "--scenario", scenario, fix=f"use one of {', '.join(scenarios)}")
    folders = [_folder(competition, results, name) for name in (entry, compare) if name is not None]
    asked = AskedStage(competition, stage)
    given = [
        (one for one in asked.answers(folder) if scenario in (None, one.question.scenario))
        for folder in folders
    ]
    if compare is None:
        return answer_lines(asked, given[0], wrong=wrong)
    metrics = {name: asked.metrics(name) for name in scenarios}
    return decision_lines(asked, decisions(given[0], given[1], metrics), entry, compare, wrong=wrong)


def _folder(competition: Competition, results: Results, given: str) -> EntryFolder:
    entries = Entries(competition)
    entry_id = entries.known(given)
    return results.entry(entries[entry_id].track, entry_id)


def answer_lines(asked: AskedStage, answers: Iterable[Answer], *, wrong: bool) -> Iterator[str]:
    """Yield every answer in full; with `wrong` only those without full marks, the worst first."""
    if wrong:
        short = [one for one in answers if not full_marks(one, asked.metrics(one.question.scenario))]
        answers = sorted(short, key=lambda one: -shortfall(one, asked.metrics(one.question.scenario)))
    count = 0
    for answer in answers:
        count += 1
        yield from _question_lines(answer.question, answer)
        yield from _replies(answer)
        yield f"{INDENT}{marks(answer.values, asked.metrics(answer.question.scenario))}"
        yield ""
    what = "answers without full marks" if wrong else "answers"
    yield f"{count} {what}, {len(asked.questions)} questions in the stage"


def decision_lines(
    asked: AskedStage, found: list[Decision], mine: str, other: str, *, wrong: bool
) -> Iterator[str]:
    """Yield the questions that decide between two entries, the largest difference first; with `wrong` only
    those that the first of them lost."""
    for decision in found:
        if wrong and decision.difference > 0:
            continue
        yield from _question_lines(decision.question, decision.mine)
        for name, answer in ((mine, decision.mine), (other, decision.other)):
            yield f"{INDENT}{name}: {marks(answer.values, asked.metrics(decision.question.scenario))}"
            yield from _replies(answer)
        yield ""
    won = sum(decision.difference > 0 for decision in found)
    yield f"{mine} did better on {won} questions, {other} on {len(found) - won}"


def _question_lines(question: Question, answer: Answer) -> Iterator[str]:
    yield f"--- {terminal(question.scenario)}, {terminal(question.key)}"
    if answer.replies:
        yield from _block("prompt", answer.replies[0].prompt)
    for reference in answer.references:
        label = f"{reference.label}. " if reference.label else ""
        yield from _block("correct" if reference.correct else "choice", label + reference.text)


def _replies(answer: Answer) -> Iterator[str]:
    for reply, shortened in zip(answer.replies, answer.shortened, strict=True):
        name = f"answer ({terminal(reply.variant)})" if reply.variant else "answer"
        if reply.text is None:
            yield f"{INDENT}{name}: none, {terminal(reply.why)}"
        else:
            yield from _block(name, reply.text)
        if remarks := reply_remarks(reply, shortened):
            yield f"{INDENT}  ({'; '.join(remarks)})"


def reply_remarks(reply: Reply, shortened: Shortened) -> list[str]:
    """Return what was done to a request and its answer."""
    return [
        *(["the server went on behind a stop sequence, cut there"] if reply.cut else []),
        *([f"prompt shortened to the model's window: {shortened}"] if shortened else []),
        *([f"log-probability {reply.logprob:.3f}"] if reply.logprob is not None else []),
    ]


def marks(values: Mapping[str, float | None], metrics: Mapping[str, Metric]) -> str:
    """Return the values in words, such as `exact match 1, toxicity 0.2 (lower is better)`."""
    return (
        ", ".join(
            f"{title} {'unknown' if value is None else f'{value:.4g}'}"
            f"{'' if metrics[title].higher_is_better else ' (lower is better)'}"
            for title, value in values.items()
        )
        or "no metric has a value for this question"
    )


def _block(name: str, text: str) -> Iterator[str]:
    """Yield a text of several lines, indented under its name."""
    first, *rest = [visible(line) for line in text.splitlines()] or [""]
    yield f"{INDENT}{name}: {first}"
    yield from (f"{INDENT}{' ' * (len(name) + 2)}{line}" for line in rest)
