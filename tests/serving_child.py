"""serving_child: a helper process that runs the Python it is sent, each piece in a thread of its own.

The connection's end is its end, whatever its threads wait for.
"""

from __future__ import annotations

import ast
import ctypes
import os
import signal
import socket
import sys
import threading
from multiprocessing.connection import Connection
from typing import Any

import pcshare
from pcshare.client import Block
from pcshare.core import ffi

PR_SET_PDEATHSIG = 1

_libc = ctypes.CDLL(None)


def read(block: Any, offset: int, length: int = 1) -> bytes:
    """Touches these bytes of a buffer in user mode, the GIL being free."""
    here = ctypes.create_string_buffer(length)
    addr = int(ffi.cast("uintptr_t", ffi.from_buffer(block))) + offset
    _libc.memcpy(here, ctypes.c_void_p(addr), ctypes.c_size_t(length))
    return here.raw


class Namespace(dict[str, Any]):
    """What the pieces share."""

    def __init__(self, socket_path: str) -> None:
        super().__init__(pcshare=pcshare, os=os, read=read, ffi=ffi, SOCKET=socket_path)
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


def main() -> None:
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    fd, socket_path, parent_pid = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    if os.getppid() != parent_pid:
        return
    os.set_inheritable(fd, False)
    connection, lock, namespace = Connection(socket.socket(fileno=fd).detach()), threading.Lock(), Namespace(socket_path)
    connection.send((0, True, os.getpid()))
    while True:
        try:
            number, code = connection.recv()
        except EOFError:
            os._exit(0)
        threading.Thread(target=obey, args=(connection, lock, number, code, namespace), daemon=True).start()


if __name__ == "__main__":
    main()
