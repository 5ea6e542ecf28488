"""Computes a checksum of each piece of one block and writes them into a second, writable one, then publishes them.

The second block starts empty (zero:SIZE). Its first four 64-bit words are MAGIC, how many values follow, their crc32,
and 0; MAGIC is stored last, so that a reader who sees it sees all.
"""

from __future__ import annotations

import sys
import zlib

from . import _common

MAGIC = 0x4445525548534350  # "PCSHURED"
HEADER_WORDS = 4


def pieces(length: int, count: int) -> list[slice]:
    """At most count slices of whole pages that cover length bytes."""
    size = max(4096, -(-length // max(count, 1) // 4096) * 4096) if length else 4096
    while -(-length // size) > count:
        size += 4096
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def checksum(values: list[int]) -> int:
    """crc32 of the values as little-endian 64-bit words: what writer and reader print."""
    return zlib.crc32(b"".join(value.to_bytes(8, "little") for value in values))


def write(run: _common.Run) -> int:
    """The checksum of what was published."""
    with (
        run.attach() as block,
        run.attach(run.options.into, "rw") as results,
        memoryview(block) as data,
        memoryview(results) as out,
        out[: len(out) // 8 * 8].cast("Q") as words,
    ):
        parts = pieces(len(data), run.options.count)
        if HEADER_WORDS + len(parts) > len(words):
            raise ValueError(f"block {results.idstr} holds {len(words)} words, {HEADER_WORDS + len(parts)} are needed")
        values: list[int] = []
        for part in parts:
            values.append(zlib.crc32(data[part]))
            words[HEADER_WORDS + len(values) - 1] = values[-1]
            run.computed(part.stop - part.start)
        words[1], words[2], words[3] = len(values), checksum(values), 0
        words[0] = MAGIC
        return checksum(values)


if __name__ == "__main__":
    parser = _common.parser(__doc__)
    parser.set_defaults(count=64)
    parser.add_argument("--into", default="results", help="the writable block (default: results)")
    sys.exit(_common.main("writer", write, parser.parse_args()))
