"""Incoming migration at the core's level: records stored and placed, requests on the return path, every refusal.

The source is the test itself: it writes records into a socket and reads what is asked. Whoever waits for a page is a
child process.
"""

from __future__ import annotations

import errno
import os
import random
import select
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from core_support import child, compile_c
from pcshare.core import ffi, lib
from pcshare.errors import MigrationError, PcshareError, SourceError
from pcshare.fault_thread import EventKind
from pcshare.fds import OwnedFd
from pcshare.incoming import (
    FOREVER,
    Incoming,
    IncomingStream,
    RecordsEnd,
    StreamLost,
    StreamStopped,
    StreamTimeout,
    UnmappedBlock,
    Why,
)
from pcshare.ramblock import DeferredMemory, RAMBlock
from support import IN_CI, wait_until
from support_migration_bytes import END_OF_PAYLOAD, RAM_ID, footer, name, record
from support_rig import Rig
from support_serving import HUGE_PAGE, PAGE, WAIT_S, read_own_page

N_PAGES = 64
LENGTH = N_PAGES * PAGE
PART, END = 2, 3
REQ_PAGES_ID, REQ_PAGES, RECV_BITMAP = 3, 4, 5
BITMAP_END = 0x0123456789ABCDEF
BREAKS = 20
MUTATED_RECORDS = 20_000  # a million takes minutes: tests/c/incoming_fuzz.c says how
FUZZED_FILES = [
    "incoming.c", "incoming_stream.c", "incoming_record.c", "incoming_request.c", "incoming_path.c", "bitmap.c",
    "page_channel.c", "thread.c",
]  # fmt: skip
THREAD_ID = lib.UFFD_FEATURE_BIT_THREAD_ID


# ---- a source ----


