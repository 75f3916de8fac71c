"""What only a GPU can show of fine-tuning: its memory cap, its kernels, its record of what it used."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from palio.errors import OutOfMemory
from palio.packaging.package import DIVERGENCE, TOLERANCE
from palio.records import TrainingFacts
from palio.training.ledger import charged, read_ledger
from tests.support.training import Entry, tiny_base_model, wait_for_step

pytestmark = pytest.mark.gpu

TRACK = {"title": "t", "ram_gb": 16, "gpu_memory_gb": 4, "training_budget": "600s"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, base_model: Path) -> Path:
    return tiny_base_model(tmp_path_factory.mktemp("base"), base_model, torch.bfloat16)


@pytest.fixture
def entry(tiny: Path, tmp_path: Path) -> Entry:
    return Entry.create(tmp_path / "results" / "t" / "e", tiny)


def training_of(entry: Entry) -> TrainingFacts:
    training = entry.run().training
    assert training is not None
    return training


def losses_of(entry: Entry) -> list[float]:
    return list(pq.read_table(entry.folder / "train.parquet")["loss"].to_pylist())


def test_a_run_tells_which_gpu_it_had_and_what_it_drew(entry: Entry) -> None:
    manifest = entry.finetune(track=TRACK, max_steps=60, learning_rate=1e-2)
    training = training_of(entry)
    assert manifest.state == "finished"
    assert training.device == torch.cuda.get_device_name()
    assert training.gpu_uuid is not None
    assert training.gpu_uuid.startswith("GPU-")
    assert training.memory_cap_gb == 4
    assert training.peak_memory_bytes is not None
    assert 0 < training.peak_memory_bytes < 4e9
    assert training.energy_joules is not None
    assert training.energy_joules > 0
    assert training.cuda
    assert training.driver
    losses = losses_of(entry)
    assert manifest.final_loss is not None
    assert manifest.final_loss < losses[0]


def test_a_track_without_a_gpu_trains_on_the_cpu_of_a_node_that_has_one(entry: Entry) -> None:
    entry.finetune(max_steps=2)
    assert training_of(entry).device == "cpu"


def test_a_killed_run_goes_on_as_if_nothing_had_been(entry: Entry, tiny: Path, tmp_path: Path) -> None:
    """Not to the bit as on a CPU: the attention's backward pass adds in no fixed order."""
    recipe: dict[str, Any] = {"max_steps": 60, "save_steps": 10, "lora_dropout": 0.1, "learning_rate": 1e-3}
    undisturbed = Entry.create(tmp_path / "results" / "t" / "undisturbed", tiny)
    undisturbed.finetune(track=TRACK, **recipe)
    process = entry.start(track=TRACK, **recipe)
    wait_for_step(process, 25)
    process.kill()
    process.wait()
    entry.finetune(track=TRACK, **recipe)
    assert len(charged(read_ledger(entry.work() / "ledger.jsonl"))) == 2
    assert losses_of(entry) == pytest.approx(losses_of(undisturbed), rel=1e-3)


def test_the_tracks_memory_is_all_a_larger_gpu_gives(entry: Entry) -> None:
    entry.write_rows([{"prompt": f"{n}", "completion": " red" * 1900} for n in range(32)])
    with pytest.raises(OutOfMemory, match=r"lower finetune\.batch_size") as caught:
        entry.finetune(track={**TRACK, "gpu_memory_gb": 1}, max_steps=2, batch_size=32)
    peak = re.search(r"peak of ([\d.]+) GB", str(caught.value))
    assert peak is not None
    assert float(peak[1]) <= 1.0
    assert entry.finetune(track={**TRACK, "gpu_memory_gb": 4}, max_steps=2, batch_size=1).state == "finished"


def test_checkpointed_layers_train_as_the_others_do(entry: Entry, tiny: Path, tmp_path: Path) -> None:
    other = Entry.create(tmp_path / "results" / "t" / "other", tiny)
    entry.finetune(track=TRACK, max_steps=10)
    other.finetune(track=TRACK, max_steps=10, gradient_checkpointing=True)
    assert losses_of(other) == pytest.approx(losses_of(entry), rel=1e-3)


@pytest.mark.parametrize(
    "recipe",
    [
        {"method": "full"},
        {"method": "lora", "dora": True},
        {"method": "lora", "rslora": True, "lora_init": "pissa"},
        {"method": "qlora", "quantization": "nf4", "optimizer": "paged_adamw_8bit"},
        {"method": "qlora", "quantization": "fp4", "optimizer": "paged_adamw_32bit"},
        {"method": "qlora", "quantization": "int8", "optimizer": "adamw_8bit"},
        {"method": "qlora", "quantization": "nf4", "lora_init": "loftq"},
        {"method": "lora", "neftune_alpha": 5.0, "compile_layers": True},
    ],
    ids=lambda recipe: "-".join(map(str, recipe.values())),
)
def test_every_method_learns_and_becomes_a_package_that_answers_as_it_was_trained(
    entry: Entry, recipe: dict[str, Any]
) -> None:
    entry.finetune(track=TRACK, max_steps=40, learning_rate=5e-3, validation_rows=8, **recipe)
    losses = losses_of(entry)
    assert sum(losses[-5:]) < sum(losses[:5])
    package = entry.package()
    assert package.max_logit_difference is None or package.max_logit_difference <= TOLERANCE
    assert package.divergence is None or package.divergence <= DIVERGENCE
