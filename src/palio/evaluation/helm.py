"""HELM 0.5.16 as a subprocess, and the files it leaves. Everything we know of HELM's inside stands here.

A stage is one `helm-run`. Each run entry carries its own `max_eval_instances` and the name of our
scenario as a HELM group, so every scenario has its own budget and each run says whose it is.

Layout of a HELM folder that this module makes:

    run_entries.conf   what we ask for
    config/            model_deployments.yaml, model_metadata.yaml, tokenizer_configs.yaml
    output/            HELM's own: scenarios/ (data), runs/stage/<run>/*.json
    helm.log           may show prompts: never copied anywhere
"""

from __future__ import annotations

import datetime
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from pyhocon import ConfigFactory

from palio.config import Competition, ScenarioRuns, StageRuns, expand
from palio.errors import BadInput, Crashed
from palio.provenance import canonical_json, fingerprint, write_text

MODEL = "palio/entry"
"""HELM's name for whatever is evaluated: the same for all entries, so run names are comparable."""
SUITE = "stage"
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
POLL_SECONDS = 0.5


def helm_version() -> str:
    return metadata.version("crfm-helm")


# --- what to run -----------------------------------------------------------------------------------


def run_entries(path: Path) -> list[tuple[str, str]]:
    """Description and group of the entries in a file of HELM's run-entries format, in its order.

    The group is the entry's first, or the description of an entry without `groups`: a group of its own.

    Raises:
        BadInput: no such file, not HOCON, no entries, or an entry that fixes what the stage decides.
    """
    try:
        parsed = ConfigFactory.parse_string(path.read_text(encoding="utf-8"))
        entries = [
            (description := str(entry["description"]), str((entry.get("groups", None) or [description])[0]))
            for entry in parsed["entries"]
        ]
    except FileNotFoundError:
        raise BadInput(path, "", None, "no such run-entries file; correct run_entries") from None
    except Exception as error:
        raise BadInput(path, "entries", None, f"not HELM's run-entries format ({error})") from None
    if not entries:
        raise BadInput(path, "entries", None, "is empty; add at least one run entry")
    for description, _ in entries:
        for key in ("model", "max_eval_instances"):
            if re.search(rf"[:,]{key}=", description):
                raise BadInput(path, "entries", description, f"drop {key}=, the stage sets it")
    return entries


