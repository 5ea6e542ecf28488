"""return_path: the messages of the return path: what a receiver answers, and how a source reads it. No I/O.

Which message is due when is for others to say. The page requests of a running migration are the core's (core/incoming):
here they are built for sources to be tried with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from pcshare.migration.wire import (
    BITMAP_END,
    NAME_LENGTH_MAX,
    REQUEST,
    RESUME_VALUE,
    RETURN_HEADER,
    RETURN_PAYLOAD_MAX,
    U32,
    U64,
    Parser,
    ReturnType,
    Wrong,
    name_bytes,
    text_of,
)

BITMAP_UNIT = 8  # bytes: a bitmap's size is a multiple of it


@dataclass(frozen=True)
class Shut:
    """The receiver is done; status 0: all is well."""

    status: int


@dataclass(frozen=True)
class Pong:
    """Answers a PING."""

    value: int


@dataclass(frozen=True)
class PagesWanted:
    """A range that somebody waits for, in bytes; idstr None: of the block of the request before."""

    start: int
    length: int
    idstr: str | None


@dataclass(frozen=True)
class ReceivedBitmap:
    """Which target pages of a block have come: bit i is byte i/8, bit i%8."""

    idstr: str
    bitmap: bytes


@dataclass(frozen=True)
class ResumeAck:
    """Pages may go on."""

    value: int


ReturnMessage: TypeAlias = Shut | Pong | PagesWanted | ReceivedBitmap | ResumeAck


# -- what a receiver sends


def _message(kind: ReturnType, payload: bytes) -> bytes:
    return RETURN_HEADER.pack(kind, len(payload)) + payload


def shut(status: int = 0) -> bytes:
    return _message(ReturnType.SHUT, U32.pack(status))


def pong(value: int) -> bytes:
    return _message(ReturnType.PONG, U32.pack(value))


def resume_ack() -> bytes:
    return _message(ReturnType.RESUME_ACK, U32.pack(RESUME_VALUE))


def recv_bitmap(idstr: str, bitmap: bytes) -> bytes:
    """The message and the bitmap after it, whose size is a multiple of BITMAP_UNIT."""
    if len(bitmap) % BITMAP_UNIT:
        raise ValueError(f"a bitmap of {len(bitmap)} bytes")
    head = _message(ReturnType.RECV_BITMAP, name_bytes(idstr))
    return head + U64.pack(len(bitmap)) + bitmap + U64.pack(BITMAP_END)


def req_pages(start: int, length: int, idstr: str | None = None) -> bytes:
    """Both in bytes; idstr None: the block of the request before."""
    range_wanted = REQUEST.pack(start, length)
    if idstr is None:
        return _message(ReturnType.REQ_PAGES, range_wanted)
    return _message(ReturnType.REQ_PAGES_ID, range_wanted + name_bytes(idstr))


# -- how a source reads it


def read_return_message(bitmap_length_max: int) -> Parser[ReturnMessage]:
    """One message; bitmap_length_max: bytes that the bitmap of the largest block has."""
    kind, length = RETURN_HEADER.unpack((yield RETURN_HEADER.size))
    shortest, longest = _LENGTHS.get(kind, (0, -1))
    if not shortest <= length <= longest:
        raise Wrong(f"message {kind} with {length} bytes on the return path")
    payload = yield length
    if kind == ReturnType.RECV_BITMAP:
        return ReceivedBitmap(_idstr(payload), (yield from _read_bitmap(bitmap_length_max)))
    if kind in (ReturnType.REQ_PAGES, ReturnType.REQ_PAGES_ID):
        start, wanted = REQUEST.unpack(payload[: REQUEST.size])
        return PagesWanted(start, wanted, _idstr(payload[REQUEST.size :]) if kind == ReturnType.REQ_PAGES_ID else None)
    (value,) = U32.unpack(payload)
    return _OF_ONE_NUMBER[kind](value)


_OF_ONE_NUMBER: dict[int, type[Shut] | type[Pong] | type[ResumeAck]] = {
    ReturnType.SHUT: Shut,
    ReturnType.PONG: Pong,
    ReturnType.RESUME_ACK: ResumeAck,
}
_LENGTHS: dict[int, tuple[int, int]] = {
    ReturnType.SHUT: (U32.size, U32.size),
    ReturnType.PONG: (U32.size, U32.size),
    ReturnType.RESUME_ACK: (U32.size, U32.size),
    ReturnType.REQ_PAGES: (REQUEST.size, REQUEST.size),
    ReturnType.REQ_PAGES_ID: (REQUEST.size + 2, REQUEST.size + 1 + NAME_LENGTH_MAX),
    ReturnType.RECV_BITMAP: (2, 1 + NAME_LENGTH_MAX),
}
assert all(longest <= RETURN_PAYLOAD_MAX for _, longest in _LENGTHS.values())


def _idstr(data: bytes) -> str:
    if data[0] != len(data) - 1:
        raise Wrong(f"a name of {data[0]} bytes in {len(data) - 1} on the return path")
    return text_of(data[1:], "a block's name on the return path")


def _read_bitmap(length_max: int) -> Parser[bytes]:
    (length,) = U64.unpack((yield U64.size))
    if not 0 < length <= length_max or length % BITMAP_UNIT:
        raise Wrong(f"a bitmap of {length} bytes on the return path")
    bitmap = yield length
    (end,) = U64.unpack((yield U64.size))
    if end != BITMAP_END:
        raise Wrong(f"a bitmap that ends with {end:#x} on the return path")
    return bitmap
