"""Keeping rows by their number of characters."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeInt, PositiveInt

from palio.curation.operations import OperationContext, Reasons, RowOperation, Verdict
from palio.curation.rows import FIELDS, Batch


class LengthFilter(RowOperation):
    """Keep rows by the number of characters of prompt and completion."""

    op: Literal["length_filter"]
    min_prompt: NonNegativeInt = 0
    """Minimum number of characters of the prompt; text without a prompt has 0."""
    max_prompt: PositiveInt = 8000
    """Maximum number of characters of the prompt."""
    min_completion: NonNegativeInt = 1
    """Minimum number of characters of the completion."""
    max_completion: PositiveInt = 4000
    """Maximum number of characters of the completion."""

    def apply(self, batch: Batch, context: OperationContext) -> Verdict:
        reasons: Reasons = []
        for turns in batch.turns:
            prompt, completion = (sum(map(len, turns[FIELDS[side]])) for side in ("prompt", "completion"))
            reasons.append(
                outside("prompt", prompt, self.min_prompt, self.max_prompt, "characters")
                or outside("completion", completion, self.min_completion, self.max_completion, "characters")
            )
        return Verdict(reasons)


def outside(what: str, length: int, least: int, most: int, unit: str) -> str | None:
    """Return why a length is not between the limits, or None if it is."""
    if length < least:
        return f"{what} has {length} {unit}, fewer than {least}"
    return f"{what} has {length} {unit}, more than {most}" if length > most else None