@contextmanager
def running(call: Callable[[], Any]) -> Iterator[Future[Any]]:
    """In a thread of its own, which has ended when the block has."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(call)


class Source:
    """One connection of a migration: the test has the source's end."""

    def __init__(self, incoming: Incoming) -> None:
        ours, self.socket = socket.socketpair()
        self.socket.settimeout(WAIT_S)
        self.stream = IncomingStream(incoming, OwnedFd(ours.detach()))

    def send(self, *parts: bytes) -> None:
        self.socket.sendall(b"".join(parts))

    def records(self, *parts: bytes) -> RecordsEnd:
        """Sends records and the end of a payload, and has them read."""
        with running(lambda: self.send(*parts, END_OF_PAYLOAD)):
            return self.stream.records()

    def hang_up(self) -> None:
        self.socket.shutdown(socket.SHUT_WR)

    def receive(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            more = self.socket.recv(length - len(data))
            assert more, "the return path ended"
            data += more
        return data

    def message(self) -> tuple[int, bytes]:
        """The next on the return path: type, payload."""
        kind, length = struct.unpack(">HH", self.receive(4))
        return kind, self.receive(length)

    def request(self) -> tuple[int, int, str]:
        """The next request for pages: start, length, the block's name or none."""
        kind, payload = self.message()
        start, length = struct.unpack_from(">QI", payload)
        assert kind == (REQ_PAGES_ID if len(payload) > 12 else REQ_PAGES)
        assert len(payload) == 12 or payload[12] == len(payload) - 13
        return start, length, payload[13:].decode()

    def is_silent(self) -> bool:
        return not select.select([self.socket], [], [], 0)[0]

    def close(self) -> None:
        self.stream.close()
        self.socket.close()


def page_of(content: bytes, page: int) -> bytes:
    return content[page * PAGE : (page + 1) * PAGE]


def all_records(content: bytes, idstr: str = "pc.ram", pages: range = range(N_PAGES)) -> bytes:
    return b"".join(record(i * PAGE, page_of(content, i), idstr if i == pages[0] else None) for i in pages)


@pytest.fixture
def content(rng: random.Random) -> bytes:
    return rng.randbytes(LENGTH)


# ---- before LISTEN: memory that nobody else has ----


@dataclass
class Stored:
    """A migration before LISTEN; its blocks are plain memfds."""

    incoming: Incoming = field(default_factory=lambda: Incoming(PAGE))
    memfds: list[int] = field(default_factory=list)
    sources: list[Source] = field(default_factory=list)

    def add_block(self, idstr: str = "pc.ram", length: int = LENGTH, page_size: int = PAGE) -> int:
        self.memfds.append(os.memfd_create(idstr[:200], os.MFD_CLOEXEC))
        os.ftruncate(self.memfds[-1], length)
        return self.incoming.add_block(idstr, used_length=length, page_size=page_size, memfd=self.memfds[-1])

    def connect(self) -> Source:
        self.sources.append(Source(self.incoming))
        return self.sources[-1]

    def memory(self, index: int = 0) -> bytes:
        return os.pread(self.memfds[index], os.fstat(self.memfds[index]).st_size, 0)

    def present_pages(self, index: int = 0) -> int:
        return os.fstat(self.memfds[index]).st_blocks * 512 // PAGE

    def unmap(self, index: int = 0, n_pages: int = N_PAGES) -> tuple[list[int], UnmappedBlock]:
        """Received host pages, and what is no hole."""
        received = ffi.new("uint64_t[]", n_pages // 64 + 1)
        unmapped = self.incoming.unmap_block(index, received)
        return [page for page in range(n_pages) if lib.bitmap_test(received, page)], unmapped

    def close(self) -> None:
        for source in self.sources:
            source.close()
        self.incoming.close()
        for memfd in self.memfds:
            os.close(memfd)


@pytest.fixture
def stored() -> Iterator[Stored]:
    made = Stored()
    yield made
    made.close()


def test_precopy_pages_are_stored_where_they_belong(stored: Stored, content: bytes) -> None:
    stored.add_block()
    stored.add_block("rom", 2 * PAGE)
    source = stored.connect()
    end = source.records(all_records(content), record(PAGE, content[:PAGE], "rom"))
    assert (end.why, end.saw_end, end.offset) == (Why.END_OF_PAYLOAD, False, source.stream.offset)
    assert stored.memory() == content
    assert stored.memory(1) == bytes(PAGE) + content[:PAGE]
    assert stored.incoming.progress(0) == (N_PAGES, N_PAGES)
    assert stored.incoming.progress(1) == (2, 1)


def test_last_copy_of_a_page_counts_and_a_zero_one_frees_its_memory(stored: Stored, content: bytes) -> None:
    stored.add_block()
    source = stored.connect()
    first, second = content[:PAGE], content[PAGE : 2 * PAGE]
    source.records(record(0, first, "pc.ram"), record(0, second, None))
    assert stored.memory()[:PAGE] == second
    assert stored.present_pages() == 1
    source.records(record(0, b"", None, fill=0))
    assert stored.memory()[:PAGE] == bytes(PAGE)
    assert stored.present_pages() == 0
    source.records(record(0, b"", None, fill=0xAA))
    assert stored.memory()[:PAGE] == b"\xaa" * PAGE
    counters = source.stream.counters()
    assert (counters.data_pages, counters.zero_pages, counters.fill_pages) == (2, 1, 1)


def test_zero_pages_take_no_memory(stored: Stored) -> None:
    stored.add_block(length=1 << 30)
    pages = range(0, 1 << 18, 64)
    stored.connect().records(*(record(i * PAGE, b"", "pc.ram" if i == 0 else None, fill=0) for i in pages))
    assert stored.present_pages() == 0
    assert stored.incoming.progress(0) == (1 << 18, len(pages))


def test_continue_means_the_block_of_the_last_record_also_over_the_end_of_a_section(
    stored: Stored, content: bytes
) -> None:
    stored.add_block()
    source = stored.connect()
    source.records(record(0, page_of(content, 0), "pc.ram"))
    source.records(record(PAGE, page_of(content, 1), None))
    assert stored.memory()[: 2 * PAGE] == content[: 2 * PAGE]


@pytest.mark.parametrize("piece", [1, 7, PAGE - 1, 70_000])
def test_bytes_may_come_in_any_pieces(stored: Stored, content: bytes, piece: int) -> None:
    stored.add_block()
    source = stored.connect()
    pages = range(N_PAGES if piece > 7 else 2)
    data = all_records(content, pages=pages) + END_OF_PAYLOAD
    with running(source.stream.records) as reading:
        for start in range(0, len(data), piece):
            source.send(data[start : start + piece])
        assert reading.result(WAIT_S).why is Why.END_OF_PAYLOAD
    assert stored.memory()[: len(pages) * PAGE] == content[: len(pages) * PAGE]


def test_discard_forgets_memory_and_bits(stored: Stored, content: bytes) -> None:
    """B3."""
    stored.add_block()
    stored.connect().records(all_records(content))
    stored.incoming.discard("pc.ram", PAGE, 3 * PAGE)
    assert stored.memory() == content[:PAGE] + bytes(3 * PAGE) + content[4 * PAGE :]
    assert stored.incoming.progress(0) == (N_PAGES, N_PAGES - 3)
    received, unmapped = stored.unmap()
    assert received == [0, *range(4, N_PAGES)]
    assert unmapped.ranges() == [(0, LENGTH)]


@pytest.mark.parametrize(
    ("idstr", "start", "length", "words"),
    [
        ("nobody", 0, PAGE, "not announced"),
        ("pc.ram", LENGTH, PAGE, "beyond its end"),
        ("pc.ram", (1 << 64) - PAGE, 2 * PAGE, "beyond its end"),
        ("pc.ram", 0, LENGTH + PAGE, "beyond its end"),
        ("pc.ram", 0, 0, "whole pages"),
        ("pc.ram", 512, PAGE, "whole pages"),
        ("pc.ram", 0, 100, "whole pages"),
        ("huge", PAGE, 4 * PAGE, "whole pages"),
    ],
)
def test_discard_that_cannot_be_is_refused(stored: Stored, idstr: str, start: int, length: int, words: str) -> None:
    stored.add_block()
    stored.add_block("huge", LENGTH, 4 * PAGE)
    with pytest.raises(MigrationError, match=f"of block {idstr}: .*{words}"):
        stored.incoming.discard(idstr, start, length)


def test_after_listen_nothing_is_discarded_any_more(stored: Stored) -> None:
    stored.add_block()
    stored.unmap()
    with pytest.raises(MigrationError, match="after LISTEN"):
        stored.incoming.discard("pc.ram", 0, PAGE)
    with pytest.raises(PcshareError) as caught:
        stored.unmap()
    assert caught.value.errno == errno.EBUSY


def test_listen_sorts_pages_into_received_holes_and_missing(stored: Stored, content: bytes) -> None:
    stored.add_block()
    source = stored.connect()
    source.records(
        record(0, content[:PAGE], "pc.ram"),
        *(record(i * PAGE, b"", None, fill=0) for i in (2, 3, 9, 63)),
        record(9 * PAGE, content[:PAGE], None),  # no hole any more
    )
    received, unmapped = stored.unmap()
    assert received == [0, 9]
    assert unmapped.ranges() == [(0, 2 * PAGE), (4 * PAGE, 63 * PAGE)]


def test_host_page_of_which_only_a_part_came_counts_as_missing(stored: Stored, content: bytes) -> None:
    stored.add_block(page_size=4 * PAGE)
    source = stored.connect()
    whole = [record(i * PAGE, page_of(content, i), "pc.ram") for i in range(4)]
    zeros = [record(i * PAGE, b"", None, fill=0) for i in range(4, 8)]
    mixed = [record(8 * PAGE, b"", None, fill=0), *(record(i * PAGE, page_of(content, i), None) for i in range(9, 12))]
    source.records(*whole, *zeros, *mixed, record(12 * PAGE, page_of(content, 12), None))
    received, unmapped = stored.unmap(n_pages=N_PAGES // 4)
    assert received == [0, 2]
    assert unmapped.ranges() == [(0, 4 * PAGE), (8 * PAGE, LENGTH)]
    expected = [content[: 4 * PAGE], bytes(5 * PAGE), content[9 * PAGE : 12 * PAGE], bytes(4 * PAGE)]
    assert stored.memory()[: 16 * PAGE] == b"".join(expected)
    assert stored.incoming.progress(0) == (N_PAGES, 12)


@pytest.mark.parametrize("size", [0, 512, 3000, 1 << 20])
def test_target_page_that_is_no_page_or_larger_than_the_hosts_is_refused(size: int) -> None:
    """A3: with both numbers."""
    with pytest.raises(SourceError, match=rf"{size} bytes, this host's {PAGE}"):
        Incoming(size)


@pytest.mark.parametrize(
    ("length", "page_size"), [(LENGTH + 1, PAGE), (0, PAGE), (LENGTH, 3000), (LENGTH, 1024), (1 << 23, 1 << 22)]
)
def test_block_of_a_size_that_cannot_be_is_refused(stored: Stored, length: int, page_size: int) -> None:
    """A4: names block, length and page size."""
    with pytest.raises(MigrationError, match=f"block pc.ram: length {length}, page size {page_size}"):
        stored.add_block("pc.ram", length, page_size)


def test_block_is_announced_once(stored: Stored) -> None:
    stored.add_block()
    with pytest.raises(MigrationError, match="announced before"):
        stored.add_block()


def test_memory_that_is_shorter_than_its_block_is_never_mapped(stored: Stored) -> None:
    with pytest.raises(MigrationError), open("/dev/zero", "rb") as other:
        stored.incoming.add_block("pc.ram", used_length=LENGTH, page_size=PAGE, memfd=other.fileno())


# ---- refusals ----

NAMED = struct.pack(">Q", 8) + name("pc.ram")
REFUSALS: dict[str, tuple[bytes, int, str]] = {
    "no block": (record(0, bytes(PAGE), None), errno.EPROTO, "names no block"),
    "unknown block": (record(0, bytes(PAGE), "nobody"), errno.EPROTO, "block nobody, which was not announced"),
    "part of a name": (record(0, bytes(PAGE), "pc.ra"), errno.EPROTO, "block pc.ra, which"),
    "unprintable name": (record(0, bytes(PAGE), "\x1b[2J"), errno.EPROTO, "block [?]\\[2J, which"),
    "empty name": (struct.pack(">QB", 8, 0), errno.EPROTO, "empty block name"),
    "beyond the block": (record(LENGTH, bytes(PAGE), "pc.ram"), errno.EPROTO, f"offset {LENGTH}: the block has"),
    "far beyond": (record((1 << 64) - PAGE, bytes(PAGE), "pc.ram"), errno.EPROTO, "the block has"),
    "no flags": (struct.pack(">Q", 0), errno.EPROTO, "flags 0"),
    "zero and page": (struct.pack(">Q", 0x0A), errno.EPROTO, "flags 0xa"),
    "obsolete": (struct.pack(">Q", 1), errno.EPROTO, "flags 0x1"),
    "unaligned": (struct.pack(">Q", 0x808), errno.EPROTO, "flags 0x808"),
    "end and continue": (struct.pack(">Q", 0x30), errno.EPROTO, "flags 0x30"),
    "end with an offset": (struct.pack(">Q", 0x1010), errno.EPROTO, "names an offset"),
    "blocks": (struct.pack(">Q", LENGTH | 4), errno.EPROTO, "list of blocks"),
    "xbzrle": (struct.pack(">Q", 0x40) + name("pc.ram"), errno.EPROTONOSUPPORT, "capability xbzrle off"),
    "rdma": (struct.pack(">Q", 0x80), errno.EPROTONOSUPPORT, "RDMA"),
    "compress": (struct.pack(">Q", 0x120), errno.EPROTONOSUPPORT, "capability compress off"),
    "multifd": (struct.pack(">Q", 0x200), errno.EPROTONOSUPPORT, "capability multifd off"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_illegal_record_is_told_with_its_place_and_what_came_before_is_kept(
    stored: Stored, content: bytes, case: str
) -> None:
    illegal, error, words = REFUSALS[case]
    stored.add_block()
    source = stored.connect()
    before = b"" if case == "no block" else record(0, content[:PAGE], "pc.ram")
    source.send(before, illegal)
    with pytest.raises(MigrationError, match=words) as caught:
        source.stream.records()
    assert (caught.value.errno, caught.value.offset) == (error, len(before))
    assert str(caught.value).startswith(f"at byte {len(before)} of the stream: ")
    assert stored.memory()[:PAGE] == (content[:PAGE] if before else bytes(PAGE))


def test_connection_that_breaks_at_any_byte_is_lost_and_whole_pages_are_kept(stored: Stored, content: bytes) -> None:
    stored.add_block()
    data = all_records(content, pages=range(2)) + END_OF_PAYLOAD
    for length in (*range(1, 20), 4110, 4111, 4112, 4118, 4119, 4126, 8200, len(data) - 1):
        source = stored.connect()
        source.send(data[:length])
        source.hang_up()
        if data[:length] in (data[:4111], data[: len(data) - 8]):  # between two records
            assert source.stream.records().why is Why.EOF
        else:
            with pytest.raises(StreamLost, match=r"closed the connection"):
                source.stream.records()
        source.close()
    assert stored.memory()[: 2 * PAGE] == content[: 2 * PAGE]


# ---- bytes that are no records ----


def test_bytes_between_records_are_handed_out_as_they_are(stored: Stored, content: bytes) -> None:
    stored.add_block()
    source = stored.connect()
    blob = content * 4
    with running(lambda: source.send(b"head", all_records(content), END_OF_PAYLOAD, blob, b"tail")):
        assert source.stream.read(4) == b"head"
        assert source.stream.records().offset == source.stream.offset == 4 + N_PAGES * (8 + PAGE) + 7 + 8
        assert source.stream.read(len(blob)) == blob
    assert source.stream.read_some(100) == b"tail"
    source.hang_up()
    assert source.stream.read_some(100) == b""
    with pytest.raises(StreamLost, match="byte"):
        source.stream.read(1)


def test_silence_ends_a_read_that_has_a_time_limit(stored: Stored) -> None:
    source = stored.connect()
    with pytest.raises(StreamTimeout, match=r"silent for 0\.01 s"):
        source.stream.read_some(1, 0.01)
    source.send(b"ab")
    assert source.stream.read_some(1, 0.01) == b"a"
    with pytest.raises(StreamTimeout):
        source.stream.read(2, 0.01)


def test_stop_ends_a_reader_for_good(stored: Stored) -> None:
    source = stored.connect()
    with running(source.stream.records) as reading:
        source.stream.stop()
        with pytest.raises(StreamStopped):
            reading.result(WAIT_S)
    for call in (source.stream.records, lambda: source.stream.read(1), lambda: source.stream.read_some(1)):
        with pytest.raises(StreamStopped):
            call()
    source.close()
    source.stream.stop()


# ---- after LISTEN: placed through the fault threads ----


class Placed:
    """A migration whose blocks are served by real fault threads."""

    def __init__(self) -> None:
        self.rig = Rig(f"incoming-{os.getpid()}")
        self.incoming = Incoming(PAGE)
        self.memories: list[DeferredMemory] = []
        self.channels: list[Any] = []
        self.sources: list[Source] = []

    def announce(self, idstr: str, n_pages: int, page_size: int = PAGE) -> int:
        length = n_pages * page_size
        memory = DeferredMemory(self.rig.keeper, idstr, map_length=length, page_size=page_size, writable=False)
        self.memories.append(memory)
        return self.incoming.add_block(idstr, used_length=length, page_size=page_size, memfd=memory.fileno())

    def listen(self, index: int, idstr: str, n_pages: int, page_size: int = PAGE) -> RAMBlock:
        region = self.rig.segment.add_bitmap(n_pages, [(0, n_pages)])
        unmapped = self.incoming.unmap_block(index, region.address)
        status = self.rig.segment.block_slot(index)
        status.bitmap_offset = region.offset
        ram = RAMBlock(
            self.rig.keeper, idstr, used_length=n_pages * page_size, page_size=page_size, writable=False,
            extents=unmapped.ranges(), index=index, status=status, received=region.address,
            memory=self.memories[index],
        )  # fmt: skip
        self.channels.append(self.incoming.page_channel(index))
        self.rig.threads.add_block(ram, self.channels[-1], poison=False)
        self.rig.blocks[index] = ram
        self.incoming.listen_block(index, self.rig.threads, index)
        return ram

    def add_block(self, idstr: str = "pc.ram", n_pages: int = N_PAGES, page_size: int = PAGE) -> RAMBlock:
        """Announced, and listened on with nothing in it."""
        return self.listen(self.announce(idstr, n_pages, page_size), idstr, n_pages, page_size)

    def connect(self, *, answers: bool = True) -> Source:
        source = Source(self.incoming)
        self.sources.append(source)
        if answers:
            self.incoming.set_return_path(source.stream)
        return source

    def close(self) -> None:
        for source in self.sources:
            source.close()
        for memory in self.memories:  # those that were never listened on
            memory.free()
        self.rig.close()
        self.incoming.close()


@pytest.fixture
def placed() -> Iterator[Placed]:
    made = Placed()
    yield made
    made.close()


@contextmanager
def helper(placed: Placed, ram: RAMBlock) -> Iterator[Any]:
    """A child that has the block and is served."""
    with child(ram.helper_memfd(writing=False), ram.map_length, ram.page_size, THREAD_ID) as made:
        number, control = placed.rig.add_remote(ram, made)
        try:
            yield made
        finally:
            placed.rig.threads.remove_remote(number)
            control.close()


def test_pages_that_nobody_waits_for_are_placed_in_runs(placed: Placed, content: bytes) -> None:
    placed.rig.threads.start([-1])
    ram = placed.add_block()
    source = placed.connect()
    source.records(all_records(content))
    assert [read_own_page(ram, i) for i in range(N_PAGES)] == [page_of(content, i) for i in range(N_PAGES)]
    counters = source.stream.counters()
    assert counters.data_pages == N_PAGES
    assert counters.places < N_PAGES // 2
    assert placed.rig.wait_for_event(EventKind.BLOCK_COMPLETE).block_index == 0
    assert source.is_silent()


def test_zero_and_fill_pages_are_placed_as_what_they_are(placed: Placed, content: bytes) -> None:
    """E2."""
    placed.rig.threads.start([-1])
    ram = placed.add_block()
    zeros = [record(i * PAGE, b"", "pc.ram" if i == 0 else None, fill=0) for i in range(32)]
    fill = record(32 * PAGE, b"", None, fill=7)
    placed.connect().records(*zeros, fill, *(record(i * PAGE, page_of(content, i), None) for i in range(33, 64)))
    assert read_own_page(ram, 0) == read_own_page(ram, 31) == bytes(PAGE)
    assert read_own_page(ram, 32) == b"\x07" * PAGE
    assert read_own_page(ram, 63) == page_of(content, 63)


def test_what_came_before_listen_is_kept_and_only_the_rest_is_placed(placed: Placed, content: bytes) -> None:
    placed.rig.threads.start([-1])
    index = placed.announce("pc.ram", N_PAGES)
    source = placed.connect()
    source.records(all_records(content))
    source.records(record(0, bytes(PAGE), None, fill=0))
    placed.incoming.discard("pc.ram", 8 * PAGE, 8 * PAGE)
    ram = placed.listen(index, "pc.ram", N_PAGES)
    assert [ram.is_received(page) for page in (1, 8, 15, 16)] == [True, False, False, True]
    fresh = [record(i * PAGE, page_of(content, N_PAGES - i), None) for i in range(8, 16)]
    source.records(*fresh)
    assert read_own_page(ram, 0) == bytes(PAGE)
    assert read_own_page(ram, 7) == page_of(content, 7)
    assert read_own_page(ram, 8) == page_of(content, N_PAGES - 8)
    assert placed.rig.wait_for_event(EventKind.BLOCK_COMPLETE).block_index == 0


def test_page_that_was_received_is_left_alone_when_it_comes_again(placed: Placed, content: bytes) -> None:
    """P2."""
    placed.rig.threads.start([-1])
    ram = placed.add_block()
    source = placed.connect()
    source.records(record(0, page_of(content, 0), "pc.ram"))
    source.records(record(0, page_of(content, 1), None))
    assert read_own_page(ram, 0) == page_of(content, 0)
    assert source.stream.counters().repeat_pages == 1


def test_zero_page_that_came_before_listen_is_left_alone_too(placed: Placed, content: bytes) -> None:
    """P1: it is received, as the source was told, whether somebody has looked at it or not."""
    placed.rig.threads.start([-1])
    index = placed.announce("pc.ram", N_PAGES)
    source = placed.connect()
    source.records(*(record(i * PAGE, b"", None if i else "pc.ram", fill=0) for i in range(4)))
    ram = placed.listen(index, "pc.ram", N_PAGES)
    source.records(*(record(i * PAGE, page_of(content, i), None) for i in range(6)))
    assert [read_own_page(ram, i) for i in range(4)] == [bytes(PAGE)] * 4
    assert [read_own_page(ram, i) for i in (4, 5)] == [page_of(content, i) for i in (4, 5)]
    assert source.stream.counters().repeat_pages == 4


def test_page_that_comes_again_after_its_block_has_ended_is_no_loss(placed: Placed, content: bytes) -> None:
    """The fault threads are gone by then."""
    placed.rig.threads.start([-1])
    placed.add_block()
    source = placed.connect()
    source.records(all_records(content))
    assert placed.rig.wait_for_event(EventKind.BLOCK_COMPLETE).block_index == 0
    placed.rig.threads.stop()
    assert source.records(all_records(content)).why is Why.END_OF_PAYLOAD
    assert source.stream.counters().repeat_pages == N_PAGES


def test_fault_is_asked_for_by_name_and_woken_when_its_page_comes(placed: Placed, content: bytes) -> None:
    placed.rig.threads.start([-1])
    ram = placed.add_block()
    source = placed.connect()
    with helper(placed, ram) as made, running(source.stream.records) as reading:
        made.tell(f"touch {5 * PAGE}")
        assert source.request() == (5 * PAGE, PAGE, "pc.ram")
        assert placed.incoming.outstanding() == 1
        source.send(record(5 * PAGE, page_of(content, 5), "pc.ram"))  # and nothing behind it: it may not be kept back
        assert made.answer() == page_of(content, 5)[:1]
        wait_until(lambda: placed.incoming.outstanding() == 0, "an answer to the request")
        source.send(END_OF_PAYLOAD)
        assert reading.result(WAIT_S).why is Why.END_OF_PAYLOAD
    status = placed.rig.segment.block_slot(0)
    assert (status.demand_pages, status.stream_pages) == (1, 0)


def test_name_is_sent_only_where_it_changes_and_a_page_is_asked_for_once(placed: Placed) -> None:
    """D2, D3: pages of several helpers, of one block and another."""
    placed.rig.threads.start([-1])
    ram, rom = placed.add_block(), placed.add_block("rom")
    source = placed.connect()
    with helper(placed, ram) as first, helper(placed, ram) as second, helper(placed, rom) as third:
        asked = []
        for made, page in ((first, 1), (third, 2), (second, 3)):
            made.tell(f"touch {page * PAGE}")
            asked.append(source.request())
        assert asked == [(PAGE, PAGE, "pc.ram"), (2 * PAGE, PAGE, "rom"), (3 * PAGE, PAGE, "pc.ram")]
        with helper(placed, ram) as fourth, helper(placed, ram) as fifth:
            fourth.tell(f"touch {3 * PAGE}")  # the second waits for it already
            fifth.tell(f"touch {4 * PAGE}")
            assert source.request() == (4 * PAGE, PAGE, "")
            source.records(*(record(i * PAGE, bytes(PAGE), "pc.ram", fill=i) for i in (1, 3, 4)))
            source.records(record(2 * PAGE, b"", "rom", fill=2))
            answers = [made.answer() for made in (first, second, third, fourth, fifth)]
        assert answers == [b"\1", b"\3", b"\2", b"\3", b"\4"]
        assert source.is_silent()


def test_outstanding_requests_are_asked_again_after_a_recovery(placed: Placed, content: bytes) -> None:
    """D3, G4: held until the recovery says so; then the oldest first, with its name."""
    placed.rig.threads.start([-1])
    ram = placed.add_block()
    source = placed.connect()
    with helper(placed, ram) as first, helper(placed, ram) as second:
        first.tell(f"touch {7 * PAGE}")
        assert source.request() == (7 * PAGE, PAGE, "pc.ram")
        source.send(record(0, content[:PAGE], "pc.ram"), record(7 * PAGE, page_of(content, 7), None)[:-1])
        source.hang_up()
        with pytest.raises(StreamLost):
            source.stream.records()
        source.close()
        second.tell(f"touch {9 * PAGE}")  # nobody to ask
        wait_until(lambda: placed.incoming.outstanding() == 2, "a second request")
        again = placed.connect()
        placed.incoming.send_bitmap("pc.ram")
        kind, payload = again.message()
        assert (kind, payload) == (RECV_BITMAP, name("pc.ram"))
        assert again.receive(24) == struct.pack(">Q", 8) + struct.pack("<Q", 1) + struct.pack(">Q", BITMAP_END)
        assert again.is_silent()
        placed.incoming.resend()
        assert [again.request(), again.request()] == [(7 * PAGE, PAGE, "pc.ram"), (9 * PAGE, PAGE, "")]
        again.records(record(7 * PAGE, page_of(content, 7), "pc.ram"), record(9 * PAGE, page_of(content, 9), None))
        assert (first.answer(), second.answer()) == (page_of(content, 7)[:1], page_of(content, 9)[:1])
    assert read_own_page(ram, 0) == content[:PAGE]


def test_bitmap_has_a_bit_for_each_target_page_in_whole_words(stored: Stored, content: bytes) -> None:
    stored.add_block(length=70 * PAGE)
    source = stored.connect()
    stored.incoming.set_return_path(source.stream)
    source.records(record(0, content[:PAGE], "pc.ram"), *(record(i * PAGE, b"", None, fill=0) for i in (9, 64, 69)))
    stored.incoming.send_bitmap("pc.ram")
    assert source.message() == (RECV_BITMAP, name("pc.ram"))
    size, low, high, end = struct.unpack("<8sQQ8s", source.receive(32))
    assert (size, end) == (struct.pack(">Q", 16), struct.pack(">Q", BITMAP_END))
    assert (low, high) == (1 << 0 | 1 << 9, 1 << 0 | 1 << 5)
    with pytest.raises(MigrationError, match="block nobody"):
        stored.incoming.send_bitmap("nobody")


def test_sections_of_ram_are_gone_through_until_something_else_begins(placed: Placed, content: bytes) -> None:
    """P9: no page waits for Python between two sections."""
    placed.rig.threads.start([-1])
    ram = placed.add_block()
    source = placed.connect()
    source.send(record(0, page_of(content, 0), "pc.ram"), END_OF_PAYLOAD, footer(RAM_ID))
    source.send(b"\2", struct.pack(">I", RAM_ID), record(PAGE, page_of(content, 1), None), END_OF_PAYLOAD)
    source.send(footer(RAM_ID), b"\x08")
    end = source.stream.records(PART, RAM_ID)
    assert (end.why, end.section_type, end.saw_end, end.offset) == (Why.SECTION, 8, False, source.stream.offset)
    source.send(END_OF_PAYLOAD, footer(RAM_ID), b"\3", struct.pack(">I", RAM_ID), END_OF_PAYLOAD, footer(RAM_ID), b"\0")
    end = source.stream.records(PART, RAM_ID)
    assert (end.why, end.section_type, end.saw_end) == (Why.SECTION, 0, True)
    assert read_own_page(ram, 1) == page_of(content, 1)
    assert source.stream.counters().sections == 4
    source.send(END_OF_PAYLOAD, footer(RAM_ID))
    source.hang_up()
    assert source.stream.records(END, RAM_ID).why is Why.EOF


@pytest.mark.parametrize(
    ("after", "words"),
    [(b"\x7e\0\0\0\x63", "footer of section 3 should be stands 0x7e, id 99"), (b"\2\0\0\0\3", "stands 0x2")],
)
def test_section_without_its_footer_is_refused(stored: Stored, after: bytes, words: str) -> None:
    source = stored.connect()
    source.send(END_OF_PAYLOAD, after)
    with pytest.raises(MigrationError, match=words):
        source.stream.records(PART, RAM_ID)


def test_section_of_somebody_else_is_left_to_the_caller(stored: Stored) -> None:
    source = stored.connect()
    source.send(END_OF_PAYLOAD, footer(RAM_ID), b"\2", struct.pack(">I", 99))
    assert source.stream.records(PART, RAM_ID).section_type == PART
    assert source.stream.read(4) == struct.pack(">I", 99)


# ---- host pages of several target pages ----

PARTS = HUGE_PAGE // PAGE


def parts(content: bytes, page: int, which: range = range(PARTS), idstr: str | None = "pc.ram") -> bytes:
    return b"".join(
        record(page * HUGE_PAGE + i * PAGE, page_of(content, i), idstr if i == which[0] else None) for i in which
    )


def test_huge_page_is_placed_when_all_its_parts_have_come(
    placed: Placed, huge_pages: Callable[[int], None], rng: random.Random
) -> None:
    """E1: sections end in between; another connection brings its own meanwhile; who waits is woken once it is whole."""
    huge_pages(4)
    placed.rig.threads.start([-1])
    ram = placed.add_block(n_pages=4, page_size=HUGE_PAGE)
    main, preempt = placed.connect(), placed.connect(answers=False)
    first, second = rng.randbytes(HUGE_PAGE), rng.randbytes(HUGE_PAGE)
    with helper(placed, ram) as made:
        made.tell(f"touch {2 * HUGE_PAGE + 5 * PAGE}")
        assert main.request() == (2 * HUGE_PAGE, HUGE_PAGE, "pc.ram")
        main.records(parts(first, 0, range(200)))
        preempt.records(parts(second, 2))
        assert made.answer() == second[5 * PAGE : 5 * PAGE + 1]
        assert not ram.is_received(0)
        main.records(parts(first, 0, range(200, PARTS), None))
    assert ram.is_received(0)
    assert bytes(ram.own_bytes(0, HUGE_PAGE)) == first
    main.records(*(record(HUGE_PAGE + i * PAGE, b"", None, fill=0) for i in range(PARTS)))
    assert bytes(ram.own_bytes(HUGE_PAGE, HUGE_PAGE)) == bytes(HUGE_PAGE)
    assert placed.incoming.progress(0) == (4 * PARTS, 3 * PARTS)


def test_huge_pages_before_listen_are_stored_and_their_holes_filled(
    placed: Placed, huge_pages: Callable[[int], None], rng: random.Random
) -> None:
    huge_pages(3)
    placed.rig.threads.start([-1])
    index = placed.announce("pc.ram", 3, HUGE_PAGE)
    source = placed.connect()
    content = rng.randbytes(HUGE_PAGE)
    source.records(parts(content, 0))
    source.records(record(3 * PAGE, b"", None, fill=0))
    source.records(*(record(HUGE_PAGE + i * PAGE, b"", None, fill=0) for i in range(PARTS)))
    source.records(record(2 * HUGE_PAGE, content[:PAGE], None))
    ram = placed.listen(index, "pc.ram", 3, HUGE_PAGE)
    assert not ram.is_received(2)
    expected = content[: 3 * PAGE] + bytes(PAGE) + content[4 * PAGE :]
    assert bytes(ram.own_bytes(0, 2 * HUGE_PAGE)) == expected + bytes(HUGE_PAGE)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (record(0, bytes(PAGE), "huge") + record(4 * PAGE, bytes(PAGE), None), "huge at 0 3 parts are missing"),
        (record(0, bytes(PAGE), "huge") + record(0, bytes(PAGE), "small"), "huge at 0 3 parts are missing"),
        (record(0, bytes(PAGE), "huge") + record(0, bytes(PAGE), None), "offset 0 comes twice"),
        (record(0, bytes(PAGE), "huge") + END_OF_PAYLOAD + footer(RAM_ID), "end of RAM, .* huge at 0 is not whole"),
    ],
)
def test_host_page_that_cannot_become_whole_is_refused(stored: Stored, data: bytes, words: str) -> None:
    """Nothing is placed, so nobody has to serve the block."""
    for index, (idstr, page_size) in enumerate((("huge", 4 * PAGE), ("small", PAGE))):
        stored.add_block(idstr, LENGTH, page_size)
        stored.unmap(index, LENGTH // page_size)
    source = stored.connect()
    source.send(data)
    with pytest.raises(MigrationError, match=words):
        source.stream.records(END, RAM_ID)


# ---- requests, without anybody who waits ----


class Asker:
    """Submits requests to a block's page channel and collects what becomes of them."""

    def __init__(self, channel: Any) -> None:
        self.channel = channel
        self.results: dict[int, int] = {}
        self._callback = ffi.callback("void(struct page_request *, int)", self._done)
        self._requests: list[Any] = []

    def _done(self, request: Any, result: int) -> None:
        self.results[request.page] = result

    def ask(self, page: int, n_pages: int = 1, *, demand: bool = True) -> None:
        request = ffi.new("struct page_request *")
        request.offset, request.length, request.is_demand = page * PAGE, n_pages * PAGE, demand
        request.page, request.n_pages, request.done = page, n_pages, self._callback
        self._requests.append(request)
        lib.page_channel_submit(self.channel, request)

    def close(self) -> None:
        lib.page_channel_free(self.channel)


@pytest.fixture
def asker(stored: Stored) -> Iterator[Asker]:
    stored.add_block()
    stored.connect().records(record(9 * PAGE, b"", "pc.ram", fill=1))
    stored.unmap()
    made = Asker(stored.incoming.page_channel(0))
    yield made
    made.close()


def test_request_for_what_has_come_is_answered_at_once(stored: Stored, asker: Asker) -> None:
    asker.ask(9)
    assert asker.results == {9: lib.PAGE_CHANNEL_ARRIVED}
    assert stored.incoming.outstanding() == 0


def test_fault_overtakes_ranges_that_have_not_left(stored: Stored, asker: Asker) -> None:
    """D4."""
    asker.ask(0, 8, demand=False)
    asker.ask(20)
    asker.ask(20, demand=False)  # the same page: asked for once
    source = stored.connect()
    stored.incoming.set_return_path(source.stream)
    assert [source.request(), source.request()] == [(20 * PAGE, PAGE, "pc.ram"), (0, 8 * PAGE, "")]
    assert source.is_silent()


def test_request_outside_the_block_is_refused(asker: Asker) -> None:
    asker.ask(N_PAGES)
    asker.ask(N_PAGES - 1, 2)
    assert asker.results == {N_PAGES: -errno.EINVAL, N_PAGES - 1: -errno.EINVAL}


def test_giving_up_fails_what_is_outstanding_and_what_is_asked_later(stored: Stored, asker: Asker) -> None:
    asker.ask(1)
    asker.ask(2, 4, demand=False)
    stored.incoming.give_up(errno.EIO)
    asker.ask(7)
    assert asker.results == {1: -errno.EIO, 2: -errno.EIO, 7: -errno.EIO}
    stored.incoming.give_up(0)
    asker.ask(8)
    assert 8 not in asker.results
    assert stored.incoming.outstanding() == 1


def test_freeing_a_channel_cancels_its_requests_and_no_others(stored: Stored) -> None:
    askers = []
    for index, idstr in enumerate(("a", "b")):
        stored.add_block(idstr)
        stored.unmap(index)
        askers.append(Asker(stored.incoming.page_channel(index)))
        askers[-1].ask(1)
        askers[-1].ask(2, 2, demand=False)
    askers[0].close()
    assert askers[0].results == {1: -errno.ECANCELED, 2: -errno.ECANCELED}
    assert askers[1].results == {}
    assert stored.incoming.outstanding() == 2
    askers[1].close()


def test_block_has_one_channel_and_only_after_its_memory_is_unmapped(stored: Stored) -> None:
    stored.add_block()
    with pytest.raises(PcshareError) as caught:
        stored.incoming.page_channel(0)
    assert caught.value.errno == errno.EINVAL
    stored.unmap()
    asker = Asker(stored.incoming.page_channel(0))
    with pytest.raises(PcshareError) as caught:
        stored.incoming.page_channel(0)
    assert caught.value.errno == errno.EEXIST
    asker.close()


def test_range_is_answered_when_its_last_page_has_come(placed: Placed, content: bytes) -> None:
    """In whatever order; and by then its pages are in memory."""
    placed.rig.threads.start([-1])
    ram = placed.add_block()
    source = placed.connect()
    asker = Asker(placed.channels[0])
    asker.ask(8, 4, demand=False)
    assert source.request() == (8 * PAGE, 4 * PAGE, "pc.ram")
    source.records(*(record(i * PAGE, page_of(content, i), "pc.ram") for i in (10, 8, 12, 11)))
    assert asker.results == {}
    source.records(record(9 * PAGE, page_of(content, 9), None))
    assert asker.results == {8: lib.PAGE_CHANNEL_ARRIVED}
    assert ram.is_received(9)


# ---- a peer that does not read ----


def test_messages_that_do_not_fit_leave_when_the_peer_reads(stored: Stored, asker: Asker) -> None:
    """Nobody waits for the peer: what is left goes when the channel's fd says so."""
    source = stored.connect()
    stored.incoming.set_return_path(source.stream)
    count = 4000
    for value in range(count):
        stored.incoming.send(2, struct.pack(">I", value) * 100)
    asker.ask(5)
    assert not stored.incoming.flush(0.01)
    poll_fd = lib.page_channel_poll_fd(asker.channel)
    assert not select.select([poll_fd], [], [], 0)[0]
    values = []
    for _ in range(count):
        while not select.select([source.socket], [], [], 0)[0]:
            assert select.select([poll_fd], [], [], WAIT_S)[0]
            lib.page_channel_dispatch(asker.channel)
        values.append(struct.unpack_from(">I", source.message()[1])[0])
    assert values == list(range(count))
    assert stored.incoming.flush(WAIT_S)
    assert source.request() == (5 * PAGE, PAGE, "pc.ram")


def test_peer_that_only_asks_takes_little_memory(stored: Stored, asker: Asker) -> None:
    """One that wants the bitmap again and again, and reads none."""
    n_pages = 64 << 20
    stored.add_block("large", n_pages * PAGE)
    source = stored.connect()
    stored.incoming.set_return_path(source.stream)
    stored.incoming.send_bitmap("large")
    with pytest.raises(StreamLost, match="does not read"):
        stored.incoming.send_bitmap("large")
    source.close()
    source = stored.connect()
    stored.incoming.set_return_path(source.stream)
    stored.incoming.send_bitmap("large")  # what the other one left lies here no more


def test_flush_without_a_time_limit_waits_for_the_peer(stored: Stored, asker: Asker) -> None:
    source = stored.connect()
    stored.incoming.set_return_path(source.stream)
    count = 2000
    for _ in range(count):
        stored.incoming.send(2, bytes(400))
    with running(lambda: stored.incoming.flush(FOREVER)) as flushing:
        for _ in range(count):
            source.message()
        assert flushing.result(WAIT_S)


def test_messages_are_limited_and_there_must_be_a_path(stored: Stored, asker: Asker) -> None:
    with pytest.raises(StreamLost, match="no return path"):
        stored.incoming.send(2, bytes(4))
    source = stored.connect()
    stored.incoming.set_return_path(source.stream)
    with pytest.raises(PcshareError) as caught:
        stored.incoming.send(2, bytes(513))
    assert caught.value.errno == errno.EMSGSIZE
    source.socket.close()
    asker.ask(3)  # who asks hears nothing of it: the reader finds out
    with pytest.raises(StreamLost, match="no return path"):
        stored.incoming.send(2)
    assert stored.incoming.outstanding() == 1
    assert asker.results == {}


def test_closed_stream_is_no_return_path_any_more(stored: Stored) -> None:
    source = stored.connect()
    stored.incoming.set_return_path(source.stream)
    source.close()
    with pytest.raises(StreamLost, match="no return path"):
        stored.incoming.send(1)


# ---- several threads ----


def test_connection_that_is_early_waits_for_the_end_of_listen(placed: Placed, content: bytes) -> None:
    """A page on the preempt channel between the two halves of LISTEN is neither lost nor stored into sealed memory."""
    placed.rig.threads.start([-1])
    index = placed.announce("pc.ram", N_PAGES)
    preempt = placed.connect(answers=False)
    received = ffi.new("uint64_t[]", 1)
    region = placed.rig.segment.add_bitmap(N_PAGES, [(0, N_PAGES)])
    unmapped = placed.incoming.unmap_block(index, received)
    preempt.send(record(0, content[:PAGE], "pc.ram"), END_OF_PAYLOAD)
    with running(preempt.stream.records) as reading:
        status = placed.rig.segment.block_slot(0)
        status.bitmap_offset = region.offset
        ram = RAMBlock(
            placed.rig.keeper, "pc.ram", used_length=LENGTH, page_size=PAGE, writable=False,
            extents=unmapped.ranges(), index=0, status=status, received=region.address, memory=placed.memories[0],
        )  # fmt: skip
        placed.rig.threads.add_block(ram, placed.incoming.page_channel(0), poison=False)
        placed.rig.blocks[0] = ram
        assert not reading.done()
        placed.incoming.listen_block(0, placed.rig.threads, 0)
        assert reading.result(WAIT_S).why is Why.END_OF_PAYLOAD
    assert read_own_page(ram, 0) == content[:PAGE]


def test_stop_ends_who_waits_for_listen(stored: Stored, content: bytes) -> None:
    stored.add_block()
    source = stored.connect()
    stored.unmap()
    source.send(record(0, content[:PAGE], "pc.ram"), END_OF_PAYLOAD)
    with running(source.stream.records) as reading:
        source.stream.stop()
        with pytest.raises(StreamStopped):
            reading.result(WAIT_S)


def test_two_connections_may_bring_the_same_pages_at_once(placed: Placed, content: bytes, rng: random.Random) -> None:
    """No source does; nothing may come of it."""
    placed.rig.threads.start([-1])
    ram = placed.add_block()
    sources = [placed.connect(answers=False) for _ in range(3)]
    stop = threading.Barrier(len(sources))

    def bring(source: Source) -> None:
        stop.wait(WAIT_S)
        for start in range(0, N_PAGES, 8):
            source.records(all_records(content, pages=range(start, start + 8)))

    with ThreadPoolExecutor(len(sources)) as pool:
        list(pool.map(bring, sources))
    assert placed.incoming.progress(0) == (N_PAGES, N_PAGES)
    assert [read_own_page(ram, i) for i in range(N_PAGES)] == [page_of(content, i) for i in range(N_PAGES)]
    counters = [source.stream.counters() for source in sources]
    assert sum(each.repeat_pages for each in counters) == 2 * N_PAGES


def test_block_that_is_served_no_more_takes_no_pages(placed: Placed, content: bytes) -> None:
    placed.rig.threads.start([-1])
    placed.add_block()
    source = placed.connect()
    placed.rig.threads.remove_block(0)
    placed.rig.blocks.pop(0).close()
    source.send(record(0, content[:PAGE], "pc.ram"), END_OF_PAYLOAD)
    with pytest.raises(StreamStopped, match="served no more"):
        source.stream.records()


# ---- garbage ----


def test_mutated_records_come_to_the_same_end_as_in_a_second_parser(tmp_path: Path, seed: int) -> None:
    program = compile_c(tmp_path / "incoming_fuzz", "incoming_fuzz.c", FUZZED_FILES, "address,undefined")
    count = MUTATED_RECORDS if IN_CI else MUTATED_RECORDS // 4
    ran = subprocess.run([str(program), str(count), str(seed)], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.startswith(f"{count} mutated records in ")


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_each_request_is_answered_once_whenever_links_break(tmp_path: Path, seed: int, sanitizer: str) -> None:
    """P3."""
    program = compile_c(tmp_path / "incoming_race", "incoming_race.c", FUZZED_FILES, sanitizer)
    ran = subprocess.run([str(program), str(BREAKS), str(seed)], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.count("answered by pages") == 2
