"""greeting: the server's side of the handshake, fixed newstyle: from HELLO to the export that a client chose.

Has a limit for everything a client sends, and one for the whole time. Reads no export's bytes. What breaks the protocol
is hung up on; what is merely wrong is refused with a text, and the haggling goes on.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from dataclasses import dataclass

from pcshare.nbd.export import Export, Exports
from pcshare.nbd.stream import HungUp, Stream
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
    OPTION,
    OPTION_LENGTH_MAX,
    OPTION_MAGIC,
    OPTION_REPLY,
    OPTION_REPLY_MAGIC,
    OPTIONS_MAX,
    HandshakeFlag,
    Info,
    Option,
    OptionReply,
    TransmissionFlag,
)

GREETING_TIMEOUT_S = 10  # for a handshake: a few round trips
CONTEXT = 1  # our number for base:allocation
QUERY_ALL = "base:"  # of LIST_META_CONTEXT: whatever there is of that kind

_LENGTH = struct.Struct(">I")
_COUNT = struct.Struct(">H")


@dataclass(frozen=True)
class Agreement:
    """What a handshake led to."""

    export: Export
    structured: bool
    block_status: bool


class _Refused(Exception):
    """The answer to an option: a kind of error, and a text for people."""

    def __init__(self, kind: OptionReply, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class _Data:
    """What came with an option, taken piece by piece; too little of it is the client's fault."""

    def __init__(self, data: bytes) -> None:
        self._left = data

    def take(self, length: int) -> bytes:
        if length > len(self._left):
            raise _Refused(OptionReply.ERR_INVALID, "the option is shorter than what it announces")
        taken, self._left = self._left[:length], self._left[length:]
        return taken

    def number(self, layout: struct.Struct = _LENGTH) -> int:
        return int(layout.unpack(self.take(layout.size))[0])

    def text(self) -> str:
        length = self.number()
        if length > NAME_LENGTH_MAX:
            raise _Refused(OptionReply.ERR_TOO_BIG, f"a string has at most {NAME_LENGTH_MAX} bytes")
        return _decode(self.take(length))

    def end(self) -> None:
        if self._left:
            raise _Refused(OptionReply.ERR_INVALID, "the option is longer than what it announces")


