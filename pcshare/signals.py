"""signals: who hears them, the main thread, also while it waits; and how a process that hears one ends in order.

Python looks for signals between two steps of the main thread. One that comes after that look and before a system call
interrupts nothing, and is heard when the call ends. So what waits here has something that ends the wait then.
"""

from __future__ import annotations

import contextlib
import math
import signal
import socket
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Protocol

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
EXIT_SIGNAL = 128  # and the signal's number: the exit status of who was ended by it, as shells say it
LOOK_S = 0.2  # how late a signal is heard at most


class _Stoppable(Protocol):
    @property
    def wakeup(self) -> tuple[socket.socket, socket.socket]:
        """Where its loop waits for a byte, and where to send it."""

    def stop(self) -> None: ...


@contextlib.contextmanager
def stop_signals(server: _Stoppable) -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP stop it: held from before the start until after the end, so that none of them cuts off
    the clearing up. For the main thread of a process that serves and does nothing else. One that came before, and was
    blocked by a keeper, is heard now; one that comes just before the loop waits, and so interrupts nothing, wakes it.
    """
    with contextlib.ExitStack() as closing:
        _, end = [closing.enter_context(end.dup()) for end in server.wakeup]  # ours: the server may close its own
        closing.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(end.fileno(), warn_on_full_buffer=False))
        for number in STOP_SIGNALS:
            closing.callback(signal.signal, number, signal.signal(number, lambda *_: server.stop()))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        yield


@contextlib.contextmanager
def ending_signals_raise() -> Iterator[None]:
    """SIGTERM and SIGHUP end what runs inside as Ctrl-C does: processes and files that it made go too."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(EXIT_SIGNAL + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """For the start of a thread, which inherits the mask: the program's signals are for its main thread."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def wait_for_event(event: threading.Event, timeout_s: float = math.inf) -> bool:
    """event.wait() for the main thread, which hears signals meanwhile. False: it was not set in time."""
    deadline = time.monotonic() + timeout_s
    while not event.wait(min(LOOK_S, max(0.0, deadline - time.monotonic()))):
        if time.monotonic() >= deadline:
            return False
    return True
