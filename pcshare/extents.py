"""extents: which bytes of something hold data: ranges [start, end), sorted and apart. What lies between them is holes.

Asks a file system, moves no data and knows no source. Some facts about files:
 - lseek SEEK_DATA and SEEK_HOLE need no reading; a file system without them says EINVAL or calls the whole file data;
 - a fd's position is shared by its duplicates: nobody may rely on it afterwards.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator

HOLE_BYTES_MIN = 4096  # the smallest page: a shorter hole fills none


def data_within(fd: int, offset: int, length: int) -> Iterator[tuple[int, int]]:
    """What an open file holds in a range, as its file system tells; where that does not, or contradicts itself, the
    rest is data."""
    at, stop = offset, offset + length
    while at < stop:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
            end = os.lseek(fd, start, os.SEEK_HOLE) if start < stop else stop
        except OSError as error:
            if error.errno != errno.ENXIO:  # ENXIO: no more data, or the file has become shorter; a read will tell
                yield at, stop
            return
        if start >= stop:
            return
        if start < at or end <= start:
            yield at, stop
            return
        at = min(end, stop)
        yield start, at


def gathered(ranges: Iterable[tuple[int, int]], length: int, extents_max: int) -> list[tuple[int, int]]:
    """Sorted ranges of the first length bytes, those that are closer than HOLE_BYTES_MIN as one. From the one after
    extents_max on, the rest counts as data."""
    extents: list[tuple[int, int]] = []
    for start, end in ranges:
        if extents and start - extents[-1][1] < HOLE_BYTES_MIN:
            extents[-1] = (extents[-1][0], end)
        elif len(extents) == extents_max:
            extents[-1] = (extents[-1][0], length)
            break
        else:
            extents.append((start, end))
    return extents
