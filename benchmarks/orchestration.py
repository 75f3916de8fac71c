"""What Snakemake and our rules cost: the plan of N entries, a job's start, a run that finds nothing to do.

    python benchmarks/orchestration.py                   50, 200, 1000 entries
    python benchmarks/orchestration.py 1000 --database   others; Snakemake's records in a database
    python benchmarks/orchestration.py 5000 --plan-only  without the run that finds nothing to do

No step is run. A plan is a dry run on a fresh clone. A job's start is the Snakemake that a SLURM job begins
with (it begins with two, one after the other), up to the step's command. For the run with nothing to do,
every output is made, empty but for the records, and accepted with --touch (a tenth of a second each, asleep),
which also tells what the controller does for each job. Prints wall-clock and CPU seconds and Snakemake's peak
memory.
"""

from __future__ import annotations

import argparse
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import chdir
from pathlib import Path

from palio.layout import CONFIG
from palio.workflow import Workflow

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))
from tests.support.records import leave_all_records  # noqa: E402 (a script's path is its own folder)

ENTRY = "config/entries/demo/curated.yaml"
LIMIT_SECONDS = 30.0
"""What 200 entries may take."""


def competition(folder: Path, entries: int) -> Path:
    """A clone with copies of the demo's curated entry, one team each."""
    for name in ("rules", "config", "profiles", "envs"):
        shutil.copytree(ROOT / name, folder / name)
    shutil.copy(ROOT / "Snakefile", folder)
    for name in ("local", "slurm"):
        (folder / name).symlink_to(f"profiles/{name}")
    text = (ROOT / ENTRY).read_text(encoding="utf-8")
    shutil.rmtree(folder / "config/entries/demo")
    (folder / "config/entries/demo").mkdir()
    for number in range(entries):
        entry = re.sub(r"(?m)^team: .*$", f"team: Team {number}", text)
        (folder / "config/entries/demo" / f"e{number:05}.yaml").write_text(entry, encoding="utf-8")
    return folder


def snakemake(folder: Path, *arguments: str) -> tuple[float, float, float, str]:
    """Wall-clock and CPU seconds, peak memory in MB, output."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    clock = time.monotonic()
    command = [str(Path(sys.executable).with_name("snakemake")), *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - clock
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    if done.returncode != 0:
        sys.exit(done.stdout + done.stderr)
    return seconds, cpu, after.ru_maxrss / 1024, done.stdout + done.stderr


def jobs(output: str) -> int:
    found = re.search(r"(?m)^total\s+(\d+)", output)
    return int(found[1]) if found else 0


def job_start(folder: Path) -> float:
    """CPU seconds of the Snakemake inside a job, with the arguments that the SLURM executor gives it."""
    target = ("--target-jobs", "check_entry:track=laptop,entry=e00000", "--allowed-rules", "check_entry")
    inside = ("--mode", "remote", "--executor", "local", "--cores", "1", "--force", "--nolock")
    config = ("--snakefile", "Snakefile", "--configfile", "config/config.yaml")
    return snakemake(folder, *config, *target, *inside, "--dry-run", "--quiet", "all")[1]


def make_outputs(folder: Path, local: list[str]) -> float:
    """Every output of the plan, older ones first, as Snakemake's own summary lists them; the CPU seconds in
    which the controller took note of all of them."""
    plan = snakemake(folder, *local, "--summary")[3]
    lines = [line.split("\t") for line in plan.splitlines() if "\t" in line]
    for file, *_ in lines[1:]:
        path = folder / file
        (path.parent if path.suffix else path).mkdir(parents=True, exist_ok=True)
        if path.suffix:
            path.touch()
    with chdir(folder):
        leave_all_records(Workflow(CONFIG))
    return snakemake(folder, *local, "--touch", "--forceall", "--quiet", "all")[1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "entries", nargs="*", type=int, default=[50, 200, 1000], help="how many, one row of the table each"
    )
    parser.add_argument("--plan-only", action="store_true", help="leave out the run with nothing to do")
    parser.add_argument("--database", action="store_true", help="Snakemake's records in one SQLite file")
    asked = parser.parse_args()
    local = ["--profile", "local", *(["--persistence-backend", "db"] if asked.database else [])]
    print(
        "| entries | jobs | plan, s (CPU) | peak MB | job's start, CPU s | a job, CPU ms | no-op, s (CPU) |"
    )
    print("|---|---|---|---|---|---|---|")
    slow = []
    for entries in asked.entries:
        with tempfile.TemporaryDirectory() as temporary:
            folder = competition(Path(temporary), entries)
            plan, cpu, memory, output = snakemake(folder, *local, "--dry-run", "--quiet", "rules")
            start = job_start(folder)
            row = f"| {entries} | {jobs(output)} | {plan:.1f} ({cpu:.1f}) | {memory:.0f} | {start:.1f} |"
            if asked.plan_only:
                print(f"{row} – | – |", flush=True)
                continue
            each = make_outputs(folder, local) / jobs(output) * 1000
            again, again_cpu, _, nothing = snakemake(folder, *local)
            assert "Nothing to be done" in nothing, nothing[-2000:]
            print(f"{row} {each:.0f} | {again:.1f} ({again_cpu:.1f}) |", flush=True)
            if entries <= 200 and max(plan, again) > LIMIT_SECONDS:
                slow.append(entries)
    if slow:
        sys.exit(f"over {LIMIT_SECONDS:g} s for {slow} entries")


if __name__ == "__main__":
    main()
