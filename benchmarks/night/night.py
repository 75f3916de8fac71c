"""One night: a competition on the cluster, the faults that are played in it, and what it comes to.

NIGHT/competition/     the working folder
NIGHT/starts/          the log of each start
NIGHT/night.json       what was seen, once the night is over
NIGHT/reference/       the same competition as it is in the end, run without SLURM and without a fault
NIGHT/bin/             SLURM's commands and `palio`, counted, and slowed down or misled by a fault
NIGHT/hook/            a sitecustomize.py: Python processes leave their CPU seconds, and can be made to crash
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import psutil
from benchmarks.night.entries import Planned
from pydantic import TypeAdapter
from tests.slurm.cluster import Cluster
from tests.slurm.competition import controller, output
from tests.support.folder import WorkingFolder

from palio.layout import EntryFolder
from palio.operating.attempt import Attempt, read_attempts

HOOK = """\
import atexit, json, os, resource, select, signal, sys, threading, time

def crash(signum, frame):
    raise RuntimeError("a bug in Snakemake")

if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGUSR2, crash)

def sleep(seconds):
    select.select([], [], [], seconds)

if os.environ.get("FAKETIME"):
    time.sleep = sleep  # under libfaketime 0.9.10 and FAKE_CLOCK Python's own raises OSError

