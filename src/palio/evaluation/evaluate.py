"""Evaluate one package in one stage: HELM against a server, under the stage's time limit.

Before the open stage the server is probed: one that does not speak HELM's contract is not asked further.
Answers survive everything: HELM's runs and the client's journal lie in a folder named by package and stage,
outside the step's declared outputs, so a rerun asks only what has no answer, and the seconds already used
count against the limit. A stage that got more questions begins with the answers to those that it had.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from palio.config import Probe
from palio.errors import Crashed, RuleViolation, State
from palio.evaluation import helm
from palio.evaluation.earlier import asked_questions, take_over
from palio.evaluation.helm.folder import CONTEXT_TOKENS
from palio.evaluation.journal import BROKEN, LIMIT, JournalReader
from palio.evaluation.probe import Asked, levels, lines, probe
from palio.evaluation.stage import PlannedRun, PromptKey, StagePlan, verify_data
from palio.evaluation.window import Window
from palio.heartbeat import HeartbeatWriter
from palio.layout import EntryFolder, HelmFolder, Stage
from palio.provenance import atomic_path, file_sha256, fingerprint
from palio.records import (
    Contained,
    HelmRun,
    PackageManifest,
    ProbeReport,
    StageInstances,
    StageRecord,
    StageRun,
    UsedSeconds,
    coarse,
    read_record,
    timed_run,
)
from palio.records.tables import INSTANCES_SCHEMA, METRICS_SCHEMA
from palio.sandbox.death import last_words
from palio.settings import EvaluateSettings, StageLimits

PROGRESS_SECONDS = 15.0
MAX_RESTARTS = 2
"""Restarts of a model server that died after it had answered something."""
SCORING_SECONDS = 900.0
"""HELM's own work after the limit: instances and metrics of what is left, without asking."""


class Server(Protocol):
    """A running model server: what `palio.serving.process.ServerProcess` yields."""

    @property
    def base_url(self) -> str: ...

    def alive(self) -> bool: ...

    def exit_code(self) -> int | None: ...


StartServer = Callable[[Path], AbstractContextManager[Server]]
"""Log file -> a context in which the server of the entry's package answers."""


def evaluate(
    folder: EntryFolder,
    settings: EvaluateSettings,
    instances: Path,
    start_server: StartServer,
    window: Window,
    engine: str = "",
) -> StageRecord:
    """Run the stage on the entry's package, write its tables and its record.

    `instances` is the stage's record written by `prepare_stage`, `window` shortens prompts, `engine` is the
    name and version of what serves a model; answers of another engine are not taken over. A stage whose limit
    ran out is a finished step with the state `time_limit`. The open stage writes the probe's record first.

    Raises:
        RuleViolation: the server fails a required check of the probe.
        Crashed: the server died or a HELM run failed; what is answered is kept for the next attempt.
    """
    evaluation = Evaluation.of(folder, settings, instances, engine)
    plan, work, stage = evaluation.plan, evaluation.work, evaluation.stage
    if window.estimated:
        print(f"tokens are estimated: {window.estimated}", file=sys.stderr, flush=True)

    with timed_run(folder.run_facts(stage), StageRun(limit_seconds=settings.limits.time_limit)) as run:
        ending = _ask(evaluation, start_server, window)
        prompts = plan.prompts()
        outcomes = [_outcome(evaluation, planned, ending, prompts) for planned in plan.runs]
        run.used_seconds, run.requests = UsedTime(work.used_seconds).used, plan.requests
        run.answered = sum(outcome.run.answered for outcome in outcomes)

    incidents = Contained.beside(work.server_log)
    if stage == "closed":  # an exact count could carry what the server makes of a prompt
        incidents = incidents.coarse()
    if any(outcome.run.state is State.CRASHED for outcome in outcomes):
        raise _failure(evaluation, outcomes, ending, incidents)
    return _write_results(evaluation, outcomes, incidents)


@dataclass(frozen=True)
class Evaluation:
    """One package in one stage: what it is asked, and where its answers lie."""

    folder: EntryFolder
    settings: EvaluateSettings
    package: PackageManifest
    prepared: StageInstances
    plan: StagePlan
    engine: str
    work: HelmFolder

    @classmethod
    def of(cls, folder: EntryFolder, settings: EvaluateSettings, instances: Path, engine: str) -> Evaluation:
        """Begin with the answers of earlier attempts, and of the stage before it got more questions."""
        runs = settings.runs
        package = read_record(PackageManifest, folder.package_manifest)
        prepared = read_record(StageInstances, instances)
        verify_data(runs.store)
        plan = StagePlan(runs.store)
        served = (package.fingerprint, package.base_model_fingerprint, engine)
        how = (prepared.helm_version, settings.limits.cut_at_stop_sequences)
        work = helm.package_folder(folder, runs.stage, *served, prepared.sha256, *how)
        work.path.mkdir(parents=True, exist_ok=True)
        take_over(work, asked_questions(plan.entries, runs.store, fingerprint([*served, *how])))
        _forget_unanswered(work)
        return cls(folder, settings, package, prepared, plan, engine, work)

    @property
    def stage(self) -> Stage:
        return self.settings.runs.stage

    @property
    def limits(self) -> StageLimits:
        return self.settings.limits


