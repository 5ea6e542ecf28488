"""Scans a block from its first byte to its last and prints a digest of it.

The plainest use of pcshare: the digest starts with the first page while the others are still on their way.
"""

from __future__ import annotations

import hashlib
import sys
import zlib

from . import _common


def scan(run: _common.Run) -> str:
    """The sha256 or crc32 of all bytes, as hex."""
    crc, sha = 0, hashlib.sha256()
    with run.attach() as block, memoryview(block) as view:
        for start in range(0, len(view), _common.STEP_BYTES):
            if run.options.ensure:
                block.ensure(slice(start, min(start + _common.STEP_BYTES, len(view))))
            piece = view[start : start + _common.STEP_BYTES]
            if run.options.hash == "crc32":
                crc = zlib.crc32(piece, crc)
            else:
                sha.update(piece)
            run.computed(len(piece))
            piece.release()
    return f"{crc:08x}" if run.options.hash == "crc32" else sha.hexdigest()


if __name__ == "__main__":
    parser = _common.parser(__doc__)
    parser.add_argument("--hash", choices=("sha256", "crc32"), default="sha256")
    parser.add_argument("--ensure", action="store_true", help="ask for each step with one request before it is read")
    sys.exit(_common.main("scan", scan, parser.parse_args()))
