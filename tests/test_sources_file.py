"""Opening real files and empty blocks: lengths, extents, arrays, page channels, and every refusal."""

from __future__ import annotations

import ctypes
import errno
import os
import random
import re
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pcshare.errors import SourceError, UsageError
from pcshare.extents import HOLE_BYTES_MIN
from pcshare.sources import ArrayDescription, FilterSpec, OpenedSource, SourceSpec, file, open_source, parse_argument

MIB = 1 << 20
NOBODY = 65534


@pytest.fixture(autouse=True)
def _no_fd_is_left() -> Iterator[None]:
    before = sorted(os.listdir("/proc/self/fd"))
    yield
    assert sorted(os.listdir("/proc/self/fd")) == before


def open_path(path: Path | str) -> OpenedSource:
    return open_source(parse_argument(f"b={path}"))


def write_sparse(path: Path, length: int, data: dict[int, bytes]) -> Path:
    with path.open("wb") as out:
        out.truncate(length)
        for offset, content in data.items():
            os.pwrite(out.fileno(), content, offset)
        os.fsync(out.fileno())
    return path


def refused(path: Path | str, message: str, number: int) -> SourceError:
    with pytest.raises(SourceError, match=re.escape(message)) as refusal:
        open_path(path)
    assert refusal.value.errno == number
    assert str(path) in refusal.value.message
    assert refusal.value.hint
    return refusal.value


def test_used_length_is_the_exact_size(tmp_path: Path) -> None:
    path = tmp_path / "raw"
    path.write_bytes(bytes(range(256)) * 20 + b"tail")
    with open_path(path) as source:
        assert source.used_length == 5124
        assert source.extents == [(0, 5124)]
        assert source.array is None
        assert source.default_writable is False


def test_holes_are_found_where_they_are(tmp_path: Path) -> None:
    path = write_sparse(tmp_path / "sparse", 8 * MIB + 5, {MIB: b"x" * MIB, 4 * MIB: b"y" * MIB})
    with open_path(path) as source:
        assert source.used_length == 8 * MIB + 5
        assert source.extents == [(MIB, 2 * MIB), (4 * MIB, 5 * MIB)]


def test_no_byte_outside_the_extents_differs_from_zero(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    data = {rng.randrange(4 * MIB): rng.randbytes(rng.randrange(1, 20_000)) for _ in range(40)}
    path = write_sparse(tmp_path / "sparse", 4 * MIB, data)
    content = bytearray(path.read_bytes())
    with open_path(path) as source:
        assert source.extents == sorted(source.extents)
        gaps = zip(source.extents, source.extents[1:], strict=False)
        assert all(b[0] - a[1] >= HOLE_BYTES_MIN for a, b in gaps)
        for start, end in source.extents:
            content[start:end] = bytes(end - start)
    assert not any(content)


def test_sparse_terabyte_takes_milliseconds_and_no_memory(tmp_path: Path) -> None:
    path = write_sparse(tmp_path / "tera", 1 << 40, {512 << 30: b"x"})
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start_s = time.monotonic()
    with open_path(path) as source:
        took_s = time.monotonic() - start_s
        assert source.used_length == 1 << 40
        assert sum(end - begin for begin, end in source.extents) <= MIB
        assert source.extents[0][0] <= 512 << 30 < source.extents[0][1]
    assert took_s < 10  # reading it would take minutes
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 4096


def test_file_that_is_one_hole_has_no_extents(tmp_path: Path) -> None:
    with open_path(write_sparse(tmp_path / "hole", 1 << 40, {})) as source:
        assert source.extents == []


def test_file_system_without_holes_gives_one_extent() -> None:
    with open("/proc/self/status", "rb") as status:
        with pytest.raises(OSError, match="Invalid argument"):
            os.lseek(status.fileno(), 0, os.SEEK_DATA)
        assert file.find_extents(status.fileno(), 1000) == [(0, 1000)]


def test_more_extents_than_the_limit_count_the_rest_as_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_sparse(tmp_path / "sparse", 10 * MIB, {n * MIB: b"x" * 65536 for n in range(0, 10, 2)})
    monkeypatch.setattr(file, "EXTENTS_MAX", 3)
    with open_path(path) as source:
        assert source.extents == [(0, 65536), (2 * MIB, 2 * MIB + 65536), (4 * MIB, 10 * MIB)]


def test_file_that_shrank_since_is_scanned_without_end(tmp_path: Path) -> None:
    path = write_sparse(tmp_path / "raw", 65536, {0: b"x" * 65536})
    fd = os.open(path, os.O_RDONLY)
    try:
        assert file.find_extents(fd, 1 << 40) == [(0, 65536)]
    finally:
        os.close(fd)


def test_relative_path_counts_from_the_directory_of_the_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "raw").write_bytes(b"abc")
    spec = parse_argument("raw")
    monkeypatch.chdir(tmp_path / "sub")
    with open_source(spec) as source:
        assert (source.used_length, source.spec.text) == (3, "raw")


