"""uffd_child: a process that the tests of the core command: maps, registers, hands its uffd over, then obeys."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import signal
import socket
import struct
import sys

from pcshare.core import ffi, lib

PR_SET_PDEATHSIG = 1
MAP_NORESERVE = 0x4000
ANSWER = struct.Struct("B")


def obey(command: list[str], mapping: mmap.mmap, uffd: int) -> bytes:
    match command:
        case ["touch", offset]:
            return ANSWER.pack(mapping[int(offset)])
        case ["dontneed", offset, length]:
            mapping.madvise(mmap.MADV_DONTNEED, int(offset), int(length))
        case ["unmap"]:
            mapping.close()
        case ["blocking"]:
            fcntl.fcntl(uffd, fcntl.F_SETFL, 0)
        case ["fork"]:
            pid = os.fork()
            if pid == 0:
                os._exit(0)
            os.waitpid(pid, 0)
        case ["exec"]:
            os.execv(sys.executable, [sys.executable, "-c", "import signal; signal.pause()"])
    return b"done"


def main() -> None:
    socket_fd, memfd, length, page_size, features, parent_pid = map(int, sys.argv[1:])
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        return
    os.set_inheritable(socket_fd, False)
    control = socket.socket(fileno=socket_fd)
    flags = mmap.MAP_PRIVATE | MAP_NORESERVE
    mapping = mmap.mmap(memfd, length, flags=flags, prot=mmap.PROT_READ)
    buffer = ffi.from_buffer(mapping)
    addr = int(ffi.cast("uintptr_t", buffer))
    ffi.release(buffer)
    assert addr % page_size == 0
    uffd = lib.uffd_open(-1, ffi.new("int *"))
    assert uffd >= 0, os.strerror(-uffd)
    assert lib.uffd_api(uffd, features, ffi.NULL, ffi.NULL) == 0
    assert lib.uffd_register(uffd, addr, length, lib.UFFD_MODE_MISSING, ffi.NULL) == 0
    socket.send_fds(control, [struct.pack("Q", addr)], [uffd])
    with contextlib.suppress(BrokenPipeError):  # the test ended while we waited for a page
        while command := control.recv(64):
            control.send(obey(command.decode().split(), mapping, uffd))


main()
