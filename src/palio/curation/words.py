"""Texts as numbers: one 64-bit number a word, all texts of a batch in one array.

What is compared is words in lower case without punctuation; a sign that stands alone, as `(` or `+`, is a
word too. Accents are composed (NFC), and full-width letters, ligatures and the like are read as what they
stand for; a superscript or a fraction is not, for 5² is not 52. Arrow splits, NumPy calculates, and only the
distinct tokens of a batch are looked at one by one. The two lowest bits of a word's number say what it is:
`TELLING`, `PLAIN`.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from palio.curation.rows import texts_of

Numbers = npt.NDArray[np.uint64]
Places = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

TELLING = np.uint64(1)
"""A number, in digits or spelled, or a sign: two questions that differ in one are different."""
PLAIN = np.uint64(2)
"""A word of two letters or more, no bracket, variable or operator."""

_NOT_ALPHANUMERIC = r"[^\pL\pN]+"
_SAME_MEANING = (
    *("<wide>", "<narrow>", "<compat>", "<font>", "<noBreak>"),
    *("<initial>", "<medial>", "<final>", "<isolated>"),
)
"""Decompositions of Unicode that are taken; others, as `<super>` and `<fraction>`, would change a number."""
_PUNCTUATION = r"^[.,;:!?\"'`´“”‘’«»…–—]*$"
_CAPITALISED = r"^[A-Z][a-z]"
_GOES_ON = r"[\pL\pN_,;:]$"
_SPELLED_NUMBERS = """
    zero two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
    seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand
    million half third quarter first second twice double"""
_FACTORS = np.random.default_rng(13).integers(1, 2**63, size=64, dtype=np.uint64) | np.uint64(1)


@dataclass(frozen=True)
class Words:
    """Words of several texts, one text after the other."""

    numbers: Numbers
    offsets: Places
    """Text `i` is `numbers[offsets[i]:offsets[i + 1]]`."""
    names: Flags
    """Which words have a capital inside a sentence."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, text: int) -> Numbers:
        return self.numbers[self.offsets[text] : self.offsets[text + 1]]

    @property
    def lengths(self) -> Places:
        return np.diff(self.offsets)

    @property
    def texts(self) -> Places:
        """The text of each word."""
        return np.repeat(np.arange(len(self)), self.lengths)

    def take(self, texts: Places) -> Words:
        """The texts with these numbers, in this order."""
        lengths = self.lengths[texts]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        places = np.arange(offsets[-1]) + np.repeat(self.offsets[texts] - offsets[:-1], lengths)
        return Words(self.numbers[places], offsets, self.names[places])

    def text_of(self, places: Places) -> Places:
        """The text of the words at these places."""
        return np.searchsorted(self.offsets, places, side="right") - 1

    def left(self) -> Places:
        """Of each word: how many words its text has from there on."""
        return np.repeat(self.offsets[1:], self.lengths) - np.arange(len(self.numbers))

    def ngrams(self, most: int) -> Iterator[tuple[int, Numbers]]:
        """For length 1 to `most` the n-gram that begins at each word. One array is reused for all lengths;
        an n-gram of more than `left` words runs into the next text and means nothing."""
        sums = np.zeros(len(self.numbers), dtype=np.uint64)
        for length in range(1, most + 1):
            behind = self.numbers[length - 1 :]
            sums[: len(behind)] += behind * _FACTORS[length - 1]
            yield length, sums


def words_of(texts: pa.Array) -> Words:
    """The words of an Arrow array of texts."""
    tokens = pc.utf8_split_whitespace(texts)
    offsets = tokens.offsets.to_numpy().astype(np.int64)
    offsets -= offsets[0]
    coded = tokens.flatten().dictionary_encode()
    codes = coded.indices.to_numpy()
    distinct = _folded(coded.dictionary)
    numbers = _numbers(distinct)[codes]
    before = np.concatenate([[False], _matches(distinct, _GOES_ON)[codes]])[:-1]
    before[offsets[:-1][offsets[:-1] < len(codes)]] = False
    names = _matches(distinct, _CAPITALISED)[codes] & before
    kept = numbers != 0
    return Words(numbers[kept], np.concatenate([[0], np.cumsum(kept)])[offsets], names[kept])


def _folded(tokens: pa.Array) -> pa.Array:
    """Return the tokens in one of the ways that Unicode has of writing them."""
    others = pc.invert(pc.string_is_ascii(tokens))
    texts = pc.array_filter(tokens, others).to_pylist()
    if not texts:
        return tokens
    folded = [unicodedata.normalize("NFC", text.translate(_ALIKE)) for text in texts]
    return pc.replace_with_mask(tokens, others, pa.array(folded, tokens.type))


class _Alike(dict[int, str]):
    """Maps a character's code to what it looks like: the part of NFKC that keeps a text's meaning."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        kept = not unicodedata.decomposition(char).startswith(_SAME_MEANING)
        return self.setdefault(code, char if kept else unicodedata.normalize("NFKC", char))


_ALIKE = _Alike()


def row_words(rows: pa.RecordBatch) -> Words:
    """The words of each row, turn after turn."""
    return words_of(texts_of(rows))


def normalised(tokens: pa.Array) -> pa.Array:
    """Of each token its word; empty if it is punctuation alone."""
    lower = pc.utf8_lower(tokens)
    bare = pc.replace_substring_regex(lower, _NOT_ALPHANUMERIC, "")
    sign = pc.replace_substring_regex(lower, _PUNCTUATION, "")
    return pc.if_else(pc.equal(bare, ""), sign, bare)


def _numbers(tokens: pa.Array) -> Numbers:
    """Return the number of each token's word; 0 for punctuation alone."""
    from pandas.util import hash_array  # imported here: reading an entry needs no pandas

    words = normalised(tokens)
    hashes = hash_array(words.to_numpy(zero_copy_only=False), categorize=False)
    ordinary = pc.and_not(pc.utf8_is_alpha(words), pc.is_in(words, pa.array(_SPELLED_NUMBERS.split())))
    plain = pc.and_(pc.utf8_is_alnum(words), pc.greater(pc.utf8_length(words), 1))
    numbers = np.asarray(hashes, dtype=np.uint64) | TELLING | PLAIN
    numbers -= _flags(ordinary) * TELLING
    numbers -= ~_flags(plain) * PLAIN
    return np.where(_flags(pc.equal(words, "")), np.uint64(0), numbers)


def _flags(array: pa.Array) -> Flags:
    return np.asarray(array.to_numpy(zero_copy_only=False), dtype=bool)


def _matches(tokens: pa.Array, pattern: str) -> Flags:
    return _flags(pc.match_substring_regex(tokens, pattern))
