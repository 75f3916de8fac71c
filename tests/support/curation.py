"""Recipes in one line, and reading published lines as a person would."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from palio.config import DatasetRecipe, parse
from palio.curation.curate import curate_dataset
from palio.provenance import file_sha256
from palio.records import DatasetManifest

OUTPUTS = ("train.parquet", "dropped.parquet", "quarantine.jsonl", "card.md", "manifest.json")


def demo_lines(sources: Path, family: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (sources / f"{family}.jsonl").read_text().splitlines()]


def plain(text: str) -> str:
    """The text without the noise of `palio.demo.data`: its tags, entities, ** and doubled blanks."""
    bare = re.sub(r"</?(p|b|br|div)( class='question')?>", "", text)
    bare = re.sub(r"^\*\*(.*?)\*\*\n", r"\1\n", html.unescape(bare))
    return re.sub(" {2,}", " ", bare)


def recipe(
    sources: list[dict[str, Any]], *operations: dict[str, Any] | str, **settings: Any
) -> DatasetRecipe:
    """A recipe of sources (licence filled in) and operations (a name alone: default settings)."""
    return parse(
        DatasetRecipe,
        {
            "sources": [{"licence": "CC0-1.0", **source} for source in sources],
            "operations": [{"op": one} if isinstance(one, str) else one for one in operations],
            **settings,
        },
        "recipe",
    )


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def curate(
    given: DatasetRecipe,
    out: Path,
    base_model: Path = Path("none"),
    limit: int | None = None,
    workers: int = 1,
    team_folders: Sequence[Path] = (),
) -> DatasetManifest:
    """Curate as entry civetta; paths in the recipe are absolute, the work folder lies beside `out`."""
    return curate_dataset(
        given,
        base_model=base_model,
        competition="palio",
        track="laptop",
        entry="civetta",
        out=out,
        limit=limit,
        workers=workers,
        team_folders=team_folders,
    )


def digests(dataset: Path) -> dict[str, str]:
    return {name: file_sha256(dataset / name) for name in OUTPUTS}


def finished(work: Path) -> dict[Path, int]:
    """When each batch was read, or finished by an operation."""
    return {path: path.stat().st_mtime_ns for path in work.glob("*/[0-9][0-9][0-9][0-9][0-9].arrow")}


def pairs_of(table: Path) -> list[tuple[str, str]]:
    """Prompt and completion of every row of a Parquet file."""
    rows = pq.read_table(table, columns=["prompt", "completion"]).to_pylist()
    return [(row["prompt"], row["completion"]) for row in rows]
