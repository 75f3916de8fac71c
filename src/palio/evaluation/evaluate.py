"""Evaluate one package in one stage: HELM against a server, under the stage's time limit.

What HELM has finished survives everything: it lies in a folder named by package and stage, outside
the step's declared outputs, so a rerun repeats only unfinished HELM runs, and the seconds already
used count against the limit.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from palio.config import StageLimits, StageRuns
from palio.errors import Crashed, State
from palio.evaluation import helm
from palio.evaluation.stage import StagePlan
from palio.provenance import atomic_path, file_sha256, fingerprint, timed_run, write_json
from palio.records import (
    INSTANCES_SCHEMA,
    METRICS_SCHEMA,
    HelmRun,
    PackageManifest,
    StageInstances,
    StageRecord,
    read_record,
)

PROGRESS_SECONDS = 15.0


class Server(Protocol):
    """A running model server: what `palio.serving.process.ServerProcess` yields."""

    @property
    def base_url(self) -> str: ...

    def alive(self) -> bool: ...


StartServer = Callable[[Path, Path], AbstractContextManager[Server]]
"""(package folder, log file) -> a context in which the server answers."""


def work_folder(runs: StageRuns, entry_dir: Path, key: str) -> Path:
    """HELM's folder for one package in one stage. The closed stage's shows prompts: it lies apart."""
    if runs.stage == "open":
        return entry_dir / "work" / "helm" / "open" / key
    return runs.store.parent / "runs" / entry_dir.parent.name / entry_dir.name / key


def evaluate(
    runs: StageRuns,
    limits: StageLimits,
    instances: Path,
    entry_dir: Path,
    start_server: StartServer,
) -> StageRecord:
    """Run the stage, write entry_dir/helm/<stage>/*.parquet and entry_dir/<stage>.json.

    `instances` is the stage's record written by `prepare_stage`. A stage whose limit ran out is a
    finished step with the state `time_limit`.

    Raises:
        Crashed: the server died or a HELM run failed; the finished runs are kept for the next attempt.
    """
    stage = runs.stage
    package = read_record(PackageManifest, entry_dir / "package.json")
    prepared = read_record(StageInstances, instances)
    plan = StagePlan(runs.store)
    key = fingerprint([package.fingerprint, prepared.sha256, prepared.helm_version])[:16]
    folder = work_folder(runs, entry_dir, key)
    _share_data(folder, plan)

    with timed_run(entry_dir / f"{stage}.run.json", limit_seconds=limits.time_limit) as run:
        clock = UsedTime(folder / "used_seconds.json")
        timed_out = False
        server_died = False
        if not _complete(folder, plan):
            with start_server(entry_dir / "package", folder / "server.log") as server:
                helm.write_helm_folder(folder, plan.entries, base_url=server.base_url)
                ended = helm.run_helm(
                    folder,
                    threads=limits.threads,
                    time_limit=max(0.0, limits.time_limit - clock.used),
                    tick=Progress(folder, plan, limits.time_limit, clock),
                )
                clock.add(ended.seconds)
                timed_out = ended.code is None
                server_died = not server.alive()
        outcomes = [_outcome(folder, stage, planned, timed_out) for planned in plan.runs]
        run["used_seconds"] = round(clock.used, 1)
        run["requests"] = plan.requests

    failed = [one for one in outcomes if one.state is State.CRASHED]
    if failed:
        what = (
            "the model server died" if server_died else f"{len(failed)} of {len(outcomes)} HELM runs failed"
        )
        where = f"see {folder}/helm.log" if stage == "open" else "the logs are in the closed store"
        raise Crashed(f"{what}; first {failed[0].run}: {failed[0].reason or 'no result'}; {where}")
    return _write_results(runs, entry_dir, folder, package, prepared, outcomes)


def _write_results(
    runs: StageRuns,
    entry_dir: Path,
    folder: Path,
    package: PackageManifest,
    prepared: StageInstances,
    outcomes: list[HelmRun],
) -> StageRecord:
    stage = runs.stage
    where = {
        "competition": runs.competition,
        "track": entry_dir.parent.name,
        "entry": entry_dir.name,
        "stage": stage,
    }
    metrics, instances = _tables(folder, where)
    tables = entry_dir / "helm" / stage
    _write_table(tables / "metrics.parquet", metrics, METRICS_SCHEMA)
    _write_table(tables / "instances.parquet", instances, INSTANCES_SCHEMA)
    missing = sum(one.instances - one.answered for one in outcomes)
    record = StageRecord(
        **where,
        package_fingerprint=package.fingerprint,
        instances_sha256=prepared.sha256,
        helm_version=prepared.helm_version,
        state=State.TIME_LIMIT if missing else State.FINISHED,
        reason=f"{missing} instances unanswered when the stage's limit ran out" if missing else "",
        runs=outcomes,
        metrics_sha256=file_sha256(tables / "metrics.parquet"),
        instances_table_sha256=file_sha256(tables / "instances.parquet"),
    )
    record.write(entry_dir / f"{stage}.json")
    return record


class UsedTime:
    """Seconds of the stage's limit used so far, over all attempts; kept on disk, so a kill resets nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.before = float(json.loads(path.read_text())["seconds"]) if path.exists() else 0.0
        self.now = 0.0

    @property
    def used(self) -> float:
        return self.before + self.now

    def add(self, seconds: float) -> None:
        """`seconds` since this attempt began."""
        self.now = seconds
        write_json(self.path, {"seconds": round(self.used, 1)})


class Progress:
    """A line on stderr every quarter of a minute, and the used time on disk."""

    def __init__(self, folder: Path, plan: StagePlan, limit: float, clock: UsedTime) -> None:
        self.folder, self.plan, self.limit, self.clock = folder, plan, limit, clock
        self.shown = 0.0

    def __call__(self, seconds: float) -> None:
        if seconds - self.shown < PROGRESS_SECONDS:
            return
        self.shown = seconds
        self.clock.add(seconds)
        done = sum(run.complete for run in helm.run_folders(self.folder))
        used = f"{self.clock.used:.0f} s of {self.limit:.0f} s used"
        print(f"{done} of {len(self.plan.runs)} HELM runs done, {used}", file=sys.stderr, flush=True)


def _share_data(folder: Path, plan: StagePlan) -> None:
    """The scenario data that HELM downloaded once serves every entry."""
    output = folder / "output"
    output.mkdir(parents=True, exist_ok=True)
    for name in ("scenarios", "perturbations"):
        shared = (plan.data_folder / name).resolve()
        shared.mkdir(parents=True, exist_ok=True)
        link = output / name
        if not link.is_symlink():
            link.symlink_to(shared, target_is_directory=True)


def _finished(folder: Path) -> dict[str, helm.RunFolder]:
    return {run.name: run for run in helm.run_folders(folder) if run.complete}


def _complete(folder: Path, plan: StagePlan) -> bool:
    finished = _finished(folder)
    return all(run["run"] in finished for run in plan.runs)


def _outcome(folder: Path, stage: str, planned: dict[str, str | int], timed_out: bool) -> HelmRun:
    name = str(planned["run"])
    state, reason, answered = State.FINISHED, "", int(planned["instances"])
    if name not in _finished(folder):
        answered = 0
        if timed_out:
            state, reason = State.TIME_LIMIT, "the stage's limit ran out"
        else:
            state, reason = State.CRASHED, helm.log_error(folder)
            if stage == "closed":  # a message may quote a prompt
                reason = helm.error_class(reason)
    return HelmRun(
        scenario=str(planned["scenario"]),
        run=name,
        state=state,
        reason=reason,
        instances=int(planned["instances"]),
        answered=answered,
    )


def _tables(folder: Path, where: dict[str, str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of METRICS_SCHEMA and INSTANCES_SCHEMA of all finished runs, in a fixed order."""
    metrics: list[dict[str, Any]] = []
    instances: list[dict[str, Any]] = []
    for name, run in sorted(_finished(folder).items()):
        at = {**where, "scenario": run.scenario, "run": name}
        counts: dict[tuple[str, str, str | None], int] = {}
        for row in _sorted(helm.instance_statistics(run)):
            instances.append({**at, **row})
            key = (row["metric"], row["split"], row["perturbation"])
            counts[key] = counts.get(key, 0) + (row["value"] is not None)
        for row in _sorted(helm.statistics(run)):
            key = (row["metric"], row["split"], row["perturbation"])
            metrics.append({**at, **row, "n": counts.get(key, 0)})
    return metrics, instances


def _sorted(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(
        rows,
        key=lambda row: (row["metric"], row["split"], row["perturbation"] or "", row.get("instance", "")),
    )


def _write_table(path: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    with atomic_path(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), temporary)
