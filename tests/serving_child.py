"""serving_child: a helper process that runs the Python it is sent, each piece in a thread of its own.

The connection's end is its end, whatever its threads wait for.
"""

from __future__ import annotations

import ast
import ctypes
import mmap
import os
import signal
import socket
import sys
import threading
from multiprocessing.connection import Connection
from typing import Any

import pcshare
import pcshare.sources
import pcshare.status  # by now: what is imported later may be out of reach
from pcshare import protocol, transport
from pcshare.client import Block
from pcshare.core import ffi
from pcshare.uffd import Uffd

PR_SET_PDEATHSIG, PR_SET_DUMPABLE = 1, 4

_libc = ctypes.CDLL(None)


def write(block: Any, offset: int, content: bytes) -> None:
    """Stores these bytes as a C program would, whatever the mapping allows."""
    addr = int(ffi.cast("uintptr_t", ffi.from_buffer(block))) + offset
    _libc.memcpy(ctypes.c_void_p(addr), content, ctypes.c_size_t(len(content)))


def read(block: Any, offset: int, length: int = 1) -> bytes:
    """Touches these bytes of a buffer in user mode, the GIL being free."""
    here = ctypes.create_string_buffer(length)
    addr = int(ffi.cast("uintptr_t", ffi.from_buffer(block))) + offset
    _libc.memcpy(here, ctypes.c_void_p(addr), ctypes.c_size_t(length))
    return here.raw


class HandOver:
    """The helper's side of the control protocol, step by step, in the order that kernel and coordinator want."""

    STEPS = ("connect", "hello", "welcome", "map", "register", "attach", "ack")

    def __init__(self, socket_path: str, until: str, block: str = "data") -> None:
        self._path, self._block = socket_path, block
        for step in self.STEPS[: self.STEPS.index(until) + 1]:
            getattr(self, step)()

    def connect(self) -> None:
        self.connection = transport.connect(self._path, 20.0)

    def hello(self) -> None:
        self.connection.send(protocol.pack_hello(self._block))

    def welcome(self) -> None:
        data, self.fds = self.connection.receive(20.0)
        welcome = protocol.parse(data, len(self.fds))
        assert isinstance(welcome, protocol.Welcome), welcome
        self.described = welcome

    def map(self) -> None:
        self.memory = mmap.mmap(self.fds[0].fileno(), self.described.map_length, flags=mmap.MAP_PRIVATE, prot=0)
        self.uffd = Uffd.open(self.fds[2] if len(self.fds) > 2 else None)
        self.uffd.api(self.described.features)

    def register(self) -> None:
        length = self.described.map_length
        with ffi.from_buffer(self.memory) as here:
            self.addr = int(ffi.cast("uintptr_t", here))
        self.uffd.register(self.addr, length)
        _libc.mprotect(ctypes.c_void_p(self.addr), ctypes.c_size_t(length), mmap.PROT_READ)

    def attach(self) -> None:
        message = protocol.pack_attach([protocol.Map(self.addr, 0, self.described.map_length)])
        self.connection.send(message, [self.uffd.fileno()])

    def ack(self) -> None:
        data, _ = self.connection.receive(20.0)
        assert isinstance(protocol.parse(data, 0), protocol.Ack)

    def unregistered(self) -> mmap.mmap:
        """What nobody may have: a mapping of the block that nobody serves."""
        return mmap.mmap(self.fds[0].fileno(), self.described.map_length, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)


class Namespace(dict[str, Any]):
    """What the pieces share."""

    def __init__(self, socket_path: str) -> None:
        super().__init__(pcshare=pcshare, os=os, mmap=mmap, read=read, write=write, ffi=ffi, SOCKET=socket_path)
        self["hand_over"] = lambda until, block="data": HandOver(socket_path, until, block)
        self["attach"] = self.attach

    def attach(self, block: str | None = None, mode: str | None = None, timeout_s: float = 20.0) -> Block:
        return pcshare.attach(block=block, mode=mode, timeout_s=timeout_s, socket=self["SOCKET"])


def run(code: str, namespace: Namespace) -> Any:
    """Runs statements; the value of the last, if it is an expression."""
    tree = ast.parse(code)
    last = tree.body[-1]
    if not isinstance(last, ast.Expr):
        exec(compile(tree, "<told>", "exec"), namespace)
        return None
    exec(compile(ast.Module(tree.body[:-1], []), "<told>", "exec"), namespace)
    return eval(compile(ast.Expression(last.value), "<told>", "eval"), namespace)


def obey(connection: Connection, lock: threading.Lock, number: int, code: str, namespace: Namespace) -> None:
    try:
        answer = (number, True, run(code, namespace))
    except BaseException as error:
        answer = (number, False, error)
    with lock:
        connection.send(answer)


def become(uid: int) -> None:
    """That user, with no other rights. Here and not before exec: it may be one who cannot reach this interpreter."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    _libc.prctl(PR_SET_DUMPABLE, 1)  # as if it had been that user's from the start


def main() -> None:
    fd, socket_path, parent_pid, uid = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    if uid != os.geteuid():
        become(uid)
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        return
    os.set_inheritable(fd, False)
    connection = Connection(socket.socket(fileno=fd).detach())
    lock, namespace = threading.Lock(), Namespace(socket_path)
    connection.send((0, True, os.getpid()))
    while True:
        try:
            number, code = connection.recv()
        except EOFError:
            os._exit(0)
        threading.Thread(target=obey, args=(connection, lock, number, code, namespace), daemon=True).start()


if __name__ == "__main__":
    main()
