"""What happens in a night: each fault a class that knows when it can be played, how, and how it ends.

`begin` plays it, or returns None while nothing is there to hit; `over` says that `end` is due. Faults hit
entries that have no defect, so that whatever they cost shows on a leaderboard. Decisions of teams and
organizers are faults too: they come in the middle of the run if the draw has them, and else before it, so
that every night of the same seed ends with the same competition.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from typing import ClassVar

from benchmarks.night.entries import SCRIPTED_SERVER, SERVE, TEAMS, Planned
from benchmarks.night.night import CLOCK_SECONDS, Event, Job, Night, faketime
from tests.slurm.competition import TRACKS, output

from palio.operating.attempt import Attempt
from palio.operating.slurm import LAUNCH_FAILED

Running = tuple[Planned, Attempt, Job]
HIGHEST_PRIORITY = 4_294_901_760
"""What SLURM's basic priorities start at: the first job has it, each later one a lower one."""


class Fault:
    """One fault of a night; `kind` names it, `how` says how it is played here."""

    kind: ClassVar[str]
    how: ClassVar[str]
    seconds: ClassVar[float] = 0.0
    """How long it lasts, where nothing else ends it."""
    event: Event
    missed: str = ""
    """Why it hit nothing, as its `end` found; then it was not played, and will be."""

    def begin(self, night: Night) -> Event | None:
        raise NotImplementedError

    def over(self, night: Night) -> bool:
        return time.time() - self.event.at > self.seconds

    def end(self, night: Night) -> None:
        """Undo it; nothing by default."""

    def hit(self, what: str, *running: Running) -> Event:
        entry = running[0][0].name if len(running) == 1 else ""
        jobs = {job.id for _, _, job in running}
        return Event(self.kind, time.time(), what, entry, jobs)


# --- of the machines


class NodeLost(Fault):
    kind = "node lost and back"
    how = "slurmd and all processes of its jobs killed; slurmd started again once SLURM has seen it"

    def begin(self, night: Night) -> Event | None:
        if not (running := night.running()):
            return None
        self.node = night.draw.choice(running)[2].node
        event = self.hit(self.node, *(one for one in running if one[2].node == self.node))
        night.cluster.lose_node(self.node)
        return event

    def over(self, night: Night) -> bool:
        down = "down" in night.cluster.node_states().get(self.node, "")
        return down or time.time() - self.event.at > 60

    def end(self, night: Night) -> None:
        night.cluster.start_node(self.node)


class NodeStartsNoJob(Fault):
    kind = "node that starts no job"
    how = (
        "slurmd's spool folder replaced by a file, until SLURM holds a job that it could not start, at most "
        "a minute"
    )

    def begin(self, night: Night) -> Event | None:
        if not (running := night.running()):
            return None
        node = night.draw.choice(running)[2].node
        self.broken = night.cluster.unable_to_start_jobs(node)
        self.broken.__enter__()
        return self.hit(node)

    def over(self, night: Night) -> bool:
        return bool(held(night)) or time.time() - self.event.at > 60

    def end(self, night: Night) -> None:
        self.broken.__exit__(None, None, None)
        self.missed = "" if held(night) else "no job was to start there"


class SlurmctldKilled(Fault):
    kind = "slurmctld killed and restarted"
    how = (
        "SIGKILL, started again after 8 s; nodes that it drained then, for jobs that it did not know to "
        "run, are resumed as by an administrator"
    )
    away = 8.0
    seconds = 28.0

    def begin(self, night: Night) -> Event | None:
        if not night.running():
            return None
        night.blind = True
        night.cluster.stop_controller()
        return self.hit("slurmctld")

    def over(self, night: Night) -> bool:
        if night.blind and time.time() - self.event.at > self.away:
            self._start(night)
        return super().over(night)

    def end(self, night: Night) -> None:
        if night.blind:
            self._start(night)
        drained = [node for node, state in night.cluster.node_states().items() if "drain" in state]
        for node in drained:
            night.cluster.run("scontrol", "update", f"NodeName={node}", "State=RESUME", check=True)
        self.event.what += f"; it drained {', '.join(drained)}" if drained else ""

    def _start(self, night: Night) -> None:
        night.cluster.start_controller()
        night.blind = False


class ControllerKilled(Fault):
    kind = "controller killed"
    how = "SIGKILL to Snakemake, the same command again"

    def begin(self, night: Night) -> Event | None:
        if night.snakemake is None or not (running := night.running(honest=False)):
            return None
        event = self.hit(f"{len(running)} steps were running", *running)
        self.stop(night.snakemake)
        return event

    def stop(self, snakemake: subprocess.Popen[bytes]) -> None:
        snakemake.kill()