@dataclass(frozen=True)
class Ending:
    """How the asking ended; by default nothing was left to ask."""

    code: int | None = None
    """HELM's exit code; None if it did not run or was stopped."""
    overtime: bool = False
    """HELM was stopped because the stage's limit ran out."""
    died: str = ""
    """The death of the model server and its last words; empty if it lives."""


@dataclass(frozen=True)
class Outcome:
    """One planned HELM run, after the asking."""

    run: HelmRun
    limited: bool
    """The stage's limit kept instances from being answered."""


def _ask(evaluation: Evaluation, start_server: StartServer, window: Window) -> Ending:
    """Probe the server, then ask it what is not answered; a server that died over it is started again."""
    work, plan = evaluation.work, evaluation.plan
    ending = Ending()
    conformance = Conformance(evaluation)
    restarts = MAX_RESTARTS if evaluation.package.kind == "model" else 0  # a team's own server has one life
    while not _complete(work, plan) or not conformance.passed:
        with start_server(work.server_log) as server:
            conformance.require(server, window)
            if _complete(work, plan):
                break
            heartbeat = HeartbeatWriter(
                evaluation.folder.heartbeat(evaluation.stage), plan.requests, "requests"
            )
            clock = UsedTime(work.used_seconds)
            watch = Watch(work, plan, evaluation.limits.time_limit, clock, server, heartbeat)
            code = _run_helm(evaluation, watch, window).code
            alive, server_code = server.alive(), server.exit_code()
        died = "" if alive else _death(work.server_log, evaluation.stage, server_code)
        ending = Ending(code, code is None and alive, died)
        if alive or not restarts or watch.answered == watch.answered_before:
            break
        restarts -= 1
        print(f"{ending.died}; it is started again", file=sys.stderr, flush=True)
        _forget_unanswered(work)
    return ending


def _run_helm(evaluation: Evaluation, watch: Watch, window: Window) -> helm.HelmExit:
    """Ask what is not answered, in what is left of the stage's limit."""
    folder, limits, plan, clock = evaluation.work, evaluation.limits, evaluation.plan, watch.clock
    left = max(0.0, limits.time_limit - clock.used)
    context = min(evaluation.package.context or CONTEXT_TOKENS, CONTEXT_TOKENS)
    requests = helm.RequestSettings(
        watch.server.base_url, limits.cut_at_stop_sequences, time.time() + left, window, context
    )
    helm.write_helm_folder(folder, plan.entries, plan.data, requests)
    helm_exit = helm.run_helm(
        folder,
        threads=limits.threads,
        time_limit=left + SCORING_SECONDS,
        offline=True,
        tick=watch,
    )
    # A dead server's seconds are not the entry's.
    served = helm_exit.seconds if watch.server.alive() else watch.alive_seconds
    clock.add(min(left, served))
    return helm_exit


def _death(log: Path, stage: str, code: int | None) -> str:
    """Return what is known of the model server's death. Of the closed stage nothing that it said itself."""
    if stage == "closed":
        return "the model server died"
    ended = "the model server died" if code is None else f"the model server died with exit code {code}"
    return ended + last_words(log)


def _failure(
    evaluation: Evaluation, outcomes: list[Outcome], ending: Ending, incidents: Contained
) -> Crashed:
    """The stage's failure in one line. Of the closed stage it quotes no log."""
    failed = [outcome.run for outcome in outcomes if outcome.run.state is State.CRASHED]
    what = ending.died or f"{len(failed)} of {len(outcomes)} HELM runs failed"
    why = failed[0].reason or ("no result" if ending.code is None else f"HELM ended with code {ending.code}")
    is_open = evaluation.stage == "open"
    where = "" if is_open else "; the logs are in the closed store"
    error = Crashed(f"{what}; first {failed[0].run}: {why}{where}")
    if is_open:
        error.log = evaluation.work.server_log if ending.died else evaluation.work.log
    if incidents.counts:
        error.add_note(f"of the server: {incidents}")
    return error


