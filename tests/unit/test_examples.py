"""The example programs for teams: each is trained or served here as an entry's would be, on a tiny model."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from palio.config import Isolation, Program, ServerProgram
from palio.errors import RuleViolation
from palio.evaluation.probe import Asked, probe
from palio.evaluation.window import Window
from palio.layout import BaseModelFolder
from palio.operating.reproduction import weight_distance
from palio.packaging.server import package_server
from palio.sandbox.room import Limits
from palio.sandbox.server import team_server
from palio.settings import PackageSettings
from tests.support.programs import run_command
from tests.support.training import Entry, copy_rows

EXAMPLES = Path(__file__).parents[2] / "config/entries/examples"
MB = 1 << 20
LIMITS = Limits(memory=4096 * MB, processes=128, scratch=64 * MB, output=64 * MB, cpus=1)
UVICORN = "python -m uvicorn main:app --host 127.0.0.1 --port $PORT"


@contextmanager
def serving(entry: Entry, program: ServerProgram, *, adapter: bool) -> Iterator[str]:
    """Package the entry with its server and start it; yield the URL."""
    settings = PackageSettings(competition_id="c", base_model_id="tiny", adapter=adapter, server=program)
    package_server(program, entry.at, settings, BaseModelFolder(entry.base))
    server = team_server(
        entry.folder / "package",
        base_model=entry.base / "model",
        limits=LIMITS,
        isolation=Isolation(),
        log=entry.folder / "server.log",
        work=entry.folder / "work",
        ready_seconds=120,
    )
    with server:
        yield server.base_url
        assert server.alive()


def ask(url: str, prompt: str, **settings: Any) -> dict[str, Any]:
    reply = requests.post(f"{url}/process", json={"prompt": prompt, **settings}, timeout=60)
    assert reply.status_code == 200, reply.text
    answer: dict[str, Any] = reply.json()
    return answer


# --- a server in the manner of lit-gpt -------------------------------------------------------------------


def test_its_own_model_gives_the_logits_of_transformers(
    tiny: Path, base_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model with an output layer of its own, and of the demo's, whose is tied; token by token too."""
    monkeypatch.syspath_prepend(str(EXAMPLES / "lit_gpt"))
    own = import_module("model")
    sys.modules.pop("model")
    ids = torch.tensor([7, 300, 12, 41, 5])
    for folder in (tiny / "model", base_model):
        reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model = own.Llama.load(folder)
        with torch.inference_mode():
            expected = reference(input_ids=ids[None]).logits[0]
            cache: list[list[torch.Tensor]] = []
            parts = [model(ids[:2], cache), *(model(ids[one : one + 1], cache) for one in (2, 3, 4))]
        torch.testing.assert_close(torch.cat(parts), expected, atol=2e-3, rtol=1e-3)


def test_the_server_of_its_own_model_passes_the_probe(entry: Entry) -> None:
    program = ServerProgram(run="python main.py", files=str(EXAMPLES / "lit_gpt"))
    with serving(entry, program, adapter=False) as url:
        report = probe(url, Asked(), Window.of_model(entry.base / "model"))
        ids = requests.post(f"{url}/tokenize", json={"text": "Say red"}, timeout=60).json()["tokens"]
        text = requests.post(f"{url}/decode", json={"tokens": ids}, timeout=60).json()["text"]
        echoed = ask(url, "Say red", max_new_tokens=2, echo_prompt=True)
    assert report.conforms
    assert report.failed == []
    assert text == "Say red"
    assert str(echoed["text"]).startswith("Say red")


# --- a trainer driven by YAML ----------------------------------------------------------------------------


def trainer(folder: Path, **settings: object) -> Program:
    """The example's trainer with another YAML file."""
    shutil.copytree(EXAMPLES / "yaml_trainer", folder, dirs_exist_ok=True)
    (folder / "mine.yml").write_text(json.dumps({"save_steps": 2, **settings}))  # JSON is YAML
    return Program(run=("python", "train.py", "mine.yml"), files=str(folder))


def test_the_yaml_file_says_how_to_train_and_the_seed_is_the_replicates(entry: Entry, tmp_path: Path) -> None:
    program = trainer(tmp_path / "files", lora_r=4, max_steps=2, micro_batch_size=2)
    own = run_command(entry, program, budget="300s")
    assert (own.state, own.recipe["method"]) == ("finished", "lora")
    weights = load_file(entry.folder / "adapter/adapter_model.safetensors")
    assert {min(tensor.shape) for tensor in weights.values()} == {4}
    entry.package()
    first = {name: tensor.numpy() for name, tensor in weights.items()}
    run_command(entry, program, budget="300s", seed=2, replace=True)
    again = load_file(entry.folder / "adapter/adapter_model.safetensors")
    assert any(not np.array_equal(first[name], again[name].numpy()) for name in first)


@pytest.mark.slow
def test_a_training_longer_than_the_budget_ends_inside_it(entry: Entry, tmp_path: Path) -> None:
    program = trainer(tmp_path / "files", lora_r=4, max_steps=10**6, micro_batch_size=2)
    manifest = run_command(entry, program, budget="90s")
    assert manifest.state in ("finished", "budget_reached")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(manifest.files)
    training = entry.run().training
    assert training is not None
    assert 45 < training.training_seconds < 90


# --- two adapters and a router ---------------------------------------------------------------------------

COUNTS = [{"prompt": f"What follows {n}, {n + 1}, {n + 2}?", "completion": f" {n + 3}"} for n in range(64)]


@pytest.fixture(scope="module")
def two(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Entry:
    """An entry with two adapters, one trained on words, the other on numbers."""
    folder = tmp_path_factory.mktemp("two")
    entry = Entry.create(folder / "entry", tiny)
    rows = {"words": copy_rows(64), "numbers": COUNTS}
    entry.write_rows([{**row, "source": name} for name, of in rows.items() for row in of])
    adapters = {name: [name] for name in rows}
    settings = {"lora_r": 8, "max_steps": 40, "learning_rate": 0.02, "train_on_inputs": True}
    manifest = run_command(entry, trainer(folder / "files", adapters=adapters, **settings), budget="300s")
    assert manifest.recipe["adapters"] == ["numbers", "words"]
    assert manifest.recipe["method"] == "lora"
    return entry


def test_each_prompt_goes_to_the_adapter_that_expects_it(two: Entry) -> None:
    program = ServerProgram(run=UVICORN, files=str(EXAMPLES / "adapter_router"))
    with serving(two, program, adapter=True) as url:
        ask(url, "Say green 7:", max_new_tokens=2)
        ask(url, "What follows 70, 71, 72?", max_new_tokens=2)
        log = (two.folder / "server.log").read_text()
        report = probe(url, Asked(), Window.of_model(two.base / "model"))
    routed = [line for line in log.splitlines() if line.startswith("adapter ")]
    assert routed == ["adapter words", "adapter numbers"]
    assert report.conforms
    assert report.failed == []
    assert (weight_distance(two.folder / "adapter/words", two.folder / "adapter/numbers") or 0) > 0.1
    assert weight_distance(two.folder / "adapter", two.folder / "package/adapter") == 0


def test_several_adapters_without_a_server_of_their_own_are_refused(two: Entry) -> None:
    with pytest.raises(RuleViolation, match=r"left adapters numbers, words .*; leave one in PALIO_OUTPUT"):
        two.package()
