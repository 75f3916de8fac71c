"""Dropping rows that are almost equal: MinHash proposes pairs, their true overlap decides.

The overlap of two rows is the Jaccard index of their sets of word 3-shingles, J = |A ∩ B| / |A ∪ B|. Under a
random order of all shingles the first one of A and of B is the same with probability J (Broder 1997). A
signature has 60 such minima (R-MinHash of rensa), in 12 bands of 5: rows that agree in all 5 minima of a
band are candidates, with probability 1 - (1 - J⁵)¹². That is 0.999 for J = 0.85, 0.32 for 0.5 and 0.0001 for
0.1. Every candidate pair is then verified on its shingles, so that no row is dropped on an estimate. Memory:
96 bytes a row and its id; the rows' words are in a temporary file meanwhile.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field
from rensa import RMinHash

from palio.curation.operations import OperationContext, Reasons, Sketches, TableOperation
from palio.curation.rows import Batch
from palio.curation.words import TELLING, Flags, Numbers, Places, Words, row_words

PERMUTATIONS = 60
BANDS = 12
SEED = 1
SHINGLE = 3
_MIX = np.random.default_rng(SEED).integers(
    1, 2**63, size=PERMUTATIONS // BANDS, dtype=np.uint64
) | np.uint64(1)
"""Odd factors: the key of a band is Σ minimum · factor mod 2⁶⁴."""
_BITS = np.uint64(40)
"""Bits of a shingle's hash in verification: two rows of 100 shingles, 10⁴ pairs of them, see a collision
once in 2⁴⁰ / 10⁴ = 10⁸ pairs of rows. The 24 bits above number the pairs of a block."""
_ROW_BITS = np.uint64(32)
"""A pair of rows as one number: earlier · 2³² + later."""
_BLOCK = 512
"""Pairs verified at once."""


class DropNearDuplicates(TableOperation):
    """Keep the first of rows whose word 3-shingles overlap by at least `threshold`. Rows that differ in a
    number or a name are different questions, and are kept. Leave it out for data that a program made from
    templates: its rows are meant to be alike."""

    op: Literal["drop_near_duplicates"]
    threshold: Annotated[float, Field(ge=0.7, le=1)] = 0.85
    """Smallest Jaccard index of duplicates, computed exactly."""

    def sketch(self, batch: Batch, context: OperationContext) -> pa.RecordBatch:
        """Return the keys of each row's bands, and its words; rows that share a key are candidates."""
        words = row_words(batch.table)
        shingles, offsets = _shingles(words)
        matrix = RMinHash.digest_matrix_from_flat_token_hashes(
            shingles, offsets.astype(np.uint64), PERMUTATIONS, SEED
        )
        signature = np.array(matrix.to_rows(), dtype=np.uint64).reshape(
            len(batch), BANDS, PERMUTATIONS // BANDS
        )
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

    def decide(self, sketches: Sketches, context: OperationContext) -> Iterator[Reasons]:
        numbers, names = _Spilled(context.scratch, np.uint64), _Spilled(context.scratch, np.bool_)
        bands, lengths, ids = [], [], []
        for sketch in sketches:
            bands.append(sketch["keys"].flatten().to_numpy().reshape(-1, BANDS))
            lengths.append(np.diff(sketch["words"].offsets.to_numpy()))
            numbers.add(sketch["words"].flatten().to_numpy())
            names.add(sketch["names"].flatten().to_numpy(zero_copy_only=False))
            ids.append(sketch["id"])
        offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
        pairs = _candidates(np.concatenate(bands))
        first = _firsts(_duplicates(pairs, Words(numbers.whole(), offsets, names.whole()), self.threshold))
        id_of = pa.chunked_array(ids)
        start = 0
        for batch in ids:
            rows = range(start, start + len(batch))
            yield [f"is nearly {id_of[first[row]]}" if row in first else None for row in rows]
            start += len(batch)


def _shingles(words: Words) -> tuple[Numbers, Places]:
    """Return the word 3-shingles of each row, and where each row's begin; a shorter row has one, of all its
    words.

    `words.ngrams` gives an n-gram for every word, also for the last ones of a row, whose n-grams would run
    into the next row: only words with at least n words left in their row count.
    """
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


