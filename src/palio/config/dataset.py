"""An entry's dataset: the sources, and what is done to their rows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from palio.config.common import PlainPath, PlainText, Share, Strict
from palio.config.operations import AnyOperation, Input
from palio.errors import InvalidValue


class RowTemplate(Strict):
    """How a record of any shape becomes a row: Jinja templates over the record's fields."""

    prompt: str
    """Template of the prompt, e.g. `"Q: {{ question }}"`."""
    completion: str
    """Template of the completion, e.g. `" {{ answer }}"`."""

    @model_validator(mode="after")
    def _is_jinja(self) -> RowTemplate:
        import jinja2
        from jinja2 import nodes

        # Parsed only: compiling computes constants, and 9**9**9 for hours. Curation compiles, within limits.
        environment = jinja2.Environment(autoescape=False)  # noqa: S701 (never rendered)
        for key in ("prompt", "completion"):
            try:
                tree = environment.parse(getattr(self, key))
                for kind, known in ((nodes.Filter, environment.filters), (nodes.Test, environment.tests)):
                    for unknown in {node.name for node in tree.find_all(kind)} - set(known):
                        raise ValueError(f"no {kind.__name__.lower()} is named {unknown!r}")
            except (jinja2.TemplateSyntaxError, RecursionError, ValueError) as error:
                raise ValueError(f"{key} is not a Jinja template: {error}") from None
        return self


class Markers(Strict):
    """What marks the turns of a transcript. A mark counts at the start of a line only."""

    user: str = "Human:"
    """Mark of the user's turns."""
    assistant: str = "Assistant:"
    """Mark of the model's turns."""
    system: str | None = None
    """Mark of a system turn; omit if there is none. Text before the first mark counts as one too."""

    @model_validator(mode="after")
    def _differ(self) -> Markers:
        marks = [mark.strip() for mark in (self.user, self.assistant, self.system) if mark is not None]
        if not all(marks) or len(set(marks)) < len(marks):
            raise InvalidValue(why="two marks are the same, or one is blank", fix="give each speaker its own")
        return self


class DataSource(Strict):
    """A source of training data: exactly one of `path` and `hub`."""

    path: PlainPath | None = None
    """A `.jsonl`, `.json`, `.csv`, `.tsv` (each also as `.gz` or `.zst`) or `.parquet` file, or a folder
    saved by `datasets`. A `.json` file has an array of records, or records one after the other."""
    hub: str | None = None
    """`org/name@revision` of a dataset on the Hugging Face hub; the revision is a 40-character commit id.
    Offline (`HF_HUB_OFFLINE=1`) this very revision is read from the cache of `datasets`."""
    config: str | None = None
    """Configuration (subset) of a hub dataset; omit it if there is only one."""
    split: str = "train"
    """Split of a hub dataset."""
    streaming: bool = False
    """Read a hub dataset without keeping a copy in the cache; needs the network every time."""
    format: Literal[
        "pairs",
        "alpaca",
        "dolly",
        "sharegpt",
        "lima",
        "messages",
        "oasst",
        "oasst_flat",
        "flan",
        "natural_instructions",
        "transcript",
        "text",
    ] = "pairs"
    """Shape of the records; `palio inspect FILE --raw` tells which. `pairs` has `prompt` and `completion`,
    `flan` has `inputs` and `targets`, `oasst` one conversation tree per record (the best-ranked replies are
    read), `oasst_flat` one message per record with `parent_id` and `rank`, as on the hub,
    `natural_instructions` one task per record, `transcript` one text with all turns, `text` a text without a
    prompt, all of which is learned. A conversation becomes one row, up to its last answer; a system turn
    precedes the first question. Turns of tools are refused."""
    template: RowTemplate | None = None
    """Instead of `format`, for records of any other shape. A null or NaN in a record is an empty text."""
    text: str = "text"
    """Key of the text, for the formats `transcript` and `text`."""
    markers: Markers = Field(default_factory=Markers)
    """Marks of a transcript's turns."""
    roles: dict[str, Literal["user", "assistant", "system"]] = {}
    """Names of speakers in the formats `sharegpt` and `messages` besides user, human, prompter, assistant,
    gpt and system, e.g. `{chatgpt: assistant, bing: assistant}`."""
    drop_greeting: bool = False
    """Leave out the first turn of a conversation if it is the model's. Without it such conversations are
    malformed."""
    id: str = "id"
    """Key of a unique id in the records; lines are numbered where it is blank. `""`: the records have
    none."""
    score: str | None = None
    """Key of a number in the records, for `sample_rows` with `by: score`."""
    name: PlainText | None = None
    """Shown in the data card; defaults to the file's stem or the dataset's name."""
    licence: PlainText
    """SPDX id; must be one of the rule set's `data_licences`."""
    url: PlainText | None = None
    """Where the public finds the data."""
    generator: PlainText | None = None
    """Model (`org/name` on the hub) or program that wrote the data; omit for human-written data."""

    @model_validator(mode="after")
    def _one_of_each(self) -> DataSource:
        if (self.path is None) == (self.hub is None):
            raise ValueError("give either path or hub")
        if self.hub and not re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}", self.hub):
            raise ValueError(
                "write hub as org/name@<40-character commit id>: a branch would change under you"
            )
        if self.hub is None and (self.config or self.streaming or self.split != "train"):
            raise ValueError("config, split and streaming apply to hub datasets only")
        if self.template and self.format != "pairs":
            raise ValueError("give format or template, not both")
        for key, formats in _OF_FORMATS.items():
            default = type(self).model_fields[key].get_default(call_default_factory=True)
            if self.format not in formats and getattr(self, key) != default:
                why = f"format {self.format} has no use for {key}"
                raise InvalidValue(why=why, fix=f"remove it, or set format to {' or '.join(formats)}")
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


_OF_FORMATS = {
    "text": ("transcript", "text"),
    "markers": ("transcript",),
    "roles": ("sharegpt", "messages"),
    "drop_greeting": ("sharegpt", "messages", "transcript"),
}
"""Keys that only some formats use."""


class DatasetRecipe(Strict):
    """Sources, and the operations applied to their rows."""

    sources: tuple[DataSource, ...] = Field(min_length=1)
    """At least one source; names must differ."""
    operations: tuple[AnyOperation, ...] = ()
    """Operations in the order they are applied: `op` and its settings."""
    max_quarantined: Share = 0.05
    """Share of a source's lines that may be malformed; curation fails above it."""
    seed: int = 0
    """Seed of shuffling and sampling."""

    @property
    def phases(self) -> int:
        """Number of phases that shards can run on their own: each ends with an operation that needs all rows,
        or with the last one."""
        ends = [operation.needs_all_rows for operation in self.operations]
        return sum(ends) + (not ends[-1]) if ends else 0

    @property
    def inputs(self) -> list[tuple[str, Input]]:
        """Inputs of the operations, each with its key in the recipe."""
        return [
            (f"operations.{index}.{given.key}", given)
            for index, operation in enumerate(self.operations)
            for given in operation.inputs
        ]

    @property
    def metadata_fields(self) -> list[str]:
        """Fields of the records that operations look at."""
        return sorted({field for operation in self.operations for field in operation.metadata_fields})

    @model_validator(mode="after")
    def _labels_differ(self) -> DatasetRecipe:
        labels = [source.label for source in self.sources]
        if len(set(labels)) < len(labels):
            raise InvalidValue(why="two sources share a name", fix="give each its own name")
        return self
