"""NBD servers for tests: real ones (nbdkit, qemu-nbd), and a scripted one that misbehaves exactly as a test tells it.

Starts and ends them; makes no claims about clients. The real ones run on a Unix socket or a loopback port, die with the
test run and are ended by SIGTERM: needing SIGKILL is a failure of the test.

The scripted one runs a function for each connection, in a thread, against a Peer: Handshake speaks the handshake
correctly except where `instead` names a step, serve_reads() the transmission phase, and all can be said by hand:

    def script(peer: Peer) -> None:
        Handshake(size=1 << 20).run(peer)
        first, second = peer.requests(2)
        peer.data_chunk(second, b"b" * second.length)          # any order
        peer.send(peer.chunk_bytes(first, Chunk.OFFSET_DATA, ...)[:7])   # part of it
        peer.hang_up()

    with ScriptedServer(script) as server:
        connection = server.connect()                          # or server.listen(folder / "a.sock")

What a script fails to assert fails the test when the server is left. A client that hangs up ends the script quietly.
"""

from __future__ import annotations

import contextlib
import queue
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self

import pytest

from pcshare.nbd.wire import (
    BASE_ALLOCATION,
    CHUNK,
    CHUNK_DONE,
    CHUNK_ERROR,
    CLIENT_FLAGS,
    CONTEXT_ID,
    EXPORT_NAME_REPLY,
    EXPORT_NAME_ZEROES,
    EXTENT,
    HELLO,
    INFO_BLOCK_SIZE,
    INFO_EXPORT,
    NBD_MAGIC,
    OFFSET,
    OFFSET_HOLE,
    OPTION,
    OPTION_LENGTH_MAX,
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
    HandshakeFlag,
    Info,
    Option,
    OptionReply,
    TransmissionFlag,
)
from support import needs, wait_until
from support_coordinator import die_with_parent

READY_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 15.0
SCRIPT_TIMEOUT_S = 20.0  # a script that waits longer for its test or for its peer has lost its way
LOOPBACK = "127.0.0.1"
CONTEXT = 7  # the scripted server's number for base:allocation


# -- real servers


class RealServer:
    """A server that somebody else wrote, on a Unix socket (path) or a loopback port (port); it can be started again."""

    def __init__(self, command: Callable[[RealServer], list[str]], folder: Path, name: str, tcp: bool) -> None:
        self.path = "" if tcp else str(folder / f"{name}.sock")
        self.port = free_port() if tcp else 0
        self.pid_file = folder / f"{name}.pid"
        self.log = folder / f"{name}.log"
        self.process: subprocess.Popen[bytes] | None = None
        self._command = command(self)
        needs(None if shutil.which(self._command[0]) else f"{self._command[0]} (package of nbdkit or qemu-utils)")

    def start(self) -> None:
        """Returns when it listens."""
        self.pid_file.unlink(missing_ok=True)
        if self.path:
            Path(self.path).unlink(missing_ok=True)
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=die_with_parent
            )
        self.process = process
        wait_until(
            lambda: process.poll() is not None or (self.pid_file.exists() and self.pid_file.read_text().endswith("\n")),
            f"{self._command} to listen",
            READY_TIMEOUT_S,
        )
        if process.poll() is not None:
            self.process = None
            pytest.fail(f"{self._command} ended at its start: {self.log.read_text()}")

    def stop(self) -> None:
        """Ends it by SIGTERM, also when it was stopped by SIGSTOP; nothing where it does not run."""
        if self.process is None:
            return
        process, self.process = self.process, None
        for number in (signal.SIGTERM, signal.SIGCONT):
            process.send_signal(number)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            pytest.fail(f"{self._command} had to be killed: {self.log.read_text()}")

    def kill(self) -> None:
        """SIGKILL: it is gone without a word, as when its host dies. start() brings it back."""
        assert self.process is not None
        process, self.process = self.process, None
        process.kill()
        process.wait()

    def connect(self, timeout_s: float = READY_TIMEOUT_S) -> socket.socket:
        """A new connection; the caller closes it."""
        if self.path:
            return _connected(socket.AF_UNIX, self.path, timeout_s)
        return _connected(socket.AF_INET, (LOOPBACK, self.port), timeout_s)

    def uri(self, export: str = "") -> str:
        """The source that means it."""
        if self.path:
            return f"nbd+unix:///{export}?socket={self.path}"
        return f"nbd://{LOOPBACK}:{self.port}/{export}"


