"""RAM blocks at the core's level: real memory with a real keeper, and nobody who faults."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import random
import re
import resource
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from pcshare.core import ffi, lib
from pcshare.errors import HostError, PcshareError
from pcshare.keeper import Keeper
from pcshare.ramblock import DeferredMemory, RAMBlock, rounded_up
from support_serving import HUGE_PAGE, PAGE

F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW, F_SEAL_FUTURE_WRITE = 1, 2, 4, 16
N_PAGES = 32
ALL = ((0, N_PAGES * PAGE),)
TIB = 1 << 40
MAP_NORESERVE = 0x4000


@pytest.fixture
def keeper() -> Iterator[Keeper]:
    made = Keeper.spawn()
    yield made
    made.close()


class Made:
    """A block with the memory that its counters and bitmap lie in."""

    def __init__(self, keeper: Keeper, used_length: int, extents: Sequence[tuple[int, int]], **options: Any) -> None:
        self.page_size = options.pop("page_size", PAGE)
        n_words = -(-rounded_up(used_length, self.page_size) // self.page_size // 64)
        self.status = ffi.new("struct status_block *")
        self.received = ffi.new("uint64_t[]", n_words)
        for page in options.pop("received", ()):
            lib.bitmap_test_and_set(self.received, page)
        self.ram = RAMBlock(
            keeper,
            "data",
            used_length=used_length,
            page_size=self.page_size,
            writable=options.pop("writable", False),
            extents=extents,
            index=0,
            status=self.status,
            received=self.received,
            **options,
        )
        self.c = self.ram.pointer

    def place(self, page: int, content: bytes) -> tuple[int, int]:
        """(what the core answered, pages placed)"""
        placed = ffi.new("uint64_t *")
        n_pages = len(content) // self.page_size
        return lib.ramblock_place(self.c, page, n_pages, ffi.from_buffer(content), placed), placed[0]

    def content(self, page: int, n_pages: int = 1) -> bytes:
        """What the memory holds: pread makes no page of a hole."""
        return os.pread(self.c.memfd, n_pages * self.page_size, page * self.page_size)

    def write(self, page: int, content: bytes) -> None:
        """As a helper would that writes through a shared mapping."""
        os.pwrite(self.c.memfd, content, page * self.page_size)

    def plant(self, page: int) -> None:
        """As a process would that maps the memory, does not register it, and reads."""
        with mmap.mmap(self.c.helper_memfd, self.c.map_length, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ) as mapping:
            assert mapping[page * self.page_size] == 0

    def next_missing(self, start: int, end: int) -> int:
        return int(lib.ramblock_next_missing(self.c, start, end))

    def claim(self, start: int, end: int, most: int) -> tuple[int, int]:
        """(first page, pages)"""
        first = ffi.new("uint64_t *")
        n_pages = int(lib.ramblock_claim_missing(self.c, start, end, most, first))
        return int(first[0]), n_pages

    def is_received(self, page: int) -> bool:
        return self.ram.is_received(page)


@contextlib.contextmanager
def block(
    keeper: Keeper, used_length: int = N_PAGES * PAGE, extents: Sequence[tuple[int, int]] = ALL, **options: Any
) -> Iterator[Made]:
    made = Made(keeper, used_length, extents, **options)
    try:
        yield made
    finally:
        made.ram.free()


def mapping_flags(pid: int | str, addr: int) -> set[str]:
    """VmFlags of the mapping that begins there."""
    begins = re.compile(rf"^{addr:08x}-[0-9a-f]+ ")
    lines = iter(Path(f"/proc/{pid}/smaps").read_text().splitlines())
    for line in lines:
        if begins.match(line):
            return set(next(line for line in lines if line.startswith("VmFlags:")).split()[1:])
    raise AssertionError(f"no mapping at {addr:#x}")


# ---- making ----


def test_length_that_is_no_multiple_of_the_page_size_is_refused_with_the_numbers(keeper: Keeper) -> None:
    """A4: naming block, length and page size."""
    with pytest.raises(PcshareError, match=r"block data: length 5000 .* page size 4096") as caught:
        Made(keeper, 5000, (), map_length=5000)
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"page_size": 1024}, "page size 1024: the host's is 4096, the largest supported 2097152"),
        ({"page_size": 4 << 20}, "page size 4194304"),
        ({"page_size": 12288}, "page size 12288"),
        ({"map_length": 0}, "length 0"),
        ({"map_length": PAGE}, "used length 131072 does not fit its length 4096"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_both_numbers(
    keeper: Keeper, sizes: dict[str, int], message: str
) -> None:
    """A3, A4."""
    with pytest.raises(PcshareError, match=message) as caught:
        Made(keeper, N_PAGES * PAGE, (), **sizes)
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize("extents", [((5, 5),), ((0, N_PAGES * PAGE + 1),), ((PAGE * 8, PAGE * 9), (0, PAGE))])
def test_extents_that_cannot_be_are_refused(keeper: Keeper, extents: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(PcshareError, match="Invalid argument"):
        Made(keeper, N_PAGES * PAGE, extents)


@pytest.mark.parametrize("writable", [False, True])
def test_memory_is_sealed_against_what_would_harm_others(keeper: Keeper, writable: bool) -> None:
    """P8, T15: nobody may resize it or add seals; nobody may write a read-only one, also by opening it again."""
    with block(keeper, writable=writable) as made:
        seals = fcntl.fcntl(made.c.helper_memfd, fcntl.F_GET_SEALS)
        wanted = F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | (0 if writable else F_SEAL_FUTURE_WRITE)
        assert seals == wanted
        with pytest.raises(PermissionError):
            os.ftruncate(made.c.memfd, PAGE)
        with pytest.raises(PermissionError):
            fcntl.fcntl(made.c.memfd, fcntl.F_ADD_SEALS, F_SEAL_FUTURE_WRITE)
        if not writable:
            again = os.open(f"/proc/self/fd/{made.c.helper_memfd}", os.O_RDWR)  # root opens anything
            with pytest.raises(PermissionError):
                os.pwrite(again, b"x", 0)
            with pytest.raises(PermissionError):
                mmap.mmap(again, PAGE)
            os.close(again)


@pytest.mark.parametrize("writable", [False, True])
def test_helpers_may_write_only_through_the_fd_of_a_writable_block(keeper: Keeper, writable: bool) -> None:
    """P8."""
    with block(keeper, writable=writable) as made:
        flags = fcntl.fcntl(made.ram.helper_memfd(writing=writable), fcntl.F_GETFL) & os.O_ACCMODE
        assert flags == (os.O_RDWR if writable else os.O_RDONLY)
        assert fcntl.fcntl(made.ram.helper_memfd(writing=False), fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY


def test_both_mappings_are_registered_and_without_huge_pages_until_the_block_is_complete(keeper: Keeper) -> None:
    """B2, B4, T4: no huge pages, no core dump, no inheritance, and registered."""
    with block(keeper) as made:
        places = (("self", int(ffi.cast("uintptr_t", made.c.host_addr))), (keeper.pid, made.c.place_addr))
        for pid, addr in places:
            assert {"um", "nh", "dd", "dc"} <= mapping_flags(pid, addr)
        assert made.place(0, bytes(N_PAGES * PAGE)) == (lib.RAMBLOCK_PLACED, N_PAGES)
        lib.ramblock_complete(made.c)
        for pid, addr in places:
            assert "um" not in mapping_flags(pid, addr)
        assert "nh" not in mapping_flags(*places[0])
        lib.ramblock_complete(made.c)  # twice is fine


def test_own_uffd_never_blocks_and_no_child_inherits_it(keeper: Keeper) -> None:
    """B4."""
    with block(keeper) as made:
        for uffd in (made.c.own_uffd, made.c.placing_uffd):
            assert fcntl.fcntl(uffd, fcntl.F_GETFL) & os.O_NONBLOCK
            assert fcntl.fcntl(uffd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC


def test_new_block_holds_nothing(keeper: Keeper) -> None:
    """B1: nothing of old content may survive."""
    with block(keeper) as made:
        assert made.ram.is_empty()
        assert made.c.missing_pages == N_PAGES
        assert not any(made.is_received(page) for page in range(N_PAGES))
        made.place(3, b"x" * PAGE)
        assert not made.ram.is_empty()


def test_status_tells_the_sizes(keeper: Keeper) -> None:
    with block(keeper, used_length=10 * PAGE + 1, extents=((PAGE, PAGE + 1),), writable=True) as made:
        status = made.status
        assert ffi.string(status.idstr) == b"data"
        assert (status.in_use, status.writable, status.used_length) == (1, 1, 10 * PAGE + 1)
        assert (status.page_size, status.page_count, status.hole_pages) == (PAGE, 11, 10)


# ---- memory that was filled before ----


def filled(keeper: Keeper, content: dict[int, bytes], n_pages: int = N_PAGES, page_size: int = PAGE) -> DeferredMemory:
    """Memory with these pages written in place through a mapping that is gone when it returns."""
    memory = DeferredMemory(keeper, "data", map_length=n_pages * page_size, page_size=page_size, writable=False)
    with mmap.mmap(memory.fileno(), n_pages * page_size) as mapping:
        for page, data in content.items():
            mapping[page * page_size : (page + 1) * page_size] = data
    return memory


def test_what_was_received_before_is_there_and_the_rest_is_forgotten(keeper: Keeper, rng: random.Random) -> None:
    """B1, B3, P1: a page that is present and not received would be read as it is, without a fault."""
    content = {page: rng.randbytes(PAGE) for page in (0, 1, 5, 6, 7, N_PAGES - 1)}
    with block(keeper, memory=filled(keeper, content), received=(1, 5, 7)) as made:
        present = {page for page in range(N_PAGES) if made.content(page) != bytes(PAGE)}
        assert present == {1, 5, 7}
        assert os.fstat(made.c.memfd).st_blocks * 512 == 3 * PAGE
        assert (made.status.received_pages, made.c.missing_pages, made.status.hole_pages) == (3, N_PAGES - 3, 0)
        assert made.status.stream_pages == 3
        assert made.place(0, b"n" * N_PAGES * PAGE) == (lib.RAMBLOCK_PLACED, N_PAGES - 3)
        for page in range(N_PAGES):
            assert made.content(page) == (content[page] if page in present else b"n" * PAGE)
        assert (made.status.foreign_pages, made.c.missing_pages) == (0, 0)


def test_memory_that_was_filled_before_is_sealed_and_registered_as_any(keeper: Keeper) -> None:
    """P8, B4."""
    with block(keeper, memory=filled(keeper, {0: b"a" * PAGE}), received=(0,)) as made:
        wanted = F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE
        assert fcntl.fcntl(made.c.helper_memfd, fcntl.F_GET_SEALS) == wanted
        for pid, addr in (("self", int(ffi.cast("uintptr_t", made.c.host_addr))), (keeper.pid, made.c.place_addr)):
            assert {"um", "nh", "dd", "dc"} <= mapping_flags(pid, addr)


def test_pages_that_are_here_already_are_counted_as_a_model_counts_them(keeper: Keeper, rng: random.Random) -> None:
    """Each page is received, or a hole, or missing."""
    n_pages = 150
    for _ in range(20):
        cuts = sorted(rng.sample(range(n_pages + 1), 2 * rng.randrange(1, 8)))
        pieces = list(zip(cuts[::2], cuts[1::2], strict=True))
        data = {page for start, end in pieces for page in range(start, end)}
        received = {page for page in range(n_pages) if rng.random() < 0.3}
        memory = filled(keeper, dict.fromkeys(received, b"r" * PAGE), n_pages)
        extents = [(start * PAGE, end * PAGE) for start, end in pieces]
        with block(keeper, n_pages * PAGE, extents, memory=memory, received=received) as made:
            assert made.status.received_pages == len(received)
            assert made.status.hole_pages == n_pages - len(data | received)
            assert made.c.missing_pages == len(data - received)
            assert made.next_missing(0, n_pages) == min(data - received, default=n_pages)


def test_page_that_is_said_to_be_received_and_is_not_there_is_refused(keeper: Keeper) -> None:
    """P3: nobody would ever place it, and whoever touches it would be woken and fault for ever."""
    memory = filled(keeper, {3: b"a" * PAGE})
    memfd = memory.fileno()
    with pytest.raises(PcshareError, match=rf"block data: the page at offset {4 * PAGE} is said to be") as caught:
        Made(keeper, N_PAGES * PAGE, ALL, memory=memory, received=(3, 4))
    assert caught.value.errno == errno.EIO
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(memfd)


@pytest.mark.parametrize("n_pages", [1, N_PAGES - 1, N_PAGES + 1])
def test_memory_of_another_size_is_refused(keeper: Keeper, n_pages: int) -> None:
    """P1: pages would be placed into a neighbour's."""
    with pytest.raises(PcshareError, match="not what was made for it") as caught:
        Made(keeper, N_PAGES * PAGE, ALL, memory=filled(keeper, {}, n_pages))
    assert caught.value.errno == errno.EINVAL


