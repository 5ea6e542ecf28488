"""The status segment's layout: histograms, and the futex by which others wait for progress."""

from __future__ import annotations

import errno
import mmap
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from types import FrameType

import pytest

from core_support import WAIT_S, syscall_of
from pcshare.core import ffi, lib
from support import needs, wait_until

SYS_FUTEX = {"x86_64": "202", "aarch64": "98"}
WAITER = """
import mmap, sys
from pcshare.core import ffi, lib
mapping = mmap.mmap(int(sys.argv[1]), 0, prot=mmap.PROT_READ)
sys.exit(-lib.status_block_wait(ffi.cast("struct status_block *", ffi.from_buffer(mapping)), 7, -1))
"""


@pytest.mark.parametrize(
    ("us", "bucket"),
    [(0, 0), (1, 1), (2, 2), (3, 2), (4, 3), (1023, 10), (1024, 11), (2**30 - 1, 30), (2**30, 31), (2**64 - 1, 31)],
)
def test_bucket_is_log2_of_the_wait(us: int, bucket: int) -> None:
    """G6: bucket i counts waits of [2^(i-1), 2^i) us."""
    assert lib.status_histogram_bucket(us) == bucket


def test_histogram_of_several_threads_loses_nothing() -> None:
    """G6."""
    histogram = ffi.new("struct status_histogram *")
    waits = [list(range(start, 20000, 4)) for start in range(4)]

    def add(mine: list[int]) -> None:
        for us in mine:
            lib.status_histogram_add(histogram, us)

    threads = [threading.Thread(target=add, args=(mine,)) for mine in waits]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(histogram.count) == 20000
    assert list(histogram.count)[:15] == [1] + [2 ** (i - 1) for i in range(1, 15)]
    assert histogram.total_us == sum(range(20000))
    assert histogram.max_us == 19999


def test_wait_returns_at_once_when_the_progress_differs() -> None:
    status = ffi.new("struct status_block *", {"progress_seq": 8})
    assert lib.status_block_wait(status, 7, -1) == 0
    assert lib.status_block_wait(status, 7, 0) == 0


@pytest.mark.parametrize("timeout_ms", [0, 1, 30])
def test_wait_ends_with_its_time(timeout_ms: int) -> None:
    status = ffi.new("struct status_block *")
    assert lib.status_block_wait(status, 0, timeout_ms) == -errno.ETIMEDOUT


def test_notify_changes_the_sequence_across_its_end() -> None:
    status = ffi.new("struct status_block *", {"progress_seq": 2**32 - 1})
    lib.status_block_notify(status)
    assert status.progress_seq == 0


def test_notify_wakes_waiters_of_other_processes_with_read_only_mappings() -> None:
    number = SYS_FUTEX.get(os.uname().machine)
    needs(None if number else "a processor for which this test knows the number of the futex system call")
    assert number
    memfd = os.memfd_create("pcshare-test")
    os.ftruncate(memfd, mmap.PAGESIZE)
    mapping = mmap.mmap(memfd, mmap.PAGESIZE)
    status = ffi.cast("struct status_block *", ffi.from_buffer(mapping))
    status.progress_seq = 7
    readable = os.open(f"/proc/self/fd/{memfd}", os.O_RDONLY)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    waiters = [
        subprocess.Popen([sys.executable, "-c", WAITER, str(readable)], pass_fds=[readable], env=env) for _ in range(2)
    ]
    for waiter in waiters:
        wait_until(lambda pid=waiter.pid: syscall_of(pid) == number, "the waiter waits", WAIT_S)  # type: ignore[misc]
    lib.status_block_notify(status)
    assert [waiter.wait(WAIT_S) for waiter in waiters] == [0, 0]
    os.close(readable)
    os.close(memfd)


@pytest.fixture
def alarm() -> Iterator[None]:
    def ignore(number: int, frame: FrameType | None) -> None:
        """The call is to be interrupted, nothing more."""

    before = signal.signal(signal.SIGALRM, ignore)
    signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("alarm")
def test_a_signal_ends_the_wait() -> None:
    status = ffi.new("struct status_block *")
    assert lib.status_block_wait(status, 0, -1) == -errno.EINTR
