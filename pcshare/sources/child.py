"""child: a process that answers NBD on its stdin and stdout: how it is started on a socket pair, and how it ends.

It has a session of its own, so that ^C on the terminal ends the coordinator in its order and not the source first, and
dies with the thread that started it (tied.py). Its stderr stays ours. Nothing here reads or writes the socket.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

TIED = str(Path(__file__).with_name("tied.py"))

LINGER_S = 1.0  # from the end of its socket to SIGTERM: a server that hears of it needs milliseconds
TERMINATE_S = 2.0  # from SIGTERM to SIGKILL
KILL_S = 5.0  # from SIGKILL to its end: freeing memory takes a while


class Child:
    """One process. spawn() and, however things go, end(): it is waited for there."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._pidfd = os.pidfd_open(process.pid)
        self._ending = ""

    @property
    def pid(self) -> int:
        return self._process.pid

    @classmethod
    def spawn(cls, words: Sequence[str]) -> tuple[socket.socket, Child]:
        """Starts a command with a new socket as stdin and stdout, and returns our end of it. OSError: it cannot."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                process = subprocess.Popen(
                    [sys.executable, "-I", "-S", TIED, str(os.getpid()), *words],
                    stdin=theirs.fileno(),
                    stdout=theirs.fileno(),
                    start_new_session=True,
                )
            return ours, cls(process)
        except BaseException:
            ours.close()
            raise

    def end(self) -> str:
        """After its socket was closed: waits for its end, and makes it end where it does not. Says how it ended. Twice
        is fine."""
        if not self._ending:
            self._make_it_end()
            self._ending = self._reap()
        return self._ending

    def _make_it_end(self) -> None:
        if self._has_ended(LINGER_S):
            return
        for number, limit_s in ((signal.SIGTERM, TERMINATE_S), (signal.SIGKILL, KILL_S)):
            self._signal_group(number)
            if self._has_ended(limit_s):
                return

    def _has_ended(self, limit_s: float) -> bool:
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(limit_s * 1000))

    def _signal_group(self, number: int) -> None:
        """While its first process is not waited for the number is no one else's."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)

    def _reap(self) -> str:
        self._signal_group(signal.SIGKILL)  # what it may have left behind in its group
        os.close(self._pidfd)
        try:
            code = self._process.wait(0)
        except subprocess.TimeoutExpired:
            return "the command does not end, not even by SIGKILL"
        if code < 0:
            return f"the command was ended by {signal.Signals(-code).name}"
        return f"the command ended with exit code {code}"
