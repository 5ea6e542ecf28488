"""Sources that push, at the core's level: pages come asked for or not, and are placed by whoever receives them."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import random
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from core_support import Child, child
from pcshare.core import ffi, lib
from pcshare.fault_thread import EventKind
from pcshare.ramblock import DeferredMemory, RAMBlock
from support import wait_until
from support_rig import PushSource, Rig
from support_serving import EAGER, HUGE_PAGE, PAGE, WAIT_S, make_file, page_of, read_own_page

N_PAGES = 64
THREAD_ID = lib.UFFD_FEATURE_BIT_THREAD_ID
PIECE_PAGES = 16  # what a push source of the tests is asked for at a time


@pytest.fixture
def source() -> PushSource:
    return PushSource()


@pytest.fixture
def rig(source: PushSource) -> Iterator[Rig]:  # it holds the source's functions until the last is called
    made = Rig(f"push-{os.getpid()}")
    yield made
    made.close()


@pytest.fixture
def content(rng: random.Random) -> bytes:
    return rng.randbytes(N_PAGES * PAGE)


class Reader:
    """A thread that touches a page of the coordinator's own mapping."""

    def __init__(self, ram: RAMBlock, page: int) -> None:
        self._found: list[bytes] = []
        self._thread = threading.Thread(target=lambda: self._found.append(read_own_page(ram, page)))
        self._thread.start()

    def result(self) -> bytes:
        self._thread.join(WAIT_S)
        return self._found[0]


@contextlib.contextmanager
def helper_of(rig: Rig, ram: RAMBlock) -> Iterator[tuple[Child, socket.socket]]:
    with child(ram.helper_memfd(writing=False), ram.map_length, features=THREAD_ID) as helper:
        number, control = rig.add_remote(ram, helper)
        control.settimeout(WAIT_S)
        try:
            yield helper, control
        finally:
            rig.threads.remove_remote(number)
            control.close()


def ask_for_range(control: socket.socket, page: int, n_pages: int, *, wait: bool = True) -> None:
    length = ffi.sizeof("struct wire_request")
    header = (lib.WIRE_MAGIC, lib.WIRE_VERSION, lib.WIRE_REQUEST, length, 7)
    request = ffi.new("struct wire_request *", {"header": header, "offset": page * PAGE, "length": n_pages * PAGE})
    request.flags = lib.WIRE_REQUEST_WAIT if wait else 0
    control.send(bytes(ffi.buffer(request)))


def range_status(control: socket.socket) -> int:
    done = ffi.from_buffer("struct wire_done *", control.recv(4096))
    assert (done.header.type, done.header.cookie) == (lib.WIRE_DONE, 7)
    return int(done.status)


def status_of(rig: Rig, index: int = 0) -> tuple[int, int]:
    """(demand pages, stream pages)"""
    status = rig.segment.block_slot(index)
    return status.demand_pages, status.stream_pages


# ---- who is asked, and for what ----


def test_background_asks_nothing_of_a_source_that_pushes(
    rig: Rig, source: PushSource, tmp_path: Path, rng: random.Random
) -> None:
    """And goes on to the next block."""
    rig.threads.start([-1])
    rig.add_pushed(source, N_PAGES)
    rig.add_block(f"data={make_file(tmp_path, rng, N_PAGES * PAGE)}", 1)
    rig.threads.set_stream(EAGER)
    assert rig.wait_for_event(EventKind.BLOCK_COMPLETE).block_index == 1
    assert source.asked() == []


def test_touched_page_is_asked_for_once_and_its_reader_woken_when_it_is_pushed(
    rig: Rig, source: PushSource, content: bytes
) -> None:
    """D3, E4: the answer to the request comes afterwards and changes nothing."""
    rig.threads.start([-1, -1])
    ram = rig.add_pushed(source, N_PAGES)
    with helper_of(rig, ram) as (helper, _):
        helper.tell(f"touch {5 * PAGE + 1}")
        source.wait_until_asked((5, 1))
        readers = [Reader(ram, 5) for _ in range(3)]
        assert rig.push(4, content[4 * PAGE : 7 * PAGE], demand=True) == (0, 3)
        assert helper.answer() == content[5 * PAGE + 1 : 5 * PAGE + 2]
        assert [reader.result() for reader in readers] == [page_of(content, 5)] * 3
        assert source.asked() == [(5, 1)]
        source.answer(lib.PAGE_CHANNEL_ARRIVED)
        assert rig.segment.helper_slot(0).demand_pages == 1
    assert status_of(rig) == (3, 0)
    assert not rig.events()


