"""Tables in the docs whose rows are in the docstrings of the tests that prove them.

    python -m tests.support.proven        writes the tables anew

A paragraph of a test's docstring from `| ` to ` |` is a row, to which the test's name is added. In a page the
rows follow their table's head, which follows a comment: `<!-- proven by tests/workflow/test_reruns.py -->`.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = ("docs/architecture.md", "docs/operating.md")
ROW = re.compile(r"^\| .*? \|$", re.MULTILINE | re.DOTALL)
TABLE = re.compile(r"(<!-- proven by (?P<files>[^>]+) -->\n+\|.*\n\|.*\n)(?:\|.*\n)*")


def rows(file: Path) -> list[str]:
    """Return the rows that the tests of a file prove, in their order."""
    found = []
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            name = node.name.removeprefix("test_")
            for row in ROW.findall(ast.get_docstring(node) or ""):
                found.append(f"{' '.join(row.split())} `{name}` |")
    return found


def with_tables(page: str) -> str:
    """Return a page with the rows of its tables as the tests have them now."""

    def table(match: re.Match[str]) -> str:
        proven = [row for file in match["files"].split() for row in rows(ROOT / file)]
        return match[1] + "".join(f"{row}\n" for row in proven)

    return TABLE.sub(table, page)


if __name__ == "__main__":
    for name in PAGES:
        path = ROOT / name
        path.write_text(with_tables(path.read_text(encoding="utf-8")), encoding="utf-8")
