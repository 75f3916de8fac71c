"""How Palio's own trainer fine-tunes an entry of kind `recipe`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from palio.config.common import PlainText, Strict
from palio.errors import InvalidValue


def _unlike(tokens: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(tokens)) < len(tokens):
        raise InvalidValue(why="names a token twice", fix="leave one of them out")
    return tokens


def _number_or_share(value: object) -> object:
    """Refuse what is neither in one word: a union would name a fault for each."""
    whole = type(value) is int or (isinstance(value, float) and value.is_integer())
    if (whole and value >= 0) or (isinstance(value, float) and 0 < value < 1):  # type: ignore[operator]
        return value
    why = "is neither a number of rows nor a share of them"
    raise InvalidValue(why=why, fix="give a whole number, such as 200, or a share below 1, such as 0.05")


class FinetuneRecipe(Strict):
    """How Palio's trainer fine-tunes. Defaults are those of the QLoRA paper's recipes, scaled to one GPU."""

    method: Literal["lora", "qlora", "full"] = "lora"
    """`lora`; `qlora`, with a 4-bit or 8-bit base model; or `full` fine-tuning."""
    learning_rate: PositiveFloat = 2e-4
    """Peak learning rate."""
    epochs: PositiveFloat = 1.0
    """Passes over the dataset."""
    max_steps: PositiveInt | None = None
    """Optimizer steps to stop after; omit to train `epochs`."""
    batch_size: PositiveInt = 8
    """Rows per forward pass; lower it if memory runs out."""
    gradient_accumulation: PositiveInt = 1
    """Forward passes per optimizer step."""
    max_length: PositiveInt = 2048
    """Tokens of prompt and completion together."""
    over_length: Literal["drop", "truncate", "split"] = "drop"
    """Conversations longer than `max_length`: `drop` them, `truncate` them after the last answer that fits,
    or `split` them into several before a question; later parts lack what was said before. Never inside a
    turn: an answer that does not fit even with its question alone is left out. The adapter's record counts
    all of them."""
    chat_template: bool = False
    """Format rows with the tokenizer's chat template, as a user's turn and its answer. HELM sends plain
    prompts: only for a package whose server applies the template too."""
    loss_on: Literal["completions", "rows"] = "completions"
    """What is learned: `completions`, or `rows` whole, prompts too."""
    extra_tokens: Annotated[
        tuple[Annotated[PlainText, Field(min_length=1)], ...], AfterValidator(_unlike)
    ] = ()
    """Texts that become one token each wherever they occur, in training and in serving, e.g. `<|user|>`. They
    start as the mean of all embeddings. Adapters learn them only with the embeddings in `modules_to_save`."""
    group_by_length: bool = False
    """Batch rows of similar length. Rows are packed end to end and do not need it; it saves padding with
    architectures that cannot be packed (Bloom, Falcon with ALiBi, MPT)."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """Share of the steps over which the learning rate warms up."""
    warmup_steps: NonNegativeInt | None = None
    """Number of steps over which it warms up, in place of `warmup_ratio`."""
    scheduler: Literal["linear", "cosine", "constant_with_warmup"] = "cosine"
    """Shape of the learning rate after warmup."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay of AdamW."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """AdamW's decay of the mean of gradients."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """AdamW's decay of the mean of squared gradients; 0.95 for large batches."""
    adam_epsilon: PositiveFloat = 1e-8
    """What AdamW adds to the root of the latter."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients with a larger norm are clipped to this."""
    optimizer: Literal["adamw_torch", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"] = "adamw_torch"
    """AdamW; the 8-bit and paged variants need less GPU memory."""
    lora_r: PositiveInt = 16
    """Rank of the adapter."""
    lora_alpha: PositiveInt = 32
    """Scale of the adapter: it is multiplied by `lora_alpha / lora_r`."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Modules that get an adapter."""
    modules_to_save: tuple[str, ...] = ()
    """Modules trained in full beside the adapter, e.g. lm_head, embed_tokens."""
    rslora: bool = False
    """Scale the adapter by `lora_alpha / sqrt(lora_r)` (arXiv 2312.03732): for large `lora_r`."""
    dora: bool = False
    """Train direction and magnitude separately (arXiv 2402.09353): better at small `lora_r`, slower."""
    quantization: Literal["nf4", "fp4", "int8"] = "nf4"
    """Format of the frozen base model with `qlora`; 4-bit formats use double quantization."""
    lora_init: Literal["default", "pissa", "loftq"] = "default"
    """Initial adapter: no change; with `lora`, the base weights' principal directions (`pissa`, arXiv
    2404.02948); with 4-bit `qlora`, what quantization lost (`loftq`, arXiv 2310.08659)."""
    neftune_alpha: PositiveFloat | None = None
    """Noise added to the embeddings in training (arXiv 2310.05914), e.g. 5; omit for none."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, slower."""
    compile_layers: bool = False
    """Compile each layer (torch.compile), for long runs on a GPU: a quarter faster on an H200, after about a
    minute of the budget in every attempt. `benchmarks/finetune.py --device cuda --shape 7b` measures it."""
    save_steps: PositiveInt = 50
    """Optimizer steps between checkpoints: the most that a crash can cost."""
    validation_rows: Annotated[
        NonNegativeInt | Annotated[float, Field(gt=0, lt=1)], BeforeValidator(_number_or_share)
    ] = 0
    """Rows held out of training, or their share of the dataset, e.g. 0.05. Their loss is measured every
    `save_steps`, and the step with the lowest loss is handed in; 0 hands in the last step."""
    patience: PositiveInt | None = None
    """Stop after this many validations without a lower loss; omit to train to the end."""
    seed: int = 0
    """Seed of initialization, row order and dropout."""
    data_seed: NonNegativeInt | None = None
    """Seed of the row order and of the rows held out, where it is to stay as `seed` changes."""

    @property
    def order_seed(self) -> int:
        """Seed of the row order and of the rows held out."""
        return self.seed if self.data_seed is None else self.data_seed

    def held_out_of(self, rows: int) -> int:
        """Return how many of the dataset's rows are held out; of a share at least one."""
        given = self.validation_rows
        return given if isinstance(given, int) else max(1, round(given * rows))

    @model_validator(mode="after")
    def _patience_needs_validation(self) -> FinetuneRecipe:
        if self.patience is not None and self.validation_rows == 0:
            raise InvalidValue(why="patience needs validation_rows", fix="give both or neither")
        return self

    @model_validator(mode="after")
    def _init_fits_method(self) -> FinetuneRecipe:
        if self.lora_init == "pissa" and (self.method != "lora" or self.dora or self.modules_to_save):
            raise ValueError("lora_init: pissa needs method lora, without dora and modules_to_save")
        if self.lora_init == "loftq" and (self.method != "qlora" or self.quantization == "int8"):
            raise ValueError("lora_init: loftq needs method qlora with 4 bits (nf4 or fp4)")
        return self
