"""client: the handshake with an NBD server over a connected socket; it ends in a Session on one export.

Every wait ends at the caller's deadline, everything that the server can make long has a limit, and garbage is one
exception that says what was wrong. Opens no connection, retries nothing, knows no URI: messages do not name the server.

Some facts about servers:
 - one without TLS answers what it does not know with ERR_UNSUP; one that wants TLS answers ERR_TLS_REQD to everything;
 - a server that is not "fixed" newstyle hangs up at any option but EXPORT_NAME, and at an unknown name.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import socket
import struct
from collections.abc import Iterator

from pcshare.errors import SourceError
from pcshare.nbd.line import TEXT_SHOWN_MAX, Line, shown
from pcshare.nbd.session import BLOCK_PREFERRED_DEFAULT, ServerExport, Session
from pcshare.nbd.wire import (
    BASE_ALLOCATION,
    CLIENT_FLAGS,
    CONTEXT_ID,
    EXPORT_NAME_REPLY,
    EXPORT_NAME_ZEROES,
    HELLO,
    INFO_BLOCK_SIZE,
    INFO_EXPORT,
    NAME_LENGTH_MAX,
    NBD_MAGIC,
    OLDSTYLE_MAGIC,
    OPTION,
    OPTION_LENGTH_MAX,
    OPTION_MAGIC,
    OPTION_REPLY,
    OPTION_REPLY_MAGIC,
    PAYLOAD_MAX_DEFAULT,
    HandshakeFlag,
    Info,
    Option,
    OptionReply,
    TransmissionFlag,
)
from pcshare.nbd.wire import ERROR_BIT as OPTION_ERROR_BIT

__all__ = ["ServerExport", "Session", "list_exports", "negotiate"]

EXPORT_SIZE_MAX = 1 << 46  # 64 TiB, as for every source: user addresses have 47 bits
OPTION_REPLIES_MAX = 64  # to one option; what we ask for has five answers at most
EXPORTS_LISTED_MAX = 1000  # taken from a server's list; it is only ever shown
EXPORTS_SHOWN_MAX = 10  # in a message
BLOCK_MIN_MAX = 1 << 16  # the protocol allows no larger minimum

_TLS_HINT = "pcshare speaks no TLS: reach the server through ssh (exec:ssh ...) or through its Unix socket"
_ERRNO_OF_REFUSAL: dict[int, int] = {
    OptionReply.ERR_UNSUP: errno.ENOTSUP,
    OptionReply.ERR_POLICY: errno.EACCES,
    OptionReply.ERR_INVALID: errno.EINVAL,
    OptionReply.ERR_PLATFORM: errno.ENOTSUP,
    OptionReply.ERR_UNKNOWN: errno.ENOENT,
    OptionReply.ERR_SHUTDOWN: errno.ESHUTDOWN,
    OptionReply.ERR_BLOCK_SIZE_REQD: errno.EINVAL,
    OptionReply.ERR_TOO_BIG: errno.EMSGSIZE,
}


class _Refused(Exception):
    """The server's final answer to an option is an error."""

    def __init__(self, kind: int, text: str) -> None:
        super().__init__(kind, text)
        self.kind = kind
        self.text = text


def negotiate(connection: socket.socket, export_name: str, deadline: float, *, is_plain: bool = False) -> Session:
    """A session on one export; consumes the connection, also when it fails. is_plain: without structured replies, which
    servers send in three parts, each of which wakes who waits for the page; a simple one has two.

    SourceError: ETIMEDOUT, ECONNRESET (hung up), EPROTO (garbage), ENOENT (no such export), EPROTONOSUPPORT (oldstyle,
    or TLS is required), EACCES (the server's policy), ENODATA and EFBIG (an export that is empty or too large)."""
    line = Line(connection, deadline)
    try:
        export, context = _haggle(line, export_name, _encoded_name(export_name), is_plain)
        _check_size(export.size, export_name)
        return Session(line, export, context)
    except BaseException:
        connection.close()
        raise


