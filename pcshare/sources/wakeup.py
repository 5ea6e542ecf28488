"""wakeup: how a thread that waits in a system call is told that something happened: an eventfd, a flag beside it.

Wakeup ends a poll; StopFlag ends whatever else its owner said how to end. Neither knows what for.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
from collections.abc import Callable, Iterator

from pcshare.errors import SourceError


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
