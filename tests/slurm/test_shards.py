"""A curation that the nodes of a cluster share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from palio.provenance import file_sha256
from tests.slurm import competition
from tests.slurm.cluster import Cluster

pytestmark = pytest.mark.slow  # tests/workflow/test_shards.py has the same shards in processes
DATASET = "results/a100/shared/dataset"
OPERATIONS = [{"op": op} for op in ("clean_markup", "drop_disagreement", "drop_refusals")]


def test_jobs_of_several_nodes_make_the_dataset_of_one(cluster: Cluster, tiny: Path, tmp_path: Path) -> None:
    folder = competition.create(tmp_path / "competition", tiny)
    competition.add_entry(folder, "shared", "a100", tiny, max_steps=1)

    def two_batches(entry: dict[str, Any]) -> None:
        (source,) = entry["dataset"]["sources"]
        other = {**source, "path": source["path"].replace("pattern_match", "parity")}
        entry["dataset"] = {"sources": [source, other], "operations": OPERATIONS}

    folder.edit_entry("shared", two_batches)
    folder.edit_yaml("config/config.yaml", lambda config: config.update(shards={"shared": 2}))
    prepared = folder.snakemake("results/a100/shared/check.json", "resources/demo_sources/parity.jsonl")
    assert prepared.returncode == 0, prepared.stderr
    with competition.controller(folder, cluster, f"{DATASET}/manifest.json") as snakemake:
        assert snakemake.wait(1500) == 0, competition.output(folder)
    rules = [line for line in cluster.jobs("%k") if line.startswith("rule_") and "_shared" in line]
    assert sum("curate_shard" in rule for rule in rules) == 4, rules
    assert sum("join_shards" in rule for rule in rules) == 2, rules

    alone = folder.run("palio", "curate", "config/entries/demo/shared.yaml", "--out", "alone")
    assert alone.returncode == 0, alone.stderr
    for name in ("train.parquet", "dropped.parquet"):
        assert file_sha256(folder.path / DATASET / name) == file_sha256(folder.path / "alone" / name)