def _decode(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise _Refused(OptionReply.ERR_INVALID, "a string is not UTF-8") from None


class Greeting:
    """One handshake."""

    def __init__(self, stream: Stream, exports: Exports, deadline: float | None = None) -> None:
        self._stream = stream
        self._exports = exports
        self._deadline = time.monotonic() + GREETING_TIMEOUT_S if deadline is None else deadline
        self._structured = False
        self._context_of: str | None = None  # the export's name for which base:allocation was chosen
        self._no_zeroes = False
        self._answers: dict[int, Callable[[_Data], Agreement | None]] = {
            Option.LIST: self._list,
            Option.INFO: lambda data: self._info(Option.INFO, data),
            Option.GO: lambda data: self._info(Option.GO, data),
            Option.STRUCTURED_REPLY: self._structured_reply,
            Option.LIST_META_CONTEXT: self._list_contexts,
            Option.SET_META_CONTEXT: self._set_contexts,
        }

    def run(self) -> Agreement | None:
        """None: the client is done already. HungUp, TimeoutError: it is to be hung up on."""
        flags = HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES
        self._stream.send([HELLO.pack(NBD_MAGIC, OPTION_MAGIC, flags)])
        (chosen,) = CLIENT_FLAGS.unpack(self._receive(CLIENT_FLAGS.size))
        if chosen & ~int(flags):
            raise HungUp
        self._no_zeroes = bool(chosen & HandshakeFlag.NO_ZEROES)
        for _ in range(OPTIONS_MAX):
            magic, option, length = OPTION.unpack(self._receive(OPTION.size))
            if magic != OPTION_MAGIC or length > OPTION_LENGTH_MAX:
                raise HungUp
            data = self._receive(length)
            if option == Option.ABORT:
                self._reply(option, OptionReply.ACK)
                return None
            agreement = self._export_name(data) if option == Option.EXPORT_NAME else self._answer(option, data)
            if agreement is not None:
                return agreement
        raise HungUp

    def _receive(self, length: int) -> bytes:
        return self._stream.receive(length, self._deadline)

    def _reply(self, option: int, kind: OptionReply, data: bytes = b"") -> None:
        self._stream.send([OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, kind, len(data)) + data])

    def _answer(self, option: int, data: bytes) -> Agreement | None:
        answer = self._answers.get(option)
        if answer is None:
            why = b"no TLS here: go through ssh" if option == Option.STARTTLS else b"not a known option"
            self._reply(option, OptionReply.ERR_UNSUP, why)
            return None
        try:
            agreement = answer(_Data(data))
        except _Refused as refused:
            self._reply(option, refused.kind, str(refused).encode()[:NAME_LENGTH_MAX])
            return None
        self._reply(option, OptionReply.ACK)
        return agreement

    # -- choosing an export

    def _agree(self, name: str, export: Export) -> Agreement:
        return Agreement(export, self._structured, self._context_of == name)

    def _flags(self) -> TransmissionFlag:
        flags = TransmissionFlag.HAS_FLAGS | TransmissionFlag.READ_ONLY | TransmissionFlag.CAN_MULTI_CONN
        return flags | TransmissionFlag.SEND_DF if self._structured else flags

    def _export_name(self, data: bytes) -> Agreement:
        """The old way, which knows no answer but hanging up."""
        name = data.decode(errors="replace")
        export = self._exports.find(name)
        if export is None:
            raise HungUp
        zeroes = b"" if self._no_zeroes else bytes(EXPORT_NAME_ZEROES)
        self._stream.send([EXPORT_NAME_REPLY.pack(export.size, self._flags()) + zeroes])
        return self._agree(name, export)

    def _info(self, option: Option, data: _Data) -> Agreement | None:
        name = data.text()
        wanted = {data.number(_COUNT) for _ in range(data.number(_COUNT))}
        data.end()
        export = self._find(name)
        infos = {
            Info.NAME: export.name.encode(),
            Info.DESCRIPTION: export.description.encode()[:NAME_LENGTH_MAX],
            Info.BLOCK_SIZE: INFO_BLOCK_SIZE.pack(
                Info.BLOCK_SIZE, export.block_min, export.block_preferred, export.block_max
            )[_COUNT.size :],
        }
        self._reply(option, OptionReply.INFO, INFO_EXPORT.pack(Info.EXPORT, export.size, self._flags()))
        for info, content in infos.items():
            if info in wanted:
                self._reply(option, OptionReply.INFO, _COUNT.pack(info) + content)
        return self._agree(name, export) if option is Option.GO else None

    def _find(self, name: str) -> Export:
        export = self._exports.find(name)
        if export is None:
            what = f"no export {name!r}" if name else "no default export"
            raise _Refused(OptionReply.ERR_UNKNOWN, f"{what} (there are: {', '.join(self._exports.names())})")
        return export

    def _list(self, data: _Data) -> None:
        data.end()
        for export in self._exports.all():
            name, description = export.name.encode(), export.description.encode()[:NAME_LENGTH_MAX]
            self._reply(Option.LIST, OptionReply.SERVER, _LENGTH.pack(len(name)) + name + description)

    # -- what replies look like

    def _structured_reply(self, data: _Data) -> None:
        data.end()
        self._structured = True

    def _list_contexts(self, data: _Data) -> None:
        _, queries = self._queries(data)
        if not queries or {QUERY_ALL, BASE_ALLOCATION} & set(queries):
            self._tell_context(Option.LIST_META_CONTEXT, 0)

    def _set_contexts(self, data: _Data) -> None:
        self._context_of = None  # whatever an earlier one chose
        name, queries = self._queries(data)
        if BASE_ALLOCATION in queries:
            self._tell_context(Option.SET_META_CONTEXT, CONTEXT)
            self._context_of = name

    def _queries(self, data: _Data) -> tuple[str, list[str]]:
        if not self._structured:
            raise _Refused(OptionReply.ERR_INVALID, "contexts need structured replies")
        name = data.text()
        queries = [data.text() for _ in range(data.number())]
        data.end()
        self._find(name)
        return name, queries

    def _tell_context(self, option: Option, number: int) -> None:
        self._reply(option, OptionReply.META_CONTEXT, CONTEXT_ID.pack(number) + BASE_ALLOCATION.encode())
