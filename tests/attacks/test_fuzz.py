"""Fuzzing of what comes in: honest files with a few values, or bytes, that are not. What comes out is the
result or one line of ours, within seconds and a gigabyte.

    PALIO_FUZZ_SECONDS=3600 python -m pytest tests/attacks/test_fuzz.py     an hour, shared by the targets

Without the variable it is a minute. A failing example is printed, and is tried first the next time.
"""

from __future__ import annotations

import copy
import json
import os
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from palio.config import DatasetRecipe, load_competition, parse
from palio.curation.source import read_source
from palio.eligibility.entry_file import check_file, participants
from palio.errors import PalioError
from palio.evaluation.reply import Unanswered, checked_reply
from palio.incoming import shard_names
from palio.limits import bounded, in_child
from palio.markup import terminal
from palio.sandbox.model_files import (
    adapter_settings,
    check_adapter,
    check_claims,
    check_weights,
    folder_tensors,
    generation_config,
    model_config,
    tensors,
)
from palio.settings import CheckedAgainst
from tests.support.folder import ROOT

SECONDS = float(os.environ.get("PALIO_FUZZ_SECONDS", "60"))
TARGETS = 7
HANG_SECONDS, MEMORY = 5.0, 1 << 30

NASTY: list[Any] = [
    10**400, -1, 0, 1 << 63, 1e308, float("nan"), float("inf"), True, None, "", "\x1b[2J", "\u202e", "\x00",
    "../../x", "/etc/passwd", "x" * 5000, "(a+)+$", "{{ 9**9 }}", "9" * 5000, [], {}, [[[[[[[[]]]]]]]],
    {"a": {"b": {}}}, ["x"] * 500, "!!python/object", "*a", "&a", "=1+1", "2023-99-99",
]  # fmt: skip
_LEAF = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
ODD = st.sampled_from(NASTY) | st.recursive(
    _LEAF,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)


@st.composite
def mutated(draw: st.DrawFn, content: Any) -> Any:
    """The content with one to three values replaced, removed or added."""
    content = copy.deepcopy(content)
    for _ in range(draw(st.integers(1, 3))):
        place = content
        while isinstance(place, dict | list) and place:
            key = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
            inner = place[key]
            if isinstance(inner, dict | list) and inner and draw(st.booleans()):
                place = inner
                continue
            what = draw(st.sampled_from(["replace", "remove", "add"]))
            if what == "replace":
                place[key] = copy.deepcopy(draw(ODD))
            elif what == "remove":
                del place[key]
            elif isinstance(place, dict):
                place[draw(st.text(max_size=12))] = copy.deepcopy(draw(ODD))
            else:
                place.append(copy.deepcopy(draw(ODD)))
            break
    return content


@st.composite
def torn(draw: st.DrawFn, content: bytes) -> bytes:
    """The bytes with some of them changed, cut out or doubled."""
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, max(0, len(content) - 1)))
        length = draw(st.integers(0, 16))
        content = content[:place] + draw(st.binary(max_size=16)) + content[place + length :]
    return content


def as_json(content: Any) -> bytes:
    return json.dumps(content).encode()


def fuzz(examples: st.SearchStrategy[Any], target: Callable[[Any], None]) -> None:
    """Try examples for the target's share of the time. Only errors of ours may be raised."""
    end = time.monotonic() + SECONDS / TARGETS

    @settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
    @given(examples)
    def try_one(example: Any) -> None:
        if time.monotonic() > end:
            return
        with bounded(seconds=HANG_SECONDS, memory=MEMORY) as watched:
            for each in watched([example]):
                try:
                    target(each)
                except (PalioError, Unanswered) as fault:
                    assert "\n" not in str(fault)

    while time.monotonic() < end:
        try_one()


ENTRY = {
    "team": "Acme",
    "team_members": ["Ada", "Bob"],
    "track": "a100",
    "base_model": {"hub": f"mistralai/Mistral-7B-v0.1@{'0' * 40}"},
    "dataset": {
        "sources": [
            {"path": "resources/teams/a.jsonl", "licence": "MIT", "url": "https://x.org", "name": "a"}
        ],
        "operations": [{"op": "drop_matches", "patterns": ["x"]}, {"op": "cap_rows", "most": 5}],
    },
    "finetune": {"learning_rate": 2e-4, "method": "lora", "lora_r": 8},
}


