"""writer: makes and owns the status segment of a coordinator.

The fault threads count in it in place. Memory is reserved before it is given out: with /dev/shm full a write into a
hole would be SIGBUS. The segment never shrinks, since helpers map it too. A flock says "in use" for as long as it
lives, also before the socket listens.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import posix_ipc

from pcshare import runtime
from pcshare.core import ffi, lib
from pcshare.errors import (
    HostError,
    LimitReached,
    NameInUse,
    PcshareError,
    VersionMismatch,
)
from pcshare.fds import OwnedFd
from pcshare.protocol import cut_text
from pcshare.status.layout import (
    BITMAP_EAGER_BYTES,
    BLOCK_BYTES,
    BLOCKS_OFFSET,
    HELPER_BYTES,
    HELPERS_OFFSET,
    PAGES_A_BITMAP_PAGE,
    SEGMENT_MODE,
    SEGMENT_MODE_SHARED,
    STATE_NAMES,
    TABLES_BYTES,
    page_up,
    process_stat,
    summary_state,
)
from pcshare.status.leftovers import name_in_use


class BitmapRegion(NamedTuple):
    """A received bitmap: where it lies in the segment, and its words (uint64_t *) in this process."""

    offset: int
    address: Any


class _Mapping:
    """A shared mapping of a piece of the segment."""

    def __init__(self, fd: int, length: int, offset: int = 0) -> None:
        self.memory = mmap.mmap(fd, length, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=offset)
        self._buffer = ffi.from_buffer(self.memory, require_writable=True)

    def cast(self, ctype: str, offset: int = 0) -> Any:
        return ffi.cast(ctype, ffi.cast("char *", self._buffer) + offset)

    def close(self) -> None:
        ffi.release(self._buffer)
        self.memory.close()


class SegmentWriter:
    """Makes the status segment of a coordinator and owns it. Pointers into it end with close(): fault threads first.

    shared: other users may read it. NameInUse if there is one of that name, of a living coordinator or a dead one."""

    def __init__(
        self, name: str, socket_path: str | Path, *, shared: bool = False, taken: OwnedFd | None = None
    ) -> None:
        """taken: the segment itself, of a coordinator that has died; what it says goes on."""
        self.name = runtime.check_name(name)
        self._bitmaps: dict[int, _Mapping] = {}
        self._tables: _Mapping | None = None
        self._n_blocks = 0  # slots ever given out
        self._fd = OwnedFd(_create(name)) if taken is None else taken
        try:
            if taken is None:
                self._lock_new()
                os.fchmod(self._fd.fileno(), SEGMENT_MODE_SHARED if shared else SEGMENT_MODE)  # whatever the umask says
                os.ftruncate(self._fd.fileno(), TABLES_BYTES)
                self._reserve(0, HELPERS_OFFSET)
            self._size = os.fstat(self._fd.fileno()).st_size
            self._tables = _Mapping(self._fd.fileno(), TABLES_BYTES)
            self._readonly = OwnedFd(os.open(f"/proc/self/fd/{self._fd.fileno()}", os.O_RDONLY | os.O_CLOEXEC))
            self.header = self._tables.cast("struct status_header *")
            if taken is None:
                self._fill_header(socket_path)
            else:
                self._check_taken()
        except BaseException:
            self.close(unlink=taken is None)
            raise

    def _check_taken(self) -> None:
        found = (self.header.magic, self.header.version, self.header.size)
        if found != (lib.STATUS_MAGIC, lib.STATUS_VERSION, TABLES_BYTES):
            raise VersionMismatch(
                f"the status of {self.name!r} has layout {self.header.version}, this pcshare writes "
                f"{lib.STATUS_VERSION}",
                errno=errno.EPROTONOSUPPORT,
                hint=VersionMismatch.usual_hint,
            )

    @property
    def fd(self) -> int:
        """Open for reading only: what helpers get."""
        return self._readonly.fileno()

    @property
    def own_fd(self) -> int:
        """Open for writing, and locked: who has it owns the segment."""
        return self._fd.fileno()

    def _lock_new(self) -> None:
        fcntl.flock(self._fd.fileno(), fcntl.LOCK_EX)  # waits at most for somebody who looks whether it is in use
        if os.fstat(self._fd.fileno()).st_nlink == 0:
            raise NameInUse(f"another start took the name {self.name!r} apart at the same moment", hint="try again")

    def _reserve(self, offset: int, length: int) -> None:
        start = offset // mmap.PAGESIZE * mmap.PAGESIZE
        try:
            os.posix_fallocate(self._fd.fileno(), start, page_up(offset + length) - start)
        except OSError as error:
            raise PcshareError(
                f"{runtime.SHM_DIR} has no room for the status of {self.name!r}: {error.strerror}",
                errno=error.errno,
                hint=f"make room or make it larger: sudo mount -o remount,size=1G {runtime.SHM_DIR}",
            ) from None

    def _fill_header(self, socket_path: str | Path) -> None:
        header = self.header
        header.version = lib.STATUS_VERSION
        header.size = TABLES_BYTES
        header.blocks_offset, header.helpers_offset = BLOCKS_OFFSET, HELPERS_OFFSET
        header.blocks_max, header.helpers_max = lib.STATUS_BLOCKS_MAX, lib.STATUS_HELPERS_MAX
        self._name_process()
        header.name = self.name.encode()
        header.socket_path = os.fsencode(socket_path)
        header.magic = lib.STATUS_MAGIC  # last: from here on it can be read

    def _name_process(self) -> None:
        found = process_stat(os.getpid())
        self.header.pid_start_ticks = found[1] if found else 0
        self.header.pid = os.getpid()

    def note_restart(self) -> None:
        """From here on it is this process that serves; until then a segment that was taken names the one before."""
        self._name_process()
        self.header.restarts += 1

    def _slot(self, ctype: str, offset: int) -> Any:
        if self._tables is None:
            raise ValueError("the status segment was closed")
        return self._tables.cast(ctype, offset)

    def block_slot(self, index: int) -> Any:
        """struct status_block *"""
        if not 0 <= index < lib.STATUS_BLOCKS_MAX:
            raise LimitReached(f"a coordinator has at most {lib.STATUS_BLOCKS_MAX} blocks", errno=errno.EUSERS)
        self._n_blocks = max(self._n_blocks, index + 1)
        return self._slot("struct status_block *", BLOCKS_OFFSET + index * BLOCK_BYTES)

    def helper_slot(self, index: int) -> Any:
        """struct status_helper *, its memory reserved."""
        if not 0 <= index < lib.STATUS_HELPERS_MAX:
            raise LimitReached(
                f"a coordinator serves at most {lib.STATUS_HELPERS_MAX} helpers at once",
                errno=errno.EUSERS,
                hint="end one first",
            )
        offset = HELPERS_OFFSET + index * HELPER_BYTES
        self._reserve(offset, HELPER_BYTES)
        return self._slot("struct status_helper *", offset)

    def clear_block(self, index: int) -> None:
        """The slot of a block that was removed, empty and free."""
        slot = self.block_slot(index)
        slot.in_use = 0
        ffi.memmove(slot, bytes(BLOCK_BYTES), BLOCK_BYTES)
        self._sum_up()

    def clear_helper(self, index: int) -> None:
        """The slot of a helper that left, empty and free."""
        slot = self.helper_slot(index)
        slot.state = lib.STATUS_HELPER_FREE
        ffi.memmove(slot, bytes(HELPER_BYTES), HELPER_BYTES)

    def used_block_slots(self) -> list[int]:
        slots = ((index, self.block_slot(index)) for index in range(lib.STATUS_BLOCKS_MAX))
        return [index for index, slot in slots if slot.in_use]

    def used_helper_slots(self) -> list[int]:
        """Those that are not free. Read, not looked at in place: that would take memory for each."""
        table = os.pread(self._fd.fileno(), HELPER_BYTES * lib.STATUS_HELPERS_MAX, HELPERS_OFFSET)
        slots = ffi.from_buffer("struct status_helper[]", table)
        return [index for index, slot in enumerate(slots) if slot.state != lib.STATUS_HELPER_FREE]

    def add_bitmap(self, page_count: int, data_extents: Iterable[tuple[int, int]]) -> BitmapRegion:
        """A zeroed received bitmap for page_count pages, of which data_extents (start, end; in pages) are not holes.

        Memory is reserved where there is data, and everywhere in a bitmap of ordinary size; the bits of holes in a
        larger one get theirs when they are set."""
        offset, length = self._size, page_up(max(1, -(-page_count // 64) * 8))
        try:
            os.ftruncate(self._fd.fileno(), offset + length)
        except OSError as error:
            raise PcshareError(
                f"cannot grow the status of {self.name!r}: {error.strerror}", errno=error.errno
            ) from None
        self._size = offset + length
        self._bitmaps[offset] = mapping = _Mapping(self._fd.fileno(), length, offset)
        try:
            whole = [(0, length)] if length <= BITMAP_EAGER_BYTES else None
            for start, end in whole or _bitmap_pieces(data_extents):
                self._reserve(offset + start, min(end, length) - start)
        except PcshareError:
            self.free_bitmap(offset)
            raise
        return BitmapRegion(offset, mapping.cast("uint64_t *"))

    def take_bitmap(self, offset: int, page_count: int) -> BitmapRegion:
        """The received bitmap that lies there already."""
        length = page_up(max(1, -(-page_count // 64) * 8))
        if offset % mmap.PAGESIZE or offset < TABLES_BYTES or offset + length > self._size:
            raise PcshareError(f"the status of {self.name!r} holds no bitmap at {offset}", errno=errno.EPROTO)
        self._bitmaps[offset] = mapping = _Mapping(self._fd.fileno(), length, offset)
        return BitmapRegion(offset, mapping.cast("uint64_t *"))

    def free_bitmap(self, offset: int) -> None:
        """Gives the memory back. The place in the file stays empty: a helper may still have it mapped."""
        mapping = self._bitmaps.pop(offset)
        mapping.memory.madvise(mmap.MADV_REMOVE)
        mapping.close()

    def set_text(self, text: str, block: int | None = None) -> None:
        """The reason of a block, or of the whole; cut to what fits."""
        target = self.header if block is None else self.block_slot(block)
        fitting = cut_text(text, lib.STATUS_REASON_MAX)
        target.text_seq = target.text_seq + 1 | 1  # odd: being written
        ffi.memmove(target.reason, fitting.ljust(lib.STATUS_REASON_MAX, b"\0"), lib.STATUS_REASON_MAX)
        target.text_seq = target.text_seq + 1 & 0xFFFFFFFF

    def describe_block(self, index: int, idstr: str, used_length: int, page_size: int) -> None:
        """Of a block that is announced, so that it shows; the core does it for those that it makes."""
        slot = self.block_slot(index)
        slot.idstr = idstr.encode()
        slot.used_length, slot.page_size, slot.page_count = used_length, page_size, -(-used_length // page_size)
        slot.in_use = 1

    def describe_source(self, machine: str, target_page_size: int, page_sizes: int) -> None:
        """What an incoming migration says of its source; page sizes of all its blocks ORed, in bytes. Zeros: none."""
        header = self.header
        fitting = cut_text(machine, lib.STATUS_MACHINE_MAX)
        header.text_seq = header.text_seq + 1 | 1  # odd: being written
        ffi.memmove(header.machine, fitting.ljust(lib.STATUS_MACHINE_MAX, b"\0"), lib.STATUS_MACHINE_MAX)
        header.target_page_size, header.source_page_sizes = target_page_size, page_sizes
        header.text_seq = header.text_seq + 1 & 0xFFFFFFFF

    def set_state(self, state: int, block: int) -> None:
        """STATUS_STATE_* of a block; the header's summary follows, and who waits for progress wakes."""
        slot = self.block_slot(block)
        slot.state = state
        self._sum_up()
        lib.status_block_notify(slot)

    def _sum_up(self) -> None:
        slots = (self.block_slot(index) for index in range(self._n_blocks))
        state = summary_state(STATE_NAMES[slot.state] for slot in slots if slot.in_use)
        self.header.state = STATE_NAMES.index(state)

    def close(self, unlink: bool = True) -> None:
        """Unmaps and closes; with unlink the name goes too, if it is still ours. Twice is fine."""
        if self._fd.closed:
            return
        if unlink and _same_file(self._fd.fileno(), runtime.shm_path(self.name)):
            with suppress(posix_ipc.ExistentialError):
                posix_ipc.unlink_shared_memory(runtime.shm_name(self.name))
        for mapping in (*self._bitmaps.values(), self._tables):
            if mapping is not None:
                mapping.close()
        self._bitmaps, self._tables, self.header = {}, None, None
        if hasattr(self, "_readonly"):
            self._readonly.close()
        self._fd.close()


