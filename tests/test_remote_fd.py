"""Remote fds: the coordinator's record of a helper's uffd, with nothing believed of what the helper says."""

from __future__ import annotations

import errno
import mmap
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from core_support import WAIT_S, Child, Memory, child, memory, open_uffd
from pcshare.core import ffi, lib
from support import needs

PAGE = mmap.PAGESIZE
BASE = 1 << 30
N_PAGES = 16


def make_block(page_count: int = N_PAGES, page_size: int = PAGE) -> Any:
    return ffi.new("struct ramblock *", {"page_size": page_size, "page_count": page_count})


@contextmanager
def remote_fd(block: Any, uffd: int, maps: list[tuple[int, int, int]], control: int = -1) -> Iterator[Any]:
    """Consumes uffd and control, as remote_fd_new does."""
    rp = ffi.new("struct remote_fd **")
    assert lib.remote_fd_new(rp, block, uffd, control, ffi.new("struct remote_map[]", maps), len(maps), ffi.NULL) == 0
    yield rp[0]
    lib.remote_fd_put(rp[0])


@contextmanager
def remote_of(helper: Child, block: Any) -> Iterator[Any]:
    maps = [(helper.addr, block.page_size * block.page_count, 0)]
    with remote_fd(block, os.dup(helper.uffd), maps) as remote:
        yield remote


@pytest.fixture
def sixteen() -> Iterator[Memory]:
    with memory(N_PAGES) as made:
        yield made


@pytest.mark.parametrize(
    ("claim", "maps"),
    [
        ("no map", []),
        ("empty", [(BASE, 0, 0)]),
        ("part of a page", [(BASE, PAGE + 1, 0)]),
        ("unaligned address", [(BASE + 8, PAGE, 0)]),
        ("address zero", [(0, PAGE, 0)]),
        ("longer than the block", [(BASE, (N_PAGES + 1) * PAGE, 0)]),
        ("beyond the block", [(BASE, PAGE, N_PAGES)]),
        ("page far beyond", [(BASE, PAGE, 2**63)]),
        ("round the end of the address space", [(2**64 - PAGE, 2 * PAGE, 0)]),
        ("overlapping", [(BASE, 2 * PAGE, 0), (BASE + PAGE, 2 * PAGE, 4)]),
        ("inside another", [(BASE, 8 * PAGE, 0), (BASE + PAGE, PAGE, 1)]),
        ("too many", [(BASE + 2 * i * PAGE, PAGE, 0) for i in range(17)]),
    ],
)
def test_map_that_cannot_be_is_refused_and_its_fds_closed(claim: str, maps: list[tuple[int, int, int]]) -> None:
    """P4, P7."""
    uffd = open_uffd(0)
    control, peer = socket.socketpair()
    rp = ffi.new("struct remote_fd **")
    rows = ffi.new("struct remote_map[]", maps or 1)
    rc = lib.remote_fd_new(rp, make_block(), uffd, control.detach(), rows, len(maps), ffi.NULL)
    assert (rc, rp[0]) == (-errno.EINVAL, ffi.NULL), claim
    assert peer.recv(1) == b""  # hung up
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(uffd)
    peer.close()


def test_address_becomes_the_page_that_the_map_shows() -> None:
    """C2, C3: also with several maps; outside of them it is -EFAULT."""
    page = ffi.new("uint64_t *")
    maps = [(BASE, 4 * PAGE, 8), (BASE + 4 * PAGE, 2 * PAGE, 0), (BASE + 100 * PAGE, PAGE, 15)]
    with remote_fd(make_block(), open_uffd(0), maps) as remote:
        for client_addr, expected in [
            (BASE, 8),
            (BASE + PAGE - 1, 8),
            (BASE + 4 * PAGE - 1, 11),
            (BASE + 4 * PAGE, 0),
            (BASE + 100 * PAGE + 5, 15),
        ]:
            assert lib.remote_fd_page(remote, client_addr, page) == 0
            assert page[0] == expected
        for client_addr in (0, BASE - 1, BASE + 6 * PAGE, BASE + 101 * PAGE, 2**64 - 1):
            assert lib.remote_fd_page(remote, client_addr, page) == -errno.EFAULT


