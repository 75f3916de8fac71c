"""What sharing a curation among jobs can gain: the seconds of each job, and of those that wait for another.

    python benchmarks/curation_shards.py --shards 8

Records and recipe are those of benchmarks/curation.py. The jobs run one after the other in one process, so
that they do not disturb each other; the seconds are of CPU, without the two seconds in which a job starts and
without a queue. A phase takes as long as the longest of its shards.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from curation import default_recipe, demo_model, write_data
from helm_data import HELM_DATA, helm_data

from palio.curation.curate import curate_ahead, curate_dataset


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--data", type=helm_data, default=HELM_DATA, help="HELM's data: gsm/, bbq/")
    given = parser.parse_args()
    jobs: dict[str, list[float]] = {}

    @contextmanager
    def job(kind: str) -> Iterator[None]:
        began = time.process_time()
        yield
        jobs.setdefault(kind, []).append(time.process_time() - began)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base_model = demo_model(folder)
        write_data(folder, given.rows, given.data)
        recipe, work = default_recipe(folder, given.rows), folder / "work"
        common: dict[str, Any] = {"base_model": base_model, "entry": "curation", "work": work}
        with job("read"):
            curate_ahead(recipe, **common, join=0)
        for phase in range(1, recipe.phases + 1):
            for number in range(1, given.shards + 1):
                with job(f"shards {phase}"):
                    curate_ahead(recipe, **common, shard=(number, given.shards))
            if phase < recipe.phases:
                with job(f"join {phase}"):
                    curate_ahead(recipe, **common, join=phase)
        with job("curate_dataset"):
            curate_dataset(recipe, **common, competition="benchmark", track="cpu", out=folder / "dataset")
    for kind, seconds in jobs.items():
        print(f"{kind}: {sum(seconds):.1f} s in {len(seconds)} jobs, the longest {max(seconds):.1f} s")
    everything = sum(map(sum, jobs.values()))
    longest_way = sum(map(max, jobs.values()))
    alone = sum(sum(seconds) for seconds in jobs.values() if len(seconds) == 1)
    print(
        f"{given.rows} records: {everything:.1f} s in all, {alone:.1f} s of it in jobs that run alone; "
        f"{longest_way:.1f} s in {given.shards} shards"
    )


if __name__ == "__main__":
    main()
