"""fds: a file descriptor and who owns it.

An fd has an owner from the line where it exists. Must not know what is behind an fd: the verbs are elsewhere.
"""

from __future__ import annotations

import os
import threading
from types import TracebackType
from typing import Self

CLOSED = -1
_USERFAULTFD = "anon_inode:[userfaultfd]"
USERFAULTFD_DEVICE = "/dev/userfaultfd"
DEVICE_FD_VARIABLE = "PCSHARE_DEVICE_FD"  # names the fd of that device which was opened before root was given up

_inherited_device: OwnedFd | None = None


class OwnedFd:
    """Owns one fd and closes it once: by close(), at the end of a with block, or when nobody holds the object."""

    def __init__(self, fd: int) -> None:
        if fd < 0:
            raise ValueError(f"not a file descriptor: {fd}")
        self._fd = fd

    def fileno(self) -> int:
        if self._fd == CLOSED:
            raise ValueError("this fd was closed or detached")
        return self._fd

    @property
    def closed(self) -> bool:
        return self._fd == CLOSED

    def detach(self) -> int:
        """The fd, which is the caller's from now on."""
        fd = self.fileno()
        self._fd = CLOSED
        return fd

    def dup(self) -> OwnedFd:
        """A second fd of the same open file, close-on-exec, with an owner of its own."""
        return OwnedFd(os.dup(self.fileno()))

    def close(self) -> None:
        """Twice is fine."""
        fd, self._fd = self._fd, CLOSED
        if fd != CLOSED:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, cls: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_fd", CLOSED) != CLOSED:
            self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {'closed' if self.closed else self._fd}>"


def close_aside(*owned: OwnedFd) -> None:
    """Closes what somebody else sent without waiting for it: the close of what is no userfaultfd can make its closer
    wait (a socket that lingers, a file of FUSE)."""
    slow = []
    for one in owned:
        if one.closed or os.readlink(f"/proc/self/fd/{one.fileno()}") == _USERFAULTFD:
            one.close()
        else:
            slow.append(OwnedFd(one.detach()))
    if slow:
        threading.Thread(target=_close_all, args=(slow,), name="closing", daemon=True).start()


def _close_all(owned: list[OwnedFd]) -> None:
    for one in owned:
        one.close()


def uffd_device() -> OwnedFd:
    """/dev/userfaultfd, for whoever may open it or has inherited it. OSError: neither."""
    try:
        return OwnedFd(os.open(USERFAULTFD_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        if _inherited_device is None:
            raise
        return _inherited_device.dup()


def open_uffd_device() -> OwnedFd | None:
    """The same to make uffds with or to pass on, if it can be had."""
    try:
        return uffd_device()
    except OSError:
        return None


def named_uffd_device() -> OwnedFd | None:
    """The device that this process was started with, if it was; children do not inherit it."""
    text = os.environ.pop(DEVICE_FD_VARIABLE, None)
    if text is None:
        return None
    os.set_inheritable(int(text), False)
    return OwnedFd(int(text))


def inherit_uffd_device(device: OwnedFd) -> None:
    """From now on uffd_device() has this one, where the process can open none."""
    global _inherited_device
    _inherited_device = device


def inherited_uffd_device() -> OwnedFd | None:
    return _inherited_device
