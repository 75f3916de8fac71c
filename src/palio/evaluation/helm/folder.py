"""HELM 0.5.16 as a subprocess, and the files it leaves. Everything we know of HELM's inside stands here.

A stage is one `helm-run`. Each run entry carries its own `max_eval_instances` and the name of our
scenario as a HELM group, so every scenario has its own budget and each run says whose it is.

Layout of a HELM folder that this module makes:

    run_entries.conf   what we ask for
    config/            model_deployments.yaml, model_metadata.yaml, tokenizer_configs.yaml
    output/            HELM's own: scenarios/ (data), runs/stage/<run>/*.json
    answers.jsonl      the client's journal, see `palio.evaluation.client`
    helm.log           may show prompts: never copied anywhere
"""

from __future__ import annotations

import datetime
import difflib
import functools
import importlib.util
import json
import math
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
from typing import Any, Literal

import yaml
from pyhocon import ConfigFactory

from palio.config import STAGES, Competition, Scenario, ScenarioRuns, StageRuns, expand
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
RUNTIME = "_runtime"
WORST_CASES = ("robustness", "fairness")
POLL_SECONDS = 0.5
JOURNAL = "answers.jsonl"
DATA_FOLDERS = ("scenarios", "perturbations")
"""HELM's caches of what it downloads, below its output folder."""
LIMIT = "the stage's limit ran out"
BROKEN = "connection broken"
"""Begins of a request's error, written by the client, that say more than that one request failed."""
NETWORK_ERRORS = re.compile("URLError|ConnectionError|OfflineModeIsEnabled|LocalEntryNotFound|Max retries")
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def helm_version() -> str:
    return metadata.version("crfm-helm")


# --- what to run -----------------------------------------------------------------------------------


@functools.cache
def known_run_specs() -> frozenset[str]:
    """Names that a run entry may begin with: HELM's and those of installed plug-ins.

    Read from the sources: importing HELM's registry takes seconds, and every start of the workflow asks.
    """
    helm = importlib.util.find_spec("helm")
    folders = [Path(one) for one in (helm.submodule_search_locations or ())] if helm else []
    sources = [path for folder in folders for path in folder.glob("benchmark/run_specs/**/*.py")]
    for plug_in in metadata.entry_points(group="helm"):
        found = importlib.util.find_spec(plug_in.module)
        sources += [Path(found.origin)] if found and found.origin else []
    pattern = re.compile(r"""@run_spec_function\(\s*["'](\w+)""")
    return frozenset(name for path in sources for name in pattern.findall(path.read_text(encoding="utf-8")))


@functools.cache
def metric_directions() -> dict[str, bool]:
    """Whether higher is better, by the name of each metric on whose direction HELM's schemas agree."""
    helm = importlib.util.find_spec("helm")
    folders = [Path(one) for one in (helm.submodule_search_locations or ())] if helm else []
    found: dict[str, set[bool]] = {}
    line = re.compile(r"^\s*(?:- name: (\S+)|lower_is_better: (true|false))", re.MULTILINE)
    for path in (path for folder in folders for path in folder.glob("benchmark/static/schema_*.yaml")):
        name = ""
        for named, lower in line.findall(path.read_text(encoding="utf-8")):
            if named:
                name = named
            else:
                found.setdefault(name, set()).add(lower == "false")
    return {name: directions.pop() for name, directions in found.items() if len(directions) == 1}


def check_directions(competition: Competition, file: str) -> None:
    """Hold every metric's `higher_is_better` against HELM's schemas.

    Raises:
        BadInput: it contradicts HELM, or neither HELM nor the config says.
    """
    for stage in STAGES:
        for name, scenario in competition.stage(stage).scenarios.items():
            for title, metric in scenario.metrics.items():
                key = f"stages.{stage}.scenarios.{name}.metrics.{title}.higher_is_better"
                known = metric_directions().get(metric.metric)
                if known is None and "higher_is_better" not in metric.model_fields_set:
                    fix = f"HELM does not say which way {metric.metric} is better; write true or false"
                    raise BadInput(file, key, None, fix)
                if known is not None and known != metric.higher_is_better:
                    fix = f"HELM says of {metric.metric} that {'higher' if known else 'lower'} is better"
                    raise BadInput(file, key, metric.higher_is_better, f"{fix}; write {str(known).lower()}")