def _create(name: str) -> int:
    try:
        return int(posix_ipc.SharedMemory(runtime.shm_name(name), flags=posix_ipc.O_CREX, mode=SEGMENT_MODE).fd)
    except posix_ipc.ExistentialError:
        raise name_in_use(name) from None
    except (posix_ipc.PermissionsError, OSError) as error:
        raise HostError(
            f"cannot make POSIX shared memory {runtime.shm_name(name)}: {error}",
            errno=getattr(error, "errno", None) or errno.EACCES,
            hint=f"mount it: sudo mount -t tmpfs -o mode=1777 tmpfs {runtime.SHM_DIR}",
        ) from None


def _bitmap_pieces(extents: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The bytes of a bitmap that the bits of these extents lie in, in whole pages, each page once."""
    pieces: list[tuple[int, int]] = []
    for start, end in sorted(extents):
        if start >= end:
            continue
        first = start // PAGES_A_BITMAP_PAGE * mmap.PAGESIZE
        last = -(-end // PAGES_A_BITMAP_PAGE) * mmap.PAGESIZE
        if pieces and first <= pieces[-1][1]:
            pieces[-1] = (pieces[-1][0], max(last, pieces[-1][1]))
        else:
            pieces.append((first, last))
    return pieces


def _same_file(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except OSError:
        return False
