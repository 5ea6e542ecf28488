"""Reads what the writer published, through an attachment of its own, and checks it.

Waits for the writer's MAGIC; then the values must have the checksum that stands beside them, and a few of them are
computed again from the first block.
"""

from __future__ import annotations

import sys
import time
import zlib

from . import _common, writer

SPOT_CHECKS = 4
LOOK_AGAIN_S = 0.002  # between two looks at MAGIC: the writer has no way to call a reader


def wait_for_magic(words: memoryview, timeout_s: float) -> None:
    """Returns when the writer has published."""
    deadline = time.monotonic() + timeout_s
    while words[0] != writer.MAGIC:
        if time.monotonic() > deadline:
            raise ValueError(f"nothing was published within {timeout_s:g} s: is a writer running?")
        time.sleep(LOOK_AGAIN_S)


def spot_check(run: _common.Run, values: list[int]) -> None:
    """Computes SPOT_CHECKS of the values again from the block that they were derived from."""
    with run.attach() as block, memoryview(block) as data:
        parts = writer.pieces(len(data), run.options.count)
        for i in range(min(SPOT_CHECKS, len(parts))):
            which = _common.splitmix64(run.options.seed, i) % len(parts)
            part = parts[which]
            if zlib.crc32(data[part]) != values[which]:
                raise ValueError(f"value {which} is not the checksum of bytes {part.start} to {part.stop}")
            run.computed(part.stop - part.start)


def read(run: _common.Run) -> int:
    """The checksum of what was read."""
    with (
        run.attach(run.options.published, "ro") as results,
        memoryview(results) as published,
        published[: len(published) // 8 * 8].cast("Q") as words,
    ):
        wait_for_magic(words, run.options.timeout)
        values = [int(words[writer.HEADER_WORDS + i]) for i in range(int(words[1]))]
        found = writer.checksum(values)
        if found != words[2]:
            raise ValueError(f"the values read have checksum {found:08x}, the writer published {int(words[2]):08x}")
        run.computed(8 * len(values))
    spot_check(run, values)
    return found


if __name__ == "__main__":
    parser = _common.parser(__doc__)
    parser.set_defaults(count=64)
    parser.add_argument("--from", dest="published", default="results", help="the writer's block (default: results)")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds to wait for the writer (default 60)")
    sys.exit(_common.main("reader", read, parser.parse_args()))
