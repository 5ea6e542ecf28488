"""status: the status segment of a coordinator: who writes it, who reads it, and what a dead one left behind.

The layout is core/status_segment.h. The writer gives memory to the fault threads, which count in place; the reader
asks nobody, so that it also tells of a coordinator that is stopped or dead. Must not connect to a coordinator and must
not decide what becomes of leftovers. Some facts that shaped it:
 - reading a hole of shared memory through a mapping makes the page real, and with /dev/shm full that is SIGBUS. The
   reader preads, which does neither; the writer reserves memory before it gives it out;
 - the segment never shrinks: helpers map it too;
 - the writer holds a flock while it lives, which says "in use" also before its socket listens.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import posix_ipc

from pcshare import runtime
from pcshare.core import ffi, lib
from pcshare.errors import (
    AccessRefused,
    HostError,
    LimitReached,
    NameInUse,
    NoSuchCoordinator,
    PcshareError,
    VersionMismatch,
)
from pcshare.fds import OwnedFd

STATE_NAMES = ("NONE", "ADVISE", "DISCARD", "LISTENING", "RUNNING", "PAUSED", "END")  # by STATUS_STATE_*
STREAM_NAMES = ("eager", "lazy", "rate", "paused")  # by STATUS_STREAM_*
HELPER_STATE_NAMES = ("free", "attached", "disabled", "orphaned")  # by STATUS_HELPER_*
STATE_SUMMARY_ORDER = (
    "PAUSED",
    "RUNNING",
    "LISTENING",
    "DISCARD",
    "ADVISE",
    "NONE",
    "END",
)  # the first that a block is in

SEGMENT_MODE = 0o600
SEGMENT_MODE_SHARED = 0o644
TEXT_READ_TRIES_MAX = 64  # a text that is still being written then comes from a writer that stopped in the middle
BITMAP_EAGER_BYTES = 1 << 20  # reserved whole: a block of up to 32 GiB in 4 KiB pages
PAGES_A_BITMAP_PAGE = mmap.PAGESIZE * 8

_HEADER_BYTES: int = ffi.sizeof("struct status_header")
_BLOCK_BYTES: int = ffi.sizeof("struct status_block")
_HELPER_BYTES: int = ffi.sizeof("struct status_helper")


def _page_up(n_bytes: int) -> int:
    return -(-n_bytes // mmap.PAGESIZE) * mmap.PAGESIZE


BLOCKS_OFFSET = _page_up(_HEADER_BYTES)
HELPERS_OFFSET = BLOCKS_OFFSET + _page_up(_BLOCK_BYTES * lib.STATUS_BLOCKS_MAX)
TABLES_BYTES = HELPERS_OFFSET + _page_up(_HELPER_BYTES * lib.STATUS_HELPERS_MAX)


def summary_state(states: Iterable[str]) -> str:
    """One word for a set of blocks: what most needs to be seen; END only if all are at the end."""
    present = set(states)
    return next((state for state in STATE_SUMMARY_ORDER if state in present), "NONE")


def _process_stat(pid: int) -> tuple[str, int] | None:
    """State letter and start ticks of a process, or None if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return fields[0].decode(), int(fields[19])  # fields 3 and 22 of proc(5)
    except (OSError, IndexError, ValueError):
        return None


