"""Guesses of what a greedy sequence writes next, which one forward pass then checks all at once.

Models copy from their prompt and repeat themselves; HELM's few-shot prompts end as their examples do.
"""

from __future__ import annotations

from collections.abc import Sequence

SIZES = (2, 1)
"""Last tokens that are looked for."""


def guess(tokens: Sequence[int], count: int) -> list[int]:
    """The `count` tokens behind the latest earlier place where the last tokens stood; empty if nowhere.

    Where that place is less than `count` tokens back, what is copied is itself copied on: a loop goes on.
    """
    text = "".join(map(chr, tokens))  # one character a token: finding is then a matter of microseconds
    for size in SIZES:
        if (at := text.rfind(text[-size:], 0, -1)) >= 0:
            period = len(text) - size - at
            return [tokens[at + size + i % period] for i in range(count)]
    return []