def run_entries(path: Path) -> list[tuple[str, str]]:
    """Description and group of the entries in a file of HELM's run-entries format, in its order.

    The group is the entry's first, or the description of an entry without `groups`: a group of its own.

    Raises:
        BadInput: no such file, not HOCON, no entries, an entry that fixes what the stage decides, or one
            that HELM does not know.
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
        name = description.partition(":")[0]
        if name not in known_run_specs():
            near = difflib.get_close_matches(name, known_run_specs(), 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise BadInput(path, "entries", name, f"HELM {helm_version()} has no such scenario{hint}")
        for key in ("model", "max_eval_instances", "eval_split"):
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
    """The slice of a competition that decides a stage's instances: run files digested, budgets scaled."""
    settings = competition.stage(stage)

    def scaled(budget: int | None) -> int | None:
        return None if budget is None else max(1, round(budget * settings.scale))

    return StageRuns(
        competition=competition.competition,
        stage="open" if stage == "open" else "closed",
        closed_store=competition.closed_store,
        scenarios={
            name: ScenarioRuns(
                run_entries=scenario.run_entries,
                max_eval_instances=scaled(scenario.max_eval_instances),
                questions=scaled(scenario.questions),
                split=_scored_split(scenario),
                sha256=fingerprint(run_entries(expand(scenario.run_entries))),
            )
            for name, scenario in settings.scenarios.items()
        },
    )


def _scored_split(scenario: Scenario) -> Literal["test", "valid"] | None:
    """HELM draws questions from both splits, and a metric looks at one: half of BIG-bench's questions were
    asked for nothing in 2023, and a run of few questions may have none that counts."""
    splits = {metric.split for metric in scenario.metrics.values()}
    return splits.pop() if len(splits) == 1 else None


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
        ours = f"eval_split={scenario.split},model={MODEL}" if scenario.split else f"model={MODEL}"
        entries[name] = [
            f"{description}{',' if ':' in description else ':'}max_eval_instances={count},{ours}"
            for (description, _), count in zip(found, counts, strict=True)
            if count
        ]
    return entries


@dataclass(frozen=True)
class Asking:
    """How HELM's requests reach an entry's server."""

    base_url: str
    cut_at_stop_sequences: bool
    deadline: float
    """Seconds since the epoch."""