def test_memory_that_was_refused_or_freed_leaves_nothing_in_the_keeper(keeper: Keeper) -> None:
    """P7."""
    filled(keeper, {}).free()
    ours, theirs = len(os.listdir("/proc/self/fd")), len(os.listdir(f"/proc/{keeper.pid}/fd"))
    with pytest.raises(PcshareError):
        Made(keeper, 5000, (), map_length=5000, memory=filled(keeper, {}, 2))
    memory = filled(keeper, {0: b"a" * PAGE})
    memory.free()
    memory.free()
    with block(keeper, memory=filled(keeper, {})):
        pass
    assert len(os.listdir("/proc/self/fd")) == ours
    assert len(os.listdir(f"/proc/{keeper.pid}/fd")) == theirs


def test_memory_without_a_keeper_is_refused(keeper: Keeper) -> None:
    memory = filled(keeper, {0: b"a" * PAGE})
    os.kill(keeper.pid, 9)
    with pytest.raises(PcshareError, match="the keeper is gone"):
        Made(keeper, N_PAGES * PAGE, ALL, memory=memory, received=(0,))
    with pytest.raises(PcshareError, match="block data: the keeper is gone"):
        filled(keeper, {})


def test_huge_pages_received_before_stay_and_their_holes_are_filled(
    keeper: Keeper, huge_pages: Callable[[int], None], rng: random.Random
) -> None:
    """E1, E2: what is complete must be whole in memory; a hole of hugetlb cannot be left open."""
    huge_pages(5)
    content = {page: rng.randbytes(HUGE_PAGE) for page in (0, 3, 4)}
    memory = filled(keeper, content, 5, HUGE_PAGE)
    extents = ((0, HUGE_PAGE), (3 * HUGE_PAGE, 5 * HUGE_PAGE))
    with block(keeper, 5 * HUGE_PAGE, extents, page_size=HUGE_PAGE, memory=memory, received=(0, 3)) as made:
        status = made.status
        assert (status.received_pages, status.zero_pages, status.hole_pages) == (4, 2, 0)
        assert (made.c.missing_pages, made.next_missing(0, 5)) == (1, 4)
        assert made.place(4, b"n" * HUGE_PAGE) == (lib.RAMBLOCK_PLACED, 1)
        assert (status.foreign_pages, made.c.missing_pages) == (0, 0)
        lib.ramblock_complete(made.c)
        flags = mmap.MAP_PRIVATE | MAP_NORESERVE
        with mmap.mmap(made.c.helper_memfd, 5 * HUGE_PAGE, flags=flags, prot=mmap.PROT_READ) as mapping:
            found = [mapping[page * HUGE_PAGE : (page + 1) * HUGE_PAGE] for page in range(5)]
        assert found == [content[0], bytes(HUGE_PAGE), bytes(HUGE_PAGE), content[3], b"n" * HUGE_PAGE]


