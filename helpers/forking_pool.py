"""Attaches once, then forks a pool whose workers compute on the block that they inherit.

Nothing about pcshare is said in the workers: the block is at the same address in each, mapped and registered anew by
the at-fork handler.
"""

from __future__ import annotations

import multiprocessing
import sys
import zlib
from concurrent.futures import ProcessPoolExecutor

from . import _common, writer

_view: memoryview | None = None  # set before the fork; the workers find it as the parent left it


def _checksum_of(part: tuple[int, int]) -> int:
    """In a worker: one slice of the inherited block."""
    assert _view is not None
    return zlib.crc32(_view[part[0] : part[1]])


def forking_pool(run: _common.Run) -> int:
    """The checksum of all slices' checksums, in their order."""
    global _view
    values: list[int] = []
    with run.attach() as block, memoryview(block) as _view:
        parts = [(part.start, part.stop) for part in writer.pieces(len(_view), run.options.count)]
        # An executor, not multiprocessing.Pool, which waits for ever for a worker that a lost page has killed.
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(run.options.workers, context) as pool:
            for part, value in zip(parts, pool.map(_checksum_of, parts), strict=True):
                values.append(value)
                run.computed(part[1] - part[0])
    _view = None
    run.details["workers"] = run.options.workers
    return writer.checksum(values)


if __name__ == "__main__":
    parser = _common.parser(__doc__)
    parser.set_defaults(count=64)
    parser.add_argument("--workers", type=int, default=4, help="processes in the pool (default 4)")
    sys.exit(_common.main("forking_pool", forking_pool, parser.parse_args()))
