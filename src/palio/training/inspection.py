"""Rows as the trainer sees them: their tokens, which of them are learned, and what was too long.

`palio inspect DATASET --tokens` shows it before any training, from the very function that the trainer calls.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import pyarrow.parquet as pq

from palio.config import FinetuneRecipe
from palio.errors import BadInput
from palio.markup import visible
from palio.tokens import extended_tokenizer
from palio.training.rows import Row, TooLong, dataset_rows

WHITE_SPACE = str.maketrans({"\n": "⏎", "\t": "⇥", "\r": "␍"})
BARS = 24
"""Bars of the histogram of lengths."""


class Token(NamedTuple):
    number: int
    """In the vocabulary."""
    text: str
    """As it adds to what is before it; of part of a character the tokenizer's own name for it."""
    special: bool
    """A control token, such as BOS or EOS; text that spells one is not."""
    learned: bool
    """The loss is taken on it."""


@dataclass(frozen=True)
class SeenRow:
    """A row of the dataset, or a part of one that was split."""

    name: str
    """Source and id."""
    part: str
    """As `2 of 3`; empty if it is the only one."""
    fate: str
    """What was cut off; empty if nothing was."""
    tokens: list[Token]

    @property
    def learned(self) -> int:
        return sum(token.learned for token in self.tokens)


@dataclass
class Inspection:
    """All that training would make of a dataset."""

    recipe: FinetuneRecipe
    tokenizer: Any
    rows: list[Row]
    too_long: TooLong
    names: list[tuple[str, str]]
    """Source and id of every row of the dataset."""
    answers: list[int]
    """Number of answers of every row of the dataset."""
    lengths: dict[int, int]
    """Of the dropped rows, by row: tokens of the whole row."""
    lost: Counter[str]
    """Characters that the tokenizer has no tokens for, and in how many rows of the dataset they are."""
    _texts: dict[int, str] = field(default_factory=dict)

    @cached_property
    def lines(self) -> list[str]:
        """What a reader wants to know of all rows, in sentences."""
        lengths = np.array([len(row.ids) for row in self.rows] or [0])
        learned = sum(row.targets for row in self.rows)
        over = f"longer than max_length = {self.recipe.max_length}"
        lines = [f"{len(self.names)} rows in the dataset, {len(self.rows)} to train on"]
        if self.too_long.dropped:
            lines.append(f"{self.too_long.dropped} rows dropped: {over}")
        if self.too_long.cut:
            done = {
                "truncate": "truncated after the last answer that fits",
                "split": "split before a question",
            }
            lines.append(
                f"{self.too_long.cut} rows {done[self.recipe.over_length]}: {over}; "
                f"{self.too_long.answers} of their answers are left out"
            )
        if self.lost:
            which = ", ".join(
                f"U+{ord(char):04X} in {count} rows" for char, count in self.lost.most_common(5)
            )
            more = " and others" if len(self.lost) > 5 else ""
            lines.append(f"characters lost or changed, which the tokenizer does not know: {which}{more}")
        low, middle, high, most = np.percentile(lengths, [0, 50, 95, 100])
        lines.append(f"tokens a row: {low:.0f} to {most:.0f}, median {middle:.0f}, 95 % up to {high:.0f}")
        lines.append(
            f"{learned} of {lengths.sum()} tokens are learned ({learned / max(1, lengths.sum()):.0%})"
        )
        template = (
            "the tokenizer's chat template" if self.recipe.chat_template else "plain text, no chat template"
        )
        return [*lines, f"format: {template}"]

    def dropped(self) -> Iterator[str]:
        """Yield a line for each dropped row."""
        for number, length in self.lengths.items():
            yield f"{' '.join(self.names[number])}: {length} tokens"

    def seen(self, source: str | None = None, limit: int | None = None) -> Iterator[SeenRow]:
        """Yield the rows of a source, or of all, those that were cut first."""
        parts = Counter(row.number for row in self.rows)
        kept = Counter[int]()
        for row in self.rows:
            kept[row.number] += len(row.answers)
        place = Counter[int]()
        numbered = []
        for row in self.rows:
            place[row.number] += 1
            numbered.append((kept[row.number] == self.answers[row.number], row, place[row.number]))
        wanted = (
            (row, part)
            for _, row, part in sorted(numbered, key=lambda item: item[0])
            if source in (None, self.names[row.number][0])
        )
        for row, part in islice(wanted, limit):
            lost = self.answers[row.number] - kept[row.number]
            yield SeenRow(
                name=" ".join(self.names[row.number]),
                part=f"{part} of {parts[row.number]}" if parts[row.number] > 1 else "",
                fate=f"{lost} of {self.answers[row.number]} answers left out" if lost else "",
                tokens=self._tokens(row),
            )

    def _tokens(self, row: Row) -> list[Token]:
        learned = np.zeros(len(row.ids), dtype=bool)
        for start, end in row.learned:
            learned[start:end] = True
        special = set(self.tokenizer.all_special_ids) | {
            number for number, token in self.tokenizer.added_tokens_decoder.items() if token.special
        }
        return [
            Token(number, self._text(number), number in special, flag)
            for number, flag in zip(row.ids.tolist(), learned.tolist(), strict=True)
        ]

    def _text(self, number: int) -> str:
        """Return what a token adds to the text before it: on its own a first space would be lost."""
        if number not in self._texts:
            before = self.tokenizer.encode("a", add_special_tokens=False)

            def decoded(ids: list[int]) -> str:
                return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

            text = decoded([*before, number])[len(decoded(before)) :]
            whole = text and "\ufffd" not in text
            self._texts[number] = text if whole else str(self.tokenizer.convert_ids_to_tokens(number))
        return self._texts[number]

    def histogram(self) -> list[tuple[str, int]]:
        """Return how many rows have how many tokens, in `BARS` equal steps."""
        lengths = np.array([len(row.ids) for row in self.rows] or [0])
        counts, edges = np.histogram(
            lengths, bins=min(BARS, int(lengths.max()) + 1), range=(0, lengths.max() + 1)
        )
        return [
            (f"{np.ceil(low):.0f} to {np.ceil(high) - 1:.0f}", int(count))
            for count, low, high in zip(counts, edges, edges[1:], strict=False)
        ]