def test_entry_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    against = CheckedAgainst.of(load_competition(ROOT / "config/neurips2023.yaml"))
    against = against.model_copy(update={"rules": str(ROOT / "config/rulesets/neurips2023.yaml")})
    file = tmp_path / "a.yaml"

    def check(content: bytes) -> None:
        participants.cache_clear()
        file.write_bytes(content)
        assert not [line for line in check_file(file, against).lines() if line != terminal(line)]

    def dumped(content: Any) -> bytes:
        return yaml.safe_dump(content, allow_unicode=True).encode(errors="surrogatepass")

    fuzz(mutated(ENTRY).map(dumped).flatmap(torn), check)


ADAPTER = {
    "peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none",
    "rank_pattern": {"q_proj": 4}, "layers_to_transform": [0], "init_lora_weights": True, "use_dora": False,
    "modules_to_save": None, "task_type": "CAUSAL_LM",
}  # fmt: skip


def test_adapter_configs(tiny: Path) -> None:
    from peft import LoraConfig

    base = folder_tensors(tiny / "model")
    shapes = {
        f"base_model.model.model.layers.0.self_attn.q_proj.lora_{part}.weight": size
        for part, size in {"A": (4, 32), "B": (32, 4)}.items()
    }
    weights = {name: np.zeros(size, "f4") for name, size in shapes.items()}
    path = tiny / "fuzzed.safetensors"
    path.write_bytes(save(weights))
    held = tensors(path)

    def rewrite(content: Any) -> None:
        kept = adapter_settings(content, "base", 32)
        check_adapter(held, kept, base)
        LoraConfig(**{key: value for key, value in kept.items() if key != "peft_type"})
        assert len(json.dumps(kept)) < 1 << 20

    fuzz(mutated(ADAPTER), rewrite)


def test_model_configs(tiny: Path) -> None:
    model = tiny / "model"
    held = folder_tensors(model)
    config = json.loads((model / "config.json").read_text())
    base = {key: value for key, value in config.items() if not key.endswith("_token_id")}

    def rewrite(content: Any) -> None:
        kept = model_config(content, model, held)
        assert base.items() <= kept.items()
        check_claims(kept, held)
        generation_config(content, 100)

    fuzz(mutated(config), rewrite)


def test_weight_files(tmp_path: Path) -> None:
    whole = save({"a": np.zeros((2, 3), "f4"), "b": np.zeros(5, "f2")}, {"format": "pt"})
    length = int.from_bytes(whole[:8], "little")
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    path = tmp_path / "model.safetensors"

    def built(content: Any) -> bytes:
        text = as_json(content)
        return b"".join([len(text).to_bytes(8, "little"), text, data])

    def read(content: bytes) -> None:
        path.write_bytes(content)
        check_weights(tensors(path), {})

    fuzz(mutated(header).map(built).flatmap(torn) | torn(whole), read)


def test_index_files() -> None:
    index = {
        "metadata": {"total_size": 9},
        "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"},
    }

    def read(content: bytes) -> None:
        assert all("/" not in name for name in shard_names("model.safetensors.index.json", content))

    fuzz(mutated(index).map(as_json).flatmap(torn), read)


def test_saved_datasets(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    Dataset.from_list([{"prompt": f"{n}?", "completion": "yes"} for n in range(20)]).save_to_disk(folder)
    state = json.loads((folder / "state.json").read_text())
    table = next(folder.glob("*.arrow"))
    source = {"path": str(folder), "licence": "MIT"}
    (given,) = parse(DatasetRecipe, {"sources": [source]}, "recipe").sources

    def read(content: tuple[bytes, bytes]) -> None:
        (folder / "state.json").write_bytes(content[0])
        table.write_bytes(content[1])
        # in a process of its own, as the step: Arrow may die of a table that was torn
        in_child(lambda: deque(map(str, read_source(given, [])), 0).clear(), memory=64 << 30, seconds=60)

    fuzz(st.tuples(mutated(state).map(as_json).flatmap(torn), torn(table.read_bytes())), read)


REPLY = {"text": " yes", "tokens": [{"text": " yes", "logprob": -1.0}], "logprob": -1.0, "request_time": 0.1}


def test_replies_of_servers() -> None:
    body = {"prompt": "Siena?", "max_new_tokens": 2, "echo_prompt": False}

    def hold(content: bytes) -> None:
        try:
            reply = json.loads(content)
        except (ValueError, RecursionError):
            return  # the gateway's and the client's to name
        if isinstance(reply, dict):
            assert len(json.dumps(checked_reply(reply, body))) < 1 << 16

    fuzz(mutated(REPLY).map(as_json).flatmap(torn), hold)