@pytest.mark.parametrize("name", ["a#b", "a=b", "a,b", "a b", "a%23b", "größe", "a:b"])
def test_any_file_name_can_be_written(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"abc")
    encoded = "".join(f"%{byte:02X}" for byte in name.encode())
    with open_source(parse_argument(f"file://{tmp_path}/{encoded}")) as source:
        assert source.used_length == 3


def test_symbolic_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("raw")
    with open_path(tmp_path / "link") as source:
        assert source.used_length == 3


def npy_bytes(data: bytes) -> bytes:
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({len(data)},), }}".ljust(117) + "\n"
    return b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header.encode() + data


@pytest.mark.parametrize("name", ["a.npy", "A.NPY"])
def test_npy_file_is_the_whole_file_with_its_array(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(npy_bytes(b"abcd"))
    with open_path(tmp_path / name) as source:
        assert source.used_length == 132
        assert source.array == ArrayDescription("|u1", (4,), False, 128)


def test_npy_content_under_another_name_is_plain(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(npy_bytes(b"abcd"))
    with open_path(tmp_path / "a.bin") as source:
        assert source.array is None


def test_file_named_npy_that_is_none_is_plain(tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(b"not an array")
    with open_path(tmp_path / "a.npy") as source:
        assert (source.used_length, source.array) == (12, None)


def test_npy_file_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    path.write_bytes(npy_bytes(b"abcd")[:-1])
    with pytest.raises(SourceError, match="promises 4 bytes of data, but only 3 follow"):
        open_path(path)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "none", "No such file", errno.ENOENT)


def test_path_through_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(b"abc")
    refused(tmp_path / "raw" / "x", "Not a directory", errno.ENOTDIR)


def test_link_to_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("link")
    refused(tmp_path / "link", "symbolic links", errno.ELOOP)


def test_directory_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, "is a directory, not a regular file", errno.EISDIR)


def test_empty_file_is_refused_and_zero_named(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert "zero:SIZE" in str(refused(tmp_path / "empty", "the file is empty", errno.ENODATA))


def test_pipe_is_refused_without_waiting_for_a_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "is a pipe, not a regular file", errno.EINVAL)


def test_socket_is_refused(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        refused(tmp_path / "s", "is a socket, not a regular file", errno.EINVAL)


def test_character_device_is_refused() -> None:
    refused("/dev/null", "is a character device, not a regular file", errno.EINVAL)


def test_block_device_is_refused_with_dd() -> None:
    devices = [Path("/dev") / d for d in os.listdir("/sys/class/block")]
    there = next((d for d in devices if d.is_block_device()), None)
    if there is None:
        pytest.skip("no block device on this host")
    assert "dd" in str(refused(there, "is a block device, not a regular file", errno.EINVAL))


def test_file_larger_than_a_block_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file, "SOURCE_LENGTH_MAX", 4096)
    path = write_sparse(tmp_path / "large", 4097, {})
    refused(path, "4097 bytes, and a block holds at most 4096", errno.EFBIG)


def test_file_without_permission_is_refused_with_the_uid(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_bytes(b"abc")
    path.chmod(0)
    if os.geteuid() != 0:
        assert f"uid {os.geteuid()}" in str(refused(path, "Permission denied", errno.EACCES))
        return
    program = (
        "import os, sys\n"
        "from pcshare.errors import SourceError\n"
        "from pcshare.sources import open_source, parse_argument\n"
        "directory = os.open(sys.argv[1], os.O_PATH)\n"
        f"os.fchdir(directory); os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})\n"
        "try:\n"
        "    open_source(parse_argument('./secret'))\n"
        "except SourceError as error:\n"
        "    print(error.errno, error)\n"
    )
    tmp_path.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True, timeout=30
    )
    assert done.stdout.startswith(f"{errno.EACCES} ./secret: Permission denied")
    assert f"uid {NOBODY}" in done.stdout


def test_zero_source_is_one_writable_hole() -> None:
    with open_source(parse_argument("zero:64M")) as source:
        assert source.used_length == 64 * MIB
        assert source.extents == []
        assert source.array is None
        assert source.default_writable is True


def test_zero_size_is_checked_in_a_handmade_spec() -> None:
    with pytest.raises(UsageError, match="asks for 0 bytes"):
        open_source(SourceSpec("b", "zero", "0", FilterSpec(), "zero:0"))


def test_closing_twice_is_fine_and_ends_channels_to_come(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(b"abc")
    source = open_path(tmp_path / "raw")
    source.close()
    source.close()
    with pytest.raises(SourceError, match="closed"):
        source.make_channel()


def read_channel(channel: Any, offset: int, length: int) -> tuple[int, bytes]:
    """One demand through a channel: its result and bytes. The thread that ends it may be anybody's."""
    from pcshare.core import ffi, lib

    ended, results = threading.Event(), []

    def done(_request: int, result: int) -> None:
        results.append(result)
        ended.set()

    callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int)(done)
    bytes_ = ffi.new("uint8_t[]", b"\xaa" * length)
    address = ctypes.cast(callback, ctypes.c_void_p).value
    request = ffi.new("struct page_request *", {"offset": offset, "length": length, "bytes": bytes_, "is_demand": 1})
    request.done = ffi.cast("page_request_done *", address)
    lib.page_channel_submit(channel, request)
    assert ended.wait(30)
    return results[0], bytes(ffi.buffer(bytes_, length))


def test_channel_gives_the_files_bytes_after_the_source_is_closed(tmp_path: Path) -> None:
    from pcshare.core import lib

    path = write_sparse(tmp_path / "sparse", MIB, {8192: b"x" * 4096})
    with open_path(path) as source:
        channels = [source.make_channel(), source.make_channel()]
    for channel in channels:
        assert read_channel(channel, 4096, 8192) == (0, bytes(4096) + b"x" * 4096)
        lib.page_channel_free(channel)


def test_channel_of_a_zero_source_gives_zeros() -> None:
    from pcshare.core import lib

    with open_source(parse_argument("zero:1M#rate=1G")) as source:
        channel = source.make_channel()
    assert read_channel(channel, 0, 4096) == (0, bytes(4096))
    lib.page_channel_free(channel)


def test_delay_filter_delays_each_request(tmp_path: Path) -> None:
    from pcshare.core import lib

    (tmp_path / "raw").write_bytes(b"abcd")
    with open_source(parse_argument(f"{tmp_path}/raw#delay=50ms")) as source:
        channel = source.make_channel()
    for _ in range(2):
        start_s = time.monotonic()
        assert read_channel(channel, 0, 4) == (0, b"abcd")
        assert time.monotonic() - start_s >= 0.05
    lib.page_channel_free(channel)


def test_error_filter_fails_while_its_file_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FILE counts from the directory of the open, wherever the coordinator goes afterwards."""
    from pcshare.core import lib

    (tmp_path / "raw").write_bytes(b"abcd")
    monkeypatch.chdir(tmp_path)
    with open_source(parse_argument("raw#error=ETIMEDOUT@sub%2Ffail")) as source:
        monkeypatch.chdir("/")
        channel = source.make_channel()
    (tmp_path / "sub").mkdir()
    assert read_channel(channel, 0, 4) == (0, b"abcd")
    (tmp_path / "sub" / "fail").touch()
    assert read_channel(channel, 0, 4)[0] == -errno.ETIMEDOUT
    (tmp_path / "sub" / "fail").unlink()
    assert read_channel(channel, 0, 4) == (0, b"abcd")
    lib.page_channel_free(channel)


def test_error_filter_without_a_present_directory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(SourceError, match="the present directory is gone"):
        open_source(parse_argument("zero:4K#error=EIO@fail"))
