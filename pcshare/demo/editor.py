"""editor: a helper program that writes into a block before the pages it writes to have arrived, and looks again later.

Run as `python -m pcshare.demo.editor`. It shows promise P2: a page that comes late, from the stream, must not take back
what was written. The source file never changes: what is written lives in the block.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

from pcshare_helpers import _common

STRIDE = 5 * 4096 + 24  # bytes from one stamp to the next: it hits pages at all places, and neither all nor in step
STAMP = b"written by a helper before this page came"


def places(length: int) -> Iterator[int]:
    """Where the stamps go, the last first: against the stream, so that most of those pages are not there yet."""
    return reversed(range(0, length - len(STAMP), STRIDE))


def edited(path: str | Path) -> str:
    """What the helper must find in the end: the crc32 of the file with all stamps in it."""
    content = bytearray(Path(path).read_bytes())
    for start in places(len(content)):
        content[start : start + len(STAMP)] = STAMP
    return f"{zlib.crc32(content):08x}"


def edit(run: _common.Run) -> str:
    """Writes all stamps, waits until everything has arrived, and reads the block through an attachment of its own."""
    missing = 0
    with run.attach(mode="rw") as block:
        with memoryview(block) as view:
            for start in places(len(view)):
                missing += not block.is_received(slice(start, start + len(STAMP)))
                view[start : start + len(STAMP)] = STAMP
                run.computed(len(STAMP))
        block.wait()
    with run.attach(mode="ro") as again, memoryview(again) as view:
        run.bytes_checked += len(view)
        found = zlib.crc32(view)
        run.details["stamps"] = sum(view[start : start + len(STAMP)] == STAMP for start in places(len(view)))
    run.details["written_before_arrival"] = missing
    return f"{found:08x}"


if __name__ == "__main__":
    sys.exit(_common.main("editor", edit, _common.parser(__doc__).parse_args()))
