"""The folder of one `helm-run`: the files we write for it, and the run folders that it writes.

run_entries.conf   what we ask for
config/            model_deployments.yaml, model_metadata.yaml, tokenizer_configs.yaml, window.json
output/            HELM's own: scenarios/ and perturbations/ (data), runs/stage/<run>/*.json
answers.jsonl      the client's journal, see `palio.evaluation.journal`
helm.log           may show prompts: never copied anywhere
"""

from __future__ import annotations

import datetime
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from palio.evaluation.window import Window
from palio.layout import EntryFolder, HelmFolder, Stage
from palio.provenance import canonical_json, fingerprint, write_text

MODEL = "palio/entry"
"""HELM's name for whatever is evaluated: the same for all entries, so run names are comparable."""
SUITE = HelmFolder.runs.name.rpartition("/")[2]
GROUP_PREFIX = "palio_"
CONTEXT_TOKENS = 2048
"""Prompt and completion together, the competition's rule and HELM's default for HTTP models."""
RUN_FILES = (
    "run_spec.json",
    "scenario.json",
    "scenario_state.json",
    "stats.json",
    "per_instance_stats.json",
)
"""A HELM run is complete when all of these exist."""
DATA_FOLDERS = ("scenarios", "perturbations")
"""HELM's caches of what it downloads, below its output folder."""


# --- what we write ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class RequestSettings:
    """How HELM's requests reach an entry's server."""

    base_url: str
    cut_at_stop_sequences: bool
    deadline: float
    """Seconds since the epoch."""
    window: Window
    """Counts tokens of prompts."""
    context: int = CONTEXT_TOKENS
    """Tokens of prompt and completion together: HELM shows fewer examples where they do not fit."""


def write_helm_folder(
    folder: HelmFolder, entries: Mapping[str, list[str]], data: Path, requests: RequestSettings | None = None
) -> None:
    """Write run entries, our model's registration, and links to the scenarios' data in the folder `data`.

    Without `requests` the model is HELM's own toy, enough for a dry run that only makes the instances.
    """
    lines = [
        canonical_json({"description": description, "priority": 1, "groups": [GROUP_PREFIX + scenario]})
        for scenario, descriptions in entries.items()
        for description in descriptions
    ]
    write_text(folder.run_entries, "entries: [\n" + "\n".join(lines) + "\n]\n")
    for name in DATA_FOLDERS:
        (data / name).mkdir(parents=True, exist_ok=True)
        link = folder.output / name
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to((data / name).resolve(), target_is_directory=True)
    config = folder.config
    deployment = _toy_deployment() if requests is None else _deployment(requests, folder.journal)
    write_text(config / "model_deployments.yaml", yaml.safe_dump({"model_deployments": [deployment]}))
    write_text(config / "model_metadata.yaml", yaml.safe_dump({"models": [_model()]}))
    if requests is not None:
        requests.window.write(folder.window)
    tokenizer = _tokenizer(folder.window)
    write_text(config / "tokenizer_configs.yaml", yaml.safe_dump({"tokenizer_configs": [tokenizer]}))


def _deployment(requests: RequestSettings, journal: Path) -> dict[str, Any]:
    arguments = {
        "base_url": requests.base_url,
        "journal": str(journal.resolve()),
        "cut": requests.cut_at_stop_sequences,
        "deadline": requests.deadline,
    }
    return {
        "name": MODEL,
        "model_name": MODEL,
        "tokenizer_name": MODEL,
        "max_sequence_length": requests.context,
        "client_spec": {"class_name": "palio.evaluation.client.EntryClient", "args": arguments},
    }


def _toy_deployment() -> dict[str, Any]:
    return {
        "name": MODEL,
        "model_name": MODEL,
        "tokenizer_name": "simple/tokenizer1",
        # A dry run shows nobody its prompts. HELM would shorten one by a character at a time, and count its
        # toy's tokens, which are characters, again each time: minutes for texts of a page.
        "max_sequence_length": sys.maxsize,
        "client_spec": {"class_name": "helm.clients.simple_client.SimpleClient", "args": {}},
    }


def _model() -> dict[str, Any]:
    return {
        "name": MODEL,
        "display_name": "entry",
        "description": "entry",
        "creator_organization_name": "team",
        "access": "open",
        "release_date": datetime.date(2023, 6, 1),
        "tags": ["TEXT_MODEL_TAG", "FULL_FUNCTIONALITY_TEXT_MODEL_TAG"],
    }


def _tokenizer(definition: Path) -> dict[str, Any]:
    return {
        "name": MODEL,
        "tokenizer_spec": {
            "class_name": "palio.evaluation.client.EntryTokenizer",
            "args": {"path": str(definition.resolve())},
        },
        "end_of_text_token": "",
        "prefix_token": "",
    }


def package_folder(
    folder: EntryFolder,
    stage: Stage,
    package_fingerprint: str,
    base_model_fingerprint: str,
    engine: str,
    instances_sha256: str,
    helm_version: str,
    cut_at_stop_sequences: bool,
) -> HelmFolder:
    """Return where the answers of a package lie, as one engine serves it, to the questions of a stage."""
    served = [package_fingerprint, base_model_fingerprint, engine]
    asked = [instances_sha256, helm_version, cut_at_stop_sequences]
    return folder.helm(stage, fingerprint([*served, *asked])[:16])


# --- what HELM writes ------------------------------------------------------------------------------


def plain_name(name: str) -> str:
    """A run's name without our settings: `mmlu:subject=anatomy`, not `…,max_eval_instances=5,model=…`."""
    name = re.sub(r"([:,])(max_eval_instances|eval_split|model|groups)=[^,]*", r"\1", name)
    return re.sub(r",+", ",", name).replace(":,", ":").rstrip(":,")


@dataclass(frozen=True)
class RunFolder:
    """One HELM run on disk."""

    path: Path
    spec: dict[str, Any]
    """Content of run_spec.json, HELM's `RunSpec`."""

    @property
    def name(self) -> str:
        return plain_name(str(self.spec["name"]))

    @property
    def scenario(self) -> str:
        groups = [group for group in self.spec["groups"] if group.startswith(GROUP_PREFIX)]
        return str(groups[-1]).removeprefix(GROUP_PREFIX)

    @property
    def perturbed(self) -> bool:
        """True if inputs were perturbed. HELM writes worst-case statistics even where none were."""
        return bool(self.spec["data_augmenter_spec"]["perturbation_specs"])

    @property
    def complete(self) -> bool:
        return all((self.path / name).exists() for name in RUN_FILES)

    def read(self, name: str) -> Any:
        """Content of one of RUN_FILES."""
        return json.loads((self.path / name).read_text(encoding="utf-8"))

    def unanswered(self) -> dict[str, str]:
        """Reason by id of every instance of a complete run for which a request got no answer."""
        return {
            str(state["instance"]["id"]): str(state["result"].get("error", ""))
            for state in self.read("scenario_state.json")["request_states"]
            if not state["result"]["success"]
        }


def run_folders(folder: HelmFolder) -> list[RunFolder]:
    """Every run that wrote its run spec, complete or not, by name."""
    specs = sorted(folder.runs.glob("*/run_spec.json"))
    runs = [RunFolder(path.parent, json.loads(path.read_text(encoding="utf-8"))) for path in specs]
    return sorted(runs, key=lambda run: run.name)
