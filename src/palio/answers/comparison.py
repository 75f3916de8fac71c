"""Which answers have full marks, and which questions decide between two entries. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from palio.answers.reading import Answer, Question
from palio.config import Metric

Metrics = Mapping[str, Mapping[str, Metric]]
"""Columns by scenario and title."""


def full_marks(answer: Answer, metrics: Mapping[str, Metric]) -> bool:
    """Return whether every request is answered and no metric is short of its best: 1, or 0 where lower is
    better."""
    return not answer.unanswered and all(gain >= 0 for gain in _gains(answer, metrics).values())


def _gains(answer: Answer, metrics: Mapping[str, Metric]) -> dict[str, float]:
    """Return each known value as its distance from full marks: negative if it is short of them."""
    return {
        title: value - 1 if metrics[title].higher_is_better else -value
        for title, value in answer.values.items()
        if value is not None
    }


def shortfall(answer: Answer, metrics: Mapping[str, Metric]) -> float:
    """Return the mean distance from full marks over the metrics; without any, 1 for no answer, else 0."""
    gains = _gains(answer, metrics)
    return -sum(gains.values()) / len(gains) if gains else float(answer.unanswered)


@dataclass(frozen=True)
class Decision:
    """One question that two entries did not do equally well on."""

    question: Question
    mine: Answer
    other: Answer
    difference: float
    """What it adds to my scenario's mean value beyond the other's; negative: I lost it."""


def decisions(mine: Iterable[Answer], other: Iterable[Answer], metrics: Metrics) -> list[Decision]:
    """Return the questions that both were asked and did not do equally well on, the largest difference first.

    The differences of a scenario with one metric add up to the difference of the two values in its column.
    """
    theirs = {answer.question.key: answer for answer in other}
    found = []
    for answer in mine:
        if against := theirs.get(answer.question.key):
            columns = metrics[answer.question.scenario]
            lead = shortfall(against, columns) - shortfall(answer, columns)
            if lead:
                share = answer.question.share
                found.append(Decision(answer.question, answer, against, lead * share))
    return sorted(found, key=lambda decision: -abs(decision.difference))
