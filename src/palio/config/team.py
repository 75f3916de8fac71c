"""When two names are one team's, or look as if they were."""

from __future__ import annotations

import re
import unicodedata

_LATIN = {
    "a": "\u0430\u03b1\u0251",
    "b": "\u0432",
    "c": "\u0441",
    "d": "\u0501",
    "e": "\u0435",
    "g": "\u0261",
    "h": "\u043d\u04bb",
    "i": "\u0456\u03b9\u0131\u0269",
    "j": "\u0458",
    "k": "\u043a\u03ba",
    "l": "\u04cf1",
    "m": "\u043c",
    "n": "\u03b7",
    "o": "\u043e\u03bf0",
    "p": "\u0440\u03c1",
    "q": "\u051b",
    "s": "\u0455",
    "t": "\u0442\u03c4",
    "u": "\u03c5",
    "v": "\u03bd",
    "w": "\u051d",
    "x": "\u0445\u03c7",
    "y": "\u0443",
}
_LOOKALIKES = str.maketrans({other: letter for letter, others in _LATIN.items() for other in others})
"""Cyrillic, Greek and other letters, and digits, that look like a Latin one."""


def team_id(name: str) -> str:
    """Return what makes a team the same team: its name without case, blanks and punctuation: `nobile-oca`.

    It is also the name of the team's folder where a rule set's `team_folders` end in `<team>`.
    """
    return re.sub(r"[\W_]+", "-", unicodedata.normalize("NFKC", name).casefold()).strip("-")


def team_skeleton(name: str) -> str:
    """Return a team's name as it looks: names of equal skeletons can be taken for each other.

    As Unicode's UTS 39 has it, but for the letters above only.
    """
    letters = unicodedata.normalize("NFKD", team_id(name)).translate(_LOOKALIKES)
    return "".join(char for char in letters if char.isalnum()).replace("rn", "m").replace("vv", "w")
