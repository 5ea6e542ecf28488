"""Our NBD server in the test's process, exports that do as a test says, and a client that says every byte by hand.

Makes no claims; the client knows the protocol's numbers and nothing of the server.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass

from pcshare.nbd.server import Export, Exports, Piece, Server
from pcshare.nbd.stream import Stream
from pcshare.nbd.wire import (
    BASE_ALLOCATION,
    CHUNK,
    CHUNK_DONE,
    CHUNK_ERROR,
    CLIENT_FLAGS,
    CONTEXT_ID,
    EXTENT,
    HELLO,
    OFFSET,
    OPTION,
    OPTION_MAGIC,
    OPTION_REPLY,
    OPTION_REPLY_MAGIC,
    REQUEST,
    REQUEST_MAGIC,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Chunk,
    Command,
    ExtentFlag,
    Option,
    OptionReply,
)

REPLY_TIMEOUT_S = 20.0
HOLE = ExtentFlag.HOLE | ExtentFlag.ZERO


class BytesExport(Export):
    """Bytes in memory. The first hole_bytes are a hole. A read at an offset in `gates` waits for its event; one at an
    offset in `failures` fails with that errno, after what it has read before it."""

    def __init__(self, name: str, content: bytes, *, hole_bytes: int = 0, quick: bool = True, pieces: int = 0) -> None:
        self.name = name
        self.size = len(content)
        self.description = f"about {name}"
        self.gates: dict[int, threading.Event] = {}
        self.failures: dict[int, int] = {}
        self.waiting = 0
        self._content = content
        self._hole_bytes = hole_bytes
        self._quick = quick
        self._pieces = pieces  # bytes in one

    def wait(self, offset: int, length: int, timeout_s: float) -> bool:
        if offset not in self.gates:
            return True
        self.waiting += 1
        try:
            return self.gates[offset].wait(min(timeout_s, 0.05))
        finally:
            self.waiting -= 1

    def read(self, offset: int, length: int) -> Iterator[Piece]:
        for at in range(offset, offset + length, self._pieces or length):
            if at in self.failures:
                raise OSError(self.failures[at], f"no byte at {at}")
            yield self._content[at : min(at + (self._pieces or length), offset + length)]

    def extents(self, offset: int, length: int) -> list[tuple[int, ExtentFlag]]:
        hole = max(0, min(self._hole_bytes - offset, length))
        both = [(hole, HOLE), (length - hole, ExtentFlag(0))]
        return [(some, flags) for some, flags in both if some]

    def is_quick(self, offset: int, length: int) -> bool:
        return self._quick and offset not in self.gates

    def close(self) -> None:
        for gate in self.gates.values():
            gate.set()


@dataclass(frozen=True)
class Reply:
    """An answer to a request, all chunks of it together."""

    error: int = 0
    text: str = ""
    data: bytes = b""
    chunks: int = 1
    extents: tuple[tuple[int, int], ...] = ()


class RawClient:
    """One connection. Everything that it receives has the right magic, or the test fails."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.structured = False
        self._cookie = 0
        self._partial: dict[int, list[tuple[int, bytes]]] = {}
        connection.settimeout(REPLY_TIMEOUT_S)

    def send(self, data: bytes) -> None:
        self.connection.sendall(data)

    def receive(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            piece = self.connection.recv(length - len(data))
            if not piece:
                raise EOFError
            data += piece
        return data

    def is_hung_up_on(self) -> bool:
        """Waits for the server to hang up, whatever it says before."""
        with contextlib.suppress(ConnectionError):
            while self.connection.recv(1 << 16):
                pass
        return True

    # handshake

    def greet(self, flags: int = 3) -> None:
        HELLO.unpack(self.receive(HELLO.size))
        self.send(CLIENT_FLAGS.pack(flags))

    def option(self, option: int, data: bytes = b"") -> list[tuple[int, bytes]]:
        """All replies to an option: (kind, data), the last of them ACK or an error."""
        self.send(OPTION.pack(OPTION_MAGIC, option, len(data)) + data)
        replies: list[tuple[int, bytes]] = []
        while not replies or (replies[-1][0] != OptionReply.ACK and replies[-1][0] < OptionReply.ERR_UNSUP):
            magic, about, kind, length = OPTION_REPLY.unpack(self.receive(OPTION_REPLY.size))
            assert (magic, about) == (OPTION_REPLY_MAGIC, option)
            replies.append((kind, self.receive(length)))
        return replies

    def refused(self, option: int, data: bytes = b"") -> tuple[OptionReply, str]:
        """The error to an option that gets nothing but one."""
        ((kind, text),) = self.option(option, data)
        return OptionReply(kind), text.decode()

    def use_structured(self) -> None:
        assert self.option(Option.STRUCTURED_REPLY) == [(OptionReply.ACK, b"")]
        self.structured = True

    def go(self, name: str = "", *, structured: bool = True, block_status: bool = True) -> None:
        """The whole handshake."""
        self.greet()
        if structured:
            self.use_structured()
            if block_status:
                self.option(Option.SET_META_CONTEXT, context_query(name, BASE_ALLOCATION))
        assert self.option(Option.GO, info_query(name))[-1][0] == OptionReply.ACK

    # transmission

    def ask(self, command: int, offset: int, length: int, *, flags: int = 0, payload: bytes = b"") -> int:
        """Sends a request; its cookie."""
        self._cookie += 1
        self.send(REQUEST.pack(REQUEST_MAGIC, flags, command, self._cookie, offset, length) + payload)
        return self._cookie

    def answer(self, cookie: int) -> Reply:
        """The next answer that is complete, which must be to that request."""
        found, reply = self.next_answer()
        assert found == cookie
        return reply

    def next_answer(self, read_length: int = 0) -> tuple[int, Reply]:
        """read_length: for simple replies, which do not say what follows."""
        if not self.structured:
            magic, error, cookie = SIMPLE_REPLY.unpack(self.receive(SIMPLE_REPLY.size))
            assert magic == SIMPLE_REPLY_MAGIC
            return cookie, Reply(error, data=b"" if error else self.receive(read_length))
        while True:
            magic, flags, kind, cookie, length = CHUNK.unpack(self.receive(CHUNK.size))
            assert magic == STRUCTURED_REPLY_MAGIC
            chunks = self._partial.setdefault(cookie, [])
            chunks.append((kind, self.receive(length)))
            if flags & CHUNK_DONE:
                return cookie, _put_together(self._partial.pop(cookie))

    def request(self, command: int, offset: int, length: int, *, flags: int = 0, payload: bytes = b"") -> Reply:
        """Sends one and waits for its answer."""
        cookie = self.ask(command, offset, length, flags=flags, payload=payload)
        return self.answer(cookie)

    def read(self, offset: int, length: int, *, flags: int = 0) -> bytes:
        """What a read that succeeds brings."""
        if self.structured:
            reply = self.request(Command.READ, offset, length, flags=flags)
        else:
            cookie = self.ask(Command.READ, offset, length)
            found, reply = self.next_answer(length)
            assert found == cookie
        assert not reply.error, reply
        return reply.data

    def close(self) -> None:
        self.connection.close()


def _put_together(chunks: list[tuple[int, bytes]]) -> Reply:
    """Chunks of data follow each other without gaps, or the test fails."""
    error, text, data, extents, at = 0, "", b"", (), None
    for kind, content in chunks:
        if kind == Chunk.OFFSET_DATA:
            (offset,) = OFFSET.unpack(content[: OFFSET.size])
            assert at in (None, offset)
            data += content[OFFSET.size :]
            at = offset + len(content) - OFFSET.size
        elif kind == Chunk.BLOCK_STATUS:
            extents = tuple(EXTENT.iter_unpack(content[CONTEXT_ID.size :]))  # type: ignore[assignment]
        elif kind == Chunk.ERROR:
            error, length = CHUNK_ERROR.unpack(content[: CHUNK_ERROR.size])
            text = content[CHUNK_ERROR.size :].decode()
            assert len(content) == CHUNK_ERROR.size + length
        else:
            raise AssertionError(f"a chunk of kind {kind}")
    return Reply(error, text, data, len(chunks), extents)


def text(content: str) -> bytes:
    """As options hold a string."""
    return len(content.encode()).to_bytes(4, "big") + content.encode()


def info_query(name: str, *infos: int) -> bytes:
    return text(name) + len(infos).to_bytes(2, "big") + b"".join(info.to_bytes(2, "big") for info in infos)


def context_query(name: str, *queries: str) -> bytes:
    return text(name) + len(queries).to_bytes(4, "big") + b"".join(map(text, queries))


class Served:
    """A server in this process, and the clients that a test opens."""

    def __init__(self, *exports: Export) -> None:
        self.exports = Exports(exports)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.server = Server(self.exports, [self.listener])
        self.thread = threading.Thread(target=self.server.run, name="server")
        self._clients: list[RawClient] = []
        self.thread.start()

    def client(self, connection: socket.socket | None = None) -> RawClient:
        """A new connection: a socket pair's end, unless one is given."""
        if connection is None:
            connection, theirs = socket.socketpair()
            self.server.adopt(Stream.of_socket(theirs))
        client = RawClient(connection)
        self._clients.append(client)
        return client

    def tcp_client(self) -> RawClient:
        return self.client(socket.create_connection(self.listener.getsockname()))

    def stop(self) -> None:
        """Returns when its threads have ended."""
        self.server.stop()
        self.thread.join(REPLY_TIMEOUT_S)
        assert not self.thread.is_alive()

    def close(self) -> None:
        self.stop()
        self.server.close()
        self.listener.close()
        self.exports.close()
        for client in self._clients:
            client.close()


@contextlib.contextmanager
def served(*exports: Export) -> Iterator[Served]:
    made = Served(*exports)
    try:
        yield made
    finally:
        made.close()


EIO, EPERM, EINVAL = errno.EIO, errno.EPERM, errno.EINVAL
