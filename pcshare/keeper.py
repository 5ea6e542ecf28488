"""keeper: skin over the core's keeper: the process that holds every block's writable mapping.

Here only its life: how it is found or started. Blocks are made with it in ramblock.
"""

from __future__ import annotations

import errno
import os
import socket
import subprocess
from pathlib import Path
from typing import Any

from pcshare.core import ffi, lib
from pcshare.errors import HostError, check
from pcshare.fds import DEVICE_FD_VARIABLE, OwnedFd, inherited_uffd_device

FD_VARIABLE = "PCSHARE_KEEPER_FD"
EXECUTABLE = Path(__file__).parent / "_bin" / "pcshare-keeper"


def executable() -> str:
    """The keeper's executable. HostError: it was not built."""
    if not os.access(EXECUTABLE, os.X_OK):
        raise HostError(
            f"the keeper's executable is missing: {EXECUTABLE}",
            errno=errno.ENOENT,
            hint="install the package again with a C compiler at hand: pip install --force-reinstall pcshare",
        )
    return str(EXECUTABLE)


def inherited_socket() -> OwnedFd | None:
    """The socket to the keeper that started this process, if one did; children do not inherit it."""
    text = os.environ.pop(FD_VARIABLE, None)
    if text is None:
        return None
    fd = OwnedFd(int(text))
    os.set_inheritable(fd.fileno(), False)
    return fd


def exec_under_keeper(command: list[str]) -> None:
    """Becomes a keeper whose only child is this command. Returns only by exception."""
    path = executable()
    os.execv(path, [path, "--", *command])


def read_events(events_fd: OwnedFd) -> list[tuple[int, Any]]:
    """What a keeper wrote down while no coordinator was there: (helper's slot, struct uffd_message), in order."""
    size, length = ffi.sizeof("struct keeper_event"), os.fstat(events_fd.fileno()).st_size
    content = ffi.new("struct keeper_event[]", length // size)
    with open(events_fd.fileno(), "rb", closefd=False, buffering=0) as file:
        file.seek(0)
        file.readinto(ffi.buffer(content))
    return [(int(one.slot), _copied(one.message)) for one in content]


def _copied(message: Any) -> Any:
    return ffi.new("struct uffd_message *", message)


class Keeper:
    """The connection to a keeper; owns its socket, and the process if it was spawned here."""

    def __init__(self, socket_fd: OwnedFd, process: subprocess.Popen[bytes] | None = None) -> None:
        self._process = process
        keeper = ffi.new("struct keeper **")
        rc = lib.keeper_connect(keeper, socket_fd.detach())
        if rc < 0 and process is not None:
            process.wait()  # its socket is closed
        check(rc, "connecting to the keeper")
        self.pointer: Any = keeper[0]
        # Its end, not its socket, is what to watch: an answer that a fault thread waits for makes that readable too.
        self._pidfd = OwnedFd(os.pidfd_open(self.pid))

    @classmethod
    def spawn(cls) -> Keeper:
        """A keeper of its own for a coordinator that is not its child."""
        path = executable()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        device = inherited_uffd_device()
        fds = [theirs.fileno(), *([device.fileno()] if device else [])]
        named = {DEVICE_FD_VARIABLE: str(device.fileno())} if device else {}
        with OwnedFd(ours.detach()) as ours_fd:
            with theirs:
                process = subprocess.Popen(
                    [path, "--serve", str(theirs.fileno())],
                    pass_fds=fds,
                    stdin=subprocess.DEVNULL,
                    env={**os.environ, **named},
                )
            return cls(OwnedFd(ours_fd.detach()), process)

    @property
    def pid(self) -> int:
        return int(lib.keeper_pid(self.pointer))

    def fileno(self) -> int:
        """Readable when the keeper is gone."""
        return self._pidfd.fileno()

    def sweep(self) -> None:
        """Gives back what the coordinator before this one made and this one has not taken."""
        check(lib.keeper_sweep(self.pointer), "sweeping the keeper")

    @property
    def socket_fd(self) -> int:
        """Our end: whoever has it is the keeper's coordinator."""
        return int(lib.keeper_socket(self.pointer))

    def close(self) -> None:
        """Lets the keeper end. Twice is fine; blocks go first."""
        lib.keeper_free(self.pointer)
        self.pointer = ffi.NULL
        self._pidfd.close()
        if self._process is not None:
            self._process.wait()
            self._process = None
