"""The numeric core of fine-tuning: optimizer steps, and a state that can be saved.

It knows tensors, rows and a recipe, but no files, budgets or records. The step number is the position in
the data and in the schedule, so a state is parameters, optimizer, loss scale and random state; on a CPU a
resumed run repeats an uninterrupted one bit by bit.
"""

from __future__ import annotations

import inspect
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch

from palio.quantization import evaluation_mode
from palio.training.attention import NAME, row_bounds, row_lengths
from palio.training.loss import summed_cross_entropy
from palio.training.model import compute_dtype
from palio.training.rows import Batch, Row, flat_batch, padded_batch, planned_steps, step_rows

if TYPE_CHECKING:
    from palio.config import FinetuneRecipe


class NonFiniteLossError(Exception):
    """Loss or gradient is NaN or infinite; the step was not applied."""

    def __init__(self, step: int, what: str, rows: Sequence[Row]) -> None:
        super().__init__(f"{what} at step {step}, on rows {[row.number for row in rows]} of the dataset")


@dataclass(frozen=True)
class StepReport:
    """Telemetry of one optimizer step."""

    step: int
    """From 1."""
    loss: float
    """Mean cross-entropy over the step's learned tokens, in nats."""
    learning_rate: float
    grad_norm: float
    """L2 norm before clipping."""
    tokens: int
    """Tokens of prompts and completions, without padding."""
    seconds: float


def learning_rate(recipe: FinetuneRecipe, step: int, steps: int) -> float:
    """Return the rate of step `step` (from 0) of `steps`: linear warm-up, then the recipe's schedule."""
    warmup = recipe.warmup_steps
    if warmup is None:
        warmup = math.ceil(recipe.warmup_ratio * steps)
    if step < warmup:
        return recipe.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    factor = {
        "linear": 1 - done,
        "cosine": 0.5 * (1 + math.cos(math.pi * done)),
        "constant_with_warmup": 1.0,
    }[recipe.scheduler]
    return recipe.learning_rate * factor