def test_pushed_page_that_nobody_waits_for_is_a_stream_page(rig: Rig, source: PushSource, content: bytes) -> None:
    rig.threads.start([-1])
    ram = rig.add_pushed(source, N_PAGES)
    assert rig.push(0, content[: 10 * PAGE]) == (0, 10)
    assert status_of(rig) == (0, 10)
    assert [read_own_page(ram, page) for page in range(10)] == [page_of(content, page) for page in range(10)]
    assert source.asked() == []


def test_pushed_zeros_are_placed_as_zeros(rig: Rig, source: PushSource, content: bytes) -> None:
    """E2: and those who wait for one of them are woken."""
    rig.threads.start([-1])
    ram = rig.add_pushed(source, N_PAGES)
    reader = Reader(ram, 3)
    source.wait_until_asked((3, 1))
    assert rig.push(4, content[4 * PAGE : 5 * PAGE]) == (0, 1)
    assert rig.push(1, 8) == (0, 7)
    assert reader.result() == bytes(PAGE)
    assert read_own_page(ram, 4) == page_of(content, 4)
    assert rig.segment.block_slot(0).zero_pages == 7
    source.answer(lib.PAGE_CHANNEL_ARRIVED)


def test_page_that_comes_twice_is_the_first(rig: Rig, source: PushSource, content: bytes) -> None:
    """P2."""
    rig.threads.start([-1])
    ram = rig.add_pushed(source, N_PAGES)
    assert rig.push(2, content[2 * PAGE : 3 * PAGE]) == (0, 1)
    assert rig.push(1, b"x" * 3 * PAGE) == (0, 2)
    assert rig.push(2, 1) == (0, 0)
    assert read_own_page(ram, 2) == page_of(content, 2)
    assert rig.segment.block_slot(0).foreign_pages == 0


def test_range_is_answered_when_its_last_page_was_pushed(rig: Rig, source: PushSource, content: bytes) -> None:
    """In whatever order they come; what was asked for is asked again only if it did not come."""
    rig.threads.start([-1])
    ram = rig.add_pushed(source, N_PAGES)
    with helper_of(rig, ram) as (_, control):
        rig.push(9, page_of(content, 9))
        ask_for_range(control, 8, 2 * PIECE_PAGES)
        source.wait_until_asked((8, 1), (10, PIECE_PAGES), (26, 14))
        for page in reversed(range(8, 40)):
            assert rig.segment.block_slot(0).received_pages == max(1, 40 - page - (page < 9))
            rig.push(page, page_of(content, page))
        assert range_status(control) == 0
        source.answer(lib.PAGE_CHANNEL_ARRIVED)
        wait_until(lambda: rig.segment.helper_slot(0).demand_pages == 31, "the helper's pages to be counted")
        ask_for_range(control, 0, N_PAGES)
        source.wait_until_asked((0, 8), (40, PIECE_PAGES), (56, 8))
    assert not rig.events()


def test_hint_is_passed_on_too(rig: Rig, source: PushSource) -> None:
    """D5: nobody waits, yet somebody wants it first."""
    rig.threads.start([-1])
    ram = rig.add_pushed(source, N_PAGES)
    with helper_of(rig, ram) as (_, control):
        ask_for_range(control, 3, 5, wait=False)
        source.wait_until_asked((3, 5))


# ---- failures ----


@pytest.mark.parametrize("by_range", [False, True], ids=["touch", "range"])
def test_page_that_is_said_to_have_arrived_and_has_not_pauses_the_block(
    rig: Rig, source: PushSource, content: bytes, by_range: bool
) -> None:
    """P3: visibly, and it is asked for again."""
    rig.threads.start([-1])
    ram = rig.add_pushed(source, N_PAGES)
    with helper_of(rig, ram) as (helper, control):
        if by_range:
            ask_for_range(control, 5, 2)
        else:
            helper.tell(f"touch {5 * PAGE}")
        wanted = (5, 2) if by_range else (5, 1)
        source.wait_until_asked(wanted)
        source.answer(lib.PAGE_CHANNEL_ARRIVED)
        event = rig.wait_for_event(EventKind.BLOCK_SOURCE_ERROR)
        assert (event.error, event.offset) == (errno.EPROTO, 5 * PAGE)
        rig.threads.resume_block(0)
        source.wait_until_asked(wanted)
        rig.push(5, content[5 * PAGE : 7 * PAGE])
        source.answer(lib.PAGE_CHANNEL_ARRIVED)
        assert (range_status(control) == 0) if by_range else (helper.answer() == content[5 * PAGE : 5 * PAGE + 1])


