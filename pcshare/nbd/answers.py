"""answers: the server's side of the transmission phase: the requests of one connection, each answered when it can be.

What blocks nowhere is answered where it was read; the rest goes to a few threads, so that a read that waits holds up no
other. Replies leave under one lock. A client that asks for more than REQUESTS_MAX at once is not read from until some
are answered.
"""

from __future__ import annotations

import errno
import logging
import os
import queue
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pcshare import trace
from pcshare.errors import PcshareError
from pcshare.nbd.export import Piece
from pcshare.nbd.greeting import CONTEXT, Agreement
from pcshare.nbd.stream import HungUp, Stream
from pcshare.nbd.wire import (
    CHUNK,
    CHUNK_DONE,
    CHUNK_ERROR,
    CONTEXT_ID,
    EXTENT,
    NAME_LENGTH_MAX,
    OFFSET,
    PAYLOAD_MAX_DEFAULT,
    REQUEST,
    REQUEST_MAGIC,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Chunk,
    Command,
    CommandFlag,
    error_to_wire,
)

log = logging.getLogger("pcshare")

WORKERS_MAX = 16  # a connection: reads that wait at the same time
REQUESTS_MAX = 64  # a connection: as many as nbdcopy sends
EXTENTS_MAX = 1 << 14  # in one reply: 128 KiB
WAIT_STEP_S = 1.0  # how soon a client that hung up is noticed by those that wait for it
WORKER_NAME = "pcshare-nbd"

_WRITES = (Command.WRITE, Command.TRIM, Command.WRITE_ZEROES)
# Plain numbers: ~ of an IntFlag has only the bits that it knows.
_FLAGS_ALLOWED: dict[int, int] = {Command.READ: int(CommandFlag.DF), Command.BLOCK_STATUS: int(CommandFlag.REQ_ONE)}


@dataclass(frozen=True)
class _Request:
    flags: int
    command: int
    cookie: int
    offset: int
    length: int


class _Workers:
    """Threads that are started when jobs come and none is idle."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._threads: list[threading.Thread] = []

    def submit(self, job: Callable[[], None]) -> None:
        self._jobs.put(job)
        if not self._idle.acquire(blocking=False) and len(self._threads) < WORKERS_MAX:
            thread = threading.Thread(target=self._run, name=WORKER_NAME, daemon=True)
            self._threads.append(thread)
            thread.start()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
            self._idle.release()

    def end(self) -> None:
        """Waits for the jobs."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()


