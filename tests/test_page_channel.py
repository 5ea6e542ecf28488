"""Page channels: files, zeros, filters. What needs callbacks and threads is in c/page_channel_test.c, a case a run."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from core_support import WAIT_S, compile_c
from pcshare.core import ffi, lib
from support import needs

CANNOT = 77
NOWAIT = "temporary files on a file system that can read without waiting"
NOT_WITH_ASAN = "no_reader_can_start"  # it cannot live without address space
CORE_FILES = ["page_channel.c", "page_channel_file.c", "page_channel_filter.c", "thread.c", "uffd.c"]
SANITIZERS = {"plain": None, "asan": "address,undefined", "tsan": "thread"}
CASES = (
    "reads",
    "tail",
    "shrunk",
    "read_error",
    "blocked_demand_holds_up_no_other",
    "readers_are_limited_and_take_no_signals",
    "free_cancels_what_waits_and_ends_what_is_read",
    "no_reader_can_start",
    "free_while_requests_are_made",
    "zero",
    "delays_run_side_by_side",
    "rate_of_stream",
    "rate_of_demand",
    "demand_waits_for_no_stream",
    "error_while_its_file_exists",
    "filter_without_work_is_no_hindrance",
    "free_cancels_what_is_delayed",
    "filters_of_filters",
    "filter_with_an_error_needs_its_file",
)


def run_program(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """With its addresses laid out plainly: the thread sanitizer does not get along with much randomness."""
    command = ["setarch", "-R", str(program), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S * 2, check=False)


@pytest.fixture(scope="module")
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("c") / f"page_channel_test_{request.param}"
    return compile_c(target, "page_channel_test.c", CORE_FILES, SANITIZERS[request.param])


@pytest.mark.parametrize(
    ("program", "case"),
    [(build, case) for build in SANITIZERS for case in CASES if (build, case) != ("asan", NOT_WITH_ASAN)],
    indirect=["program"],
)
def test_case_holds(program: Path, case: str, tmp_path: Path) -> None:
    """D4 (demand waits for no stream), P1 (no invented zeros), P3 and P7 (each request answered, no thread left)."""
    ran = run_program(program, case, str(tmp_path / "source"))
    needs(ran.stderr.strip() if ran.returncode == CANNOT else None)
    assert (ran.returncode, ran.stderr) == (0, "")


@pytest.mark.parametrize("program", ["plain"], indirect=True)
def test_every_case_of_the_program_is_run(program: Path) -> None:
    assert tuple(run_program(program).stdout.split()) == CASES


@contextmanager
def file_channel(path: Path, size: int) -> Iterator[Any]:
    channelp = ffi.new("struct page_channel **")
    assert lib.page_channel_file_new(channelp, os.open(path, os.O_RDONLY | os.O_CLOEXEC), size) == 0
    yield channelp[0]
    lib.page_channel_free(channelp[0])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(os.urandom(10000))
    return path


def test_what_is_cached_is_read_at_once(source: Path) -> None:
    content = source.read_bytes()
    buffer = ffi.new("uint8_t[4096]")
    with file_channel(source, len(content)) as channel:
        rc = lib.page_channel_read_now(channel, buffer, 4096, 4096)
        needs(None if rc != lib.PAGE_CHANNEL_WOULD_BLOCK else NOWAIT)
        assert rc == lib.PAGE_CHANNEL_DONE
        assert bytes(buffer) == content[4096:8192]


def test_tail_of_the_last_page_is_zeros_also_when_the_file_has_grown(source: Path) -> None:
    """P1: used_length is the size at the start; what was appended since is not part of the block."""
    content = source.read_bytes()
    with source.open("ab") as file:
        file.write(b"later" * 1000)
    buffer = ffi.new("uint8_t[4096]", b"\xff" * 4096)
    with file_channel(source, len(content)) as channel:
        rc = lib.page_channel_read_now(channel, buffer, 4096, 8192)
        needs(None if rc != lib.PAGE_CHANNEL_WOULD_BLOCK else NOWAIT)
        assert rc == lib.PAGE_CHANNEL_DONE
        assert bytes(buffer) == content[8192:].ljust(4096, b"\0")
        assert lib.page_channel_read_now(channel, buffer, 4096, 12288) == -errno.EINVAL


def test_part_of_a_page_is_never_passed_off_as_the_whole(source: Path) -> None:
    """P1: the file shrank under us; read_now must not answer, the readers find out why."""
    with file_channel(source, 10000) as channel:
        os.truncate(source, 5000)
        for offset in (4096, 8192):
            assert lib.page_channel_read_now(channel, ffi.new("uint8_t[4096]"), 4096, offset) != lib.PAGE_CHANNEL_DONE


def test_file_channel_owns_its_fd(source: Path) -> None:
    """P7."""
    before = os.listdir("/proc/self/fd")
    with file_channel(source, 10000):
        assert len(os.listdir("/proc/self/fd")) == len(before) + 1
    assert os.listdir("/proc/self/fd") == before


def test_source_of_holes_is_zeros() -> None:
    channelp = ffi.new("struct page_channel **")
    assert lib.page_channel_zero_new(channelp) == 0
    buffer = ffi.new("uint8_t[4096]", b"\xff" * 4096)
    assert lib.page_channel_read_now(channelp[0], buffer, 4096, 1 << 40) == lib.PAGE_CHANNEL_DONE
    assert bytes(buffer) == bytes(4096)
    lib.page_channel_free(channelp[0])


@pytest.mark.parametrize(("delay_us", "rate", "error"), [(1, 0, 0), (0, 1, 0), (0, 0, errno.EIO)])
def test_filter_with_work_answers_nothing_out_of_turn(delay_us: int, rate: int, error: int, tmp_path: Path) -> None:
    channelp = ffi.new("struct page_channel **")
    assert lib.page_channel_zero_new(channelp) == 0
    path = str(tmp_path / "fail").encode()
    assert lib.page_channel_filter_new(channelp, channelp[0], delay_us, rate, error, path) == 0
    rc = lib.page_channel_read_now(channelp[0], ffi.new("uint8_t[16]"), 16, 0)
    assert rc == lib.PAGE_CHANNEL_WOULD_BLOCK
    lib.page_channel_free(channelp[0])


def test_freeing_nothing_is_fine() -> None:
    lib.page_channel_free(ffi.NULL)