# ---- placing ----


def test_placed_page_is_whole_and_its_bit_is_set(keeper: Keeper, rng: random.Random) -> None:
    """E1, E3."""
    content = rng.randbytes(3 * PAGE)
    with block(keeper) as made:
        assert made.place(7, content) == (lib.RAMBLOCK_PLACED, 3)
        assert made.content(7, 3) == content
        assert [page for page in range(N_PAGES) if made.is_received(page)] == [7, 8, 9]
        assert made.status.received_pages == 3
        assert made.c.missing_pages == N_PAGES - 3
        assert not any(lib.bitmap_test(made.c.placing, page) for page in range(N_PAGES))


@pytest.mark.parametrize("writable", [False, True])
def test_second_copy_of_a_page_changes_nothing(keeper: Keeper, writable: bool) -> None:
    """P2, E5: also when the bytes are others."""
    with block(keeper, writable=writable) as made:
        assert made.place(4, b"a" * PAGE) == (lib.RAMBLOCK_PLACED, 1)
        assert made.place(4, b"b" * PAGE) == (lib.RAMBLOCK_PRESENT, 0)
        assert made.content(4) == b"a" * PAGE
        assert made.status.foreign_pages == 0


def test_second_copy_never_overwrites_what_a_helper_wrote(keeper: Keeper) -> None:
    """P2."""
    with block(keeper, writable=True) as made:
        made.place(4, b"a" * PAGE)
        made.write(4, b"written")
        made.place(3, b"b" * 3 * PAGE)
        assert made.content(4) == b"written".ljust(PAGE, b"a")
        assert made.content(3) + made.content(5) == b"b" * 2 * PAGE


