"""A stage before any entry runs: its evaluation instances, made once by HELM.

This is where an unknown scenario, a missing data file or a typo in a run-entries file shows, before
any GPU time is spent. The instances' texts go to the stage's store, for decontamination and the
contamination report; the record that leaves it holds counts and a digest.

A stage's store: open under resources/, closed under the competition's `closed_store`, mode 0700.

    <store>/runs.json          what the runs of a stage are, for `evaluate` (ids only)
    <store>/instances.parquet  scenario, run, instance, text, reference
    <store>/prompts.parquet    every request: scenario, run, instance, variant, prompt, examples
    <store>/helm/              HELM's dry run
    <store>/data/              scenarios/ and perturbations/ as HELM caches them, for all entries
    <store>/data.json          sha256 of every file in data/, written by `fetch_data`
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from palio.config import expand
from palio.errors import BadInput
from palio.evaluation.data import LEFT_OUT, DataError
from palio.evaluation.helm import (
    distinct,
    helm_version,
    plan_stage,
    planned_prompts,
    printed,
    scenario_counts,
    stage_entries,
)
from palio.evaluation.probe import Asked
from palio.layout import StageStore
from palio.provenance import atomic_path, fingerprint, folder_sha256, write_json
from palio.records import ScenarioCounts, StageInstances
from palio.settings import StageLimits, StageRuns

if TYPE_CHECKING:
    from palio.evaluation.datasets import Need
    from palio.evaluation.helm.plan import RunPlan

INSTANCE_TEXTS = pa.schema(
    [
        pa.field(name, pa.string(), nullable=False)
        for name in ("scenario", "run", "instance", "text", "reference")
    ]
)


PROMPT_TEXTS = pa.schema(
    [
        *(
            pa.field(name, pa.string(), nullable=False)
            for name in ("scenario", "run", "instance", "variant", "prompt")
        ),
        pa.field("examples", pa.int32(), nullable=False),
    ]
)
PromptKey = tuple[str, str, str]
"""run, instance, variant"""
ENOUGH = 0.9
"""Share of a scenario's questions below which the stage is refused, unless the config accepts it."""


def prepare_stage(runs: StageRuns, out: Path) -> StageInstances:
    """Make the instances of a stage, write them to its store and their record to `out`.

    With data from `fetch_data` no network is needed, nor used. Without, data is brought first.

    Raises:
        BadInput: HELM does not know a run entry, or cannot make its instances (data missing or changed); a
            scenario has too few questions or no examples; or others can read what is closed.
    """
    store = runs.store
    make_store(runs)
    entries = stage_entries(runs)
    fetched = store.data_digests.exists()
    if fetched:
        verify_data(store)
    else:
        _bring_data(runs, entries, None)
    # A folder per content: runs of an earlier plan must not be taken for this one's.
    folder = store.dry_run(fingerprint(entries)[:16])
    folder.path.mkdir(parents=True, exist_ok=True)
    plans = plan_stage(folder, runs.stage, entries, store.data, offline=fetched)
    if not fetched:
        _seal_data(runs)
    counts = scenario_counts(plans)
    _refuse_shortfalls(runs, counts)
    rows = [
        {"scenario": plan.scenario, "run": plan.run, "instance": i, "text": text, "reference": reference}
        for plan in plans
        for i, text, reference in plan.instances
    ]
    _write_plan(store, entries, plans, rows)
    _close_store(runs)
    record = StageInstances(
        competition=runs.competition,
        stage=runs.stage,
        helm_version=helm_version(),
        scenarios={name: of.prepared for name, of in counts.items()},
        counts=counts,
        left_out=printed(folder, LEFT_OUT),
        sha256=fingerprint([entries, rows]),
        made=runs.made,
    )
    record.write(out)
    return record


def _write_plan(
    store: StageStore, entries: Mapping[str, Any], plans: Sequence[RunPlan], rows: list[dict[str, str]]
) -> None:
    """Write what the stage's runs are and ask, and the texts of their instances, to the store."""
    for path, table in (
        (store.instances, pa.Table.from_pylist(rows, schema=INSTANCE_TEXTS)),
        (store.prompts, pa.Table.from_pylist(list(planned_prompts(plans)), schema=PROMPT_TEXTS)),
    ):
        with atomic_path(path) as temporary:
            pq.write_table(table, temporary)
    planned = [PlannedRun(plan.scenario, plan.run, len(plan.instances), plan.requests) for plan in plans]
    kinds = distinct({"prompt": "", **kind} for plan in plans for kind in plan.kinds)
    write_json(store.runs, {"entries": entries, "runs": [asdict(run) for run in planned], "kinds": kinds})


