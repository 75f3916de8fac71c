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
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from palio.config import StageRuns
from palio.evaluation.helm import helm_version, plan_stage, stage_entries
from palio.provenance import atomic_path, fingerprint, write_json
from palio.records import StageInstances

INSTANCE_TEXTS = pa.schema(
    [
        pa.field(name, pa.string(), nullable=False)
        for name in ("scenario", "run", "instance", "text", "reference")
    ]
)


def prepare_stage(runs: StageRuns, out: Path) -> StageInstances:
    """Make the instances of a stage, write them to its store and their record to `out`.

    Raises:
        BadInput: HELM does not know a run entry, or cannot make its instances (data missing).
    """
    store = runs.store
    store.mkdir(parents=True, exist_ok=True)
    if runs.stage == "closed":
        store.parent.chmod(0o700)
    entries = stage_entries(runs)
    # A folder per content: runs of an earlier plan must not be taken for this one's.
    folder = store / "helm" / fingerprint(entries)[:16]
    folder.mkdir(parents=True, exist_ok=True)
    plans = plan_stage(folder, runs.stage, entries, store / "data")
    rows = [
        {"scenario": plan.scenario, "run": plan.run, "instance": i, "text": text, "reference": reference}
        for plan in plans
        for i, text, reference in plan.instances
    ]
    with atomic_path(store / "instances.parquet") as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema=INSTANCE_TEXTS), temporary)
    write_json(
        store / "runs.json",
        {
            "entries": entries,
            "runs": [
                {
                    "scenario": plan.scenario,
                    "run": plan.run,
                    "instances": len(plan.instances),
                    "requests": plan.requests,
                }
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
    )
    record.write(out)
    return record


class StagePlan:
    """The runs of a prepared stage, as `evaluate` needs them."""

    def __init__(self, store: Path) -> None:
        content = json.loads((store / "runs.json").read_text(encoding="utf-8"))
        self.entries: dict[str, list[str]] = content["entries"]
        self.data = store / "data"
        self.runs: list[dict[str, str | int]] = content["runs"]

    @property
    def requests(self) -> int:
        return sum(int(run["requests"]) for run in self.runs)


def planned_requests(runs: StageRuns) -> int:
    """Requests of a prepared stage; of one that is not, its budget, which leaves out perturbed inputs."""
    if (runs.store / "runs.json").exists():
        return StagePlan(runs.store).requests
    descriptions = [one for of in stage_entries(runs).values() for one in of]
    return sum(int(re.findall(r"max_eval_instances=(\d+)", one)[0]) for one in descriptions)
