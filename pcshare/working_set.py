"""working_set: which pages a job touched first, in that order: the file of it, and what a later start makes of it.

A set is a table of blocks and runs of their pages. Packing, parsing, fitting a set to what is served and planning its
replay do no I/O; read() and write() at the end do nothing else. Whatever a file holds, it is a set or a
WorkingSetError. The format is in docs/reference/working-set.md.
"""

from __future__ import annotations

import contextlib
import os
import stat
import struct
import zlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pcshare import runtime
from pcshare.errors import UsageError, WorkingSetError

MAGIC = b"PCSHAREW"
VERSION = 1
BLOCKS_MAX = 1024  # STATUS_BLOCKS_MAX: a coordinator has no more
RUNS_MAX = 4 << 20  # WORKING_SET_RUNS_MAX
RUN_PAGES_MAX = (1 << 32) - 1  # a run's count has 32 bits in the core
LENGTH_MAX = 1 << 56  # bytes of a block: more than an address space holds
PAGE_SIZE_MIN, PAGE_SIZE_MAX = 4 << 10, 1 << 30
RUN_BYTES_MAX = 16  # 2 for the block, 7 for the page, 5 for the count, and some more
BODY_BYTES_MAX = RUNS_MAX * RUN_BYTES_MAX + BLOCKS_MAX * 128
FILE_BYTES_MAX = BODY_BYTES_MAX + (BODY_BYTES_MAX >> 8)  # what zlib cannot make smaller it makes a little larger
FILE_MODE = 0o600  # which parts of its data a job looks at is nobody else's business
VARINT_BYTES_MAX = 9  # 63 bits

# Pages between two runs that are asked for with them, so that one request does for both: this part of what the stream
# asks the source for at a time. 32 KiB of a file's 1 MiB: that they travel costs less than a request of its own.
GAP_PART = 32

CURE = "record it anew: remove it, or name another file"

PLACE_BITS = 23  # of a place among RUNS_MAX
PLACE_MASK = (1 << PLACE_BITS) - 1

_HEAD = struct.Struct("<8sII")  # magic, version, bytes of the body

Run = tuple[int, int, int]  # block, first page, how many; the block is a place in a table, or a block's index