class Conformance:
    """The probe of a package's server, which the open stage begins with. Its report is kept: a server that
    passed the same checks is not probed again."""

    def __init__(self, evaluation: Evaluation) -> None:
        plan, limits = evaluation.plan, evaluation.limits
        self.record, self.log = evaluation.folder.probe, evaluation.work.server_log
        self.package, self.settings = evaluation.package, evaluation.settings.probe or Probe()
        self.asked = Asked(plan.requests, limits.time_limit, plan.kinds, limits.cut_at_stop_sequences)
        self.passed = evaluation.stage != "open" or self._passed_before()

    def _passed_before(self) -> bool:
        if not self.record.exists():
            return False
        before = read_record(ProbeReport, self.record)
        same = before.package_fingerprint == self.package.fingerprint
        return same and before.conforms and before.required == levels(self.settings, self.asked)

    def require(self, server: Server, window: Window) -> None:
        """Probe the server, unless it has passed.

        Raises:
            Crashed: it ended.
            RuleViolation: it fails a required check.
        """
        if self.passed:
            return
        report = probe(server.base_url, self.asked, window, self.settings, server.alive)
        report = report.model_copy(update={"package_fingerprint": self.package.fingerprint})
        report.write(self.record)
        for line in lines(report):
            print(f"probe: {line}", file=sys.stderr, flush=True)
        failed = [check for check in report.checks if check.state == "fail"]
        if report.died:
            seen = "".join(f": {check.why}" for check in failed if check.name == report.died)
            what = _death(self.log, "open", server.exit_code())
            death = Crashed(f"{what}; at the probe's check {report.died}{seen}")
            death.log = self.log
            raise death
        if broken := [check for check in failed if check.required]:
            first, *rest = broken
            others = f" (and {', '.join(check.name for check in rest)})" if rest else ""
            raise RuleViolation(f"the server fails the check {first.name}: {first.why}; {first.fix}{others}")
        self.passed = True


def _write_results(evaluation: Evaluation, outcomes: list[Outcome], incidents: Contained) -> StageRecord:
    """Write the stage's tables, then its record."""
    folder, settings, work = evaluation.folder, evaluation.settings, evaluation.work
    stage, limits = evaluation.stage, evaluation.limits
    package, prepared = evaluation.package, evaluation.prepared
    where = {
        "competition": settings.runs.competition,
        "track": folder.track_id,
        "entry": folder.entry_id,
        "stage": stage,
    }
    metrics, instances = _tables(work, where, settings.metrics)
    tables = folder.tables(stage)
    _write_table(tables.metrics, metrics, METRICS_SCHEMA)
    _write_table(tables.instances, instances, INSTANCES_SCHEMA)
    cut = sum(answer.cut for answer in JournalReader(work.journal).answers())
    planned = sum(outcome.run.instances for outcome in outcomes)
    missing = planned - sum(outcome.run.answered for outcome in outcomes)
    record = StageRecord(
        **where,
        package_fingerprint=package.fingerprint,
        instances_sha256=prepared.sha256,
        helm_version=prepared.helm_version,
        engine=evaluation.engine,
        code=fingerprint(package.code) if package.code else "",
        state=State.TIME_LIMIT if any(outcome.limited for outcome in outcomes) else State.FINISHED,
        reason=f"{missing} of {planned} instances unanswered" if missing else "",
        unanswered=limits.unanswered,
        cut_at_stop_sequences=limits.cut_at_stop_sequences,
        completions_cut=cut if stage == "open" else coarse(cut),
        contained=incidents.counts,
        runs=[outcome.run for outcome in outcomes],
        metrics_sha256=file_sha256(tables.metrics),
        instances_table_sha256=file_sha256(tables.instances),
    )
    record.write(folder.stage_record(stage))
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
    """Called beside a running HELM with the seconds so far; False, the end of HELM, once the server is dead.

    Keeps the step's heartbeat and, every quarter of a minute, the used time on disk and a line on stderr.
    """

    def __init__(
        self,
        folder: HelmFolder,
        plan: StagePlan,
        limit: float,
        clock: UsedTime,
        server: Server,
        heartbeat: HeartbeatWriter,
    ) -> None:
        self.folder, self.plan, self.limit, self.clock = folder, plan, limit, clock
        self.server, self.heartbeat = server, heartbeat
        self.shown = self.alive_seconds = 0.0
        self.journal = JournalReader(folder.journal)
        self.answered = self.answered_before = self._new_answers()

    def __call__(self, seconds: float) -> bool:
        self.answered += self._new_answers()
        used = min(self.clock.before + seconds, self.limit)
        self.heartbeat.beat(self.answered, used)
        if seconds - self.shown >= PROGRESS_SECONDS:
            self.shown = seconds
            self.clock.add(used - self.clock.before)
            print(self.line(seconds), file=sys.stderr, flush=True)
        if alive := self.server.alive():
            self.alive_seconds = seconds
        return alive

    def _new_answers(self) -> int:
        return sum(1 for _ in self.journal.answers())

    def line(self, seconds: float) -> str:
        """Requests answered, HELM runs done, time used and where it will end at the rate so far."""
        done = sum(run.complete for run in helm.run_folders(self.folder))
        rate = (self.answered - self.answered_before) / seconds
        left = self.plan.requests - self.answered
        if self.clock.used >= self.limit:
            end = "nothing more is asked"
        else:
            end = f"end expected at {self.clock.used + left / rate:.0f} s" if rate > 0 else "end unknown"
        return (
            f"{self.answered} of {self.plan.requests} requests answered, {done} of {len(self.plan.runs)} HELM"
            f" runs done, {self.clock.used:.0f} s of {self.limit:.0f} s used, {end}"
        )


