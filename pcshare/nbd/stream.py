"""stream: the two directions of a server's connection: a socket, or two pipes.

Bytes in order, with a deadline where one is wanted, and nothing of their meaning. The fds block: a peer that does not
read is found out by the socket's own send timeout.
 - A pipe has no such timeout: whoever serves one connection over pipes has nobody else to care for.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct
import time
from collections.abc import Sequence

from pcshare.nbd import tcp
from pcshare.nbd.export import FileRange, Piece

SEND_TIMEOUT_S = 60  # for a peer that takes nothing at all: longer than anybody stops for, and it holds up only itself
KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_COUNT = 60, 15, 4  # a host that vanished is noticed in two minutes
RECEIVE_BYTES = 1 << 16  # more than two thousand requests at once
# Shorter ranges are read and go out with what precedes them in one call, which wakes the peer once.
SENDFILE_BYTES_MIN = 1 << 16
VECTOR_MAX = 1024  # IOV_MAX
_TIMEVAL = struct.Struct("ll")
_HANG_UPS = select.POLLHUP | select.POLLERR | select.POLLRDHUP


class HungUp(Exception):
    """The peer is gone, or takes nothing any more."""


class Stream:
    """Owns its fds; made by of_socket or of_pipes. One thread reads, and one at a time sends."""

    def __init__(self, in_fd: int, out_fd: int) -> None:
        self._in_fd = in_fd
        self._out_fd = out_fd
        self._socket: socket.socket | None = None
        self._hang_up_fd = -1  # an eventfd: nothing else ends a read of a pipe
        self._received = bytearray()

    @classmethod
    def of_pipes(cls, in_fd: int, out_fd: int) -> Stream:
        stream = cls(in_fd, out_fd)
        stream._hang_up_fd = os.eventfd(0)
        return stream

    @classmethod
    def of_socket(cls, end: socket.socket) -> Stream:
        end.setblocking(True)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL.pack(SEND_TIMEOUT_S, 0))
        if end.family in (socket.AF_INET, socket.AF_INET6):
            tcp.tune(end, KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_COUNT)
        stream = cls(end.fileno(), end.fileno())
        stream._socket = end
        return stream

    # -- receiving

    def receive(self, length: int, deadline: float | None = None) -> bytes:
        """Exactly so many bytes. HungUp; TimeoutError after the deadline (time.monotonic())."""
        while len(self._received) < length:
            self._fill(deadline)
        content = bytes(memoryview(self._received)[:length])
        del self._received[:length]
        return content

    def skip(self, length: int) -> None:
        """Takes bytes that nobody wants, and keeps none."""
        while length > 0:
            length -= len(self.receive(min(length, RECEIVE_BYTES)))

    def _fill(self, deadline: float | None) -> None:
        if deadline is not None or self._hang_up_fd >= 0:
            self._await_bytes(deadline)
        try:
            content = os.read(self._in_fd, RECEIVE_BYTES)
        except OSError as error:
            raise HungUp from error
        if not content:
            raise HungUp
        self._received += content

    def _await_bytes(self, deadline: float | None) -> None:
        poll = select.poll()
        poll.register(self._in_fd, select.POLLIN)
        if self._hang_up_fd >= 0:
            poll.register(self._hang_up_fd, select.POLLIN)
        found = poll.poll(None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000)
        if not found:
            raise TimeoutError
        if any(fd == self._hang_up_fd for fd, _ in found):
            raise HungUp

    def is_hung_up(self) -> bool:
        """Whether the peer has closed its end, whatever of it is still unread."""
        poll = select.poll()
        poll.register(self._in_fd, _HANG_UPS)
        return bool(poll.poll(0))

    # -- sending

    def send(self, pieces: Sequence[Piece]) -> None:
        """All of it. HungUp; OSError: a range of a file that cannot be read, and nothing was sent."""
        small = [_read_if_short(piece) for piece in pieces]
        try:
            start = 0
            for i, piece in enumerate(small):
                if isinstance(piece, FileRange):
                    self._write(small[start:i], more=True)
                    self._send_file(piece)
                    start = i + 1
            self._write(small[start:], more=False)
        except OSError as error:
            raise HungUp from error

    def _write(self, pieces: Sequence[Piece], *, more: bool) -> None:
        if more and self._socket is not None and len(pieces) == 1:
            self._socket.sendall(pieces[0], socket.MSG_MORE)  # type: ignore[arg-type]
            return
        left = [memoryview(piece).cast("B") for piece in pieces if not isinstance(piece, FileRange) and len(piece)]
        while left:
            sent = os.writev(self._out_fd, left[:VECTOR_MAX])
            while left and sent >= len(left[0]):
                sent -= len(left.pop(0))
            if sent:
                left[0] = left[0][sent:]

    def _send_file(self, piece: FileRange) -> None:
        at, end = piece.offset, piece.offset + piece.length
        try:
            while at < end:
                sent = os.sendfile(self._out_fd, piece.fd, at, end - at)
                if sent == 0:
                    raise HungUp  # the file is shorter than it was, and the length is announced
                at += sent
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._copy_file(FileRange(piece.fd, at, end - at))  # no sendfile from that file system

    def _copy_file(self, piece: FileRange) -> None:
        for at in range(piece.offset, piece.offset + piece.length, RECEIVE_BYTES):
            length = min(RECEIVE_BYTES, piece.offset + piece.length - at)
            self._write([_read_whole(FileRange(piece.fd, at, length))], more=False)

    # -- end

    def hang_up(self) -> None:
        """Ends what other threads wait for in it; from any thread."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
        elif self._hang_up_fd >= 0:
            os.eventfd_write(self._hang_up_fd, 1)

    def close(self) -> None:
        """Twice is fine."""
        if self._socket is not None:
            self._socket.close()
            return
        fds = {self._in_fd, self._out_fd, self._hang_up_fd} - {-1}
        self._in_fd = self._out_fd = self._hang_up_fd = -1
        for fd in fds:
            os.close(fd)


def _read_if_short(piece: Piece) -> Piece:
    if isinstance(piece, FileRange) and piece.length < SENDFILE_BYTES_MIN:
        return _read_whole(piece)
    return piece


def _read_whole(piece: FileRange) -> bytes:
    content = os.pread(piece.fd, piece.length, piece.offset)
    if len(content) < piece.length:
        raise OSError(errno.EIO, "the file is shorter than it was")
    return content
