"""Looks up random 64-bit words of a block through numpy and adds them up.

What an index or an embedding table sees: a few pages of many, in no order. Only those are waited for.
"""

from __future__ import annotations

import sys

import numpy as np

from . import _common

LOOKUPS_AT_ONCE = 64  # one fancy index: the pages of these are faulted one after another


def places(seed: int, first: int, count: int, n_words: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """_common.splitmix64 for a run of indices, modulo the words there are."""
    z = np.uint64(seed & _common.WORD_MASK) + np.arange(first + 1, first + count + 1, dtype=np.uint64) * np.uint64(
        _common.GOLDEN
    )
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) % np.uint64(n_words)).astype(np.int64)


def random_lookup(run: _common.Run) -> int:
    """The sum of --count words, modulo 2**64."""
    total, seed, count = 0, run.options.seed, run.options.count
    with run.attach() as block:
        words = np.frombuffer(block, dtype="<u8", count=len(block) // 8)
        for first in range(0, count, LOOKUPS_AT_ONCE):
            found = words[places(seed, first, min(LOOKUPS_AT_ONCE, count - first), words.size)]
            total = (total + int(found.sum(dtype=np.uint64))) & _common.WORD_MASK
            run.computed(found.nbytes)
    return total


if __name__ == "__main__":
    sys.exit(_common.main("random_lookup", random_lookup, _common.parser(__doc__).parse_args()))
