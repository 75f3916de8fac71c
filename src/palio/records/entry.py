"""Records of an entry's own steps: check, curate, contamination, finetune, package, and their failures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from palio import provenance
from palio.config import BaseModelSource, FinetuneRecipe
from palio.errors import BadInput, State
from palio.records.common import EntryRecord, Part, Record, read_record


class Violation(Part):
    """One broken rule, and how to comply with it."""

    rule: str
    """Id of the rule in the rule set."""
    key: str
    """Key in the entry file; empty for the whole file."""
    why: str
    """What is wrong."""
    fix: str
    """What to change."""

    def __str__(self) -> str:
        where = f"{self.key}: " if self.key else ""
        return f"{where}{self.why}; {self.fix} [{self.rule}]"


class Check(EntryRecord):
    """Outcome of a passed check of an entry against its rule set."""

    rules_version: str
    """Version of the rule set."""
    base_model_family: str
    """Family of the approved base model, by the rule set."""
    notices: list[Violation] = []
    """Points for the organizers to review; they do not stop the entry."""


class Unsupported(Part):
    """What keeps Palio from working with a base model."""

    why: str
    """Family, and what is wrong."""
    fix: str
    """The way out."""


class Layers(Part):
    """What LoRA and QLoRA find in a base model, as its config tells."""

    parameters: int = 0
    """Number of its parameters; 0 in a record of an earlier version."""
    linear: tuple[str, ...]
    """Names of its linear layers, which `target_modules` may have."""
    unsuited: tuple[str, ...] = ()
    """Names of linear layers that LoRA cannot adapt."""
    tied: tuple[str, ...]
    """Names of modules that share their weights: to train one would change the others in the package."""
    all_linear: str = ""
    """Why peft cannot adapt all linear layers; empty if it can."""
    quantized: float
    """Share of its parameters that qlora quantizes."""
    left: dict[str, float]
    """By class of layer, the share of matrices that it does not, besides embeddings and output."""
    embeddings: tuple[str, ...] = ()
    """Last parts of the names of the modules with a row for each token: the embedding, and the output."""

    def recipe_faults(self, recipe: FinetuneRecipe) -> Iterator[BadInput]:
        """Yield what is wrong with a recipe for this base model."""
        if recipe.method == "full":
            return
        yield from extra_tokens_faults(recipe, self.embeddings, bool({*self.embeddings} & {*self.tied}))
        targets = recipe.target_modules
        fix = f"name some of {', '.join(self.linear)}"
        if targets == "all-linear" and self.all_linear:
            yield BadInput("finetune", "target_modules", targets, why=self.all_linear, fix=fix)
        elif wrong := sorted(_ends(targets) & {*self.unsuited}):
            why = f"LoRA cannot adapt {wrong[0]} of this base model"
            yield BadInput("finetune", "target_modules", targets, why=why, fix=fix)
        for key, names in (("target_modules", targets), ("modules_to_save", recipe.modules_to_save)):
            if shared := sorted(_ends(names) & {*self.tied}):
                why = f"the base model ties the weights of {shared[0]} to another module's"
                yield BadInput("finetune", key, names, why=why, fix=f"remove {shared[0]}")
        if recipe.method == "qlora" and sum(self.left.values()) > self.quantized:
            most = max(self.left, key=lambda kind: self.left[kind])
            why = (
                f"bitsandbytes quantizes {self.quantized:.0%} of this base model's parameters and leaves "
                f"{self.left[most]:.0%} in {most} as they are"
            )
            fix = "use lora, or another base model"
            yield BadInput("finetune", "method", recipe.method, why=why, fix=fix)


def extra_tokens_faults(recipe: FinetuneRecipe, embeddings: Sequence[str], tied: bool) -> Iterator[BadInput]:
    """Yield why an adapter would not learn the recipe's extra tokens.

    Args:
        embeddings: last parts of the names of the modules with a row for each token.
        tied: whether they share one matrix.
    """
    lacking = [name for name in embeddings if name not in _ends(recipe.modules_to_save)]
    if not recipe.extra_tokens or not lacking or recipe.method == "full":
        return
    why = f"{recipe.method} trains an adapter, and leaves their rows in {' and '.join(lacking)} as they are"
    fix = "set method: full" if tied else f"add {' and '.join(lacking)} to modules_to_save"
    yield BadInput("finetune", "extra_tokens", recipe.extra_tokens, why=why, fix=fix)


def _ends(names: str | tuple[str, ...]) -> set[str]:
    """Return the last parts of modules' names."""
    return {name.rpartition(".")[2] for name in names} if isinstance(names, tuple) else set()


