"""Rows that are almost equal: MinHash finds candidates, the overlap itself decides.

Signatures are rensa's (R-MinHash, 128 permutations), banded 16 × 8: two rows that overlap by 0.85 become
candidates with probability 0.994, by 0.9 with 0.9999. Every candidate pair is then verified on the sets
of 3-shingles, so nothing is dropped on an estimate. Memory: 128 bytes a row, plus the shingles of rows
that are candidates.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import numpy.typing as npt
from rensa import RMinHash  # type: ignore[import-untyped]

from palio.config import DropNearDuplicates
from palio.curation.overlap import words
from palio.curation.rows import Batch, Batches, Surroundings, Verdict

PERMUTATIONS = 128
BANDS = 16
SEED = 1
Hashes = npt.NDArray[np.uint64]
_FACTORS = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], dtype=np.uint64)
_MIX = np.random.default_rng(SEED).integers(
    1, 2**63, size=PERMUTATIONS // BANDS, dtype=np.uint64
) | np.uint64(1)
_VOCABULARY = 1 << 20
_NUMBERS = frozenset(
    words(
        """zero two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
        seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand
        million half third quarter first second twice double"""
    )
)
_NAME = re.compile(r"(?<=[\w,;:] )[A-Z][a-z]+")


class _WordHashes:
    """64-bit hashes of words, remembered up to a bound."""

    def __init__(self) -> None:
        self._known: dict[str, int] = {}

    def of(self, text: Iterable[str]) -> list[int]:
        if len(self._known) > _VOCABULARY:
            self._known.clear()
        known = self._known
        return [known[word] if word in known else self._add(word) for word in text]

    def _add(self, word: str) -> int:
        value = int.from_bytes(blake2b(word.encode(), digest_size=8).digest(), "little")
        self._known[word] = value
        return value


def _shingles(hashes: list[int]) -> Hashes:
    """Hashes of a row's word 3-shingles; of a shorter row one shingle of all its words."""
    row = np.array(hashes, dtype=np.uint64)
    if len(row) < 3:
        return np.array([np.dot(row, _FACTORS[: len(row)])], dtype=np.uint64)
    return np.asarray(
        row[:-2] * _FACTORS[0] + row[1:-1] * _FACTORS[1] + row[2:] * _FACTORS[2], dtype=np.uint64
    )


def _row_words(batch: Batch) -> Iterator[list[str]]:
    for prompt, completion in zip(batch.prompts, batch.completions, strict=True):
        yield words(f"{prompt} {completion}")


def _bands(batch: Batch, hashes: _WordHashes) -> Hashes:
    """(rows, BANDS) keys; rows that share one are candidates."""
    shingles = [_shingles(hashes.of(text)) for text in _row_words(batch)]
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in shingles])]).astype(np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(
        np.concatenate(shingles), offsets, PERMUTATIONS, SEED
    )
    signature = np.array(matrix.to_rows(), dtype=np.uint64).reshape(len(shingles), BANDS, -1)
    return np.asarray((signature * _MIX).sum(axis=2, dtype=np.uint64), dtype=np.uint64)


def _candidates(bands: Hashes) -> set[tuple[int, int]]:
    """Pairs of rows, the earlier first: with the first and the previous row of the same key."""
    pairs: set[tuple[int, int]] = set()
    for keys in bands.T:
        order = np.argsort(keys, kind="stable")
        same = keys[order][1:] == keys[order][:-1]
        first = np.arange(len(order))
        first[1:][same] = 0
        first = np.maximum.accumulate(first)
        later = np.flatnonzero(same) + 1
        pairs.update(zip(order[first[later]].tolist(), order[later].tolist(), strict=True))
        pairs.update(zip(order[later - 1].tolist(), order[later].tolist(), strict=True))
    return pairs


@dataclass(frozen=True)
class _Candidate:
    """What verification needs of a row."""

    shingles: Hashes
    words: list[str]
    names: set[str]
    id: str

    def telling(self, names: set[str]) -> list[str]:
        """Numbers and names in their order: rows that differ in one ask different questions."""
        return [
            word
            for word in self.words
            if word in names or word in _NUMBERS or any(character.isdigit() for character in word)
        ]


def _read(rows: Batches, wanted: set[int], hashes: _WordHashes) -> dict[int, _Candidate]:
    found: dict[int, _Candidate] = {}
    start = 0
    for batch in rows():
        for place, (prompt, completion, name) in enumerate(
            zip(batch.prompts, batch.completions, batch.ids, strict=True)
        ):
            if start + place in wanted:
                row = words(f"{prompt} {completion}")
                names = {name.lower() for text in (prompt, completion) for name in _NAME.findall(text)}
                shingles = np.unique(_shingles(hashes.of(row)))
                found[start + place] = _Candidate(shingles, row, names, name)
        start += len(batch.ids)
    return found


def _alike(one: _Candidate, other: _Candidate, threshold: float) -> bool:
    common = len(np.intersect1d(one.shingles, other.shingles, assume_unique=True))
    union = len(one.shingles) + len(other.shingles) - common
    # A name of either: in upper case it is not seen as one, but stands in the other.
    names = one.names | other.names
    return common >= threshold * union and one.telling(names) == other.telling(names)


def _firsts(pairs: set[tuple[int, int]], rows: dict[int, _Candidate], threshold: float) -> dict[int, int]:
    """Of every row with an earlier near-duplicate, the first row of its cluster."""
    root: dict[int, int] = {}

    def first_of(row: int) -> int:
        while row in root:
            row = root[row]
        return row

    neighbours: defaultdict[int, list[int]] = defaultdict(list)
    for earlier, later in sorted(pairs):
        neighbours[later].append(earlier)
    for later in sorted(neighbours):
        for earlier in neighbours[later]:
            one, other = first_of(earlier), first_of(later)
            if one != other and _alike(rows[earlier], rows[later], threshold):
                root[max(one, other)] = min(one, other)
    return {row: first_of(row) for row in root}


def drop_near_duplicates(
    settings: DropNearDuplicates, rows: Batches, around: Surroundings
) -> Iterator[Verdict]:
    hashes = _WordHashes()
    keys = [_bands(batch, hashes) for batch in rows() if batch.ids]
    if not keys:
        return
    pairs = _candidates(np.concatenate(keys))
    del keys
    candidates = _read(rows, {row for pair in pairs for row in pair}, hashes)
    first = _firsts(pairs, candidates, settings.threshold)
    start = 0
    for batch in rows():
        yield Verdict(
            [
                f"is nearly {candidates[first[row]].id}" if row in first else None
                for row in range(start, start + len(batch.ids))
            ]
        )
        start += len(batch.ids)
