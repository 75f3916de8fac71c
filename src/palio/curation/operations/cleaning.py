"""Taking the web's markup off texts."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator

from palio.config import CleanMarkup
from palio.curation.rows import Batches, Surroundings, Verdict

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
    return _TRAILING.sub("", _BLANKS.sub(" ", text))


def clean_markup(settings: CleanMarkup, rows: Batches, around: Surroundings) -> Iterator[Verdict]:
    for batch in rows():
        prompts = [without_markup(text) for text in batch.prompts]
        completions = [without_markup(text) for text in batch.completions]
        reasons = [
            None if prompt.strip() and completion.strip() else "nothing is left without its markup"
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        yield Verdict(reasons, prompts, completions)
