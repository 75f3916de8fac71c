"""`palio doctor` on a machine: its GPU, disk, base models and the stages' data, each with the line to fix."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
import torch
from huggingface_hub.errors import GatedRepoError

from palio.base_model import fetch_configs
from palio.config import Track, load_entry
from palio.errors import BadInput
from palio.operating import machine
from palio.operating.machine import (
    SeenGpu,
    data_findings,
    disk_findings,
    gpu_findings,
    judged,
    model_findings,
)
from palio.training.device import training_device
from tests.support.folder import ROOT

CPU_TRACK = Track(title="t", ram_gb=4, training_budget="600s")
GPU_TRACKS = {"rtx4090": CPU_TRACK.model_copy(update={"gpu_memory_gb": 24.0, "gpu_model": "rtx4090"})}
BIRBAL = load_entry(ROOT / "config/entries/neurips2023/birbal.yaml")


def lines(findings: Any) -> list[str]:
    return [str(finding) for finding in findings]


# --- the GPU ---------------------------------------------------------------------------------------------


FITS = "its driver runs CUDA 13.1, torch is for 13.0"
OLD = "its driver runs CUDA 12.4, torch is for 13.0"
SMALL = "rtx4090 trains in 24 GB, this GPU has 12.9 GB: run the track on another GPU"


@pytest.mark.parametrize(
    ("gpu", "says"),
    [
        (SeenGpu("4090", 25.7, "13.1", "13.0"), [f"ok   4090: {FITS}; tried with", "ok   rtx4090 trains"]),
        (SeenGpu("3060", 12.9, "13.1", "13.0"), [f"ok   3060: {FITS}; tried with", f"FIX  {SMALL}"]),
        (SeenGpu("A100", 42.5, "12.4", "13.0"), [f"FIX  A100: {OLD}: install a newer"]),
        (SeenGpu("A100", 42.5, "13.1", "13.0", "no kernel"), [f"FIX  A100: {FITS}; torch said: no kernel:"]),
    ],
    ids=["fits", "small", "old driver", "fails"],
)
def test_a_gpu_is_held_against_torch_and_the_tracks(gpu: SeenGpu, says: list[str]) -> None:
    found = lines(judged(gpu, {"rtx4090": 24}))
    assert len(found) == len(says)
    assert all(line.startswith(start) for line, start in zip(found, says, strict=True)), found


def test_a_login_node_without_a_gpu_is_no_fault_and_tracks_on_cpus_need_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(machine, "device_files", list)
    assert lines(gpu_findings(GPU_TRACKS)) == [
        "ok   no GPU on this machine; the nodes that train on rtx4090 need one, see --slurm"
    ]
    assert lines(gpu_findings({"laptop": CPU_TRACK})) == []


def test_a_gpu_whose_driver_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_driver() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_DRIVER_NOT_LOADED)

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(machine, "device_files", lambda: ["/dev/nvidia0"])
    monkeypatch.setattr(pynvml, "nvmlInit", no_driver)
    (finding,) = gpu_findings(GPU_TRACKS)
    assert str(finding) == (
        "FIX  a GPU is here, and its driver does not answer (Driver Not Loaded): make nvidia-smi work first"
    )


def test_torch_for_cpus_trains_on_no_gpu_and_says_so_before_it_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    (finding,) = gpu_findings(GPU_TRACKS)
    assert "is for CPUs alone, and a GPU trains on rtx4090: rm -r .venv; make env TORCH=cuda" in str(finding)
    with pytest.raises(BadInput, match="for CPUs alone, and the track has a GPU; rm -r"):
        training_device(GPU_TRACKS["rtx4090"])


# --- disk, data and models ---------------------------------------------------------------------------------


def test_a_full_disk_is_named_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5e9))
    (finding,) = disk_findings(tmp_path / "results" / "not yet", tmp_path / "store")
    assert str(finding).startswith(f"FIX  5 GB free for {tmp_path}/results/not yet: free some: 20 GB")


def test_a_stage_without_its_questions_says_what_brings_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "resources/stages/open").mkdir(parents=True)
    (tmp_path / "resources/stages/open/stage.json").touch()
    opened, closed = lines(data_findings(SimpleNamespace()))  # type: ignore[arg-type]
    assert opened == "ok   open stage: prepared"
    assert "palio fetch-data --stage closed --list" in closed


def the_hub(monkeypatch: pytest.MonkeyPatch, gate: Exception | None) -> None:
    """A hub that has every model, and lets the token of this machine through or not."""

    def auth_check(repo: str) -> None:
        assert repo == "mistralai/Mistral-7B-v0.1"
        if gate:
            raise gate

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: SimpleNamespace(sha="0" * 40))
    monkeypatch.setattr("huggingface_hub.auth_check", auth_check)


def test_a_base_model_that_the_hub_gives_or_keeps_behind_its_terms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    entries: Any = {"one": BIRBAL, "two": BIRBAL}
    the_hub(monkeypatch, None)
    (given,) = model_findings(entries)
    assert str(given) == f"ok   base model {BIRBAL.base_model.hub}: the hub gives it"
    the_hub(monkeypatch, GatedRepoError("no", response=SimpleNamespace(headers={}, request=None)))
    (kept,) = model_findings(entries)
    assert str(kept) == (
        f"FIX  base model {BIRBAL.base_model.hub} of one, two: the hub gives it only to those who accepted "
        "its terms: accept them at https://huggingface.co/mistralai/Mistral-7B-v0.1 and set "
        "that user's HF_TOKEN"
    )
    with pytest.raises(BadInput, match="accepted its terms; accept them at"):
        fetch_configs(BIRBAL.base_model, tmp_path)


def test_base_models_that_are_here_need_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "resources/base_models" / BIRBAL.base_model.id
    folder.mkdir(parents=True)
    (folder / "manifest.json").touch()
    entries: Any = {"one": BIRBAL}
    assert lines(model_findings(entries)) == ["ok   base models: none is missing that comes from the hub"]
