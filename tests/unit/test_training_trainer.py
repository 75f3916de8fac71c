"""Optimizer steps: what a saved state holds, what the schedule says, what a GPU must agree on."""

from __future__ import annotations

import copy
import io
import math
from functools import cache, partial, partialmethod
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from palio.config import FinetuneRecipe
from palio.errors import BadInput
from palio.training import loss
from palio.training.attention import NAME, kernel_dtype, row_bounds
from palio.training.model import adapt
from palio.training.rows import Row, flat_batch
from palio.training.trainer import NonFiniteLossError, Trainer, learning_rate

CPU = torch.device("cpu")
CONFIG = LlamaConfig(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)


def rows_of(count: int) -> list[Row]:
    random = np.random.default_rng(0)
    return [
        Row(n, random.integers(0, 97, 5 + n % 11).astype(np.int32), ((3, 5 + n % 11),)) for n in range(count)
    ]


def trainer_of(
    recipe: FinetuneRecipe,
    *,
    config: LlamaConfig = CONFIG,
    flat: bool = True,
    device: torch.device = CPU,
) -> Trainer:
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).to(device)
    return Trainer(adapt(model, recipe), rows_of(40), recipe, device, flat=flat)


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_saved_state_goes_on_bit_by_bit(optimizer: str, method: str) -> None:
    recipe = FinetuneRecipe.model_validate(
        {
            "optimizer": optimizer,
            "method": method,
            "max_steps": 6,
            "lora_dropout": 0.2,
            "neftune_alpha": 5.0,
            "learning_rate": 1e-2,
        }
    )
    whole = trainer_of(recipe)
    reports = [whole.train_step() for _ in range(6)]
    first = trainer_of(recipe)
    for _ in range(3):
        first.train_step()
    file = io.BytesIO()
    torch.save(first.state(), file)
    file.seek(0)
    second = trainer_of(recipe)
    torch.manual_seed(99)  # a new process starts from any random state
    second.restore(torch.load(file, weights_only=True))
    again = [second.train_step() for _ in range(3)]
    assert [report.loss for report in again] == [report.loss for report in reports[3:]]
    theirs = second.trained()
    assert all(torch.equal(value, theirs[name]) for name, value in whole.trained().items())


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["paged_adamw_8bit", "paged_adamw_32bit"])
def test_a_paged_optimizer_is_paged_after_a_resume_too(optimizer: str) -> None:
    wide = copy.deepcopy(CONFIG)
    wide.intermediate_size = 4096  # bitsandbytes pages no small parameters
    recipe = FinetuneRecipe.model_validate({"optimizer": optimizer, "method": "full", "max_steps": 6})
    whole, second = (trainer_of(recipe, config=wide, device=torch.device("cuda")) for _ in range(2))
    for _ in range(3):
        whole.train_step()
    file = io.BytesIO()
    torch.save(whole.state(), file)
    file.seek(0)
    second.restore(torch.load(file, map_location="cpu", weights_only=True))
    again = [second.train_step().loss for _ in range(3)]
    assert again == pytest.approx([whole.train_step().loss for _ in range(3)], rel=1e-3)
    moments = [second.optimizer.state[p]["state1"] for p in second.parameters if p.numel() > 1e5]
    assert len(moments) == 6
    assert all(moment.is_paged for moment in moments)