def test_received_page_in_the_middle_of_a_run_is_left_alone(keeper: Keeper) -> None:
    """E5: the rest of the run is placed."""
    with block(keeper) as made:
        made.place(5, b"a" * PAGE)
        assert made.place(0, b"b" * 16 * PAGE) == (lib.RAMBLOCK_PLACED, 15)
        assert made.content(5) == b"a" * PAGE
        assert made.content(0, 5) + made.content(6, 10) == b"b" * 15 * PAGE


def test_foreign_page_of_a_read_only_block_is_counted_and_repaired(keeper: Keeper) -> None:
    """P1: alone, and in the middle of a run."""
    with block(keeper) as made:
        made.plant(2)
        made.plant(9)
        assert made.place(2, b"a" * PAGE) == (lib.RAMBLOCK_PRESENT, 0)
        assert (made.content(2), made.status.foreign_pages, made.c.foreign_offset) == (b"a" * PAGE, 1, 2 * PAGE)
        assert made.place(4, b"b" * 12 * PAGE) == (lib.RAMBLOCK_PLACED, 11)
        assert made.content(4, 12) == b"b" * 12 * PAGE
        assert (made.status.foreign_pages, made.c.foreign_offset) == (2, 9 * PAGE)
        assert made.status.received_pages == 13


