"""`palio new`: an entry file that works, and what it needs beside it.

<id>.yaml                          the entry, commented
resources/teams/<id>/*.jsonl       example data, unless sources are given
resources/teams/<id>/program/      a program to start from (kinds command and server without a Dockerfile)
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from palio.config import DOCKERFILES, ID_PATTERN, Competition, RuleSet, load_rules
from palio.demo.data import GENERATOR, LICENCE, write_demo_sources
from palio.eligibility.check import first_match
from palio.errors import BadInput
from palio.layout import EXAMPLES, Resources, schema_file
from palio.provenance import write_text

PROGRAMS = {
    "command": EXAMPLES / "peft_script",
    "server": EXAMPLES / "server",
}
"""The programs that a new entry of each kind starts from."""

HEAD = """\
# yaml-language-server: $schema={schema}
# {title}. Check it: palio check {path}{options}
# Rehearse it at reduced scale on this machine: palio try {path}{options}
team: {team}
track: {track}
kind: {kind}
title: {title}
base_model:
  {base_model}
"""
DATASET = """\
dataset:
  sources:
{sources}
  operations:             # in this order; config/README.md has all of them
    - op: clean_markup
    - op: drop_refusals
    - op: drop_disagreement
    - op: drop_exact_duplicates
  seed: 1
"""
PARTS = {
    "recipe": DATASET
    + """\
finetune:
  method: lora            # lora, qlora, full
  learning_rate: 1e-3
  epochs: 1
  batch_size: 8
  lora_r: 16
  lora_alpha: 32
  seed: 1
""",
    "command": DATASET
    + """\
command:                  # the contract: docs/command_entries.md
  files: {program}
  run: [python, train.py, --max-steps, "40"]
""",
    "server": """\
server:                   # the contract: docs/server_entries.md
  files: {program}
  run: python -m uvicorn main:app --host 127.0.0.1 --port $PORT
""",
}
FROM_DOCKERFILE = """\
server:                   # the contract: docs/server_entries.md; from 2023: docs/from_2023.md
  dockerfile: {program}   # built by the organizers; its CMD starts on the port that it exposes
"""


def new_entry(
    competition: Competition,
    *,
    path: Path,
    kind: str,
    team: str,
    track: str,
    base_model: str,
    data: Sequence[str] = (),
    licence: str = "",
    url: str = "",
    dockerfile: str | None = None,
    options: str = "",
) -> None:
    """Write the entry to `path`, and what it needs beside it.

    Args:
        dockerfile: for kind `server`, the team's folder with a Dockerfile.
        base_model: `hub:org/name@<commit>`, `path:folder` or `gguf:package/file`.
        data: source files; omit for example data, where the rules approve it.
        licence, url: of the source files.
        options: what the commands in its comments need besides the file.

    Raises:
        BadInput: the name is taken or is not an id, or a value does not fit the competition.
    """
    if not ID_PATTERN.fullmatch(path.stem) or path.suffix != ".yaml":
        raise BadInput(path, fix="name it <id>.yaml, the id of letters, digits, - and _")
    if path.exists():
        raise BadInput(path, why="already exists", fix="choose another name")
    if track not in competition.tracks:
        raise BadInput("palio new", "--track", track, fix=f"use one of {', '.join(competition.tracks)}")
    source_kind, separator, address = base_model.partition(":")
    if not separator or source_kind not in ("hub", "path", "gguf"):
        raise BadInput(
            "palio new", "--base-model", base_model, fix="write hub:org/name@<commit>, path:… or gguf:…"
        )
    rules = load_rules(Path(competition.rules))
    own, program = Resources().teams / path.stem, Resources().team_program(path.stem)
    sources = ""
    if kind != "server":
        sources = _sources(own, data, licence, url, rules)
    part = PARTS[kind]
    if dockerfile is not None:
        part, program = FROM_DOCKERFILE, _folder_with_dockerfile(dockerfile, kind)
    elif kind in PROGRAMS:
        shutil.copytree(
            PROGRAMS[kind], program, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    text = (HEAD + part).format(
        schema=os.path.relpath(schema_file("entry"), path.parent),
        title=f"{team}'s entry",
        path=path,
        options=options,
        team=team,
        track=track,
        kind=kind,
        base_model=f"{source_kind}: {address}",
        sources=sources,
        program=program,
    )
    write_text(path, text)


def _folder_with_dockerfile(dockerfile: str, kind: str) -> Path:
    folder = Path(dockerfile)
    if kind != "server":
        fix = "say --kind server"
        raise BadInput("palio new", "--dockerfile", dockerfile, why=f"is not for kind {kind}", fix=fix)
    if not any((folder / name).is_file() for name in DOCKERFILES):
        fix = "give the folder that has one"
        raise BadInput("palio new", "--dockerfile", dockerfile, why="has no Dockerfile", fix=fix)
    return folder


def suggested_base_model(competition: Competition) -> str:
    """Return the first base model that the rules name in full."""
    rules = load_rules(Path(competition.rules))
    named = [source for model in rules.base_models for source in model.sources if "*" not in source]
    return next((source for source in named if not source.startswith("hub:")), named[0] if named else "")


def takes_example_data(rules: RuleSet) -> bool:
    """Return whether entries may be trained on the demo's data."""
    return first_match(rules.approved_generators, GENERATOR) is not None


def _sources(own: Path, data: Sequence[str], licence: str, url: str, rules: RuleSet) -> str:
    """The lines of `dataset.sources`."""
    if data:
        if licence not in rules.data_licences:
            fix = f"use data under one of {', '.join(rules.data_licences)}"
            raise BadInput("palio new", "--licence", licence, fix=fix)
        where = f", url: {url}" if url else ""
        return "\n".join(f"    - {{path: {path}, licence: {licence}{where}}}" for path in data)
    if not takes_example_data(rules):
        why, fix = "is missing: the rules approve no example data", "give files of your own"
        raise BadInput("palio new", "--data", why=why, fix=fix)
    write_demo_sources(own, seed=1)
    made = sorted(own.glob("*.jsonl"))
    origin = f"licence: {LICENCE}, generator: {GENERATOR}"
    return "\n".join(f"    - {{path: {path}, {origin}}}  # an example" for path in made)
