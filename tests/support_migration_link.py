"""The connections of a source that tests play: a link that breaks at any byte, and the return path with all it said.

Makes no claims about receivers but these: what comes on the return path is well formed, comes after it was opened, and
asks only for what there is. What does not hold is kept in ReturnPath.errors, and fails the test that uses it.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import Protocol, TypeVar

from pcshare.migration.return_path import (
    PagesWanted,
    Pong,
    ReceivedBitmap,
    ResumeAck,
    ReturnMessage,
    Shut,
    read_return_message,
)
from pcshare.migration.wire import take
from support_migration_bytes import TARGET_PAGE

WAIT_TIMEOUT_S = 30.0  # for an answer of the receiver's
CONNECT_TIMEOUT_S = 20.0


class Block(Protocol):
    """What the return path asks pages of."""

    idstr: str
    used_length: int
    page_size: int
    page_count: int  # target pages


class HungUp(Exception):
    """The receiver has closed the connection."""


class Refused(HungUp):
    """The receiver ends with an error."""


class LinkBroken(Exception):
    """The connection was broken where the test said (break_at)."""


class Preempt(Enum):
    """How a source uses its second connection."""

    NONE = "none"
    V7_2 = "7.2"  # opened right after the first, an end mark at the end
    V8_0 = "8.0"  # opened at the switch to post-copy, no end mark


Connect = Callable[[], socket.socket]


def to_unix(path: str | Path) -> Connect:
    return lambda: _connected(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM), str(path))


def to_tcp(host: str, port: int) -> Connect:
    def connect() -> socket.socket:
        connection = _connected(socket.socket(socket.AF_INET, socket.SOCK_STREAM), (host, port))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    return connect


def _connected(connection: socket.socket, address: str | tuple[str, int]) -> socket.socket:
    try:
        connection.settimeout(CONNECT_TIMEOUT_S)
        connection.connect(address)
        connection.settimeout(None)
    except BaseException:
        connection.close()
        raise
    return connection


class Link:
    """One connection. What is written leaves at flush(); break_at: the connection ends after so many bytes."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.written = 0  # with what is still buffered
        self.break_at: int | None = None
        self.break_hard = False  # with a reset instead of an end, on TCP
        self.last_idstr: str | None = None  # of the last record
        self._buffer = bytearray()

    def write(self, data: bytes) -> None:
        self._buffer += data
        self.written += len(data)
        if self.break_at is not None and self.written >= self.break_at:
            self.flush()

    def flush(self) -> None:
        data, self._buffer = self._buffer, bytearray()
        over = -1 if self.break_at is None else self.written - self.break_at
        try:
            self.connection.sendall(data[: len(data) - over] if over > 0 else data)
        except OSError as error:
            raise HungUp(str(error)) from error
        if over >= 0:
            self.hang_up()
            raise LinkBroken(f"after {self.break_at} bytes")

    def hang_up(self) -> None:
        """What the other side sees as the end; close() gives the fd back, when nobody reads from it."""
        if self.break_hard:
            with contextlib.suppress(OSError):
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.hang_up()
        self.connection.close()


class _ReturnStream:
    """The other direction of a link."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.offset = 0

    def read(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            try:
                piece = self._connection.recv(count - len(data))
            except OSError as error:
                raise HungUp(str(error)) from error
            if not piece:
                assert not data, f"the return path ends within a message, at byte {self.offset + len(data)}"
                raise HungUp
            data += piece
        self.offset += count
        return data


M = TypeVar("M", Shut, Pong, PagesWanted, ReceivedBitmap, ResumeAck)


class ReturnPath:
    """Everything that the receiver said, on all connections; a thread for each reads it.

    said: (number of the connection, message). requests: target pages that are wanted: block, first, count."""

    def __init__(self, blocks: Mapping[str, Block]) -> None:
        self.said: list[tuple[int, ReturnMessage]] = []
        self.requests: deque[tuple[str, int, int]] = deque()
        self.changed = threading.Condition()
        self.is_open = False  # OPEN_RETURN_PATH was sent
        self.errors: list[BaseException] = []
        self.connection_count = 0
        self.hung_up = False  # the connection that was begun last has ended
        self._blocks = blocks
        self._threads: list[threading.Thread] = []

    def begin(self, connection: socket.socket) -> None:
        with self.changed:
            self.requests.clear()
            self.hung_up = False
            self.connection_count += 1
        thread = threading.Thread(target=self._run, args=(connection, self.connection_count), daemon=True)
        self._threads.append(thread)
        thread.start()

    def join(self) -> None:
        """When the connections are shut down."""
        for thread in self._threads:
            thread.join(WAIT_TIMEOUT_S)
            assert not thread.is_alive(), "a reader of the return path does not end"
        self._threads.clear()

    def messages(self, kind: type[M], connection: int | None = None) -> list[M]:
        """Those of one kind; of all connections, or of one (from 1)."""
        with self.changed:
            said = list(self.said)
        return [message for number, message in said if isinstance(message, kind) and connection in (None, number)]

    def wait_for(self, kind: type[M], count: int = 1) -> list[M]:
        """Until so many of a kind have come on this connection; HungUp if it ends before."""
        with self.changed:
            done = self.changed.wait_for(lambda: self._has(kind, count) or self._is_over(), WAIT_TIMEOUT_S)
        found = self.messages(kind, self.connection_count)
        if len(found) < count:
            if done and not self.errors:
                raise HungUp(f"waiting for {kind.__name__}")
            raise AssertionError(f"waited in vain for {count} {kind.__name__}, got {found}; {self.errors}")
        return found

    def wait_for_hang_up(self) -> None:
        with self.changed:
            assert self.changed.wait_for(self._is_over, WAIT_TIMEOUT_S), "the receiver does not hang up"

    def _is_over(self) -> bool:
        return self.hung_up or bool(self.errors)

    def _has(self, kind: type[M], count: int) -> bool:
        return (
            sum(isinstance(message, kind) for number, message in self.said if number == self.connection_count) >= count
        )

    def _run(self, connection: socket.socket, number: int) -> None:
        stream = _ReturnStream(connection)
        bitmap_max = max(bitmap_length(block) for block in self._blocks.values())
        last: Block | None = None
        try:
            while True:
                message = take(stream, read_return_message(bitmap_max))
                assert self.is_open, f"the receiver says {message} before the return path was opened"
                with self.changed:
                    if isinstance(message, PagesWanted):
                        last = self._request(message, last)
                    self.said.append((number, message))
                    self.changed.notify_all()
        except HungUp:
            pass
        except BaseException as error:
            self.errors.append(error)
        with self.changed:
            self.hung_up = self.hung_up or number == self.connection_count
            self.changed.notify_all()

    def _request(self, wanted: PagesWanted, last: Block | None) -> Block:
        block = last if wanted.idstr is None else self._blocks[wanted.idstr]
        assert block is not None, "the first request of a connection names no block"
        assert wanted.length > 0, wanted
        assert (wanted.start | wanted.length) % block.page_size == 0, f"{wanted} of pages of {block.page_size}"
        assert wanted.start + wanted.length <= block.used_length, f"{wanted} of {block.used_length} bytes"
        self.requests.append((block.idstr, wanted.start // TARGET_PAGE, wanted.length // TARGET_PAGE))
        return block


def bitmap_length(block: Block) -> int:
    """Bytes of its received bitmap on the wire."""
    return (block.page_count + 63) // 64 * 8
