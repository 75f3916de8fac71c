"""Dropping rows with a match of a regular expression."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from palio.config import Pattern
from palio.curation.operations import OperationContext, Reasons, RowOperation, Verdict
from palio.curation.rows import FIELDS, Batch, Side
from palio.limits import bounded


class DropMatches(RowOperation):
    """Drop rows with a match of a regular expression, ignoring case."""

    op: Literal["drop_matches"]
    patterns: tuple[Pattern, ...] = Field(min_length=1)
    """Python regular expressions."""
    field: Side = "both"
    """Side of the row."""

    def apply(self, batch: Batch, context: OperationContext) -> Verdict:
        return without_matches(batch, self.patterns, self.field, "holds")


def without_matches(batch: Batch, patterns: Sequence[str], field: Side, why: str) -> Verdict:
    """Drop rows in which a turn of the field matches a pattern; the reason is `why` and the match."""
    compiled = [re.compile(pattern, re.IGNORECASE) for pattern in patterns]
    reasons: Reasons = []
    with bounded() as watched:
        for turns in watched(batch.turns):
            texts = [text.strip() for text in turns[FIELDS[field]]]
            matches = (match for text in texts for pattern in compiled if (match := pattern.search(text)))
            first = next(matches, None)
            reasons.append(f"{why}: {first[0]!r:.200}" if first else None)
    return Verdict(reasons)