class BaseModelManifest(Record):
    """A base model as it was fetched."""

    id: str
    """Id of the base model; its folder's name."""
    source: BaseModelSource
    """Where it was fetched from."""
    files: dict[str, str]
    """sha256 by relative path."""
    pickled: dict[str, str] = {}
    """sha256 by name of the pickled files that the weights were converted from; empty if they were not."""
    code: dict[str, str] = {}
    """sha256 by name of the model's own Python files, as the rule set approved them; they run in the sandbox
    only. Empty for a family that transformers knows."""
    unsupported: Unsupported | None = None
    """Why Palio cannot train, package and serve it; null if it can."""
    layers: Layers | None = None
    """What LoRA and QLoRA find in it; null if it is unsupported."""

    @property
    def fingerprint(self) -> str:
        """Identity of the files."""
        return provenance.fingerprint(self.files)

    def require_supported(self) -> None:
        """Raise BadInput if Palio cannot work with this base model; a team's own server may."""
        if self.unsupported is not None:
            facts = self.unsupported.model_dump()
            raise BadInput("base_model", self.source.kind, self.source.address, **facts)

    def recipe_faults(self, recipe: FinetuneRecipe) -> Iterator[BadInput]:
        """Yield what keeps a supported base model from being trained with a recipe."""
        if self.code and recipe.extra_tokens:
            why = "a base model with code of its own is trained with the tokens that it has"
            yield BadInput("finetune", "extra_tokens", recipe.extra_tokens, why=why, fix="remove them")
        yield from self.layers.recipe_faults(recipe) if self.layers else ()


class SourceReport(Part):
    """One source of a dataset, as it was read."""

    name: str
    """Name of the source in the entry file, or its file name."""
    sha256: str
    """Digest of the file; for a saved folder or a pinned hub dataset, of what identifies its content."""
    revision: str | None = None
    """Commit of a hub dataset."""
    licence: str
    """License, as the entry declares it."""
    generator: str | None
    """Model that wrote the data, as the entry declares it; None for data by people."""
    rows: int
    """Well-formed rows read."""
    quarantined: int
    """Malformed lines set aside."""


class OperationReport(Part):
    """What one curation operation did."""

    op: str
    """Name of the operation."""
    settings: dict[str, Any]
    """Its settings, defaults included."""
    rows_in: int
    """Rows before it."""
    rows_out: int
    """Rows after it."""
    changed: int = 0
    """Rows rewritten but kept."""
    dropped_by_source: dict[str, int] = {}
    """Rows dropped, by source."""
    examples: list[str] = []
    """At most three dropped or changed rows, shortened."""


class DatasetManifest(EntryRecord):
    """A curated dataset."""

    recipe_version: str
    """Version of curation; changes when the same settings give other rows."""
    seed: int
    """Seed of all random choices."""
    rows: int
    """Rows of train.parquet."""
    sha256: str
    """Digest of train.parquet: the dataset's identity for the trainer."""
    sources: list[SourceReport]
    """In the order of the entry file."""
    operations: list[OperationReport]
    """In the order in which they ran."""
    rows_by_source: dict[str, int]
    """Rows of train.parquet, by source."""
    characters: dict[str, list[int]]
    """Histograms of prompt and completion lengths: counts in bins of powers of two characters."""


class Contamination(EntryRecord):
    """Overlap of a training dataset with the evaluation instances of both stages: counts only."""

    ngram: int
    """Words that must match in a row."""
    dataset_sha256: str
    """Identity of the dataset."""
    instances: dict[str, dict[str, int]]
    """Evaluation instances by stage and scenario."""
    contaminated: dict[str, dict[str, int]]
    """Of these, how many share their whole text or an n-gram of words with a training row."""
    open_questions: dict[str, list[str]] | None = None
    """Which of the open stage's: HELM's instance ids by HELM run, of every run that asks them. Of the closed
    stage only counts are told. None if it was not recorded."""


def coarse(count: int) -> int:
    """Round up to a power of ten: what leaves the closed stage of a count that a server decides on."""
    return count if count <= 1 else 10 ** len(str(count - 1))


class Contained(Record):
    """What the confinement of a team's program or server held back, over all attempts.

    The file is next to the program's log. Only our own words, never a prompt or a reply.
    """

    counts: dict[str, int]
    """How often, by kind of incident."""

    def __str__(self) -> str:
        return ", ".join(f"{count} × {what}" for what, count in self.counts.items())

    def coarse(self) -> Contained:
        """Return the counts as `coarse` makes them."""
        return Contained(counts={what: coarse(count) for what, count in self.counts.items()})

    @staticmethod
    def file(log: Path) -> Path:
        """Return the path of the record next to `log`."""
        return log.with_suffix(".contained.json")

    @classmethod
    def beside(cls, log: Path) -> Contained:
        """Read the record next to `log`; without one, no incidents."""
        file = cls.file(log)
        return read_record(cls, file) if file.exists() else cls(counts={})