# --- the writer -----------------------------------------------------------------------------------


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

    def __init__(self, name: str, socket_path: str | Path, *, shared: bool = False) -> None:
        self.name = runtime.check_name(name)
        self._bitmaps: dict[int, _Mapping] = {}
        self._tables: _Mapping | None = None
        self._n_blocks = 0  # slots ever given out
        self._fd = OwnedFd(_create(name))
        try:
            self._lock_new()
            os.fchmod(self._fd.fileno(), SEGMENT_MODE_SHARED if shared else SEGMENT_MODE)  # whatever the umask says
            self._size = TABLES_BYTES
            os.ftruncate(self._fd.fileno(), self._size)
            self._reserve(0, HELPERS_OFFSET)
            self._tables = _Mapping(self._fd.fileno(), self._size)
            self._readonly = OwnedFd(os.open(f"/proc/self/fd/{self._fd.fileno()}", os.O_RDONLY | os.O_CLOEXEC))
            self.header = self._tables.cast("struct status_header *")
            self._fill_header(socket_path)
        except BaseException:
            self.close(unlink=True)
            raise

    @property
    def fd(self) -> int:
        """Open for reading only: what helpers get."""
        return self._readonly.fileno()

    def _lock_new(self) -> None:
        fcntl.flock(self._fd.fileno(), fcntl.LOCK_EX)  # waits at most for somebody who looks whether it is in use
        if os.fstat(self._fd.fileno()).st_nlink == 0:
            raise NameInUse(f"another start took the name {self.name!r} apart at the same moment", hint="try again")

    def _reserve(self, offset: int, length: int) -> None:
        start = offset // mmap.PAGESIZE * mmap.PAGESIZE
        try:
            os.posix_fallocate(self._fd.fileno(), start, _page_up(offset + length) - start)
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
        header.pid = os.getpid()
        found = _process_stat(os.getpid())
        header.pid_start_ticks = found[1] if found else 0
        header.name = self.name.encode()
        header.socket_path = os.fsencode(socket_path)
        header.magic = lib.STATUS_MAGIC  # last: from here on it can be read

    def _slot(self, ctype: str, offset: int) -> Any:
        if self._tables is None:
            raise ValueError("the status segment was closed")
        return self._tables.cast(ctype, offset)

    def block_slot(self, index: int) -> Any:
        """struct status_block *"""
        if not 0 <= index < lib.STATUS_BLOCKS_MAX:
            raise LimitReached(f"a coordinator has at most {lib.STATUS_BLOCKS_MAX} blocks", errno=errno.EUSERS)
        self._n_blocks = max(self._n_blocks, index + 1)
        return self._slot("struct status_block *", BLOCKS_OFFSET + index * _BLOCK_BYTES)

    def helper_slot(self, index: int) -> Any:
        """struct status_helper *, its memory reserved."""
        if not 0 <= index < lib.STATUS_HELPERS_MAX:
            raise LimitReached(
                f"a coordinator serves at most {lib.STATUS_HELPERS_MAX} helpers at once",
                errno=errno.EUSERS,
                hint="end one first",
            )
        offset = HELPERS_OFFSET + index * _HELPER_BYTES
        self._reserve(offset, _HELPER_BYTES)
        return self._slot("struct status_helper *", offset)

    def clear_block(self, index: int) -> None:
        """The slot of a block that was removed, empty and free."""
        slot = self.block_slot(index)
        slot.in_use = 0
        ffi.memmove(slot, bytes(_BLOCK_BYTES), _BLOCK_BYTES)
        self._sum_up()

    def clear_helper(self, index: int) -> None:
        """The slot of a helper that left, empty and free."""
        slot = self.helper_slot(index)
        slot.state = lib.STATUS_HELPER_FREE
        ffi.memmove(slot, bytes(_HELPER_BYTES), _HELPER_BYTES)

    def add_bitmap(self, page_count: int, data_extents: Iterable[tuple[int, int]]) -> BitmapRegion:
        """A zeroed received bitmap for page_count pages, of which data_extents (start, end; in pages) are not holes.

        Memory is reserved where there is data, and everywhere in a bitmap of ordinary size; the bits of holes in a
        larger one get theirs when they are set."""
        offset, length = self._size, _page_up(max(1, -(-page_count // 64) * 8))
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

    def free_bitmap(self, offset: int) -> None:
        """Gives the memory back. The place in the file stays empty: a helper may still have it mapped."""
        mapping = self._bitmaps.pop(offset)
        mapping.memory.madvise(mmap.MADV_REMOVE)
        mapping.close()

    def set_text(self, text: str, block: int | None = None) -> None:
        """The reason of a block, or of the whole; cut to what fits."""
        target = self.header if block is None else self.block_slot(block)
        fitting = text.encode()[: lib.STATUS_REASON_MAX - 1].decode(errors="ignore").encode()
        target.text_seq = target.text_seq + 1 | 1  # odd: being written
        ffi.memmove(target.reason, fitting.ljust(lib.STATUS_REASON_MAX, b"\0"), lib.STATUS_REASON_MAX)
        target.text_seq = target.text_seq + 1 & 0xFFFFFFFF

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


# --- the report -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Blocktime:
    """How long threads waited for pages, in microseconds; p50 and p99 interpolated inside a log2 bucket, max exact."""

    p50: float
    p99: float
    max: int
    total: int
    buckets: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        return {"p50": self.p50, "p99": self.p99, "max": self.max}


def blocktime_quantile(buckets: Iterable[int], quantile: float, max_us: int) -> float:
    """Bucket i counts waits of [2^(i-1), 2^i) us, bucket 0 those under 1 us. 0.0 if nobody waited."""
    counts = tuple(buckets)
    rank = quantile * sum(counts)
    for index, count in enumerate(counts):
        if count and rank <= count:
            low, high = (1 << index) >> 1, 1 << index
            if index == len(counts) - 1:
                high = max(max_us, low)  # the last bucket is open
            return round(min(low + (high - low) * rank / count, max_us), 1)
        rank -= count
    return 0.0


@dataclass(frozen=True)
class BlockStatus:
    index: int
    idstr: str
    used_length: int
    page_size: int
    writable: bool
    state: str
    reason: str
    received_pages: int
    hole_pages: int
    page_count: int
    demand_pages: int
    stream_pages: int
    zero_pages: int
    foreign_pages: int
    lost_pages: int
    bitmap_offset: int

    @property
    def fraction(self) -> float:
        """How much is here: 1.0 is complete."""
        return (self.received_pages + self.hole_pages) / self.page_count if self.page_count else 1.0

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key not in ("index", "bitmap_offset")}


@dataclass(frozen=True)
class HelperStatus:
    slot: int
    pid: int
    uid: int
    state: str
    block: str
    faults: int
    waiting: int
    demand_pages: int
    blocktime: Blocktime

    def to_json(self) -> dict[str, Any]:
        told = {key: value for key, value in vars(self).items() if key not in ("slot", "blocktime")}
        return {**told, "blocktime_us": self.blocktime.to_json()}


@dataclass(frozen=True)
class StatusReport:
    """What a status segment says, and what became of the process that writes it.

    alive: that process exists (also stopped) and its socket listens."""

    name: str
    pid: int
    keeper_pid: int
    alive: bool
    stopped: bool
    state: str
    reason: str
    stream: str
    stream_rate: int
    socket: str
    faults: int
    helpers_joined: int
    helpers_left: int
    blocktime: Blocktime
    blocks: tuple[BlockStatus, ...]
    helpers: tuple[HelperStatus, ...]

    def to_json(self) -> dict[str, Any]:
        told = {key: value for key, value in vars(self).items() if key not in ("blocktime", "blocks", "helpers")}
        return {
            **told,
            "blocktime_us": self.blocktime.to_json(),
            "blocks": [block.to_json() for block in self.blocks],
            "helpers": [helper.to_json() for helper in self.helpers],
        }


# --- the reader -----------------------------------------------------------------------------------


def _text(field: Any) -> str:
    return str(ffi.string(field).decode(errors="replace"))


def _named(names: tuple[str, ...], value: int) -> str:
    return names[value] if value < len(names) else str(value)


def _blocktime(histogram: Any) -> Blocktime:
    buckets, max_us = tuple(histogram.count), int(histogram.max_us)
    p50, p99 = (blocktime_quantile(buckets, quantile, max_us) for quantile in (0.5, 0.99))
    return Blocktime(p50, p99, max_us, int(histogram.total_us), buckets)


class StatusReader:
    """Reads a status segment as often as wanted, asking nobody. NoSuchCoordinator if there is none of that name."""

    def __init__(self, name: str) -> None:
        self.name = runtime.check_name(name)
        self._fd = _open_segment(name)
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
        content = os.pread(self._fd.fileno(), length, offset)
        if len(content) < length:
            raise self._damaged(f"it ends at byte {offset + len(content)}, before {offset + length}")
        return content

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
        blocks_end = header.blocks_offset + header.blocks_max * _BLOCK_BYTES
        helpers_end = header.helpers_offset + header.helpers_max * _HELPER_BYTES
        inside = header.blocks_max <= lib.STATUS_BLOCKS_MAX and header.helpers_max <= lib.STATUS_HELPERS_MAX
        if not inside or max(blocks_end, helpers_end) > header.size:
            raise self._damaged("its tables do not lie inside it")
        size = os.fstat(self._fd.fileno()).st_size
        if header.size > size:
            raise self._damaged(f"it has {size} bytes of {header.size}")

    def _blocks(self, header: Any) -> Iterator[BlockStatus]:
        table = self._read(header.blocks_offset, header.blocks_max * _BLOCK_BYTES)
        for index, slot in enumerate(ffi.from_buffer("struct status_block[]", table)):
            if slot.in_use:
                yield _block_status(
                    index, self._read_struct("struct status_block", header.blocks_offset + index * _BLOCK_BYTES)
                )

    def _helpers(self, header: Any, blocks: dict[int, str]) -> Iterator[HelperStatus]:
        table = self._read(header.helpers_offset, header.helpers_max * _HELPER_BYTES)
        for index, slot in enumerate(ffi.from_buffer("struct status_helper[]", table)):
            if slot.state != lib.STATUS_HELPER_FREE:
                yield _helper_status(index, slot, blocks)

    def report(self) -> StatusReport:
        header = self._header()
        blocks = tuple(self._blocks(header))
        helpers = tuple(self._helpers(header, {block.index: block.idstr for block in blocks}))
        found = _process_stat(header.pid)
        exists = found is not None and found[1] == header.pid_start_ticks and found[0] not in "ZX"
        reasons = [_text(header.reason), *(f"{block.idstr}: {block.reason}" for block in blocks if block.reason)]
        return StatusReport(
            name=self.name,
            pid=header.pid,
            keeper_pid=header.keeper_pid,
            alive=exists and runtime.is_listening(_text(header.socket_path)),
            stopped=exists and found is not None and found[0] in "Tt",
            state=summary_state(block.state for block in blocks),
            reason=next(filter(None, reasons), ""),
            stream=_named(STREAM_NAMES, header.stream_mode),
            stream_rate=header.stream_rate,
            socket=_text(header.socket_path),
            faults=header.fault_count,
            helpers_joined=header.helpers_joined,
            helpers_left=header.helpers_left,
            blocktime=_blocktime(header.blocktime),
            blocks=blocks,
            helpers=helpers,
        )

    def bitmap(self, block: BlockStatus) -> bytes:
        """The received bitmap: page i is bit i % 8 of byte i // 8."""
        return self._read(block.bitmap_offset, -(-block.page_count // 8))


def _block_status(index: int, slot: Any) -> BlockStatus:
    return BlockStatus(
        index=index,
        idstr=_text(slot.idstr),
        used_length=slot.used_length,
        page_size=slot.page_size,
        writable=bool(slot.writable),
        state=_named(STATE_NAMES, slot.state),
        reason=_text(slot.reason),
        received_pages=slot.received_pages,
        hole_pages=slot.hole_pages,
        page_count=slot.page_count,
        demand_pages=slot.demand_pages,
        stream_pages=slot.stream_pages,
        zero_pages=slot.zero_pages,
        foreign_pages=slot.foreign_pages,
        lost_pages=slot.lost_pages,
        bitmap_offset=slot.bitmap_offset,
    )


def _helper_status(index: int, slot: Any, blocks: dict[int, str]) -> HelperStatus:
    return HelperStatus(
        slot=index,
        pid=slot.pid,
        uid=slot.uid,
        state=_named(HELPER_STATE_NAMES, slot.state),
        block=blocks.get(slot.block_index, ""),
        faults=slot.faults,
        waiting=slot.waiting,
        demand_pages=slot.demand_pages,
        blocktime=_blocktime(slot.blocktime),
    )


def _open_segment(name: str) -> OwnedFd:
    path = runtime.shm_path(name)
    try:
        return OwnedFd(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW))
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


def read_status(name: str) -> StatusReport:
    """What the coordinator of that name does, or did when it died. Asks the segment, not the coordinator."""
    with StatusReader(name) as reader:
        return reader.report()


# --- what a dead one left -------------------------------------------------------------------------


@dataclass(frozen=True)
class Leftovers:
    """What a coordinator that is no more left under its name. pid 0: it died before it said so."""

    name: str
    pid: int
    paths: tuple[Path, ...]
    living_helpers: tuple[int, ...]  # pids that live and were attached

    def __str__(self) -> str:
        who = f"coordinator {self.name!r}" + (f" (pid {self.pid})" if self.pid else "")
        living = f"; {len(self.living_helpers)} of its helpers still live" if self.living_helpers else ""
        return f"{who} died and left {', '.join(map(str, self.paths))}{living}"


def _is_locked(fd: OwnedFd) -> bool:
    try:
        fcntl.flock(fd.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(fd.fileno(), fcntl.LOCK_UN)
    return False


def _report_of_segment(name: str) -> StatusReport | None:
    """The report of a segment that can be read as one; None for anything else under that name."""
    try:
        return read_status(name)
    except AccessRefused:
        raise
    except PcshareError:
        return None


def _dead_sockets(name: str, recorded: str) -> Iterator[Path]:
    paths = {runtime.socket_path(name), runtime.shared_socket_path(name)}
    if Path(recorded).name == f"{name}{runtime.SOCKET_SUFFIX}":
        paths.add(Path(recorded))
    return (path for path in sorted(paths) if path.is_socket() and not runtime.is_listening(path))


def in_use(name: str) -> bool:
    """Whether a coordinator of that name lives, also one that is stopped, or just starting."""
    try:
        with _open_segment(name) as fd:
            if _is_locked(fd):
                return True
    except NoSuchCoordinator:
        pass
    path = runtime.find_socket(name)
    return path is not None and runtime.is_listening(path)


def leftovers(name: str) -> Leftovers | None:
    """What a dead coordinator left; None if there is nothing, or if it lives."""
    if in_use(name):
        return None
    report = _report_of_segment(name)
    segment = runtime.shm_path(name)
    paths = (*((segment,) if segment.exists() else ()), *_dead_sockets(name, report.socket if report else ""))
    if not paths:
        return None
    helpers = report.helpers if report else ()
    living = sorted({helper.pid for helper in helpers if _process_stat(helper.pid) is not None})
    return Leftovers(name, report.pid if report else 0, paths, tuple(living))


@contextmanager
def _locked_segment(name: str) -> Iterator[None]:
    """Holds the dead writer's lock, so that nobody can start under the name meanwhile and be taken apart."""
    try:
        segment = _open_segment(name)
    except NoSuchCoordinator:
        yield
        return
    with segment:
        try:
            fcntl.flock(segment.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise name_in_use(name) from None
        yield


def remove_leftovers(name: str) -> Leftovers | None:
    """Removes what a dead coordinator left and says what that was. NameInUse if it lives."""
    found = leftovers(name)
    if found is None:
        if in_use(name):
            raise name_in_use(name)
        return None
    with _locked_segment(name):
        for path in found.paths:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise AccessRefused(
                    f"cannot remove {path}: {error.strerror}", errno=error.errno, hint=f"remove it: sudo rm {path}"
                ) from None
    return found


def name_in_use(name: str) -> NameInUse:
    """The refusal of a name that is taken: says by whom, living or dead, and the cure."""
    try:
        found = leftovers(name)
    except AccessRefused:
        return NameInUse(f"the name {name!r} is taken by another user", errno=errno.EEXIST, hint="take another --name")
    if found is not None:
        return NameInUse(str(found), errno=errno.EEXIST, hint="start it with --replace to remove that")
    report = _report_of_segment(name)
    pid = f", pid {report.pid}" if report else ""
    return NameInUse(
        f"a coordinator {name!r} runs already{pid}",
        errno=errno.EEXIST,
        hint=f"take another --name, or end it: pcshare stop {name}",
    )
