"""One tensor of keys and values for all requests: what a GPU is served with, here by the kernel of a CPU."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig, PhiConfig, Qwen2Config

from palio.serving import model as serving_model
from palio.serving.attention import Chunk
from palio.serving.model import PooledModel, TreeModel
from palio.serving.pooled import PooledPlan, Sequences
from palio.serving.prefix_tree import Node, PrefixTree
from palio.serving.regions import Regions
from palio.serving.request import Request
from palio.serving.transformers_engine import TransformersEngine
from tests.support.serving import GROUPED, SMALL

ROOT = Path(__file__).parents[2]


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 100)), max_size=60))
def test_regions_never_overlap_and_all_come_back(steps: list[tuple[int, int]]) -> None:
    """Each step takes a length, or where there is no room gives one back that is chosen by the number."""
    regions = Regions(32)
    taken: list[tuple[int, int]] = []
    for length, number in steps:
        first = regions.take(length)
        if first is not None and length:
            rows = set(range(first, first + length))
            assert rows <= set(range(32))
            assert not any(rows & set(range(other, other + more)) for other, more in taken)
            taken.append((first, length))
        elif taken:
            regions.give_back(*taken.pop(number % len(taken)))
    for first, length in taken:
        regions.give_back(first, length)
    assert regions.take(32) == 0


def test_the_smallest_region_that_is_large_enough_is_taken() -> None:
    regions = Regions(20)
    first, second, third = (regions.take(length) for length in (5, 5, 3))
    assert (first, second, third) == (0, 5, 10)
    regions.give_back(0, 5)
    regions.give_back(10, 3)
    assert regions.take(4) == 0


def occupied(tree: PrefixTree, leaves: list[Node]) -> list[tuple[int, int]]:
    nodes = [*tree.nodes(), *leaves]
    assert all(node.offset is not None for node in nodes if node.capacity)
    return sorted((node.offset or 0, node.capacity) for node in nodes if node.capacity)


@settings(max_examples=200)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 2), max_size=8), st.integers(1, 5), st.integers(1, 2)), max_size=40
    )
)
def test_nodes_of_the_tree_never_overlap_and_a_prompt_that_fits_is_served_when_nothing_runs(
    prompts: list[tuple[list[int], int, int]],
) -> None:
    tree = PrefixTree(24, Regions(24))
    running: list[Node] = []
    for tokens, own, copies in prompts:
        leaves = tree.acquire(tokens, own, copies)
        while leaves is None:
            assert running, "with nothing running, what fits alone is admitted"
            tree.release(running.pop(0))
            leaves = tree.acquire(tokens, own, copies)
        running += leaves
        for node in tree.nodes():
            node.filled = len(node.tokens)
        regions = occupied(tree, running)
        assert all(first + length <= after for (first, length), (after, _) in pairwise(regions))
        assert sum(length for _, length in regions) == tree.size <= tree.capacity


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**GROUPED),
        Qwen2Config(**GROUPED),
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4),
        OPTConfig(vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4),
        PhiConfig(**SMALL),
    ],
    ids=lambda config: config.model_type,
)
def test_logits_are_those_of_a_whole_pass(config: Any) -> None:
    torch.manual_seed(0)
    loaded = AutoModelForCausalLM.from_config(config).eval()
    expected = loaded(torch.tensor([serving_model.PROBE])).logits[0, -16:]
    pooled = PooledModel(loaded)
    for found in serving_model._probe_shared(pooled):
        torch.testing.assert_close(found, expected)
    assert pooled.token_bytes == TreeModel(loaded).token_bytes


def test_the_self_check_of_a_running_server_touches_nobodys_memory() -> None:
    torch.manual_seed(0)
    model = PooledModel(AutoModelForCausalLM.from_config(LlamaConfig(**GROUPED)).eval())
    (leaf,) = model.tree(48).acquire(list(range(20)), 28) or []
    leaf.tokens = list(range(20, 48))
    assert leaf.parent is not None
    model.forward([Chunk(leaf.parent, 0, 20, 0), Chunk(leaf, 0, 10, 0)])
    before = {layer: memory[:, :48].clone() for layer, memory in model._pool.layers.items()}
    serving_model.check_model(model)
    assert all(torch.equal(before[layer], memory[:, :48]) for layer, memory in model._pool.layers.items())


def test_sequences_that_overlap_are_refused() -> None:
    with pytest.raises(ValueError, match="overlap"):
        Sequences(False, [(0, 5, [0]), (4, 2, [1])]).call(torch.device("cpu"))


def plan(in_flight: int) -> PooledPlan:
    model = PooledModel(AutoModelForCausalLM.from_config(LlamaConfig(**GROUPED)).eval())
    leaves = model.tree(2000).acquire(list(range(10)), 20, in_flight) or []
    for leaf in leaves:
        leaf.tokens = list(range(10, 20))
    return PooledPlan([Chunk(leaf, 9, 10, 1) for leaf in leaves], model._pool, torch.device("cpu"))


def test_there_are_as_many_operations_for_many_requests_as_for_one() -> None:
    assert len(plan(64).calls) == len(plan(1).calls) == 2
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/serving.py"), "--overhead"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    counts = dict(re.findall(r"(?m)^\| (\d+) \| \d+ \| (\d+) \|", done.stdout))
    assert int(counts["64"]) <= 1.3 * int(counts["1"]), done.stdout + done.stderr


PROMPTS = [
    f"{shared}. {own}" * 3 for shared in ("One two", "One three") for own in ("a b c", "d", "e f", "g")
]


def answers(package: Path, cache_gb: float | None) -> tuple[list[list[tuple[str, float]]], dict[str, float]]:
    engine = TransformersEngine(package, device="cpu", threads=1, cache_gb=cache_gb, max_context=128)
    try:
        asked = [
            engine.submit(Request(prompt, max_new_tokens=9, num_return_sequences=1 + number % 2))
            for number, prompt in enumerate(PROMPTS * 3)
        ]
        found = [[(one.text, one.logprob) for one in future.result(120)] for future in asked]
        return found, engine.metrics()
    finally:
        engine.close()


def test_the_engine_gives_the_same_answers_in_little_memory(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = answers(package, None)
    monkeypatch.setattr(serving_model, "choose_model", PooledModel)
    needed = 140 * serving_model.load_model(package, "cpu", None).token_bytes / 1e9
    found, counts = answers(package, needed)
    assert counts["cache_tokens_evicted_total"] > 0, "the memory was too small for all prompts"
    for ours, others in zip(found, expected, strict=True):
        assert [text for text, _ in ours] == [text for text, _ in others]
        assert [logprob for _, logprob in ours] == pytest.approx([logprob for _, logprob in others], abs=1e-3)
