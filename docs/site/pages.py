"""A hook of MkDocs: the pages outside docs/ and the files that pages link to, with links that hold.

In the repository docs/scoring.md links to ../config/README.md; on the site, whose root is docs/, to
config/README.md. README.md is the front page.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
OUTSIDE = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "config/README.md", "profiles/README.md")
LINK = re.compile(r"(?<=\]\()(?!https?://|#|mailto:)([^)#\s]+)")


def on_files(files: Files, config: Any) -> Files:
    pages = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    linked = {target for page in (*OUTSIDE, *pages) for target in _targets(page)}
    for path in dict.fromkeys((*OUTSIDE, *sorted(linked))):
        if files.get_file_from_path(_on_site(path)) is None and (ROOT / path).is_file():
            files.append(File.generated(config, _on_site(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    own = page.file.src_uri
    source = _in_repository(own)

    def turned(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link[1]))
        return posixpath.relpath(_on_site(target), posixpath.dirname(own) or ".")

    return LINK.sub(turned, markdown)


def _targets(page: str) -> list[str]:
    links = LINK.findall((ROOT / page).read_text(encoding="utf-8"))
    return [posixpath.normpath(posixpath.join(posixpath.dirname(page), link)) for link in links]


def _on_site(path: str) -> str:
    return "index.md" if path == "README.md" else path.removeprefix("docs/")


def _in_repository(uri: str) -> str:
    if uri == "index.md":
        return "README.md"
    return uri if (ROOT / uri).is_file() else f"docs/{uri}"
