"""What the workflow costs beside the work: the start of each step, and of the SLURM job around it.

    python benchmarks/overhead.py                 this checkout
    python benchmarks/overhead.py ../older .      an older one beside it, both in this environment

Two entries of a model with random weights, one that trains for a step and one untuned, one job after the
other on the SLURM cluster of the tests, with the profile as it is. The work is next to nothing, so CPU
seconds are those of starting: of the step's own process, and of what it started besides (HELM, a server).
`a SLURM job beside its step` is two Snakemakes. Then what benchmarks/chain.py says of the wall clock.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
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


def seconds(usage: Path) -> dict[str, tuple[float, float]]:
    """By step, mean CPU seconds of its process, and of what it started; of a job, of its two Snakemakes."""
    own: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
    of_step: Counter[str] = Counter()
    of_snakemake: Counter[str] = Counter()
    for line in map(json.loads, usage.read_text().splitlines()):
        program, *words = line["argv"]
        if Path(program).name == "palio":
            words = words[words[:1] == ["step"] :]
            own[words[0] if words else ""].append((line["own"], line["children"]))
            of_step[line["job"]] += line["own"] + line["children"]
        elif line["job"] and "snakemake" in program:
            of_snakemake[line["job"]] += line["own"] + line["children"]
    found = {step: (mean(a for a, _ in each), mean(b for _, b in each)) for step, each in own.items()}
    beside = [of_snakemake[job] - of_step[job] for job in of_snakemake]
    return found | {"a SLURM job beside its step": (mean(beside), 0.0)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkouts", nargs="*", type=Path, default=[ROOT], help="of Palio; default: this one")
    checkouts = [path.resolve() for path in parser.parse_args().checkouts]
    sys.path.append(str(ROOT))
    import families

    measured = []
    with tempfile.TemporaryDirectory(prefix="palio-overhead-") as place:
        model = Path(place) / "model"
        families.tiny_model("llama", max_position_embeddings=2048).save_pretrained(model)
        families.tokenizer().save_pretrained(model)
        for number, checkout in enumerate(checkouts):
            folder = Path(place) / str(number)
            print(f"{checkout.name}\n\n{run(checkout, model, folder)}", flush=True)
            measured.append(seconds(folder / "usage.jsonl"))
    print(f"| CPU s | {' | '.join(f'{one.name}: own | started' for one in checkouts)} |")
    print("|---" * (1 + 2 * len(checkouts)) + "|")
    for step in dict.fromkeys(step for one in measured for step in one):
        cells = (f"{one[step][0]:.1f} | {one[step][1]:.1f}" if step in one else "– | –" for one in measured)
        print(f"| {step} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
