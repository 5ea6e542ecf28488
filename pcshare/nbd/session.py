"""session: a synchronous reader on a connection in its transmission phase, for what may take its time.

One request at a time, each with a deadline; replies simple or structured, and each byte of them is checked. The pages
of a block are not read here: the socket goes to the core with detach().

Some facts about servers:
 - block status may answer for less than was asked, and its last extent may reach beyond it;
 - the maximum that a server names is for payloads: block status may ask for more;
 - a reply that came too late cannot be told from the next one without reading it: the session is over then.
"""

from __future__ import annotations

import bisect
import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Self

from pcshare.errors import LocalProtocolError, SourceError
from pcshare.extents import gathered
from pcshare.nbd.line import Line, shown
from pcshare.nbd.wire import (
    CHUNK,
    CHUNK_DONE,
    CHUNK_ERROR,
    CONTEXT_ID,
    EXTENT,
    NAME_LENGTH_MAX,
    OFFSET,
    OFFSET_HOLE,
    PAYLOAD_MAX_DEFAULT,
    REQUEST,
    REQUEST_MAGIC,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Chunk,
    Command,
    ExtentFlag,
    error_from_wire,
)

BLOCK_PREFERRED_DEFAULT = 4096
BLOCK_STATUS_LENGTH_MAX = 1 << 30  # asked for at once; the field has 32 bits, and every minimum divides it
STATUS_EXTENTS_MAX = 1 << 20  # in one reply; known servers stop at an eighth of it
REPLY_ERRORS_MAX = 64  # error chunks in one reply

_CHUNK_ERROR_BIT = 1 << 15  # of a chunk's type
_SIMPLE = -1  # in place of a chunk's type


@dataclass(frozen=True)
class ServerExport:
    """What the server said of an export. Sizes in bytes; reads are multiples of block_min, the size's end apart."""

    size: int
    read_only: bool = False
    multi_conn: bool = False
    structured: bool = False
    block_status: bool = False  # base:allocation was negotiated
    block_min: int = 1
    block_preferred: int = BLOCK_PREFERRED_DEFAULT
    block_max: int = PAYLOAD_MAX_DEFAULT  # of one read
    description: str = ""


class _Head(NamedTuple):
    """The beginning of a reply: kind is _SIMPLE or a chunk's type, error that of a simple one."""

    kind: int
    length: int
    done: bool
    error: int


class _Fault(NamedTuple):
    errno: int
    text: str


class _Landing:
    """Where the data of one read lands: each byte once."""

    def __init__(self, line: Line, view: memoryview, offset: int) -> None:
        self._line = line
        self._view = view  # zeros
        self._offset = offset
        self._filled: list[tuple[int, int]] = []
        self._missing = len(view)

    def take(self, offset: int, length: int) -> memoryview:
        """The place for length bytes from offset of the export."""
        start = offset - self._offset
        if length == 0 or start < 0 or start + length > len(self._view):
            raise self._line.garbled(f"{length} bytes at {offset}, which were not asked for")
        index = bisect.bisect(self._filled, (start, start + length))
        before_end = self._filled[index - 1][1] if index else 0
        next_start = self._filled[index][0] if index < len(self._filled) else len(self._view)
        if start < before_end or start + length > next_start:
            raise self._line.garbled(f"bytes at {offset} came twice")
        self._filled.insert(index, (start, start + length))
        self._missing -= length
        return self._view[start : start + length]

    def check_full(self) -> None:
        if self._missing:
            raise self._line.garbled(f"of {len(self._view)} bytes {self._missing} are missing")