def shares(total: int, parts: int) -> list[int]:
    """`total` in `parts` whole numbers that differ by at most 1, the larger ones spread evenly."""
    return [total * (part + 1) // parts - total * part // parts for part in range(parts)]


def budgets(groups: Sequence[str], questions: int) -> list[int]:
    """Questions of each run entry: even over the groups, and in a group even over its entries.

    The sum is `questions`; with fewer questions than entries some get none.
    """
    names = list(dict.fromkeys(groups))
    in_group = {
        name: iter(shares(share, groups.count(name)))
        for name, share in zip(names, shares(questions, len(names)), strict=True)
    }
    return [next(in_group[group]) for group in groups]


def stage_runs(competition: Competition, stage: str) -> StageRuns:
    """The slice of a competition that decides a stage's instances, run files read and digested."""
    return StageRuns(
        competition=competition.competition,
        stage="open" if stage == "open" else "closed",
        closed_store=competition.closed_store,
        scenarios={
            name: ScenarioRuns(
                run_entries=scenario.run_entries,
                max_eval_instances=scenario.max_eval_instances,
                questions=scenario.questions,
                sha256=fingerprint(run_entries(expand(scenario.run_entries))),
            )
            for name, scenario in competition.stage(stage).scenarios.items()
        },
    )


def stage_entries(runs: StageRuns) -> dict[str, list[str]]:
    """Scenario -> HELM run descriptions with the scenario's budget and our model: what decides a run.

    Raises:
        BadInput: a run file changed since `runs` was made.
    """
    entries: dict[str, list[str]] = {}
    for name, scenario in runs.scenarios.items():
        found = run_entries(expand(scenario.run_entries))
        if fingerprint(found) != scenario.sha256:
            raise BadInput(scenario.run_entries, "", None, "changed while the workflow ran; start it again")
        if scenario.questions:
            counts = budgets([group for _, group in found], scenario.questions)
        else:
            counts = [scenario.max_eval_instances or 0] * len(found)
        entries[name] = [
            f"{description}{',' if ':' in description else ':'}max_eval_instances={count},model={MODEL}"
            for (description, _), count in zip(found, counts, strict=True)
            if count
        ]
    return entries


def write_helm_folder(folder: Path, entries: Mapping[str, list[str]], *, base_url: str | None) -> None:
    """Run entries and model registration. Without `base_url` the model is HELM's own toy tokenizer,
    enough for a dry run that only makes the instances."""
    lines = [
        canonical_json({"description": description, "priority": 1, "groups": [GROUP_PREFIX + scenario]})
        for scenario, descriptions in entries.items()
        for description in descriptions
    ]
    write_text(folder / "run_entries.conf", "entries: [\n" + "\n".join(lines) + "\n]\n")
    at = {"base_url": base_url} if base_url else {}
    client = "http_model_client.HTTPModelClient" if base_url else "simple_client.SimpleClient"
    deployment = {
        "name": MODEL,
        "model_name": MODEL,
        "tokenizer_name": MODEL if base_url else "simple/tokenizer1",
        "max_sequence_length": CONTEXT_TOKENS,
        "client_spec": {"class_name": f"helm.clients.{client}", "args": at},
    }
    model = {
        "name": MODEL,
        "display_name": "entry",
        "description": "entry",
        "creator_organization_name": "team",
        "access": "open",
        "release_date": datetime.date(2023, 6, 1),
        "tags": ["TEXT_MODEL_TAG", "FULL_FUNCTIONALITY_TEXT_MODEL_TAG"],
    }
    tokenizer = {
        "name": MODEL,
        "tokenizer_spec": {
            "class_name": "helm.tokenizers.http_model_tokenizer.HTTPModelTokenizer",
            "args": at,
        },
        "end_of_text_token": "",
        "prefix_token": "",
    }
    config = folder / "config"
    write_text(config / "model_deployments.yaml", yaml.safe_dump({"model_deployments": [deployment]}))
    write_text(config / "model_metadata.yaml", yaml.safe_dump({"models": [model]}))
    write_text(config / "tokenizer_configs.yaml", yaml.safe_dump({"tokenizer_configs": [tokenizer]}))


# --- running ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HelmExit:
    """How a `helm-run` ended."""

    code: int | None
    """None: stopped by us at the time limit."""
    seconds: float


def run_helm(
    folder: Path,
    *,
    threads: int,
    time_limit: float | None = None,
    dry_run: bool = False,
    tick: Callable[[float], None] = lambda seconds: None,
) -> HelmExit:
    """Run `helm-run` on a folder of `write_helm_folder`; completed runs in it are kept and skipped.

    `time_limit` is in seconds of wall clock; at its end HELM's process group is killed. `tick` is
    called about twice a second with the seconds so far. The log is appended to folder/helm.log.
    """
    command = [
        str(Path(sys.executable).with_name("helm-run")),
        *("--conf-paths", str(folder / "run_entries.conf")),
        *("--local-path", str(folder / "config")),
        *("--output-path", str(folder / "output")),
        *("--suite", SUITE),
        *("--max-eval-instances", "1000000"),  # each run entry has its own
        *("--num-threads", str(threads)),
        "--disable-cache",  # its key leaves out whose model answered
        "--skip-completed-runs",
        *(["--dry-run"] if dry_run else []),
    ]
    started = time.monotonic()
    with (folder / "helm.log").open("ab") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
        )
        try:
            while (code := process.poll()) is None:
                seconds = time.monotonic() - started
                tick(seconds)
                if time_limit is not None and seconds >= time_limit:
                    return HelmExit(None, seconds)
                time.sleep(POLL_SECONDS)
            return HelmExit(code, time.monotonic() - started)
        finally:
            _kill_group(process)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def log_error(folder: Path, run: str | None = None) -> str:
    """The last line of the last traceback in HELM's log (of `run`, if named): class and message.

    May quote a prompt: callers of the closed stage keep `error_class` of it only.
    """
    log = folder / "helm.log"
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    if run is not None:
        text = text.rpartition(f"Error when running {run}:")[2]
        text = text.partition("Error when running ")[0]
    pattern = re.compile(r"^(?:\S+ \S+ \w+ +)?\s*((?:\w+\.)*\w*(?:Error|Exception|NotFound)\b.*)$", re.M)
    found = [line for line in pattern.findall(text) if not re.match(r"(\w+\.)*RunnerError|Error when", line)]
    return str(found[-1])[:300] if found else ""


def error_class(error: str) -> str:
    return error.partition(":")[0].rpartition(".")[2]


