"""The operations of a recipe, in two kinds.

One that judges row by row turns a batch into a verdict. One that judges a row by all the others
(`ByAllRows` in `palio.config`) takes notes of each batch, such as hashes of its rows, and judges all rows by
the notes alone. So verdicts and notes are functions of one batch, made anywhere and in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pyarrow as pa

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
from palio.curation.rows import Batch, Notes, Reasons, Surroundings, Verdict

# `Any` is the operation's own settings.
ROW_BY_ROW: dict[str, Callable[[Any, Batch, Surroundings], Verdict]] = {
    "clean_markup": cleaning.clean_markup,
    "replace_matches": cleaning.replace_matches,
    "drop_matches": filtering.drop_matches,
    "drop_refusals": filtering.drop_refusals,
    "keep_languages": quality.keep_languages,
    "keep_quality": quality.keep_quality,
    "length_filter": filtering.length_filter,
    "token_length": filtering.token_length,
    "decontaminate": decontamination.decontaminate,
}


class Joint(NamedTuple):
    note: Callable[[Any, Batch, Surroundings], pa.RecordBatch]
    """A line for each row of a batch."""
    judge: Callable[[Any, Notes, Surroundings], Iterator[Reasons]]


BY_ALL_ROWS: dict[str, Joint] = {
    "drop_disagreement": Joint(duplicates.answer_digests, duplicates.disagreement),
    "drop_exact_duplicates": Joint(duplicates.row_digests, duplicates.exact_duplicates),
    "drop_near_duplicates": Joint(near_duplicates.signatures, near_duplicates.near_duplicates),
    "drop_semantic_duplicates": Joint(
        semantic_duplicates.embeddings, semantic_duplicates.semantic_duplicates
    ),
    "cap_rows": Joint(sampling.groups, sampling.cap),
    "sample_rows": Joint(sampling.mix, sampling.sample),
}
