"""The operations of a recipe: each turns batches of rows into verdicts.

An operation is a function of its settings (`palio.config`), the rows and its surroundings. It may look
at all rows before it judges the first; it keeps hashes of them, never the rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from palio.config import Operation
from palio.curation.operations import (
    cleaning,
    decontamination,
    duplicates,
    filtering,
    near_duplicates,
    quality,
    sampling,
    semantic_duplicates,
)
from palio.curation.rows import Rows, Surroundings, Verdict


class Judge(Protocol):
    def __call__(self, settings: Operation, rows: Rows, around: Surroundings, /) -> Iterator[Verdict]: ...


JUDGES: dict[str, Judge] = {
    "clean_markup": cleaning.clean_markup,  # type: ignore[dict-item]  # each takes its own settings
    "replace_matches": cleaning.replace_matches,  # type: ignore[dict-item]
    "drop_matches": filtering.drop_matches,  # type: ignore[dict-item]
    "drop_refusals": filtering.drop_refusals,  # type: ignore[dict-item]
    "keep_languages": quality.keep_languages,  # type: ignore[dict-item]
    "keep_quality": quality.keep_quality,  # type: ignore[dict-item]
    "length_filter": filtering.length_filter,  # type: ignore[dict-item]
    "token_length": filtering.token_length,  # type: ignore[dict-item]
    "drop_disagreement": duplicates.drop_disagreement,  # type: ignore[dict-item]
    "drop_exact_duplicates": duplicates.drop_exact_duplicates,  # type: ignore[dict-item]
    "drop_near_duplicates": near_duplicates.drop_near_duplicates,  # type: ignore[dict-item]
    "drop_semantic_duplicates": semantic_duplicates.drop_semantic_duplicates,  # type: ignore[dict-item]
    "decontaminate": decontamination.decontaminate,  # type: ignore[dict-item]
    "cap_rows": sampling.cap_rows,  # type: ignore[dict-item]
    "sample_rows": sampling.sample_rows,  # type: ignore[dict-item]
}
