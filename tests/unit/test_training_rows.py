"""Rows laid end to end train exactly as rows alone, and every row is seen once an epoch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
)

from palio.config import FinetuneRecipe
from palio.errors import BadInput
from palio.tokens import Tokens
from palio.training.attention import NAME, row_bounds
from palio.training.rows import (
    Batch,
    Row,
    TooLong,
    flat_batch,
    padded_batch,
    planned_steps,
    split,
    step_rows,
    tokenize,
)

CPU = torch.device("cpu")
SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
ARCHITECTURES = [
    LlamaConfig(**SMALL, intermediate_size=64, num_key_value_heads=2),
    MistralConfig(**SMALL, intermediate_size=64, num_key_value_heads=2),
    Qwen2Config(**SMALL, intermediate_size=64, num_key_value_heads=2),
    GPTNeoXConfig(**SMALL, intermediate_size=64),
    GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4),
]


def rows_of(*lengths: int) -> list[Row]:
    random = np.random.default_rng(1)
    return [
        Row(number, random.integers(0, 97, length).astype(np.int32), ((max(1, length // 2), length),))
        for number, length in enumerate(lengths)
    ]


@pytest.mark.parametrize("config", ARCHITECTURES, ids=lambda config: config.model_type)
def test_rows_end_to_end_give_the_logits_of_each_row_alone(config: PretrainedConfig) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    rows = rows_of(7, 19, 4)
    with torch.inference_mode():
        alone = [model(input_ids=torch.from_numpy(row.ids.astype(np.int64))[None]).logits[0] for row in rows]
        assert model._supports_attention_backend
        model.set_attn_implementation(NAME)
        batch = flat_batch(rows, CPU)
        with row_bounds(batch.bounds, CPU):
            flat = model(**batch.inputs, use_cache=False).logits[0]
    torch.testing.assert_close(flat, torch.cat(alone), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("batch_of", [flat_batch, padded_batch])
def test_the_loss_on_whole_rows_falls_on_all_tokens_but_the_first(
    batch_of: Callable[[Sequence[Row], torch.device], Batch],
) -> None:
    rows = [replace(row, whole=True) for row in rows_of(6, 9)]
    batch = batch_of(rows, CPU)
    assert batch.targets.tolist() == [token for row in rows for token in row.ids[1:]]
    assert batch.inputs["input_ids"].flatten()[batch.predict + 1].tolist() == batch.targets.tolist()
    assert [row.targets for row in rows] == [5, 8]


def test_the_loss_falls_on_completion_tokens_only() -> None:
    rows = rows_of(6, 9)
    flat, padded = flat_batch(rows, CPU), padded_batch(rows, CPU)
    expected = [token for row in rows for start, end in row.answers for token in row.ids[start:end]]
    assert flat.targets.tolist() == expected
    assert padded.targets.tolist() == expected
    # The token before each target is the one it is predicted from.
    assert flat.inputs["input_ids"][0][flat.predict + 1].tolist() == expected


def test_a_prompt_has_the_same_tokens_as_the_server_gives_it(base_model: object) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    ((row,), too_long) = tokenize(Tokens(tokenizer), [("Question: 1 + 1?\nAnswer:", " 2")], 100)
    alone = tokenizer("Question: 1 + 1?\nAnswer:", add_special_tokens=False)["input_ids"]
    ((start, end),) = row.answers
    assert row.ids[:start].tolist() == alone
    assert tokenizer.decode(row.ids[start : end - 1]) == " 2"
    assert row.ids[end - 1 :].tolist() == [tokenizer.eos_token_id]
    assert too_long == TooLong()


def test_rows_over_the_limit_are_left_out_whole_and_counted(base_model: object) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    rows, too_long = tokenize(Tokens(tokenizer), [("short", " a"), ("long " * 50, " b")], 20)
    assert [row.number for row in rows] == [0]
    assert too_long == TooLong(dropped=1)


@pytest.mark.parametrize("chat", [False, True])
def test_a_conversation_over_the_limit_is_dropped_truncated_or_split_at_a_turn(
    base_model: Path, *, chat: bool
) -> None:
    tokens = Tokens(AutoTokenizer.from_pretrained(base_model))
    long = (*TALK[:2], "And?", "word " * 60, *TALK[2:])

    def rows_of_it(over_length: str, max_length: int) -> tuple[list[list[int]], TooLong]:
        rows, too_long = tokenize(tokens, [long], max_length, chat=chat, over_length=over_length)  # type: ignore[arg-type]
        assert all(len(row.ids) <= max_length for row in rows)
        assert {row.number for row in rows} <= {0}
        return [row.ids.tolist() for row in rows], too_long

    def alone(*turns: str) -> list[int]:
        return list(tokenize(tokens, [turns], 500, chat=chat)[0][0].ids)

    limit = len(alone(*TALK[2:]))
    assert rows_of_it("drop", limit) == ([], TooLong(dropped=1))
    assert rows_of_it("truncate", limit) == ([alone(*TALK[:2])], TooLong(cut=1, answers=3))
    assert rows_of_it("split", limit) == ([alone(*TALK[:2]), alone(*TALK[2:])], TooLong(cut=1, answers=1))
    assert rows_of_it("split", 500) == ([alone(*long)], TooLong())
    assert rows_of_it("split", 3) == ([], TooLong(dropped=1))


def test_parts_of_a_conversation_are_held_out_together() -> None:
    rows = [Row(number // 3, np.arange(3, dtype=np.int32), ((1, 3),)) for number in range(30)]
    kept, held = split(rows, 4, seed=1)
    assert len({row.number for row in held}) == 4
    assert len(held) == 12
    assert not {row.number for row in kept} & {row.number for row in held}


@settings(max_examples=30, deadline=None)
@given(
    count=st.integers(1, 60),
    batch=st.integers(1, 9),
    accumulate=st.integers(1, 3),
    epochs=st.integers(1, 3),
    grouped=st.booleans(),
)
def test_every_row_is_seen_once_an_epoch(
    count: int, batch: int, accumulate: int, epochs: int, grouped: bool
) -> None:
    recipe = FinetuneRecipe(
        batch_size=batch, gradient_accumulation=accumulate, epochs=epochs, group_by_length=grouped
    )
    rows = rows_of(*[3] * count)
    seen = Counter(
        row.number for step in range(planned_steps(count, recipe)) for row in step_rows(rows, recipe, step)
    )
    assert seen == Counter(dict.fromkeys(range(count), epochs))


def test_rows_through_the_chat_template_are_those_a_chat_server_makes(base_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    (row,), _ = tokenize(Tokens(tokenizer), [("What is 1 + 1?", "2")], 100, chat=True)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 1 + 1?"}], add_generation_prompt=True, return_dict=False
    )
    ((start, _),) = row.answers
    assert row.ids[:start].tolist() == asked
    assert tokenizer.decode(row.ids[start:]).startswith("2<|im_end|>")


TALK = ("Who won?", "The owl.", "When?", "In July.", "Where?", "In Siena.")


@pytest.mark.parametrize(("chat", "end"), [(False, "<|im_end|>"), (True, "<|im_end|>\n")])
def test_of_a_conversation_every_answer_is_learned_and_nothing_else(
    base_model: Path, *, chat: bool, end: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    rows, _ = tokenize(Tokens(tokenizer), [TALK, TALK[:2]], 200, chat=chat)
    learned = [[tokenizer.decode(row.ids[start:stop]) for start, stop in row.answers] for row in rows]
    assert learned == [[answer + end for answer in TALK[1::2]], [TALK[1] + end]]
    batch = flat_batch(rows, CPU)
    assert tokenizer.decode(batch.targets) == "".join(map("".join, learned))
    for question in TALK[::2]:
        assert question in tokenizer.decode(rows[0].ids)


def test_each_answer_of_a_conversation_is_asked_as_a_chat_server_would(base_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    (row,), _ = tokenize(Tokens(tokenizer), [TALK], 200, chat=True)
    turns = [{"role": ("user", "assistant")[n % 2], "content": turn} for n, turn in enumerate(TALK)]
    for number, (start, _) in enumerate(row.answers):
        asked = tokenizer.apply_chat_template(
            turns[: 2 * number + 1], add_generation_prompt=True, return_dict=False
        )
        assert row.ids[:start].tolist() == asked


def test_a_chat_template_that_rewrites_earlier_turns_is_refused(base_model: Path) -> None:
    """As those that drop the thoughts of all answers but the last."""
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content if loop.last else m.content[:3] }};{% endfor %}"
    )
    with pytest.raises(BadInput, match="changes a turn once it is answered"):
        tokenize(Tokens(tokenizer), [TALK], 200, chat=True)


def test_grouping_by_length_sees_every_row_and_pads_less() -> None:
    rows = rows_of(*np.random.default_rng(0).integers(2, 200, 1003).tolist())

    def padded(*, grouped: bool) -> int:
        recipe = FinetuneRecipe(batch_size=8, group_by_length=grouped)
        steps = [step_rows(rows, recipe, step) for step in range(planned_steps(len(rows), recipe))]
        assert sorted(row.number for step in steps for row in step) == list(range(1003))
        assert len(steps[-1]) == 3
        return sum(len(step) * max(len(row.ids) for row in step) for step in steps)

    real = sum(len(row.ids) for row in rows)
    assert padded(grouped=True) < 1.05 * real
    assert padded(grouped=False) > 1.6 * real


def test_epochs_differ_in_order_and_seeds_do_too() -> None:
    rows = rows_of(*[3] * 64)

    def order(seed: int, step: int) -> list[int]:
        return [row.number for row in step_rows(rows, FinetuneRecipe(batch_size=64, seed=seed), step)]

    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)
    assert order(0, 0) == order(0, 0)


def test_a_data_seed_keeps_the_order_when_the_seed_changes() -> None:
    rows = rows_of(*[3] * 64)

    def order(**seeds: int) -> list[int]:
        return [row.number for row in step_rows(rows, FinetuneRecipe(batch_size=64, **seeds), 0)]

    assert order(seed=1, data_seed=0) == order(seed=2, data_seed=0) == order(seed=0)
    assert order(seed=0, data_seed=1) == order(seed=1)
