"""incoming: skin over the core's incoming migration: blocks, page records, the return path; see core/incoming.h.

Reads nothing of the stream but page records and the framing of RAM sections: that is pcshare.migration's, which is
given the other bytes. Every call that may wait lets go of the GIL.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Any

from pcshare.core import ffi, lib
from pcshare.errors import HostError, MigrationError, PcshareError, SourceError, check
from pcshare.fault_thread import FaultThreads
from pcshare.fds import OwnedFd

FOREVER = -1.0  # a timeout_s


class StreamLost(SourceError):
    """The connection broke, or the peer closed it: another one may go on."""


class StreamStopped(PcshareError):
    """stop() was called."""


class StreamTimeout(SourceError, TimeoutError):
    """The peer said nothing for as long as it was given."""


class Why(IntEnum):
    """Why records() came back."""

    END_OF_PAYLOAD = 0
    SECTION = 1
    EOF = 2


@dataclass(frozen=True)
class RecordsEnd:
    """section_type is the byte that a new section began with (SECTION), which was read; saw_end: RAM's END section has
    ended; offset is the byte of the stream that comes next."""

    why: Why
    section_type: int
    saw_end: bool
    offset: int


@dataclass(frozen=True)
class StreamCounters:
    """bytes read; pages in target pages; places are calls that placed pages."""

    bytes: int
    data_pages: int
    zero_pages: int
    fill_pages: int
    repeat_pages: int
    sections: int
    places: int


@dataclass(frozen=True)
class UnmappedBlock:
    """What a block holds at LISTEN. extents: what is no hole, a cffi array of struct ramblock_extent with n_extents."""

    extents: Any
    n_extents: int

    def ranges(self) -> Sequence[tuple[int, int]]:
        """The extents as (start, end), bytes."""
        return [(self.extents[i].start, self.extents[i].end) for i in range(self.n_extents)]


class Incoming:
    """One migration: what the source sends, over however many connections."""

    def __init__(self, target_page_size: int) -> None:
        """Bytes. SourceError EINVAL: larger than the host's page, or no size of a page."""
        self.target_page_size = target_page_size
        pointer = ffi.new("struct incoming **")
        rc = lib.incoming_new(pointer, target_page_size)
        if rc == -errno.EINVAL:
            host_page_size = os.sysconf("SC_PAGE_SIZE")
            raise SourceError(
                f"the source's pages have {target_page_size} bytes, this host's {host_page_size}: only pages of "
                f"{lib.INCOMING_TARGET_PAGE_MIN} bytes up to the host's can be placed",
                errno=errno.EINVAL,
            )
        check(rc, "preparing for a migration")
        self.pointer: Any = pointer[0]

    def add_block(self, idstr: str, *, used_length: int, page_size: int, memfd: int) -> int:
        """Its index. memfd is duplicated; nobody else may have it mapped before unmap_block. MigrationError: sizes that
        do not fit, or a name twice; HostError: no huge pages."""
        index = ffi.new("uint32_t *")
        rc = lib.incoming_add_block(self.pointer, idstr.encode(), used_length, page_size, memfd, index)
        where = f"block {idstr}: length {used_length}, page size {page_size}"
        if rc == -errno.EINVAL:
            sizes = f"a page of the source ({self.target_page_size}) to {lib.RAMBLOCK_PAGE_SIZE_MAX}"
            raise MigrationError(
                f"{where}: the length must be a multiple of the page size, and that a power of two from {sizes}"
            )
        if rc == -errno.EEXIST:
            raise MigrationError(f"{where}: a block of that name was announced before")
        if rc == -errno.ENOMEM and page_size > os.sysconf("SC_PAGE_SIZE"):
            count = used_length // page_size
            raise HostError(
                f"{where}: not enough huge pages",
                errno=errno.ENOMEM,
                hint=f"it needs {count} free huge pages of {page_size >> 10} KiB: sudo sysctl vm.nr_hugepages=N, "
                f"with N at least {count}; see HugePages_Free in /proc/meminfo",
            )
        check(rc, f"{where}: making room for it")
        return int(index[0])

    def take_block(
        self, idstr: str, *, used_length: int, page_size: int, received: Any, extents: Sequence[tuple[int, int]]
    ) -> int:
        """Its index: of a block past LISTEN, of a migration that another process took in. received: a uint64_t pointer,
        one bit a host page; what is outside of extents came as zeros."""
        index = ffi.new("uint32_t *")
        rows = ffi.new("struct ramblock_extent[]", [{"start": start, "end": end} for start, end in extents])
        rc = lib.incoming_take_block(
            self.pointer, idstr.encode(), used_length, page_size, received, rows, len(rows), index
        )
        check(rc, f"taking over block {idstr} of a migration")
        return int(index[0])

    def discard(self, idstr: str, start: int, length: int) -> None:
        """Forgets a range, bytes. MigrationError: not one of an announced block, or after LISTEN."""
        rc = lib.incoming_discard(self.pointer, idstr.encode(), start, length)
        wrong = {
            -errno.ENOENT: "it was not announced",
            -errno.ERANGE: "that lies beyond its end",
            -errno.EINVAL: "that is not in whole pages of the block",
            -errno.EBUSY: "that comes after LISTEN",
        }.get(rc)
        if wrong:
            raise MigrationError(f"a discard of {length} bytes from {start} of block {idstr}: {wrong}")
        check(rc, f"discarding pages of block {idstr}")

    def progress(self, index: int) -> tuple[int, int]:
        """(target pages, of them received)"""
        progress = ffi.new("struct incoming_progress *")
        check(lib.incoming_progress(self.pointer, index, progress), "asking how far a block is")
        return progress.target_pages, progress.received_pages

    def unmap_block(self, index: int, received: Any) -> UnmappedBlock:
        """LISTEN, first half. received: a uint64_t pointer to a bitmap of zeros, one bit a host page, which is filled
        in."""
        extents, n_extents = ffi.new("struct ramblock_extent **"), ffi.new("uint64_t *")
        check(lib.incoming_unmap_block(self.pointer, index, received, extents, n_extents), "taking stock of a block")
        return UnmappedBlock(ffi.gc(extents[0], lib.incoming_free_extents), n_extents[0])

    def page_channel(self, index: int) -> Any:
        """For FaultThreads.add_block, which consumes it. Once, after unmap_block."""
        channel = ffi.new("struct page_channel **")
        check(lib.incoming_page_channel(self.pointer, index, channel), "making a page channel")
        return channel[0]

    def listen_block(self, index: int, threads: FaultThreads, block_index: int) -> None:
        """LISTEN, second half: from now on the block's pages are placed."""
        check(lib.incoming_listen_block(self.pointer, index, threads.pointer, block_index), "listening on a block")

    def set_return_path(self, stream: IncomingStream | None) -> None:
        """Where messages go. After a loss requests wait for resend()."""
        lib.incoming_set_return_path(self.pointer, stream.pointer if stream else ffi.NULL)

    def send(self, message_type: int, payload: bytes = b"") -> None:
        """One message. StreamLost: there is no path."""
        self._check_sent(lib.incoming_send(self.pointer, message_type, payload, len(payload)))

    def send_bitmap(self, idstr: str) -> None:
        """Answers RECV_BITMAP: message, bitmap, end mark. MigrationError: no such block."""
        rc = lib.incoming_send_bitmap(self.pointer, idstr.encode())
        if rc == -errno.ENOENT:
            raise MigrationError(f"the source asks what was received of block {idstr}, which it never announced")
        self._check_sent(rc)

    def _check_sent(self, rc: int) -> None:
        if rc == -errno.ENOTCONN:
            raise StreamLost("no return path to the source", errno=errno.ENOTCONN)
        if rc == -errno.ENOBUFS:
            raise StreamLost("the source does not read its return path", errno=errno.ENOBUFS)
        check(rc, "a message to the source")

    def resend(self) -> None:
        """After a recovery: what is outstanding is asked for again."""
        lib.incoming_resend(self.pointer)

    def flush(self, timeout_s: float) -> bool:
        """Whether every message has left in that time. StreamLost: they cannot."""
        rc = lib.incoming_flush(self.pointer, _milliseconds(timeout_s))
        self._check_sent(rc)
        return bool(rc == 0)

    def give_up(self, error: int) -> None:
        """A positive errno: what is outstanding fails with it, and what is asked later; 0: it waits again."""
        lib.incoming_give_up(self.pointer, error)

    def outstanding(self) -> int:
        """How many requests wait for pages."""
        return int(lib.incoming_outstanding(self.pointer))

    def close(self) -> None:
        """Streams are to be closed before. Twice is fine."""
        lib.incoming_free(self.pointer)
        self.pointer = ffi.NULL


