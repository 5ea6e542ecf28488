"""status: the segment's writer and its reader, the life and death of who writes it, and what stays behind."""

from __future__ import annotations

import errno
import json
import mmap
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from pcshare import runtime, status
from pcshare.core import ffi, lib
from pcshare.errors import AccessRefused, LimitReached, NameInUse, NoSuchCoordinator, PcshareError, VersionMismatch
from support import suspend

ISSUE_FIELDS = {"name", "pid", "state", "reason", "blocks", "helpers"}
BLOCK_FIELDS = [
    "idstr",
    "used_length",
    "page_size",
    "writable",
    "state",
    "received_pages",
    "hole_pages",
    "page_count",
    "demand_pages",
    "stream_pages",
    "zero_pages",
    "foreign_pages",
]
HELPER_FIELDS = ["pid", "uid", "faults", "waiting", "blocktime_us"]

# A process that writes a segment, listens on its socket, says so, and waits to be ended.
WRITER = """
import ctypes, os, signal, socket, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
from pcshare import runtime, status
name = sys.argv[1]
path = runtime.socket_path(name, create_dir=True)
writer = status.SegmentWriter(name, path)
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
    listener.bind(str(path))
    if "silent" not in sys.argv:
        listener.listen()
    slot = writer.helper_slot(0)
    slot.state, slot.pid = 1, os.getppid()
    print("ready", flush=True)
    sys.stdin.read()
"""

MARK = (0x54534350, lib.STATUS_VERSION)  # how a segment begins


@pytest.fixture
def name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A name that nobody has; nothing may be left under it."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    name = f"test-{uuid.uuid4().hex[:8]}"
    fds = set(os.listdir("/proc/self/fd"))
    yield name
    path = runtime.shm_path(name)
    left = path.exists()
    path.unlink(missing_ok=True)
    assert not left, f"{path} was left behind"
    assert set(os.listdir("/proc/self/fd")) == fds


@pytest.fixture
def writer(name: str) -> Iterator[status.SegmentWriter]:
    writer = status.SegmentWriter(name, "/nowhere/x.sock")
    yield writer
    writer.close()


class Process:
    """A writer in a process of its own."""

    def __init__(self, name: str, *arguments: str) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, "-c", WRITER, name, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.popen.stdout is not None
        assert self.popen.stdout.readline() == "ready\n"

    def kill(self) -> None:
        self.popen.kill()
        self.popen.communicate()


@pytest.fixture
def process(name: str) -> Iterator[Process]:
    process = Process(name)
    yield process
    process.kill()
    status.remove_leftovers(name)


def _add_block(writer: status.SegmentWriter, index: int, idstr: str, state: int) -> None:
    slot = writer.block_slot(index)
    slot.idstr = idstr.encode()
    slot.page_count, slot.page_size, slot.used_length = 100, 4096, 100 * 4096 - 5
    slot.in_use = 1
    writer.set_state(state, index)


def test_report_has_the_fields_that_are_promised(writer: status.SegmentWriter) -> None:
    _add_block(writer, 0, "data", lib.STATUS_STATE_RUNNING)
    writer.block_slot(0).received_pages = 25
    writer.block_slot(0).hole_pages = 5
    helper = writer.helper_slot(3)
    helper.state, helper.pid, helper.uid, helper.faults, helper.waiting = lib.STATUS_HELPER_ATTACHED, 77, 5, 9, 2
    lib.status_histogram_add(ffi.addressof(helper, "blocktime"), 100)
    writer.header.stream_mode, writer.header.stream_rate = lib.STATUS_STREAM_RATE, 1 << 20
    report = status.read_status(writer.name)
    told = json.loads(json.dumps(report.to_json()))
    assert told.keys() >= ISSUE_FIELDS
    assert set(BLOCK_FIELDS) <= told["blocks"][0].keys()
    assert set(HELPER_FIELDS) <= told["helpers"][0].keys()
    assert (told["name"], told["pid"], told["state"], told["reason"]) == (writer.name, os.getpid(), "RUNNING", "")
    assert (told["stream"], told["stream_rate"], told["socket"]) == ("rate", 1 << 20, "/nowhere/x.sock")
    assert told["blocks"][0]["used_length"] == 100 * 4096 - 5
    assert told["helpers"] == [
        {
            "pid": 77,
            "uid": 5,
            "state": "attached",
            "block": "data",
            "faults": 9,
            "waiting": 2,
            "demand_pages": 0,
            "blocktime_us": {"p50": 96.0, "p99": 100, "max": 100},
            "exporter": False,
        }
    ]
    assert report.blocks[0].fraction == 0.3


