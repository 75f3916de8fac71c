"""A finished entry can be trained again from its manifest, and what differs is measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from palio.config import Scenario, Track
from palio.errors import BadInput
from palio.provenance import folder_sha256
from palio.records import INSTANCES_SCHEMA
from palio.training.reproduce import reproduce, score_differences, weight_distance
from tests.support.training import Entry, copy_rows, tiny_base_model

ROOT = Path(__file__).parents[2]
TRACK = Track.model_validate({"title": "t", "ram_gb": 4, "training_budget": "600s"})


@pytest.fixture(scope="module")
def entry(tmp_path_factory: pytest.TempPathFactory, base_model: Path) -> Entry:
    base = tiny_base_model(tmp_path_factory.mktemp("base"), base_model)
    entry = Entry.create(tmp_path_factory.mktemp("first") / "e", base)
    entry.finetune(max_steps=5)
    return entry


def test_training_again_on_a_cpu_gives_the_same_bytes(entry: Entry, tmp_path: Path) -> None:
    before = folder_sha256(entry.folder)
    again = reproduce(entry_dir=entry.folder, base_model=entry.base, track=TRACK, out=tmp_path, threads=1)
    assert again.identical
    assert again.weight_distance == again.loss_difference == 0
    assert folder_sha256(entry.folder) == before


def test_an_adapter_that_was_not_trained_so_is_told_apart(entry: Entry, tmp_path: Path) -> None:
    other = Entry.create(tmp_path / "other", entry.base)
    other.finetune(max_steps=5, seed=1)
    assert weight_distance(entry.folder / "adapter", other.folder / "adapter") > 0.5


def test_another_dataset_is_refused(entry: Entry, tmp_path: Path) -> None:
    copy = Entry.create(tmp_path / "copy", entry.base)
    copy.finetune(max_steps=2)
    copy.write_rows(copy_rows(10))
    with pytest.raises(BadInput, match=r"adapter\.json: dataset_sha256.*bring back"):
        reproduce(entry_dir=copy.folder, base_model=entry.base, track=TRACK, out=tmp_path / "out", threads=1)


def test_the_entrys_own_folder_is_refused(entry: Entry) -> None:
    with pytest.raises(BadInput, match="own folder; give another"):
        reproduce(entry_dir=entry.folder, base_model=entry.base, track=TRACK, out=entry.folder, threads=1)


def test_the_verb_ends_with_what_it_found(entry: Entry, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    content = yaml.safe_load((ROOT / "config" / "config.yaml").read_text())
    content["tracks"] = {"t": content["tracks"]["laptop"]}
    config.write_text(yaml.safe_dump(content))
    command = [sys.executable, "-m", "palio.cli", "reproduce", str(entry.folder), "--threads", "1"]
    command += ["--competition", str(config), "--base-model", str(entry.base), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "adapter: identical\nreproduced\n"), done.stderr
    assert json.loads((tmp_path / "out" / "reproduction.json").read_text())["identical"]


SCENARIO = Scenario.model_validate(
    {
        "run_entries": "x.conf",
        "max_eval_instances": 10,
        "metrics": {
            "EM": {"metric": "exact_match"},
            "robust": {"metric": "em", "perturbation": "robustness"},
        },
    }
)


def write_scores(folder: Path, values: list[float]) -> Path:
    rows = [
        {
            **dict.fromkeys(("competition", "track", "entry"), "x"),
            **{"stage": "open", "scenario": "s", "run": "r", "instance": f"id{number}"},
            **{"metric": "exact_match", "split": "test", "perturbation": None, "value": value},
        }
        for number, value in enumerate(values)
    ]
    (folder / "helm" / "open").mkdir(parents=True)
    pq.write_table(
        pa.Table.from_pylist(rows, INSTANCES_SCHEMA), folder / "helm" / "open" / "instances.parquet"
    )
    return folder


def test_answers_that_flip_both_ways_are_noise_and_those_that_flip_one_way_are_not(tmp_path: Path) -> None:
    first = write_scores(tmp_path / "first", [1, 0] * 20)
    both_ways = write_scores(tmp_path / "both", [0, 1, 0, 1, *[1, 0] * 18])
    one_way = write_scores(tmp_path / "one", [1, 1] * 6 + [1, 0] * 14)
    (same,) = score_differences(first, first, "open", {"s": SCENARIO})
    assert (same.first, same.second, same.n, same.noise) == (0.5, 0.5, 40, 0)
    (noise,) = score_differences(first, both_ways, "open", {"s": SCENARIO})
    assert noise.within_noise
    assert noise.noise == pytest.approx(2 * (4 / 39 / 40) ** 0.5)  # four flips of 40
    (better,) = score_differences(first, one_way, "open", {"s": SCENARIO})
    assert (better.second, better.within_noise) == (0.65, False)
