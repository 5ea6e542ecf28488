"""protocol: the messages of the control socket as one table. No I/O; transport sends and receives them.

Layout is core/wire.h's, read by the compiler and by cffi; this room packs, parses and refuses. What the peer got
wrong is a RemoteProtocolError, what we were about to send wrongly a LocalProtocolError.
"""

from __future__ import annotations

import enum
import errno
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pcshare.core import ffi, lib
from pcshare.errors import LocalProtocolError, RemoteProtocolError, VersionMismatch

VERSION: int = lib.WIRE_VERSION


class Mode(enum.IntEnum):
    """How a helper wants a block."""

    DEFAULT = 0
    RO = 1
    RW = 2
    COW = 3


class WelcomeFlag(enum.IntFlag):
    """What WELCOME says of a block; COMPLETE also in ACK."""

    COMPLETE = 1  # every page is in: no uffd, no ATTACH
    WRITABLE = 2  # it may be attached for writing
    DEVICE = 4  # an open /dev/userfaultfd comes along
    ARRAY = 8  # dtype, shape and data_offset are filled in
    FORTRAN = 16  # the array is in Fortran order
    STRICT = 32  # the helper registers for MINOR faults too


class AdminOp(enum.IntEnum):
    """What an operator may order; the argument of STREAM_RATE is bytes a second."""

    STREAM_EAGER = 1
    STREAM_LAZY = 2
    STREAM_RATE = 3
    STREAM_PAUSE = 4
    STREAM_RESUME = 5
    RESUME = 6
    STOP = 7


@dataclass(frozen=True)
class Hello:
    version_min: int
    version_max: int
    mode: Mode
    idstr: str


@dataclass(frozen=True)
class Welcome:
    flags: int
    mode: Mode
    block_index: int
    used_length: int
    page_size: int
    map_length: int
    features: int
    orphan_timeout_ms: int
    idstr: str
    dtype: str = ""
    shape: tuple[int, ...] = ()
    data_offset: int = 0


@dataclass(frozen=True)
class Map:
    client_addr: int
    offset: int
    length: int


@dataclass(frozen=True)
class Attach:
    maps: tuple[Map, ...]


@dataclass(frozen=True)
class Ack:
    helper_index: int
    flags: int


@dataclass(frozen=True)
class Request:
    flags: int
    offset: int
    length: int


@dataclass(frozen=True)
class Done:
    status: int
    offset: int
    length: int


@dataclass(frozen=True)
class End:
    pass


@dataclass(frozen=True)
class Leave:
    pass


@dataclass(frozen=True)
class Bye:
    pass


@dataclass(frozen=True)
class ErrorMessage:
    error: int
    text: str
    version_max: int = VERSION


@dataclass(frozen=True)
class Admin:
    op: AdminOp
    argument: int


@dataclass(frozen=True)
class Replace:
    """program: the words that start the other one; options: what it is told beside this one's own options."""

    program: tuple[str, ...]
    options: tuple[str, ...]


Message = Hello | Welcome | Attach | Ack | Request | Done | End | Leave | Bye | ErrorMessage | Admin | Replace


def _text(field: Any, what: str) -> str:
    raw = bytes(ffi.buffer(field))
    if b"\0" not in raw:
        raise RemoteProtocolError(f"{what} does not end", errno=errno.EPROTO)
    try:
        return raw.split(b"\0", 1)[0].decode()
    except UnicodeDecodeError:
        raise RemoteProtocolError(f"{what} is no UTF-8", errno=errno.EPROTO) from None


def _member(kind: type[Mode] | type[AdminOp], value: int) -> Any:
    try:
        return kind(value)
    except ValueError:
        raise RemoteProtocolError(f"{value} is no {kind.__name__}", errno=errno.EPROTO) from None


def _parse_hello(m: Any) -> Hello:
    return Hello(m.version_min, m.version_max, _member(Mode, m.mode), _text(m.idstr, "a block's name"))


def _parse_welcome(m: Any) -> Welcome:
    if m.ndim > lib.WIRE_DIMS_MAX:
        raise RemoteProtocolError(f"{m.ndim} dimensions", errno=errno.EPROTO)
    return Welcome(
        m.flags,
        _member(Mode, m.mode),
        m.block_index,
        m.used_length,
        m.page_size,
        m.map_length,
        m.features,
        m.orphan_timeout_ms,
        _text(m.idstr, "a block's name"),
        _text(m.dtype, "a dtype"),
        tuple(m.dims[i] for i in range(m.ndim)),
        m.data_offset,
    )


def _parse_attach(m: Any) -> Attach:
    if not 1 <= m.n_maps <= lib.WIRE_MAPS_MAX:
        raise RemoteProtocolError(
            f"ATTACH with {m.n_maps} maps: 1 to {lib.WIRE_MAPS_MAX} are allowed", errno=errno.EPROTO
        )
    maps = (m.maps[i] for i in range(m.n_maps))
    return Attach(tuple(Map(one.client_addr, one.offset, one.length) for one in maps))


