"""extents: what is data and what is a hole, as the answers to a client have it; pcshare.extents finds it out.

Reads no byte. Whatever is not known to be a hole is data, which is slower and as right.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence

from pcshare.nbd.wire import ExtentFlag

Extents = list[tuple[int, ExtentFlag]]

DATA = ExtentFlag(0)
HOLE = ExtentFlag.HOLE | ExtentFlag.ZERO
EXTENTS_MAX = 1 << 12  # looked up for one answer; the rest of a long range is asked for again


class Ranges:
    """Ranges [start, end), sorted and apart, in which others are found quickly."""

    def __init__(self, ranges: Iterable[Sequence[int]], page_size: int = 1) -> None:
        """Widened to whole pages, and merged where they then touch."""
        self._starts: list[int] = []
        self._ends: list[int] = []
        for start, end in ranges:
            start, end = start // page_size * page_size, -(-end // page_size) * page_size
            if self._ends and start <= self._ends[-1]:
                self._ends[-1] = max(end, self._ends[-1])
            else:
                self._starts.append(start)
                self._ends.append(end)

    def within(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """(start, end) of what lies in both."""
        i, stop = bisect_right(self._ends, offset), offset + length
        while i < len(self._starts) and self._starts[i] < stop:
            yield max(offset, self._starts[i]), min(stop, self._ends[i])
            i += 1


def merged(*several: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """What lies in any of them, sorted and apart."""
    begun: tuple[int, int] | None = None
    for start, end in heapq.merge(*several):
        if begun is not None and start <= begun[1]:
            begun = begun[0], max(end, begun[1])
            continue
        if begun is not None:
            yield begun
        begun = start, end
    if begun is not None:
        yield begun


def with_holes(data: Iterable[tuple[int, int]], offset: int, length: int) -> Extents:
    """Data ranges of a range, with the holes between them; its beginning alone, where it has very many."""
    extents: Extents = []
    at = offset
    for start, end in data:
        if len(extents) >= EXTENTS_MAX:
            return extents
        if start > at:
            extents.append((start - at, HOLE))
        extents.append((end - start, DATA))
        at = end
    if at < offset + length:
        extents.append((offset + length - at, HOLE))
    return extents