def _connected(family: int, address: str | tuple[str, int], timeout_s: float) -> socket.socket:
    connection = socket.socket(family, socket.SOCK_STREAM)
    try:
        connection.settimeout(timeout_s)
        connection.connect(address)
        connection.settimeout(None)
    except BaseException:
        connection.close()
        raise
    return connection


def free_port() -> int:
    """A loopback port on which nobody listens at this moment."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def _running(server: RealServer) -> Iterator[RealServer]:
    try:
        server.start()
        yield server
    finally:
        server.stop()


@contextlib.contextmanager
def nbdkit(folder: Path, *arguments: object, tcp: bool = False, name: str = "nbdkit") -> Iterator[RealServer]:
    """nbdkit with these options, plugin and parameters: nbdkit(folder, "--filter=delay", "memory", "1M", "rdelay=2ms").

    folder wants a short path where it holds the socket; name tells two servers of one folder apart."""

    def command(server: RealServer) -> list[str]:
        place = [f"--ipaddr={LOOPBACK}", f"--port={server.port}"] if tcp else [f"--unix={server.path}"]
        return ["nbdkit", "--foreground", f"--pidfile={server.pid_file}", *place, *map(str, arguments)]

    with _running(RealServer(command, folder, name, tcp)) as server:
        yield server


@contextlib.contextmanager
def qemu_nbd(
    folder: Path, image: Path, *arguments: object, image_format: str = "raw", tcp: bool = False, name: str = "qemu-nbd"
) -> Iterator[RealServer]:
    """qemu-nbd of an image, read-only, for any number of clients, one after the other or at once."""

    def command(server: RealServer) -> list[str]:
        place = [f"--bind={LOOPBACK}", f"--port={server.port}"] if tcp else [f"--socket={server.path}"]
        options = ["--persistent", "--shared=0", "--read-only", f"--format={image_format}"]
        return ["qemu-nbd", f"--pid-file={server.pid_file}", *place, *options, *map(str, arguments), str(image)]

    with _running(RealServer(command, folder, name, tcp)) as server:
        yield server


def qemu_img(*arguments: object) -> str:
    """Runs qemu-img and returns what it says."""
    needs(None if shutil.which("qemu-img") else "qemu-img (package qemu-utils)")
    return subprocess.run(["qemu-img", *map(str, arguments)], check=True, capture_output=True, text=True).stdout


# -- the scripted server


@dataclass(frozen=True)
class Request:
    """A request of the transmission phase."""

    flags: int
    command: int
    cookie: int
    offset: int
    length: int


class _HangUp(Exception):
    """Ends a script."""


Script = Callable[["Peer"], None]


class Peer:
    """The server's end of one connection. Every method may end the script, when the client has hung up."""

    def __init__(self, connection: socket.socket, number: int, seen: queue.SimpleQueue[Request]) -> None:
        self.connection = connection
        self.number = number  # of the connection, from 0
        self.export_name = ""  # as asked for, after Handshake.run()
        self.structured = False  # whether structured replies were negotiated, after Handshake.run()
        self._seen = seen
        self._context_chosen = False

    # bytes

    def send(self, data: bytes) -> None:
        self.connection.sendall(data)

    def receive(self, length: int) -> bytes:
        """Exactly so many bytes."""
        data = b""
        while len(data) < length:
            piece = self.connection.recv(length - len(data))
            if not piece:
                raise _HangUp
            data += piece
        return data

    def hang_up(self) -> NoReturn:
        """Ends this connection and its script."""
        raise _HangUp

    def never_answer(self) -> NoReturn:
        """Takes whatever the client sends and says nothing, until it hangs up."""
        while self.connection.recv(1 << 16):
            pass
        raise _HangUp

    def wait(self, event: threading.Event) -> None:
        """Until the test sets the event."""
        assert event.wait(SCRIPT_TIMEOUT_S), "the test did not set the event that its script waits for"

    # handshake

    def hello(self, flags: int = 3, magic: int = NBD_MAGIC, option_magic: int = OPTION_MAGIC) -> None:
        self.send(HELLO.pack(magic, option_magic, flags))

    def option(self) -> tuple[int, bytes]:
        """The client's next option and its data."""
        magic, option, length = OPTION.unpack(self.receive(OPTION.size))
        assert magic == OPTION_MAGIC, f"option magic {magic:#x}"
        assert length <= OPTION_LENGTH_MAX, f"option {option} of {length} bytes"
        return option, self.receive(length)

    def reply(
        self,
        option: int,
        kind: int,
        data: bytes = b"",
        *,
        magic: int = OPTION_REPLY_MAGIC,
        length: int | None = None,
    ) -> None:
        """An option reply; length, where given, is what the header claims."""
        self.send(OPTION_REPLY.pack(magic, option, kind, len(data) if length is None else length) + data)

    # transmission

    def request(self) -> Request | None:
        """The next request; None when the client has hung up or says that it goes."""
        try:
            data = self.receive(REQUEST.size)
        except (_HangUp, ConnectionError):
            return None
        magic, flags, command, cookie, offset, length = REQUEST.unpack(data)
        assert magic == REQUEST_MAGIC, f"request magic {magic:#x}"
        request = Request(flags, command, cookie, offset, length)
        self._seen.put(request)
        return None if command == Command.DISC else request

    def requests(self, count: int) -> list[Request]:
        """So many requests, without answering one; the script ends if the client goes before."""
        found = []
        for _ in range(count):
            request = self.request()
            if request is None:
                raise _HangUp
            found.append(request)
        return found

    def simple_reply(
        self,
        request: Request,
        data: bytes = b"",
        error: int = 0,
        *,
        cookie: int | None = None,
        magic: int = SIMPLE_REPLY_MAGIC,
    ) -> None:
        self.send(SIMPLE_REPLY.pack(magic, error, request.cookie if cookie is None else cookie) + data)

    @staticmethod
    def chunk_bytes(
        request: Request,
        kind: int,
        data: bytes = b"",
        *,
        done: bool = True,
        cookie: int | None = None,
        magic: int = STRUCTURED_REPLY_MAGIC,
        length: int | None = None,
    ) -> bytes:
        """A chunk of a structured reply, to be sent whole, in parts or bent; length is what the header claims."""
        flags = CHUNK_DONE if done else 0
        cookie = request.cookie if cookie is None else cookie
        return CHUNK.pack(magic, flags, kind, cookie, len(data) if length is None else length) + data

    def data_chunk(self, request: Request, data: bytes, *, offset: int | None = None, done: bool = True) -> None:
        """Data from offset on, by default the request's."""
        where = OFFSET.pack(request.offset if offset is None else offset)
        self.send(self.chunk_bytes(request, Chunk.OFFSET_DATA, where + data, done=done))

    def hole_chunk(self, request: Request, offset: int, length: int, *, done: bool = True) -> None:
        self.send(self.chunk_bytes(request, Chunk.OFFSET_HOLE, OFFSET_HOLE.pack(offset, length), done=done))

    def none_chunk(self, request: Request) -> None:
        self.send(self.chunk_bytes(request, Chunk.NONE))

    def error_chunk(
        self, request: Request, error: int, text: str = "", *, offset: int | None = None, done: bool = True
    ) -> None:
        """ERROR, or ERROR_OFFSET where an offset is given."""
        message = text.encode()
        data = CHUNK_ERROR.pack(error, len(message)) + message
        kind = Chunk.ERROR if offset is None else Chunk.ERROR_OFFSET
        where = b"" if offset is None else OFFSET.pack(offset)
        self.send(self.chunk_bytes(request, kind, data + where, done=done))

    def status_chunk(
        self, request: Request, extents: Iterable[tuple[int, int]], *, context: int = CONTEXT, done: bool = True
    ) -> None:
        """BLOCK_STATUS: (length, flags) each."""
        data = CONTEXT_ID.pack(context) + b"".join(EXTENT.pack(*extent) for extent in extents)
        self.send(self.chunk_bytes(request, Chunk.BLOCK_STATUS, data, done=done))

    def answer_read(self, request: Request, data: bytes) -> None:
        """The right answer in the form that was negotiated."""
        if self.structured:
            self.data_chunk(request, data)
        else:
            self.simple_reply(request, data)

    def answer_error(self, request: Request, error: int, text: str = "") -> None:
        if self.structured:
            self.error_chunk(request, error, text)
        else:
            self.simple_reply(request, error=error)


