"""exports: `--export`: the sockets on which a coordinator gives its blocks out over NBD, and the exporter behind them.

The exporter is a process of its own, so that nobody's reading troubles the fault threads. It may die at any time:
the sockets are ours and stay open, and another one is started. Answers no request itself.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pcshare.coordinator.blocks import Block
from pcshare.fds import OwnedFd
from pcshare.nbd.address import Listening, listen_on

log = logging.getLogger("pcshare")

EXPORTER = (sys.executable, "-P", "-m", "pcshare.serve.blocks")
BACKOFF_S, BACKOFF_MAX_S = 0.1, 10.0  # before an exporter that died is replaced; doubled each time it dies young
OLD_S = 30.0  # an exporter that lived so long did not die of its start
STOP_TIMEOUT_S = 6.0  # an exporter waits almost as long for its own clients' threads
TERM_TIMEOUT_S = 2.0


class Exports:
    """Listens at once; start() when helpers can attach. fileno() is readable when handle() has something to do, and
    handle() wants to be called after wait_s() at the latest."""

    def __init__(self, addresses: Iterable[str], taken: Mapping[int, Sequence[OwnedFd]] | None = None) -> None:
        """taken: sockets that listen already, by the place of their address."""
        self._listening: list[Listening] = listen_on(addresses, taken)
        self._epoll = select.epoll()
        self._process: subprocess.Popen[bytes] | None = None
        self._pidfd = -1
        self._description_fd = -1
        self._memfds: list[int] = []
        self._control_socket = ""
        self._started_s = 0.0
        self._backoff_s = BACKOFF_S
        self._start_at_s: float | None = None  # when the next one is due

    @property
    def addresses(self) -> list[str]:
        """As bound."""
        return [address for listening in self._listening for address in listening.addresses]

    @property
    def sockets(self) -> list[list[socket.socket]]:
        """Of each address."""
        return [listening.sockets for listening in self._listening]

    # -- life

    def start(self, control_socket: str, name: str, blocks: Iterable[Block]) -> None:
        self._control_socket = control_socket
        described = [_describe(block, name) for block in blocks]
        self._memfds = [one["memfd"] for one in described]
        self._description_fd = os.memfd_create("pcshare-exports")
        with open(self._description_fd, "w", closefd=False) as description:
            json.dump(described, description)
        self._spawn()

    def _spawn(self) -> None:
        listeners = [one.fileno() for listening in self._listening for one in listening.sockets]
        self._process = subprocess.Popen(
            [*EXPORTER, self._control_socket, str(self._description_fd), *map(str, listeners)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=[self._description_fd, *self._memfds, *listeners],
            start_new_session=True,  # Ctrl-C on our terminal is for us, and we end it
        )
        self._pidfd = os.pidfd_open(self._process.pid)
        self._epoll.register(self._pidfd, select.EPOLLIN)
        self._started_s = time.monotonic()

    def fileno(self) -> int:
        return self._epoll.fileno()

    def wait_s(self) -> float | None:
        """How soon handle() is wanted even if nothing is readable; None: not before."""
        return None if self._start_at_s is None else max(0.0, self._start_at_s - time.monotonic())

    def handle(self) -> None:
        """Replaces an exporter that died. At any time."""
        if self._process is not None and self._process.poll() is not None:
            self._bury(self._process)
        if self._start_at_s is not None and time.monotonic() >= self._start_at_s:
            self._start_at_s = None
            try:
                self._spawn()
            except OSError as error:
                log.warning("cannot start the exporter: %s", error.strerror)
                self._put_off()

    def _bury(self, process: subprocess.Popen[bytes]) -> None:
        if time.monotonic() - self._started_s > OLD_S:
            self._backoff_s = BACKOFF_S
        log.warning("the exporter has ended (%s); another one follows in %.1f s", process.returncode, self._backoff_s)
        self._let_go(process)
        self._put_off()

    def _put_off(self) -> None:
        self._start_at_s = time.monotonic() + self._backoff_s
        self._backoff_s = min(2 * self._backoff_s, BACKOFF_MAX_S)

    def _let_go(self, process: subprocess.Popen[bytes]) -> None:
        """Of one that has ended."""
        self._epoll.unregister(self._pidfd)
        os.close(self._pidfd)
        self._pidfd = -1
        assert process.stdin is not None
        process.stdin.close()
        self._process = None

    # -- end

    def end_exporter(self) -> None:
        """The sockets go on listening: the coordinator after this one starts another."""
        if self._process is not None:
            self._end(self._process)

    def close(self) -> None:
        """Ends the exporter and closes the sockets. Twice is fine."""
        self.end_exporter()
        for listening in self._listening:
            listening.close()
        self._listening.clear()
        fd, self._description_fd = self._description_fd, -1
        if fd >= 0:
            os.close(fd)
        self._epoll.close()

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        """It is asked by the end of its standard input, then by SIGTERM, then no more."""
        assert process.stdin is not None
        process.stdin.close()
        for timeout_s, number in ((STOP_TIMEOUT_S, signal.SIGTERM), (TERM_TIMEOUT_S, signal.SIGKILL)):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout_s)
                break
            log.warning("the exporter does not end: %s", number.name)
            process.send_signal(number)
        process.wait()
        self._let_go(process)


def _describe(block: Block, name: str) -> dict[str, Any]:
    return {
        "idstr": block.idstr,
        "used_length": block.ram.used_length,
        "page_size": block.ram.page_size,
        "writable": block.ram.writable,
        "data": block.source.extents,
        "memfd": block.ram.helper_memfd(writing=False),
        "description": f"block {block.idstr} of coordinator {name}",
    }
