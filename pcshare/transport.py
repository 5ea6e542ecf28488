"""transport: the only file that calls sendmsg and recvmsg: one datagram with its fds over a SEQPACKET socket.

Knows no message. Every fd that arrives has an owner at once; truncation of bytes or fds is the peer's fault and
closes what came.
"""

from __future__ import annotations

import array
import contextlib
import errno
import os
import select
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from pcshare.errors import AttachTimeout, CoordinatorGone, NoSuchCoordinator, PcshareError, RemoteProtocolError
from pcshare.fds import OwnedFd, close_aside

MESSAGE_BYTES_MAX = 4096  # the largest message is half of it
FDS_MAX = 4  # as WIRE_FDS_MAX
FDS_ROOM = 253  # as SCM_MAX_FD: what finds no room the kernel closes at once, and may wait for it
BACKLOG = 4096  # as STATUS_HELPERS_MAX: all that may attach can wait at once; net.core.somaxconn may allow less
SO_PASSRIGHTS = 83  # Linux 6.16; Python names it not yet
_INT_BYTES = array.array("i").itemsize
_UCRED = struct.Struct("iII")
_TIMEVAL = struct.Struct("ll")


@dataclass(frozen=True)
class PeerCredentials:
    """Who connected, as the kernel noted it then."""

    pid: int
    uid: int
    gid: int


class Connection:
    """One end of a control socket; owns it."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        end.setblocking(False)

    @classmethod
    def of(cls, fd: OwnedFd) -> Self:
        """Of a socket that is connected already, and is taken."""
        return cls(socket.socket(fileno=fd.detach()))

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """All or nothing, without waiting. BlockingIOError: the peer does not read; ConnectionError: it is gone."""
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self._socket.sendmsg([data], ancillary, socket.MSG_NOSIGNAL)

    def receive_now(self) -> tuple[bytes, list[OwnedFd]]:
        """One message and its fds; b"" when the peer hung up. BlockingIOError: none is there."""
        data, ancillary, flags, _ = self._socket.recvmsg(
            MESSAGE_BYTES_MAX, socket.CMSG_SPACE(FDS_ROOM * _INT_BYTES), socket.MSG_CMSG_CLOEXEC
        )
        fds: list[OwnedFd] = []
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                whole = content[: len(content) - len(content) % _INT_BYTES]
                fds += [OwnedFd(fd) for fd in array.array("i", whole)]
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC) or len(fds) > FDS_MAX:
            close_aside(*fds)
            raise RemoteProtocolError("a message or its fds are too many and were cut off", errno=errno.EPROTO)
        return data, fds

    def receive(self, timeout_s: float) -> tuple[bytes, list[OwnedFd]]:
        """As receive_now, waiting so long. AttachTimeout; CoordinatorGone when the peer hangs up."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                data, fds = self.receive_now()
            except BlockingIOError:
                left = deadline - time.monotonic()
                if left <= 0 or not poll.poll(max(1, left * 1000)):
                    raise AttachTimeout(
                        f"no answer within {timeout_s:g} s", errno=errno.ETIMEDOUT, hint=AttachTimeout.usual_hint
                    ) from None
                continue
            except ConnectionError as error:
                raise CoordinatorGone(
                    "the coordinator hung up", errno=error.errno, hint=CoordinatorGone.usual_hint
                ) from None
            if not data and not fds:
                raise CoordinatorGone(
                    "the coordinator hung up", errno=errno.ECONNRESET, hint=CoordinatorGone.usual_hint
                )
            return data, fds

    def credentials(self) -> PeerCredentials:
        return PeerCredentials(
            *_UCRED.unpack(self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        )

    def accept_fds(self, wanted: bool) -> None:
        """Whether the peer may send fds. An fd can be such that closing it waits, for somebody else's socket or file
        system: where the kernel can refuse them, none comes but when one is due."""
        _accept_fds(self._socket, wanted)

    def has_unread(self) -> bool:
        """Whether the peer has sent something, or hung up."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(0))

    def dup(self) -> OwnedFd:
        """A copy of the socket for the core."""
        return OwnedFd(os.dup(self._socket.fileno()))

    def shutdown(self) -> None:
        """Hangs up, also for copies."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError as error:
            if error.errno != errno.ENOTCONN:
                raise

    def close(self) -> None:
        self._socket.close()

    def close_unread(self) -> None:
        """Closes without waiting for the fds that may lie in messages which nobody has read."""
        if self._socket.fileno() >= 0:
            self.accept_fds(False)
            if self.has_unread():
                close_aside(OwnedFd(self._socket.detach()))
        self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _accept_fds(end: socket.socket, wanted: bool) -> None:
    with contextlib.suppress(OSError):  # an older kernel
        end.setsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS, int(wanted))