@dataclass(frozen=True)
class SetBlock:
    """A block as it was served, or is: bytes of its source, and of a page."""

    idstr: str
    used_length: int
    page_size: int

    @property
    def page_count(self) -> int:
        return -(-self.used_length // self.page_size)


@dataclass
class Runs:
    """Runs in order, as columns: a tuple for each of a million takes ten times as much memory."""

    block: array[int] = field(default_factory=lambda: array("H"))
    page: array[int] = field(default_factory=lambda: array("Q"))
    count: array[int] = field(default_factory=lambda: array("Q"))

    @classmethod
    def of(cls, runs: Iterable[Run]) -> Runs:
        made = cls()
        for run in runs:
            made.append(*run)
        return made

    def append(self, block: int, page: int, count: int) -> None:
        self.block.append(block)
        self.page.append(page)
        self.count.append(count)

    def __iter__(self) -> Iterator[Run]:
        return zip(self.block, self.page, self.count, strict=True)

    def __len__(self) -> int:
        return len(self.page)


@dataclass(frozen=True)
class WorkingSet:
    """What a file says. The runs' blocks are places in the table."""

    blocks: tuple[SetBlock, ...]
    runs: Runs


# -- packing


def _put_varint(column: bytearray, value: int) -> None:
    while value > 127:
        column.append(value & 127 | 128)
        value >>= 7
    column.append(value)


class Packer:
    """Packs a set that grows: what was added is not looked at again. The runs' blocks are places in the table."""

    def __init__(self, blocks: Sequence[SetBlock]) -> None:
        self._table = bytearray()
        _put_varint(self._table, len(blocks))
        for block in blocks:
            idstr = block.idstr.encode()
            _put_varint(self._table, len(idstr))
            self._table += idstr
            _put_varint(self._table, block.used_length)
            _put_varint(self._table, block.page_size)
        self._columns = (bytearray(), bytearray(), bytearray())
        self._ends = [0] * len(blocks)  # of the last run of each
        self._n_runs = 0

    def add(self, runs: Iterable[Run]) -> None:
        self._n_runs += _put_runs(self._columns, self._ends, runs)

    def packed(self, tail: Iterable[Run] = ()) -> bytes:
        """The file of what was added, and of a tail that may look different next time."""
        tails = (bytearray(), bytearray(), bytearray())
        body = bytearray(self._table)
        _put_varint(body, self._n_runs + _put_runs(tails, list(self._ends), tail))
        for column, more in zip(self._columns, tails, strict=True):
            _put_varint(body, len(column) + len(more))
        for column, more in zip(self._columns, tails, strict=True):
            body += column + more
        packed = zlib.compress(body)
        return _HEAD.pack(MAGIC, VERSION, len(packed)) + packed


def _put_runs(columns: tuple[bytearray, bytearray, bytearray], ends: list[int], runs: Iterable[Run]) -> int:
    """Behind what the columns hold: the block; how far the run begins from where the block's last one ended, with the
    sign in the lowest bit; the count, less one. How many there were."""
    blocks, pages, counts = columns
    n_runs = 0
    for block, page, count in runs:
        away = page - ends[block]
        ends[block] = page + count
        _put_varint(blocks, block)
        _put_varint(pages, away << 1 if away >= 0 else (-away << 1) - 1)
        _put_varint(counts, count - 1)
        n_runs += 1
    return n_runs


def pack(working_set: WorkingSet) -> bytes:
    packer = Packer(working_set.blocks)
    packer.add(working_set.runs)
    return packer.packed()


# -- parsing


class _Body:
    """The bytes that are unpacked, read from the front."""

    def __init__(self, content: bytes) -> None:
        self._content, self._at = content, 0

    def take(self, length: int) -> bytes:
        taken = self._content[self._at : self._at + length]
        if len(taken) < length:
            raise WorkingSetError("it ends in the middle")
        self._at += length
        return taken

    def varint(self, what: str, least: int, most: int) -> int:
        value = shift = 0
        while True:
            byte = self.take(1)[0]
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
            if shift >= 7 * VARINT_BYTES_MAX:
                raise WorkingSetError(f"{what} is no number")
        if not least <= value <= most:
            raise WorkingSetError(f"{what} is {value}, and can be {least} to {most}")
        return value

    def check_end(self) -> None:
        if self._at != len(self._content):
            raise WorkingSetError("something follows its runs")


def parse(content: bytes) -> WorkingSet:
    """The set that a file holds. WorkingSetError says what is wrong with it."""
    body = _Body(_unpacked(content))
    blocks = tuple(_block(body) for _ in range(body.varint("the number of blocks", 0, BLOCKS_MAX)))
    if len({block.idstr for block in blocks}) < len(blocks):
        raise WorkingSetError("two of its blocks have the same name")
    n_runs = body.varint("the number of runs", 0, RUNS_MAX)
    lengths = [body.varint("the length of a column", n_runs, n_runs * VARINT_BYTES_MAX) for _ in range(3)]
    columns = [_column(body.take(length), n_runs) for length in lengths]
    body.check_end()
    return WorkingSet(blocks, _runs(blocks, *columns))


def _unpacked(content: bytes) -> bytes:
    if len(content) < _HEAD.size or not content.startswith(MAGIC):
        raise WorkingSetError("it is no working set" if content else "it is empty")
    _, version, length = _HEAD.unpack_from(content)
    if version != VERSION:
        raise WorkingSetError(f"it is a working set of version {version}, this pcshare reads version {VERSION}")
    if len(content) != _HEAD.size + length:
        raise WorkingSetError(f"it should have {_HEAD.size + length} bytes and has {len(content)}")
    unpacker = zlib.decompressobj()
    try:
        body = unpacker.decompress(content[_HEAD.size :], BODY_BYTES_MAX)
    except zlib.error as error:
        raise WorkingSetError(f"it is damaged ({error})") from None
    if not unpacker.eof or unpacker.unused_data:
        raise WorkingSetError("it is damaged (its body does not end where it should)")
    return body


def _block(body: _Body) -> SetBlock:
    name = body.take(body.varint("the length of a block's name", 1, runtime.BLOCK_NAME_LENGTH_MAX))
    idstr = name.decode("ascii", "replace")
    if not runtime.is_block_name(idstr):
        raise WorkingSetError(f"{idstr!r} is no name of a block")
    used_length = body.varint(f"the length of block {idstr}", 0, LENGTH_MAX)
    page_size = body.varint(f"the page size of block {idstr}", PAGE_SIZE_MIN, PAGE_SIZE_MAX)
    if page_size & (page_size - 1):
        raise WorkingSetError(f"the page size of block {idstr} is {page_size}, which is no power of two")
    return SetBlock(idstr, used_length, page_size)


def _column(content: bytes, count: int) -> array[int] | bytes:
    """count numbers."""
    if len(content) == count and (not content or max(content) < 128):
        return content
    values = array("Q")
    value = shift = 0
    for byte in content:
        value |= (byte & 127) << shift
        if byte > 127:
            shift += 7
            if shift >= 7 * VARINT_BYTES_MAX:
                raise WorkingSetError("a column holds what is no number")
        else:
            values.append(value)
            value = shift = 0
    if shift or len(values) != count:
        raise WorkingSetError("a column holds more or fewer numbers than there are runs")
    return values


def _runs(blocks: Sequence[SetBlock], places: Iterable[int], aways: Iterable[int], counts: Iterable[int]) -> Runs:
    page_counts = [block.page_count for block in blocks]
    left, ends, runs = list(page_counts), [0] * len(blocks), Runs()
    for place, away, less in zip(places, aways, counts, strict=True):
        if place >= len(blocks):
            raise WorkingSetError(f"a run is of block {place}, and there are {len(blocks)}")
        page = ends[place] + (away >> 1 ^ -(away & 1))
        ends[place] = end = page + less + 1
        if page < 0 or end > page_counts[place] or less >= RUN_PAGES_MAX:
            raise WorkingSetError(f"block {blocks[place].idstr} has no pages {page} to {end - 1}")
        left[place] -= less + 1
        if left[place] < 0:
            raise WorkingSetError(f"it lists more pages of block {blocks[place].idstr} than there are")
        runs.append(place, page, less + 1)
    return runs


# -- what is served today


def fit(working_set: WorkingSet, served: Mapping[int, SetBlock]) -> tuple[Runs, list[str]]:
    """The runs in pages of the blocks that are served, by index, and what a user should know. Other page sizes are
    converted; pages beyond the end of a source that is smaller today are left out."""
    by_name = {block.idstr: (index, block) for index, block in served.items()}
    remarks: list[str] = []
    ways: list[tuple[int, SetBlock, int] | None] = []
    for block in working_set.blocks:
        if block.idstr not in by_name:
            remarks.append(f"block {block.idstr} is not served, and what is said of it is ignored")
            ways.append(None)
            continue
        index, now = by_name[block.idstr]
        ways.append((index, now, block.page_size))
        if now.used_length != block.used_length:
            remarks.append(
                f"the source of block {block.idstr} had {block.used_length} bytes and has {now.used_length}: the pages "
                f"that there still are may hold something else"
            )
    page_counts = {index: block.page_count for index, block in served.items()}
    runs, before = Runs(), None
    for place, page, count in working_set.runs:
        way = ways[place]
        if way is None:
            continue
        index, now, page_size = way
        end = page + count
        if page_size != now.page_size:
            page, end = page * page_size // now.page_size, -(-end * page_size // now.page_size)
        end = min(end, page_counts[index], page + RUN_PAGES_MAX)
        run = index, page, end - page
        if page < end and run != before:
            runs.append(*run)
            before = run
    return runs, remarks


@dataclass(frozen=True)
class Plan:
    """What is to be asked for, in order. n_pages: those that were recorded; what lies between them comes beside."""

    n_pages: int
    runs: list[Run]


def plan(runs: Runs, piece_pages: Mapping[int, int]) -> Plan:
    """The order of the first touches, with neighbours in one request: runs that lie close together become one, which
    takes the place of the earliest of them. piece_pages: the most that one request is for, by block index."""
    joined, n_pages = _joined(runs, piece_pages)
    return Plan(n_pages, [(block, page, end - page) for _, block, page, end in sorted(joined)])


def _joined(runs: Runs, piece_pages: Mapping[int, int]) -> tuple[list[tuple[int, int, int, int]], int]:
    """(which in order, block, first page, end) of each, by block and page; and how many pages the runs name."""
    by_block: dict[int, list[int]] = {}  # a number for each run: sorting a million tuples takes seconds
    for place, (block, page) in enumerate(zip(runs.block, runs.page, strict=True)):
        by_block.setdefault(block, []).append(page << PLACE_BITS | place)
    joined: list[tuple[int, int, int, int]] = []
    n_pages = 0
    for block, keys in by_block.items():
        most, gap = piece_pages[block], piece_pages[block] // GAP_PART
        keys.sort()
        first, start = keys[0] & PLACE_MASK, keys[0] >> PLACE_BITS
        end = start
        for key in keys:
            page, place = key >> PLACE_BITS, key & PLACE_MASK
            until = page + runs.count[place]
            n_pages += max(0, until - max(page, end))
            if until > end and (page > end + gap or until - start > most) and end > start:
                joined.append((first, block, start, end))
                first, start = place, max(page, end)
            first, end = min(first, place), max(end, until)
        joined.append((first, block, start, end))
    return joined, n_pages


# -- files


def read(path: str) -> WorkingSet:
    """WorkingSetError names the file, what is wrong and the cure; FileNotFoundError: it is not there."""
    try:
        content = _content(path)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise WorkingSetError(
            f"cannot read the working set {path}: {error.strerror}", errno=error.errno, hint="name a file you may read"
        ) from None
    try:
        if len(content) > FILE_BYTES_MAX:
            raise WorkingSetError(f"it has more than {FILE_BYTES_MAX} bytes")
        return parse(content)
    except WorkingSetError as error:
        raise WorkingSetError(f"cannot use {path} as a working set: {error.message}", hint=CURE) from None


def _content(path: str) -> bytes:
    """Of a regular file, and no more than one byte too many: a pipe is not waited for."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise WorkingSetError(f"{path} is no file", hint="name the file of a working set")
        with open(fd, "rb", closefd=False) as file:
            return file.read(FILE_BYTES_MAX + 1)
    finally:
        os.close(fd)


def check_target(path: str) -> None:
    """Before anything is served: whether a set can be written there. Nothing else is ever overwritten."""
    target = Path(path).absolute()
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise UsageError(f"--record {path}: no file can be made there", hint="name a file in a directory you may write")
    try:
        found = target.lstat()
    except OSError:
        return
    if not stat.S_ISREG(found.st_mode):
        what = "a symbolic link" if stat.S_ISLNK(found.st_mode) else "no file"
        raise UsageError(f"--record {path}: that is {what}", hint="name the file itself")
    if found.st_size and not _begins_like_one(target):
        raise WorkingSetError(
            f"{path} is no working set: it is not overwritten", hint="name another file, or remove it"
        )


def _begins_like_one(path: Path) -> bool:
    with contextlib.suppress(OSError), path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC
    return False


def write(path: str, content: bytes, writer: str) -> None:
    """In the place of what was there, whole or not at all. writer: a name that no other writer on this host has.
    WorkingSetError: it is as it was."""
    target = Path(path).absolute()
    unfinished = target.with_name(f".{target.name}.{writer}")
    try:
        unfinished.unlink(missing_ok=True)  # of one that was killed
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        with open(os.open(unfinished, flags, FILE_MODE), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(target)
    except OSError as error:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise WorkingSetError(
            f"cannot write the working set {path}: {error.strerror}", errno=error.errno, hint="see to its directory"
        ) from None
