"""support_serving: a coordinator inside the test's process, and helper processes that run what they are sent.

For tests that look into a coordinator or stop its Python; support_coordinator has the real command. The test's process
touches no missing page with the GIL held unless that is the point of the test.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

import pytest

from pcshare import admin
from pcshare.coordinator import Options, Server
from pcshare.core import ffi
from pcshare.keeper import Keeper
from pcshare.notifier import Notifier
from pcshare.protocol import AdminOp
from pcshare.ramblock import RAMBlock
from pcshare.sources import parse_arguments
from pcshare.status import BlockStatus, HelperStatus, StatusReport, read_status
from support import wait_until

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
PAGE = 4096
HUGE_PAGE = 2 << 20
EAGER, LAZY, RATE, PAUSED = range(4)
WAIT_S = 30.0  # far more than anything here takes; a test that reaches it has failed
NOBODY = 65534
CROWD_CPUS_MAX = 64  # of fault_crowd.c: with as many CPUs no helper is a crowd

_libc = ctypes.CDLL(None)


class Pending:
    """Code that a helper process runs."""

    def __init__(self, helper: HelperProcess, number: int) -> None:
        self._helper = helper
        self._number = number

    def is_done(self) -> bool:
        return self._helper.has_answer(self._number)

    def result(self) -> Any:
        """Its value; raises what it raised."""
        ok, value = self._helper.answer(self._number)
        if not ok:
            raise value
        return value


class HelperProcess:
    """A process that runs Python code which it is sent (serving_child.py), each piece in a thread of its own."""

    def __init__(self, socket_path: str, *, uid: int | None = None) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    str(TESTS / "serving_child.py"),
                    str(theirs.fileno()),
                    socket_path,
                    str(os.getpid()),
                    str(os.geteuid() if uid is None else uid),
                ],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
            )
        self._connection = Connection(ours.detach())
        self._answers: dict[int, tuple[bool, Any]] = {}
        self._number = 0
        _, self.pid = self.answer(0)

    def start(self, code: str) -> Pending:
        self._number += 1
        self._connection.send((self._number, code))
        return Pending(self, self._number)

    def do(self, code: str) -> Any:
        return self.start(code).result()

    def can_be_read(self, page: int) -> bool:
        """By a system call, to which a page of b that was lost is EFAULT, where a touch would be SIGBUS."""
        return bool(
            self.do(
                "import os\n"
                "def can_be_read(at, fd):\n"
                f"    try: return os.write(fd, memoryview(b)[at:at + {PAGE}]) > 0\n"
                "    except OSError: return False\n"
                "    finally: os.close(fd)\n"
                f"can_be_read({page * PAGE}, os.memfd_create('copy'))"
            )
        )

    def has_answer(self, number: int) -> bool:
        self._receive(0)
        return number in self._answers

    def answer(self, number: int) -> tuple[bool, Any]:
        deadline = time.monotonic() + WAIT_S
        while number not in self._answers:
            left = deadline - time.monotonic()
            assert left > 0, f"helper {self.process.pid} did not answer"
            self._receive(left)
        return self._answers.pop(number)

    def _receive(self, timeout_s: float) -> None:
        while self._connection.poll(timeout_s):
            try:
                number, ok, value = self._connection.recv()
            except (EOFError, ConnectionResetError):
                pytest.fail(f"helper {self.process.pid} ended with {self.process.wait(WAIT_S)}", pytrace=False)
            self._answers[number] = ok, value
            timeout_s = 0

    def wait_for_end(self) -> int:
        """Its exit code, negative for a signal."""
        return self.process.wait(WAIT_S)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(WAIT_S)

    def close(self) -> None:
        """Ends it; one that waits for a page with the GIL held is killed."""
        self._connection.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(1.0)
        self.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Serving:
    """A coordinator whose loop is a thread of this process."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.name = server.options.name
        self.error: BaseException | None = None
        self._helpers = contextlib.ExitStack()
        self._thread = threading.Thread(target=self._run, name="coordinator")

    def _run(self) -> None:
        try:
            self.server.run()
        except BaseException as error:
            self.error = error

    def start(self) -> None:
        self.server.start()
        self.start_loop()

    def start_loop(self) -> None:
        self._thread.start()

    def join(self) -> None:
        """Until its loop has ended by itself."""
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive(), "the coordinator's loop did not end"

    def close(self) -> None:
        self._helpers.close()
        if self._thread.ident is not None:
            self.server.stop()
            self.join()
        self.server.close()

    @property
    def socket(self) -> str:
        return self.status().socket

    def helper(self, *, uid: int | None = None) -> HelperProcess:
        return self._helpers.enter_context(HelperProcess(self.socket, uid=uid))

    def order(self, op: AdminOp, argument: int = 0) -> None:
        admin.send(self.socket, op, argument)

    def resume_until(self, condition: Callable[[], bool], what: str) -> None:
        """Resumes it again where a read that had begun before the first order fails after it."""

        def is_met() -> bool:
            if any(block.state == "PAUSED" for block in self.status().blocks):
                self.order(AdminOp.RESUME)
            return condition()

        wait_until(is_met, what, WAIT_S)

    def ram(self, idstr: str = "data") -> RAMBlock:
        return self.server.blocks.find(idstr).ram

    # -- what its status segment says

    def status(self) -> StatusReport:
        return read_status(self.name)

    def block(self, idstr: str = "data") -> BlockStatus:
        return next(block for block in self.status().blocks if block.idstr == idstr)

    def helpers(self, pid: int) -> list[HelperStatus]:
        return [helper for helper in self.status().helpers if helper.pid == pid]

    def waiting(self, pid: int | None = None) -> int:
        """Threads that wait for a page, of one process or of all."""
        return sum(helper.waiting for helper in self.status().helpers if pid in (None, helper.pid))

    def wait_for_state(self, state: str, idstr: str = "data") -> BlockStatus:
        wait_until(lambda: self.block(idstr).state == state, f"state {state} of block {idstr}", WAIT_S)
        return self.block(idstr)

    def wait_for_counts(self, idstr: str = "data", **counts: int) -> None:
        """Until the block's counters are these: a page is counted a moment after it is there."""
        wait_until(lambda: counts.items() <= vars(self.block(idstr)).items(), f"{counts} of block {idstr}", WAIT_S)

    def wait_for_waiting(self, n: int, pid: int | None = None) -> None:
        wait_until(lambda: self.waiting(pid) == n, f"{n} threads to wait for a page", WAIT_S)