def test_foreign_page_of_a_writable_block_is_counted_and_left(keeper: Keeper) -> None:
    """P1, P2: it could be a write."""
    with block(keeper, writable=True) as made:
        made.write(2, b"written")
        assert made.place(2, b"a" * PAGE) == (lib.RAMBLOCK_PRESENT, 0)
        assert made.content(2) == b"written".ljust(PAGE, b"\0")
        assert made.status.foreign_pages == 1
        assert made.is_received(2)


@pytest.mark.parametrize("writable", [False, True])
def test_hole_that_is_touched_when_the_block_is_complete_is_not_foreign(keeper: Keeper, writable: bool) -> None:
    """P1: one helper has been told and touches its plain mapping, the fault of another one is still on its way."""
    with block(keeper, extents=((0, PAGE),), writable=writable) as made:
        made.plant(5)
        assert lib.ramblock_place_zero(made.c, 5) == lib.RAMBLOCK_PRESENT
        assert made.status.foreign_pages == 1  # nobody has been told yet
        made.place(0, b"a" * PAGE)
        made.plant(3)
        assert lib.ramblock_place_zero(made.c, 3) == lib.RAMBLOCK_PRESENT
        assert made.status.foreign_pages == 1
        assert made.is_received(3)


def test_pages_of_a_complete_block_that_is_registered_no_more_are_made_all_the_same(keeper: Keeper) -> None:
    """P3: a hole, and what a helper removed; whoever does not know yet that the block is complete waits for them."""
    with block(keeper, extents=((0, PAGE),), writable=True) as made:
        made.place(0, b"a" * PAGE)
        lib.ramblock_complete(made.c)
        assert lib.ramblock_place_zero(made.c, 3) == lib.RAMBLOCK_PLACED
        with mmap.mmap(made.c.memfd, PAGE) as mapping:
            mapping.madvise(mmap.MADV_REMOVE)
        assert lib.ramblock_revive(made.c, 0) == 0
        assert os.fstat(made.c.memfd).st_blocks * 512 == 2 * PAGE
        assert made.content(0, 4) == bytes(4 * PAGE)
        assert (made.status.foreign_pages, made.is_received(3)) == (0, True)