def _parse_error(m: Any) -> ErrorMessage:
    return ErrorMessage(m.error, _text(m.text, "an error's text"), m.version_max)


def _parse_replace(m: Any) -> Replace:
    words = bytes(ffi.buffer(m.words)).split(b"\0")
    if not 1 <= m.n_program <= m.n_words < len(words):
        raise RemoteProtocolError(f"REPLACE with {m.n_program} of {m.n_words} words", errno=errno.EPROTO)
    try:
        texts = tuple(word.decode() for word in words[: m.n_words])
    except UnicodeDecodeError:
        raise RemoteProtocolError("a word of a command is no UTF-8", errno=errno.EPROTO) from None
    return Replace(texts[: m.n_program], texts[m.n_program :])


@dataclass(frozen=True)
class Row:
    """One message: how many fds travel beside it, who sends it, and what it is here."""

    name: str
    ctype: str
    fds: tuple[int, int]  # at least, at most
    sender: str
    parse: Callable[[Any], Message]


_HELPER, _COORDINATOR, _EITHER, _OPERATOR = "helper", "coordinator", "either", "operator"

MESSAGES: dict[int, Row] = {
    lib.WIRE_HELLO: Row("HELLO", "struct wire_hello", (0, 0), _HELPER, _parse_hello),
    lib.WIRE_WELCOME: Row("WELCOME", "struct wire_welcome", (2, 3), _COORDINATOR, _parse_welcome),
    lib.WIRE_ATTACH: Row("ATTACH", "struct wire_attach", (1, 1), _HELPER, _parse_attach),
    lib.WIRE_ACK: Row("ACK", "struct wire_ack", (0, 0), _COORDINATOR, lambda m: Ack(m.helper_index, m.flags)),
    lib.WIRE_REQUEST: Row(
        "REQUEST", "struct wire_request", (0, 0), _HELPER, lambda m: Request(m.flags, m.offset, m.length)
    ),
    lib.WIRE_DONE: Row("DONE", "struct wire_done", (0, 0), _COORDINATOR, lambda m: Done(m.status, m.offset, m.length)),
    lib.WIRE_END: Row("END", "struct wire_plain", (0, 0), _COORDINATOR, lambda m: End()),
    lib.WIRE_LEAVE: Row("LEAVE", "struct wire_plain", (0, 0), _HELPER, lambda m: Leave()),
    lib.WIRE_BYE: Row("BYE", "struct wire_plain", (0, 0), _COORDINATOR, lambda m: Bye()),
    lib.WIRE_ERROR: Row("ERROR", "struct wire_error", (0, 0), _EITHER, _parse_error),
    lib.WIRE_ADMIN: Row(
        "ADMIN", "struct wire_admin", (0, 0), _OPERATOR, lambda m: Admin(_member(AdminOp, m.op), m.argument)
    ),
    lib.WIRE_REPLACE: Row("REPLACE", "struct wire_replace", (0, 0), _OPERATOR, _parse_replace),
}

LENGTH_MAX = max(ffi.sizeof(row.ctype) for row in MESSAGES.values())
FDS_MAX: int = lib.WIRE_FDS_MAX
_HEADER_LENGTH = ffi.sizeof("struct wire_header")


def _check_header(data: bytes) -> Row:
    if len(data) < _HEADER_LENGTH:
        raise RemoteProtocolError(
            f"a message of {len(data)} bytes: a header alone has {_HEADER_LENGTH}", errno=errno.EPROTO
        )
    header = ffi.from_buffer("struct wire_header *", data)
    if header.magic != lib.WIRE_MAGIC:
        raise RemoteProtocolError("what came is no message of pcshare (wrong magic)", errno=errno.EPROTO)
    if header.version != VERSION:
        raise VersionMismatch(
            f"the peer speaks version {header.version}, this side version {VERSION}",
            errno=errno.EPROTONOSUPPORT,
            hint=VersionMismatch.usual_hint,
        )
    row = MESSAGES.get(header.type)
    if row is None:
        raise RemoteProtocolError(f"unknown message type {header.type}", errno=errno.EPROTO)
    if header.length != len(data) or len(data) != ffi.sizeof(row.ctype):
        raise RemoteProtocolError(
            f"{row.name} of {len(data)} bytes that says {header.length}: it has {ffi.sizeof(row.ctype)}",
            errno=errno.EPROTO,
        )
    return row