def list_exports(connection: socket.socket, deadline: float) -> list[str]:
    """The names a server tells of, at most EXPORTS_LISTED_MAX; consumes the connection. SourceError where it tells
    none."""
    line = Line(connection, deadline)
    try:
        if not _greet(line) & HandshakeFlag.FIXED_NEWSTYLE:
            raise SourceError("the NBD server is too old to list its exports", errno=errno.ENOTSUP)
        names = _listed(line)
        with contextlib.suppress(SourceError):
            _ask(line, Option.ABORT)
        return names
    except _Refused as refused:
        raise _refusal(refused, "to list its exports") from None
    finally:
        connection.close()


def _haggle(line: Line, export_name: str, name: bytes, is_plain: bool) -> tuple[ServerExport, int | None]:
    """The export, and the number of base:allocation where it was negotiated."""
    flags = _greet(line)
    if not flags & HandshakeFlag.FIXED_NEWSTYLE:
        return _choose_by_name(line, name, flags, structured=False, context=None), None
    try:
        structured = not is_plain and _is_granted(line, Option.STRUCTURED_REPLY)
        context = _allocation_context(line, name) if structured else None
        try:
            return _go(line, name, structured, context), context
        except _Refused as refused:
            if refused.kind != OptionReply.ERR_UNSUP:
                raise
        return _choose_by_name(line, name, flags, structured, context), context
    except _Refused as refused:
        if refused.kind == OptionReply.ERR_UNKNOWN:
            raise _unknown_export(line, export_name, refused) from None
        raise _refusal(refused, f"the export {export_name!r}") from None


def _greet(line: Line) -> int:
    """Reads the server's greeting and answers it; returns the flags that both know."""
    data = line.receive(8)
    if int.from_bytes(data, "big") != NBD_MAGIC:
        error = line.garbled(f"it begins with {data!r}")
        error.hint = "something else than an NBD server may listen there"
        raise error
    data += line.receive(8)
    if int.from_bytes(data[8:], "big") == OLDSTYLE_MAGIC:
        raise SourceError(
            "the NBD server speaks the oldstyle protocol, which names no export",
            errno=errno.EPROTONOSUPPORT,
            hint="start it in newstyle mode (nbdkit without --oldstyle, nbd-server with a named export)",
        )
    _, magic, flags = HELLO.unpack(data + line.receive(HELLO.size - len(data)))
    if magic != OPTION_MAGIC:
        raise line.garbled(f"wrong magic {magic:#018x}")
    common: int = flags & (HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES)
    line.send(CLIENT_FLAGS.pack(common))
    return common


def _ask(line: Line, option: Option, data: bytes = b"") -> None:
    line.step = f"its reply to {option.name}"
    line.send(OPTION.pack(OPTION_MAGIC, option, len(data)) + data)


def _replies(line: Line, option: Option, limit: int = OPTION_REPLIES_MAX) -> Iterator[tuple[int, bytes]]:
    """Type and data of each reply before the final ACK. _Refused if the final one is an error."""
    for _ in range(limit):
        magic, echoed, kind, length = OPTION_REPLY.unpack(line.receive(OPTION_REPLY.size))
        if magic != OPTION_REPLY_MAGIC:
            raise line.garbled(f"wrong magic {magic:#018x}")
        if echoed != option:
            raise line.garbled(f"it is for option {echoed}")
        if length > OPTION_LENGTH_MAX:
            raise line.garbled(f"it claims {length} bytes, more than {OPTION_LENGTH_MAX}")
        data = line.receive(length)
        if kind == OptionReply.ERR_TLS_REQD:
            raise SourceError("the NBD server requires TLS", errno=errno.EPROTONOSUPPORT, hint=_TLS_HINT)
        if kind & OPTION_ERROR_BIT:
            raise _Refused(kind, shown(data))
        if kind == OptionReply.ACK:
            if data:
                raise line.garbled(f"an acknowledgement with {length} bytes of data")
            return
        yield kind, data
    raise line.garbled(f"more than {limit} replies")


