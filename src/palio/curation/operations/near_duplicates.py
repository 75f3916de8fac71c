"""Rows that are almost equal: MinHash finds candidates, the overlap itself decides.

Signatures are rensa's (R-MinHash, 60 permutations), banded 12 × 5: two rows that overlap by 0.85 become
candidates with probability 0.999, by 0.5 with 0.32, by 0.1 with 0.0001. Every candidate pair is then
verified on the sets of 3-shingles, so nothing is dropped on an estimate. Memory: 96 bytes a row and its
id; the rows' words lie in a file meanwhile.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from rensa import RMinHash

from palio.config import DropNearDuplicates
from palio.curation.rows import Batch, Notes, Reasons, Surroundings
from palio.curation.words import TELLING, Flags, Numbers, Places, Words, row_words

PERMUTATIONS = 60
BANDS = 12
SEED = 1
SHINGLE = 3
_MIX = np.random.default_rng(SEED).integers(
    1, 2**63, size=PERMUTATIONS // BANDS, dtype=np.uint64
) | np.uint64(1)
_BITS = np.uint64(40)
"""Of a shingle, for verification; two different ones of a pair of rows collide once in 10^8 pairs."""
_ROW_BITS = np.uint64(32)
_BLOCK = 512
"""Pairs verified at once."""


def _shingles(words: Words) -> tuple[Numbers, Places]:
    """Word 3-shingles of each row and where each row's begin; of a shorter row one shingle of its words."""
    kept = words.left() >= SHINGLE
    shorter = {length: words.offsets[:-1][words.lengths == length] for length in range(1, SHINGLE)}
    short: dict[int, Numbers] = {}
    for length, ngrams in words.ngrams(SHINGLE):
        if length < SHINGLE:
            short[length] = ngrams[shorter[length]]
    for length, starts in shorter.items():
        kept[starts] = True
        ngrams[starts] = short[length]
    return ngrams[kept], np.concatenate([[0], np.cumsum(kept)])[words.offsets]


