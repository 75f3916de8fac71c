"""The tree of prefixes, and attention over it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    PersimmonConfig,
    PhiConfig,
    Qwen2Config,
    RwkvConfig,
)

from palio.errors import BadInput
from palio.serving.attention import Chunk, attend, attend_unfused
from palio.serving.model import PROBE, PlainModel, TreeModel, WholeModel, choose_model
from palio.serving.prefix_tree import Node, PrefixTree
from tests.support.serving import GROUPED, SMALL


def compute(tree: PrefixTree) -> None:
    """As a model does: each token's keys and values, here its own number."""
    for node in tree.nodes():
        node.filled = len(node.tokens)
        node.memory[0] = torch.tensor(node.tokens, dtype=torch.float32).expand(2, 1, -1).unsqueeze(-1).clone()


def words(node: Node) -> list[list[int]]:
    return [above.tokens for above in node.path()]


def test_what_two_prompts_share_is_one_node() -> None:
    tree = PrefixTree(100)
    (first,) = tree.acquire([1, 2, 3, 4], 1) or []
    (second,) = tree.acquire([1, 2, 5], 1) or []
    assert words(first) == [[1, 2], [3, 4], []]
    assert words(second) == [[1, 2], [5], []]
    assert first.path()[0] is second.path()[0]
    assert tree.size == 5 + 2


def test_a_node_that_is_split_keeps_what_was_computed() -> None:
    tree = PrefixTree(100)
    (first,) = tree.acquire([1, 2, 3, 4], 1) or []
    compute(tree)
    tree.acquire([1, 2, 5], 1)
    assert [(node.tokens, node.begin, node.filled) for node in first.path()[:2]] == [
        ([1, 2], 0, 2),
        ([3, 4], 2, 2),
    ]
    assert [node.memory[0][0, 0, :, 0].tolist() for node in first.path()[:2]] == [[1, 2], [3, 4]]


def test_the_least_recently_used_prompt_makes_room() -> None:
    tree = PrefixTree(10)
    for prompt in ([1, 2, 3], [4, 5, 6], [1, 2, 3]):
        (leaf,) = tree.acquire(prompt, 1) or []
        compute(tree)
        tree.release(leaf)
    tree.acquire([7, 8, 9], 2)
    assert sorted(node.tokens for node in tree.nodes()) == [[1, 2, 3], [7, 8, 9]]
    assert tree.size <= tree.capacity
    assert tree.evicted == 3


def test_what_runs_is_never_evicted() -> None:
    tree = PrefixTree(8)
    (leaf,) = tree.acquire([1, 2, 3], 2) or []
    compute(tree)
    assert tree.acquire([4, 5, 6], 2) is None
    assert [node.tokens for node in tree.nodes()] == [[1, 2, 3]]
    assert tree.size == 5
    tree.release(leaf)
    assert tree.acquire([4, 5, 6], 2)


@pytest.mark.parametrize("rows", [5, 3, 1])
@pytest.mark.parametrize("causal", [True, False])
def test_the_fused_kernel_computes_what_the_definition_says(causal: bool, rows: int) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(6, rows, 8), torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    for ours, expected in zip(
        attend(query, key, value, causal, 0.3), attend_unfused(query, key, value, causal, 0.3), strict=True
    ):
        torch.testing.assert_close(ours, expected)


def test_the_last_of_few_rows_attends_to_all_tokens() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(6, 3, 8), torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    together = attend_unfused(query, key, value, True, 0.3)[0]
    for row, tokens in enumerate((3, 4, 5)):
        alone = attend_unfused(query[:, row : row + 1], key[:, :tokens], value[:, :tokens], False, 0.3)[0]
        torch.testing.assert_close(together[:, row : row + 1], alone)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [40, 7, 1])
@pytest.mark.parametrize("causal", [True, False])
def test_the_gpu_kernel_computes_what_the_definition_says(causal: bool, rows: int) -> None:
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(heads, tokens, 64, dtype=torch.bfloat16, device="cuda")
        for heads, tokens in ((6, rows), (2, 40), (2, 40))
    )
    for ours, expected in zip(
        attend(query, key, value, causal, 0.1), attend_unfused(query, key, value, causal, 0.1), strict=True
    ):
        torch.testing.assert_close(ours.float(), expected.float(), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**GROUPED),
        MistralConfig(**GROUPED, sliding_window=2048),
        Qwen2Config(**GROUPED),
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4),
        GPTNeoXConfig(**SMALL),
        OPTConfig(vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4),
        PhiConfig(**SMALL),
        PersimmonConfig(**SMALL),
    ],
    ids=lambda config: config.model_type,
)
def test_the_competitions_model_families_share_prefixes(config: Any) -> None:
    torch.manual_seed(0)
    model = choose_model(AutoModelForCausalLM.from_config(config).eval())
    assert isinstance(model, TreeModel)
    assert model.token_bytes > 0


def test_a_model_is_served_up_to_its_sliding_window() -> None:
    config = MistralConfig(**GROUPED, sliding_window=2048, max_position_embeddings=8192)
    assert choose_model(AutoModelForCausalLM.from_config(config).eval()).context == 2048


@pytest.mark.parametrize(
    "config",
    [
        BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4),
        FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True),
        Gemma2Config(**GROUPED, head_dim=8),
        MistralConfig(**GROUPED, sliding_window=16),
    ],
    ids=["bloom", "falcon with alibi", "gemma2 with capped scores", "mistral with a short window"],
)
def test_a_model_whose_attention_is_special_is_served_one_by_one(
    config: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    model = choose_model(AutoModelForCausalLM.from_config(config).eval())
    assert isinstance(model, PlainModel)
    assert "not served with shared prefixes" in capfd.readouterr().err


@pytest.mark.parametrize(
    "config",
    [
        MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4),
        RwkvConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2),
    ],
    ids=lambda config: config.model_type,
)
def test_a_model_without_keys_and_values_is_computed_anew_at_every_token(config: Any) -> None:
    torch.manual_seed(0)
    loaded = AutoModelForCausalLM.from_config(config).eval()
    model = choose_model(loaded)
    assert isinstance(model, WholeModel)
    with torch.inference_mode():
        expected = loaded(torch.tensor([PROBE])).logits[0, -1]
    leaf = Node(Node(None, [], 0, 0), PROBE, 0, len(PROBE))
    model.forward([Chunk(leaf, 0, 40, 0)])
    torch.testing.assert_close(model.forward([Chunk(leaf, 40, 48, 1)])[0][0], expected)


@pytest.mark.parametrize("error", [1e-4, 1e-2])
def test_a_way_that_is_off_by_more_than_rounding_is_not_taken(
    error: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = TreeModel.forward

    def slightly_wrong(model: TreeModel, chunks: Sequence[Chunk]) -> list[torch.Tensor]:
        return [logits * (1 + error) for logits in forward(model, chunks)]

    monkeypatch.setattr(TreeModel, "forward", slightly_wrong)
    torch.manual_seed(0)
    assert isinstance(
        choose_model(AutoModelForCausalLM.from_config(LlamaConfig(**GROUPED)).eval()), PlainModel
    )


def test_a_model_that_cannot_compute_a_text_is_refused() -> None:
    broken = AutoModelForCausalLM.from_config(LlamaConfig(**GROUPED)).eval()
    broken.lm_head = torch.nn.Linear(7, 64)
    with pytest.raises(BadInput, match=r"it cannot compute a text of 48 tokens .*; use another base model"):
        choose_model(broken)
