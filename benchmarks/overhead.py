"""What the workflow costs beside the work: the start of each step, and of the SLURM job around it.

    python benchmarks/overhead.py                 this checkout
    python benchmarks/overhead.py ../older .      an older one beside it, both in this environment

Two entries of a model with random weights, one that trains for a step and one untuned, one job after the
other on the SLURM cluster of the tests, with the profile as it is. The work is next to nothing, so CPU
seconds are those of starting: of the step's own process, and of what it started besides (HELM, a server).
`a SLURM job beside its step` is its Snakemake. Then what benchmarks/chain.py says of the wall clock.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).parents[1]
TARGETS = ("results/leaderboard/a100.json", "results/rtx4090/untuned/package.json")

RUN = """\
import shutil, subprocess, sys
from pathlib import Path
from tests.slurm import competition
from tests.slurm.cluster import Cluster

place, model, targets = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
folder = competition.create(place / "competition", model)
shutil.copy("profiles/slurm/config.yaml", folder.path / "profiles/slurm/config.yaml")
competition.add_entry(folder, "tuned", "a100", model, max_steps=1)
competition.add_entry(folder, "untuned", "rtx4090", model)
chain = [sys.executable, str(Path("benchmarks/chain.py").resolve())]
with Cluster(place / "slurm") as cluster:
    with competition.controller(folder, cluster, "--jobs", "1", *targets) as snakemake:
        code = snakemake.wait()
    if code:
        sys.exit(competition.output(folder)[-3000:])
    subprocess.run(chain, cwd=folder.path, env=cluster.environment, check=True)
"""
"""Run in a checkout, with its own tests' modules: the folder to work in, the model, what to make."""


def run(checkout: Path, model: Path, place: Path) -> str:
    """Run the two entries as that checkout does. Return what chain.py printed."""
    from benchmarks.night.night import HOOK

    (place / "hook").mkdir(parents=True)
    (place / "hook/sitecustomize.py").write_text(HOOK)
    (place / "slurm").mkdir()
    path = os.pathsep.join(str(one) for one in (place / "hook", checkout, checkout / "src"))
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(place), str(model), *TARGETS],
        cwd=checkout,
        env=os.environ | {"PYTHONPATH": path, "NIGHT_USAGE": str(place / "usage.jsonl")},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        sys.exit(f"{checkout}: {done.stderr}")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkouts", nargs="*", type=Path, default=[ROOT], help="of Palio; default: this one")
    checkouts = [path.resolve() for path in parser.parse_args().checkouts]
    sys.path.append(str(ROOT))
    import families
    from benchmarks.night.night import cpu_seconds

    measured = []
    with tempfile.TemporaryDirectory(prefix="palio-overhead-") as place:
        model = Path(place) / "model"
        families.tiny_model("llama", max_position_embeddings=2048).save_pretrained(model)
        families.tokenizer().save_pretrained(model)
        for number, checkout in enumerate(checkouts):
            folder = Path(place) / str(number)
            print(f"{checkout.name}\n\n{run(checkout, model, folder)}", flush=True)
            runs, beside = cpu_seconds(map(json.loads, (folder / "usage.jsonl").read_text().splitlines()))
            means = {step: tuple(map(mean, zip(*each, strict=True))) for step, each in runs.items()}
            measured.append(means | {"a SLURM job beside its step": (mean(beside), 0.0)})
    print(f"| CPU s | {' | '.join(f'{one.name}: own | started' for one in checkouts)} |")
    print("|---" * (1 + 2 * len(checkouts)) + "|")
    for step in dict.fromkeys(step for one in measured for step in one):
        cells = (f"{one[step][0]:.1f} | {one[step][1]:.1f}" if step in one else "– | –" for one in measured)
        print(f"| {step} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
