"""Dropping rows by a field of the record that they were read from."""

from __future__ import annotations

from typing import Literal

from palio.curation.operations import OperationContext, Reasons, Verdict
from palio.curation.operations.keep_where import FieldOperation, said
from palio.curation.rows import Batch


class DropWhere(FieldOperation):
    """Drop rows whose record fulfills a condition on one of its fields; rows without the field stay. A field
    that no row has is an error, which names those there are."""

    op: Literal["drop_where"]

    def apply(self, batch: Batch, context: OperationContext) -> Verdict:
        reasons: Reasons = [
            said(self.field, value) if fulfilled else None for value, fulfilled in self.judged(batch)
        ]
        return Verdict(reasons)
