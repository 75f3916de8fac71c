"""Which rows of a tensor are free: contiguous regions of a pool of keys and values."""

from __future__ import annotations

from bisect import insort


class Regions:
    """Rows 0 to `size` - 1, handed out in contiguous regions, each from the smallest that is large enough."""

    def __init__(self, size: int) -> None:
        self._free = [(0, size)] if size else []
        """(first, length), in order, no two of them adjacent."""

    def take(self, length: int) -> int | None:
        """Return the first row of a region of this length, or None if no free one is so long."""
        if length == 0:
            return 0
        fitting = [region for region in self._free if region[1] >= length]
        if not fitting:
            return None
        first, free = min(fitting, key=lambda region: region[1])
        self._free.remove((first, free))
        if free > length:
            insort(self._free, (first + length, free - length))
        return first

    def give_back(self, first: int, length: int) -> None:
        """Free rows that were taken; any part of a region may come back alone."""
        if length == 0:
            return
        stop = first + length
        for region in [region for region in self._free if region[0] == stop or sum(region) == first]:
            self._free.remove(region)
            first, stop = min(first, region[0]), max(stop, sum(region))
        insort(self._free, (first, stop - first))
