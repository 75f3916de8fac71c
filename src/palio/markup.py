"""Untrusted text (names, titles, reasons) as inert text: one function per output format."""

from __future__ import annotations

import re
import unicodedata

from markupsafe import Markup, escape

_KEPT = frozenset("\n\r\t\u200c\u200d")
"""Line breaks, tabs, and the joiners that some scripts and emoji need."""
_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "`": r"\textasciigrave{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}


def visible(text: str) -> str:
    r"""Return `text` with control, bidirectional and other invisible characters as escapes such as \x1b."""
    if text.isprintable():
        return text
    return "".join(
        char
        if char.isprintable() or char in _KEPT or unicodedata.category(char) == "Zs"
        else char.encode("unicode_escape").decode()
        for char in text
    )


def terminal(text: str) -> str:
    """Return one line without escape sequences. Print it without the markup of `rich`."""
    return visible(" ".join(text.split()))


def html(text: str) -> Markup:
    """Return content of an element or a quoted attribute of HTML or SVG; line breaks are kept."""
    return escape(visible(text))


def markdown(text: str) -> str:
    """Return one line for a paragraph, a list item or a table cell of GitHub-flavored Markdown.

    An underscore inside a word is no markup and stays as it is.
    """
    line = re.sub(r"([\\`*{}\[\]<>|~&$#])", r"\\\1", terminal(text))
    line = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", line)
    line = re.sub(r"(?i)(:)(//)|(www)(\.)", r"\1\3\\\2\4", line)  # bare addresses become links
    line = re.sub(r"^([-+=])(?!\d)", r"\\\1", line)  # list, rule, heading
    return re.sub(r"^(\d{1,9})([.)])(?=\s|$)", r"\1\\\2", line)  # numbered list


def latex(text: str) -> str:
    """Return one line for running text or a cell of a table."""
    return "".join(_LATEX.get(char, char) for char in terminal(text))


def csv_cell(text: str) -> str:
    """Return one line that no spreadsheet reads as a formula: an apostrophe marks it as text."""
    line = terminal(text)
    return f"'{line}" if unicodedata.normalize("NFKC", line[:1]).startswith(("=", "+", "-", "@")) else line