class Answers:
    """One connection after its handshake."""

    def __init__(self, stream: Stream, agreement: Agreement) -> None:
        self._stream = stream
        self._export = agreement.export
        self._structured = agreement.structured
        self._block_status = agreement.block_status
        self._workers = _Workers()
        self._room = threading.BoundedSemaphore(REQUESTS_MAX)
        self._sending = threading.Lock()
        self._gone = threading.Event()

    def run(self) -> None:
        """Until the client goes; whoever hangs up on it ends this too."""
        try:
            while (request := self._next()) is not None:
                self._take(request)
            self._finish()
        except HungUp:
            pass
        finally:
            self.hang_up()
            self._workers.end()

    def hang_up(self) -> None:
        """From any thread."""
        self._gone.set()
        self._stream.hang_up()

    def _next(self) -> _Request | None:
        """None: the client says that it goes."""
        magic, *fields = REQUEST.unpack(self._stream.receive(REQUEST.size))
        request = _Request(*fields)
        if magic != REQUEST_MAGIC:
            raise HungUp
        if request.command == Command.WRITE:
            if request.length > PAYLOAD_MAX_DEFAULT:
                raise HungUp
            self._stream.skip(request.length)
        return None if request.command == Command.DISC else request

    def _finish(self) -> None:
        """What was asked for is answered before a client that said DISC is hung up on, as long as it is there."""
        for _ in range(REQUESTS_MAX):
            self._wait_for_room()

    def _wait_for_room(self) -> None:
        while not self._room.acquire(timeout=WAIT_STEP_S):
            if self._gone.is_set() or self._stream.is_hung_up():
                raise HungUp

    def _take(self, request: _Request) -> None:
        error = self._error_in(request)
        if error:
            self._send_error(request, error, os.strerror(error))
        elif self._export.is_quick(request.offset, request.length):
            self._answer(request)
        else:
            self._wait_for_room()
            self._workers.submit(lambda: self._answer_aside(request))

    def _error_in(self, request: _Request) -> int:
        """What is wrong with a request: an errno, or 0."""
        if request.command in _WRITES:
            return errno.EPERM
        allowed, export = _FLAGS_ALLOWED.get(request.command), self._export
        length_max = export.block_max if request.command == Command.READ else export.size
        outside = request.length > length_max or request.offset + request.length > export.size
        unaligned = (request.offset | request.length) & (export.block_min - 1)
        if allowed is None or request.flags & ~allowed or not request.length or outside:
            return errno.EINVAL
        if unaligned and request.offset + request.length != export.size:
            return errno.EINVAL
        needs_structure = request.command == Command.BLOCK_STATUS and not self._block_status
        return errno.EINVAL if needs_structure or (request.flags and not self._structured) else 0

    # -- answering

    def _answer_aside(self, request: _Request) -> None:
        try:
            if not self._gone.is_set():
                self._answer(request)
        except HungUp:
            self.hang_up()  # which ends the thread that reads
        finally:
            self._room.release()

    def _answer(self, request: _Request) -> None:
        trace.step("server_request")
        try:
            if request.command == Command.BLOCK_STATUS:
                self._tell_extents(request)
            elif self._wait_for_bytes(request):
                self._send_bytes(request)
        except HungUp:
            raise
        except (OSError, PcshareError) as error:
            text = error.message if isinstance(error, PcshareError) else error.strerror or str(error)
            log.info("export %s: %s", self._export.name, text)
            self._send_error(request, error.errno or errno.EIO, text)
        except Exception as error:
            log.exception("export %s: a request failed", self._export.name)
            self._send_error(request, errno.EIO, repr(error))

    def _wait_for_bytes(self, request: _Request) -> bool:
        """False: nobody wants them any more."""
        while not self._export.wait(request.offset, request.length, WAIT_STEP_S):
            if self._gone.is_set():
                return False
        return True

    def _send_bytes(self, request: _Request) -> None:
        pieces = self._export.read(request.offset, request.length)
        if self._structured and not request.flags & CommandFlag.DF:
            self._send_chunks(request, pieces)
            return
        whole = list(pieces)
        self._check_length(sum(map(len, whole)), request)
        if self._structured:
            self._send([_data_header(request, request.offset, request.length, True), *whole])
        else:
            self._send([SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, request.cookie), *whole])

    def _send_chunks(self, request: _Request, pieces: Iterable[Piece]) -> None:
        done = 0
        for piece in pieces:
            if not len(piece):
                continue
            if done + len(piece) >= request.length:
                self._check_length(done + len(piece), request)
            is_last = done + len(piece) == request.length
            self._send([_data_header(request, request.offset + done, len(piece), is_last), piece])
            done += len(piece)
        self._check_length(done, request)

    def _check_length(self, length: int, request: _Request) -> None:
        if length != request.length:
            raise OSError(errno.EIO, f"{length} bytes are there, {request.length} were asked for")

    def _tell_extents(self, request: _Request) -> None:
        left, told = request.length, b""
        extents = self._export.extents(request.offset, request.length)
        for length, flags in extents[: 1 if request.flags & CommandFlag.REQ_ONE else EXTENTS_MAX]:
            if left:
                told += EXTENT.pack(min(length, left), flags)
                left -= min(length, left)
        data = CONTEXT_ID.pack(CONTEXT) + told
        self._send([_chunk_header(request, Chunk.BLOCK_STATUS, len(data), CHUNK_DONE), data])

    def _send_error(self, request: _Request, error: int, text: str) -> None:
        number = error_to_wire(error)
        if not self._structured:
            self._send([SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, number, request.cookie)])
            return
        message = text.encode()[:NAME_LENGTH_MAX]
        data = CHUNK_ERROR.pack(number, len(message)) + message
        self._send([_chunk_header(request, Chunk.ERROR, len(data), CHUNK_DONE), data])

    def _send(self, pieces: list[Piece]) -> None:
        with self._sending:
            if self._gone.is_set():
                raise HungUp
            self._stream.send(pieces)
        trace.step("server_answered")


def _chunk_header(request: _Request, kind: Chunk, length: int, flags: int) -> bytes:
    return CHUNK.pack(STRUCTURED_REPLY_MAGIC, flags, kind, request.cookie, length)


def _data_header(request: _Request, offset: int, length: int, is_last: bool) -> bytes:
    flags = CHUNK_DONE if is_last else 0
    return _chunk_header(request, Chunk.OFFSET_DATA, OFFSET.size + length, flags) + OFFSET.pack(offset)