def leave_usage(process=os.getpid()):
    if os.getpid() != process:
        return  # a fork: its parent counts it
    own, children = (resource.getrusage(of) for of in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    seconds = [one.ru_utime + one.ru_stime for one in (own, children)]
    line = {"argv": [word[:200] for word in sys.argv[:4]], "job": os.environ.get("SLURM_JOB_ID"),
            "own": seconds[0], "children": seconds[1]}
    with open(os.environ["NIGHT_USAGE"], "a") as file:
        file.write(json.dumps(line) + "\\n")

atexit.register(leave_usage)
"""
FAKE_CLOCK = "NO_FAKE_STAT=1 FAKETIME_DONT_FAKE_MONOTONIC=1"
"""libfaketime: files keep the true time, and so does the clock that waits are measured with."""
COMMANDS = ("sbatch", "squeue", "scancel", "scontrol", "sinfo", "srun")
SLOW_SECONDS = 12
"""Of an answer of squeue, while it is slow."""
CLOCK_SECONDS = 240
"""How long a clock stays moved at most, if no step that started with it ends before."""
STARTS = 6
"""Of the command, and two for each fault, after which the night is over in any case."""
TICK = 1.0
RECORD = "night.json"
SEEN = ("asked", "events", "starts", "ended", "not_played", "left", "seconds", "reference_seconds")
"""What the record holds, attributes of the night."""


class AnotherNightError(Exception):
    """The folder holds a night of other entries, faults or another seed."""


@dataclass
class Job:
    """A job in SLURM's queue."""

    id: str
    state: str
    rule: str
    track: str
    entry: str
    node: str


@dataclass
class Event:
    """A fault that was played."""

    kind: str
    at: float
    what: str
    entry: str = ""
    """The entry that it hit alone."""
    jobs: set[str] = field(default_factory=set)
    """SLURM jobs that it hit."""
    node: str = ""
    by: float = 0.0
    """Seconds by which it moved the clock of `node`."""
    until: float | None = None
    failure: str = ""
    """Why it does not count as survived, where that is known at once."""
    lost: float = 0.0
    """Seconds of work that had to be done again."""

    def moved_clock_of(self, attempt: Attempt) -> bool:
        """Whether the attempt began under the clock that this fault moved, so has times by that clock."""
        return attempt.node == self.node and -5 < attempt.started - self.at - self.by < CLOCK_SECONDS + 60


@dataclass
class Start:
    """One run of `snakemake --profile slurm`."""

    exit_code: int
    seconds: float
    cpu: float
    """Seconds, of the controller and of what it waited for: checks of entries, SLURM's commands."""
    memory: int
    """Peak, in bytes, of the controller alone."""
    log: str


@dataclass
class Night:
    """What is going on, and what was seen so far."""

    place: Path
    folder: WorkingFolder
    cluster: Cluster
    planned: list[Planned]
    draw: random.Random
    asked: dict[str, Any]
    """What decides the night: entries, faults, seed, stand-ins."""
    stand_ins: dict[str, str] | None = None
    """Environment in which `palio` only writes records; None: real steps."""
    events: list[Event] = field(default_factory=list)
    starts: list[Start] = field(default_factory=list)
    ended: dict[str, tuple[str, str, str]] = field(default_factory=dict)
    """Step, state and reason of each broken entry, as the organizer found it."""
    snakemake: subprocess.Popen[bytes] | None = None
    blind: bool = False
    """slurmctld does not answer."""
    mounted: list[Path] = field(default_factory=list)
    not_played: list[str] = field(default_factory=list)
    left: list[Job] = field(default_factory=list)
    """Jobs that were still in the queue at the end."""
    seconds: float = 0.0
    reference_seconds: float = 0.0

    # --- preparations

    def prepare(self) -> None:
        for name in ("bin", "hook", "starts"):
            (self.place / name).mkdir(exist_ok=True)
        (self.place / "hook/sitecustomize.py").write_text(HOOK)
        for command in COMMANDS:
            real = shutil.which(command, path=self.cluster.environment["PATH"])
            slow = f'[ "$0" = {self.place}/bin/squeue ] && [ -e {self.slow} ] && sleep {SLOW_SECONDS}\n'
            text = f'#!/bin/sh\necho "$(date +%s) {command}" >> {self.queries}\n{slow}exec {real} "$@"\n'
            self._install(command, text)
        palio = shutil.which("palio", path=(self.stand_ins or self.cluster.environment)["PATH"])
        clock = self.clock("$SLURMD_NODENAME")
        moved = (
            f'[ -n "$SLURMD_NODENAME" ] && [ -s "{clock}" ] && export LD_PRELOAD={faketime() or ""} '
            f'FAKETIME="$(cat "{clock}")" {FAKE_CLOCK}\n'
        )
        self._install("palio", f'#!/bin/sh\n{moved}exec {palio} "$@"\n')

    def _install(self, name: str, text: str) -> None:
        (self.place / "bin" / name).write_text(text)
        (self.place / "bin" / name).chmod(0o755)

    @property
    def slow(self) -> Path:
        return self.place / "slow_squeue"

    @property
    def queries(self) -> Path:
        return self.place / "queries"

    def clock(self, node: str) -> Path:
        return self.place / f"clock.{node}"

    @property
    def environment(self) -> dict[str, str]:
        known = self.cluster.environment | (self.stand_ins or {})
        path = f"{self.place / 'bin'}:{self.cluster.environment['PATH']}"
        hook = f"{self.place / 'hook'}:{os.environ.get('PYTHONPATH', '')}"
        return known | {"PATH": path, "PYTHONPATH": hook, "NIGHT_USAGE": str(self.place / "usage.jsonl")}

    # --- what is there

    def of(self, entry: Planned) -> EntryFolder:
        return EntryFolder.at(self.folder.path / "results" / entry.track / entry.name)

    def attempts(self) -> list[tuple[Planned, Attempt]]:
        found = []
        for entry in self.planned:
            with suppress(OSError):
                found += [(entry, attempt) for attempt in read_attempts(self.of(entry))]
        return found

    def jobs(self, *states: str) -> list[Job]:
        """Jobs of entries that SLURM has in one of these states."""
        if self.blind:
            return []
        command = ("squeue", "--noheader", "--me", f"--states={','.join(states)}", "--format=%i|%T|%k|%N")
        found = []
        for line in self.cluster.run(*command).stdout.splitlines():
            job, state, comment, node = line.strip().split("|")
            rule, _, wildcards = comment.removeprefix("rule_").partition("_wildcards_")
            track, _, entry = wildcards.partition("_")
            if entry:
                found.append(Job(job, state, rule, track, entry, node))
        return found

    def running(self, *, honest: bool = True) -> list[tuple[Planned, Attempt, Job]]:
        """Steps that run now, of entries that nothing else is to happen to."""
        by_id = {job.id: job for job in self.jobs("RUNNING")}
        return [
            (entry, attempt, by_id[attempt.job])
            for entry, attempt in self.attempts()
            if attempt.state is None and attempt.job in by_id and not entry.role
            if not (honest and entry.broken)
        ]

    def role(self, role: str) -> Planned:
        return next(entry for entry in self.planned if entry.role == role)

    def failure(self, entry: Planned) -> tuple[str, str, str] | None:
        """Step, state and reason of what stopped an entry."""
        for path in sorted(self.of(entry).failure("check").parent.glob("*.json")):
            content = json.loads(path.read_text())
            if content["state"] != "interrupted":  # by a fault, and tried again
                return content["step"], content["state"], content["reason"]
        return None

    def finished(self, entry: Planned) -> bool:
        return self.of(entry).stage_record("closed").exists()

    # --- the night

    def play(self, faults: Sequence[Any]) -> None:
        """Start the same command until nothing is due, `faults` in between: (share of the steps, fault).
        Leave a record of what was seen."""
        begun = time.monotonic()
        waiting = list(faults)
        expected = sum(len(steps_before_the_end(entry)) for entry in self.planned)
        due: list[str] | None = None
        while len(self.starts) < STARTS + 2 * len(self.events):
            played, before = len(self.events), due
            self._start(waiting, expected)
            self._withdraw_the_broken()
            unfinished = (
                one.name for one in self.planned if not self.finished(one) and one.role != "withdrawn"
            )
            due = [name for name in unfinished if name not in self.ended]
            if len(self.events) == played and (not due or due == before):
                break  # nothing that another start would do, or another fault could hit
        self.not_played = [fault.kind for _, fault in waiting]
        self._start([], expected)
        self.left = self.jobs("PENDING", "RUNNING")
        self.seconds = time.monotonic() - begun
        self._save()

    def _save(self) -> None:
        (self.place / RECORD).write_bytes(
            TypeAdapter(dict[str, Any]).dump_json({name: getattr(self, name) for name in SEEN})
        )

    def load(self) -> None:
        """Take up a night that is over. Raises AnotherNightError if another one was asked for."""
        kinds, seen = get_type_hints(Night), json.loads((self.place / RECORD).read_bytes())
        if seen["asked"] != self.asked:
            raise AnotherNightError(f"{self.place} holds the night of {seen['asked']}, not of {self.asked}")
        for name in SEEN:
            setattr(self, name, TypeAdapter(kinds[name]).validate_python(seen[name]))

    def _start(self, waiting: list[Any], expected: int) -> None:
        under = ("unshare", "--mount", "--propagation", "slave") if os.geteuid() == 0 else ()
        begun, cpu, memory, active = time.monotonic(), 0.0, 0, None
        with controller(self.folder, self.cluster, under=under, **self.environment) as snakemake:
            self.snakemake = snakemake
            while snakemake.poll() is None:
                with suppress(psutil.Error):
                    process = psutil.Process(snakemake.pid)
                    cpu, memory = sum(process.cpu_times()[:4]), max(memory, process.memory_info().rss)
                if active is not None and active.over(self):
                    self._end(active, waiting)
                    active = None
                if active is None:
                    active = self._begin(waiting, expected)
                time.sleep(TICK)
        if active is not None:
            self._end(active, waiting)
        log = output(self.folder)
        (self.folder.path / "snakemake.log").rename(self.place / "starts" / f"{len(self.starts)}.log")
        seconds = time.monotonic() - begun
        self.starts.append(Start(snakemake.returncode, seconds, cpu, memory, log))
        say(f"start {len(self.starts)} ended with {snakemake.returncode} after {seconds:.0f} s")

    def _begin(self, waiting: list[Any], expected: int) -> Any:
        if not waiting:
            return None
        share = len(self.attempts()) / expected
        for at, fault in list(waiting):
            if at <= share and (event := fault.begin(self)):
                waiting.remove((at, fault))
                self.events.append(event)
                say(f"{share:.0%} of the steps begun: {event.kind}: {event.what}")
                fault.event = event
                return fault
        return None

    def _end(self, fault: Any, waiting: list[Any]) -> None:
        fault.end(self)
        fault.event.until = time.time()
        if fault.missed:
            say(f"{fault.kind}: {fault.missed}, so it will be played again")
            self.events.remove(fault.event)
            waiting.append((0.0, fault))

    def _withdraw_the_broken(self) -> None:
        """The organizer has read what stopped them."""
        names = []
        for entry in self.planned:
            if entry.broken and entry.name not in self.ended and (failure := self.failure(entry)):
                self.ended[entry.name] = failure
                names.append(entry.name)
        if names:
            withdraw(self.folder, dict.fromkeys(names, "stopped by its own fault"))

    def unmount(self) -> None:
        """Unmount the small disks, and keep the files on them."""
        for path in reversed(self.mounted):
            kept = path.with_name(f"{path.name}.kept")
            shutil.copytree(path, kept, symlinks=True)
            subprocess.run(["umount", "-l", str(path)], check=False, capture_output=True)
            shutil.copytree(kept, path, symlinks=True, dirs_exist_ok=True)
            shutil.rmtree(kept)

    # --- the reference

    def make_reference(self) -> WorkingFolder:
        """The competition as it is now, alone, without SLURM and without a fault. One that was interrupted
        goes on."""
        path, copying = self.place / "reference", self.place / "reference.copying"
        if not path.exists():
            made = ("results", "private", "public", "logs", ".snakemake", "base_models", "stages", "starts")
            shutil.rmtree(copying, ignore_errors=True)
            shutil.copytree(
                self.folder.path, copying, symlinks=True, ignore=shutil.ignore_patterns(*made, "*.jsonl.lock")
            )
            for line in ("ran.jsonl", "done.jsonl", "published.jsonl"):
                (copying / line).unlink(missing_ok=True)
            copying.rename(path)
        command = [str(Path(sys.executable).with_name("snakemake")), "--profile", "local"]
        environment = {
            name: value for name, value in (self.stand_ins or os.environ).items() if name != "PALIO_SLOW"
        }
        begun = time.monotonic()
        try:
            with (self.place / "reference.log").open("a") as log:
                done = subprocess.run(command, cwd=path, env=environment, stdout=log, stderr=log, check=False)
        finally:
            self.reference_seconds += time.monotonic() - begun
            self._save()
        if done.returncode != 0:
            say(f"the reference has failed, see {self.place}/reference.log")
        return WorkingFolder(path)


def withdraw(folder: WorkingFolder, why: dict[str, str]) -> None:
    """`palio withdraw` for each of them, in one process."""
    code = (
        "import json, sys\nfrom palio.layout import CONFIG\nfrom palio.operating.overrides import withdraw\n"
        "from palio.workflow import Workflow\ncompetition = Workflow(CONFIG).competition\n"
        "for name, why in json.loads(sys.argv[1]).items():\n    withdraw(competition, name, why)\n"
    )
    done = folder.run("python", "-c", code, json.dumps(why))
    if done.returncode != 0:
        raise RuntimeError(done.stderr)


def steps_before_the_end(entry: Planned) -> list[str]:
    content = entry.content if isinstance(entry.content, dict) else {}
    steps = ["check"]
    if "dataset" in content:
        steps += ["curate", "contamination", "finetune"]
    steps += ["package", "open", "closed"]
    if entry.broken:
        steps = steps[: steps.index(entry.step) + 1]
    return steps


def faketime() -> Path | None:
    """Debian's libfaketime."""
    return next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def cpu_seconds(
    usage: Iterable[dict[str, Any]],
) -> tuple[dict[str, list[tuple[float, float]]], list[float]]:
    """Return what the lines of HOOK tell: of each run of a step or another command of Palio, by its name, the
    CPU seconds of its own process and of what it started; of each SLURM job, those beside Palio."""
    runs: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
    of_job: Counter[str] = Counter()
    of_palio: Counter[str] = Counter()
    for line in usage:
        program, *words = line["argv"] or [""]
        seconds = line["own"] + line["children"]
        if Path(program).name == "palio" and words:
            runs[words[1] if words[0] == "step" else f"palio {words[0]}"].append(
                (line["own"], line["children"])
            )
            of_palio[line["job"]] += seconds
        elif line["job"] and re.search("snakemake", program):
            of_job[line["job"]] += seconds
    return runs, [of_job[job] - of_palio[job] for job in of_job]
