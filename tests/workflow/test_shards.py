"""An entry whose curation several jobs share, run by Snakemake."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from palio.records import DatasetManifest, read_record
from tests.conftest import DEMO_MODEL
from tests.support.curation import digests
from tests.support.folder import DEMO_ENTRIES, WorkingFolder

MANIFESTS = [f"results/laptop/{entry}/dataset/manifest.json" for entry in ("curated", "shared")]


def share(folder: WorkingFolder, **shards: int) -> None:
    folder.edit_yaml("config/config.yaml", lambda config: config.update(shards=shards))


@pytest.fixture
def curated(folder: WorkingFolder, base_model: Path) -> WorkingFolder:
    """The demo's `curated`, curated by one job, and the same data by three at a time."""
    shutil.copytree(base_model.parent, folder.path / "resources/base_models" / DEMO_MODEL.id)
    entry = folder.path / DEMO_ENTRIES / "curated.yaml"
    entry.with_name("shared.yaml").write_text(entry.read_text().replace("Civetta", "Giraffa"))
    share(folder, shared=3)
    done = folder.snakemake(*MANIFESTS)
    assert done.returncode == 0, done.stderr
    return folder


def test_jobs_that_share_a_curation_make_the_dataset_of_one_and_their_number_redoes_nothing(
    curated: WorkingFolder,
) -> None:
    one, shared = ((curated.path / path).parent for path in MANIFESTS)
    tables = ("train.parquet", "dropped.parquet", "quarantine.jsonl")
    assert [digests(one)[name] for name in tables] == [digests(shared)[name] for name in tables]
    records = [read_record(DatasetManifest, folder / "manifest.json") for folder in (one, shared)]
    assert records[0] == records[1].model_copy(update={"entry": "curated"})

    logs = {path.name for path in (shared.parent / "logs").glob("curate.*.log")}
    phases = {f"curate.{phase}.{number}-of-3.log" for phase in (1, 2) for number in (1, 2, 3)}
    assert logs == phases | {f"curate.{join}.joined.log" for join in (0, 1)}
    assert not list((shared.parent / "work/shards").glob("*"))
    for number in ({"shared": 7}, {}, {"curated": 2}):
        share(curated, **number)
        assert curated.plan(*MANIFESTS) == set(), f"{number} makes a finished dataset again"


def test_an_entry_that_is_not_shared_has_no_more_jobs_than_before(folder: WorkingFolder) -> None:
    share(folder, curated=2)
    plan = folder.plan()
    assert {entry for rule, entry in plan if rule in ("curate_shard", "join_shards")} == {"curated"}