class ControllerCrashed(ControllerKilled):
    kind = "controller crashed"
    how = "an exception raised in Snakemake's main thread, the same command again"

    def stop(self, snakemake: subprocess.Popen[bytes]) -> None:
        snakemake.send_signal(signal.SIGUSR2)

    def over(self, night: Night) -> bool:
        return False  # with its start


class SbatchRefused(Fault):
    kind = "sbatch refused for a while"
    how = "the partition drained (scontrol) until a submission was refused, at most 90 s"

    def begin(self, night: Night) -> Event | None:
        self.before = self.refused(night)
        self.partition = night.draw.choice([*TRACKS, "cpu"])
        self.set(night, "DRAIN")
        return self.hit(f"partition {self.partition}")

    def over(self, night: Night) -> bool:
        return self.refused(night) > self.before or time.time() - self.event.at > 90

    def end(self, night: Night) -> None:
        self.set(night, "UP")
        refused = self.refused(night) - self.before
        self.event.what += f", {refused} submissions refused"
        self.missed = "" if refused else "nothing was submitted to it"

    def set(self, night: Night, state: str) -> None:
        night.cluster.run(
            "scontrol", "update", f"PartitionName={self.partition}", f"State={state}", check=True
        )

    def refused(self, night: Night) -> int:
        return output(night.folder).count("Required partition not available")


class SlowSqueue(Fault):
    kind = "slow squeue"
    how = "a script of that name, first on PATH, that waits 12 s before it calls SLURM's own; for 60 s"
    seconds = 60.0

    def begin(self, night: Night) -> Event | None:
        night.slow.touch()
        return self.hit("squeue")

    def end(self, night: Night) -> None:
        night.slow.unlink()


class DiskFull(Fault):
    kind = "disk full"
    how = "one entry's folder on a tmpfs of its own, without a free byte for 30 s of its next step"

    def begin(self, night: Night) -> Event | None:
        pending = {
            job.entry: job
            for job in night.jobs("PENDING")
            if job.rule in ("finetune", "build_package", "helm_open")
        }
        quiet = [one for one in night.planned if one.name in pending and not one.broken and not one.role]
        if not quiet:
            return None
        entry = night.draw.choice(quiet)
        job = pending[entry.name]
        if night.cluster.run("scontrol", "hold", job.id).returncode != 0 or not any(
            one.id == job.id for one in night.jobs("PENDING")
        ):
            night.cluster.run("scontrol", "release", job.id)
            return None
        folder = night.of(entry).path
        self.disk = night.folder.path / "results" / entry.track / entry.name
        aside = folder.with_name(f"{folder.name}.moving")
        folder.rename(aside)
        folder.mkdir()
        _run("mount", "-t", "tmpfs", "-o", "size=300m", "tmpfs", str(self.disk))
        night.mounted.append(self.disk)
        shutil.copytree(aside, folder, dirs_exist_ok=True, symlinks=True)
        shutil.rmtree(aside)
        usage = os.statvfs(self.disk)
        used = (usage.f_blocks - usage.f_bfree) * usage.f_frsize
        _run("mount", "-o", f"remount,size={used}", str(self.disk))
        night.cluster.run("scontrol", "release", job.id)
        # a released job goes to the end of the queue, and no other fault is played until it has run
        night.cluster.run("scontrol", "update", f"JobId={job.id}", f"Priority={HIGHEST_PRIORITY}", check=True)
        self.job = job
        return Event(self.kind, time.time(), f"{entry.name}, {job.rule}", entry.name, {job.id})

    def over(self, night: Night) -> bool:
        ran = not any(job.id == self.job.id for job in night.jobs("PENDING"))
        self.full_since = getattr(self, "full_since", time.time()) if ran else time.time()
        return time.time() - self.full_since > 30

    def end(self, night: Night) -> None:
        _run("mount", "-o", "remount,size=300m", str(self.disk))


class OverTime(Fault):
    kind = "job over its time"
    how = "its process stopped with SIGSTOP and its time limit set to a minute (scontrol): SLURM ends it"

    def begin(self, night: Night) -> Event | None:
        if not (running := night.running()):
            return None
        entry, attempt, job = night.draw.choice(running)
        with suppress(ProcessLookupError):
            os.kill(attempt.pid, signal.SIGSTOP)
            night.cluster.run("scontrol", "update", f"JobId={job.id}", "TimeLimit=1")
            return self.hit(f"{entry.name}, {attempt.step}", (entry, attempt, job))
        return None

    def over(self, night: Night) -> bool:
        return not any(job.id in self.event.jobs for job in night.jobs("RUNNING", "COMPLETING"))


