"""Evaluate one package in one stage: HELM against a server, under the stage's time limit.

Before the open stage the server is probed: one that does not speak HELM's contract is not asked further.
What is answered survives everything: HELM's runs and the client's journal lie in a folder named by
package and stage, outside the step's declared outputs, so a rerun asks only what has no answer, and the
seconds already used count against the limit.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from palio.config import StageLimits, StageRuns
from palio.errors import Crashed, RuleViolation, State
from palio.evaluation import helm
from palio.evaluation.helm import BROKEN, LIMIT
from palio.evaluation.probe import probe
from palio.evaluation.stage import StagePlan
from palio.provenance import atomic_path, file_sha256, fingerprint
from palio.records import (
    INSTANCES_SCHEMA,
    METRICS_SCHEMA,
    Contained,
    HelmRun,
    PackageManifest,
    ProbeReport,
    StageInstances,
    StageRecord,
    StageRun,
    UsedSeconds,
    read_record,
    timed_run,
)
from palio.text import last_lines

PROGRESS_SECONDS = 15.0
SCORING_SECONDS = 900.0
"""HELM's own work after the limit: instances and metrics of what is left, without asking."""


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
    finished step with the state `time_limit`. The open stage writes entry_dir/probe.json first.

    Raises:
        RuleViolation: the server fails a required check of the probe.
        Crashed: the server died or a HELM run failed; what is answered is kept for the next attempt.
    """
    stage = runs.stage
    package = read_record(PackageManifest, entry_dir / "package.json")
    prepared = read_record(StageInstances, instances)
    plan = StagePlan(runs.store)
    decides = [package.fingerprint, prepared.sha256, prepared.helm_version, limits.cut_at_stop_sequences]
    folder = work_folder(runs, entry_dir, fingerprint(decides)[:16])
    folder.mkdir(parents=True, exist_ok=True)
    _forget_unanswered(folder)
    log = folder / "server.log"

    with timed_run(entry_dir / f"{stage}.run.json", StageRun(limit_seconds=limits.time_limit)) as run:
        clock = UsedTime(folder / "used_seconds.json")
        died, overtime, code = "", False, None
        if not _complete(folder, plan):
            with start_server(entry_dir / "package", log) as server:
                if stage == "open":
                    _check_conformance(server, plan, limits, package, entry_dir / "probe.json")
                watch = Watch(folder, plan, limits.time_limit, clock, server)
                ended = _ask(folder, plan, limits, clock, watch)
                if not server.alive():
                    died = "the model server died"
                    if stage == "open" and log.exists():
                        died += f", its last lines: {last_lines(log.read_text('utf-8', 'replace'))}"
                code = ended.code
                overtime = code is None and not died
        outcomes = [_outcome(folder, stage, limits, planned, overtime) for planned in plan.runs]
        run.used_seconds, run.requests = round(clock.used, 1), plan.requests
        run.answered = sum(one.answered for one in outcomes)

    contained = Contained.beside(log)
    failed = [one for one in outcomes if one.state is State.CRASHED]
    if failed:
        what = died or f"{len(failed)} of {len(outcomes)} HELM runs failed"
        why = failed[0].reason or ("no result" if code is None else f"HELM ended with code {code}")
        where = f"see {folder}/helm.log" if stage == "open" else "the logs are in the closed store"
        error = Crashed(f"{what}; first {failed[0].run}: {why}; {where}")
        if contained.counts:
            error.add_note(f"of the server: {contained}")
        raise error
    return _write_results(runs, limits, entry_dir, folder, package, prepared, outcomes, contained)


def _ask(folder: Path, plan: StagePlan, limits: StageLimits, clock: UsedTime, watch: Watch) -> helm.HelmExit:
    left = max(0.0, limits.time_limit - clock.used)
    asking = helm.Asking(watch.server.base_url, limits.cut_at_stop_sequences, time.time() + left)
    helm.write_helm_folder(folder, plan.entries, plan.data, asking)
    ended = helm.run_helm(
        folder,
        threads=limits.threads,
        time_limit=left + SCORING_SECONDS,
        offline=True,
        tick=watch,
    )
    clock.add(min(left, ended.seconds))
    return ended


def _check_conformance(
    server: Server, plan: StagePlan, limits: StageLimits, package: PackageManifest, record: Path
) -> None:
    """Probe the server and keep the report; one of the same package that passed is not repeated."""
    if record.exists():
        before = read_record(ProbeReport, record)
        if before.conforms and before.package_fingerprint == package.fingerprint:
            return
    report = probe(server.base_url, planned_requests=plan.requests, time_limit=limits.time_limit)
    report = report.model_copy(update={"package_fingerprint": package.fingerprint})
    report.write(record)
    for check in report.checks:
        if check.state == "fail":
            print(f"probe: {check.name}: {check.why}; {check.fix}", file=sys.stderr, flush=True)
    if not report.conforms:
        first = next(check for check in report.checks if check.required and check.state != "pass")
        broken = [check.name for check in report.checks if check.required and check.state == "fail"]
        others = f" (and {len(broken) - 1} more, see {record})" if len(broken) > 1 else ""
        raise RuleViolation(f"the server fails the check {first.name}: {first.why}; {first.fix}{others}")


def _write_results(
    runs: StageRuns,
    limits: StageLimits,
    entry_dir: Path,
    folder: Path,
    package: PackageManifest,
    prepared: StageInstances,
    outcomes: list[HelmRun],
    contained: Contained,
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
    planned = sum(one.instances for one in outcomes)
    missing = planned - sum(one.answered for one in outcomes)
    record = StageRecord(
        **where,
        package_fingerprint=package.fingerprint,
        instances_sha256=prepared.sha256,
        helm_version=prepared.helm_version,
        state=State.TIME_LIMIT if any(LIMIT in one.reason for one in outcomes) else State.FINISHED,
        reason=f"{missing} of {planned} instances unanswered" if missing else "",
        unanswered=limits.unanswered,
        cut_at_stop_sequences=limits.cut_at_stop_sequences,
        completions_cut=_journal(folder).count(b'"cut": true'),
        contained=contained.counts,
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
        self.before = read_record(UsedSeconds, path).seconds if path.exists() else 0.0
        self.now = 0.0

    @property
    def used(self) -> float:
        return self.before + self.now

    def add(self, seconds: float) -> None:
        """`seconds` since this attempt began."""
        self.now = seconds
        UsedSeconds(seconds=round(self.used, 1)).write(self.path)


class Watch:
    """Beside a running HELM: a line on stderr every quarter of a minute, the used time on disk, and the end
    of it when the server is dead."""

    def __init__(self, folder: Path, plan: StagePlan, limit: float, clock: UsedTime, server: Server) -> None:
        self.folder, self.plan, self.limit, self.clock, self.server = folder, plan, limit, clock, server
        self.shown = 0.0
        self.answered_before = _answers(folder)

    def __call__(self, seconds: float) -> bool:
        if seconds - self.shown >= PROGRESS_SECONDS:
            self.shown = seconds
            self.clock.add(min(seconds, self.limit - self.clock.before))
            print(self.line(seconds), file=sys.stderr, flush=True)
        return self.server.alive()

    def line(self, seconds: float) -> str:
        """Requests answered, HELM runs done, time used and where it will end at the rate so far."""
        answered = _answers(self.folder)
        done = sum(run.complete for run in helm.run_folders(self.folder))
        rate = (answered - self.answered_before) / seconds
        left = self.plan.requests - answered
        if self.clock.used >= self.limit:
            end = "nothing more is asked"
        else:
            end = f"end expected at {self.clock.used + left / rate:.0f} s" if rate > 0 else "end unknown"
        return (
            f"{answered} of {self.plan.requests} requests answered, {done} of {len(self.plan.runs)} HELM runs"
            f" done, {self.clock.used:.0f} s of {self.limit:.0f} s used, {end}"
        )


def _journal(folder: Path) -> bytes:
    journal = folder / helm.JOURNAL
    return journal.read_bytes() if journal.exists() else b""


def _answers(folder: Path) -> int:
    return _journal(folder).count(b"\n")


def _finished(folder: Path) -> dict[str, helm.RunFolder]:
    return {run.name: run for run in helm.run_folders(folder) if run.complete}


def _forget_unanswered(folder: Path) -> None:
    """HELM skips complete runs; one with an unanswered question is to be asked again."""
    for run in _finished(folder).values():
        if run.unanswered():
            shutil.rmtree(run.path)


def _complete(folder: Path, plan: StagePlan) -> bool:
    finished = _finished(folder)
    return all(run["run"] in finished for run in plan.runs)


def _outcome(
    folder: Path, stage: str, limits: StageLimits, planned: dict[str, str | int], overtime: bool
) -> HelmRun:
    name, instances = str(planned["run"]), int(planned["instances"])
    state, reason, answered = State.FINISHED, "", instances
    run = _finished(folder).get(name)
    if run is None:
        answered = 0
        state, reason = State.CRASHED, helm.log_error(folder, name) or helm.log_error(folder)
        if stage == "closed":  # a message may quote a prompt
            reason = helm.error_class(reason)
        if overtime:
            state, reason = State.TIME_LIMIT, LIMIT
    elif lost := run.unanswered():
        answered = instances - len(lost)
        whys = Counter(lost.values())
        reason = "; ".join(f"{count} unanswered: {why}" for why, count in whys.most_common(3))
        if any(why.startswith(BROKEN) for why in whys):
            state = State.CRASHED
        elif limits.unanswered == "missing":
            state = State.TIME_LIMIT if LIMIT in whys else State.CRASHED
    return HelmRun(
        scenario=str(planned["scenario"]),
        run=name,
        state=state,
        reason=reason,
        instances=instances,
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
