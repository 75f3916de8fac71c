"""Dropping rows in which the model refuses to answer."""

from __future__ import annotations

from typing import Literal

from palio.config import Pattern
from palio.curation.operations import OperationContext, RowOperation, Verdict
from palio.curation.operations.drop_matches import without_matches
from palio.curation.rows import Batch


class DropRefusals(RowOperation):
    """Drop rows whose completion is a refusal."""

    op: Literal["drop_refusals"]
    patterns: tuple[Pattern, ...] = (r"as an ai\b", r"\bi (cannot|can't|am unable to)\b", r"^i don't know")
    """Python regular expressions of a refusal, ignoring case."""

    def apply(self, batch: Batch, context: OperationContext) -> Verdict:
        return without_matches(batch, self.patterns, "completion", "the answer refuses")