def signatures(settings: DropNearDuplicates, batch: Batch, around: Surroundings) -> pa.RecordBatch:
    """`BANDS` keys of each row, and its words; rows that share a key are candidates."""
    words = row_words(batch.table)
    shingles, offsets = _shingles(words)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(
        shingles, offsets.astype(np.uint64), PERMUTATIONS, SEED
    )
    signature = np.array(matrix.to_rows(), dtype=np.uint64).reshape(len(batch), BANDS, PERMUTATIONS // BANDS)
    keys = (signature * _MIX).sum(axis=2, dtype=np.uint64)
    offsets = pa.array(words.offsets, pa.int32())
    return pa.record_batch(
        {
            "keys": pa.FixedSizeListArray.from_arrays(keys.ravel(), BANDS),
            "words": pa.ListArray.from_arrays(offsets, words.numbers),
            "names": pa.ListArray.from_arrays(offsets, words.names),
            "id": batch.table["id"],
        }
    )


def _candidates(bands: Numbers) -> Places:
    """Pairs of rows, the earlier first: with the first and the previous row of the same key."""
    bits = np.uint64(max(1, (len(bands) - 1).bit_length()))
    pairs = [np.empty(0, dtype=np.uint64)]
    for keys in bands.T:
        # A key above the row's number: one sort of numbers gives groups with their rows in order.
        keyed = np.sort((keys >> bits << bits) | np.arange(len(keys), dtype=np.uint64))
        key, row = keyed >> bits, keyed & ((np.uint64(1) << bits) - np.uint64(1))
        later = np.flatnonzero(key[1:] == key[:-1]) + 1
        first = np.arange(len(key))
        first[later] = 0
        first = np.maximum.accumulate(first)[later]
        pairs += [(row[earlier] << _ROW_BITS) | row[later] for earlier in (first, later - 1)]
    both = np.unique(np.concatenate(pairs))
    return np.stack([both >> _ROW_BITS, both & ((np.uint64(1) << _ROW_BITS) - np.uint64(1))], axis=1).astype(
        np.int64
    )


class _Spilled:
    """Arrays of one type behind each other in a file that goes with the process."""

    def __init__(self, folder: Path, dtype: type[np.generic]) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (ends with this object)
        self._dtype = dtype

    def add(self, array: npt.NDArray[Any]) -> None:
        array.tofile(self._file)

    def whole(self) -> npt.NDArray[Any]:
        """Mapped, not read."""
        self._file.flush()
        size = self._file.tell() // np.dtype(self._dtype).itemsize
        return np.memmap(self._file, self._dtype, "r", shape=(size,)) if size else np.empty(0, self._dtype)


def _keyed(owners: Places, hashes: Numbers) -> Numbers:
    """A set of each owner as a range of one sorted array: the owner's number above 40 bits of the hash."""
    return np.asarray((owners.astype(np.uint64) << _BITS) | (hashes >> (np.uint64(64) - _BITS)))


def _counts(keyed: Numbers, owners: int) -> Places:
    return np.bincount((keyed >> _BITS).astype(np.int64), minlength=owners)


def _overlap(pairs: Places, words: Words, threshold: float) -> Flags:
    """Of each pair of rows whether their sets of shingles overlap by the threshold (Jaccard)."""
    sides = []
    for rows in pairs.T:
        shingles, offsets = _shingles(words.take(rows))
        keyed = np.sort(_keyed(np.repeat(np.arange(len(rows)), np.diff(offsets)), shingles))
        sides.append(keyed[np.concatenate([[True], keyed[1:] != keyed[:-1]])])
    both = np.sort(np.concatenate(sides))
    common = _counts(both[1:][both[1:] == both[:-1]], len(pairs))
    union = sum(_counts(side, len(pairs)) for side in sides) - common
    return np.asarray((union > 0) & (common >= threshold * union), dtype=np.bool_)


def _agree(pairs: Places, words: Words) -> Flags:
    """Of each pair whether the same numbers, signs and names stand in the same order: rows that differ in
    one ask different questions. A name is what either row has as a name: in upper case it is not seen."""
    sides = [words.take(rows) for rows in pairs.T]
    names = np.concatenate([_keyed(side.texts[side.names], side.numbers[side.names]) for side in sides])
    told = []
    for side in sides:
        telling = (side.numbers & TELLING != 0) | np.isin(_keyed(side.texts, side.numbers), names)
        told.append((side.texts[telling], side.numbers[telling]))
    (one, these), (other, those) = told
    counts = [np.bincount(texts, minlength=len(pairs)) for texts in (one, other)]
    same: Flags = counts[0] == counts[1]
    differ = these[same[one]] != those[same[other]]
    same[one[same[one]][differ]] = False
    return same


def _alike(pairs: Places, words: Words, threshold: float) -> Iterator[tuple[int, int]]:
    """The pairs that are near-duplicates."""
    for start in range(0, len(pairs), _BLOCK):
        block = pairs[start : start + _BLOCK]
        block = block[_overlap(block, words, threshold)]
        block = block[_agree(block, words)]
        yield from zip(*block.T.tolist(), strict=True)


def _firsts(pairs: Iterator[tuple[int, int]]) -> dict[int, int]:
    """Of every row with an earlier near-duplicate, the first row of its cluster."""
    root: dict[int, int] = {}

    def first_of(row: int) -> int:
        while row in root:
            row = root[row]
        return row

    for earlier, later in pairs:
        one, other = first_of(earlier), first_of(later)
        if one != other:
            root[max(one, other)] = min(one, other)
    return {row: first_of(row) for row in root}


def near_duplicates(settings: DropNearDuplicates, notes: Notes, around: Surroundings) -> Iterator[Reasons]:
    numbers, names = _Spilled(around.scratch, np.uint64), _Spilled(around.scratch, np.bool_)
    bands, lengths, ids = [], [], []
    for note in notes:
        bands.append(note["keys"].flatten().to_numpy().reshape(-1, BANDS))
        lengths.append(np.diff(note["words"].offsets.to_numpy()))
        numbers.add(note["words"].flatten().to_numpy())
        names.add(note["names"].flatten().to_numpy(zero_copy_only=False))
        ids.append(note["id"])
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
    pairs = _candidates(np.concatenate(bands))
    first = _firsts(_alike(pairs, Words(numbers.whole(), offsets, names.whole()), settings.threshold))
    id_of = pa.chunked_array(ids)
    start = 0
    for batch in ids:
        rows = range(start, start + len(batch))
        yield [f"is nearly {id_of[first[row]]}" if row in first else None for row in rows]
        start += len(batch)
