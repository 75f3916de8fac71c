"""A finished entry can be trained again from its manifest, and what differs is measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from palio.config import Track
from palio.errors import BadInput
from palio.provenance import folder_sha256
from palio.training.reproduce import reproduce, weight_distance
from tests.training import Entry, copy_rows, tiny_base_model

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


def test_a_folder_that_holds_an_adapter_is_refused(entry: Entry) -> None:
    with pytest.raises(BadInput, match="give an empty folder"):
        reproduce(entry_dir=entry.folder, base_model=entry.base, track=TRACK, out=entry.folder, threads=1)
