"""wakeup: how a thread that waits in a system call is told that something happened: an eventfd, a flag beside it.

Wakeup ends a poll; StopFlag ends whatever else its owner said how to end. Neither knows what for.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator

from pcshare.errors import SourceError

SIGNAL_LOOK_S = 0.2


class Wakeup:
    """An fd that is readable from set() to clear(). Any thread may call any of it; closed, set() does nothing."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def fileno(self) -> int:
        return self._fd

    def set(self) -> None:
        with self._lock:
            if self._fd >= 0:
                os.eventfd_write(self._fd, 1)

    def clear(self) -> None:
        with self._lock, contextlib.suppress(BlockingIOError):
            if self._fd >= 0:
                os.eventfd_read(self._fd)

    def close(self) -> None:
        with self._lock:
            fd, self._fd = self._fd, -1
            if fd >= 0:
                os.close(fd)


class StopFlag:
    """Set once, for good. Who waits says by calling() what is to be done to end the wait."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_set = False
        self._calls: list[Callable[[], None]] = []

    @property
    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        """Twice is fine. Not for signal handlers: it takes a lock."""
        with self._lock:
            self._is_set = True
            for call in self._calls:
                call()

    def check(self) -> None:
        if self._is_set:
            raise SourceError("stopped", errno=errno.ECANCELED)

    @contextlib.contextmanager
    def calling(self, call: Callable[[], None]) -> Iterator[None]:
        """While the body runs, set() makes this call, which must be short; at once if it is set already. No call comes
        after the body."""
        with self._lock:
            self._calls.append(call)
            if self._is_set:
                call()
        try:
            yield
        finally:
            with self._lock:
                self._calls.remove(call)


def shut_down(connection: socket.socket) -> None:
    """Ends every wait on a socket, in whichever thread."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def wait_for_event(event: threading.Event, timeout_s: float = math.inf) -> bool:
    """Whether it was set in time. For the main thread, in steps: a signal that comes just before a wait ends none, and
    Python looks for signals only between waits."""
    deadline = time.monotonic() + timeout_s
    while not event.wait(min(SIGNAL_LOOK_S, max(0.0, deadline - time.monotonic()))):
        if time.monotonic() >= deadline:
            return False
    return True


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """For the start of a thread, which inherits the mask: the program's signals are for its main thread."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
