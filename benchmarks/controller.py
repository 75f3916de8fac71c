"""Measure the controller of a whole competition on its own: SLURM and every step are stand-ins.

    python benchmarks/controller.py                              200 and 2 000 entries
    python benchmarks/controller.py 200 --snakemake='--jobs 50'  with options of Snakemake

Snakemake, its SLURM executor, our rules and their planning are real: one `snakemake --profile slurm` from an
empty folder to the report. SLURM's commands, and the `palio` that checks entries beside Snakemake, are
programs that ask this one. It writes the step's record at once and reports the job as completed, so nothing
waits for anything but the controller. CPU seconds and memory are those of the controller's process; its child
processes (shells, SLURM's commands) are listed separately.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import chdir, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))
from orchestration import competition  # noqa: E402 (a script's path is its own folder)
from tests.support.records import (  # noqa: E402
    leave_base_model,
    leave_leaderboard,
    leave_record,
    leave_released,
    leave_report,
    leave_stage,
    leave_tables,
)

from palio.demo.data import FAMILIES as DEMO_FAMILIES  # noqa: E402
from palio.layout import CONFIG, STAGES  # noqa: E402
from palio.pipeline import BY_NAME, BY_RULE, Step  # noqa: E402
from palio.workflow import Workflow  # noqa: E402

MIN_JOB_AGE = 300
"""Seconds that squeue lists a finished job: SLURM's default."""
ASK = """\
#!{python} -SE
import socket, sys
asked = socket.socket(socket.AF_UNIX)
asked.connect({address!r})
asked.sendall("\\0".join([{name!r}, *sys.argv[1:]]).encode())
asked.shutdown(socket.SHUT_WR)
sys.stdout.write(asked.makefile().read())
"""
PROGRAMS = ("sbatch", "squeue", "sacct", "scontrol", "palio")


@dataclass
class StandIn:
    """SLURM and `palio` for the competition in the current folder."""

    workflow: Workflow
    ended: dict[int, float] = field(default_factory=dict)
    """When each job ended."""
    queries: int = 0

    def answer(self, program: str, words: list[str]) -> str:
        match program:
            case "sbatch":
                (target,) = re.findall(r"--target-jobs '?([^\s']+)", " ".join(words))
                rule, _, given = target.partition(":")
                self.run(rule, dict(pair.split("=", 1) for pair in given.split(",") if pair))
                self.ended[job := len(self.ended) + 1] = time.time()
                return f"{job}\n"
            case "squeue":
                self.queries += 1
                recent = time.time() - MIN_JOB_AGE
                known = (job for job, ended in self.ended.items() if ended > recent)
                return "".join(f"{job}|COMPLETED\n" for job in known) if "--format=%i|%T" in words else ""
            case "scontrol":
                self.queries += 1
                return f"MinJobAge = {MIN_JOB_AGE} sec\n"
            case "sacct":
                return "none\n"  # no account
            case "palio" if words[:1] == ["step"]:
                _, track, entry = Path(words[2]).parts
                self.step(BY_NAME[words[1]], track, entry)
        return ""

    def run(self, rule: str, wildcards: dict[str, str]) -> None:
        """Write what a job of this rule writes."""
        if rule in BY_RULE:
            self.step(BY_RULE[rule], wildcards["track"], wildcards["entry"])
            return
        match rule:
            case "generate_demo_data":
                sources = Path("resources/demo_sources")
                sources.mkdir(parents=True, exist_ok=True)
                for family in DEMO_FAMILIES:
                    (sources / f"{family}.jsonl").touch()
            case "fetch_base_model":
                leave_base_model(self.workflow, wildcards["base_model"])
            case "prepare_stage":
                leave_stage(self.workflow, next(stage for stage in STAGES if stage == wildcards["stage"]))
            case "score":
                leave_tables(self.workflow.results.leaderboards.path, wildcards["track"])
                leave_leaderboard(self.workflow, wildcards["track"])
            case "report":
                leave_report()
            case _:
                raise ValueError(f"no stand-in for rule {rule}")

    def step(self, step: Step, track: str, entry: str) -> None:
        folder = self.workflow.results.entry(track, entry)
        leave_record(step, folder, step.settings.of(self.workflow.planned(entry), step.name), self.workflow)
        leave_released(step, folder)


def programs(folder: Path, address: str) -> str:
    """Install the stand-ins in `folder`; return a PATH that begins with it."""
    folder.mkdir()
    for name in PROGRAMS:
        (folder / name).write_text(ASK.format(python=sys.executable, address=address, name=name))
        (folder / name).chmod(0o755)
    return f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"


def serve(stand_in: StandIn, address: str) -> socketserver.UnixStreamServer:
    """Answer the programs in a thread, one at a time."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            program, *words = self.rfile.read().decode().split("\0")
            self.wfile.write(stand_in.answer(program, words).encode())

    server = socketserver.UnixStreamServer(address, Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def watch(snakemake: subprocess.Popen[bytes]) -> tuple[float, float, int]:
    """Wait for the process; return its CPU seconds, its children's, and its peak memory in bytes."""
    own = others = 0.0
    memory = 0
    while snakemake.poll() is None:
        with suppress(psutil.Error):
            process = psutil.Process(snakemake.pid)
            times = process.cpu_times()
            own, others = times.user + times.system, times.children_user + times.children_system
            memory = max(memory, process.memory_info().rss)
        time.sleep(0.2)
    return own, others, memory


def row(entries: int, options: list[str]) -> str:
    with tempfile.TemporaryDirectory(prefix="palio-controller-") as temporary:
        folder = competition(Path(temporary) / "competition", entries)
        address = f"{temporary}/asked"
        environment = os.environ | {"PATH": programs(Path(temporary) / "bin", address)}
        log = Path(temporary) / "log"
        with chdir(folder):
            stand_in = StandIn(Workflow(CONFIG))
            server = serve(stand_in, address)
            command = [str(Path(sys.executable).with_name("snakemake")), "--profile", "slurm", *options]
            began = time.monotonic()
            with log.open("w") as file:
                snakemake = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
                own, others, memory = watch(snakemake)
            seconds = time.monotonic() - began
            server.shutdown()
            if snakemake.returncode or not Path("results/report/index.html").exists():
                sys.exit(log.read_text())
            files = sum(path.is_file() for path in Path(".snakemake").rglob("*"))
        done = re.findall(r"(\d+) of \1 steps", log.read_text())
        jobs = int(done[-1])
        return (
            f"| {entries} | {jobs} | {seconds:.0f} | {own:.0f} | {1000 * own / jobs:.0f} | {others:.0f} "
            f"| {memory / 1e6:.0f} | {60 * stand_in.queries / seconds:.0f} | {files} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("entries", nargs="*", type=int, default=[200, 2000], help="one row of the table each")
    parser.add_argument(
        "--snakemake", metavar="OPTIONS", type=shlex.split, default=[], help="to start it with"
    )
    asked = parser.parse_args()
    print(
        "| entries | jobs | s | CPU s | a job, CPU ms | started, CPU s | peak MB | queries a minute | files |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for entries in asked.entries:
        print(row(entries, asked.snakemake), flush=True)


if __name__ == "__main__":
    main()
