"""Whether a training row gives an evaluation instance away: one rule for the participant's
`decontaminate` and for the organizer's contamination report.

Texts are compared as words (`words`): case, white space and punctuation do not count. A row holds an
instance if

1. the whole instance stands in it, word for word (at any place of prompt and completion); of an instance
   shorter than `ngram` words, which may be a common phrase, its reference must stand behind it; or
2. they share `ngram` words in a row that tell something. Not telling are
   - n-grams that stand in several different instances of the scenario: instructions and templates;
   - n-grams less than half of which are words of two letters or more: brackets, variables and operators
     come together by chance in any two tasks of the same form.

What the rule does not see: paraphrases, translations, and parts of instances made of symbols alone.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from palio.errors import BadInput

_SENTENCE_MARKS = set(".,;:!?\"'`´“”‘’«»…–—")
_NOT_ALPHANUMERIC = re.compile(r"[\W_]+")


def words(text: str) -> list[str]:
    """Words in lower case without punctuation; a sign that stands alone, as `(` or `+`, is a word too."""
    found = []
    for token in text.lower().split():
        if token.isalnum():
            found.append(token)
        elif bare := _NOT_ALPHANUMERIC.sub("", token):
            found.append(bare)
        elif not set(token) <= _SENTENCE_MARKS:
            found.append(token)
    return found


def normalise(text: str) -> str:
    """What is left of a text for a comparison: its words, one blank between them."""
    return " ".join(words(text))


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


class InstanceIndex:
    """Finds the instances that a training row holds, by the rule of this module."""

    def __init__(self, instances: Sequence[Instance], ngram: int) -> None:
        self.instances = instances
        self.ngram = ngram
        self._texts = [words(instance.text) for instance in instances]
        self._references = [normalise(instance.reference) for instance in instances]
        self._telling = self._telling_ngrams()
        # An instance begins with these words wherever it stands whole.
        self._openings: dict[int, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        for number, text in enumerate(self._texts):
            if text:
                length = min(len(text), ngram)
                self._openings[length][" ".join(text[:length])].append(number)

    def _telling_ngrams(self) -> dict[str, int]:
        """The n-grams that point at one instance alone."""
        holders: dict[str, set[int]] = defaultdict(set)
        for number, text in enumerate(self._texts):
            for ngram in _ngrams(text, self.ngram):
                holders[ngram].add(number)
        same_text: Counter[tuple[str, ...]] = Counter(tuple(text) for text in self._texts)
        return {
            ngram: min(found)
            for ngram, found in holders.items()
            # Instances with equal words are one question that two scenarios ask.
            if len(found) <= same_text[tuple(self._texts[min(found)])] and _tells(ngram)
        }

    def found_in(self, prompt: str, completion: str) -> set[int]:
        """Numbers of the instances that the row holds."""
        row = words(f"{prompt} {completion}")
        joined = f" {' '.join(row)} "
        found = {self._telling[ngram] for ngram in _ngrams(row, self.ngram) if ngram in self._telling}
        for length, openings in self._openings.items():
            for ngram in _ngrams(row, length):
                for number in openings.get(ngram, ()):
                    if number not in found and self._whole(number, joined):
                        found.add(number)
        return found

    def _whole(self, number: int, joined: str) -> bool:
        text = f" {' '.join(self._texts[number])} "
        _, there, rest = joined.partition(text)
        if not there:
            return False
        return len(self._texts[number]) >= self.ngram or f" {self._references[number]} " in f" {rest}"


def _ngrams(row: Sequence[str], length: int) -> Iterator[str]:
    for start in range(len(row) - length + 1):
        yield " ".join(row[start : start + length])


def _tells(ngram: str) -> bool:
    tokens = ngram.split()
    return 2 * sum(len(token) > 1 and token.isalnum() for token in tokens) >= len(tokens)


def overlaps(index: InstanceIndex, prompts: Iterable[str], completions: Iterable[str]) -> Iterator[set[int]]:
    for prompt, completion in zip(prompts, completions, strict=True):
        yield index.found_in(prompt, completion)
