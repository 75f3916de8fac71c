"""Rows share a forward pass only where each gets the logits that the model gives it alone."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    JambaConfig,
    JetMoeConfig,
    Lfm2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2Config,
    RecurrentGemmaConfig,
)

from palio.config import FinetuneRecipe
from palio.errors import BadInput
from palio.training.attention import NAME
from palio.training.batching import TOLERANCE, choose_batching
from palio.training.model import adapt
from palio.training.rows import Row
from palio.training.trainer import Trainer

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
END_TO_END = {
    "llama": LlamaConfig(**SMALL),
    "mixture of experts": MixtralConfig(**SMALL, num_local_experts=4),
    "heads viewed in another shape": JetMoeConfig(
        **{key: value for key, value in SMALL.items() if key != "num_attention_heads"},
        kv_channels=8, num_local_experts=4, num_experts_per_tok=2,
    ),
    "window longer than a row": MistralConfig(**SMALL, sliding_window=64),
}  # fmt: skip
PADDED = {
    "mistral's window": (MistralConfig(**SMALL, sliding_window=8), "sliding_window"),
    "qwen2's window": (
        Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=8, max_window_layers=0),
        "sliding_window",
    ),
    "gemma 2's soft caps": (Gemma2Config(**SMALL, head_dim=8), "softcap"),
    "gemma 3's window": (Gemma3TextConfig(**SMALL, head_dim=8, sliding_window=8), "sliding_window"),
    "gpt-oss's sinks": (
        GptOssConfig(**SMALL, head_dim=8, num_local_experts=4, num_experts_per_tok=2),
        "s_aux",
    ),
    "convolutions": (
        Lfm2Config(**SMALL, layer_types=["conv", "full_attention"]),
        "has layers of type conv",
    ),
    "recurrent and attention": (
        RecurrentGemmaConfig(**SMALL | {"num_hidden_layers": 3}, head_dim=8, attention_window_size=16),
        "recurrent",
    ),
    "mamba and attention": (
        JambaConfig(
            **SMALL, num_experts=1, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=4,
            use_mamba_kernels=False, pad_token_id=0,
        ),
        "cannot be replaced",
    ),
    "no attention": (
        MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4),
        "cannot be replaced",
    ),
    "alibi": (BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4), "cannot be replaced"),
}  # fmt: skip


def rows_of(*lengths: int) -> list[Row]:
    random = np.random.default_rng(1)
    return [
        Row(number, random.integers(0, 97, length).astype(np.int32), ((length // 2, length),))
        for number, length in enumerate(lengths)
    ]


def model_of(config: PretrainedConfig) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(config))


@pytest.mark.parametrize("name", END_TO_END)
def test_rows_lie_end_to_end_where_nothing_but_causality_matters(name: str) -> None:
    model = model_of(END_TO_END[name])
    batching = choose_batching(model, rows_of(50, 20, 30, 41), 8, CPU)
    assert (batching.rows, batching.reason) == ("end to end", "")
    assert batching.difference < 1e-6
    assert model.config._attn_implementation == NAME
    assert model.training


@pytest.mark.parametrize("name", PADDED)
def test_rows_are_padded_where_the_model_does_more(name: str) -> None:
    config, reason = PADDED[name]
    model = model_of(config)
    own = model.config._attn_implementation
    batching = choose_batching(model, rows_of(50, 20, 30, 41), 8, CPU)
    assert batching.rows == "padded"
    assert reason in batching.reason
    assert batching.difference < 1e-6
    assert model.config._attn_implementation == own


@pytest.mark.parametrize("name", [*END_TO_END, *PADDED])
def test_the_trained_loss_is_that_of_each_row_alone(name: str) -> None:
    config = END_TO_END[name] if name in END_TO_END else PADDED[name][0]
    model, rows = model_of(config), rows_of(50, 20, 30, 41)
    with torch.no_grad():
        logits = [model.eval()(torch.from_numpy(row.ids.astype(np.int64))[None]).logits[0] for row in rows]
    losses = [
        torch.nn.functional.cross_entropy(
            part[row.predict], torch.from_numpy(row.ids[row.predict + 1].astype(np.int64)), reduction="sum"
        )
        for part, row in zip(logits, rows, strict=True)
    ]
    expected = float(sum(losses)) / sum(row.targets for row in rows)
    recipe = FinetuneRecipe(max_steps=1, batch_size=2, learning_rate=1e-3, method="full")
    flat = choose_batching(model, rows, 2, CPU).rows == "end to end"
    trainer = Trainer(adapt(model, recipe), rows, recipe, CPU, flat=flat)
    assert trainer.validation_loss(rows) == pytest.approx(expected, abs=2e-6)


def test_attention_that_differs_in_what_it_does_not_say_is_found_by_its_logits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a window that is only in the mask: here, keys scaled by the model's own attention alone."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    own = ALL_ATTENTION_FUNCTIONS["sdpa"]
    monkeypatch.setitem(
        ALL_ATTENTION_FUNCTIONS._global_mapping,
        "sdpa",
        lambda module, query, key, *rest, **others: own(module, query, key * 1.01, *rest, **others),
    )
    batching = choose_batching(model_of(LlamaConfig(**SMALL)), rows_of(50, 20, 30), 8, CPU)
    assert batching.rows == "padded"
    assert "a logit would change by" in batching.reason


def test_a_model_that_no_batch_leaves_as_it_is_is_refused_unless_rows_go_one_by_one() -> None:
    model = model_of(BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4))
    forward = model.forward

    def mixing(*args: Any, **inputs: Any) -> Any:
        out = forward(*args, **inputs)
        out.logits = out.logits - out.logits.mean(0, keepdim=True) * (len(out.logits) > 1)
        return out

    model.forward = mixing
    with pytest.raises(
        BadInput, match=r"batch_size is 8: in a batch, bloom changes a logit by .*set it to 1"
    ):
        choose_batching(model, rows_of(50, 20, 30), 8, CPU)
    assert choose_batching(model, rows_of(50, 20, 30), 1, CPU).difference == 0


def test_a_token_whose_weights_are_broken_is_left_to_training_to_name() -> None:
    model, rows = model_of(LlamaConfig(**SMALL)), rows_of(50, 20, 30)
    with torch.no_grad():
        model.get_input_embeddings().weight[int(rows[2].ids[10])] = torch.nan
    batching = choose_batching(model, rows, 8, CPU)
    assert batching.rows == "end to end"
    assert batching.difference < 1e-6


def test_the_check_changes_neither_weights_nor_random_state() -> None:
    model = model_of(LlamaConfig(**SMALL))
    weights, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    choose_batching(model, rows_of(50, 20, 30), 8, CPU)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert TOLERANCE > 1