# --- reading ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunFolder:
    """One HELM run on disk."""

    path: Path
    spec: dict[str, Any]

    @property
    def name(self) -> str:
        """Without our settings: `mmlu:subject=anatomy`, not `…,max_eval_instances=5,model=…`."""
        name = re.sub(r"([:,])(max_eval_instances|model|groups)=[^,]*", r"\1", str(self.spec["name"]))
        return re.sub(r",+", ",", name).replace(":,", ":").rstrip(":,")

    @property
    def scenario(self) -> str:
        groups = [group for group in self.spec["groups"] if group.startswith(GROUP_PREFIX)]
        return str(groups[-1]).removeprefix(GROUP_PREFIX)

    @property
    def perturbed(self) -> bool:
        """Whether inputs were perturbed. HELM writes worst-case statistics even where none were."""
        return bool(self.spec["data_augmenter_spec"]["perturbation_specs"])

    @property
    def complete(self) -> bool:
        return all((self.path / name).exists() for name in RUN_FILES)

    def read(self, name: str) -> Any:
        return json.loads((self.path / name).read_text(encoding="utf-8"))


def run_folders(folder: Path) -> list[RunFolder]:
    """Every run that wrote its run spec, complete or not, by name."""
    specs = sorted((folder / "output" / "runs" / SUITE).glob("*/run_spec.json"))
    runs = [RunFolder(path.parent, json.loads(path.read_text(encoding="utf-8"))) for path in specs]
    return sorted(runs, key=lambda run: run.name)


def statistics(run: RunFolder) -> Iterator[dict[str, Any]]:
    """metric, split, perturbation, value of every aggregate of a complete run.

    Aggregates over perturbations (`computed_on: worst`) are kept only if the inputs were perturbed:
    otherwise HELM repeats the plain value under their name.
    """
    for stat in run.read("stats.json"):
        name = stat["name"]
        key = _perturbation(run, name.get("perturbation"))
        if key is not False:
            yield {
                "metric": name["name"],
                "split": name.get("split") or "",
                "perturbation": key,
                "value": stat.get("mean"),
            }


def instance_statistics(run: RunFolder) -> Iterator[dict[str, Any]]:
    """instance, metric, split, perturbation, value per evaluation instance of a complete run."""
    for row in run.read("per_instance_stats.json"):
        key = _perturbation(run, row.get("perturbation"))
        if key is False:
            continue
        for stat in row["stats"]:
            name = stat["name"]
            own = _perturbation(run, name.get("perturbation")) if name.get("perturbation") else key
            if own is not False:
                yield {
                    "instance": str(row["instance_id"]),
                    "metric": name["name"],
                    "split": name.get("split") or "",
                    "perturbation": own,
                    "value": stat.get("mean"),
                }


def _perturbation(run: RunFolder, perturbation: dict[str, Any] | None) -> str | bool | None:
    """Name of a perturbation, None for the plain input, False if the statistic is not to be believed."""
    if not perturbation:
        return None
    if not run.perturbed:
        return False
    name = str(perturbation["name"])
    computed_on = perturbation.get("computed_on", "perturbed")
    return name if computed_on in ("perturbed", "worst") else f"{name}:{computed_on}"


@dataclass(frozen=True)
class RunPlan:
    """What a run has to answer, read from HELM's dry run."""

    scenario: str
    run: str
    instances: tuple[tuple[str, str, str], ...]
    """id, input text, correct references joined by newlines; one per evaluation instance."""
    requests: int


def plan_stage(folder: Path, stage_name: str, entries: Mapping[str, list[str]]) -> list[RunPlan]:
    """Let HELM make every evaluation instance of a stage without asking a model.

    Raises:
        BadInput: HELM does not know a run entry or cannot make its instances.
    """
    write_helm_folder(folder, entries, base_url=None)
    ended = run_helm(folder, threads=1, dry_run=True)
    if ended.code != 0:
        error = log_error(folder)
        unknown = re.search(r"Unknown run spec name: (\S+)", error)
        where = f"stages.{stage_name}.scenarios"
        if unknown:
            raise BadInput(where, "run_entries", unknown[1], f"HELM {helm_version()} has no such scenario")
        shown = error if stage_name == "open" else error_class(error)
        raise BadInput(where, "", None, f"HELM cannot make the instances ({shown}); see {folder}/helm.log")
    plans = []
    for run in run_folders(folder):
        states = run.read("scenario_state.json")["request_states"]
        instances = {}
        for state in states:
            instance = state["instance"]
            references = [
                reference["output"]["text"]
                for reference in instance["references"]
                if "correct" in reference["tags"]
            ]
            if not instance.get("perturbation"):
                instances[instance["id"]] = (instance["id"], instance["input"]["text"], "\n".join(references))
        plans.append(RunPlan(run.scenario, run.name, tuple(instances.values()), len(states)))
    planned = {plan.scenario for plan in plans}
    empty = [name for name in entries if name not in planned]
    if empty:
        raise Crashed(f"HELM planned no run for {', '.join(empty)}; see {folder}/helm.log")
    return plans