class Session:
    """A connection in its transmission phase, one request at a time. A refusal by the server (SourceError with its
    errno) leaves it usable; anything else that goes wrong does not."""

    def __init__(self, line: Line, export: ServerExport, context: int | None) -> None:
        self.export = export
        self._line = line
        self._context = context
        self._cookie = 0
        self._usable = True
        self._owns_connection = True

    @property
    def usable(self) -> bool:
        """Whether nothing is outstanding: it can be asked, and detached. Not after a deadline that passed."""
        return self._usable

    def read(self, offset: int, length: int, deadline: float) -> bytes:
        """The bytes [offset, offset + length) of the export."""
        self._check_range(offset, length)
        if length == 0:
            return b""
        least, size = self.export.block_min, self.export.size
        start = offset - offset % least
        end = min(offset + length + -(offset + length) % least, size)
        most = min(self.export.block_max, PAYLOAD_MAX_DEFAULT)
        data = bytearray(end - start)
        for at in range(start, end, most):
            self._read_piece(memoryview(data)[at - start : at - start + most], at, deadline)
        return bytes(memoryview(data)[offset - start : offset - start + length])

    def block_status(self, offset: int, length: int, deadline: float) -> list[tuple[int, ExtentFlag]]:
        """Length and flags of the extents from offset on, as far as the server tells: at most length bytes.

        offset and length are multiples of block_min, the size's end apart."""
        self._check_range(offset, length)
        least = self.export.block_min
        if length == 0 or offset % least or (length % least and offset + length < self.export.size):
            raise LocalProtocolError(f"{length} bytes at {offset} are no multiples of {least}")
        if self._context is None:
            raise SourceError("the NBD server does not tell what is a hole", errno=errno.ENOTSUP)
        length = min(length, BLOCK_STATUS_LENGTH_MAX)
        extents: list[tuple[int, ExtentFlag]] = []
        with self._exchange(Command.BLOCK_STATUS, offset, length, deadline) as faults:
            for head in self._heads(faults):
                if head.kind != Chunk.BLOCK_STATUS or extents:
                    raise self._line.garbled(_unexpected(head))
                extents = self._receive_extents(head, length)
            if not extents and not faults:
                raise self._line.garbled("no extents")
        return extents

    def data_extents(self, deadline: float, extents_max: int) -> list[tuple[int, int]]:
        """The ranges [start, end) that are not zeros, sorted, at least HOLE_BYTES_MIN apart, at most extents_max.

        Where the server cannot say, or the deadline passes (usable tells), the rest counts as data."""
        return gathered(self._data_ranges(deadline), self.export.size, extents_max)

    def _data_ranges(self, deadline: float) -> Iterator[tuple[int, int]]:
        at, size = 0, self.export.size
        while at < size:
            try:
                extents = self.block_status(at, size - at, deadline)
            except SourceError as error:
                if not self._usable and error.errno != errno.ETIMEDOUT:
                    raise
                yield at, size
                return
            for length, flags in extents:
                if not flags & ExtentFlag.ZERO:
                    yield at, at + length
                at += length

    def detach(self) -> socket.socket:
        """The socket, blocking, with nothing outstanding; the caller owns it and the session is over."""
        self._check_usable()
        self._usable = self._owns_connection = False
        self._line.connection.settimeout(None)
        return self._line.connection

    def close(self) -> None:
        """Says goodbye, where that needs no waiting, and closes; nothing after detach(). Twice is fine."""
        if not self._owns_connection:
            return
        self._owns_connection = False
        connection = self._line.connection
        if self._usable:
            with contextlib.suppress(OSError):
                connection.setblocking(False)
                connection.send(REQUEST.pack(REQUEST_MAGIC, 0, Command.DISC, self._cookie + 1, 0, 0))
        self._usable = False
        connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_usable(self) -> None:
        if not self._usable:
            raise LocalProtocolError("this session with an NBD server is over")

    def _check_range(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.export.size:
            raise LocalProtocolError(f"{length} bytes at {offset} of an export of {self.export.size} bytes")

    @contextlib.contextmanager
    def _exchange(self, command: Command, offset: int, length: int, deadline: float) -> Iterator[list[_Fault]]:
        """Sends a request; the body receives the whole reply. What it notes as faults is raised at the end."""
        self._check_usable()
        self._usable = False
        self._cookie += 1
        self._line.deadline = deadline
        self._line.step = f"its reply to {command.name} of {length} bytes at {offset}"
        self._line.send(REQUEST.pack(REQUEST_MAGIC, 0, command, self._cookie, offset, length))
        faults: list[_Fault] = []
        yield faults
        self._usable = True
        if faults:
            said = "; ".join(fault.text for fault in faults if fault.text)
            raise SourceError(
                f"the NBD server refuses {command.name} of {length} bytes at {offset}: {os.strerror(faults[0].errno)}"
                + (f" ({said})" if said else ""),
                errno=faults[0].errno,
            )

    def _read_piece(self, view: memoryview, offset: int, deadline: float) -> None:
        with self._exchange(Command.READ, offset, len(view), deadline) as faults:
            landing = _Landing(self._line, view, offset)
            for head in self._heads(faults):
                self._receive_data(head, landing, offset, len(view))
            if not faults:
                landing.check_full()

    def _receive_data(self, head: _Head, landing: _Landing, offset: int, length: int) -> None:
        if head.kind == _SIMPLE and not self.export.structured:
            self._line.receive_into(landing.take(offset, length))
        elif head.kind == Chunk.OFFSET_DATA and head.length >= OFFSET.size:
            (at,) = OFFSET.unpack(self._line.receive(OFFSET.size))
            self._line.receive_into(landing.take(at, head.length - OFFSET.size))
        elif head.kind == Chunk.OFFSET_HOLE and head.length == OFFSET_HOLE.size:
            landing.take(*OFFSET_HOLE.unpack(self._line.receive(OFFSET_HOLE.size)))
        else:
            raise self._line.garbled(_unexpected(head))

    def _receive_extents(self, head: _Head, length: int) -> list[tuple[int, ExtentFlag]]:
        count, rest = divmod(head.length - CONTEXT_ID.size, EXTENT.size)
        if rest or not 0 < count <= STATUS_EXTENTS_MAX:
            raise self._line.garbled(f"extents of {head.length} bytes")
        data = self._line.receive(head.length)
        (context,) = CONTEXT_ID.unpack(data[: CONTEXT_ID.size])
        if context != self._context:
            raise self._line.garbled(f"extents of context {context}, which was not negotiated")
        extents = []
        for extent_length, flags in EXTENT.iter_unpack(data[CONTEXT_ID.size :]):
            if extent_length == 0 or (extent_length % self.export.block_min and extent_length < length):
                raise self._line.garbled(f"an extent of {extent_length} bytes")
            extents.append((min(extent_length, length), ExtentFlag(flags & (ExtentFlag.HOLE | ExtentFlag.ZERO))))
            length -= extents[-1][0]
            if length == 0:
                break
        return extents

    def _heads(self, faults: list[_Fault]) -> Iterator[_Head]:
        """What of a reply brings something; the caller receives the rest of each. Errors are added to the faults."""
        while True:
            head = self._receive_head()
            if head.kind == _SIMPLE and head.error:
                faults.append(_Fault(error_from_wire(head.error), ""))
            elif head.kind == Chunk.NONE and head.length == 0 and head.done:
                return
            elif head.kind != _SIMPLE and head.kind & _CHUNK_ERROR_BIT:
                faults.append(self._receive_fault(head))
                if len(faults) > REPLY_ERRORS_MAX:
                    raise self._line.garbled(f"more than {REPLY_ERRORS_MAX} errors")
            else:
                yield head
            if head.done:
                return

    def _receive_head(self) -> _Head:
        magic = self._line.receive(4)
        number = int.from_bytes(magic, "big")
        if number == SIMPLE_REPLY_MAGIC:
            _, error, cookie = SIMPLE_REPLY.unpack(magic + self._line.receive(SIMPLE_REPLY.size - len(magic)))
            head = _Head(_SIMPLE, 0, True, error)
        elif number == STRUCTURED_REPLY_MAGIC and self.export.structured:
            rest = self._line.receive(CHUNK.size - len(magic))
            _, flags, kind, cookie, length = CHUNK.unpack(magic + rest)
            head = _Head(kind, length, bool(flags & CHUNK_DONE), 0)
        else:
            raise self._line.garbled(f"wrong magic {number:#010x}")
        if cookie != self._cookie:
            raise self._line.garbled(f"it is for request {cookie}, which nobody made")
        return head

    def _receive_fault(self, head: _Head) -> _Fault:
        if not CHUNK_ERROR.size <= head.length <= CHUNK_ERROR.size + NAME_LENGTH_MAX + OFFSET.size:
            raise self._line.garbled(f"an error of {head.length} bytes")
        data = self._line.receive(head.length)
        number, text_length = CHUNK_ERROR.unpack(data[: CHUNK_ERROR.size])
        rest = head.length - CHUNK_ERROR.size - text_length
        is_whole = rest >= 0
        if head.kind in (Chunk.ERROR, Chunk.ERROR_OFFSET):
            is_whole = rest == (OFFSET.size if head.kind == Chunk.ERROR_OFFSET else 0)
        if number == 0 or not is_whole:
            raise self._line.garbled(f"error {number} with a text of {text_length} bytes in {head.length}")
        return _Fault(error_from_wire(number), shown(data[CHUNK_ERROR.size : CHUNK_ERROR.size + text_length]))


def _unexpected(head: _Head) -> str:
    return "a simple reply" if head.kind == _SIMPLE else f"a chunk of type {head.kind} and {head.length} bytes"