def parse(data: bytes, n_fds: int) -> Message:
    """The message that came with n_fds fds. RemoteProtocolError: a bad one; VersionMismatch: of another version."""
    row = _check_header(data)
    least, most = row.fds
    if not least <= n_fds <= most:
        wanted = str(least) if least == most else f"{least} to {most}"
        raise RemoteProtocolError(f"{row.name} with {n_fds} fds: it takes {wanted}", errno=errno.EPROTO)
    return row.parse(ffi.from_buffer(f"{row.ctype} *", data))


def _pack(kind: int, **fields: Any) -> bytes:
    ctype = MESSAGES[kind].ctype
    message = ffi.new(f"{ctype} *", fields)
    message.header.magic = lib.WIRE_MAGIC
    message.header.version = VERSION
    message.header.type = kind
    message.header.length = ffi.sizeof(ctype)
    return bytes(ffi.buffer(message))


def cut_text(text: str, size: int) -> bytes:
    """For a field of so many bytes, its NUL included: what does not fit is cut, it is for people. A name of a file may
    hold what is no UTF-8: that is written out."""
    return text.encode(errors="backslashreplace")[: size - 1].decode(errors="ignore").encode()


def _fit(text: str, size: int, what: str) -> bytes:
    try:
        encoded = text.encode()
    except UnicodeEncodeError:
        raise LocalProtocolError(f"{what} that is no UTF-8: {text!r}") from None
    if b"\0" in encoded:
        raise LocalProtocolError(f"{what} with a NUL in it: {text!r}")
    if len(encoded) >= size:
        raise LocalProtocolError(f"{what} of {len(encoded)} bytes: at most {size - 1} fit")
    return encoded


def pack_hello(idstr: str = "", mode: Mode = Mode.DEFAULT) -> bytes:
    return _pack(
        lib.WIRE_HELLO,
        version_min=VERSION,
        version_max=VERSION,
        mode=mode,
        idstr=_fit(idstr, lib.WIRE_IDSTR_MAX, "a block's name"),
    )


def pack_welcome(welcome: Welcome) -> bytes:
    if len(welcome.shape) > lib.WIRE_DIMS_MAX:
        raise LocalProtocolError(f"{len(welcome.shape)} dimensions: at most {lib.WIRE_DIMS_MAX} fit")
    return _pack(
        lib.WIRE_WELCOME,
        flags=welcome.flags,
        mode=welcome.mode,
        block_index=welcome.block_index,
        ndim=len(welcome.shape),
        used_length=welcome.used_length,
        page_size=welcome.page_size,
        map_length=welcome.map_length,
        features=welcome.features,
        data_offset=welcome.data_offset,
        orphan_timeout_ms=welcome.orphan_timeout_ms,
        dims=list(welcome.shape),
        idstr=_fit(welcome.idstr, lib.WIRE_IDSTR_MAX, "a block's name"),
        dtype=_fit(welcome.dtype, lib.WIRE_DTYPE_MAX, "a dtype"),
    )


def pack_attach(maps: Sequence[Map]) -> bytes:
    if not 1 <= len(maps) <= lib.WIRE_MAPS_MAX:
        raise LocalProtocolError(f"{len(maps)} maps: 1 to {lib.WIRE_MAPS_MAX} are allowed")
    rows = [{"client_addr": one.client_addr, "offset": one.offset, "length": one.length} for one in maps]
    return _pack(lib.WIRE_ATTACH, n_maps=len(maps), maps=rows)


def pack_ack(helper_index: int, flags: int = 0) -> bytes:
    return _pack(lib.WIRE_ACK, helper_index=helper_index, flags=flags)


def pack_request(offset: int, length: int, flags: int) -> bytes:
    return _pack(lib.WIRE_REQUEST, flags=flags, offset=offset, length=length)


def pack_end() -> bytes:
    return _pack(lib.WIRE_END)


def pack_leave() -> bytes:
    return _pack(lib.WIRE_LEAVE)


def pack_bye() -> bytes:
    return _pack(lib.WIRE_BYE)


def pack_error(error: int, text: str) -> bytes:
    """A text that does not fit is cut: it is for people."""
    return _pack(lib.WIRE_ERROR, error=error, version_max=VERSION, text=cut_text(text, lib.WIRE_TEXT_MAX))


def pack_admin(op: AdminOp, argument: int = 0) -> bytes:
    return _pack(lib.WIRE_ADMIN, op=op, argument=argument)


def pack_replace(program: Sequence[str], options: Sequence[str]) -> bytes:
    """LocalProtocolError: the words are too many, or one holds a NUL."""
    words = [_fit(word, lib.WIRE_WORDS_MAX, "a word of a command") + b"\0" for word in (*program, *options)]
    whole = b"".join(words)
    if len(whole) > lib.WIRE_WORDS_MAX - 1:
        raise LocalProtocolError(f"a command of {len(whole)} bytes: at most {lib.WIRE_WORDS_MAX - 1} fit")
    return _pack(lib.WIRE_REPLACE, n_program=len(program), n_words=len(words), words=whole)