def test_hole_is_placed_as_zeros_without_a_copy(keeper: Keeper) -> None:
    """E2: ZEROPAGE, which this kind of memory offers; that is remembered per block (B4)."""
    with block(keeper, extents=((0, PAGE),)) as made:
        assert made.c.can_zeropage
        assert made.status.hole_pages == N_PAGES - 1
        assert lib.ramblock_place_zero(made.c, 3) == lib.RAMBLOCK_PLACED
        assert lib.ramblock_place_zero(made.c, 3) == lib.RAMBLOCK_PRESENT
        assert made.content(3) == bytes(PAGE)
        assert (made.status.zero_pages, made.status.received_pages) == (1, 1)
        assert made.status.hole_pages == N_PAGES - 2  # each page counts once
        assert made.c.missing_pages == 1


def test_run_of_zeros_leaves_what_is_received_alone(keeper: Keeper) -> None:
    """E2, P2."""
    with block(keeper) as made:
        made.place(4, b"a" * PAGE)
        placed = ffi.new("uint64_t *")
        assert lib.ramblock_place_zeros(made.c, 2, 8, placed) == lib.RAMBLOCK_PLACED
        assert placed[0] == made.status.zero_pages == 7
        assert made.content(2, 8) == bytes(2 * PAGE) + b"a" * PAGE + bytes(5 * PAGE)
        assert [page for page in range(N_PAGES) if made.is_received(page)] == list(range(2, 10))
        assert lib.ramblock_place_zeros(made.c, 2, 8, placed) == lib.RAMBLOCK_PRESENT
        made.plant(12)
        assert lib.ramblock_place_zeros(made.c, 11, 3, placed) == lib.RAMBLOCK_PLACED
        assert (placed[0], made.status.foreign_pages, made.status.received_pages) == (2, 1, 11)


def test_huge_pages_are_placed_whole_and_zero_ones_by_copy(
    keeper: Keeper, huge_pages: Callable[[int], None], rng: random.Random
) -> None:
    """E1, E2, A5: hugetlb offers no ZEROPAGE."""
    huge_pages(4)
    content = rng.randbytes(HUGE_PAGE)
    with block(keeper, used_length=4 * HUGE_PAGE - 5, extents=((0, HUGE_PAGE),), page_size=HUGE_PAGE) as made:
        assert not made.c.can_zeropage
        assert made.place(0, content) == (lib.RAMBLOCK_PLACED, 1)
        assert lib.ramblock_place_zero(made.c, 2) == lib.RAMBLOCK_PLACED
        with mmap.mmap(made.c.helper_memfd, 3 * HUGE_PAGE, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ) as mapping:
            assert mapping[:HUGE_PAGE] == content
            assert not any(mapping[2 * HUGE_PAGE :])
        assert made.status.received_pages == 2


def test_foreign_huge_page_is_repaired(keeper: Keeper, huge_pages: Callable[[int], None], rng: random.Random) -> None:
    """P1."""
    huge_pages(2)
    content = rng.randbytes(HUGE_PAGE)
    with block(keeper, used_length=2 * HUGE_PAGE, extents=((0, 2 * HUGE_PAGE),), page_size=HUGE_PAGE) as made:
        with mmap.mmap(made.c.helper_memfd, HUGE_PAGE, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ) as mapping:
            assert mapping[0] == 0
            assert made.place(0, content) == (lib.RAMBLOCK_PRESENT, 0)
            assert mapping[:] == content
        assert made.status.foreign_pages == 1


