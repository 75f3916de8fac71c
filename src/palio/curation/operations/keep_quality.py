"""Keeping rows that look like written text."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat

from palio.config.common import Share
from palio.curation.operations import OperationContext, RowOperation, Verdict
from palio.curation.rows import Batch

_BULLETS = ("•", "●", "-", "*", "‣")


class KeepQuality(RowOperation):
    """Keep rows that look like written text, by heuristics and thresholds of Gopher (arXiv 2112.11446, table
    A1), C4 (1910.10683) and FineWeb (2406.17557). They were made for web pages: leave it out for tables,
    code and formulas."""

    op: Literal["keep_quality"]
    min_word_length: Annotated[float, Field(ge=0)] = 3
    """Smallest mean length of a word in characters (Gopher)."""
    max_word_length: PositiveFloat = 10
    """Largest mean length of a word in characters (Gopher)."""
    max_symbols: Annotated[float, Field(ge=0)] = 0.1
    """Largest number of `#` and `…` per word (Gopher)."""
    min_alphabetic: Share = 0.8
    """Smallest share of words with a letter (Gopher)."""
    max_bullets: Share = 0.9
    """Largest share of lines that begin with a bullet (Gopher)."""
    max_repeated_lines: Share = 0.3
    """Largest share of lines that repeat an earlier line of the row (Gopher, FineWeb)."""
    max_top_words: Share = 0.2
    """Largest share of characters in the most frequent pair of words, if repeated (Gopher)."""
    refused: tuple[str, ...] = ("lorem ipsum", "javascript is disabled", "terms of use", "use of cookies")
    """Phrases that mark boilerplate of web pages (C4)."""

    def apply(self, batch: Batch, context: OperationContext) -> Verdict:
        return Verdict([self._fault("\n".join(turns)) for turns in batch.turns])

    def _fault(self, text: str) -> str | None:
        """Return the first heuristic that the text fails."""
        words = text.split()
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        length = sum(map(len, words)) / len(words)
        symbols = (text.count("#") + text.count("…")) / len(words)
        alphabetic = sum(any(map(str.isalpha, word)) for word in words) / len(words)
        bullets = sum(line.startswith(_BULLETS) for line in lines) / len(lines)
        repeated = 1 - len(set(lines)) / len(lines)
        measures = {
            "of letters, digits and signs in a word on average": (
                length,
                self.min_word_length,
                self.max_word_length,
            ),
            "# and … per word": (symbols, 0, self.max_symbols),
            "of the words have a letter": (alphabetic, self.min_alphabetic, 1),
            "of the lines begin with a bullet": (bullets, 0, self.max_bullets),
            "of the lines stand twice": (repeated, 0, self.max_repeated_lines),
            "of the text is one pair of words": (_top_pair(words), 0, self.max_top_words),
        }
        for what, (value, least, most) in measures.items():
            if not least <= value <= most:
                return f"{value:.2f} {what}, not {least:g} to {most:g}"
        lower = text.lower()
        phrase = next((phrase for phrase in self.refused if phrase.lower() in lower), None)
        return f"holds {phrase!r}" if phrase else None


def _top_pair(words: list[str]) -> float:
    """Return the share of characters in the most frequent pair of words, 0 if none is repeated."""
    pairs = Counter(pairwise(words))
    if not pairs:
        return 0.0
    most = max(pairs.values())
    longest = max(len(first) + len(second) for (first, second), count in pairs.items() if count == most)
    return most * longest / sum(map(len, words)) if most > 1 else 0.0