def write_helm_folder(
    folder: Path, entries: Mapping[str, list[str]], data: Path, asking: Asking | None = None
) -> None:
    """Run entries, model registration, and links to the scenarios' data in the folder `data`.

    Without `asking` the model is HELM's own toy, enough for a dry run that only makes the instances.
    """
    lines = [
        canonical_json({"description": description, "priority": 1, "groups": [GROUP_PREFIX + scenario]})
        for scenario, descriptions in entries.items()
        for description in descriptions
    ]
    write_text(folder / "run_entries.conf", "entries: [\n" + "\n".join(lines) + "\n]\n")
    for name in DATA_FOLDERS:
        (data / name).mkdir(parents=True, exist_ok=True)
        link = folder / "output" / name
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to((data / name).resolve(), target_is_directory=True)
    client = {"class_name": "helm.clients.simple_client.SimpleClient", "args": {}}
    if asking:
        client = {
            "class_name": "palio.evaluation.client.EntryClient",
            "args": {
                "base_url": asking.base_url,
                "journal": str((folder / JOURNAL).resolve()),
                "cut": asking.cut_at_stop_sequences,
                "deadline": asking.deadline,
            },
        }
    deployment = {
        "name": MODEL,
        "model_name": MODEL,
        "tokenizer_name": MODEL if asking else "simple/tokenizer1",
        # A dry run shows nobody its prompts. HELM would shorten one by a character at a time, and count its
        # toy's tokens, which are characters, again each time: minutes for texts of a page.
        "max_sequence_length": CONTEXT_TOKENS if asking else sys.maxsize,
        "client_spec": client,
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
            "args": {"base_url": asking.base_url} if asking else {},
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
    """None: stopped by us."""
    seconds: float


def run_helm(
    folder: Path,
    *,
    threads: int,
    time_limit: float | None = None,
    dry_run: bool = False,
    offline: bool = False,
    tick: Callable[[float], bool] = lambda seconds: True,
) -> HelmExit:
    """Run `helm-run` on a folder of `write_helm_folder`; completed runs in it are kept and skipped.

    HELM's process group is killed after `time_limit` seconds of wall clock, or when `tick`, which is
    called about twice a second with the seconds so far, says False. The log is appended to folder/helm.log.
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
    environment = os.environ | nltk_environment() | (OFFLINE if offline else {})
    started = time.monotonic()
    with (folder / "helm.log").open("ab") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env=environment,
        )
        try:
            while (code := process.poll()) is None:
                seconds = time.monotonic() - started
                if not tick(seconds) or (time_limit is not None and seconds >= time_limit):
                    return HelmExit(None, seconds)
                time.sleep(POLL_SECONDS)
            return HelmExit(code, time.monotonic() - started)
        finally:
            _kill_group(process)


def nltk_environment() -> dict[str, str]:
    """NLTK_DATA with the tokenizer punkt_tab, which a package ships; empty if it is not installed."""
    found = importlib.util.find_spec("llama_index")
    folders = [
        Path(folder) / "core" / "_static" / "nltk_cache"
        for folder in (found.submodule_search_locations or [] if found else [])
    ]
    there = [str(folder) for folder in folders if folder.is_dir()]
    given = os.environ.get("NLTK_DATA")
    return {"NLTK_DATA": os.pathsep.join([*([given] if given else []), *there])} if there else {}


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def log_error(folder: Path, run: str | None = None) -> str:
    """The last line of the last traceback in HELM's log (of `run`, if named): class and message.

    May quote a prompt: callers of the closed stage keep `error_class` of it only.
    """
    pattern = re.compile(r"^(?:\S+ \S+ \w+ +)?\s*((?:\w+\.)*\w*(?:Error|Exception|NotFound)\b.*)$", re.M)
    for name, text in reversed(_failures(folder)):
        if run in (None, name):
            found = [line for line in pattern.findall(text) if not re.match(r"(\w+\.)*RunnerError", line)]
            if found:
                return str(found[-1])[:300]
    return ""


def _failures(folder: Path) -> list[tuple[str, str]]:
    """Plain name of a run that failed ("" for HELM itself) and the log from there to the next failure."""
    log = folder / "helm.log"
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    before, *parts = re.split(r"Error when running (\S+):\n", text)
    return [
        ("", before),
        *((plain_name(name), after) for name, after in zip(*[iter(parts)] * 2, strict=True)),
    ]


def asks_for_download(folder: Path) -> str:
    """The run whose data HELM could not download, and the part of HELM that wanted it."""
    run, text = _failures(folder)[-1]
    part = re.findall(r"benchmark/(?:scenarios|augmentations)/(\w+)\.py", text)
    return f"{run} ({part[-1]})" if part else run


def error_class(error: str) -> str:
    return error.partition(":")[0].rpartition(".")[2]


# --- reading ---------------------------------------------------------------------------------------


def plain_name(name: str) -> str:
    """A run's name without our settings: `mmlu:subject=anatomy`, not `…,max_eval_instances=5,model=…`."""
    name = re.sub(r"([:,])(max_eval_instances|eval_split|model|groups)=[^,]*", r"\1", name)
    return re.sub(r",+", ",", name).replace(":,", ":").rstrip(":,")


@dataclass(frozen=True)
class RunFolder:
    """One HELM run on disk."""

    path: Path
    spec: dict[str, Any]

    @property
    def name(self) -> str:
        return plain_name(str(self.spec["name"]))

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

    def unanswered(self) -> dict[str, str]:
        """Why, by id, of the instances of a complete run for which a request got no answer."""
        return {
            str(state["instance"]["id"]): str(state["result"].get("error", ""))
            for state in self.read("scenario_state.json")["request_states"]
            if not state["result"]["success"]
        }


def run_folders(folder: Path) -> list[RunFolder]:
    """Every run that wrote its run spec, complete or not, by name."""
    specs = sorted((folder / "output" / "runs" / SUITE).glob("*/run_spec.json"))
    runs = [RunFolder(path.parent, json.loads(path.read_text(encoding="utf-8"))) for path in specs]
    return sorted(runs, key=lambda run: run.name)


def statistics(run: RunFolder) -> Iterator[dict[str, Any]]:
    """metric, split, perturbation, value of every aggregate of a complete run.

    Aggregates over perturbations (`computed_on: worst`) are kept only if the inputs were perturbed:
    otherwise HELM repeats the plain value under their name. Measured times are left out: they are not the
    same twice.
    """
    for stat in run.read("stats.json"):
        name = stat["name"]
        key = _perturbation(run, name.get("perturbation"))
        if key is not False and not name["name"].endswith(RUNTIME):
            yield {
                "metric": name["name"],
                "split": name.get("split") or "",
                "perturbation": key,
                "value": _finite(stat.get("mean")),
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
            if own is not False and not name["name"].endswith(RUNTIME):
                yield {
                    "instance": str(row["instance_id"]),
                    "metric": name["name"],
                    "split": name.get("split") or "",
                    "perturbation": own,
                    "value": _finite(stat.get("mean")),
                }


def _finite(value: float | None) -> float | None:
    """None for the infinities and NaN that a server's log-probabilities bring into a mean."""
    return value if value is not None and math.isfinite(value) else None


def _perturbation(run: RunFolder, perturbation: dict[str, Any] | None) -> str | bool | None:
    """Name of a perturbation, None for the plain input, False if the statistic is not to be believed.

    `robustness` and `fairness` are the worst case over their perturbations and the plain input. A single
    perturbation has its bare name, and `<name>:worst` with the plain input, `<name>:original` without it.
    """
    if not perturbation:
        return None
    if not run.perturbed:
        return False
    name = str(perturbation["name"])
    computed_on = perturbation.get("computed_on", "perturbed")
    return name if computed_on == "perturbed" or name in WORST_CASES else f"{name}:{computed_on}"


@dataclass(frozen=True)
class RunPlan:
    """What a run has to answer, read from HELM's dry run."""

    scenario: str
    run: str
    instances: tuple[tuple[str, str, str], ...]
    """id, input text, correct references joined by newlines; one per evaluation instance."""
    requests: int


def plan_stage(
    folder: Path, stage_name: str, entries: Mapping[str, list[str]], data: Path, *, offline: bool = False
) -> list[RunPlan]:
    """Let HELM make every evaluation instance of a stage without asking a model.

    Data that is not in the folder `data` is downloaded, unless `offline`.

    Raises:
        BadInput: HELM does not know a run entry or cannot make its instances.
    """
    write_helm_folder(folder, entries, data)
    ended = run_helm(folder, threads=1, dry_run=True, offline=offline)
    if ended.code != 0:
        error = log_error(folder)
        where = f"stages.{stage_name}.scenarios"
        if NETWORK_ERRORS.search(error):
            fix = (
                f"its data is not in {data} and cannot be downloaded here; run `palio fetch-data --stage"
                f" {stage_name}` where there is a network, or with --source and a folder of the files"
            )
            raise BadInput(where, asks_for_download(folder), None, fix)
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
    for plan in plans:
        if not plan.instances:
            fix = "has no question in the split that its metrics look at; correct split or drop the run entry"
            raise BadInput(f"stages.{stage_name}.scenarios.{plan.scenario}", plan.run, None, fix)
    if empty:
        raise Crashed(f"HELM planned no run for {', '.join(empty)}; see {folder}/helm.log")
    return plans