def test_fds_close_with_the_last_reference() -> None:
    """P7, C5."""
    before = len(os.listdir("/proc/self/fd"))
    control, peer = socket.socketpair()
    with remote_fd(make_block(), open_uffd(0), [(BASE, PAGE, 0)], control.detach()) as remote:
        lib.remote_fd_put(lib.remote_fd_get(remote))
        peer.setblocking(False)
        with pytest.raises(BlockingIOError):
            peer.recv(1)
    assert peer.recv(1) == b""
    peer.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_wake_ends_the_wait_for_that_page(sixteen: Memory) -> None:
    """E4."""
    with child(sixteen.memfd, sixteen.length) as helper, remote_of(helper, make_block()) as remote:
        helper.tell(f"touch {3 * PAGE}")
        page = ffi.new("uint64_t *")
        assert lib.remote_fd_page(remote, helper.message().fault_addr, page) == 0
        assert page[0] == 3
        sixteen.place(3, b"x" * PAGE)
        assert lib.remote_fd_wake(remote, 3) == 0
        assert helper.answer() == b"x"


def test_wake_reaches_each_map_that_shows_the_page(sixteen: Memory) -> None:
    """E4: one that fails does not keep the others from it."""
    with child(sixteen.memfd, sixteen.length) as helper:
        # The first map lies where WAKE is refused: beyond the address space.
        maps = [(2**63, PAGE, 3), (helper.addr, sixteen.length, 0)]
        with remote_fd(make_block(), os.dup(helper.uffd), maps) as remote:
            helper.tell(f"touch {3 * PAGE}")
            helper.message()
            sixteen.place(3, b"x" * PAGE)
            assert lib.remote_fd_wake(remote, 3) == -errno.EINVAL
            assert helper.answer() == b"x"


def test_wake_of_a_page_that_no_map_shows_does_nothing() -> None:
    with remote_fd(make_block(), open_uffd(0), [(BASE, PAGE, 0)]) as remote:
        assert lib.remote_fd_wake(remote, 1) == 0


def test_wake_of_a_process_that_is_gone_is_no_error(sixteen: Memory) -> None:
    """P4."""
    with child(sixteen.memfd, sixteen.length) as helper, remote_of(helper, make_block()) as remote:
        helper.process.kill()
        helper.process.wait()
        assert lib.remote_fd_wake(remote, 0) == 0


def test_poison_is_sigbus_at_exactly_that_page(sixteen: Memory) -> None:
    """T10, P3: the page before it is served as ever."""
    with child(sixteen.memfd, sixteen.length) as helper, remote_of(helper, make_block()) as remote:
        sixteen.place(2, b"x" * PAGE)
        assert lib.remote_fd_poison(remote, 3) == 0
        assert lib.remote_fd_poison(remote, 3) == 0  # poisoned already
        helper.tell(f"touch {3 * PAGE - 1}")
        assert helper.answer() == b"x"
        helper.tell(f"touch {3 * PAGE}")
        assert helper.process.wait(WAIT_S) == -signal.SIGBUS


def test_poison_leaves_a_mapped_page_alone(sixteen: Memory) -> None:
    """T10."""
    with child(sixteen.memfd, sixteen.length) as helper, remote_of(helper, make_block()) as remote:
        sixteen.place(3, b"x" * PAGE)
        for _ in range(2):
            helper.tell(f"touch {3 * PAGE}")
            assert helper.answer() == b"x"
            assert lib.remote_fd_poison(remote, 3) == 0


def test_unpoison_after_placing_makes_the_page_readable(sixteen: Memory) -> None:
    """T10: placing alone does not lift it; CONTINUE does."""
    with child(sixteen.memfd, sixteen.length) as helper, remote_of(helper, make_block()) as remote:
        assert lib.remote_fd_poison(remote, 3) == 0
        sixteen.place(3, b"x" * PAGE)
        assert lib.remote_fd_unpoison(remote, 3) == 0
        assert lib.remote_fd_unpoison(remote, 3) == 0  # mapped by now
        helper.tell(f"touch {3 * PAGE}")
        assert helper.answer() == b"x"


