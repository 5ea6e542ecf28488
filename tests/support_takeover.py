"""A coordinator that is killed, for tests of who goes on after it: support_coordinator's, seen across its restarts.

Kills and waits; makes no claims about what helpers see. While the keeper is held (away()) no coordinator is there.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from pcshare import admin, runtime
from pcshare.core import ffi
from pcshare.protocol import AdminOp
from pcshare.status import BlockStatus, StatusReport
from pcshare.status.layout import BLOCK_BYTES, BLOCKS_OFFSET
from support import suspended, wait_until
from support_coordinator import Held, Serving, coordinator
from support_serving import WAIT_S, HelperProcess


class Restarting:
    """A coordinator by its name, whichever process it is by now."""

    def __init__(self, served: Serving, helpers: contextlib.ExitStack) -> None:
        self.served = served
        self.name, self.socket = served.name, served.socket
        self.keeper_pid = served.process.pid
        self._helpers = helpers

    # -- what it says

    def status(self) -> StatusReport:
        return self.served.status()

    @property
    def pid(self) -> int:
        """Of the process that serves, or has served until now."""
        return self.status().pid

    @property
    def restarts(self) -> int:
        return self.status().restarts

    def block(self, idstr: str = "data") -> BlockStatus:
        return self.served.block(idstr)

    def wait_for_state(self, state: str, idstr: str = "data") -> BlockStatus:
        return self.served.wait_for_state(state, idstr)

    def waiting(self) -> int:
        return sum(helper.waiting for helper in self.status().helpers)

    def wait_for_waiting(self, n: int) -> None:
        wait_until(lambda: self.waiting() == n, f"{n} threads to wait for a page: {self.status()}", WAIT_S)

    def held(self) -> Held:
        self.served.pid = self.pid
        return self.served.held()

    def wait_until_alone(self, before: Held) -> None:
        self.served.pid = self.pid
        self.served.wait_until_alone(before)

    # -- who uses it

    def helper(self) -> HelperProcess:
        return self._helpers.enter_context(HelperProcess(self.socket))

    def attached(self, arguments: str = "") -> HelperProcess:
        """A helper with its block as b."""
        helper = self.helper()
        helper.do(f"b = attach({arguments})")
        return helper

    def order(self, op: AdminOp, argument: int = 0) -> None:
        admin.send(self.socket, op, argument)

    # -- its deaths

    def kill(self) -> int:
        """SIGKILL to the process that serves, if one does; how many restarts there were before."""
        report = self.status()
        with contextlib.suppress(ProcessLookupError):
            os.kill(report.pid, signal.SIGKILL)
        return report.restarts

    def kill_child(self) -> bool:
        """SIGKILL to the keeper's child, whether it serves already or is about to; whether there was one."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.keeper_pid).children():
                child.kill()
                return True
        return False

    def wait_for_restart(self, before: int) -> None:
        wait_until(
            lambda: self.restarts > before and self.status().alive, f"restart {before + 1}: {self.status()}", WAIT_S
        )

    def wait_for_faults(self, n: int) -> None:
        """Of all so far: a page that somebody waited for may have come already, on a slow machine."""
        wait_until(lambda: self.status().faults >= n, f"{n} faults: {self.status()}", WAIT_S)

    def restart(self) -> None:
        """Kills it, and returns when the next one serves."""
        self.wait_for_restart(self.kill())

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """No coordinator is there in the body: it is killed, and its keeper stopped. At the end the next one serves."""
        with suspended(self.keeper_pid):
            killed = psutil.Process(self.pid)
            before = self.kill()
            wait_until(lambda: killed.status() == psutil.STATUS_ZOMBIE, "the coordinator's end")
            yield
        self.wait_for_restart(before)

    def unnote(self, pages: Sequence[int], index: int = 0) -> None:
        """The memory has the pages, and the received bitmap no longer says so: as if it had died between the two.
        While it is away."""
        with (
            open(runtime.shm_path(self.name), "r+b") as file,
            mmap.mmap(file.fileno(), 0) as segment,
            ffi.from_buffer(segment) as start,
        ):
            slot = ffi.cast("struct status_block *", start + BLOCKS_OFFSET + index * BLOCK_BYTES)
            words = ffi.cast("uint64_t *", start + slot.bitmap_offset)
            for page in pages:
                assert words[page // 64] >> page % 64 & 1, f"page {page} was not received"
                words[page // 64] &= ~(1 << page % 64)


@contextlib.contextmanager
def restarting(*sources: str, options: Sequence[str] = (), name: str | None = None) -> Iterator[Restarting]:
    """A coordinator of these blocks, to be killed."""
    with coordinator(*sources, options=options, name=name) as served, contextlib.ExitStack() as helpers:
        yield Restarting(served, helpers)


def command_line(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")[:-1]