Step = Option | str  # "hello", or the option that is to be answered
Instead = Callable[[Peer, bytes], None]  # gets the option's data


def hang_up(peer: Peer, _data: bytes) -> None:
    """For `instead`: the server goes at this step."""
    peer.hang_up()


def never_answer(peer: Peer, _data: bytes) -> None:
    """For `instead`: the server is silent from this step on."""
    peer.never_answer()


@dataclass(frozen=True)
class Handshake:
    """A correct handshake, except at the steps in `instead`: there the function runs in place of the right answer, and
    the haggling goes on after it."""

    size: int = 1 << 20
    flags: int = TransmissionFlag.HAS_FLAGS | TransmissionFlag.READ_ONLY | TransmissionFlag.CAN_MULTI_CONN
    names: tuple[str, ...] | None = None  # the exports there are; None: any name is one
    description: str = ""
    block_sizes: tuple[int, int, int] | None = (1, 4096, 32 << 20)  # minimum, preferred, maximum
    handshake_flags: int = HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES
    structured: bool = True
    block_status: bool = True
    go: bool = True  # False: EXPORT_NAME alone
    instead: Mapping[Step, Instead] = field(default_factory=dict)

    def run(self, peer: Peer) -> None:
        """Until the transmission phase begins; the script ends if the client goes before."""
        if "hello" in self.instead:
            self.instead["hello"](peer, b"")
        else:
            peer.hello(self.handshake_flags)
        (client_flags,) = CLIENT_FLAGS.unpack(peer.receive(CLIENT_FLAGS.size))
        while True:
            option, data = peer.option()
            if option in self.instead:
                self.instead[Option(option)](peer, data)
            elif self.answer(peer, option, data, client_flags):
                return

    def answer(self, peer: Peer, option: int, data: bytes, client_flags: int = 3) -> bool:
        """The right answer to an option; whether the transmission phase begins with it."""
        if option == Option.EXPORT_NAME:
            self._export_name(peer, data, client_flags)
            return True
        if option == Option.GO and self.go:
            return self._go(peer, data)
        if option == Option.LIST:
            self._list(peer)
        elif option == Option.STRUCTURED_REPLY and self.structured:
            peer.structured = True
            peer.reply(option, OptionReply.ACK)
        elif option == Option.SET_META_CONTEXT and self.block_status:
            self._meta_context(peer, data)
        elif option == Option.ABORT:
            peer.reply(option, OptionReply.ACK)
            peer.hang_up()
        else:
            peer.reply(option, OptionReply.ERR_UNSUP)
        return False

    def _is_export(self, name: str) -> bool:
        return self.names is None or name in self.names

    def _export_name(self, peer: Peer, data: bytes, client_flags: int) -> None:
        peer.export_name = data.decode()
        if not self._is_export(peer.export_name):
            peer.hang_up()
        zeroes = b"" if client_flags & HandshakeFlag.NO_ZEROES else bytes(EXPORT_NAME_ZEROES)
        peer.send(EXPORT_NAME_REPLY.pack(self.size, self.flags) + zeroes)

    def _go(self, peer: Peer, data: bytes) -> bool:
        length = int.from_bytes(data[:4], "big")
        peer.export_name = data[4 : 4 + length].decode()
        if not self._is_export(peer.export_name):
            peer.reply(Option.GO, OptionReply.ERR_UNKNOWN, b"no such export")
            return False
        self.infos(peer)
        peer.reply(Option.GO, OptionReply.ACK)
        return True

    def infos(self, peer: Peer) -> None:
        """What comes before the ACK of GO."""
        peer.reply(Option.GO, OptionReply.INFO, INFO_EXPORT.pack(Info.EXPORT, self.size, self.flags))
        if self.block_sizes:
            peer.reply(Option.GO, OptionReply.INFO, INFO_BLOCK_SIZE.pack(Info.BLOCK_SIZE, *self.block_sizes))
        if self.description:
            about = int(Info.DESCRIPTION).to_bytes(2, "big") + self.description.encode()
            peer.reply(Option.GO, OptionReply.INFO, about)

    def _list(self, peer: Peer) -> None:
        for name in self.names or ():
            peer.reply(Option.LIST, OptionReply.SERVER, len(name.encode()).to_bytes(4, "big") + name.encode())
        peer.reply(Option.LIST, OptionReply.ACK)

    def _meta_context(self, peer: Peer, data: bytes) -> None:
        assert BASE_ALLOCATION.encode() in data
        about = CONTEXT_ID.pack(CONTEXT) + BASE_ALLOCATION.encode()
        peer.reply(Option.SET_META_CONTEXT, OptionReply.META_CONTEXT, about)
        peer.reply(Option.SET_META_CONTEXT, OptionReply.ACK)