def test_unpoison_of_an_absent_page_says_so_and_of_no_mapping_is_no_error(sixteen: Memory) -> None:
    with child(sixteen.memfd, sixteen.length) as helper, remote_of(helper, make_block()) as remote:
        assert lib.remote_fd_unpoison(remote, 3) == -errno.EFAULT
        helper.tell("unmap")
        assert helper.answer() == b"done"
        assert lib.remote_fd_unpoison(remote, 3) == 0


def test_own_uffd_is_never_poisoned(sixteen: Memory) -> None:
    with child(sixteen.memfd, sixteen.length) as helper, remote_of(helper, make_block()) as remote:
        remote.is_own = 1
        assert lib.remote_fd_poison(remote, 3) == 0
        sixteen.place(3, b"x" * PAGE)
        helper.tell(f"touch {3 * PAGE}")
        assert helper.answer() == b"x"


def test_probe_of_a_living_process_changes_nothing(sixteen: Memory) -> None:
    """Absent and poisoned pages stay what they are."""
    with child(sixteen.memfd, sixteen.length) as helper, remote_of(helper, make_block()) as remote:
        assert lib.remote_fd_probe(remote) == 0
        assert lib.remote_fd_poison(remote, 0) == 0
        sixteen.place(0, b"x" * PAGE)
        assert lib.remote_fd_probe(remote) == 0
        assert os.lseek(sixteen.memfd, PAGE, os.SEEK_HOLE) == PAGE
        helper.tell(f"touch {PAGE}")
        assert helper.message().fault_addr // PAGE == helper.addr // PAGE + 1
        assert lib.remote_fd_probe(remote) == 0
        sixteen.place(1, b"y" * PAGE)
        assert lib.remote_fd_wake(remote, 1) == 0
        assert helper.answer() == b"y"
        helper.tell("touch 0")
        assert helper.process.wait(WAIT_S) == -signal.SIGBUS


def test_probe_finds_a_process_that_was_killed(sixteen: Memory) -> None:
    with child(sixteen.memfd, sixteen.length) as helper, remote_of(helper, make_block()) as remote:
        helper.process.kill()
        helper.process.wait()
        assert lib.remote_fd_probe(remote) == -errno.ESRCH


def test_probe_finds_a_process_that_became_another_program(sixteen: Memory) -> None:
    """T17: same pid, silent uffd; the control socket's end says when to look."""
    with child(sixteen.memfd, sixteen.length) as helper, remote_of(helper, make_block()) as remote:
        helper.tell("exec")
        assert helper.answer() == b""
        assert helper.process.poll() is None
        assert lib.remote_fd_probe(remote) == -errno.ESRCH
        helper.process.kill()


def test_probe_of_an_unmapped_range_says_that_the_process_lives(sixteen: Memory) -> None:
    with child(sixteen.memfd, sixteen.length) as helper, remote_of(helper, make_block()) as remote:
        helper.tell("unmap")
        assert helper.answer() == b"done"
        assert lib.remote_fd_probe(remote) == 0


def test_huge_pages_are_probed_and_poisoned_whole() -> None:
    """T10, T11: a mapping of 2 MiB pages that has none yet."""
    huge = 2 << 20
    needs(None if Path("/sys/kernel/mm/hugepages/hugepages-2048kB").exists() else "2 MiB pages")
    memfd = os.memfd_create("pcshare-test", os.MFD_HUGETLB | os.MFD_HUGE_2MB)
    os.ftruncate(memfd, 2 * huge)
    features = lib.UFFD_FEATURE_BIT_MISSING_HUGETLBFS
    block = make_block(2, huge)
    with child(memfd, 2 * huge, huge, features) as helper, remote_of(helper, block) as remote:
        page = ffi.new("uint64_t *")
        assert lib.remote_fd_page(remote, helper.addr + huge + 5, page) == 0
        assert page[0] == 1
        assert lib.remote_fd_probe(remote) == 0
        assert lib.remote_fd_poison(remote, 1) == 0
        helper.tell(f"touch {huge + 4096}")
        assert helper.process.wait(WAIT_S) == -signal.SIGBUS
        assert lib.remote_fd_probe(remote) == -errno.ESRCH
    os.close(memfd)