class OverMemory(Fault):
    kind = "job over its memory"
    how = "its request lowered to 100 MB while it waited (scontrol): SLURM's accounting thread kills it"

    def begin(self, night: Night) -> Event | None:
        honest = {one.name for one in night.planned if not one.broken and not one.role}
        for job in night.jobs("PENDING"):
            if job.entry in honest:
                done = night.cluster.run("scontrol", "update", f"JobId={job.id}", "MinMemoryNode=100")
                if done.returncode == 0:
                    return Event(self.kind, time.time(), f"{job.entry}, {job.rule}", job.entry, {job.id})
        return None


class ProcessKilled(Fault):
    kind = "process killed"
    how = "SIGKILL to a step's process, as the kernel's OOM killer does"

    def begin(self, night: Night) -> Event | None:
        if not (running := night.running()):
            return None
        one = night.draw.choice(running)
        with suppress(ProcessLookupError):
            os.kill(one[1].pid, signal.SIGKILL)
            return self.hit(f"{one[0].name}, {one[1].step}", one)
        return None


class ClockMoved(Fault):
    kind = "clock moved"
    how = "libfaketime: steps that start on one node are an hour slow or fast; files keep the true time"

    def begin(self, night: Night) -> Event | None:
        if not (running := night.running()):
            return None
        node, by = night.draw.choice(running)[2].node, night.draw.choice(("-3600", "+3600"))
        event = self.hit(f"{node}, {by} s")
        event.node, event.by = node, float(by)
        night.clock(node).write_text(by)
        return event

    def over(self, night: Night) -> bool:
        began = self._began_with_it(night)
        return any(one.state is not None for one in began) or time.time() - self.event.at > CLOCK_SECONDS

    def end(self, night: Night) -> None:
        night.clock(self.event.node).unlink()
        time.sleep(3)  # until a step that still saw it has told that it began
        began = self._began_with_it(night)
        self.event.jobs = {one.job for one in began if one.job}
        self.event.what += f": {len(began)} steps started with it"
        self.missed = "" if began else "no step started with it"

    def _began_with_it(self, night: Night) -> list[Attempt]:
        return [one for _, one in night.attempts() if self.event.moved_clock_of(one)]


class FilesLate(Fault):
    kind = "files shown late"
    how = (
        "an entry's folder as it was, mounted over it in the controller's mount namespace until 3 to 15 s "
        "after its step has ended"
    )

    def begin(self, night: Night) -> Event | None:
        running = [one for one in night.running() if one[1].step in ("package", "open")]
        if not running or night.snakemake is None:
            return None
        self.entry, attempt, job = one = night.draw.choice(running)
        self.late = night.draw.uniform(3, 15)
        self.live = night.folder.path / "results" / self.entry.track / self.entry.name
        stale = night.place / f"stale.{self.entry.name}.{attempt.step}.{attempt.number}"
        with suppress(OSError, shutil.Error):  # it is being written
            shutil.copytree(self.live, stale, symlinks=True)
        self.inside(night, "mount", "--bind", str(stale), str(self.live))
        self.job, self.done_at = job, 0.0
        return self.hit(f"{self.entry.name}, {attempt.step}, {self.late:.0f} s", one)

    def over(self, night: Night) -> bool:
        if not any(job.id == self.job.id for job in night.jobs("RUNNING", "COMPLETING")):
            self.done_at = self.done_at or time.time()
        return self.done_at > 0 and time.time() - self.done_at > self.late

    def end(self, night: Night) -> None:
        if night.snakemake and night.snakemake.poll() is None:
            self.inside(night, "umount", "-l", str(self.live))

    def inside(self, night: Night, *command: str) -> None:
        assert night.snakemake is not None
        _run("nsenter", "--target", str(night.snakemake.pid), "--mount", *command)


# --- of the organizer


class TwoControllers(Fault):
    kind = "two controllers at once"
    how = "the same command beside the running one"

    def begin(self, night: Night) -> Event | None:
        if not night.running(honest=False):
            return None
        second = night.folder.run("snakemake", "--profile", "slurm", environment=night.environment)
        refused = second.returncode != 0 and "another Snakemake is running" in second.stderr
        event = self.hit("refused by name" if refused else "not refused")
        event.failure = "" if refused else second.stderr[-500:]
        return event


class Cancelled(Fault):
    kind = "job cancelled"
    how = "scancel"

    def begin(self, night: Night) -> Event | None:
        if not (running := night.running()):
            return None
        one = night.draw.choice(running)
        night.cluster.run("scancel", one[2].id)
        return self.hit(f"{one[0].name}, {one[1].step}", one)


# --- decisions