def _milliseconds(timeout_s: float) -> int:
    return int(lib.INCOMING_FOREVER) if timeout_s < 0 else min(round(timeout_s * 1000), 1 << 30)


class IncomingStream:
    """One connection of a migration. One thread reads; stop() may come from any."""

    def __init__(self, incoming: Incoming, fd: OwnedFd) -> None:
        """fd, a connected stream socket, is consumed."""
        pointer = ffi.new("struct incoming_stream **")
        check(lib.incoming_stream_new(pointer, incoming.pointer, fd.detach()), "taking a connection")
        self.pointer: Any = pointer[0]
        self._lock = threading.Lock()  # between stop() and close()

    def read(self, length: int, timeout_s: float = FOREVER) -> bytes:
        """Exactly so many bytes. StreamLost, StreamTimeout (the connection is of no use any more), StreamStopped."""
        buffer = bytearray(length)
        rc = lib.incoming_stream_read(self.pointer, ffi.from_buffer(buffer), length, _milliseconds(timeout_s))
        if rc < 0:
            raise self._failure(rc, timeout_s)
        return bytes(buffer)

    def read_some(self, length_max: int, timeout_s: float = FOREVER) -> bytes:
        """What is there, at least a byte; empty: the peer has closed. StreamTimeout: nothing came, nothing is lost."""
        buffer, count = bytearray(length_max), ffi.new("uint64_t *")
        rc = lib.incoming_stream_read_some(
            self.pointer, ffi.from_buffer(buffer), length_max, _milliseconds(timeout_s), count
        )
        if rc:
            raise self._failure(-errno.ETIMEDOUT if rc == lib.INCOMING_TIMED_OUT else rc, timeout_s)
        return bytes(memoryview(buffer)[: count[0]])

    def _failure(self, rc: int, timeout_s: float) -> PcshareError:
        if rc == -errno.ECANCELED:
            return StreamStopped("stopped", errno=errno.ECANCELED)
        if rc == -errno.ETIMEDOUT and timeout_s >= 0:
            return StreamTimeout(f"the source was silent for {timeout_s:g} s", errno=errno.ETIMEDOUT)
        if rc == -errno.ECONNRESET:
            return StreamLost(f"the source closed the connection, at byte {self.offset}", errno=errno.ECONNRESET)
        return StreamLost(f"reading from the source, at byte {self.offset}: {os.strerror(-rc)}", errno=-rc)

    def records(self, section_type: int = 0, ram_section_id: int = 0) -> RecordsEnd:
        """Stores or places page records. section_type 0: up to the end of the payload; PART or END, whose id was read:
        on through more sections of RAM until something else begins. MigrationError, StreamLost, StreamStopped;
        PcshareError: pages cannot be stored or placed here."""
        result = ffi.new("struct incoming_result *")
        rc = lib.incoming_stream_records(self.pointer, section_type, ram_section_id, result)
        if rc < 0:
            raise _records_failure(rc, result)
        return RecordsEnd(Why(rc), result.section_type, bool(result.saw_end), result.offset)

    @property
    def offset(self) -> int:
        """Bytes taken since the connection began."""
        return int(lib.incoming_stream_offset(self.pointer))

    def counters(self) -> StreamCounters:
        """Of this connection; any thread may ask."""
        counters = ffi.new("struct incoming_counters *")
        lib.incoming_stream_counters(self.pointer, counters)
        return StreamCounters(*(getattr(counters, field.name) for field in fields(StreamCounters)))

    def stop(self) -> None:
        """Whoever reads comes back with StreamStopped. Any thread; twice is fine."""
        with self._lock:
            if self.pointer != ffi.NULL:
                lib.incoming_stream_stop(self.pointer)

    def close(self) -> None:
        """No return path any more, and closed. Not while somebody reads. Twice is fine."""
        with self._lock:
            lib.incoming_stream_free(self.pointer)
            self.pointer = ffi.NULL


def _records_failure(rc: int, result: Any) -> PcshareError:
    text = ffi.string(result.text).decode(errors="replace")
    where = f"at byte {result.offset} of the stream: {text}"
    if result.fault == lib.INCOMING_FAULT_PEER:
        return MigrationError(where, offset=result.offset, errno=-rc)
    if result.fault == lib.INCOMING_FAULT_LINK:
        return StreamLost(where, errno=-rc)
    if rc == -errno.ECANCELED:
        return StreamStopped(text, errno=errno.ECANCELED)
    return PcshareError(text, errno=-rc)
