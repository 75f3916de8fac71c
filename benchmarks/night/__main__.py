"""A whole night of a competition on a SLURM cluster of one host, with faults from a seed, and what it took.

    python -m benchmarks.night --entries 20 --faults 8 --seed 1
    python -m benchmarks.night --entries 200 --faults all --seed 1 --at night200
    python -m benchmarks.night --entries 200 --faults 18 --seed 1 --reference night200/reference

Entries of every kind, half of them broken, run through the real executor with real steps on tiny models;
faults are played in between; the same `snakemake --profile slurm` is typed until nothing is due, and broken
entries are withdrawn once they have ended. Then every entry must be where it belongs, and the leaderboards
must be, byte for byte, those of the same competition run without SLURM and without a fault. Prints one
table; exit code 1 if anything is wrong. A night that is over in --at is not played again: its reference goes
on where it was interrupted.

Wants SLURM and munge (envs/debian.txt). As root it can also fill a disk and show files late; libfaketime
moves clocks. `--stand-ins` replaces the steps by ones that only write records, as
tests/slurm/test_whole_night.py does.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks.night import entries, faults, result
from benchmarks.night.night import RECORD, AnotherNightError, Night, say
from tests.slurm.cluster import Cluster, Node, missing_programs
from tests.support import quick
from tests.support.folder import WorkingFolder

NODES = (
    Node("a1", "a100", 1, cpus=2),
    Node("a2", "a100", 1, cpus=2),
    Node("r1", "rtx4090", 1, cpus=2),
    Node("r2", "rtx4090", 1, cpus=2),
    Node("c1", cpus=4),
)
"""As much at once as two cores carry."""


@dataclass(frozen=True)
class Outcome:
    night: Night
    wrong: list[str]
    table: str


def spend(
    place: Path,
    cluster: Cluster,
    count: int,
    number: int | None,
    seed: int,
    *,
    stand_ins: bool = False,
    reference: Path | None = None,
) -> Outcome:
    """One night of `count` entries and `number` faults (None: each kind once) in the folder `place`, and what
    it came to. One that is over there is not played again; AnotherNightError if it is not this one."""
    place.mkdir(parents=True, exist_ok=True)
    over = (place / RECORD).exists()
    models = entries.model_folders(place)
    if not stand_ins and not over:
        entries.make_models(models)
    planned = entries.plan(count, seed, models)
    environment = quick.program(place / "quick") if stand_ins else None
    if environment is not None:
        planned = entries.with_stand_ins(planned)
        environment |= entries.stand_in_variables(planned)
    folder = WorkingFolder(place / "competition")
    asked = {"entries": count, "faults": number, "seed": seed, "stand_ins": stand_ins}
    night = Night(place, folder, cluster, planned, random.Random(seed), asked, environment)
    if over:
        night.load()
    else:
        _play(night, models, number)
    wrong = result.wrong(night, WorkingFolder(reference) if reference else night.make_reference())
    table = result.table(night, wrong)
    (place / "table.md").write_text(f"{table}\n")
    return Outcome(night, wrong, table)


def _play(night: Night, models: dict[str, Path], number: int | None) -> None:
    entries.create(night.folder.path, models)
    for entry in night.planned:
        entry.write(night.folder)
    night.prepare()
    stand_ins = night.stand_ins is not None
    kinds = faults.playable(stand_ins)
    for kind, why in faults.unplayable(stand_ins).items():
        say(f"not played here: {kind}: {why}")
    due = faults.drawn(len(kinds) if number is None else number, night.draw, kinds)
    faults.decide(night, due)
    say(f"{len(night.planned)} entries: {result.names(night.planned)}")
    try:
        night.play(due)
    finally:
        night.unmount()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--entries", type=int, default=20, help="how many, at least ten")
    parser.add_argument("--faults", default="8", help="how many, or `all`: each kind once")
    parser.add_argument("--seed", type=int, default=1, help="of entries and faults")
    parser.add_argument("--at", type=Path, help="folder to leave the night in; default: a temporary one")
    parser.add_argument(
        "--reference", type=Path, help="the reference folder of an earlier night of this seed and size"
    )
    parser.add_argument("--stand-ins", action="store_true", help="steps that only write records")
    asked = parser.parse_args()
    if missing := missing_programs():
        sys.exit(f"{', '.join(missing)} not installed: apt-get install slurm-wlm munge")
    if asked.entries < entries.LEAST:
        parser.error(f"--entries: at least {entries.LEAST}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: the cluster ends with its program
    with ExitStack() as stack:
        place = asked.at or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="palio-night-")))
        if place.exists() and any(place.iterdir()) and not (place / RECORD).exists():
            parser.error(f"--at: {place} is not empty, and holds no finished night")
        slurm = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="palio-slurm-")))
        cluster = stack.enter_context(Cluster(slurm, NODES))
        number = None if asked.faults == "all" else int(asked.faults)
        try:
            outcome = spend(
                place.resolve(), cluster, asked.entries, number, asked.seed,
                stand_ins=asked.stand_ins, reference=asked.reference,
            )  # fmt: skip
        except AnotherNightError as fault:
            parser.error(f"--at: {fault}")
    print(outcome.table)
    return 1 if outcome.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
