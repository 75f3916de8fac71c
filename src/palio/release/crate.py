"""RO-Crate 1.1 metadata of a release, and the check of a release against it.

https://www.researchobject.org/ro-crate/specification/1.1: one JSON-LD file that says what the folder is
and lists every file of it. Every entry is a data set of its team.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from palio import __version__
from palio.config import Competition, load_entry
from palio.errors import BadInput
from palio.layout import Project
from palio.provenance import file_differences, folder_sha256, write_json

METADATA = "ro-crate-metadata.json"
CONTEXT = [
    "https://w3id.org/ro/crate/1.1/context",
    {"sha256": "https://w3id.org/ro/terms/workflow-run#sha256"},  # not a term of RO-Crate 1.1 itself
]
LICENSES = {
    "@id": "#licenses",
    "@type": "CreativeWork",
    "name": "Licenses of the parts",
    "description": "See the entry files for the licenses of base models and data.",
}
FORMATS = {
    ".json": "application/json",
    ".yaml": "application/yaml",
    ".md": "text/markdown",
    ".csv": "text/csv",
    ".html": "text/html",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".parquet": "application/vnd.apache.parquet",
}


def describe(folder: Path, competition: Competition) -> None:
    """Write the crate's metadata over everything that is in the folder."""
    files = folder_sha256(folder)
    parts: dict[str, list[str]] = {}
    for path in files:
        parts.setdefault(_owner(path, competition), []).append(path)
    teams: dict[str, str] = {}
    datasets = []
    for owner, inside in sorted(parts.items()):
        if owner != "./":
            datasets.append(_entry(owner, inside, folder, teams))
    root: dict[str, Any] = {
        "@id": "./",
        "@type": "Dataset",
        "name": competition.title,
        "description": "Entries, records, HELM tables, leaderboards and report of the competition "
        f"{competition.competition}, to be scored again by `palio verify .`",
        "datePublished": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "license": {"@id": LICENSES["@id"]},
        "hasPart": _references([*(one["@id"] for one in datasets), *parts.get("./", [])]),
        "mentions": {"@id": "#palio"},
    }
    if teams:
        root["author"] = _references(teams.values())
    graph = [
        {
            "@id": METADATA,
            "@type": "CreativeWork",
            "about": {"@id": "./"},
            "conformsTo": {"@id": "https://w3id.org/ro/crate/1.1"},
        },
        root,
        LICENSES,
        {"@id": "#palio", "@type": "SoftwareApplication", "name": "Palio", "softwareVersion": __version__},
        *({"@id": team_id, "@type": "Organization", "name": team} for team, team_id in teams.items()),
        *datasets,
        *(_file(folder, path, digest) for path, digest in files.items()),
    ]
    write_json(folder / METADATA, {"@context": CONTEXT, "@graph": graph})


def changed_files(folder: Path) -> list[str]:
    """What is wrong with a release's files: each one missing, changed or not in its metadata.

    Raises:
        BadInput: the metadata is no RO-Crate.
    """
    try:
        graph = json.loads((folder / METADATA).read_text(encoding="utf-8"))["@graph"]
        recorded = {one["@id"]: one["sha256"] for one in graph if one.get("@type") == "File"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise BadInput(
            folder / METADATA, why="is no RO-Crate metadata", fix="get the release again"
        ) from None
    found = folder_sha256(folder)
    found.pop(METADATA, None)
    return file_differences(found, recorded, METADATA)


def _owner(path: str, competition: Competition) -> str:
    """The entry's folder that a file belongs to, or the root."""
    parts = path.split("/")
    entry = len(parts) > 3 and parts[0] == "results" and parts[1] in competition.tracks
    return "/".join(parts[:3]) + "/" if entry else "./"


def _entry(owner: str, inside: list[str], folder: Path, teams: dict[str, str]) -> dict[str, Any]:
    name = owner.split("/")[2]
    dataset: dict[str, Any] = {
        "@id": owner,
        "@type": "Dataset",
        "name": name,
        "hasPart": _references(inside),
    }
    try:
        team = load_entry(Project(folder).entry_file(name)).team
    except BadInput:  # the entry file was never valid: its team is not known
        return dataset
    dataset["creator"] = {"@id": teams.setdefault(team, f"#team-{len(teams) + 1}")}
    return dataset


def _references(ids: Iterable[str]) -> list[dict[str, str]] | dict[str, str]:
    """Return references to entities: a list, or, as RO-Crate asks, one without a list around it."""
    references = [{"@id": one} for one in ids]
    return references[0] if len(references) == 1 else references


def _file(folder: Path, path: str, digest: str) -> dict[str, Any]:
    return {
        "@id": path,
        "@type": "File",
        "name": path.rpartition("/")[2],
        "contentSize": str((folder / path).stat().st_size),
        "encodingFormat": FORMATS.get(Path(path).suffix, "text/plain"),
        "sha256": digest,
    }