def serve_reads(peer: Peer, data: bytes, on_request: Callable[[Peer, Request], bool] | None = None) -> None:
    """Answers reads of data, rightly and one at a time, until the client goes. on_request may answer itself: True."""
    while (request := peer.request()) is not None:
        if on_request is not None and on_request(peer, request):
            continue
        if request.command == Command.READ:
            peer.answer_read(request, data[request.offset : request.offset + request.length])
        elif request.command == Command.BLOCK_STATUS:
            peer.status_chunk(request, [(request.length, 0)])
        else:
            pytest.fail(f"a read-only client sends {request}")


class Withheld:
    """Reads (offset, length) that a server takes and does not answer when they are asked for the first time."""

    def __init__(self, data: bytes, reads: Iterable[tuple[int, int]], preferred: int = 4096) -> None:
        self._data = data
        self._reads = set(reads)
        self.withholds_all = False
        self._handshake = Handshake(size=len(data), block_sizes=(1, preferred, 32 << 20))
        self._owed: list[tuple[Peer, Request]] = []

    @property
    def owed_count(self) -> int:
        return len(self._owed)

    def script(self, peer: Peer) -> None:
        self._handshake.run(peer)
        serve_reads(peer, self._data, self._withhold)

    def answer_late(self) -> None:
        """All that is owed, while the client asks for nothing else."""
        while self._owed:
            peer, request = self._owed.pop(0)
            peer.answer_read(request, self._data[request.offset : request.offset + request.length])

    def _withhold(self, peer: Peer, request: Request) -> bool:
        read = request.offset, request.length
        withholds = request.command == Command.READ and (self.withholds_all or read in self._reads)
        if withholds:
            self._reads.discard(read)
            self._owed.append((peer, request))
        return withholds


