"""When a training row contains an evaluation instance: one rule for the participant's `decontaminate` and the
organizer's contamination report.

Texts are compared as words (`palio.curation.words`): case, white space, punctuation and the ways that Unicode
has of writing one letter do not count. A row contains an instance if

1. the whole instance is in it, word for word (in any turn, or over several); an instance shorter than `ngram`
   words, which may be a common phrase, must have its reference somewhere after it; or
2. they share `ngram` consecutive words that are telling. Not telling are
   - n-grams of several different instances of the scenario: instructions and templates;
   - n-grams less than half of which are words of two letters or more: brackets, variables and operators
     coincide by chance in any two tasks of the same form.

13 words is the length of the GPT-3 paper (arXiv 2005.14165, appendix C). The rule misses paraphrases,
translations, and parts of instances made of symbols alone.

The n-gram of words w₁ … wₙ is the number Σ wᵢ · fᵢ mod 2⁶⁴ with fixed random odd factors fᵢ, so that
n-grams of every length take one multiplication and one addition per word and length. Part 2 takes equal
numbers for equal words, which 64 bits make all but certain; part 1 compares the words.
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
"""Flags of the filter that rejects most n-grams of a row."""


@dataclass(frozen=True)
class Instance:
    """One evaluation instance without its in-context examples."""

    scenario: str
    id: str
    text: str
    reference: str


def read_instances(path: Path) -> list[Instance]:
    """Return the distinct instances of a stage's table; an instance of several HELM runs counts once."""
    columns = ["scenario", "instance", "text", "reference"]
    try:
        table = pq.read_table(path, columns=columns)
    except FileNotFoundError:
        raise BadInput(path, why="no such table of instances", fix="prepare the stage first") from None
    except (pa.ArrowException, KeyError) as error:
        raise BadInput(path, why=f"is not a table of instances: {error}") from None
    unique = {(row["scenario"], row["text"]): row for row in table.select(columns).to_pylist()}
    return [
        Instance(row["scenario"], row["instance"], row["text"], row["reference"]) for row in unique.values()
    ]


class _NgramTable:
    """A multimap from n-grams of one length to instances: a sorted array, behind a Bloom filter of one hash.

    The high bits of an n-gram select its flag. An unset flag means that the n-gram is not in the table, and
    saves the binary search for nearly all n-grams of training rows.
    """

    def __init__(self, ngrams: Numbers, instances: Places) -> None:
        order = np.argsort(ngrams, kind="stable")
        self._ngrams, self._instances = ngrams[order], instances[order]
        self._marked = np.zeros(_MARKS, dtype=bool)
        self._marked[self._marks(ngrams)] = True

    @staticmethod
    def _marks(ngrams: Numbers) -> Numbers:
        return np.asarray(ngrams >> np.uint64(64 - (_MARKS - 1).bit_length()), dtype=np.uint64)

    def found(self, ngrams: Numbers, asked: Places) -> tuple[Places, Places]:
        """Look up `ngrams[asked]`: return the positions found, once for each instance, and the instances."""
        asked = asked[self._marked[self._marks(ngrams[asked])]]
        first = np.searchsorted(self._ngrams, ngrams[asked], side="left")
        behind = np.searchsorted(self._ngrams, ngrams[asked], side="right")
        count = behind - first
        places = np.repeat(asked, count)
        # 0, 1, …, count - 1 for each position found: its instances are consecutive in the sorted array.
        within = np.arange(len(places)) - np.repeat(np.cumsum(count) - count, count)
        return places, self._instances[np.repeat(first, count) + within]


class InstanceIndex:
    """Finds the instances that training rows contain, by the rule of this module."""

    def __init__(self, instances: Sequence[Instance], ngram: int) -> None:
        self.instances = instances
        self.ngram = ngram
        self._texts = words_of(pa.array([instance.text for instance in instances], pa.string()))
        self._references = words_of(pa.array([instance.reference for instance in instances], pa.string()))
        self._telling: _NgramTable | None = None
        # By length: the first min(ngram, length) words of each instance, with which any whole copy begins.
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
        """Return the n-grams that belong to one instance only and are not made of signs."""
        # Prefix sums: plain[i + n] - plain[i] plain words among the n from i on; at least half must be.
        plain = np.concatenate([[0], np.cumsum((self._texts.numbers & PLAIN) != 0)])
        tell = 2 * (plain[places + self.ngram] - plain[places]) >= self.ngram
        # Instances with equal words are one question asked by two scenarios: the first represents all.
        same: dict[bytes, int] = {}
        question = np.array(
            [same.setdefault(self._texts[number].tobytes(), number) for number in range(len(self._texts))],
            dtype=np.int64,
        )
        asks = question[self._texts.text_of(places[tell])]
        # Sorted by n-gram, then question: an n-gram has one question if its first and last are the same.
        order = np.lexsort([asks, ngrams[tell]])
        ngram, asks = ngrams[tell][order], asks[order]
        first = np.flatnonzero(np.concatenate([ngram[:1] == ngram[:1], ngram[1:] != ngram[:-1]]))
        last = np.append(first[1:], len(ngram)) - 1
        alone = first[asks[first] == asks[last[: len(first)]]]
        return _NgramTable(ngram[alone], asks[alone])

    def found_in(self, rows: pa.RecordBatch) -> list[set[int]]:
        """Return for each row the numbers of the instances that it contains."""
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
        """Return whether the rest of a row begins with the instance, and if short, has its reference."""
        text = self._texts[instance]
        if not np.array_equal(rest[: len(text)], text):
            return False
        return len(text) >= self.ngram or _contains(rest[len(text) :], self._references[instance])


def _contains(words: Numbers, part: Numbers) -> bool:
    starts = np.flatnonzero(words[: len(words) - len(part) + 1] == part[0]) if len(part) else ()
    return any(np.array_equal(words[start : start + len(part)], part) for start in starts)
