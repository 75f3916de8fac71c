"""Stripping the markup of web pages."""

from __future__ import annotations

import html
import re
from typing import Literal

from palio.curation.operations import OperationContext, RowOperation, Verdict
from palio.curation.operations.replace_matches import rewritten
from palio.curation.rows import Batch

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


class CleanMarkup(RowOperation):
    """Strip HTML tags and Markdown emphasis, unescape entities, collapse runs of blanks in a line."""

    op: Literal["clean_markup"]

    def apply(self, batch: Batch, context: OperationContext) -> Verdict:
        return rewritten(batch, without_markup, "both", "without its markup")


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
