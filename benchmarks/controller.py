"""What the controller of a whole competition costs, alone: SLURM and every step are stand-ins.

    python benchmarks/controller.py                    200 and 2 000 entries
    python benchmarks/controller.py 200 --database     Snakemake's records in one SQLite file
    python benchmarks/controller.py 200 --limit 99/1s  a limit on submissions

Snakemake, its SLURM executor, our rules and their planning are real: one `snakemake --profile slurm` from an
empty folder to the report. `sbatch` and its like, and the `palio` that checks entries beside Snakemake, are
programs that ask this one. It leaves the step's record at once and calls the job completed, so that nothing
waits for anything but the controller. CPU seconds and memory are those of the controller's process; what it
starts (shells, SLURM's commands) is told apart.
"""

from __future__ import annotations

import argparse
import os
import re
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
from tests.support.records import leave_record  # noqa: E402

from palio.demo.data import FAMILIES as DEMO_FAMILIES  # noqa: E402
from palio.layout import CONFIG, STAGES  # noqa: E402
from palio.pipeline import BY_NAME, BY_RULE, Step  # noqa: E402
from palio.provenance import write_json  # noqa: E402
from palio.workflow import Workflow  # noqa: E402

MIN_JOB_AGE = 300
"""Seconds for which squeue shows a job that has ended: SLURM's default."""
ASK = """\
#!{python} -SE
import socket, sys
asked = socket.socket(socket.AF_UNIX)
asked.connect({address!r})
asked.sendall("\\0".join([{name!r}, *sys.argv[1:]]).encode())
asked.shutdown(socket.SHUT_WR)
sys.stdout.write(asked.makefile().read())
"""
PROGRAMS = ("sbatch", "squeue", "sacct", "scancel", "scontrol", "sinfo", "srun", "palio")


@dataclass
class StandIn:
    """SLURM and `palio` of one competition, in the current folder."""

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
        """What a job of this rule leaves."""
        if rule in BY_RULE:
            self.step(BY_RULE[rule], wildcards["track"], wildcards["entry"])
        elif rule == "generate_demo_data":
            for family in DEMO_FAMILIES:
                path = Path(f"resources/demo_sources/{family}.jsonl")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
        elif rule == "fetch_base_model":
            model = wildcards["base_model"]
            write_json(self.workflow.resources.base_model(model).manifest, {"id": model})
        elif rule == "prepare_stage":
            stage = next(stage for stage in STAGES if stage == wildcards["stage"])
            made = self.workflow.stage_runs[stage].made.model_dump(mode="json")
            write_json(self.workflow.resources.stage_record(stage), {"made": made})
        elif rule == "score":
            board = self.workflow.results.leaderboards.leaderboard(wildcards["track"])
            for suffix in (".csv", ".parquet", ".md", ".tex", ".analysis.json"):
                board.parent.mkdir(parents=True, exist_ok=True)
                board.with_suffix(suffix).touch()
            made = self.workflow.scored_with(wildcards["track"]).model_dump(mode="json")
            write_json(board, {"made": made})
        elif rule == "report":
            for name in ("figures", "answers"):
                Path("results/report", name).mkdir(parents=True, exist_ok=True)
            Path("results/report/index.html").touch()
        else:
            raise ValueError(f"no stand-in for rule {rule}")

    def step(self, step: Step, track: str, entry: str) -> None:
        folder = self.workflow.results.entry(track, entry)
        leave_record(step, folder, step.settings.of(self.workflow.planned(entry), step.name), self.workflow)
        for path in step.released(folder):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()


def programs(folder: Path, address: str) -> str:
    """Install the stand-ins in `folder`; return the PATH on which they come first."""
    folder.mkdir()
    for name in PROGRAMS:
        (folder / name).write_text(ASK.format(python=sys.executable, address=address, name=name))
        (folder / name).chmod(0o755)
    return f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"


def serve(stand_in: StandIn, address: str) -> socketserver.UnixStreamServer:
    """Answer the programs, one after the other, in a thread."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            program, *words = self.rfile.read().decode().split("\0")
            self.wfile.write(stand_in.answer(program, words).encode())

    server = socketserver.UnixStreamServer(address, Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def watch(snakemake: subprocess.Popen[bytes]) -> tuple[float, float, int]:
    """CPU seconds of the process and of what it started, and its peak memory in bytes, once it has ended."""
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
    parser.add_argument("--database", action="store_true", help="Snakemake's records in one SQLite file")
    parser.add_argument("--limit", help="on submissions, as --max-jobs-per-timespan")
    asked = parser.parse_args()
    options = ["--persistence-backend", "db"] if asked.database else []
    options += ["--max-jobs-per-timespan", asked.limit] if asked.limit else []
    print(
        "| entries | jobs | s | CPU s | a job, CPU ms | started, CPU s | peak MB | queries a minute | files |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for entries in asked.entries:
        print(row(entries, options), flush=True)


if __name__ == "__main__":
    main()
