"""reader: reads a status segment and asks nobody, so that it also tells of a coordinator that is stopped or dead.

It preads: reading a hole of shared memory through a mapping makes the page real, and with /dev/shm full that is SIGBUS.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

from pcshare import runtime
from pcshare.core import ffi, lib
from pcshare.errors import (
    AccessRefused,
    NoSuchCoordinator,
    PcshareError,
    VersionMismatch,
)
from pcshare.fds import OwnedFd
from pcshare.status.layout import (
    BITMAP_BYTES_MAX,
    BLOCK_BYTES,
    HELPER_BYTES,
    HELPER_STATE_NAMES,
    STATE_NAMES,
    STREAM_NAMES,
    TEXT_READ_TRIES_MAX,
    named,
    parent_pid,
    process_stat,
    summary_state,
)
from pcshare.status.report import (
    BlockStatus,
    Blocktime,
    HelperStatus,
    SourceStatus,
    StatusReport,
    blocktime_quantile,
)

LOOK_AGAIN_S = 0.02  # at one that is being started again


def _text(field: Any) -> str:
    """Anybody may put a segment there, and its texts go to a terminal: what would steer that is left out."""
    text = str(ffi.string(field).decode(errors="replace"))
    return text if text.isprintable() else "".join(one if one.isprintable() else "\ufffd" for one in text)


def _blocktime(histogram: Any) -> Blocktime:
    buckets, max_us = tuple(histogram.count), int(histogram.max_us)
    p50, p99 = (blocktime_quantile(buckets, quantile, max_us) for quantile in (0.5, 0.99))
    return Blocktime(p50, p99, max_us, int(histogram.total_us), buckets)


class StatusReader:
    """Reads a status segment as often as wanted, asking nobody. NoSuchCoordinator if there is none of that name."""

    def __init__(self, name: str) -> None:
        self.name = runtime.check_name(name)
        self._fd = open_segment(name)
        try:
            self._header()  # refuses what is no status segment of this version
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._fd.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, cls: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _damaged(self, what: str) -> PcshareError:
        return PcshareError(
            f"{runtime.shm_path(self.name)} is no status segment: {what}",
            errno=errno.EPROTO,
            hint=f"if nothing of that name runs, remove it: rm {runtime.shm_path(self.name)}",
        )

    def _read(self, offset: int, length: int) -> bytes:
        """pread, since a mapping would make holes real; see above."""
        size = os.fstat(self._fd.fileno()).st_size
        if offset + length <= size:  # first: what a damaged one says is longer than memory
            content = os.pread(self._fd.fileno(), length, offset)
            if len(content) == length:
                return content
            size = offset + len(content)  # cut off at this moment
        raise self._damaged(f"it ends at byte {size}, before {offset + length}")

    def _read_struct(self, ctype: str, offset: int) -> Any:
        """A struct whose text is not half-written, or, after many tries, as it is: its writer stopped in the middle."""
        length = ffi.sizeof(ctype)
        for _ in range(TEXT_READ_TRIES_MAX):
            found, again = (self._copy(ctype, self._read(offset, length)) for _ in range(2))
            if found.text_seq == again.text_seq and not found.text_seq & 1:
                break
        return found

    @staticmethod
    def _copy(ctype: str, content: bytes) -> Any:
        copy = ffi.new(f"{ctype} *")
        ffi.memmove(copy, content, len(content))
        return copy

    def _header(self) -> Any:
        header = self._read_struct("struct status_header", 0)
        if header.magic == 0:
            raise self._damaged("it is empty, or its coordinator is just starting")
        if header.magic != lib.STATUS_MAGIC:
            raise self._damaged(f"it begins with {header.magic:#x}, not {lib.STATUS_MAGIC:#x}")
        if header.version != lib.STATUS_VERSION:
            raise VersionMismatch(
                f"the status of {self.name!r} has layout {header.version}, this pcshare reads {lib.STATUS_VERSION}",
                errno=errno.EPROTONOSUPPORT,
                hint=VersionMismatch.usual_hint,
            )
        self._check_tables(header)
        return header

    def _check_tables(self, header: Any) -> None:
        blocks_end = header.blocks_offset + header.blocks_max * BLOCK_BYTES
        helpers_end = header.helpers_offset + header.helpers_max * HELPER_BYTES
        inside = header.blocks_max <= lib.STATUS_BLOCKS_MAX and header.helpers_max <= lib.STATUS_HELPERS_MAX
        if not inside or max(blocks_end, helpers_end) > header.size:
            raise self._damaged("its tables do not lie inside it")
        size = os.fstat(self._fd.fileno()).st_size
        if header.size > size:
            raise self._damaged(f"it has {size} bytes of {header.size}")

    def _blocks(self, header: Any) -> Iterator[BlockStatus]:
        table = self._read(header.blocks_offset, header.blocks_max * BLOCK_BYTES)
        for index, slot in enumerate(ffi.from_buffer("struct status_block[]", table)):
            if slot.in_use:
                yield _block_status(
                    index, self._read_struct("struct status_block", header.blocks_offset + index * BLOCK_BYTES)
                )

    def _helpers(self, header: Any, blocks: dict[int, str]) -> Iterator[HelperStatus]:
        table = self._read(header.helpers_offset, header.helpers_max * HELPER_BYTES)
        for index, slot in enumerate(ffi.from_buffer("struct status_helper[]", table)):
            if slot.state != lib.STATUS_HELPER_FREE:
                yield _helper_status(index, slot, blocks, header.pid)

    def report(self) -> StatusReport:
        header = self._header()
        blocks = tuple(self._blocks(header))
        helpers = tuple(self._helpers(header, {block.index: block.idstr for block in blocks}))
        header = self._header()  # after the table: who is not in it any more is counted
        found = process_stat(header.pid)
        exists = found is not None and found[1] == header.pid_start_ticks and found[0] not in "ZX"
        reasons = [_text(header.reason), *(f"{block.idstr}: {block.reason}" for block in blocks if block.reason)]
        return StatusReport(
            name=self.name,
            pid=header.pid,
            keeper_pid=header.keeper_pid,
            restarts=header.restarts,
            restarting=not exists and is_locked(self._fd),
            alive=exists and runtime.is_listening(_text(header.socket_path)),
            stopped=exists and found is not None and found[0] in "Tt",
            state=summary_state(block.state for block in blocks),
            reason=next(filter(None, reasons), ""),
            stream=named(STREAM_NAMES, header.stream_mode),
            stream_rate=header.stream_rate,
            socket=_text(header.socket_path),
            faults=header.fault_count,
            helpers_joined=header.helpers_joined,
            helpers_left=header.helpers_left,
            blocktime=_blocktime(header.blocktime),
            source=_source_status(header),
            blocks=blocks,
            helpers=helpers,
        )

    def bitmap(self, block: BlockStatus) -> bytes:
        """The received bitmap: page i is bit i % 8 of byte i // 8."""
        length = -(-block.page_count // 8)
        if length > BITMAP_BYTES_MAX:
            raise self._damaged(f"block {block.idstr} would have a received bitmap of {length} bytes")
        return self._read(block.bitmap_offset, length)


def _source_status(header: Any) -> SourceStatus | None:
    if not header.target_page_size:
        return None
    bits = range(header.source_page_sizes.bit_length())
    sizes = tuple(1 << bit for bit in bits if header.source_page_sizes >> bit & 1)
    return SourceStatus(_text(header.machine), header.target_page_size, sizes)


def _block_status(index: int, slot: Any) -> BlockStatus:
    return BlockStatus(
        index=index,
        idstr=_text(slot.idstr),
        used_length=slot.used_length,
        page_size=slot.page_size,
        writable=bool(slot.writable),
        state=named(STATE_NAMES, slot.state),
        reason=_text(slot.reason),
        received_pages=slot.received_pages,
        hole_pages=slot.hole_pages,
        page_count=slot.page_count,
        demand_pages=slot.demand_pages,
        stream_pages=slot.stream_pages,
        zero_pages=slot.zero_pages,
        foreign_pages=slot.foreign_pages,
        lost_pages=slot.lost_pages,
        removed_pages=slot.removed_pages,
        bitmap_offset=slot.bitmap_offset,
    )


def _helper_status(index: int, slot: Any, blocks: dict[int, str], coordinator_pid: int) -> HelperStatus:
    return HelperStatus(
        slot=index,
        pid=slot.pid,
        uid=slot.uid,
        state=named(HELPER_STATE_NAMES, slot.state),
        block=blocks.get(slot.block_index, ""),
        faults=slot.faults,
        waiting=slot.waiting,
        demand_pages=slot.demand_pages,
        blocktime=_blocktime(slot.blocktime),
        exporter=parent_pid(slot.pid) == coordinator_pid,
    )


def is_locked(fd: OwnedFd) -> bool:
    """Whether somebody owns the segment: a coordinator, or who keeps its fds for the next one."""
    try:
        fcntl.flock(fd.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(fd.fileno(), fcntl.LOCK_UN)
    return False


def open_segment(name: str) -> OwnedFd:
    path = runtime.shm_path(name)
    try:
        fd = OwnedFd(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK))  # a FIFO would wait
    except FileNotFoundError:
        raise NoSuchCoordinator(
            f"there is no coordinator {name!r}", errno=errno.ENOENT, hint="`pcshare status` lists those that run"
        ) from None
    except PermissionError:
        raise AccessRefused(
            f"the status of {name!r} belongs to another user",
            errno=errno.EACCES,
            hint="ask as that user, or start the coordinator with --allow-uid or --allow-gid",
        ) from None
    except OSError as error:
        raise PcshareError(f"cannot read {path}: {error.strerror}", errno=error.errno) from None
    if not stat.S_ISREG(os.fstat(fd.fileno()).st_mode):
        fd.close()
        raise PcshareError(f"{path} is no shared memory", errno=errno.EPROTO, hint=f"remove it: rm -r {path}")
    return fd


def read_status(name: str) -> StatusReport:
    """What the coordinator of that name does, or did when it died. Asks the segment, not the coordinator."""
    with StatusReader(name) as reader:
        return reader.report()


def await_restart(name: str, deadline_s: float) -> StatusReport:
    """As read_status; but one that was killed, and is being started again, is waited for: until time.monotonic() is
    deadline_s at most."""
    while (report := read_status(name)).restarting and time.monotonic() < deadline_s:
        time.sleep(LOOK_AGAIN_S)
    return report