def test_too_few_huge_pages_are_refused_with_the_command_that_mends_it(keeper: Keeper) -> None:
    length = 1 << 40  # more than any machine has
    with pytest.raises(HostError, match=r"vm\.nr_hugepages") as caught:
        Made(keeper, length, (), page_size=HUGE_PAGE)
    assert caught.value.errno == errno.ENOMEM
    assert str(length // HUGE_PAGE) in str(caught.value)


def test_two_threads_that_place_the_same_pages_raise_no_alarm(keeper: Keeper, rng: random.Random) -> None:
    """T7: each page is placed once, by one of them, and none is taken for foreign."""
    n_pages = 2048
    content = rng.randbytes(n_pages * PAGE)
    with block(keeper, used_length=n_pages * PAGE, extents=((0, n_pages * PAGE),)) as made:
        placed = [0, 0]

        def place_all(number: int) -> None:
            page = 0
            while page < n_pages:
                n = 1 + (page * 7 + number) % 16
                rc, done = made.place(page, content[page * PAGE : (page + n) * PAGE])
                assert rc >= 0
                placed[number] += done
                page += n

        threads = [threading.Thread(target=place_all, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(placed) == n_pages
        assert made.status.foreign_pages == 0
        assert made.content(0, n_pages) == content
        assert made.c.missing_pages == 0


def test_bit_is_not_set_where_placing_failed(keeper: Keeper) -> None:
    """E3: the bitmap never runs ahead of the memory. Here the owner of the mapping is gone (T1: ESRCH)."""
    with block(keeper) as made:
        os.kill(keeper.pid, 9)
        assert keeper._process is not None
        keeper._process.wait()
        rc, placed = made.place(0, b"a" * PAGE)
        assert (rc, placed) == (-errno.ESRCH, 0)
        assert not made.is_received(0)
        assert not lib.bitmap_test(made.c.placing, 0)  # another may try
        assert made.status.received_pages == 0


# ---- forgetting ----


def test_discard_forgets_memory_and_received_bits(keeper: Keeper) -> None:
    """B3: in pages of data and in holes, and only in the range."""
    with block(keeper, writable=True, extents=((0, 8 * PAGE),)) as made:
        made.place(0, b"a" * 8 * PAGE)
        lib.ramblock_place_zero(made.c, 8)
        made.ram.discard([(6, 3)])
        assert [page for page in range(N_PAGES) if made.is_received(page)] == [0, 1, 2, 3, 4, 5]
        assert made.content(6, 3) == bytes(3 * PAGE)
        assert os.fstat(made.c.memfd).st_blocks * 512 == 6 * PAGE
        assert (made.status.received_pages, made.c.missing_pages) == (6, 2)
        assert made.status.hole_pages == N_PAGES - 8
        assert made.place(6, b"b" * PAGE) == (lib.RAMBLOCK_PLACED, 1)


def test_discard_of_a_sealed_block_is_refused(keeper: Keeper) -> None:
    """B3: and forgets nothing."""
    with block(keeper) as made:
        made.place(0, b"a" * PAGE)
        with pytest.raises(PcshareError, match="discarding pages of block data") as caught:
            made.ram.discard([(0, 1)])
        assert caught.value.errno == errno.EPERM
        assert made.is_received(0)


@pytest.mark.parametrize("pages", [(0, N_PAGES + 1), (N_PAGES + 1, 0), (1, 2**64 - 1)])
def test_discard_outside_the_block_is_refused(keeper: Keeper, pages: tuple[int, int]) -> None:
    with block(keeper, writable=True) as made, pytest.raises(PcshareError) as caught:
        made.ram.discard([pages])
    assert caught.value.errno == errno.EINVAL


def test_removed_page_is_revived_as_zeros_and_a_present_one_left(keeper: Keeper) -> None:
    """B5."""
    with block(keeper, writable=True) as made:
        made.place(0, b"a" * 2 * PAGE)
        with mmap.mmap(made.c.memfd, PAGE) as mapping:
            mapping.madvise(mmap.MADV_REMOVE)
        assert lib.ramblock_revive(made.c, 0) == 0
        assert lib.ramblock_revive(made.c, 0) == lib.RAMBLOCK_PRESENT
        assert lib.ramblock_revive(made.c, 1) == lib.RAMBLOCK_PRESENT
        assert made.content(0, 2) == bytes(PAGE) + b"a" * PAGE


# ---- asking ----


def test_extents_are_widened_to_pages_and_merged(keeper: Keeper) -> None:
    extents = ((10, 20), (PAGE - 1, PAGE), (PAGE, PAGE + 1), (5 * PAGE - 1, 6 * PAGE + 1), (9 * PAGE, 10 * PAGE))
    with block(keeper, extents=extents) as made:
        found = [page for page in range(N_PAGES) if not lib.ramblock_is_hole(made.c, page)]
        assert found == [0, 1, 4, 5, 6, 9]
        assert made.c.n_data == 3
        assert made.c.missing_pages == 6


def test_missing_pages_are_found_and_claimed_as_a_model_finds_them(keeper: Keeper, rng: random.Random) -> None:
    """D3: what is claimed once is not claimed again, whatever the bounds."""
    n_pages = 300
    for _ in range(20):
        cuts = sorted(rng.sample(range(n_pages + 1), 2 * rng.randrange(1, 8)))
        extents = [(start * PAGE, end * PAGE) for start, end in zip(cuts[::2], cuts[1::2], strict=True)]
        data = {page for start, end in zip(cuts[::2], cuts[1::2], strict=True) for page in range(start, end)}
        with block(keeper, used_length=n_pages * PAGE, extents=extents) as made:
            received = {page for page in range(n_pages) if rng.random() < 0.3}
            for page in received:
                assert made.place(page, bytes(PAGE)) == (lib.RAMBLOCK_PLACED, 1)
            claimed: set[int] = set()
            for _ in range(60):
                start = rng.randrange(n_pages)
                end, most = rng.randrange(start, n_pages + 1), rng.randrange(1, 40)
                open_pages = data - received
                assert made.next_missing(start, end) == min(
                    (page for page in open_pages if start <= page < end), default=end
                )
                first, n = made.claim(start, end, most)
                wanted = sorted(page for page in open_pages - claimed if start <= page < end)
                run = 0
                while run < min(most, len(wanted)) and wanted[run] == wanted[0] + run:
                    run += 1
                assert n == run
                assert not n or first == wanted[0]
                claimed |= set(range(first, first + n)) if n else set()


def test_sparse_tebibyte_costs_neither_time_nor_memory(keeper: Keeper) -> None:
    """Holes cost nothing."""
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.monotonic()
    status = ffi.new("struct status_block *")
    received = mmap.mmap(-1, TIB // PAGE // 8)  # as the status segment's: costs memory where it is touched
    with ffi.from_buffer(received) as words:
        ram = RAMBlock(
            keeper, "huge", used_length=TIB - 5, page_size=PAGE, writable=False,
            extents=((TIB // 2, TIB // 2 + 1), (TIB - 6, TIB - 5)), index=0, status=status,
            received=ffi.cast("uint64_t *", words),
        )  # fmt: skip
        assert ram.pointer.missing_pages == 2
        placed = ffi.new("uint64_t *")
        last = TIB // PAGE - 1
        assert lib.ramblock_place(ram.pointer, last, 1, b"z" * PAGE, placed) == lib.RAMBLOCK_PLACED
        assert lib.ramblock_next_missing(ram.pointer, 0, TIB // PAGE) == TIB // 2 // PAGE
        assert lib.ramblock_place(ram.pointer, TIB // 2 // PAGE, 1, b"z" * PAGE, placed) == lib.RAMBLOCK_PLACED
        assert lib.ramblock_next_missing(ram.pointer, 0, TIB // PAGE) == TIB // PAGE
        ram.free()
    received.close()
    assert time.monotonic() - started < 10.0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 64 << 10
