"""files: exports of regular files, opened once: what happens to a file's name afterwards does not matter.

Reads with pread, not sendfile: an error must be the answer to that read, and cannot be one any more once a length was
announced. A file that becomes shorter than it was answers EIO for what is gone.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator

from pcshare.extents import data_within
from pcshare.nbd.server import Export
from pcshare.nbd.wire import ExtentFlag
from pcshare.serve.extents import with_holes
from pcshare.sources.file import open_regular

PIECE_BYTES = 1 << 18  # read and sent at a time: still in the CPU's cache when it is sent


class FileExport(Export):
    """A regular file, read-only."""

    def __init__(self, name: str, path: str) -> None:
        """Raises SourceError."""
        self.name = name
        self.description = os.path.basename(path)
        self._fd = open_regular(path)
        self.size = os.fstat(self._fd).st_size
        self._closing = threading.Lock()

    def read(self, offset: int, length: int) -> Iterator[bytes]:
        end = offset + length
        for at in range(offset, end, PIECE_BYTES):
            yield self._read_whole(at, min(PIECE_BYTES, end - at))

    def _read_whole(self, offset: int, length: int) -> bytes:
        content = os.pread(self._fd, length, offset)
        while len(content) < length:
            more = os.pread(self._fd, length - len(content), offset + len(content))
            if not more:
                raise OSError(errno.EIO, f"the file is shorter than it was: nothing at offset {offset + len(content)}")
            content += more
        return content

    def extents(self, offset: int, length: int) -> list[tuple[int, ExtentFlag]]:
        return with_holes(data_within(self._fd, offset, length), offset, length)

    def is_quick(self, offset: int, length: int) -> bool:
        """Judged by the first and the last byte: whether the kernel has them at hand."""
        probe = bytearray(1)
        try:
            return all(os.preadv(self._fd, [probe], at, os.RWF_NOWAIT) for at in (offset, offset + length - 1))
        except OSError:  # EAGAIN: on the disk; EOPNOTSUPP: the file system cannot say
            return False

    def close(self) -> None:
        with self._closing:
            fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
