"""The fine-tuning step on a tiny model: what it leaves, what it restores, what it refuses."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from palio.config import FinetuneRecipe
from palio.errors import BadInput, Crashed
from palio.heartbeat import read_heartbeat
from palio.provenance import folder_sha256
from palio.quantization import evaluation_mode
from palio.records import AdapterManifest, read_record
from palio.training.finetune import is_out_of_memory
from palio.training.ledger import read_ledger
from palio.training.model import load_model
from palio.training.rows import Row, split
from palio.training.telemetry import SCHEMA, dashboards
from palio.training.trainer import Trainer
from tests.support.training import Entry


def test_training_leaves_adapter_telemetry_and_manifest_that_agree(entry: Entry) -> None:
    manifest = entry.finetune(max_steps=6)
    assert read_record(AdapterManifest, entry.folder / "adapter.json") == manifest
    assert folder_sha256(entry.folder / "adapter") == manifest.files
    table = pq.read_table(entry.folder / "train.parquet")
    assert table.schema.equals(SCHEMA)
    assert table["step"].to_pylist() == [1, 2, 3, 4, 5, 6]
    losses = table["loss"].to_pylist()
    assert losses[-1] < losses[0]
    assert manifest.final_loss == pytest.approx(sum(losses) / 6)
    assert (manifest.state, manifest.steps, manifest.planned_steps) == ("finished", 6, 6)
    training = entry.run().training
    assert training is not None
    assert training.device == "cpu"
    assert training.training_seconds > 0


def test_training_writes_how_far_it_is(entry: Entry) -> None:
    entry.finetune(max_steps=2)
    heartbeat = read_heartbeat(entry.at.heartbeat("finetune"), since=0)
    assert heartbeat is not None
    assert 1 <= heartbeat.done <= heartbeat.total == 2
    assert heartbeat.used_seconds > 0


def test_nothing_of_this_machine_is_in_the_adapter(entry: Entry) -> None:
    entry.finetune(max_steps=2)
    for path in (entry.folder / "adapter").iterdir():
        assert path.stat().st_mode & 0o777 == 0o644
        assert str(entry.folder.parent).encode() not in path.read_bytes()
    settings = json.loads((entry.folder / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "tiny"


def test_a_deleted_output_is_restored_without_training(entry: Entry) -> None:
    first = entry.finetune(max_steps=3)
    (entry.folder / "adapter.json").unlink()
    (entry.folder / "train.parquet").unlink()
    lines = len(read_ledger(entry.work() / "ledger.jsonl"))
    trained = entry.run()
    assert entry.finetune(max_steps=3) == first
    assert len(read_ledger(entry.work() / "ledger.jsonl")) == lines
    restored = entry.run()
    assert (trained.restored, restored.restored) == (False, True)
    assert restored.training == trained.training
    assert (entry.folder / "train.parquet").exists()


def test_a_finished_adapter_is_replaced_by_another_training_only_on_demand(entry: Entry) -> None:
    first = entry.finetune(max_steps=2)
    with pytest.raises(BadInput, match=r"adapter\.json: fingerprint.*remove this file to replace it"):
        entry.finetune(max_steps=3, replace=False)
    assert read_record(AdapterManifest, entry.folder / "adapter.json") == first
    assert entry.finetune(max_steps=2, replace=False) == first


def test_another_recipe_trains_anew_and_loses_nothing_of_the_first(entry: Entry) -> None:
    first = entry.finetune(max_steps=3)
    second = entry.finetune(max_steps=3, learning_rate=1e-2)
    assert second.fingerprint != first.fingerprint
    assert second.files != first.files
    assert entry.finetune(max_steps=3) == first
    assert folder_sha256(entry.folder / "adapter") == first.files


def test_a_changed_finished_adapter_is_not_handed_out(entry: Entry) -> None:
    entry.finetune(max_steps=2)
    with (entry.work() / "adapter" / "adapter_config.json").open("a") as stream:
        stream.write(" ")
    with pytest.raises(Crashed, match="was changed; delete that folder"):
        entry.finetune(max_steps=2)


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "lora", "lora_dropout": 0.1},
        {"method": "lora", "gradient_checkpointing": True},
        {"method": "lora", "gradient_accumulation": 2, "batch_size": 2},
        {"method": "lora", "optimizer": "adamw_8bit"},
        {"method": "lora", "target_modules": ["q_proj", "v_proj"]},
        {"method": "lora", "dora": True, "rslora": True},
        {"method": "lora", "neftune_alpha": 5.0},
        {"method": "lora", "modules_to_save": ["lm_head"]},
        {"method": "lora", "lora_init": "pissa"},
        {"method": "qlora", "lora_init": "loftq"},
        {"method": "qlora"},
        {"method": "qlora", "quantization": "fp4", "validation_rows": 8, "save_steps": 1},
        {"method": "qlora", "quantization": "int8"},
        {"method": "full"},
    ],
    ids=str,
)
def test_equal_training_gives_equal_bytes(entry: Entry, settings: dict[str, Any]) -> None:
    first = entry.finetune(max_steps=3, **settings)
    for path in sorted(entry.work().rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    assert entry.finetune(max_steps=3, **settings).files == first.files


def test_accumulated_gradients_equal_those_of_one_large_batch(entry: Entry) -> None:
    entry.finetune(max_steps=1, batch_size=8)
    large = pq.read_table(entry.folder / "train.parquet")
    entry.finetune(max_steps=1, batch_size=2, gradient_accumulation=4)
    small = pq.read_table(entry.folder / "train.parquet")
    for column in ("loss", "grad_norm"):
        assert small[column][0].as_py() == pytest.approx(large[column][0].as_py(), rel=1e-4)


def test_full_fine_tuning_leaves_a_model_that_loads(entry: Entry) -> None:
    entry.finetune(max_steps=2, method="full")
    model = AutoModelForCausalLM.from_pretrained(entry.folder / "adapter")
    base = AutoModelForCausalLM.from_pretrained(entry.base / "model")
    assert not torch.equal(model.lm_head.weight, base.lm_head.weight)
    assert "palio" not in (entry.folder / "adapter" / "config.json").read_text()


def test_modules_that_match_nothing_are_named(entry: Entry) -> None:
    with pytest.raises(BadInput, match=r"target_modules.*peft cannot adapt it: .*not found"):
        entry.finetune(max_steps=1, target_modules=["no_such_layer"])


def test_rows_all_over_the_limit_are_refused(entry: Entry) -> None:
    with pytest.raises(BadInput, match=r"max_length.*rows are longer"):
        entry.finetune(max_steps=1, max_length=2)


def test_an_empty_dataset_is_refused(entry: Entry) -> None:
    entry.write_rows([])
    with pytest.raises(BadInput, match="has no rows"):
        entry.finetune(max_steps=1)


def test_a_track_with_a_gpu_needs_one(entry: Entry) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(BadInput, match="no CUDA GPU is visible"):
        entry.finetune(max_steps=1, track={"gpu_memory_gb": 24})


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ("CUDA error: out of memory", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory", True),
        ("CUDA error: an illegal memory access was encountered", False),
    ],
)
def test_libraries_that_ran_out_of_memory_are_understood(told: str, expected: bool) -> None:
    assert is_out_of_memory(RuntimeError(told)) is expected


def test_a_second_visible_gpu_is_refused(entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(BadInput, match=r"CUDA_VISIBLE_DEVICES is '0,1': 2 GPUs.*the rules allow one"):
        entry.finetune(max_steps=1, track={"gpu_memory_gb": 24})


def test_a_tokenizer_without_a_pad_token_trains_since_nothing_is_padded(tiny: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny, base)
    tokenizer = AutoTokenizer.from_pretrained(base / "model")
    tokenizer.pad_token = None
    tokenizer.save_pretrained(base / "model")
    assert AutoTokenizer.from_pretrained(base / "model").pad_token_id is None
    assert Entry.create(tmp_path / "entry", base).finetune(max_steps=2).state == "finished"


def test_a_tokenizer_without_an_end_token_is_refused(tiny: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny, base)
    tokenizer = AutoTokenizer.from_pretrained(base / "model")
    tokenizer.eos_token = None
    tokenizer.save_pretrained(base / "model")
    with pytest.raises(BadInput, match="no end-of-sequence token; add eos_token"):
        Entry.create(tmp_path / "entry", base).finetune(max_steps=2)


def test_dropped_rows_are_counted(entry: Entry) -> None:
    entry.write_rows(
        [{"prompt": "a b c", "completion": " d"}] * 4 + [{"prompt": "x " * 90, "completion": "y"}]
    )
    manifest = entry.finetune(max_steps=1, max_length=32)
    assert (manifest.rows, manifest.rows_too_long) == (4, 1)


@pytest.mark.parametrize(
    "settings",
    [{"rslora": True}, {"dora": True}, {"neftune_alpha": 5.0}, {"modules_to_save": ["lm_head"]}],
    ids=str,
)
def test_each_method_trains_differently_and_its_adapter_loads(entry: Entry, settings: dict[str, Any]) -> None:
    plain = entry.finetune(max_steps=3)
    other = entry.finetune(max_steps=3, **settings)
    assert other.files["adapter_model.safetensors"] != plain.files["adapter_model.safetensors"]
    base = AutoModelForCausalLM.from_pretrained(entry.base / "model")
    PeftModel.from_pretrained(base, entry.folder / "adapter")


def test_the_fused_adapter_is_pefts_own(entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    fused = entry.finetune(max_steps=3, lora_dropout=0.1)
    losses = pq.read_table(entry.folder / "train.parquet")["loss"].to_pylist()
    shutil.rmtree(entry.folder / "work")
    monkeypatch.setattr("palio.training.model._fuse", lambda model: None)
    assert entry.finetune(max_steps=3, lora_dropout=0.1).fingerprint == fused.fingerprint
    plain = pq.read_table(entry.folder / "train.parquet")["loss"].to_pylist()
    assert losses == pytest.approx(plain, rel=1e-5)


def test_pissa_hands_in_an_adapter_for_the_base_model_as_it_was(entry: Entry) -> None:
    # Without a learning rate to speak of, base and adapter together are the base model.
    entry.finetune(max_steps=2, lora_init="pissa", learning_rate=1e-12, lora_r=8)
    assert logits_apart(entry.base / "model", entry.folder / "adapter") < 1e-4
    entry.finetune(max_steps=10, lora_init="pissa", lora_r=8)
    assert logits_apart(entry.base / "model", entry.folder / "adapter") > 1e-2


def test_loftq_starts_nearer_to_the_base_model_than_quantising_alone(tiny: Path) -> None:
    ids = torch.arange(100, 140)[None]
    whole = AutoModelForCausalLM.from_pretrained(tiny / "model").eval()

    def apart(**settings: object) -> float:
        recipe = FinetuneRecipe.model_validate({"method": "qlora", "lora_r": 16, **settings})
        model = evaluation_mode(load_model(tiny / "model", recipe, torch.device("cpu")))
        with torch.inference_mode():
            return float((model(ids).logits - whole(ids).logits).abs().mean())

    assert apart(lora_init="loftq") < 0.7 * apart()


def logits_apart(model: Path, adapter: Path) -> float:
    """Largest difference of a logit between the model with and without the adapter."""
    base = AutoModelForCausalLM.from_pretrained(model).eval()
    ids = torch.arange(100, 140)[None]
    with torch.inference_mode():
        before = base(ids).logits
        after = PeftModel.from_pretrained(base, adapter).eval()(ids).logits
    return float((before - after).abs().max())


def test_rows_through_the_chat_template_are_learned_on_the_answer_alone(entry: Entry) -> None:
    plain = entry.finetune(max_steps=2)
    chat = entry.finetune(max_steps=2, chat_template=True)
    assert chat.rows == plain.rows
    assert chat.files != plain.files


def test_a_chat_template_that_is_not_there_is_refused(tiny: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny, base)
    tokenizer = AutoTokenizer.from_pretrained(base / "model")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(base / "model")
    (base / "model" / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(BadInput, match="the chat template is missing"):
        Entry.create(tmp_path / "entry", base).finetune(max_steps=2, chat_template=True)


def test_training_is_told_to_tensorboard_and_costed_and_the_manifest_does_not_know(entry: Entry) -> None:
    plain = entry.finetune(max_steps=4, save_steps=2, validation_rows=8)
    shutil.rmtree(entry.folder / "work")
    told = entry.finetune(
        max_steps=4,
        save_steps=2,
        validation_rows=8,
        telemetry={"report_to": ["tensorboard"], "usd_per_hour": {entry.at.track_id: 3600.0}},
    )
    assert told == plain
    run = entry.run()
    assert run.training is not None
    assert run.cost_usd == pytest.approx(run.training.training_seconds, abs=1e-3)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(entry.folder / "work" / "dashboards" / "tensorboard")).Reload()
    table = pq.read_table(entry.folder / "train.parquet")
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(table["loss"].to_pylist())
    assert [event.step for event in events.Scalars("validation_loss")] == [2, 4]


def test_trackio_keeps_one_run_over_all_attempts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = pytest.importorskip("trackio.sqlite_storage", reason="pip install trackio")
    monkeypatch.setattr(storage, "TRACKIO_DIR", tmp_path)
    for step in (1, 2):
        opened = dashboards(["trackio"], folder=tmp_path, run="laptop/a", key="f" * 64, recipe={"lora_r": 8})
        with opened as send:
            send({"step": step, "loss": 1 / step})
    (run,) = storage.SQLiteStorage.get_runs("palio")
    kept = storage.SQLiteStorage.get_logs("palio", run)
    assert [(row["step"], row["loss"]) for row in kept] == [(1, 1.0), (2, 0.5)]


@pytest.mark.parametrize("name", ["mlflow", "trackio"])
def test_a_dashboard_whose_library_is_missing_is_named(entry: Entry, name: str) -> None:
    if importlib.util.find_spec(name):
        pytest.skip(f"{name} is installed")
    with pytest.raises(BadInput, match=rf"telemetry\.report_to is '{name}'.*pip install {name}"):
        entry.finetune(max_steps=1, telemetry={"report_to": [name]})


def test_a_dashboard_that_fails_does_not_end_training(
    entry: Entry, capfd: pytest.CaptureFixture[str]
) -> None:
    blocked = entry.folder / "work" / "dashboards"
    blocked.parent.mkdir()
    blocked.write_text("a file where TensorBoard wants a folder")
    assert entry.finetune(max_steps=2, telemetry={"report_to": ["tensorboard"]}).state == "finished"
    assert "tensorboard disabled" in capfd.readouterr().err


def test_the_step_with_the_lowest_validation_loss_is_handed_in(entry: Entry) -> None:
    # A rate at which training diverges again after the first steps.
    manifest = entry.finetune(max_steps=12, save_steps=2, validation_rows=16, learning_rate=0.3)
    table = pq.read_table(entry.folder / "train.parquet")
    taken = {
        step: loss
        for step, loss in zip(table["step"].to_pylist(), table["validation_loss"].to_pylist(), strict=True)
        if loss is not None
    }
    assert list(taken) == [2, 4, 6, 8, 10, 12]
    assert manifest.best_step == min(taken, key=lambda step: taken[step])
    assert manifest.validation_loss == min(taken.values())
    assert (manifest.rows, manifest.steps) == (48, 12)
    assert manifest.best_step is not None
    assert manifest.best_step < 12


def test_patience_ends_training_early(entry: Entry) -> None:
    manifest = entry.finetune(max_steps=400, save_steps=2, validation_rows=16, learning_rate=0.3, patience=2)
    assert manifest.state == "finished"
    assert manifest.best_step is not None
    assert manifest.steps == manifest.best_step + 4


def test_held_out_rows_are_not_trained_on() -> None:
    rows = [Row(number, np.arange(3, dtype=np.int32), ((1, 3),)) for number in range(20)]
    kept, held = split(rows, 5, seed=3)
    assert len(held) == 5
    assert sorted(row.number for row in kept + held) == list(range(20))
    assert split(rows, 0, seed=3) == (rows, [])


@pytest.mark.parametrize(("share", "held_out"), [(0.25, 16), (0.005, 1), (0.1, 6)])
def test_a_share_of_the_rows_is_held_out_at_least_one(share: float, held_out: int, entry: Entry) -> None:
    manifest = entry.finetune(max_steps=2, save_steps=1, validation_rows=share)
    assert (manifest.rows, manifest.rows_held_out) == (64 - held_out, held_out)
    losses = pq.read_table(entry.folder / "train.parquet")["validation_loss"].to_pylist()
    assert None not in losses
    assert manifest.validation_loss == min(losses)


def test_the_same_rows_are_held_out_as_long_as_the_data_seed_is_the_same(
    entry: Entry, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[set[int]] = []
    validate = Trainer.validation_loss

    def validation_loss(trainer: Trainer, rows: Sequence[Row]) -> float:
        assert not {row.number for row in rows} & {row.number for row in trainer.rows}
        seen.append({row.number for row in rows})
        return validate(trainer, rows)

    monkeypatch.setattr(Trainer, "validation_loss", validation_loss)
    for seed, data_seed in ((1, 3), (2, 3), (2, 4)):
        entry.finetune(max_steps=1, validation_rows=0.25, seed=seed, data_seed=data_seed)
    assert seen[0] == seen[1] != seen[2]


def test_learning_whole_rows_teaches_the_prompts_too(entry: Entry) -> None:
    """Prompts hold one of a hundred numbers: their loss falls more slowly than that of a copied word."""
    of = {
        what: entry.finetune(max_steps=30, learning_rate=1e-2, loss_on=what)
        for what in ("rows", "completions")
    }
    assert of["rows"].fingerprint != of["completions"].fingerprint
    losses = [of[what].final_loss or 0 for what in ("rows", "completions")]
    assert losses[0] > losses[1] > 0


def test_holding_out_every_row_is_refused(entry: Entry) -> None:
    with pytest.raises(BadInput, match=r"validation_rows.*the dataset has 64 rows"):
        entry.finetune(max_steps=1, validation_rows=64)
