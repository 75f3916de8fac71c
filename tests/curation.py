"""Reading published lines as a person would, with none of the code that is tested."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path


def demo_lines(sources: Path, family: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (sources / f"{family}.jsonl").read_text().splitlines()]


def plain(text: str) -> str:
    """The text without the noise of `palio.demo.data`: its tags, entities, ** and doubled blanks."""
    bare = re.sub(r"</?(p|b|br|div)( class='question')?>", "", text)
    bare = re.sub(r"^\*\*(.*?)\*\*\n", r"\1\n", html.unescape(bare))
    return re.sub(" {2,}", " ", bare)
