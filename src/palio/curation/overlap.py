"""Whether a training row gives an evaluation instance away: one rule for the participant's
`decontaminate` and for the organizer's contamination report.

Texts are compared as words (`palio.curation.words`): case, white space and punctuation do not count.
A row holds an instance if

1. the whole instance stands in it, word for word (in any turn, or over several); of an instance
   shorter than `ngram` words, which may be a common phrase, its reference must stand behind it; or
2. they share `ngram` words in a row that tell something. Not telling are
   - n-grams that stand in several different instances of the scenario: instructions and templates;
   - n-grams less than half of which are words of two letters or more: brackets, variables and operators
     come together by chance in any two tasks of the same form.

What the rule does not see: paraphrases, translations, and parts of instances made of symbols alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from palio.curation.words import PLAIN, Numbers, Places, row_words, words_of
from palio.errors import BadInput

_MARKS = 1 << 22
"""Places of the table that most n-grams of a row are looked up in, and not found."""


@dataclass(frozen=True)
class Instance:
    """One evaluation instance without its in-context examples."""

    scenario: str
    id: str
    text: str
    reference: str


def read_instances(path: Path) -> list[Instance]:
    """The distinct instances of a stage's table; an instance of several HELM runs counts once."""
    columns = ["scenario", "instance", "text", "reference"]
    try:
        table = pq.read_table(path, columns=columns)
    except FileNotFoundError:
        raise BadInput(path, "", None, "no such table of instances; prepare the stage first") from None
    except (pa.ArrowException, KeyError) as error:
        raise BadInput(path, "", None, f"is no table of instances: {error}") from None
    unique = {(row["scenario"], row["text"]): row for row in table.select(columns).to_pylist()}
    return [
        Instance(row["scenario"], row["instance"], row["text"], row["reference"]) for row in unique.values()
    ]


class _NgramTable:
    """From n-grams of one length to instances; an n-gram may stand for several."""

    def __init__(self, ngrams: Numbers, instances: Places) -> None:
        order = np.argsort(ngrams, kind="stable")
        self._ngrams, self._instances = ngrams[order], instances[order]
        self._marked = np.zeros(_MARKS, dtype=bool)
        self._marked[self._marks(ngrams)] = True

    @staticmethod
    def _marks(ngrams: Numbers) -> Numbers:
        return np.asarray(ngrams >> np.uint64(64 - (_MARKS - 1).bit_length()), dtype=np.uint64)

    def found(self, ngrams: Numbers, asked: Places) -> tuple[Places, Places]:
        """Of the places `asked` in `ngrams` those that are in the table, each with every instance of it."""
        asked = asked[self._marked[self._marks(ngrams[asked])]]
        first = np.searchsorted(self._ngrams, ngrams[asked], side="left")
        behind = np.searchsorted(self._ngrams, ngrams[asked], side="right")
        count = behind - first
        places = np.repeat(asked, count)
        within = np.arange(len(places)) - np.repeat(np.cumsum(count) - count, count)
        return places, self._instances[np.repeat(first, count) + within]


class InstanceIndex:
    """Finds the instances that training rows hold, by the rule of this module."""

    def __init__(self, instances: Sequence[Instance], ngram: int) -> None:
        self.instances = instances
        self.ngram = ngram
        self._texts = words_of(pa.array([instance.text for instance in instances], pa.string()))
        self._references = words_of(pa.array([instance.reference for instance in instances], pa.string()))
        self._telling: _NgramTable | None = None
        # An instance begins with these words wherever it stands whole.
        self._openings: dict[int, _NgramTable] = {}
        lengths = np.minimum(self._texts.lengths, ngram)
        left = self._texts.left()
        for length, ngrams in self._texts.ngrams(ngram):
            opened = np.flatnonzero(lengths == length)
            if len(opened):
                self._openings[length] = _NgramTable(ngrams[self._texts.offsets[opened]], opened)
            if length == ngram:
                places = np.flatnonzero(left >= ngram)
                self._telling = self._telling_ngrams(ngrams[places], places)

    def _telling_ngrams(self, ngrams: Numbers, places: Places) -> _NgramTable:
        """Those that point at one instance alone, and are not made of signs."""
        plain = np.concatenate([[0], np.cumsum((self._texts.numbers & PLAIN) != 0)])
        tell = 2 * (plain[places + self.ngram] - plain[places]) >= self.ngram
        # Instances with equal words are one question that two scenarios ask: the first stands for all.
        same: dict[bytes, int] = {}
        question = np.array(
            [same.setdefault(self._texts[number].tobytes(), number) for number in range(len(self._texts))],
            dtype=np.int64,
        )
        asks = question[self._texts.text_of(places[tell])]
        order = np.lexsort([asks, ngrams[tell]])
        ngram, asks = ngrams[tell][order], asks[order]
        first = np.flatnonzero(np.concatenate([ngram[:1] == ngram[:1], ngram[1:] != ngram[:-1]]))
        last = np.append(first[1:], len(ngram)) - 1
        alone = first[asks[first] == asks[last[: len(first)]]]
        return _NgramTable(ngram[alone], asks[alone])

    def found_in(self, rows: pa.RecordBatch) -> list[set[int]]:
        """For each row the numbers of the instances that it holds."""
        row = row_words(rows)
        found: list[set[int]] = [set() for _ in range(len(row))]
        left = row.left()
        for length, ngrams in row.ngrams(self.ngram):
            asked = None
            if length == self.ngram and self._telling is not None:
                asked = np.flatnonzero(left >= length)
                places, held = self._telling.found(ngrams, asked)
                for number, instance in zip(row.text_of(places).tolist(), held.tolist(), strict=True):
                    found[number].add(instance)
            if length in self._openings:
                asked = np.flatnonzero(left >= length) if asked is None else asked
                places, opened = self._openings[length].found(ngrams, asked)
                numbers = row.text_of(places).tolist()
                for number, place, instance in zip(numbers, places.tolist(), opened.tolist(), strict=True):
                    if instance not in found[number] and self._whole(
                        instance, row.numbers[place : row.offsets[number + 1]]
                    ):
                        found[number].add(instance)
        return found

    def _whole(self, instance: int, rest: Numbers) -> bool:
        """Whether a row's rest begins with the instance; if that is short, with its reference behind it."""
        text = self._texts[instance]
        if not np.array_equal(rest[: len(text)], text):
            return False
        return len(text) >= self.ngram or _stands_in(self._references[instance], rest[len(text) :])


def _stands_in(needle: Numbers, hay: Numbers) -> bool:
    starts = np.flatnonzero(hay[: len(hay) - len(needle) + 1] == needle[0]) if len(needle) else ()
    return any(np.array_equal(hay[start : start + len(needle)], needle) for start in starts)