def test_page_that_was_given_up_is_lifted_when_it_comes_after_all(rig: Rig, source: PushSource, content: bytes) -> None:
    """T10."""
    rig.threads.start([-1])
    ram = rig.add_pushed(source, N_PAGES, poison=True)
    with helper_of(rig, ram) as (_, control):
        ask_for_range(control, 5, 1)
        source.wait_until_asked((5, 1))
        source.answer(-errno.EIO)
        assert range_status(control) == -errno.EIO
        assert rig.segment.block_slot(0).lost_pages == 1
        rig.push(0, content)
        assert rig.segment.block_slot(0).lost_pages == 0
    assert read_own_page(ram, 5) == page_of(content, 5)
    told: set[EventKind] = set()

    def both_are_told() -> bool:
        told.update(event.kind for event in rig.events())
        return len(told) == 2

    wait_until(both_are_told, "the loss and the end")
    assert told == {EventKind.BLOCK_SOURCE_ERROR, EventKind.BLOCK_COMPLETE}


def test_page_that_cannot_be_placed_leaves_who_waits_for_it_waiting(
    rig: Rig, source: PushSource, content: bytes
) -> None:
    """P3, E3: nothing is told: it comes again, by the next connection. Here the keeper is gone (ESRCH)."""
    rig.threads.start([-1])
    ram = rig.add_pushed(source, N_PAGES)
    assert rig.push(3, content[3 * PAGE : 4 * PAGE]) == (0, 1)
    with helper_of(rig, ram) as (helper, _):
        helper.tell(f"touch {5 * PAGE}")
        source.wait_until_asked((5, 1))
        os.kill(rig.keeper.pid, signal.SIGKILL)
        assert rig.keeper._process is not None
        rig.keeper._process.wait()
        assert rig.push(3, content[3 * PAGE : 7 * PAGE], demand=True) == (-errno.ESRCH, 0)
        assert rig.push(5, 1) == (-errno.ESRCH, 0)
        slot = rig.segment.helper_slot(0)
        assert (slot.waiting, slot.faults, source.asked()) == (1, 1, [(5, 1)])
        assert [page for page in range(N_PAGES) if ram.is_received(page)] == [3]
        assert not rig.events()


@pytest.mark.parametrize("page", [N_PAGES - 1, N_PAGES, 2**64 - 1])
def test_pages_outside_the_block_are_refused(rig: Rig, source: PushSource, page: int) -> None:
    rig.add_pushed(source, N_PAGES)
    assert rig.push(page, bytes(2 * PAGE)) == (-errno.EINVAL, 0)
    assert rig.push(page, 2) == (-errno.EINVAL, 0)


@pytest.mark.parametrize("index", [1, lib.STATUS_BLOCKS_MAX])
def test_block_that_is_not_there_is_refused(rig: Rig, index: int) -> None:
    placed = ffi.new("uint64_t *", 5)
    rc = lib.fault_threads_place(rig.threads.pointer, index, 0, 1, ffi.NULL, 0, placed)
    assert (rc, placed[0]) == (-errno.ENOENT, 0)


def test_requests_of_a_block_that_goes_are_cancelled(rig: Rig, source: PushSource) -> None:
    """P7: also those of ranges; the others are told nothing."""
    rig.threads.start([-1])
    ram = rig.add_pushed(source, N_PAGES)
    with helper_of(rig, ram) as (helper, control):
        helper.tell(f"touch {5 * PAGE}")
        ask_for_range(control, 10, 3)
        source.wait_until_asked((5, 1), (10, 3))
    rig.remove_block(0)
    assert source.asked() == []
    assert not rig.events()


# ---- the end ----


def test_block_is_complete_with_the_last_page_that_is_pushed(rig: Rig, source: PushSource, content: bytes) -> None:
    rig.threads.start([-1])
    ram = rig.add_pushed(source, N_PAGES)
    rig.push(0, content[: 40 * PAGE])
    assert not rig.events()
    rig.push(40, content[40 * PAGE :])
    assert [event.kind for event in rig.events()] == [EventKind.BLOCK_COMPLETE]
    rig.threads.complete_block(0)
    assert os.pread(ram.helper_memfd(writing=False), N_PAGES * PAGE, 0) == content


LOAD_PAGES = 3000


