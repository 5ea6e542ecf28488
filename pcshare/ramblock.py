"""ramblock: skin over the core's RAM block.

A block belongs to the fault threads once it is added to them; this object then only shows it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pcshare.core import ffi, lib
from pcshare.errors import HostError, PcshareError, check
from pcshare.fds import OwnedFd
from pcshare.keeper import Keeper


@dataclass(frozen=True)
class CoreExtents:
    """Extents as the core has them, in an array of struct ramblock_extent: there may be hundreds of thousands."""

    pointer: Any
    count: int

    def ranges(self) -> list[tuple[int, int]]:
        return [(self.pointer[i].start, self.pointer[i].end) for i in range(self.count)]


def _core_extents(extents: Sequence[tuple[int, int]] | CoreExtents) -> CoreExtents:
    if isinstance(extents, CoreExtents):
        return extents
    rows = [{"start": start, "end": end} for start, end in extents]
    return CoreExtents(ffi.new("struct ramblock_extent[]", rows), len(rows))


class DeferredMemory:
    """Memory of a block to come that nobody has yet: written in place through memfd, then given to a RAMBlock.

    Sizes in bytes, map_length a multiple of page_size. No mapping of it may be left when it is given away."""

    def __init__(self, keeper: Keeper, idstr: str, *, map_length: int, page_size: int, writable: bool) -> None:
        self.idstr = idstr
        self._keeper = keeper
        number, memfd = ffi.new("uint32_t *"), ffi.new("int *")
        rc = lib.keeper_defer_block(keeper.pointer, idstr.encode(), map_length, page_size, writable, number, memfd)
        text = ffi.string(lib.keeper_error_text(keeper.pointer)).decode(errors="replace") if rc < 0 else ""
        check(rc, "making a RAM block's memory", f"block {idstr}: {text}")
        self._number = int(number[0])
        self._memfd = OwnedFd(memfd[0])

    def fileno(self) -> int:
        """The memfd, open for reading and writing."""
        return self._memfd.fileno()

    def give_away(self) -> Any:
        """As the core takes it; nothing is left to free here."""
        return ffi.new("struct ramblock_memory *", {"keeper_block": self._number, "memfd": self._memfd.detach()})

    def free(self) -> None:
        """Of memory that was not given away. Twice is fine."""
        if not self._memfd.closed:
            self._memfd.close()
            lib.keeper_drop_block(self._keeper.pointer, self._number)


class KeptMemory:
    """Memory of a block that a coordinator which has died served: the keeper has it, under this number."""

    def __init__(self, number: int) -> None:
        self._number = number

    def give_away(self) -> Any:
        """As the core takes it."""
        return ffi.new("struct ramblock_memory *", {"keeper_block": self._number, "memfd": -1, "is_kept": 1})


class RAMBlock:
    """One block: idstr, used_length and map_length in bytes, page_size in bytes, memfd.

    extents are the byte ranges [start, end) for which the source holds data; the rest are holes. status and received
    point into the status segment, which must outlive the block. memory is what the block holds before it is served,
    with the bits of these pages set in received; it belongs to the block from here on, also on failure."""

    def __init__(
        self,
        keeper: Keeper,
        idstr: str,
        *,
        used_length: int,
        page_size: int,
        writable: bool,
        extents: Sequence[tuple[int, int]] | CoreExtents,
        index: int,
        status: Any,
        received: Any,
        map_length: int | None = None,
        memory: DeferredMemory | KeptMemory | None = None,
    ) -> None:
        self.idstr = idstr
        self.index = index
        self.used_length = used_length
        self.page_size = page_size
        self.map_length = rounded_up(used_length, page_size) if map_length is None else map_length
        self.writable = writable
        block, text = ffi.new("struct ramblock **"), ffi.new("char[]", lib.CORE_ERROR_TEXT_MAX)
        data = _core_extents(extents)
        rc = lib.ramblock_new(
            block,
            keeper.pointer,
            ffi.NULL if memory is None else memory.give_away(),
            idstr.encode(),
            used_length,
            self.map_length,
            page_size,
            writable,
            data.pointer,
            data.count,
            index,
            status,
            received,
            text,
        )
        if rc == -errno.ENOMEM and page_size > os.sysconf("SC_PAGE_SIZE"):
            raise self._lacks_huge_pages(ffi.string(text).decode(errors="replace"))
        check(rc, "making a RAM block", ffi.string(text).decode(errors="replace"))
        self.pointer: Any = block[0]
        self._readonly_memfd = OwnedFd(os.open(f"/proc/self/fd/{self.pointer.memfd}", os.O_RDONLY | os.O_CLOEXEC))

    def _lacks_huge_pages(self, text: str) -> PcshareError:
        count = self.map_length // self.page_size
        return HostError(
            text,
            errno=errno.ENOMEM,
            hint=f"it needs {count} free huge pages of {self.page_size >> 10} KiB: sudo sysctl vm.nr_hugepages=N, "
            f"with N at least {count}; see HugePages_Free in /proc/meminfo",
        )

    @property
    def keeper_block(self) -> int:
        """The number under which the keeper has it."""
        return int(self.pointer.keeper_block)

    def helper_memfd(self, *, writing: bool) -> int:
        """What a helper gets: open for writing only for a shared writable attachment."""
        return int(self.pointer.helper_memfd) if writing else self._readonly_memfd.fileno()

    def is_empty(self) -> bool:
        """Whether the memory holds nothing at all."""
        return os.fstat(self.pointer.memfd).st_blocks == 0

    def discard(self, pages: Iterable[tuple[int, int]]) -> None:
        """Forgets memory and received bits of (first page, page count) ranges; PcshareError EPERM on a sealed block."""
        for first, count in pages:
            check(lib.ramblock_discard(self.pointer, first, count), f"discarding pages of block {self.idstr}")

    def is_received(self, page: int) -> bool:
        return bool(lib.ramblock_is_received(self.pointer, page))

    def own_bytes(self, offset: int, length: int) -> Any:
        """The coordinator's own mapping of a range, as a cffi buffer: reading a missing page waits for it."""
        if offset < 0 or length < 0 or offset + length > self.map_length:
            raise ValueError(f"[{offset}, {offset + length}) lies outside block {self.idstr}")
        return ffi.buffer(self.pointer.host_addr + offset, length)

    def close(self) -> None:
        """Closes what Python holds; the block itself ends with the fault threads that it was added to, or with
        free()."""
        self._readonly_memfd.close()

    def free(self) -> None:
        """Of a block that was never added."""
        self.close()
        lib.ramblock_free(self.pointer)
        self.pointer = ffi.NULL


def rounded_up(length: int, page_size: int) -> int:
    """In whole pages."""
    return -(-length // page_size) * page_size
