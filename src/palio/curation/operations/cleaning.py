"""Rewriting texts: the web's markup, and what a pattern matches."""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from functools import partial

from palio.config import CleanMarkup, ReplaceMatches
from palio.curation.rows import FIELDS, Batch, Surroundings, Verdict

# Named tags only: `a < b > c` and `<n>` of a formula are text.
_TAGS = (
    "a|abbr|article|b|blockquote|body|center|cite|code|dd|div|dl|dt|em|font|footer|h[1-6]|head|header|hr|html|"
    "i|img|li|main|mark|ol|p|pre|q|s|section|small|span|strong|sub|sup|table|tbody|td|th|thead|tr|u|ul"
)
_BREAK = re.compile(r"<br\s*/?>\n?", re.IGNORECASE)
_TAG = re.compile(rf"</?(?:{_TAGS})(?:\s[^<>]*)?/?>", re.IGNORECASE)
# An asterisk between blanks multiplies; one that touches the text it embraces is emphasis.
_EMPHASIS = re.compile(r"(?<![\w*])(\*{1,3})(?=[^\s*])([^*\n]*[^\s*])\1(?![\w*])")
_BLANKS = re.compile(r"[ \t\u00a0]+")
_TRAILING = re.compile(r" +(?=\n)")


def without_markup(text: str) -> str:
    """The text as a reader sees it. Line breaks and a first blank stay: prompts rely on them."""
    if "<" in text:
        text = _TAG.sub("", _BREAK.sub("\n", text))
    if "&" in text:
        text = html.unescape(text)
    if "*" in text:
        text = _EMPHASIS.sub(r"\2", text)
    if "  " in text or "\t" in text or "\u00a0" in text:
        text = _BLANKS.sub(" ", text)
    return _TRAILING.sub("", text) if " \n" in text else text


def clean_markup(settings: CleanMarkup, batch: Batch, around: Surroundings) -> Verdict:
    return _rewritten(batch, without_markup, "both", "without its markup")


def replace_matches(settings: ReplaceMatches, batch: Batch, around: Surroundings) -> Verdict:
    rewrite = partial(re.compile(settings.pattern).sub, settings.by)
    return _rewritten(batch, rewrite, settings.field, f"without what {settings.pattern} matches")


def _rewritten(batch: Batch, rewrite: Callable[[str], str], field: str, without: str) -> Verdict:
    of_field = FIELDS[field]
    rewritten = [list(turns) for turns in batch.turns]
    for turns in rewritten:
        turns[of_field] = map(rewrite, turns[of_field])
    reasons = [None if all(map(str.strip, turns)) else f"nothing is left {without}" for turns in rewritten]
    return Verdict(reasons, batch.rewritten(rewritten))