def _is_granted(line: Line, option: Option) -> bool:
    """Asks for what needs no data; whatever the refusal, the answer to GO will be clearer."""
    _ask(line, option)
    try:
        for kind, _ in _replies(line, option):
            raise line.garbled(f"a reply of type {kind}")
    except _Refused:
        return False
    return True


def _allocation_context(line: Line, name: bytes) -> int | None:
    """The number under which the server tells what is a hole, if it does."""
    query = BASE_ALLOCATION.encode()
    data = _counted(name) + (1).to_bytes(4, "big") + _counted(query)
    _ask(line, Option.SET_META_CONTEXT, data)
    context = None
    try:
        for kind, answer in _replies(line, Option.SET_META_CONTEXT):
            if kind != OptionReply.META_CONTEXT or answer[CONTEXT_ID.size :] != query or context is not None:
                raise line.garbled(f"a reply of type {kind} and {len(answer)} bytes")
            (context,) = CONTEXT_ID.unpack(answer[: CONTEXT_ID.size])
    except _Refused:
        return None
    return context


def _go(line: Line, name: bytes, structured: bool, context: int | None) -> ServerExport:
    wanted = (Info.BLOCK_SIZE, Info.DESCRIPTION)
    data = _counted(name) + b"".join(number.to_bytes(2, "big") for number in (len(wanted), *wanted))
    _ask(line, Option.GO, data)
    infos: dict[int, bytes] = {}
    for kind, answer in _replies(line, Option.GO):
        if kind != OptionReply.INFO or len(answer) < 2:
            raise line.garbled(f"a reply of type {kind} and {len(answer)} bytes")
        number = int.from_bytes(answer[:2], "big")
        if number in infos:
            raise line.garbled(f"information {number} comes twice")
        infos[number] = answer
    if Info.EXPORT not in infos:
        raise line.garbled("it does not say how large the export is")
    _, size, flags = _unpacked(line, INFO_EXPORT, infos[Info.EXPORT])
    block_min, block_preferred, block_max = _block_sizes(line, infos.get(Info.BLOCK_SIZE))
    return _export(
        size,
        flags,
        structured,
        context,
        block_min=block_min,
        block_preferred=block_preferred,
        block_max=block_max,
        description=shown(infos.get(Info.DESCRIPTION, b"")[2:]),
    )


def _block_sizes(line: Line, answer: bytes | None) -> tuple[int, int, int]:
    """Minimum, preferred and maximum such that the minimum divides the others."""
    if answer is None:
        return 1, BLOCK_PREFERRED_DEFAULT, PAYLOAD_MAX_DEFAULT
    _, least, preferred, most = _unpacked(line, INFO_BLOCK_SIZE, answer)
    if least == 0 or least & (least - 1) or least > BLOCK_MIN_MAX or most < least:
        raise line.garbled(f"impossible block sizes: at least {least}, at most {most}")
    most -= most % least
    preferred = min(max(preferred - preferred % least, least), most)
    return least, preferred, most


def _unpacked(line: Line, layout: struct.Struct, answer: bytes) -> tuple[int, ...]:
    if len(answer) != layout.size:
        raise line.garbled(f"information of {len(answer)} bytes instead of {layout.size}")
    return layout.unpack(answer)


def _choose_by_name(line: Line, name: bytes, flags: int, structured: bool, context: int | None) -> ServerExport:
    """EXPORT_NAME, for servers without GO: its only refusal is to hang up."""
    _ask(line, Option.EXPORT_NAME, name)
    try:
        size, transmission_flags = EXPORT_NAME_REPLY.unpack(line.receive(EXPORT_NAME_REPLY.size))
    except SourceError as error:
        if error.errno == errno.ECONNRESET:
            error.hint = (
                "see that the name of the export is right: servers of this kind hang up at one they do not have"
            )
        raise
    if not flags & HandshakeFlag.NO_ZEROES:
        line.receive(EXPORT_NAME_ZEROES)
    return _export(size, transmission_flags, structured, context)