def test_pages_pushed_by_two_threads_reach_all_who_touch_them(rig: Rig, source: PushSource, rng: random.Random) -> None:
    """T7, P1, P3: every page twice, in an order of its own each; nobody waits in vain, and no alarm is false."""
    content = rng.randbytes(LOAD_PAGES * PAGE)
    rig.threads.start([-1, -1])
    ram = rig.add_pushed(source, LOAD_PAGES)
    wrong: list[int] = []

    def push_all(pages: list[int]) -> None:
        for page in pages:
            assert rig.push(page, page_of(content, page))[0] == 0

    def touch_all(pages: list[int]) -> None:
        wrong.extend(page for page in pages if read_own_page(ram, page) != page_of(content, page))

    orders = [rng.sample(range(LOAD_PAGES), LOAD_PAGES) for _ in range(6)]
    readers = [threading.Thread(target=touch_all, args=(order,)) for order in orders[:4]]
    pushers = [threading.Thread(target=push_all, args=(order,)) for order in orders[4:]]
    for thread in (*readers, *pushers):
        thread.start()
    for thread in (*readers, *pushers):
        thread.join(WAIT_S)
        assert not thread.is_alive()
    assert wrong == []
    source.answer(lib.PAGE_CHANNEL_ARRIVED)
    status = rig.segment.block_slot(0)
    assert (status.received_pages, status.stream_pages, status.foreign_pages) == (LOAD_PAGES, LOAD_PAGES, 0)
    assert [event.kind for event in rig.events()] == [EventKind.BLOCK_COMPLETE]


# ---- blocks that hold pages before they are served ----


def filled(rig: Rig, content: dict[int, bytes], n_pages: int, page_size: int = PAGE) -> DeferredMemory:
    memory = DeferredMemory(rig.keeper, "pushed", map_length=n_pages * page_size, page_size=page_size, writable=False)
    with mmap.mmap(memory.fileno(), n_pages * page_size) as mapping:
        for page, data in content.items():
            mapping[page * page_size : (page + 1) * page_size] = data
    return memory


def test_page_that_was_here_before_is_read_without_a_fault(rig: Rig, source: PushSource, content: bytes) -> None:
    """A hole is zeros, and what is missing is asked for: also where something else lay in memory."""
    rig.threads.start([-1])
    memory = filled(rig, {0: page_of(content, 0), 2: b"s" * PAGE}, N_PAGES)
    extents = ((0, PAGE), (2 * PAGE, N_PAGES * PAGE))
    ram = rig.add_pushed(source, N_PAGES, memory=memory, extents=extents, received=(0,))
    with helper_of(rig, ram) as (helper, _):
        helper.tell("touch 7")
        assert helper.answer() == content[7:8]
        assert (rig.segment.helper_slot(0).faults, source.asked()) == (0, [])
        helper.tell(f"touch {PAGE}")
        assert helper.answer() == b"\0"
        assert (rig.segment.helper_slot(0).faults, source.asked()) == (1, [])
        helper.tell(f"touch {2 * PAGE}")
        source.wait_until_asked((2, 1))
        rig.push(2, content[2 * PAGE :])
        assert helper.answer() == content[2 * PAGE : 2 * PAGE + 1]
        source.answer(lib.PAGE_CHANNEL_ARRIVED)
    assert [event.kind for event in rig.events()] == [EventKind.BLOCK_COMPLETE]
    status = rig.segment.block_slot(0)
    assert (status.received_pages, status.hole_pages, status.foreign_pages) == (N_PAGES, 0, 0)


def test_block_that_is_here_whole_is_complete_at_once(rig: Rig, source: PushSource, content: bytes) -> None:
    rig.threads.start([-1])
    memory = filled(rig, {page: page_of(content, page) for page in range(8)}, N_PAGES)
    rig.add_pushed(source, N_PAGES, memory=memory, extents=((0, 8 * PAGE),), received=range(8))
    assert rig.wait_for_event(EventKind.BLOCK_COMPLETE).block_index == 0
    rig.threads.complete_block(0)


def test_huge_pages_that_were_here_before_are_served_with_those_that_are_pushed(
    rig: Rig, source: PushSource, huge_pages: Callable[[int], None], rng: random.Random
) -> None:
    """E1: and a hole, which the source will not send, is here from the start."""
    huge_pages(4)
    content = rng.randbytes(4 * HUGE_PAGE)
    memory = filled(rig, {0: content[:HUGE_PAGE]}, 4, HUGE_PAGE)
    rig.threads.start([-1])
    ram = rig.add_pushed(
        source, 4, memory=memory, page_size=HUGE_PAGE, extents=((0, HUGE_PAGE), (2 * HUGE_PAGE, 4 * HUGE_PAGE)),
        received=(0,),
    )  # fmt: skip
    assert [read_own_page(ram, page) for page in (0, 1)] == [content[:HUGE_PAGE], bytes(HUGE_PAGE)]
    reader = Reader(ram, 3)
    source.wait_until_asked((3, 1))
    assert rig.push(2, content[2 * HUGE_PAGE :]) == (0, 2)
    assert reader.result() == content[3 * HUGE_PAGE :]
    source.answer(lib.PAGE_CHANNEL_ARRIVED)
    assert [event.kind for event in rig.events()] == [EventKind.BLOCK_COMPLETE]
    assert rig.segment.block_slot(0).foreign_pages == 0