@pytest.mark.parametrize(
    ("states", "summary"),
    [
        ([], "NONE"),
        (["END", "END"], "END"),
        (["END", "RUNNING"], "RUNNING"),
        (["RUNNING", "PAUSED", "END"], "PAUSED"),
        (["LISTENING", "RUNNING"], "RUNNING"),
        (["ADVISE", "DISCARD", "LISTENING"], "LISTENING"),
        (["NONE", "END"], "NONE"),
    ],
)
def test_state_of_the_whole_is_what_most_needs_to_be_seen(states: list[str], summary: str) -> None:
    assert status.summary_state(states) == summary


def test_names_of_states_are_the_headers() -> None:
    for prefix, names in (
        ("STATUS_STATE_", status.STATE_NAMES),
        ("STATUS_STREAM_", status.STREAM_NAMES),
        ("STATUS_HELPER_", status.HELPER_STATE_NAMES),
    ):
        found = {getattr(lib, key): key.removeprefix(prefix) for key in dir(lib) if key.startswith(prefix)}
        assert [found[value] for value in range(len(names))] == [text.upper() for text in names]
        assert len(found) == len(names)


def test_one_failed_block_does_not_make_the_others_look_paused(writer: status.SegmentWriter) -> None:
    _add_block(writer, 0, "good", lib.STATUS_STATE_RUNNING)
    _add_block(writer, 1, "bad", lib.STATUS_STATE_PAUSED)
    writer.set_text("source failed: EIO", 1)
    report = status.read_status(writer.name)
    assert [block.state for block in report.blocks] == ["RUNNING", "PAUSED"]
    assert [block.reason for block in report.blocks] == ["", "source failed: EIO"]
    assert (report.state, report.reason) == ("PAUSED", "bad: source failed: EIO")
    assert writer.header.state == lib.STATUS_STATE_PAUSED


def test_state_change_is_told_to_who_waits_for_progress(writer: status.SegmentWriter) -> None:
    _add_block(writer, 0, "data", lib.STATUS_STATE_RUNNING)
    seen = writer.block_slot(0).progress_seq
    writer.set_state(lib.STATUS_STATE_END, 0)
    assert lib.status_block_wait(writer.block_slot(0), seen, 0) == 0


def test_removed_block_and_helper_are_gone_from_the_report(writer: status.SegmentWriter) -> None:
    _add_block(writer, 0, "data", lib.STATUS_STATE_PAUSED)
    writer.helper_slot(0).state = lib.STATUS_HELPER_ATTACHED
    writer.clear_block(0)
    writer.clear_helper(0)
    report = status.read_status(writer.name)
    assert (report.blocks, report.helpers, report.state) == ((), (), "NONE")
    assert writer.header.state == lib.STATUS_STATE_NONE


def test_long_text_is_cut_between_characters(writer: status.SegmentWriter) -> None:
    writer.set_text("x" + "\u00e4" * 500)
    assert status.read_status(writer.name).reason == "x" + "\u00e4" * 127
    writer.set_text("short")
    assert status.read_status(writer.name).reason == "short"
    assert writer.header.text_seq == 4


def test_text_of_a_writer_that_stopped_in_the_middle_is_still_told(writer: status.SegmentWriter) -> None:
    writer.set_text("source failed")
    writer.header.text_seq += 1
    assert status.read_status(writer.name).reason == "source failed"
    writer.set_text("going on")
    assert writer.header.text_seq % 2 == 0


# --- numbers --------------------------------------------------------------------------------------


def test_quantiles_lie_inside_their_bucket_and_max_is_exact() -> None:
    """G6."""
    histogram = ffi.new("struct status_histogram *")
    for us in [10] * 98 + [1000, 5001]:
        lib.status_histogram_add(histogram, us)
    buckets = tuple(histogram.count)
    assert 8 <= status.blocktime_quantile(buckets, 0.5, histogram.max_us) < 16
    assert 512 <= status.blocktime_quantile(buckets, 0.99, histogram.max_us) <= 1024
    assert status.blocktime_quantile(buckets, 1.0, histogram.max_us) == 5001
    assert histogram.max_us == 5001