class ScriptedServer:
    """Runs scripts[0] for the first connection, scripts[1] for the second ..., and the last for all that follow."""

    def __init__(self, *scripts: Script) -> None:
        self.seen: queue.SimpleQueue[Request] = queue.SimpleQueue()  # every request, in the order of arrival
        self.connection_count = 0
        self._scripts = scripts
        self._lock = threading.Lock()
        self._connections: list[socket.socket] = []
        self._listeners: list[socket.socket] = []
        self._acceptors: list[threading.Thread] = []
        self._threads: list[threading.Thread] = []
        self._errors: list[BaseException] = []

    def connect(self) -> socket.socket:
        """The client's end of a new connection, a socket pair; the caller closes it."""
        client, server = socket.socketpair()
        self._begin(server)
        return client

    def listen(self, path: Path | None = None) -> tuple[str, int]:
        """Listens on a Unix socket there, or on a loopback port; returns (path, 0) or (host, port)."""
        listener = socket.socket(socket.AF_UNIX if path else socket.AF_INET, socket.SOCK_STREAM)
        self._listeners.append(listener)
        listener.bind(str(path) if path else (LOOPBACK, 0))
        listener.listen()
        thread = threading.Thread(target=self._accept, args=(listener,), daemon=True)
        self._acceptors.append(thread)
        thread.start()
        return (str(path), 0) if path else (LOOPBACK, int(listener.getsockname()[1]))

    def hang_up_all(self) -> None:
        """Ends every connection there is; who connects again is served again."""
        with self._lock:
            for connection in self._connections:
                _shut_down(connection)

    def close(self) -> None:
        """Ends everything and raises what a script asserted in vain."""
        for listener in self._listeners:
            _shut_down(listener)
        for thread in self._acceptors:
            thread.join(SCRIPT_TIMEOUT_S)  # before the rest: it may begin a last one
        self.hang_up_all()
        for thread in (*self._acceptors, *self._threads):
            thread.join(SCRIPT_TIMEOUT_S)
            assert not thread.is_alive(), "a script of the scripted server does not end"
        for used in (*self._listeners, *self._connections):
            used.close()
        if self._errors:
            raise self._errors[0]

    def _begin(self, connection: socket.socket) -> None:
        with self._lock:
            number = self.connection_count
            self.connection_count += 1
            thread = threading.Thread(target=self._run, args=(connection, number), daemon=True)
            self._connections.append(connection)
            self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):  # shut down: this is how it ends
            while True:
                connection, _ = listener.accept()
                self._begin(connection)

    def _run(self, connection: socket.socket, number: int) -> None:
        try:
            self._scripts[min(number, len(self._scripts) - 1)](Peer(connection, number, self.seen))
        except (_HangUp, ConnectionError):
            pass
        except BaseException as error:
            self._errors.append(error)
        finally:
            _shut_down(connection)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except BaseException as scripts:
            if error is None:
                raise
            error.add_note(f"and its script failed: {scripts!r}")


def _shut_down(used: socket.socket) -> None:
    with contextlib.suppress(OSError):
        used.shutdown(socket.SHUT_RDWR)