class AdapterManifest(EntryRecord):
    """The result of fine-tuning."""

    fingerprint: str
    """Identity of everything that decides the result."""
    recipe_version: str
    """Version of the trainer or of the contract with a team's program."""
    base_model: str
    """Id of the base model."""
    base_model_fingerprint: str
    """Identity of the base model's files."""
    dataset_sha256: str
    """Identity of the dataset."""
    recipe: dict[str, Any]
    """The finetune or command section of the entry, defaults included."""
    state: Literal["finished", "budget_reached"]
    """How training ended."""
    steps: int | None
    """Optimizer steps taken. None, as for all figures of training, for a team's program: it reports none."""
    planned_steps: int | None
    """Optimizer steps of the whole recipe."""
    rows: int
    """Rows trained on."""
    rows_too_long: int | None
    """Rows left out because they exceed max_length tokens."""
    rows_cut: int = 0
    """Conversations over max_length that were truncated or split (`over_length`)."""
    answers_left_out: int = 0
    """Answers of these that are in no row."""
    rows_held_out: int = 0
    """Rows held out of training for validation."""
    final_loss: float | None
    """Mean training loss of the last ten steps."""
    best_step: int | None = None
    """The step whose weights were kept, where rows were held out for validation; None: the last."""
    validation_loss: float | None = None
    """Validation loss at that step."""
    quantized: float | None = None
    """Share of the base model's parameters that were quantized in training; None without qlora."""
    batching: Literal["end to end", "padded"] | None = None
    """How rows shared a forward pass; None for a team's program."""
    batching_difference: float | None = None
    """Largest difference of a logit from the row alone, in the trainer's start-up check."""
    contained: dict[str, int] = {}
    """What the confinement of a team's own program held back or ended, over all attempts, and how often; of
    the trainer too, if the base model brought code."""
    code: str = ""
    """Fingerprint of the base model's own code, which ran in the sandbox; empty if there was none."""
    files: dict[str, str]
    """sha256 by relative path."""


class ImageConfig(Part):
    """What a container image says of its program."""

    variables: dict[str, str] = {}
    """ENV."""
    arguments: tuple[str, ...] = ()
    """ENTRYPOINT and CMD: program and arguments."""
    directory: str = "/"
    """WORKDIR, where it starts."""
    user: str = ""
    """USER: a name or number, with `:` and a group; empty for root."""
    ports: tuple[int, ...] = ()
    """TCP ports of EXPOSE."""


class ImageManifest(EntryRecord):
    """A container image that was built from a team's Dockerfile."""

    context_sha256: str
    """Identity of the folder that it was built from."""
    digest: str
    """sha256 of the image's manifest."""
    archive_sha256: str
    """sha256 of its OCI archive."""
    builder: str
    """Program that built it, and its version."""
    network: bool
    """Whether the build could use the network, by the rule set."""


class PackageManifest(EntryRecord):
    """A folder that `AutoModelForCausalLM.from_pretrained` loads without our code, or a team's server."""

    kind: Literal["model", "server"] = "model"
    """What the folder holds."""
    base_model: str
    """Id of the base model."""
    base_model_fingerprint: str
    """Identity of the base model's files."""
    adapter_fingerprint: str | None
    """Identity of the adapter; None for a base model as it is and for a server without training."""
    dtype: str | None
    """Data type of most weights. None, like `parameters`, for a server: its weights are its own business."""
    parameters: int | None
    """Number of weights."""
    max_logit_difference: float | None
    """Merged model against base plus adapter on probe prompts, fp32 on CPU; None without an adapter."""
    divergence: float | None = None
    """Mean KL divergence, in nats on the probe prompts, of the package from the model as it was trained:
    what the cast to `dtype` and, after qlora, dequantizing changed. None where neither was done."""
    served: str | None = None
    """How `palio serve` computes it, as tried when it was packaged: with shared prefixes, one sequence at a
    time, or each sequence anew at every token. None for a server."""
    context: int | None = None
    """Tokens of prompt and completion together that it can be served with. None for a server."""
    code: dict[str, str] = {}
    """sha256 by name of the base model's own Python files, which run in the sandbox only; empty if
    transformers knows its family."""
    files: dict[str, str]
    """sha256 by relative path."""

    @property
    def fingerprint(self) -> str:
        """Identity of the files."""
        return provenance.fingerprint(self.files)


class StepFailure(Record):
    """Why a step of an entry did not finish: work/failures/<step>.json, removed when the step succeeds."""

    step: str
    """Name of the step."""
    state: State
    """How it ended."""
    reason: str
    """One line for the standings."""
    log: str | None = None
    """Path of its log."""
