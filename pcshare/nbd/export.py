"""export: what an NBD server offers under a name: an Export, and Exports that finds one by its name.

Knows no connection: whoever answers requests (answers.py) asks an export for bytes and for its holes, from many threads
at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

from pcshare.nbd.wire import NAME_LENGTH_MAX, PAYLOAD_MAX_DEFAULT, ExtentFlag

BLOCK_PREFERRED = 4096  # bytes: a page


@dataclass(frozen=True)
class FileRange:
    """length bytes of an open file from offset on, which are surely there: they go from it to the socket uncopied."""

    fd: int
    offset: int
    length: int

    def __len__(self) -> int:
        return self.length


Piece: TypeAlias = bytes | bytearray | memoryview | FileRange


class Export(ABC):
    """size bytes that do not change, under a name. Subclasses set name and size; sizes are in bytes.

    block_max is the longest read that is answered. Nothing is asked for outside [0, size), and never for 0 bytes. What
    read, wait and extents raise is the answer to that one request: an OSError or PcshareError with its errno, anything
    else as EIO.
    """

    name: str
    size: int
    description: str = ""
    block_min: int = 1
    block_preferred: int = BLOCK_PREFERRED
    block_max: int = PAYLOAD_MAX_DEFAULT

    @abstractmethod
    def read(self, offset: int, length: int) -> Iterable[Piece]:
        """The bytes, in order; may wait. Pieces that are made one by one are sent one by one, where the client allows
        that."""

    def wait(self, offset: int, length: int, timeout_s: float) -> bool:
        """Whether read() of the range would no longer wait for somebody who may never come; waits for that at most so
        long. It is asked again and again, for as long as the client is there."""
        return True

    def extents(self, offset: int, length: int) -> list[tuple[int, ExtentFlag]]:
        """(length, what it is) of one piece of the range after the other, at least the first."""
        return [(length, ExtentFlag(0))]

    def is_quick(self, offset: int, length: int) -> bool:
        """Whether read() of the range and its extents() would block nowhere: then no thread is troubled."""
        return False

    @abstractmethod
    def close(self) -> None:
        """Gives up what it holds. Nothing is asked for afterwards; twice is fine."""


class Exports:
    """The exports of one server. The empty name is the only one's, where there is only one."""

    def __init__(self, exports: Iterable[Export]) -> None:
        self._by_name = {export.name: export for export in exports}
        if any(len(name.encode()) > NAME_LENGTH_MAX for name in self._by_name):
            raise ValueError(f"the name of an export has at most {NAME_LENGTH_MAX} bytes")

    def find(self, name: str) -> Export | None:
        if not name and len(self._by_name) == 1:
            return next(iter(self._by_name.values()))
        return self._by_name.get(name)

    def all(self) -> list[Export]:
        return list(self._by_name.values())

    def names(self) -> list[str]:
        return list(self._by_name)

    def close(self) -> None:
        for export in self._by_name.values():
            export.close()