class Trainer:
    """Trains the parameters of `model` that require gradients, on `rows`, according to `recipe`."""

    def __init__(
        self, model: Any, rows: Sequence[Row], recipe: FinetuneRecipe, device: torch.device, *, flat: bool
    ) -> None:
        """With `flat`, rows are laid end to end; otherwise they are padded and masked."""
        self.model, self.rows, self.recipe, self.device, self.flat = model, rows, recipe, device, flat
        self.step = 0
        self.steps = planned_steps(len(rows), recipe)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = _optimizer(recipe, self.parameters)
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        if flat:
            inner.set_attn_implementation(NAME)
        self._keeps_logits = "logits_to_keep" in inspect.signature(inner.forward).parameters
        if recipe.neftune_alpha is not None:
            inner.get_input_embeddings().register_forward_hook(_noise(recipe.neftune_alpha))
        if recipe.compile_layers:
            _compile_layers(inner)
        dtype = compute_dtype(device)
        self._autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
        self._scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        model.train()

    def train_step(self) -> StepReport:
        """Take one optimizer step. Raises NonFiniteLossError, leaving the trainer's state as it was."""
        clock, random = time.perf_counter(), self._random()
        recipe, rows = self.recipe, step_rows(self.rows, self.recipe, self.step)
        rate = learning_rate(recipe, self.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        targets = sum(row.targets for row in rows)
        total = torch.zeros((), device=self.device)
        # Rows of similar length share a forward pass, which saves padding.
        ordered = rows if self.flat else sorted(rows, key=lambda row: len(row.ids))
        for start in range(0, len(ordered), recipe.batch_size):
            total += self._backward(ordered[start : start + recipe.batch_size], targets)
        self._scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, recipe.max_grad_norm)
        loss, norm_value = total.item(), norm.item()
        if not self._applicable(loss, norm_value):
            self.optimizer.zero_grad(set_to_none=True)
            self._set_random(random)
            what = "the gradient is not finite" if math.isfinite(loss) else f"the loss is {loss}"
            raise NonFiniteLossError(self.step + 1, what, rows)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        tokens = sum(len(row.ids) for row in rows)
        return StepReport(self.step, loss, rate, norm_value, tokens, time.perf_counter() - clock)

    def _applicable(self, loss: float, norm: float) -> bool:
        """Return False if the step must not be applied; an fp16 overflow only lowers the loss scale."""
        overflow = self._scaler.is_enabled() and self._scaler.get_scale() > 1
        return math.isfinite(loss) and (math.isfinite(norm) or overflow)

    def _backward(self, rows: Sequence[Row], targets: int) -> torch.Tensor:
        """Add the gradient of the rows' share of the step's mean loss; return that share."""
        with self._loss(rows) as loss:
            share = loss / targets
            self._scaler.scale(share).backward()  # type: ignore[no-untyped-call]
        return share.detach()

    @torch.no_grad()
    def validation_loss(self, rows: Sequence[Row]) -> float:
        """Return the mean cross-entropy over learned tokens, in nats, without dropout or noise."""
        evaluation_mode(self.model)
        total, targets = 0.0, sum(row.targets for row in rows)
        for start in range(0, len(rows), self.recipe.batch_size):
            with self._loss(rows[start : start + self.recipe.batch_size]) as loss:
                total += loss.item()
        self.model.train()
        return total / targets

    @contextmanager
    def _loss(self, rows: Sequence[Row]) -> Iterator[torch.Tensor]:
        """Yield the summed cross-entropy over the learned tokens of `rows`.

        The backward pass belongs inside the block: recomputed layers need the rows' bounds again.
        """
        batch = (flat_batch if self.flat else padded_batch)(rows, self.device)
        with row_bounds(batch.bounds, self.device):
            with self._autocast:
                logits = self._logits(batch)
            loss = summed_cross_entropy(logits, batch.targets)
            del logits  # their gradient, as large, takes their place
            yield loss

    def _logits(self, batch: Batch) -> torch.Tensor:
        """Return the (K, vocabulary) logits at the positions the loss is taken on.

        The model computes no others if it can: with a large vocabulary they would take most of the memory.
        """
        if self.flat and self._keeps_logits:
            picked: torch.Tensor = self.model(
                **batch.inputs, logits_to_keep=batch.predict, use_cache=False
            ).logits
            return picked.squeeze(0)  # an index's gradient would be a copy
        logits: torch.Tensor = self.model(**batch.inputs, use_cache=False).logits
        return logits.flatten(0, 1)[batch.predict]

    def trained(self) -> dict[str, torch.Tensor]:
        """Return the trained parameters by name (not copies)."""
        return {n: p.detach() for n, p in self.model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def put(self, parameters: dict[str, torch.Tensor]) -> None:
        """Set trained parameters by name."""
        own = dict(self.model.named_parameters())
        for name, value in parameters.items():
            own[name].copy_(value)

    def state(self) -> dict[str, Any]:
        """Return everything a later process needs to continue from here."""
        return {
            "step": self.step,
            "parameters": self.trained(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "random": self._random(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a state that `state` returned."""
        self.step = state["step"]
        self.put(state["parameters"])
        self.optimizer.load_state_dict(state["optimizer"])
        _page(self.optimizer)
        self._scaler.load_state_dict(state["scaler"])
        self._set_random(state["random"])

    def _random(self) -> list[torch.Tensor]:
        """Return the random states of the CPU and, if it trains, the GPU."""
        return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if self.device.type == "cuda" else [])]

    def _set_random(self, states: list[torch.Tensor]) -> None:
        torch.set_rng_state(states[0].cpu())
        for state in states[1:]:
            torch.cuda.set_rng_state(state.cpu())


def _noise(alpha: float) -> Callable[[Any, Any, torch.Tensor], torch.Tensor]:
    """Return NEFTune's hook (arXiv 2310.05914): uniform noise in ±alpha / sqrt(row length · width)."""

    def hook(module: Any, inputs: Any, embedded: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return embedded
        lengths = row_lengths(embedded)
        size = alpha / torch.sqrt(lengths * embedded.shape[-1])
        noise = torch.empty_like(embedded).uniform_(-1, 1)
        return embedded + noise * size[..., None].to(embedded.dtype)

    return hook


def _compile_layers(model: Any) -> None:
    """Compile each decoder layer in place, once for all lengths; attention itself is not compiled."""
    lists = (module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    layers: Any = max(lists, key=len)
    for layer in layers:
        if getattr(layer, "gradient_checkpointing", False):
            # torch.compile skips a whole layer if its checkpoint contains anything it cannot compile.
            layer._gradient_checkpointing_func = partial(_compiled_inside, layer._gradient_checkpointing_func)
        else:
            layer.compile(dynamic=True)


def _compiled_inside(checkpoint: Callable[..., Any], layer: partial[Any], *inputs: Any) -> Any:
    """Call `checkpoint` on the compiled forward of a layer, bound as transformers binds it."""
    return checkpoint(partial(_compiled(layer.func), *layer.args, **layer.keywords), *inputs)


@cache
def _compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(forward, dynamic=True)


def _optimizer(recipe: FinetuneRecipe, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    settings: dict[str, Any] = {
        "lr": recipe.learning_rate,
        "betas": (recipe.adam_beta1, recipe.adam_beta2),
        "eps": recipe.adam_epsilon,
        "weight_decay": recipe.weight_decay,
    }
    if recipe.optimizer == "adamw_torch":
        return torch.optim.AdamW(parameters, fused=True, **settings)
    import bitsandbytes

    kind = {
        "adamw_8bit": bitsandbytes.optim.AdamW8bit,
        "paged_adamw_8bit": bitsandbytes.optim.PagedAdamW8bit,
        "paged_adamw_32bit": bitsandbytes.optim.PagedAdamW32bit,
    }[recipe.optimizer]
    optimizer: torch.optim.Optimizer = kind(parameters, **settings)
    return optimizer


def _page(optimizer: Any) -> None:
    """Move a paged optimizer's moments back to pages: bitsandbytes loads them into GPU memory."""
    if not getattr(optimizer, "is_paged", False):
        return
    for parameter, moments in optimizer.state.items():
        for name in {"state1", "state2"} & moments.keys():
            pages = optimizer.get_state_buffer(parameter, dtype=moments[name].dtype)
            moments[name] = pages.copy_(moments[name])


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes: of the GPU's allocator, or of this process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