def test_quantile_never_exceeds_the_longest_wait() -> None:
    histogram = ffi.new("struct status_histogram *")
    lib.status_histogram_add(histogram, 9)
    assert status.blocktime_quantile(tuple(histogram.count), 0.99, 9) == 9


def test_quantiles_at_the_ends() -> None:
    assert status.blocktime_quantile((0,) * 32, 0.99, 0) == 0.0
    assert status.blocktime_quantile((5,) + (0,) * 31, 0.5, 0) == 0
    longest = 1 << 40
    assert 1 << 30 <= status.blocktime_quantile((0,) * 31 + (2,), 0.5, longest) <= longest


# --- memory ---------------------------------------------------------------------------------------


def _allocated_bytes(name: str) -> int:
    return runtime.shm_path(name).stat().st_blocks * 512


def test_bitmap_is_zeroed_writable_and_read_by_others(writer: status.SegmentWriter) -> None:
    _add_block(writer, 0, "data", lib.STATUS_STATE_RUNNING)
    region = writer.add_bitmap(100, [(0, 100)])
    writer.block_slot(0).bitmap_offset = region.offset
    assert region.offset % mmap.PAGESIZE == 0
    assert bytes(ffi.buffer(region.address, 16)) == bytes(16)
    region.address[0] = 0b101
    region.address[1] = 1 << 35
    with status.StatusReader(writer.name) as reader:
        content = reader.bitmap(reader.report().blocks[0])
    assert [page for page in range(100) if content[page // 8] >> page % 8 & 1] == [0, 2, 99]


def test_bitmap_of_a_sparse_terabyte_costs_only_where_there_is_data(writer: status.SegmentWriter) -> None:
    before = _allocated_bytes(writer.name)
    writer.add_bitmap(1 << 28, [(0, 10), (5, 32768), (1 << 27, (1 << 27) + 1), ((1 << 28) - 1, 1 << 28), (7, 7)])
    assert _allocated_bytes(writer.name) - before == 3 * mmap.PAGESIZE
    assert runtime.shm_path(writer.name).stat().st_size == status.TABLES_BYTES + (1 << 25)


def test_reading_makes_nothing_real(writer: status.SegmentWriter) -> None:
    _add_block(writer, 0, "data", lib.STATUS_STATE_RUNNING)
    writer.block_slot(0).page_count = 1 << 28
    writer.block_slot(0).bitmap_offset = writer.add_bitmap(1 << 28, []).offset
    before = _allocated_bytes(writer.name)
    with status.StatusReader(writer.name) as reader:
        assert not any(reader.bitmap(reader.report().blocks[0]))
    assert _allocated_bytes(writer.name) == before


def test_freed_bitmap_gives_its_memory_back_and_the_file_does_not_shrink(writer: status.SegmentWriter) -> None:
    before = _allocated_bytes(writer.name)
    region = writer.add_bitmap(1 << 20, [(0, 1 << 20)])
    size = runtime.shm_path(writer.name).stat().st_size
    assert _allocated_bytes(writer.name) > before
    writer.free_bitmap(region.offset)
    assert _allocated_bytes(writer.name) == before
    assert runtime.shm_path(writer.name).stat().st_size == size
    assert writer.add_bitmap(64, []).offset >= size  # a place is never given out twice


def test_no_room_is_an_error_and_not_a_signal(name: str) -> None:
    """A file-size limit stands in for a full /dev/shm: both fail the same call."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    old_handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (status.TABLES_BYTES + mmap.PAGESIZE, limits[1]))
    try:
        with closing(status.SegmentWriter(name, "/nowhere/x.sock")) as writer:
            writer.add_bitmap(64, [(0, 64)])
            with pytest.raises(PcshareError) as caught:
                writer.add_bitmap(64, [(0, 64)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, old_handler)
    assert caught.value.errno == errno.EFBIG
    assert name in caught.value.message


FULL_SHM = """
import os, sys
from pcshare import status
from pcshare.errors import PcshareError
writer = status.SegmentWriter(sys.argv[1], "/nowhere/x.sock")
free = os.statvfs("/dev/shm")
assert free.f_blocks * free.f_frsize == 1 << 20, "not the small one"
try:
    for index in range(1000):
        writer.add_bitmap(1 << 20, [(0, 1 << 20)])
except PcshareError as error:
    bitmaps = index
    print(error)
try:
    for index in range(4096):
        writer.helper_slot(index).state = 1
except PcshareError as error:
    print(error.errno, bitmaps, index, len(status.read_status(sys.argv[1]).helpers))
writer.close()
"""


def _can_mount() -> bool:
    command = ["unshare", "--mount", "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", "/dev/shm"]
    return os.geteuid() == 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not _can_mount(), reason="a small /dev/shm of its own cannot be mounted by this user")
def test_full_shm_is_an_error_and_not_sigbus(name: str) -> None:
    unshare = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"', "sh"]
    done = subprocess.run(
        [*unshare, sys.executable, "-c", FULL_SHM, name], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    message, numbers = done.stdout.splitlines()
    assert "remount,size=" in message
    code, bitmaps, helpers, reported = map(int, numbers.split())
    assert code == errno.ENOSPC
    assert bitmaps > 0
    assert helpers == reported


def test_slots_have_their_limits(writer: status.SegmentWriter) -> None:
    for index in (-1, lib.STATUS_BLOCKS_MAX):
        with pytest.raises(LimitReached, match=str(lib.STATUS_BLOCKS_MAX)):
            writer.block_slot(index)
    for index in (-1, lib.STATUS_HELPERS_MAX):
        with pytest.raises(LimitReached, match=str(lib.STATUS_HELPERS_MAX)):
            writer.helper_slot(index)
    writer.block_slot(lib.STATUS_BLOCKS_MAX - 1).in_use = 1
    writer.helper_slot(lib.STATUS_HELPERS_MAX - 1).state = 1
    report = status.read_status(writer.name)
    assert report.blocks[0].index == lib.STATUS_BLOCKS_MAX - 1
    assert report.helpers[0].slot == lib.STATUS_HELPERS_MAX - 1


def test_fd_for_helpers_cannot_write(writer: status.SegmentWriter) -> None:
    with pytest.raises(PermissionError):
        mmap.mmap(writer.fd, mmap.PAGESIZE)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.write(writer.fd, b"x")
    assert not os.get_inheritable(writer.fd)


@pytest.mark.parametrize(("shared", "mode"), [(False, 0o600), (True, 0o644)])
def test_mode_says_who_may_read_whatever_the_umask(name: str, shared: bool, mode: int) -> None:
    old_umask = os.umask(0o077 if shared else 0)
    try:
        writer = status.SegmentWriter(name, "/nowhere/x.sock", shared=shared)
    finally:
        os.umask(old_umask)
    assert runtime.shm_path(name).stat().st_mode & 0o777 == mode
    writer.close()


def test_close_is_idempotent_and_leaves_the_name_to_who_took_it_over(writer: status.SegmentWriter) -> None:
    path = runtime.shm_path(writer.name)
    path.unlink()
    path.write_bytes(b"another's")
    writer.close()
    writer.close()
    assert path.read_bytes() == b"another's"
    path.unlink()
    with pytest.raises(ValueError, match="closed"):
        writer.block_slot(0)


def test_close_without_unlink_leaves_the_report(name: str) -> None:
    writer = status.SegmentWriter(name, "/nowhere/x.sock")
    _add_block(writer, 0, "data", lib.STATUS_STATE_RUNNING)
    writer.close(unlink=False)
    report = status.read_status(name)
    assert (report.alive, report.state) == (False, "RUNNING")
    assert status.remove_leftovers(name) is not None


# --- what is no segment ---------------------------------------------------------------------------


def test_unknown_name_is_told() -> None:
    with pytest.raises(NoSuchCoordinator, match="nobody-has-this-name") as caught:
        status.read_status("nobody-has-this-name")
    assert caught.value.errno == errno.ENOENT


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "ends at byte 0"),
        (b"PCST\1\0\0\0", "ends at byte 8"),
        (bytes(8192), "just starting"),
        (b"GARBAGE!" * 1024, "not 0x54534350"),
        (struct.pack("<IIQQQII", *MARK, 2**63, 0, 0, 2**31, 2**31) + bytes(8192), "do not lie inside"),
        (struct.pack("<IIQQQII", *MARK, 16384, 4096, 8192, 1, 1) + bytes(8192), "bytes of 16384"),
    ],
)
def test_file_that_is_no_segment_is_refused_with_the_cure(name: str, content: bytes, told: str) -> None:
    path = runtime.shm_path(name)
    path.write_bytes(content)
    with pytest.raises(PcshareError, match=told) as caught:
        status.read_status(name)
    assert str(path) in (caught.value.hint or "")
    path.unlink()


def test_truncated_segment_is_refused(writer: status.SegmentWriter) -> None:
    os.truncate(runtime.shm_path(writer.name), status.HELPERS_OFFSET)
    with pytest.raises(PcshareError, match="bytes of"):
        status.read_status(writer.name)


def test_other_version_is_refused_with_both_numbers(writer: status.SegmentWriter) -> None:
    writer.header.version = 999
    with pytest.raises(VersionMismatch, match=f"999.*{lib.STATUS_VERSION}"):
        status.read_status(writer.name)


def test_symlink_is_not_followed(name: str, tmp_path: Path) -> None:
    runtime.shm_path(name).symlink_to(tmp_path / "x")
    with pytest.raises(PcshareError, match="cannot read"):
        status.read_status(name)
    runtime.shm_path(name).unlink()


@pytest.mark.skipif(os.geteuid() != 0, reason="changing the user needs root")
def test_segment_of_another_user_is_refused(writer: status.SegmentWriter) -> None:
    os.seteuid(65534)
    try:
        with pytest.raises(AccessRefused, match="another user"):
            status.read_status(writer.name)
        refusal = status.name_in_use(writer.name)
    finally:
        os.seteuid(0)
    assert "another user" in refusal.message


# --- life and death -------------------------------------------------------------------------------


def test_living_coordinator_is_alive_also_when_stopped(process: Process, name: str) -> None:
    report = status.read_status(name)
    assert (report.alive, report.stopped, report.pid) == (True, False, process.popen.pid)
    suspend(process.popen.pid)
    report = status.read_status(name)
    assert (report.alive, report.stopped) == (True, True)
    assert status.leftovers(name) is None


def test_killed_coordinator_is_dead_also_as_a_zombie(process: Process, name: str) -> None:
    process.popen.kill()
    os.waitid(os.P_PID, process.popen.pid, os.WEXITED | os.WNOWAIT)
    assert not status.read_status(name).alive
    assert status.leftovers(name) is not None
    process.kill()
    assert not status.read_status(name).alive


def test_other_process_of_the_same_pid_is_not_the_coordinator(writer: status.SegmentWriter, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "x.sock"))
        listener.listen()
        writer.header.socket_path = os.fsencode(tmp_path / "x.sock")
        assert status.read_status(writer.name).alive
        writer.header.pid_start_ticks += 1
        assert not status.read_status(writer.name).alive


def test_process_that_does_not_listen_is_not_alive_but_its_name_is_taken(name: str) -> None:
    process = Process(name, "silent")
    assert not status.read_status(name).alive
    assert status.in_use(name)
    assert status.leftovers(name) is None
    with pytest.raises(NameInUse, match="runs already"):
        status.remove_leftovers(name)
    process.kill()
    status.remove_leftovers(name)


def test_name_of_a_living_coordinator_is_refused(process: Process, name: str) -> None:
    with pytest.raises(NameInUse) as caught:
        status.SegmentWriter(name, "/nowhere/x.sock")
    assert f"runs already, pid {process.popen.pid}" in caught.value.message
    assert f"pcshare stop {name}" in (caught.value.hint or "")
    assert status.read_status(name).alive


def test_name_of_a_dead_coordinator_is_refused_and_can_be_cleared(process: Process, name: str) -> None:
    pid = process.popen.pid
    process.kill()
    with pytest.raises(NameInUse) as caught:
        status.SegmentWriter(name, "/nowhere/x.sock")
    assert f"(pid {pid}) died and left" in caught.value.message
    assert "--replace" in (caught.value.hint or "")
    removed = status.remove_leftovers(name)
    assert removed is not None
    assert removed.paths == (runtime.shm_path(name), runtime.socket_path(name))
    assert removed.living_helpers == (os.getpid(),)
    assert not any(path.exists() for path in removed.paths)
    assert status.remove_leftovers(name) is None
    status.SegmentWriter(name, "/nowhere/x.sock").close()


def test_living_coordinator_is_not_taken_apart(process: Process, name: str) -> None:
    with pytest.raises(NameInUse, match="runs already"):
        status.remove_leftovers(name)
    assert status.read_status(name).alive


def test_leftovers_that_are_no_segment_are_cleared_too(name: str) -> None:
    runtime.shm_path(name).write_bytes(b"half a seg")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(runtime.socket_path(name, create_dir=True)))
    found = status.leftovers(name)
    assert found is not None
    assert (found.pid, len(found.paths)) == (0, 2)
    assert status.remove_leftovers(name) == found
    assert status.leftovers(name) is None
