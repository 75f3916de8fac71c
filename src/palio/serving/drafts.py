"""Draft tokens of a greedy completion, which one forward pass then verifies together.

Prompt lookup decoding: models copy from their prompt and repeat themselves, and the answers to HELM's
few-shot prompts end like the examples.
"""

from __future__ import annotations

from collections.abc import Sequence

MATCH_SIZES = (2, 1)
"""Numbers of last tokens to look up, in order of preference."""


def draft_tokens(tokens: Sequence[int], count: int) -> list[int]:
    """Return the `count` tokens that followed the latest earlier match of the last tokens; empty if none.

    A match less than `count` tokens back is a loop, which is continued.
    """
    text = "".join(map(chr, tokens))  # one character per token: str.rfind takes microseconds
    for size in MATCH_SIZES:
        if (match := text.rfind(text[-size:], 0, -1)) >= 0:
            period = len(text) - size - match
            return [tokens[match + size + i % period] for i in range(count)]
    return []