def _refuse_shortfalls(runs: StageRuns, counts: Mapping[str, ScenarioCounts]) -> None:
    for name, of in counts.items():
        why = ""
        if of.prepared < ENOUGH * of.asked:
            why = f"{of.prepared} of {of.asked} questions are there"
            fix = "bring more data or ask fewer"
        elif of.prompts_without_examples:
            why = f"{of.prompts_without_examples} of {of.requests} prompts show no example"
            fix = "bring the train file, or write examples=false into the run entry"
        if why and runs.scenarios[name].shortfall == "refuse":
            key = f"stages.{runs.stage}.scenarios.{name}"
            raise BadInput(key, why=why, fix=f"{fix}; or accept it with shortfall: accept")


def summary(record: StageInstances) -> Iterator[str]:
    """Yield a line per scenario, for people: what is asked and what it lacks."""
    for name, of in record.counts.items():
        line = f"{record.stage} {name}: {of.prepared} of {of.asked} questions, {of.requests} requests"
        if of.examples_asked:
            line += f"; examples {of.examples_min} to {of.examples_asked}, median {of.examples_median:g}"
        if of.prompts_short_of_examples:
            line += f"; {of.prompts_short_of_examples} prompts have fewer examples than asked for"
        line += f"; longest prompt {of.longest_prompt_words} words, window {of.window_tokens} tokens"
        if of.prompts_over_window:
            line += f" ({of.prompts_over_window} prompts do not fit)"
        if of.constant_answer is not None:
            labels = ", ".join(f"{letter} {count}" for letter, count in of.labels.items())
            line += f"; answers {labels}: a constant answer scores {of.constant_answer:.3f}"
        yield line
    yield from (f"{record.stage}: rows left out of {line}" for line in record.left_out)


def make_store(runs: StageRuns) -> None:
    """Make the stage's store; of the closed stage for its owner alone.

    Raises:
        BadInput: others can read the closed store, or a closed run file outside the repository.
    """
    if runs.stage == "closed":
        private = runs.closed.path
        private.parent.mkdir(parents=True, exist_ok=True)
        private.mkdir(mode=0o700, exist_ok=True)
        if (mode := private.stat().st_mode & 0o777) & 0o077:
            raise BadInput(
                private, "mode", f"{mode:o}", why="others can read the closed store", fix="chmod 700 it"
            )
        for scenario in runs.scenarios.values():
            path = expand(scenario.run_entries).resolve()
            if not path.is_relative_to(Path.cwd()) and _others_can_read(path):
                raise BadInput(path, why="others can read this closed run file", fix="chmod 700 its folder")
    runs.store.path.mkdir(parents=True, exist_ok=True)


def _others_can_read(path: Path) -> bool:
    reachable = all(parent.stat().st_mode & 0o011 for parent in path.parents)
    return bool(path.stat().st_mode & 0o044) and reachable


def prepared_prompts(runs: StageRuns, scenario: str | None, number: int) -> Iterator[tuple[str, str]]:
    """Yield the first prompts of each HELM run of a prepared stage, under a heading.

    Raises:
        BadInput: the stage is not prepared, or not open to who asks, or has no such scenario.
    """
    path, key = runs.store.prompts, f"stages.{runs.stage}.scenarios"
    if scenario is not None and scenario not in runs.scenarios:
        raise BadInput(key, scenario, fix=f"use one of {', '.join(runs.scenarios)}")
    try:
        table = pq.read_table(path)
    except PermissionError:
        raise BadInput(path, why="is open to the organizer only", fix="ask who owns it") from None
    except FileNotFoundError:
        raise BadInput(
            path, why="the stage is not prepared", fix="start the workflow, which prepares it"
        ) from None
    shown: Counter[str] = Counter()
    for row in table.to_pylist():
        if scenario in (None, row["scenario"]) and shown[row["run"]] < number:
            shown[row["run"]] += 1
            variant = f", {row['variant']}" if row["variant"] else ""
            yield f"{row['scenario']}, {row['run']}, {row['instance']}{variant}", row["prompt"]


# --- data -------------------------------------------------------------------------------------------


def fetch_data(runs: StageRuns, source: Path | None = None) -> dict[str, str]:
    """Bring all data that a stage reads, and no other, into its store, so that no later step needs a network.

    `source`: a folder of downloads made elsewhere, in the layout of HELM's caches: <scenario>/… and
    perturbations/…; then $PALIO_HELM_DATA. HELM downloads what is in neither.

    Returns:
        sha256 of every file by its path in the store's data/; also written to data.json.

    Raises:
        BadInput: data is missing and cannot be downloaded, or as `make_store`.
    """
    make_store(runs)
    entries = stage_entries(runs)
    _bring_data(runs, entries, source)
    dry_run = runs.store.dry_run("fetch")
    shutil.rmtree(dry_run.path, ignore_errors=True)  # HELM would skip a run that is complete, and its data
    dry_run.path.mkdir(parents=True)
    plan_stage(dry_run, runs.stage, entries, runs.store.data)
    return _seal_data(runs)


