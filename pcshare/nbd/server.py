"""server: an NBD server: listening sockets, exports, a thread for each connection, and an end.

Accepts and counts; the handshake (greeting.py) and the requests (answers.py) are for each connection's own thread, so
that a client that stops, floods or talks nonsense is alone with it. Must not know what the exports are. Read-only.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import selectors
import socket
import threading
import time
from collections.abc import Sequence

from pcshare import trace
from pcshare.nbd.answers import Answers
from pcshare.nbd.export import Export, Exports, FileRange, Piece
from pcshare.nbd.greeting import Greeting
from pcshare.nbd.stream import HungUp, Stream

__all__ = ["Export", "Exports", "FileRange", "Piece", "Server", "serve_stdio"]

log = logging.getLogger("pcshare")

CONNECTIONS_MAX = 256  # a few threads each; who comes then is hung up on
ACCEPT_AGAIN_S = 0.25  # after an accept that failed: no fds are left
STOP_TIMEOUT_S = 5.0  # for the threads of all connections: longer than answers.WAIT_STEP_S


class _Connection:
    """One client, from its first byte to its last, in a thread of its own."""

    def __init__(self, server: Server, stream: Stream) -> None:
        self._server = server
        self._stream = stream
        self._answers: Answers | None = None
        self._lock = threading.Lock()
        self._hung_up = False
        self.thread = threading.Thread(target=self._run, name="pcshare-nbd", daemon=True)

    def _run(self) -> None:
        try:
            agreement = Greeting(self._stream, self._server.exports).run()
            if agreement is not None:
                trace.step("server_agreed")
                self._serve(Answers(self._stream, agreement))
        except (HungUp, TimeoutError):
            pass
        except Exception:
            log.exception("a connection failed")
        finally:
            with self._lock:
                self._hung_up = True
                self._answers = None
                self._stream.close()
            self._server.ended(self)

    def _serve(self, answers: Answers) -> None:
        with self._lock:
            self._answers = answers
            if self._hung_up:
                answers.hang_up()
        answers.run()

    def hang_up(self) -> None:
        """From any thread."""
        with self._lock:
            if self._answers is not None:
                self._answers.hang_up()
            elif not self._hung_up:
                self._stream.hang_up()
            self._hung_up = True


class Server:
    """Answers NBD on listening sockets, and on connections that it is given. run() until stop(); or, without listening
    sockets, until its last connection has ended. The sockets and the exports stay their owner's."""

    def __init__(self, exports: Exports, listeners: Sequence[socket.socket] = ()) -> None:
        self.exports = exports
        self._listeners = list(listeners)
        self._connections: set[_Connection] = set()
        self._lock = threading.Lock()
        self._stopping = False
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        for listener in self._listeners:
            listener.setblocking(False)

    # -- connections

    def adopt(self, stream: Stream) -> None:
        """Serves one more connection."""
        connection = _Connection(self, stream)
        with self._lock:
            is_welcome = len(self._connections) < CONNECTIONS_MAX and not self._stopping
            if is_welcome:
                self._connections.add(connection)
        if not is_welcome:
            stream.close()
            return
        try:
            connection.thread.start()
        except RuntimeError:  # no more threads: the others go on
            stream.close()
            self.ended(connection)

    def ended(self, connection: _Connection) -> None:
        with self._lock:
            self._connections.discard(connection)
        self._wake()

    def connection_count(self) -> int:
        with self._lock:
            return len(self._connections)

    def _accept(self, listener: socket.socket) -> bool:
        """False: not before a while."""
        try:
            end, _ = listener.accept()
        except (BlockingIOError, ConnectionError):
            return True
        except OSError as error:
            log.warning("cannot accept a client: %s", error.strerror)
            return error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)
        try:
            stream = Stream.of_socket(end)
        except OSError:  # it is gone already
            end.close()
            return True
        self.adopt(stream)
        trace.step("server_accepted")
        return True

    # -- life

    def run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake_read, selectors.EVENT_READ)
            for listener in self._listeners:
                selector.register(listener, selectors.EVENT_READ, listener)
            while not self._is_over():
                for key, _ in selector.select():
                    self._handle(key.data)
        self._end()

    def _handle(self, listener: socket.socket | None) -> None:
        if listener is None:
            self._wake_read.recv(4096)
        elif not self._accept(listener):
            time.sleep(ACCEPT_AGAIN_S)

    def _is_over(self) -> bool:
        return self._stopping or (not self._listeners and not self.connection_count())

    @property
    def wakeup(self) -> tuple[socket.socket, socket.socket]:
        """Of run(): where it waits for a byte, and where to send it. They stay this server's."""
        return self._wake_read, self._wake_write

    def stop(self) -> None:
        """Ends run(); from any thread and from a signal handler."""
        self._stopping = True
        self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # full: it is awake; closed: it has ended
            self._wake_write.send(b"\0")

    def _end(self) -> None:
        self._stopping = True
        with self._lock:
            left = list(self._connections)
        for connection in left:
            connection.hang_up()
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for connection in left:
            connection.thread.join(max(0.0, deadline - time.monotonic()))

    def close(self) -> None:
        """After run()."""
        self._wake_read.close()
        self._wake_write.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def stdio_stream() -> Stream:
    """Standard input and output as one connection; what else this process prints goes to standard error."""
    in_fd, out_fd = os.dup(0), os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nowhere, 0)
    os.close(nowhere)
    os.dup2(2, 1)
    if not os.path.samestat(os.fstat(in_fd), os.fstat(out_fd)):
        return Stream.of_pipes(in_fd, out_fd)
    try:
        end = socket.socket(fileno=os.dup(in_fd))
    except OSError:
        return Stream.of_pipes(in_fd, out_fd)
    os.close(in_fd)
    os.close(out_fd)
    return Stream.of_socket(end)


def serve_stdio(exports: Exports) -> None:
    """Serves the one connection on standard input and output until it ends."""
    with Server(exports) as server:
        server.adopt(stdio_stream())
        server.run()
