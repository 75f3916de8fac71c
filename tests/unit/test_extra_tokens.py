"""Extra tokens of a recipe: one token each in training, in the package and in its server, and trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from palio.config import FinetuneRecipe, parse
from palio.errors import BadInput
from palio.packaging.verify import verify_package
from palio.records import Layers
from palio.serving.text import Vocabulary
from palio.tensors import add_embeddings
from palio.tokens import Tokens, extended_tokenizer
from palio.training.inspection import inspection, text_lines
from palio.training.model import adapt
from tests.support.training import Entry, copy_rows

EXTRA = ("<|user|>", "<|answer|>")
TABLES = ["embed_tokens", "lm_head"]
METHODS: list[Any] = [
    {"method": "lora", "modules_to_save": TABLES},
    pytest.param({"method": "full"}, marks=pytest.mark.slow),
    pytest.param({"method": "qlora", "modules_to_save": TABLES}, marks=pytest.mark.slow),
]


def marked(entry: Entry) -> Entry:
    """The entry with rows that are marked by the extra tokens."""
    rows = [
        {"prompt": f"<|user|>{row['prompt']}<|answer|>", "completion": row["completion"]}
        for row in copy_rows(64)
    ]
    entry.write_rows(rows)
    return entry


@pytest.mark.parametrize("recipe", METHODS, ids=lambda recipe: recipe["method"])
def test_the_server_gives_a_prompt_the_tokens_that_were_trained(recipe: dict[str, Any], entry: Entry) -> None:
    marked(entry).finetune(max_steps=20, learning_rate=1e-2, extra_tokens=EXTRA, **recipe)
    manifest = entry.package()
    package = entry.folder / "package"
    size = len(AutoTokenizer.from_pretrained(entry.base / "model"))
    prompt = "<|user|>Say red 7:<|answer|>"
    served = Vocabulary.load(package).encode(prompt)
    ((trained, ((start, _),)),) = Tokens(extended_tokenizer(entry.base / "model", EXTRA)).rows(
        [(prompt, " red")]
    )
    assert served == trained[:start]
    assert (served[0], served[-1]) == (size, size + 1)
    assert served == AutoTokenizer.from_pretrained(package)(prompt)["input_ids"]

    model = AutoModelForCausalLM.from_pretrained(package)
    assert manifest.parameters == model.num_parameters()
    for weight in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        assert weight.shape[0] == model.config.vocab_size == size + 2
    user, answer = model.get_input_embeddings().weight[size:]
    assert not torch.allclose(user, answer), "equal at the start, they were trained apart"
    found = verify_package(package, base_models=entry.base.parent)
    assert [one.why for one in found if one.state == "fail"] == []


def test_equal_training_gives_equal_bytes_with_extra_tokens_too(entry: Entry) -> None:
    recipe: dict[str, Any] = {"max_steps": 2, "extra_tokens": EXTRA, "modules_to_save": TABLES}
    first = marked(entry).finetune(**recipe)
    assert {"tokenizer.json", "tokenizer_config.json"} < set(first.files)
    for path in sorted(entry.work().rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    assert entry.finetune(**recipe).files == first.files


def test_new_tokens_start_as_the_mean_of_the_others_and_padded_rows_are_used_first() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=12, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    model = LlamaForCausalLM(config)
    mean = model.get_output_embeddings().weight[:10].mean(0)
    add_embeddings(model, [10, 11])
    assert model.config.vocab_size == 12
    torch.testing.assert_close(model.get_output_embeddings().weight[10:], mean.expand(2, -1))
    add_embeddings(model, [12])
    assert model.config.vocab_size == len(model.get_input_embeddings().weight) == 13


@pytest.mark.parametrize(
    ("recipe", "tied", "fix"),
    [
        ({}, False, "add embed_tokens and lm_head to modules_to_save"),
        ({"modules_to_save": ["embed_tokens"]}, False, "add lm_head to modules_to_save"),
        ({"method": "qlora"}, True, "set method: full"),
        ({"modules_to_save": TABLES}, False, ""),
        ({"method": "full"}, True, ""),
    ],
)
def test_a_method_that_would_not_learn_the_tokens_is_refused_with_the_fix(
    recipe: dict[str, Any], tied: bool, fix: str
) -> None:
    """By `palio check`, from the record of the base model, and before training, from the model."""
    given = FinetuneRecipe.model_validate({"extra_tokens": EXTRA, **recipe})
    layers = Layers(
        parameters=1,
        linear=("q_proj",),
        unsuited=(),
        tied=tuple(TABLES) if tied else (),
        all_linear="",
        quantized=0.9,
        left={},
        embeddings=tuple(TABLES),
    )
    config = LlamaConfig(
        vocab_size=12,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        tie_word_embeddings=tied,
    )
    faults = list(layers.recipe_faults(given))
    if not fix:
        assert faults == []
        adapt(LlamaForCausalLM(config), given)
        return
    with pytest.raises(BadInput) as refused:
        adapt(LlamaForCausalLM(config), given)
    assert [str(fault) for fault in faults] == [str(refused.value)]
    assert refused.value.key == "extra_tokens"
    assert refused.value.fix == fix


def test_a_token_that_the_base_model_has_is_refused(entry: Entry) -> None:
    known = AutoTokenizer.from_pretrained(entry.base / "model").eos_token
    with pytest.raises(BadInput, match=r"extra_tokens is .*the base model's tokenizer has it; leave it out"):
        entry.finetune(max_steps=1, method="full", extra_tokens=[known])


@pytest.mark.parametrize("tokens", [["<a>", "<a>"], [""], [" "]])
def test_a_token_twice_or_of_blanks_is_refused(tokens: list[str]) -> None:
    with pytest.raises(BadInput, match="extra_tokens"):
        parse(FinetuneRecipe, {"extra_tokens": tokens}, "entry")


def test_rows_are_shown_with_their_extra_tokens(entry: Entry, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = {"source": "s", "id": "1", "history": [], "prompt": "<|user|>hi<|answer|>", "completion": "you"}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "train.parquet")
    shown = inspection(
        tmp_path / "train.parquet",
        entry.base / "model",
        FinetuneRecipe(method="full", extra_tokens=EXTRA, loss_on="rows"),
    )
    text = "\n".join(text_lines(shown))
    assert "context  <|user|>\n" in text
    assert "learned  hi│<|answer|>│you│" in click_free(text)


def click_free(text: str) -> str:
    import click

    return click.unstyle(text)