class Decision(Fault):
    """Something that changes the competition: `decide` is what is done, whenever."""

    role: ClassVar[str]

    def begin(self, night: Night) -> Event | None:
        if not self.ready(night):
            return None
        self.decide(night)
        return Event(self.kind, time.time(), self.role, self.role)

    def ready(self, night: Night) -> bool:
        return True

    def decide(self, night: Night) -> None:
        raise NotImplementedError

    @staticmethod
    def before(night: Night) -> None:
        """What the folder is like before it."""


class Edited(Decision):
    kind = "entry edited"
    how = "another learning rate, once it has been trained"
    role = "edited"

    def ready(self, night: Night) -> bool:
        return night.of(night.role("edited")).adapter_manifest.exists()

    def decide(self, night: Night) -> None:
        night.folder.edit_entry("edited", lambda entry: entry["finetune"].update(learning_rate=7e-4))


class Late(Decision):
    kind = "entry added late"
    how = "its file written while others run"
    role = "late"

    def decide(self, night: Night) -> None:
        night.role(self.role).write(night.folder)

    @classmethod
    def before(cls, night: Night) -> None:
        (night.folder.path / night.role(cls.role).file).unlink()


class Poisoned(Late):
    kind = "poisoned entry"
    how = "added late: its server dies of one request, and so would every other attempt"
    role = "poisoned"


class WithdrawnEntry(Decision):
    kind = "entry withdrawn"
    how = "palio withdraw, once one of its steps has begun"
    role = "withdrawn"

    def ready(self, night: Night) -> bool:
        return any(entry.role == "withdrawn" for entry, _ in night.attempts())

    def decide(self, night: Night) -> None:
        command = ("palio", "withdraw", "withdrawn", "--why", "the team asked to")
        done = night.folder.run(*command, environment=night.environment)
        if done.returncode != 0:
            raise RuntimeError(done.stderr)


class Mended(Decision):
    kind = "server mended"
    how = "its team hands in a program that starts, once the first one has failed"
    role = "mended"

    def ready(self, night: Night) -> bool:
        return night.failure(night.role("mended")) is not None

    def decide(self, night: Night) -> None:
        code = f"NAME = 'mended'\n{SCRIPTED_SERVER}{SERVE}"
        (night.folder.path / TEAMS / "mended/main.py").write_text(code)

    @staticmethod
    def before(night: Night) -> None:
        (night.folder.path / TEAMS / "mended/main.py").write_text("raise SystemExit(3)")


DECISIONS: tuple[type[Decision], ...] = (Edited, Late, Poisoned, WithdrawnEntry, Mended)
FAULTS: tuple[type[Fault], ...] = (
    NodeLost, NodeStartsNoJob, SlurmctldKilled, ControllerKilled, ControllerCrashed, SbatchRefused,
    SlowSqueue, DiskFull, OverTime, OverMemory, ProcessKilled, ClockMoved, FilesLate, TwoControllers,
    Cancelled, *DECISIONS,
)  # fmt: skip


def unplayable(stand_ins: bool) -> dict[str, str]:
    """Kinds that this machine, or a night of stand-ins, cannot play, and why."""
    reasons = {}
    if stand_ins:
        reasons[Mended.kind] = "no server is started"
    if os.geteuid() != 0:
        reasons |= {fault.kind: "needs root, to mount" for fault in (DiskFull, FilesLate)}
    if faketime() is None:
        reasons[ClockMoved.kind] = "apt-get install libfaketime"
    return reasons


def playable(stand_ins: bool) -> list[type[Fault]]:
    return [fault for fault in FAULTS if fault.kind not in unplayable(stand_ins)]


def drawn(count: int, draw: random.Random, kinds: list[type[Fault]]) -> list[tuple[float, Fault]]:
    """So many faults with the share of all steps after which each is due; each kind once before any comes
    again, decisions once at most."""
    again = [kind for kind in kinds if kind not in DECISIONS]
    chosen = draw.sample(kinds, min(count, len(kinds)))
    chosen += draw.choices(again, k=count - len(chosen))
    places = sorted(draw.uniform(0.05, 0.75) for _ in chosen)
    return [(place, kind()) for place, kind in zip(places, chosen, strict=True)]


def decide(night: Night, faults: list[tuple[float, Fault]]) -> None:
    """Take before the night the decisions that are not among its faults; prepare it for those that are."""
    among = {type(fault) for _, fault in faults}
    for kind in DECISIONS:
        kind.before(night)
        if kind not in among:
            kind().decide(night)


def held(night: Night) -> list[str]:
    """Jobs that SLURM holds because a node could not start them."""
    return [line for line in night.cluster.jobs("%i %R") if LAUNCH_FAILED in line]


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
