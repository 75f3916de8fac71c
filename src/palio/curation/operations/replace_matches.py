"""Replacing what a regular expression matches."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Annotated, Literal

from pydantic import Field

from palio.config import Pattern
from palio.curation.operations import OperationContext, Reasons, RowOperation, Verdict
from palio.curation.rows import FIELDS, Batch, Side
from palio.limits import bounded


class ReplaceMatches(RowOperation):
    """Replace what a regular expression matches, e.g. boilerplate with nothing; drop rows that become
    empty."""

    op: Literal["replace_matches"]
    pattern: Pattern
    """Python regular expression."""
    by: Annotated[str, Field(max_length=1000)] = ""
    """Replacement; may refer to groups, as in `\\1`."""
    field: Side = "both"
    """Side of the row."""

    def apply(self, batch: Batch, context: OperationContext) -> Verdict:
        rewrite = partial(re.compile(self.pattern).sub, self.by)
        return rewritten(batch, rewrite, self.field, f"without what {self.pattern} matches")


def rewritten(batch: Batch, rewrite: Callable[[str], str], field: Side, without: str) -> Verdict:
    """Rewrite the turns of a field, and drop rows with an empty turn."""
    rows = [list(turns) for turns in batch.turns]
    reasons: Reasons = []
    with bounded() as watched:
        for turns, before in zip(watched(rows), batch.turns, strict=True):
            turns[FIELDS[field]] = map(rewrite, turns[FIELDS[field]])
            emptied = any(old and not new.strip() for old, new in zip(before, turns, strict=True))
            reasons.append(f"nothing is left {without}" if emptied else None)
    return Verdict(reasons, batch.rewritten(rows))