def _finished(folder: HelmFolder) -> dict[str, helm.RunFolder]:
    return {run.name: run for run in helm.run_folders(folder) if run.complete}


def _forget_unanswered(folder: HelmFolder) -> None:
    """HELM skips complete runs; one with an unanswered question is to be asked again."""
    for run in _finished(folder).values():
        if run.unanswered():
            shutil.rmtree(run.path)


def _complete(folder: HelmFolder, plan: StagePlan) -> bool:
    finished = _finished(folder)
    return all(planned.run in finished for planned in plan.runs)


def _outcome(
    evaluation: Evaluation, planned: PlannedRun, ending: Ending, prompts: Mapping[PromptKey, str]
) -> Outcome:
    state, reason, answered, limited = State.FINISHED, "", planned.instances, False
    run = _finished(evaluation.work).get(planned.run)
    if run is None:
        answered, limited = 0, ending.overtime
        state, reason = (State.TIME_LIMIT, LIMIT) if limited else (State.CRASHED, _error(evaluation, planned))
    elif unanswered := run.unanswered():
        answered = planned.instances - len(unanswered)
        reasons = Counter(unanswered.values())
        limited = LIMIT in reasons
        reason = "; ".join(f"{count} unanswered: {why}" for why, count in reasons.most_common(3))
        if any(why.startswith(BROKEN) for why in reasons):
            state = State.CRASHED
        elif evaluation.limits.unanswered == "missing":
            state = State.TIME_LIMIT if limited else State.CRASHED
    helm_run = HelmRun(
        **(_shortened(run, prompts) if run else {}),
        scenario=planned.scenario,
        run=planned.run,
        state=state,
        reason=reason,
        instances=planned.instances,
        answered=answered,
    )
    return Outcome(helm_run, limited)


def _shortened(run: helm.RunFolder, prompts: Mapping[PromptKey, str]) -> dict[str, int]:
    """Count prompts of a run that the entry's window shortened, and answers that are empty."""
    counts = {"prompts_short": 0, "prompts_cut": 0, "empty_answers": 0}
    for state in run.read("scenario_state.json")["request_states"]:
        sent = helm.prompt_of(state)
        whole = prompts.get((run.name, state["instance"]["id"], helm.variant(state)), sent)
        if sent != whole:
            counts["prompts_short" if helm.question_kept(sent, whole) else "prompts_cut"] += 1
        completions = state["result"]["completions"]
        counts["empty_answers"] += bool(completions) and not completions[0]["text"].strip()
    return counts


def _error(evaluation: Evaluation, planned: PlannedRun) -> str:
    """A failed run's error in HELM's log; of the closed stage only what quotes no text."""
    error = helm.log_error(evaluation.work, planned.run) or helm.log_error(evaluation.work)
    return error if evaluation.stage == "open" else helm.public_error(error)


def _tables(
    folder: HelmFolder, where: dict[str, str], leaving: Mapping[str, Sequence[str]] | None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of METRICS_SCHEMA and INSTANCES_SCHEMA of all finished runs, in a fixed order.

    `leaving` are the metrics that leave the stage, by scenario; None: all.
    """
    metrics: list[dict[str, Any]] = []
    instances: list[dict[str, Any]] = []
    for name, run in sorted(_finished(folder).items()):
        at = {**where, "scenario": run.scenario, "run": name}
        counts: dict[tuple[str, str, str | None], int] = {}
        allowed = None if leaving is None else leaving.get(run.scenario, ())
        for row in _sorted(_only(allowed, helm.instance_statistics(run))):
            instances.append({**at, **row})
            key = (row["metric"], row["split"], row["perturbation"])
            counts[key] = counts.get(key, 0) + (row["value"] is not None)
        for row in _sorted(_only(allowed, helm.statistics(run))):
            key = (row["metric"], row["split"], row["perturbation"])
            metrics.append({**at, **row, "n": counts.get(key, 0)})
    return metrics, instances


def _only(metrics: Sequence[str] | None, rows: Iterable[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    return rows if metrics is None else (row for row in rows if row["metric"] in metrics)


def _sorted(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(
        rows,
        key=lambda row: (row["metric"], row["split"], row["perturbation"] or "", row.get("instance", "")),
    )


def _write_table(path: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    with atomic_path(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), temporary)