def test_padded_rows_train_like_rows_end_to_end() -> None:
    recipe = FinetuneRecipe(max_steps=5, learning_rate=1e-2)
    flat, padded = trainer_of(recipe), trainer_of(recipe, flat=False)
    ours = [flat.train_step().loss for _ in range(5)]
    assert ours == pytest.approx([padded.train_step().loss for _ in range(5)], rel=1e-4)
    assert flat.validation_loss(rows_of(9)) == pytest.approx(padded.validation_loss(rows_of(9)), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_loss_and_its_gradient_are_torchs_cross_entropy(dtype: torch.dtype) -> None:
    """Of more rows than are taken at a time, with answers that are almost sure and almost excluded."""
    positions, scale = 2 * loss.ROWS + 7, 2.0**16
    logits = (8 * torch.randn(positions, 50, generator=torch.Generator().manual_seed(0))).to(dtype)
    targets = torch.arange(positions) % 50
    found: list[tuple[torch.Tensor, Any]] = []
    for function in (
        loss.summed_cross_entropy,
        lambda values, wanted: torch.nn.functional.cross_entropy(values.float(), wanted, reduction="sum"),
    ):
        values = logits.clone().requires_grad_()
        total = function(values, targets)
        torch.autograd.backward(total / positions * scale)
        found.append((total.detach(), values.grad))
    (total, gradient), (expected, its_gradient) = found
    assert gradient.dtype == its_gradient.dtype == dtype
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(gradient, its_gradient)
    with torch.no_grad():
        assert loss.summed_cross_entropy(logits, targets) == total


def test_validation_changes_nothing() -> None:
    recipe = FinetuneRecipe(max_steps=4, lora_dropout=0.2, neftune_alpha=5.0)
    with_it, without = trainer_of(recipe), trainer_of(recipe)
    for _ in range(4):
        with_it.validation_loss(rows_of(5))
    torch.manual_seed(3)
    ours = []
    for _ in range(4):
        ours.append(with_it.train_step().loss)
        with_it.validation_loss(rows_of(5))
    torch.manual_seed(3)
    assert ours == [without.train_step().loss for _ in range(4)]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_attention_is_computed_in_bf16_as_a_gpus_kernel_wants_it(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("palio.training.trainer.compute_dtype", lambda device: torch.bfloat16)
    seen: list[tuple[torch.dtype, torch.dtype]] = []

    def watched(query: torch.Tensor) -> torch.dtype:
        seen.append((query.dtype, kernel_dtype(query)))
        return seen[-1][1]

    monkeypatch.setattr("palio.training.attention.kernel_dtype", watched)
    trainer_of(FinetuneRecipe.model_validate({"method": method, "max_steps": 1})).train_step()
    # In both layers; queries were rotated by fp32 angles, the base model being fp32.
    assert seen == 2 * [(torch.float32, torch.bfloat16)]
    assert kernel_dtype(torch.zeros(1)) == torch.float32


def test_fp16_skips_a_step_that_overflows_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    # As on a GPU without bf16; a CPU can compute fp16 too, only slowly.
    monkeypatch.setattr("palio.training.trainer.compute_dtype", lambda device: torch.float16)
    recipe = FinetuneRecipe(max_steps=12, learning_rate=1e-2)
    trainer = trainer_of(recipe)
    trainer._scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = {name: value.clone() for name, value in trainer.trained().items()}
    first = trainer.train_step()
    assert not math.isfinite(first.grad_norm)
    assert all(torch.equal(value, before[name]) for name, value in trainer.trained().items())
    trainer._scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    losses = [trainer.train_step().loss for _ in range(8)]
    monkeypatch.undo()
    exact = trainer_of(recipe)
    exact.step = 1
    assert losses == pytest.approx([exact.train_step().loss for _ in range(8)], rel=0.01)


def test_a_step_that_is_not_applied_leaves_no_trace() -> None:
    recipe = FinetuneRecipe(max_steps=4, lora_dropout=0.2)
    trainer, undisturbed = trainer_of(recipe), trainer_of(recipe)
    for one in (trainer, undisturbed):
        torch.manual_seed(3)
        one.train_step()
    expected = undisturbed.train_step().loss
    torch.manual_seed(3)
    trainer = trainer_of(recipe)
    torch.manual_seed(3)
    trainer.train_step()
    weight = trainer.parameters[0]
    kept = weight.detach().clone()
    weight.data.fill_(torch.nan)
    with pytest.raises(NonFiniteLossError):
        trainer.train_step()
    weight.data.copy_(kept)
    assert trainer.train_step().loss == expected


@pytest.mark.parametrize(
    ("scheduler", "last"), [("linear", 0.05), ("cosine", 0.0062), ("constant_with_warmup", 1.0)]
)
def test_the_rate_rises_then_follows_the_schedule(scheduler: str, last: float) -> None:
    recipe = FinetuneRecipe.model_validate(
        {"scheduler": scheduler, "learning_rate": 1.0, "warmup_ratio": 0.2}
    )
    rates = [learning_rate(recipe, step, 25) for step in range(25)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[-1] == pytest.approx(last, abs=1e-3)
    assert rates[5:] == sorted(rates[5:], reverse=True)


def test_warmup_steps_take_the_place_of_the_ratio() -> None:
    recipe = FinetuneRecipe(
        scheduler="constant_with_warmup", learning_rate=1.0, warmup_ratio=0.5, warmup_steps=4
    )
    assert [learning_rate(recipe, step, 25) for step in range(5)] == pytest.approx(
        [0.25, 0.5, 0.75, 1.0, 1.0]
    )
    none = recipe.model_copy(update={"warmup_steps": 0})
    assert learning_rate(none, 0, 25) == 1.0


def test_adams_moments_and_epsilon_are_the_recipes() -> None:
    """One step from zero moves a weight by rate * g / (|g| + epsilon), whatever the moments' decays."""
    from palio.training.trainer import _optimizer

    recipe = FinetuneRecipe(learning_rate=1.0, adam_beta1=0.5, adam_beta2=0.9, adam_epsilon=3.0)
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = _optimizer(recipe, [weight])
    weight.grad = torch.ones(1)
    optimizer.step()
    assert weight.item() == pytest.approx(-1 / (1 + 3.0))
    weight.grad = torch.zeros(1)
    optimizer.step()
    mean, squares = 0.25 / (1 - 0.5**2), 0.09 / (1 - 0.9**2)
    assert weight.item() == pytest.approx(-1 / 4 - mean / (squares**0.5 + 3.0))


@pytest.mark.gpu
def test_the_gpus_attention_keeps_rows_apart_as_the_cpus_does() -> None:
    device = torch.device("cuda")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIG), dtype=torch.bfloat16).to(device).eval()
    rows = rows_of(6)
    with torch.inference_mode():
        ids = [torch.from_numpy(row.ids.astype(np.int64))[None].to(device) for row in rows]
        alone = torch.cat([model(input_ids=row).logits[0] for row in ids])
        model.set_attn_implementation(NAME)
        batch = flat_batch(rows, device)
        with row_bounds(batch.bounds, device):
            out = model(**batch.inputs, use_cache=False)
    torch.testing.assert_close(out.logits[0], alone, atol=0.02, rtol=0.02)


DEEP = copy.deepcopy(CONFIG)
DEEP.num_hidden_layers = 12  # more than dynamo compiles one by one


def compiled_and_not(device: torch.device, **settings: object) -> tuple[list[float], list[float]]:
    """Losses of three steps, with compiled layers and without."""

    def losses(compiled: bool) -> list[float]:
        given = {
            "max_steps": 3,
            "learning_rate": 1e-2,
            "batch_size": 2,
            "compile_layers": compiled,
            **settings,
        }
        trainer = trainer_of(FinetuneRecipe.model_validate(given), config=DEEP, device=device)
        return [trainer.train_step().loss for _ in range(3)]

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        compiled = losses(True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0  # it did compile
    return compiled, losses(False)


@pytest.mark.parametrize(
    "settings",
    [{}, {"gradient_checkpointing": True, "lora_dropout": 0.1}, {"dora": True}, {"method": "full"}],
)
def test_compiled_layers_train_as_the_others_do(
    settings: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    # All of torch.compile but its last part: on a CPU that is minutes of C++ compiling.
    quick: dict[str, Any] = {"backend": "aot_eager"}
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, **quick))
    compiling = cache(partial(torch.compile, dynamic=True, **quick))
    monkeypatch.setattr("palio.training.trainer._compiled", compiling)
    compiled, plain = compiled_and_not(CPU, **settings)
    assert compiled == pytest.approx(plain, rel=1e-5)


@pytest.mark.gpu
def test_kernels_compiled_for_the_gpu_train_as_the_others_do() -> None:
    compiled, plain = compiled_and_not(torch.device("cuda"))
    assert compiled == pytest.approx(plain, rel=1e-2)


@pytest.mark.parametrize(
    ("recipe", "key"),
    [
        ({"target_modules": ["lm_head"]}, "target_modules"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "target_modules"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save"),
    ],
)
def test_an_adapter_on_one_of_two_tied_modules_is_refused(recipe: dict[str, Any], key: str) -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**{**CONFIG.to_dict(), "tie_word_embeddings": True}))
    with pytest.raises(BadInput, match=rf"finetune: {key} is .*ties the weights of .*; remove "):
        adapt(model, FinetuneRecipe.model_validate(recipe))
    untied = AutoModelForCausalLM.from_config(CONFIG)
    adapt(untied, FinetuneRecipe.model_validate(recipe))
