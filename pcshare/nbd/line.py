"""line: a connected socket on which every wait ends at a deadline; the handshake and the session talk over it.

Turns what goes wrong into SourceError: too late, hung up, garbled, and at which step. Knows no message of NBD.
"""

from __future__ import annotations

import errno
import os
import socket
import time

from pcshare.errors import SourceError

TEXT_SHOWN_MAX = 500  # characters of a server's own words in a message


class Line:
    """A connected stream socket with a deadline (time.monotonic()) and a name for what is waited for."""

    def __init__(self, connection: socket.socket, deadline: float) -> None:
        self.connection = connection
        self.deadline = deadline
        self.step = "its greeting"

    def send(self, data: bytes) -> None:
        try:
            self.connection.settimeout(self._left_s())
            self.connection.sendall(data)
        except OSError as error:
            raise self._failure(error, 0, 0) from error

    def receive(self, length: int) -> bytes:
        data = bytearray(length)
        self.receive_into(memoryview(data))
        return bytes(data)

    def receive_into(self, view: memoryview) -> None:
        got = 0
        while got < len(view):
            try:
                self.connection.settimeout(self._left_s())
                count = self.connection.recv_into(view[got:])
                if count == 0:
                    raise ConnectionResetError(errno.ECONNRESET, "end of file")
            except OSError as error:
                raise self._failure(error, got, len(view)) from error
            got += count

    def garbled(self, detail: str) -> SourceError:
        return SourceError(f"the NBD server garbled {self.step}: {detail}", errno=errno.EPROTO)

    def _left_s(self) -> float:
        left_s = self.deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        return left_s

    def _failure(self, error: OSError, got: int, wanted: int) -> SourceError:
        so_far = f" (of {wanted} bytes {got} came)" if got else ""
        if isinstance(error, TimeoutError):
            return SourceError(
                f"the NBD server did not answer in time: waited for {self.step}{so_far}", errno=errno.ETIMEDOUT
            )
        if isinstance(error, ConnectionResetError | BrokenPipeError):
            return SourceError(f"the NBD server hung up: waited for {self.step}{so_far}", errno=errno.ECONNRESET)
        number = error.errno or errno.EIO
        return SourceError(
            f"the connection to the NBD server failed: {os.strerror(number)}: waited for {self.step}{so_far}",
            errno=number,
        )


def shown(raw: bytes) -> str:
    """A peer's words, harmless for a terminal."""
    text = raw.decode("utf-8", "replace")[:TEXT_SHOWN_MAX]
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