def _timeval(timeout_s: float) -> bytes:
    us = max(1, round(timeout_s * 1_000_000))  # 0 would be for ever
    return _TIMEVAL.pack(us // 1_000_000, us % 1_000_000)


def connect(path: str, timeout_s: float) -> Connection:
    """To the coordinator that listens there. NoSuchCoordinator: nobody does; AttachTimeout: it does not take
    connections."""
    end = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        # A full backlog: a socket that does not block is told EAGAIN at once, one with this option waits so long.
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(timeout_s))
        end.connect(path)
    except (FileNotFoundError, ConnectionRefusedError) as error:
        end.close()
        raise NoSuchCoordinator(
            f"nobody listens on {path}", errno=error.errno, hint=NoSuchCoordinator.usual_hint
        ) from None
    except (TimeoutError, BlockingIOError):
        end.close()
        raise AttachTimeout(
            f"{path} takes no connection within {timeout_s:g} s", errno=errno.ETIMEDOUT, hint=AttachTimeout.usual_hint
        ) from None
    except OSError as error:
        end.close()
        raise PcshareError(f"cannot connect to {path}: {error.strerror}", errno=error.errno) from None
    return Connection(end)


class Datagrams:
    """One end of a socket for datagrams, to whoever keeps fds for us; owns it."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        end.setblocking(True)  # a datagram that was sent is as good as read

    @classmethod
    def connected(cls, address: str) -> Self:
        """To a path, or with an @ in front to an abstract name. OSError: nobody is there."""
        end = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            end.connect("\0" + address[1:] if address.startswith("@") else address)
        except BaseException:
            end.close()
            raise
        return cls(end)

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """OSError: it was not sent."""
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self._socket.sendmsg([data], ancillary, socket.MSG_NOSIGNAL)

    def close(self) -> None:
        self._socket.close()


class Listener:
    """The coordinator's socket: a file of this mode, gone with close()."""

    def __init__(self, path: str, mode: int, taken: OwnedFd | None = None) -> None:
        """taken: the socket itself, which listens there already."""
        self.path = path
        self._inode: int | None = None
        if taken is not None:
            self._socket = socket.socket(fileno=taken.detach())
            self._socket.setblocking(False)
            self._inode = _inode_of(path)
            return
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._socket.setblocking(False)
            _accept_fds(self._socket, False)  # connections inherit it
            self._socket.bind(path)
            os.chmod(path, mode)
            self._inode = _inode_of(path)
            self._socket.listen(BACKLOG)
        except BaseException:
            self.close()
            raise

    def fileno(self) -> int:
        return self._socket.fileno()

    def accept(self) -> Connection | None:
        """The next connection, or None. OSError EMFILE and its like: no fd is left."""
        try:
            end, _ = self._socket.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return None
        return Connection(end)

    def close(self) -> None:
        """Closes, and removes the file if it is still ours."""
        self._socket.close()
        if self._inode is not None and _inode_of(self.path) == self._inode:
            os.unlink(self.path)
        self._inode = None


def _inode_of(path: str) -> int | None:
    try:
        return os.stat(path).st_ino
    except FileNotFoundError:
        return None