def planned_data(runs: StageRuns, source: Path | None = None) -> list[tuple[str, str, str, str, str]]:
    """Return what `fetch_data` would do: dataset, action, size, licence, remark. Nothing is touched.

    Raises:
        BadInput: a run entry is wrong.
    """
    from palio.evaluation.datasets import listing

    return listing(_needs(runs, stage_entries(runs)), runs.store.data, source)


def _needs(runs: StageRuns, entries: Mapping[str, list[str]]) -> list[Need]:
    from palio.evaluation.datasets import needs  # it imports HELM, which takes seconds

    try:
        return needs(description for of in entries.values() for description in of)
    except DataError as error:
        raise BadInput(f"stages.{runs.stage}.scenarios", why=str(error)) from None


def _bring_data(runs: StageRuns, entries: Mapping[str, list[str]], source: Path | None) -> None:
    from palio.evaluation.datasets import bring

    for need in _needs(runs, entries):
        try:
            taken = bring(need, runs.store.data, source)
        except DataError as error:
            raise BadInput(f"stages.{runs.stage}.scenarios", need.name, why=str(error)) from None
        if taken:
            print(f"{runs.stage} {need.name}: copied from {taken}", file=sys.stderr, flush=True)


def _seal_data(runs: StageRuns) -> dict[str, str]:
    """Write the digests of the data."""
    _close_store(runs)
    digests = _data_digests(runs.store.data)
    write_json(runs.store.data_digests, digests)
    return digests


def _close_store(runs: StageRuns) -> None:
    """Take what lies in a closed store from all but its owner. Raises BadInput if that has no effect."""
    if runs.stage == "open":
        return
    for path in [runs.store.path, *runs.store.path.rglob("*")]:
        if not path.is_symlink():
            path.chmod(path.stat().st_mode & ~0o077)
            if path.stat().st_mode & 0o077:
                raise BadInput(path, why="others can read this closed file", fix="use another file system")


def _data_digests(data: Path) -> dict[str, str]:
    return {name: digest for name, digest in folder_sha256(data).items() if not name.endswith(".lock")}


def verify_data(store: StageStore) -> None:
    """Raise BadInput if a file of the data is not what was fetched."""
    fetched = json.loads(store.data_digests.read_text(encoding="utf-8"))
    now = _data_digests(store.data)
    for why, names in (
        ("changed since it was fetched", [name for name in fetched if now.get(name) != fetched[name]]),
        ("was not there when data was fetched", [name for name in now if name not in fetched]),
    ):
        if names:
            raise BadInput(store.data / min(names), why=why, fix="run `palio fetch-data` again")


@dataclass(frozen=True)
class PlannedRun:
    """A HELM run of a prepared stage: counts, no texts."""

    scenario: str
    run: str
    instances: int
    requests: int
    """One per instance and perturbation of it, or per answer choice."""


class StagePlan:
    """The runs of a prepared stage, as `evaluate` needs them."""

    def __init__(self, store: StageStore) -> None:
        content = json.loads(store.runs.read_text(encoding="utf-8"))
        self.entries: dict[str, list[str]] = content["entries"]
        self.data = store.data
        self._prompts = store.prompts
        self.runs = [PlannedRun(**run) for run in content["runs"]]
        self.kinds: list[dict[str, Any]] = content.get("kinds", [])
        """How the stage asks: bodies to /process without the prompt, each once."""

    @property
    def requests(self) -> int:
        return sum(run.requests for run in self.runs)

    def prompts(self) -> dict[PromptKey, str]:
        """Return every prompt before a model's window shortens it."""
        rows = pq.read_table(self._prompts).to_pylist()
        return {(row["run"], row["instance"], row["variant"]): row["prompt"] for row in rows}


def asked_in(runs: StageRuns, limits: StageLimits) -> Asked:
    """Return how a stage asks; if it is not prepared, by its budget, which leaves out perturbed inputs."""
    if runs.store.runs.exists():
        plan = StagePlan(runs.store)
        requests, kinds = plan.requests, plan.kinds
    else:
        descriptions = [entry for entries in stage_entries(runs).values() for entry in entries]
        requests = sum(int(re.findall(r"max_eval_instances=(\d+)", entry)[0]) for entry in descriptions)
        kinds = []
    return Asked(requests, limits.time_limit, kinds, limits.cut_at_stop_sequences)