def _export(
    size: int,
    flags: int,
    structured: bool,
    context: int | None,
    *,
    block_min: int = 1,
    block_preferred: int = BLOCK_PREFERRED_DEFAULT,
    block_max: int = PAYLOAD_MAX_DEFAULT,
    description: str = "",
) -> ServerExport:
    known = flags if flags & TransmissionFlag.HAS_FLAGS else 0
    return ServerExport(
        size=size,
        read_only=bool(known & TransmissionFlag.READ_ONLY),
        multi_conn=bool(known & TransmissionFlag.CAN_MULTI_CONN),
        structured=structured,
        block_status=context is not None,
        block_min=block_min,
        block_preferred=block_preferred,
        block_max=block_max,
        description=description,
    )


def _check_size(size: int, export_name: str) -> None:
    if size == 0:
        raise SourceError(
            f"the export {export_name!r} is empty, and a block holds at least one byte",
            errno=errno.ENODATA,
            hint="see what the server offers with `nbdinfo URI`; use zero:SIZE for an empty block",
        )
    if size > EXPORT_SIZE_MAX:
        raise SourceError(
            f"the export {export_name!r} has {size} bytes, and a block holds at most {EXPORT_SIZE_MAX} (64 TiB)",
            errno=errno.EFBIG,
            hint="let the server offer parts of it (nbdkit --filter=offset)",
        )


def _listed(line: Line) -> list[str]:
    """The names of a list of exports, which is left unread where it is too long."""
    _ask(line, Option.LIST)
    names = []
    for kind, data in itertools.islice(_replies(line, Option.LIST, EXPORTS_LISTED_MAX + 1), EXPORTS_LISTED_MAX):
        length = int.from_bytes(data[:4], "big")
        if kind != OptionReply.SERVER or len(data) < 4 + length:
            raise line.garbled(f"a reply of type {kind} and {len(data)} bytes")
        names.append(data[4 : 4 + length].decode("utf-8", "replace"))
    return names


def _unknown_export(line: Line, export_name: str, refused: _Refused) -> SourceError:
    names: list[str] = []
    with contextlib.suppress(SourceError, _Refused):  # it may keep them to itself
        names = _listed(line)
    tells_them = bool(names) and all(name and name in refused.text for name in names)  # as our own servers do
    said = f": {refused.text}" if refused.text and not tells_them else ""
    there_are = ""
    if names:
        more = f" and {len(names) - EXPORTS_SHOWN_MAX} more" if len(names) > EXPORTS_SHOWN_MAX else ""
        there_are = (
            f" (there are: {', '.join(repr(name[:TEXT_SHOWN_MAX]) for name in names[:EXPORTS_SHOWN_MAX])}{more})"
        )
    return SourceError(
        f"the NBD server has no export {export_name!r}{there_are}{said}",
        errno=errno.ENOENT,
        hint="give the name of an export that the server has",
    )


def _refusal(refused: _Refused, what: str) -> SourceError:
    try:
        name = OptionReply(refused.kind).name
    except ValueError:
        name = f"error {refused.kind & ~OPTION_ERROR_BIT}"
    said = f": {refused.text}" if refused.text else ""
    number = _ERRNO_OF_REFUSAL.get(refused.kind, errno.EIO)
    return SourceError(f"the NBD server refuses {what} ({name}){said}", errno=number)


def _encoded_name(export_name: str) -> bytes:
    try:
        name = export_name.encode()
    except UnicodeEncodeError as error:
        raise SourceError(f"the export name {export_name!r} is no UTF-8", errno=errno.EINVAL) from error
    if b"\0" in name:
        raise SourceError(f"the export name {export_name!r} contains a NUL byte", errno=errno.EINVAL)
    if len(name) > NAME_LENGTH_MAX:
        raise SourceError(
            f"the export name has {len(name)} bytes, more than {NAME_LENGTH_MAX}", errno=errno.ENAMETOOLONG
        )
    return name


def _counted(text: bytes) -> bytes:
    return len(text).to_bytes(4, "big") + text