def _candidates(bands: Numbers) -> Places:
    """Return pairs of rows that share a key, the earlier row first.

    A row is paired with the first and with the previous row of its key only: a group of n rows gives 2n
    pairs instead of n²/2, and a cluster of duplicates is still connected unless a row between two of them is
    not one.
    """
    bits = np.uint64(max(1, (len(bands) - 1).bit_length()))
    pairs = [np.empty(0, dtype=np.uint64)]
    for keys in bands.T:
        # The key's high bits above the row's number: sorting these gives the groups, their rows in order.
        keyed = np.sort((keys >> bits << bits) | np.arange(len(keys), dtype=np.uint64))
        key, row = keyed >> bits, keyed & ((np.uint64(1) << bits) - np.uint64(1))
        later = np.flatnonzero(key[1:] == key[:-1]) + 1
        # Index of the first row of each group, carried forward: only group starts are not 0.
        first = np.arange(len(key))
        first[later] = 0
        first = np.maximum.accumulate(first)[later]
        pairs += [(row[earlier] << _ROW_BITS) | row[later] for earlier in (first, later - 1)]
    both = np.unique(np.concatenate(pairs))
    return np.stack([both >> _ROW_BITS, both & ((np.uint64(1) << _ROW_BITS) - np.uint64(1))], axis=1).astype(
        np.int64
    )


class _Spilled:
    """Arrays of one type, one after the other in a temporary file."""

    def __init__(self, folder: Path, dtype: type[np.generic]) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (ends with this object)
        self._dtype = dtype

    def add(self, array: npt.NDArray[Any]) -> None:
        array.tofile(self._file)

    def whole(self) -> npt.NDArray[Any]:
        """Return all arrays as one, mapped into memory rather than read."""
        self._file.flush()
        size = self._file.tell() // np.dtype(self._dtype).itemsize
        return np.memmap(self._file, self._dtype, "r", shape=(size,)) if size else np.empty(0, self._dtype)


def _keyed(owners: Places, hashes: Numbers) -> Numbers:
    """Return owner·2⁴⁰ + the high 40 bits of the hash: sorted, each owner's hashes are a range of one array.
    Owners are pairs of a block, hence below 2²⁴."""
    return np.asarray((owners.astype(np.uint64) << _BITS) | (hashes >> (np.uint64(64) - _BITS)))


def _counts(keyed: Numbers, owners: int) -> Places:
    return np.bincount((keyed >> _BITS).astype(np.int64), minlength=owners)


def _overlap(pairs: Places, words: Words, threshold: float) -> Flags:
    """Return for each pair whether its sets of shingles overlap: |A ∩ B| ≥ threshold · |A ∪ B|.

    Each side is a sorted array without repetitions, so an element of the intersection occurs exactly twice in
    both sides sorted together; |A ∪ B| = |A| + |B| - |A ∩ B|.
    """
    sides = []
    for rows in pairs.T:
        shingles, offsets = _shingles(words.take(rows))
        keyed = np.sort(_keyed(np.repeat(np.arange(len(rows)), np.diff(offsets)), shingles))
        sides.append(keyed[np.concatenate([[True], keyed[1:] != keyed[:-1]])])
    both = np.sort(np.concatenate(sides))
    common = _counts(both[1:][both[1:] == both[:-1]], len(pairs))
    union = sum(_counts(side, len(pairs)) for side in sides) - common
    return np.asarray((union > 0) & (common >= threshold * union), dtype=np.bool_)


def _same_facts(pairs: Places, words: Words) -> Flags:
    """Return for each pair whether both rows have the same numbers, signs and names, in the same order: rows
    that differ in one ask different questions. A word counts as a name in both rows if it is one in either,
    since upper case at the beginning of a sentence says nothing."""
    sides = [words.take(rows) for rows in pairs.T]
    names = np.concatenate([_keyed(side.texts[side.names], side.numbers[side.names]) for side in sides])
    facts = []
    for side in sides:
        telling = (side.numbers & TELLING != 0) | np.isin(_keyed(side.texts, side.numbers), names)
        facts.append((side.texts[telling], side.numbers[telling]))
    (texts, numbers), (other_texts, other_numbers) = facts
    counts = [np.bincount(owners, minlength=len(pairs)) for owners in (texts, other_texts)]
    # Pairs with equal counts have their facts at the same places of both arrays, and can be compared
    # directly.
    same: Flags = counts[0] == counts[1]
    differ = numbers[same[texts]] != other_numbers[same[other_texts]]
    same[texts[same[texts]][differ]] = False
    return same


def _duplicates(pairs: Places, words: Words, threshold: float) -> Iterator[tuple[int, int]]:
    """Yield the pairs that are near-duplicates."""
    for start in range(0, len(pairs), _BLOCK):
        block = pairs[start : start + _BLOCK]
        block = block[_overlap(block, words, threshold)]
        block = block[_same_facts(block, words)]
        yield from zip(*block.T.tolist(), strict=True)


def _firsts(pairs: Iterator[tuple[int, int]]) -> dict[int, int]:
    """Return the first row of its cluster for every row that has an earlier near-duplicate.

    Union-find in which a root is always the smallest row of its cluster.
    """
    root: dict[int, int] = {}

    def first_of(row: int) -> int:
        while row in root:
            row = root[row]
        return row

    for earlier, later in pairs:
        first, second = first_of(earlier), first_of(later)
        if first != second:
            root[max(first, second)] = min(first, second)
    return {row: first_of(row) for row in root}
