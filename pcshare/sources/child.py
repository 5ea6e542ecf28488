"""child: a process that answers NBD on its stdin and stdout: how it is started on a socket pair, and how it ends.

It has a session of its own, so that ^C on the terminal ends the coordinator in its order and not the source first, and
dies with the thread that started it (tied.py). Its stderr stays ours. One of our own programs can leave last words when
it fails: the error that ends it, which says more than that it hung up. Nothing here reads or writes the socket.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from pcshare import errors

TIED = str(Path(__file__).with_name("tied.py"))

LINGER_S = 1.0  # from the end of its socket to SIGTERM: a server that hears of it needs milliseconds
TERMINATE_S = 2.0  # from SIGTERM to SIGKILL
KILL_S = 5.0  # from SIGKILL to its end: freeing memory takes a while

LAST_WORDS_VARIABLE = "PCSHARE_LAST_WORDS_FD"  # in its environment: where its last words go
LAST_WORDS_BYTES_MAX = 1 << 16


class Child:
    """One process. spawn() and, however things go, end(): it is waited for there."""

    def __init__(self, process: subprocess.Popen[bytes], words_fd: int) -> None:
        self._process = process
        self._pidfd = os.pidfd_open(process.pid)
        self._words_fd = words_fd
        self._ending = ""
        self.last_words: errors.PcshareError | None = None  # once it has ended

    @property
    def pid(self) -> int:
        return self._process.pid

    @classmethod
    def spawn(cls, words: Sequence[str], *, is_own: bool = False) -> tuple[socket.socket, Child]:
        """Starts a command with a new socket as stdin and stdout, and returns our end of it. is_own: a program of ours,
        which can leave last words. OSError: it cannot."""
        ours, theirs = socket.socketpair()
        words_fd = os.memfd_create("pcshare-last-words")
        try:
            with theirs:
                process = subprocess.Popen(
                    [sys.executable, "-I", "-S", TIED, str(os.getpid()), *words],
                    stdin=theirs.fileno(),
                    stdout=theirs.fileno(),
                    pass_fds=[words_fd] if is_own else [],
                    env={**os.environ, LAST_WORDS_VARIABLE: str(words_fd) if is_own else ""},
                    start_new_session=True,
                )
            return ours, cls(process, words_fd)
        except BaseException:
            ours.close()
            os.close(words_fd)
            raise

    def end(self) -> str:
        """After its socket was closed: waits for its end, and makes it end where it does not. Says how it ended, by its
        last words if there are any. Twice is fine."""
        if not self._ending:
            self._make_it_end()
            ending = self._reap()
            self.last_words = self._read_last_words()
            self._ending = self.last_words.message if self.last_words else ending
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
            return f"the command was ended by {_signal_name(-code)}"
        return f"the command ended with exit code {code}"

    def _read_last_words(self) -> errors.PcshareError | None:
        said = os.pread(self._words_fd, LAST_WORDS_BYTES_MAX, 0)
        os.close(self._words_fd)
        with contextlib.suppress(ValueError, TypeError):
            told = json.loads(said)
            return errors.from_json(told) if isinstance(told, dict) else None
        return None


def _signal_name(number: int) -> str:
    with contextlib.suppress(ValueError):  # most real-time signals have none
        return signal.Signals(number).name
    return f"signal {number}"


def leave_last_words(error: errors.PcshareError) -> bool:
    """For a child that is our own program, before it ends by this error. False: nobody wants to read them."""
    number = os.environ.get(LAST_WORDS_VARIABLE, "")
    if not number.isdigit():
        return False
    os.pwrite(int(number), json.dumps(errors.to_json(error)).encode(), 0)
    return True
