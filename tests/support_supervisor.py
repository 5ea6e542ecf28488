"""support_supervisor: a supervisor of our own that speaks systemd's side of its fd store, and starts a program again.

Listens on NOTIFY_SOCKET, keeps fds by name, gives them back as LISTEN_FDS; as sd_notify(3) and sd_listen_fds(3) say.
Starts, hears and ends; makes no claims about what it started.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from support import wait_until
from support_coordinator import READY_TIMEOUT_S, STOP_TIMEOUT_S, die_with_parent

FDS_MAX = 253  # SCM_MAX_FD of the kernel
DATAGRAM_MAX = 1 << 16

# Moves what it inherited to 3 and on, says so in the environment, and becomes the program.
_BECOME = """
import fcntl, os, sys
given, names = [int(number) for number in sys.argv[1].split(",") if number], sys.argv[2]
high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3 + max([len(given), *given])) for fd in given]
for fd in given: os.close(fd)
for index, fd in enumerate(high): os.dup2(fd, 3 + index)
if given: os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(given)), LISTEN_FDNAMES=names)
os.execv(sys.argv[3], sys.argv[3:])
"""


@dataclass
class Told:
    """One datagram."""

    lines: list[str]
    n_fds: int

    @property
    def name(self) -> str:
        return next((line.removeprefix("FDNAME=") for line in self.lines if line.startswith("FDNAME=")), "")


@dataclass
class Supervisor:
    """Of one program, started by start() and again by start() when it has ended."""

    folder: Path
    told: list[Told] = field(default_factory=list)
    kept: list[tuple[str, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.address = str(self.folder / "notify")
        self.process: subprocess.Popen[bytes] | None = None
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.address)
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._hear, name="supervisor")
        self._thread.start()

    # -- hearing

    def _hear(self) -> None:
        while True:
            data, fds, flags, _ = socket.recv_fds(self._socket, DATAGRAM_MAX, FDS_MAX)
            assert not flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC)
            if not data:
                return
            with self._lock:
                self._take(Told(data.decode().split("\n"), len(fds)), fds)

    def _take(self, told: Told, fds: Sequence[int]) -> None:
        self.told.append(told)
        if "FDSTORE=1" in told.lines:
            self.kept += [(told.name or "stored", fd) for fd in fds]
        if "FDSTOREREMOVE=1" in told.lines:
            for name, fd in [one for one in self.kept if one[0] == told.name]:
                self.kept.remove((name, fd))
                os.close(fd)

    def _hear_all(self) -> None:
        """All that was said before, also by who is dead by now."""
        mark = f"X_MARK={time.monotonic_ns()}"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
            end.sendto(mark.encode(), self.address)
        wait_until(lambda: self.said(mark) > 0, "what was said before to be heard")

    def said(self, line: str) -> int:
        """How often."""
        with self._lock:
            return sum(line in one.lines for one in self.told)

    def names(self) -> list[str]:
        with self._lock:
            return [name for name, _ in self.kept]

    # -- the program

    def start(self, *command: str, log: int | None = None) -> subprocess.Popen[bytes]:
        """Returns when it is ready. It gets what was kept, which stays kept."""
        self._hear_all()
        ready = self.said("READY=1")
        with self._lock:
            fds, names = [fd for _, fd in self.kept], ":".join(name for name, _ in self.kept)
        self.process = subprocess.Popen(
            [sys.executable, "-c", _BECOME, ",".join(map(str, fds)), names, *command],
            pass_fds=fds,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
            env={**os.environ, "NOTIFY_SOCKET": self.address},
            preexec_fn=die_with_parent,
        )
        wait_until(
            lambda: self.said("READY=1") > ready or self.process_has_ended(), "the program to be ready", READY_TIMEOUT_S
        )
        assert not self.process_has_ended(), self.process.returncode
        return self.process

    def process_has_ended(self) -> bool:
        return self.process is None or self.process.poll() is not None

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """SIGTERM, and its exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_TIMEOUT_S)

    def close(self) -> None:
        if not self.process_has_ended():
            self.kill()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
            end.sendto(b"", self.address)
        self._thread.join()
        self._socket.close()
        for _, fd in self.kept:
            os.close(fd)
        self.kept.clear()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.address)


@contextlib.contextmanager
def supervising(folder: Path) -> Iterator[Supervisor]:
    made = Supervisor(folder)
    try:
        yield made
    finally:
        made.close()