def inspection(dataset: Path, model_folder: Path, recipe: FinetuneRecipe) -> Inspection:
    """Tokenize a dataset (train.parquet) as the trainer does.

    Raises:
        BadInput: there is no such dataset or base model, or the trainer would refuse it.
    """
    if not dataset.is_file():
        raise BadInput(dataset, why="no such dataset", fix="curate it first")
    if not model_folder.is_dir():
        raise BadInput(model_folder, why="no such base model", fix="fetch it first, or give --base-model")
    rows, too_long = dataset_rows(dataset, model_folder, recipe)
    table = pq.read_table(dataset, columns=["source", "id", "history", "prompt", "completion"])
    sources, ids, histories, *sides = (column.to_pylist() for column in table.columns)
    lengths = {}
    if too_long.dropped:
        kept = {row.number for row in rows}
        whole, _ = dataset_rows(dataset, model_folder, recipe.model_copy(update={"max_length": sys.maxsize}))
        lengths = {row.number: len(row.ids) for row in whole if row.number not in kept}
    tokenizer = extended_tokenizer(model_folder, recipe.extra_tokens)
    texts = ("".join((*history, *pair)) for history, *pair in zip(histories, *sides, strict=True))
    return Inspection(
        recipe=recipe,
        tokenizer=tokenizer,
        rows=rows,
        too_long=too_long,
        names=list(zip(sources, ids, strict=True)),
        answers=[len(history) // 2 + 1 for history in histories],
        lengths=lengths,
        lost=_lost(tokenizer, texts),
    )


def _lost(tokenizer: Any, texts: Iterable[str]) -> Counter[str]:
    """Count the texts that have a character which does not come back from its tokens, by character."""

    @cache
    def survives(char: str) -> bool:
        # Between letters: some tokenizers drop a space at the start or the end.
        ids = tokenizer.encode(f"a{char}a", add_special_tokens=False)
        return char in tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    return Counter(char for text in texts for char in set(text) if not survives(char))


# --- text and HTML ----------------------------------------------------------------------------------------


def shown(token: Token) -> str:
    """Return a token's text on one line, white space and control characters visible."""
    text = visible(token.text).translate(WHITE_SPACE)
    return f"⟦{text}⟧" if token.special else text


def text_lines(found: Inspection, source: str | None = None, limit: int | None = None) -> Iterator[str]:
    """Yield lines for a terminal. Tokens are divided by │; learned ones are green, and on lines of their own,
    so that a log shows it too."""
    yield from found.lines
    for line in found.dropped():
        yield f"dropped: {visible(line)}"
    for row in found.seen(source, limit):
        yield ""
        yield f"--- {_heading(row)}"
        for learned, run in groupby(row.tokens, key=lambda token: token.learned):
            line = "│".join(map(shown, run))
            yield click.style(f"learned  {line}", fg="green") if learned else f"context  {line}"


def _heading(row: SeenRow) -> str:
    facts = [f"{len(row.tokens)} tokens, {row.learned} learned", row.part and f"part {row.part}", row.fate]
    return f"{visible(row.name)}: {'; '.join(filter(None, facts))}"


def html_page(found: Inspection, title: str, source: str | None = None, limit: int | None = None) -> str:
    """Return the same as one HTML file, without scripts."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("palio.training"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    rows: Sequence[SeenRow] = list(found.seen(source, limit))
    return environment.get_template("tokens.html.j2").render(
        title=visible(title),
        lines=found.lines,
        dropped=[visible(line) for line in found.dropped()],
        histogram=found.histogram(),
        most=max(count for _, count in found.histogram()),
        rows=[(_heading(row), [(token, shown(token)) for token in row.tokens]) for row in rows],
    )
