"""A stage before any entry runs: its evaluation instances, made once by HELM.

This is where an unknown scenario, a missing data file or a typo in a run-entries file shows, before
any GPU time is spent. The instances' texts go to the stage's store, for decontamination and the
contamination report; the record that leaves it holds counts and a digest.

A stage's store: open under resources/, closed under the competition's `closed_store`, mode 0700.

    <store>/runs.json          what the runs of a stage are, for `evaluate` (ids only)
    <store>/instances.parquet  scenario, run, instance, text, reference
    <store>/helm/              HELM's dry run
    <store>/data/              scenarios/ and perturbations/ as HELM caches them, for all entries
    <store>/data.json          sha256 of every file in data/, written by `fetch_data`
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from palio.config import expand
from palio.errors import BadInput
from palio.evaluation.helm import helm_version, plan_stage, stage_entries
from palio.layout import StageStore
from palio.provenance import atomic_path, fingerprint, folder_sha256, write_json
from palio.records import StageInstances
from palio.settings import StageRuns

INSTANCE_TEXTS = pa.schema(
    [
        pa.field(name, pa.string(), nullable=False)
        for name in ("scenario", "run", "instance", "text", "reference")
    ]
)


def prepare_stage(runs: StageRuns, out: Path) -> StageInstances:
    """Make the instances of a stage, write them to its store and their record to `out`.

    With data from `fetch_data` no network is needed, nor used.

    Raises:
        BadInput: HELM does not know a run entry, or cannot make its instances (data missing or changed); or
            others can read what is closed.
    """
    store = runs.store
    make_store(runs)
    entries = stage_entries(runs)
    fetched = store.data_digests.exists()
    if fetched:
        _verify_data(store)
    # A folder per content: runs of an earlier plan must not be taken for this one's.
    folder = store.dry_run(fingerprint(entries)[:16])
    folder.path.mkdir(parents=True, exist_ok=True)
    plans = plan_stage(folder, runs.stage, entries, store.data, offline=fetched)
    rows = [
        {"scenario": plan.scenario, "run": plan.run, "instance": i, "text": text, "reference": reference}
        for plan in plans
        for i, text, reference in plan.instances
    ]
    with atomic_path(store.instances) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema=INSTANCE_TEXTS), temporary)
    write_json(
        store.runs,
        {
            "entries": entries,
            "runs": [
                asdict(PlannedRun(plan.scenario, plan.run, len(plan.instances), plan.requests))
                for plan in plans
            ],
        },
    )
    counts = {
        name: sum(len(plan.instances) for plan in plans if plan.scenario == name) for name in sorted(entries)
    }
    record = StageInstances(
        competition=runs.competition,
        stage=runs.stage,
        helm_version=helm_version(),
        scenarios=counts,
        sha256=fingerprint([entries, rows]),
        made=runs.made,
    )
    record.write(out)
    return record


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


# --- data -------------------------------------------------------------------------------------------


def fetch_data(runs: StageRuns, source: Path | None = None) -> dict[str, str]:
    """Bring all data that a stage reads into its store, so that no later step needs a network.

    `source`: a folder of downloads made elsewhere, in the layout of HELM's caches: <scenario>/… and
    perturbations/…; HELM downloads what is not in it.

    Returns:
        sha256 of every file by its path in the store's data/; also written to data.json.

    Raises:
        BadInput: data is missing and cannot be downloaded, or as `make_store`.
    """
    make_store(runs)
    data = runs.store.data
    for folder in sorted(source.iterdir()) if source else []:
        if folder.is_dir():
            to = data / folder.name if folder.name == "perturbations" else data / "scenarios" / folder.name
            shutil.copytree(folder, to, copy_function=shutil.copyfile, dirs_exist_ok=True)
    dry_run = runs.store.dry_run("fetch")
    shutil.rmtree(dry_run.path, ignore_errors=True)  # HELM would skip a run that is complete, and its data
    dry_run.path.mkdir(parents=True)
    plan_stage(dry_run, runs.stage, stage_entries(runs), data)
    digests = _data_digests(data)
    write_json(runs.store.data_digests, digests)
    return digests


def _data_digests(data: Path) -> dict[str, str]:
    return {name: digest for name, digest in folder_sha256(data).items() if not name.endswith(".lock")}


def _verify_data(store: StageStore) -> None:
    fetched = json.loads(store.data_digests.read_text(encoding="utf-8"))
    now = _data_digests(store.data)
    changed = [name for name in sorted(fetched) if now.get(name) != fetched[name]]
    if changed:
        raise BadInput(
            store.data / changed[0], why="changed since it was fetched", fix="run `palio fetch-data` again"
        )


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
        self.runs = [PlannedRun(**run) for run in content["runs"]]

    @property
    def requests(self) -> int:
        return sum(run.requests for run in self.runs)


def planned_requests(runs: StageRuns) -> int:
    """Requests of a prepared stage; of one that is not, its budget, which leaves out perturbed inputs."""
    if runs.store.runs.exists():
        return StagePlan(runs.store).requests
    descriptions = [entry for entries in stage_entries(runs).values() for entry in entries]
    return sum(int(re.findall(r"max_eval_instances=(\d+)", entry)[0]) for entry in descriptions)