@contextlib.contextmanager
def serving(
    *sources: str, keeper: Keeper | None = None, notifiers: tuple[Notifier, ...] = (), **options: Any
) -> Iterator[Serving]:
    """A coordinator of these BLOCK=SOURCEs in this process. options: those of coordinator.Options, as far as needed."""
    name = options.pop("name", None) or f"in-{os.getpid()}-{time.monotonic_ns() % 10**9}"
    for key in ("writable", "allow_uids", "allow_gids"):
        options[key] = frozenset(options.get(key, ()))
    chosen = Options(name=name, sources=parse_arguments(sources), **options)
    made = Serving(Server(chosen, keeper or Keeper.spawn()))
    for notifier in notifiers:
        made.server.notifiers.add(notifier)
    try:
        made.start()
        yield made
        assert made.error is None, made.error
    finally:
        made.close()


def make_file(folder: Path, rng: random.Random, length: int, name: str = "data.bin") -> Path:
    """A file of random bytes."""
    path = folder / name
    path.write_bytes(rng.randbytes(length))
    return path


def page_of(content: bytes, page: int, page_size: int = PAGE) -> bytes:
    """What a page of a block of this content holds: its tail is zeros."""
    return content[page * page_size : (page + 1) * page_size].ljust(page_size, b"\0")


def read_own_page(ram: RAMBlock, page: int) -> bytes:
    """What the coordinator's own mapping of a page holds, touched without the GIL."""
    here = ctypes.create_string_buffer(ram.page_size)
    addr = int(ffi.cast("uintptr_t", ram.pointer.host_addr)) + page * ram.page_size
    _libc.memcpy(here, ctypes.c_void_p(addr), ctypes.c_size_t(ram.page_size))
    return here.raw


def is_readable(fd: int, timeout_s: float) -> bool:
    return bool(select.select([fd], [], [], timeout_s)[0])
