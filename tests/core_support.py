"""core_support: what the tests of the C core share: children with a uffd of their own, C programs built on the core.

A test process must not touch a missing page itself (it would wait for itself), so everything that faults is a child.
"""

from __future__ import annotations

import mmap
import os
import select
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pcshare.core import ffi, lib

TESTS = Path(__file__).resolve().parent
CORE = TESTS.parent / "pcshare" / "core"
NBD_FILES = [*sorted(path.name for path in CORE.glob("nbd_*.c")), "page_channel_nbd.c", "page_channel.c", "thread.c"]
WAIT_S = 30.0  # far more than anything here takes; a test that reaches it has failed


def syscall_of(pid: int) -> str:
    """The number of the system call that the process sleeps in, or "running"."""
    return Path(f"/proc/{pid}/syscall").read_text().split()[0]


def open_uffd(features: int) -> int:
    user_mode_only = ffi.new("int *")
    uffd = int(lib.uffd_open(-1, user_mode_only))
    assert uffd >= 0, os.strerror(-uffd)
    assert lib.uffd_api(uffd, features, ffi.NULL, ffi.NULL) == 0
    return uffd


class Memory:
    """A memfd with a shared writable mapping that is registered with a uffd: pages are placed through it."""

    def __init__(self, page_count: int, features: int = 0) -> None:
        self.page_size = mmap.PAGESIZE
        self.length = page_count * self.page_size
        self.memfd = os.memfd_create("pcshare-test", os.MFD_CLOEXEC)
        os.ftruncate(self.memfd, self.length)
        self.mapping = mmap.mmap(self.memfd, self.length)
        self.addr = int(ffi.cast("uintptr_t", ffi.from_buffer(self.mapping)))
        self.uffd = open_uffd(features)
        self.ioctls = ffi.new("uint64_t *")
        assert lib.uffd_register(self.uffd, self.addr, self.length, lib.UFFD_MODE_MISSING, self.ioctls) == 0

    def page_addr(self, page: int) -> int:
        return self.addr + page * self.page_size

    def place(self, page: int, content: bytes) -> None:
        done = ffi.new("uint64_t *")
        assert lib.uffd_copy(self.uffd, self.page_addr(page), content, len(content), done) == 0
        assert done[0] == len(content)

    def close(self) -> None:
        os.close(self.uffd)
        self.mapping.close()
        os.close(self.memfd)


@contextmanager
def memory(page_count: int, features: int = 0) -> Iterator[Memory]:
    made = Memory(page_count, features)
    try:
        yield made
    finally:
        made.close()


@dataclass
class Child:
    """A process that maps a memfd privately, has registered it with its own uffd and obeys commands (uffd_child.py)."""

    process: subprocess.Popen[bytes]
    socket: socket.socket
    uffd: int
    addr: int
    length: int

    def tell(self, command: str) -> None:
        self.socket.send(command.encode())

    def answer(self) -> bytes:
        return self.socket.recv(64)

    def has_answered(self, timeout_s: float) -> bool:
        return bool(select.select([self.socket], [], [], timeout_s)[0])

    def message(self) -> Any:
        """The next message of its uffd, as struct uffd_message."""
        messages = ffi.new("struct uffd_message[1]")
        assert select.select([self.uffd], [], [], WAIT_S)[0], "no message came"
        assert lib.uffd_read(self.uffd, messages, 1) == 1
        return messages[0]

    def end(self) -> None:
        """The child reads its socket's end and leaves; one that still waits for a page gets zeros from here on."""
        self.socket.close()
        lib.uffd_unregister(self.uffd, self.addr, self.length)
        try:
            self.process.wait(WAIT_S)
        finally:
            self.process.kill()
            os.close(self.uffd)


@contextmanager
def child(memfd: int, length: int, page_size: int = mmap.PAGESIZE, features: int = 0) -> Iterator[Child]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(WAIT_S)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, str(TESTS / "uffd_child.py"), str(theirs.fileno()), str(memfd), str(length),
             str(page_size), str(features), str(os.getpid())],
            pass_fds=[theirs.fileno(), memfd],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )  # fmt: skip
    hello, fds, _, _ = socket.recv_fds(ours, 64, 1)
    assert len(fds) == 1, "the child ended before it was ready"
    made = Child(process, ours, fds[0], struct.unpack("Q", hello)[0], length)
    try:
        yield made
    finally:
        made.end()


def compile_c(
    target: Path, source: str, core: list[str], sanitize: str | None = None, *, to_preload: bool = False
) -> Path:
    """Builds tests/c/SOURCE with the named files of the core, warnings being errors; to_preload: for LD_PRELOAD."""
    compiler = shutil.which("cc")
    assert compiler, "no C compiler: install one (for example: apt install gcc)"
    command = [compiler, "-std=gnu11", "-g", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread", f"-I{CORE}"]
    if to_preload:
        command += ["-shared", "-fPIC"]
    if sanitize:
        command += [f"-fsanitize={sanitize}", "-fno-sanitize-recover=all"]
    command += ["-o", str(target), str(TESTS / "c" / source), *(str(CORE / name) for name in core)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return target
