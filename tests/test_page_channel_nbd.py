"""The transmission phase of NBD behind a page channel: against scripted servers that misbehave, and against nbdkit.

What wants many threads at once is in c/nbd_stress.c, which runs here under the sanitizers.
"""

from __future__ import annotations

import ctypes
import errno
import os
import random
import re
import select
import shutil
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from core_support import CORE, NBD_FILES, WAIT_S, compile_c
from pcshare.core import ffi, lib
from pcshare.errors import PcshareError, SourceError
from pcshare.nbd import wire
from pcshare.nbd.client import negotiate
from pcshare.nbd.wire import CHUNK_ERROR, OFFSET, OFFSET_HOLE, SIMPLE_REPLY, Chunk
from pcshare.page_channel import NbdChannel, NbdEvent
from support import wait_until
from support_nbd import Peer, RealServer, Request, Script, ScriptedServer, nbdkit, serve_reads
from test_page_channel import run_program

KIB = 1 << 10
MIB = 1 << 20
PAGE = 4096
CONTENT = random.Random(7).randbytes(MIB)
UNTOUCHED = b"\xaa"
SHORT_MS = 200
STRESS_ROUNDS = 12
REPLY_SPANS_MAX = 16  # nbd_connection.h


# -- asking


class Asked:
    """A request under way: results has every result it was given, which must be one."""

    def __init__(self, offset: int, length: int, demand: bool) -> None:
        self.buffer = ffi.new("uint8_t[]", UNTOUCHED * length)
        self.request = ffi.new(
            "struct page_request *", {"offset": offset, "length": length, "bytes": self.buffer, "is_demand": demand}
        )
        self.results: list[int] = []
        self.ended = threading.Event()

    def result(self) -> int:
        assert self.ended.wait(WAIT_S), "a request does not end"
        return self.results[0]

    def data(self) -> bytes:
        assert self.result() == 0
        return bytes(ffi.buffer(self.buffer, self.request.length))

    def is_waiting(self) -> bool:
        return not self.results


class Channel:
    """An NbdChannel with both its sides: who supplies, and who asks."""

    def __init__(self, **settings: int) -> None:
        defaults = {"size": MIB, "alignment": 1, "length_max": MIB, "reply_timeout_ms": 60_000, "server_count": 1}
        self.supplier = NbdChannel(**{**defaults, **settings})
        self.asked: dict[int, Asked] = {}
        self._done = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int)(self._end)
        self._is_freed = False

    def _end(self, request: int, result: int) -> None:
        asked = self.asked[request]
        asked.results.append(result)
        asked.ended.set()

    def ask(self, offset: int, length: int, *, demand: bool = False) -> Asked:
        asked = Asked(offset, length, demand)
        asked.request.done = ffi.cast("page_request_done *", ctypes.cast(self._done, ctypes.c_void_p).value)
        self.asked[int(ffi.cast("uintptr_t", asked.request))] = asked
        lib.page_channel_submit(self.supplier.pointer, asked.request)
        return asked

    def connect(self, connection: socket.socket, *, demand: bool = False, structured: bool = True) -> int:
        return self.supplier.connect(connection.detach(), demand=demand, structured=structured)

    def wait_events(self, count: int = 1) -> list[NbdEvent]:
        """So many events, and no more."""
        events: list[NbdEvent] = []
        while len(events) < count:
            assert select.select([self.supplier], [], [], WAIT_S)[0], f"only {events} came"
            events += self.supplier.events()
        assert len(events) == count
        return events

    def has_event(self) -> bool:
        return bool(select.select([self.supplier], [], [], 0)[0])

    @contextmanager
    def dispatching(self, thread_count: int = 1) -> Iterator[None]:
        """So many threads do what fault threads do."""
        ours, theirs = socket.socketpair()
        threads = [threading.Thread(target=self._dispatch, args=(theirs,)) for _ in range(thread_count)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            ours.close()
            for thread in threads:
                thread.join()
            theirs.close()

    def _dispatch(self, stop: socket.socket) -> None:
        fd = lib.page_channel_poll_fd(self.supplier.pointer)
        while stop not in (ready := select.select([fd, stop], [], [])[0]):
            if ready:
                lib.page_channel_dispatch(self.supplier.pointer)

    def free(self) -> None:
        if not self._is_freed:
            self._is_freed = True
            lib.page_channel_free(self.supplier.pointer)

    def close(self) -> None:
        """Ends it, and every request must have ended once."""
        self.free()
        self.supplier.close()
        assert [asked.results for asked in self.asked.values() if len(asked.results) != 1] == []


@contextmanager
def channel(**settings: int) -> Iterator[Channel]:
    made = Channel(**settings)
    try:
        yield made
    finally:
        made.close()


# -- servers, past their handshake


def answering(on_request: Callable[[Peer, Request], bool] | None = None, *, structured: bool = True) -> Script:
    """Answers every read rightly; on_request may answer itself."""

    def script(peer: Peer) -> None:
        peer.structured = structured
        serve_reads(peer, CONTENT, on_request)

    return script


def content_of(request: Request) -> bytes:
    return CONTENT[request.offset : request.offset + request.length]


def never(peer: Peer) -> None:
    peer.never_answer()


def hanging_up_after(count: int) -> Script:
    """Takes so many requests and goes."""

    def script(peer: Peer) -> None:
        peer.requests(count)
        peer.hang_up()

    return script


# -- reading


@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize("demand", [True, False])
def test_replies_come_in_any_order(structured: bool, demand: bool, rng: random.Random) -> None:
    count = 48

    def script(peer: Peer) -> None:
        peer.structured = structured
        requests = peer.requests(count)
        rng.shuffle(requests)
        for request in requests:
            peer.answer_read(request, content_of(request))
        peer.never_answer()

    with ScriptedServer(script) as server, channel() as c, c.dispatching():
        c.connect(server.connect(), demand=demand, structured=structured)
        asked = [c.ask(i * PAGE, PAGE, demand=demand) for i in range(count)]
        assert [a.data() for a in asked] == [CONTENT[i * PAGE : (i + 1) * PAGE] for i in range(count)]


@pytest.mark.parametrize("demand", [True, False])
def test_more_requests_than_a_connection_takes_all_end(demand: bool) -> None:
    """Also when the socket takes but a few at a time."""
    with ScriptedServer(answering()) as server, channel() as c, c.dispatching(2):
        connection = server.connect()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        c.connect(connection, demand=demand)
        asked = [c.ask(i * 512, 512, demand=demand) for i in range(1000)]
        assert all(a.data() == CONTENT[i * 512 : (i + 1) * 512] for i, a in enumerate(asked))


def test_a_reply_may_come_in_pieces_and_holes(rng: random.Random) -> None:
    """P1: a hole is zeros, and only what came is handed on."""

    def script(peer: Peer) -> None:
        (request,) = peer.requests(1)
        pieces = [(start, min(start + 700, PAGE)) for start in range(0, PAGE, 700)]
        rng.shuffle(pieces)
        for start, end in pieces:
            if start == 1400:
                peer.hole_chunk(request, request.offset + start, end - start, done=False)
            else:
                peer.data_chunk(request, CONTENT[start:end], offset=request.offset + start, done=False)
        peer.none_chunk(request)
        peer.never_answer()

    with ScriptedServer(script) as server, channel() as c:
        c.connect(server.connect())
        assert c.ask(0, PAGE).data() == CONTENT[:1400] + bytes(700) + CONTENT[2100:PAGE]


def test_a_reply_may_trickle_byte_by_byte() -> None:
    def trickle(peer: Peer, request: Request) -> bool:
        for byte in peer.chunk_bytes(request, Chunk.OFFSET_DATA, OFFSET.pack(request.offset) + content_of(request)):
            peer.send(bytes([byte]))
        return True

    with ScriptedServer(answering(trickle)) as server, channel() as c, c.dispatching():
        c.connect(server.connect())
        c.connect(server.connect(), demand=True)
        assert c.ask(10, 300).data() == CONTENT[10:310]
        assert c.ask(10, 300, demand=True).data() == CONTENT[10:310]


def test_replies_that_were_read_ahead_are_not_forgotten() -> None:
    """More than one turn takes, all received at once, and nothing comes after them."""
    reads, pieces = 14, 10

    def script(peer: Peer) -> None:
        replies = b""
        for request in peer.requests(reads):
            for i in range(pieces):
                piece = OFFSET.pack(request.offset + i) + CONTENT[request.offset + i :][:1]
                replies += peer.chunk_bytes(request, Chunk.OFFSET_DATA, piece, done=i == pieces - 1)
        peer.send(replies)
        peer.never_answer()

    with ScriptedServer(script) as server, channel() as c, c.dispatching():
        c.connect(server.connect(), demand=True)
        asked = [c.ask(i * pieces, pieces, demand=True) for i in range(reads)]
        assert b"".join(a.data() for a in asked) == CONTENT[: reads * pieces]


@pytest.mark.parametrize("alignment", [512, PAGE, 64 * KIB])
def test_reads_on_the_wire_are_aligned(alignment: int, rng: random.Random) -> None:
    """The export's end apart, and none is longer than the server takes."""
    size = MIB - 100
    length_max = 128 * KIB + 300  # no multiple of any alignment
    server = ScriptedServer(answering())
    with server, channel(size=size, alignment=alignment, length_max=length_max) as c:
        c.connect(server.connect())
        places = [(0, size), (size - 1, 1), (size - 5000, 5000), (0, 1), (alignment - 1, 2), (3 * PAGE, PAGE)]
        places += [(offset := rng.randrange(size), rng.randint(1, size - offset)) for _ in range(20)]
        for offset, length in places:
            assert c.ask(offset, length).data() == CONTENT[offset : offset + length]
    while not server.seen.empty():
        request = server.seen.get()
        if request.command == wire.Command.READ:
            assert request.offset % alignment == 0
            assert request.length % alignment == 0 or request.offset + request.length == size
            assert request.length <= length_max


@pytest.mark.parametrize(
    ("offset", "length"),
    [(MIB, 1), (MIB - 1, 2), (0, 0), (0, MIB + 1), (1 << 63, PAGE), ((1 << 64) - PAGE, 2 * PAGE)],
)
def test_what_lies_outside_the_export_is_refused(offset: int, length: int) -> None:
    with channel() as c:
        asked = Asked(0, 1, True)
        asked.request.offset, asked.request.length = offset, length
        asked.request.done = ffi.cast("page_request_done *", ctypes.cast(c._done, ctypes.c_void_p).value)
        c.asked[int(ffi.cast("uintptr_t", asked.request))] = asked
        lib.page_channel_submit(c.supplier.pointer, asked.request)
        assert asked.results == [-errno.EINVAL]


@pytest.mark.parametrize(
    "settings",
    [
        {"size": 0},
        {"size": 1 << 63},
        {"alignment": 0},
        {"alignment": 3},
        {"alignment": PAGE, "length_max": 512},
        {"reply_timeout_ms": 0},
        {"server_count": 0},
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(SourceError) as caught:
        Channel(**settings)
    assert caught.value.errno == errno.EINVAL


def test_it_never_reads_at_once() -> None:
    with channel() as c:
        rc = lib.page_channel_read_now(c.supplier.pointer, ffi.new("uint8_t[16]"), 16, 0)
        assert rc == lib.PAGE_CHANNEL_WOULD_BLOCK


# -- two connections


def test_demand_goes_over_a_connection_of_its_own() -> None:
    with ScriptedServer(never, answering()) as server, channel() as c, c.dispatching():
        c.connect(server.connect())
        c.connect(server.connect(), demand=True)
        stream = [c.ask(i * PAGE, PAGE) for i in range(100)]
        assert c.ask(5 * PAGE, PAGE, demand=True).data() == CONTENT[5 * PAGE : 6 * PAGE]
        assert all(a.is_waiting() for a in stream)
        c.supplier.close()
        assert [a.result() for a in stream] == [-errno.ECANCELED] * len(stream)


def test_demand_overtakes_the_stream_on_the_only_connection() -> None:
    """D4: what the stream has not put on the wire yet waits for demand."""
    server = ScriptedServer(answering())
    begin = threading.Event()

    def script(peer: Peer) -> None:
        peer.structured = True
        peer.wait(begin)
        serve_reads(peer, CONTENT)

    server = ScriptedServer(script)
    with server, channel() as c:
        c.connect(server.connect())
        stream = [c.ask(i * PAGE, PAGE) for i in range(100)]
        demand = c.ask(200 * PAGE, PAGE, demand=True)
        begin.set()
        assert demand.data() == CONTENT[200 * PAGE : 201 * PAGE]
        assert all(a.data() for a in stream)
    offsets = [server.seen.get().offset for _ in range(101)]
    assert offsets.index(200 * PAGE) < 64  # as many as are in flight at a time


def test_several_threads_read_the_demand_connection(rng: random.Random) -> None:
    with ScriptedServer(answering()) as server, channel() as c, c.dispatching(4):
        c.connect(server.connect(), demand=True)
        places = [rng.randrange(MIB - PAGE) for _ in range(500)]
        asked = [c.ask(offset, PAGE, demand=True) for offset in places]
        assert all(a.data() == CONTENT[o : o + PAGE] for a, o in zip(asked, places, strict=True))


def test_demand_goes_over_the_primary_when_its_own_is_lost() -> None:
    with ScriptedServer(answering(), hanging_up_after(1)) as server, channel() as c, c.dispatching():
        c.connect(server.connect())
        number = c.connect(server.connect(), demand=True)
        assert c.ask(0, PAGE, demand=True).data() == CONTENT[:PAGE]
        (event,) = c.wait_events()
        assert (event.connection, event.owed, event.error) == (number, 1, errno.ECONNRESET)
        assert "hung up" in event.text


def test_demand_is_served_while_the_primary_is_lost_and_the_stream_waits() -> None:
    with ScriptedServer(hanging_up_after(1), answering(), answering()) as server, channel() as c, c.dispatching():
        c.connect(server.connect())
        c.connect(server.connect(), demand=True)
        stream = c.ask(0, PAGE)
        c.wait_events()
        assert c.ask(PAGE, PAGE, demand=True).data() == CONTENT[PAGE : 2 * PAGE]
        assert stream.is_waiting()
        c.connect(server.connect())
        assert stream.data() == CONTENT[:PAGE]


@pytest.mark.parametrize("demand", [True, False])
def test_one_of_a_kind_is_enough(demand: bool) -> None:
    """And the fd is consumed."""
    with ScriptedServer(answering()) as server, channel() as c:
        c.connect(server.connect(), demand=demand)
        with pytest.raises(PcshareError) as caught:
            c.connect(server.connect(), demand=demand)
        assert caught.value.errno == errno.EEXIST


def test_an_fd_that_is_no_socket_is_lost_or_refused() -> None:
    with channel() as c:
        with pytest.raises(PcshareError) as caught:
            c.supplier.connect(os.open("/proc/self/exe", os.O_RDONLY | os.O_CLOEXEC), demand=False, structured=True)
        assert caught.value.errno == errno.EPERM


# -- loss


def test_what_a_lost_connection_owed_is_asked_of_the_next(rng: random.Random) -> None:
    """One that has waited before it goes first; what has been answered is not asked again."""

    def some(peer: Peer) -> None:
        for request in peer.requests(10)[:4]:
            peer.data_chunk(request, content_of(request))
        peer.hang_up()

    server = ScriptedServer(some, answering())
    with server, channel() as c:
        number = c.connect(server.connect())
        asked = [c.ask(i * PAGE, PAGE) for i in range(10)]
        (event,) = c.wait_events()
        assert (event.connection, event.owed) == (number, 6)
        assert c.connect(server.connect()) != number
        assert [a.data() for a in asked] == [CONTENT[i * PAGE : (i + 1) * PAGE] for i in range(10)]
    offsets = [server.seen.get().offset for _ in range(16)]
    assert sorted(offsets[10:]) == sorted(set(offsets[:10]) - set(offsets[:4]))


def test_disconnect_loses_both_with_the_suppliers_words() -> None:
    with ScriptedServer(never, never, answering()) as server, channel() as c:
        numbers = {c.connect(server.connect()), c.connect(server.connect(), demand=True)}
        stream, demand = c.ask(0, PAGE), c.ask(PAGE, PAGE, demand=True)
        c.supplier.disconnect(errno.ECONNABORTED, "enough of it")
        events = c.wait_events(2)
        assert {event.connection for event in events} == numbers
        assert {(event.error, event.owed, event.text) for event in events} == {(errno.ECONNABORTED, 1, "enough of it")}
        c.connect(server.connect())
        assert (stream.data(), demand.data()) == (CONTENT[:PAGE], CONTENT[PAGE : 2 * PAGE])


def test_an_idle_connection_that_ends_is_told() -> None:
    with ScriptedServer(lambda peer: peer.hang_up()) as server, channel() as c:
        c.connect(server.connect())
        assert c.wait_events()[0].owed == 0


def test_bytes_of_a_reply_that_was_cut_off_do_not_stay() -> None:
    """P1: the lost server's bytes are overwritten by the next one's, all of them."""

    def half(peer: Peer) -> None:
        (request,) = peer.requests(1)
        peer.send(peer.chunk_bytes(request, Chunk.OFFSET_DATA, OFFSET.pack(0) + b"x" * 3000, length=8 + PAGE))
        peer.hang_up()

    with ScriptedServer(half, answering()) as server, channel() as c:
        c.connect(server.connect())
        asked = c.ask(0, PAGE)
        c.wait_events()
        assert asked.is_waiting()
        c.connect(server.connect())
        assert asked.data() == CONTENT[:PAGE]


def test_a_silent_server_is_lost_after_the_reply_timeout() -> None:
    with ScriptedServer(never, answering()) as server, channel(reply_timeout_ms=SHORT_MS) as c:
        c.connect(server.connect())
        start_s = time.monotonic()
        asked = c.ask(0, PAGE)
        (event,) = c.wait_events()
        assert time.monotonic() - start_s >= SHORT_MS / 1000
        assert (event.error, event.owed) == (errno.ETIMEDOUT, 1)
        told = re.fullmatch(r"the server owes 1 replies and was silent for (\d+\.\d) s", event.text)
        assert told
        assert float(told[1]) >= SHORT_MS / 1000
        c.connect(server.connect())
        assert asked.data() == CONTENT[:PAGE]


def test_a_server_that_owes_nothing_may_be_silent() -> None:
    with ScriptedServer(answering()) as server, channel(reply_timeout_ms=5 * SHORT_MS) as c:
        c.connect(server.connect())
        assert not select.select([c.supplier], [], [], 3 * 5 * SHORT_MS / 1000)[0]
        assert c.ask(0, PAGE).data() == CONTENT[:PAGE]


def test_a_read_that_is_passed_over_again_and_again_is_not_waited_for_for_ever() -> None:
    def all_but_the_first(peer: Peer, request: Request) -> bool:
        return peer.number == 0 and request.offset == 0

    with ScriptedServer(answering(all_but_the_first)) as server, channel(reply_timeout_ms=5 * SHORT_MS) as c:
        c.connect(server.connect())
        asked = c.ask(0, PAGE)
        start_s = time.monotonic()
        while not c.has_event():
            other = c.ask(PAGE, PAGE)
            wait_until(lambda: other.ended.is_set() or c.has_event(), "a reply, or the loss", WAIT_S)  # noqa: B023
        assert time.monotonic() - start_s >= 4 * 5 * SHORT_MS / 1000
        (event,) = c.wait_events()
        assert re.fullmatch(r"the server has left a read without its reply for \d\.\d s", event.text)
        c.connect(server.connect())
        assert asked.data() == CONTENT[:PAGE]


# -- garbled replies


Garble = Callable[[Peer, Request], None]


def reply_chunk(kind: int, data: bytes, **bent: Any) -> Garble:
    return lambda peer, request: peer.send(peer.chunk_bytes(request, kind, data, **bent))


def put_bytes(data: bytes) -> Garble:
    return lambda peer, _request: peer.send(data)


def put_simple(magic: int = wire.SIMPLE_REPLY_MAGIC, error: int = 0, shift: int = 0) -> Garble:
    return lambda peer, r: peer.send(SIMPLE_REPLY.pack(magic, error, r.cookie + shift) + content_of(r))


def put_data(offset: int, count: int, **bent: Any) -> Garble:
    return reply_chunk(Chunk.OFFSET_DATA, OFFSET.pack(offset) + b"x" * count, **bent)


def put_hole(offset: int, count: int, **bent: Any) -> Garble:
    return reply_chunk(Chunk.OFFSET_HOLE, OFFSET_HOLE.pack(offset, count), **bent)


def both(*steps: Garble) -> Garble:
    def garble(peer: Peer, request: Request) -> None:
        for step in steps:
            step(peer, request)

    return garble


def put_many_pieces(peer: Peer, request: Request) -> None:
    for i in range(REPLY_SPANS_MAX + 1):
        peer.data_chunk(request, b"x", offset=request.offset + 2 * i, done=False)


AT = 8 * PAGE  # where the read is that is answered wrongly
NO_REPLY = "no reply that the protocol knows"
NOT_ASKED = "bytes that were not asked for"
LEFT_OUT = "leaves out a part"
TWICE = "the same bytes twice, or too many pieces"
NOTHING = "a reply to nothing"
BAD_ERROR = "an error reply that cannot be read"
GARBLED: dict[str, tuple[Garble, str]] = {
    "noise": (put_bytes(b"\0\1\2\3" * 100), NO_REPLY),
    "text": (put_bytes(b"HTTP/1.1 400 Bad Request\r\n\r\n"), NO_REPLY),
    "simple reply with data": (put_simple(), "a simple reply where structured ones were agreed on"),
    "simple reply to another": (put_simple(shift=1), NOTHING),
    "slot beyond all": (reply_chunk(Chunk.NONE, b"", cookie=(1 << 64) - 1), NOTHING),
    "cookie 0": (reply_chunk(Chunk.NONE, b"", cookie=0), NOTHING),
    "chunk magic": (reply_chunk(Chunk.NONE, b"", magic=wire.STRUCTURED_REPLY_MAGIC + 1), NO_REPLY),
    "request magic": (reply_chunk(Chunk.NONE, b"", magic=wire.REQUEST_MAGIC), NO_REPLY),
    "unknown type": (reply_chunk(77, b""), NO_REPLY),
    "block status": (reply_chunk(Chunk.BLOCK_STATUS, b"\0" * 12), NO_REPLY),
    "nothing at all": (reply_chunk(Chunk.NONE, b""), LEFT_OUT),
    "nothing, with bytes": (reply_chunk(Chunk.NONE, b"12345678"), NO_REPLY),
    "nothing, and more to come": (reply_chunk(Chunk.NONE, b"", done=False), "brings nothing and ends nothing"),
    "first half only": (put_data(AT, PAGE // 2), LEFT_OUT),
    "second half only": (put_data(AT + PAGE // 2, PAGE // 2), LEFT_OUT),
    "hole in the half only": (put_hole(AT, PAGE // 2), LEFT_OUT),
    "all but the middle": (
        both(put_data(AT, 100, done=False), put_data(AT + 101, PAGE - 101, done=False), reply_chunk(Chunk.NONE, b"")),
        LEFT_OUT,
    ),
    "before the read": (put_data(AT - 1, PAGE), NOT_ASKED),
    "one byte too many": (put_data(AT, PAGE + 1), NOT_ASKED),
    "after the read": (put_data(AT + PAGE, 1), NOT_ASKED),
    "offset at the end of numbers": (put_data((1 << 64) - 1, 100), NOT_ASKED),
    "huge data": (put_data(AT, 100, length=(1 << 32) - 1), NOT_ASKED),
    "data without offset": (reply_chunk(Chunk.OFFSET_DATA, b"1234"), NO_REPLY),
    "data without data": (put_data(AT, 0), NO_REPLY),
    "hole without length": (put_hole(AT, 0), NOT_ASKED),
    "huge hole": (put_hole(AT, (1 << 32) - 1), NOT_ASKED),
    "hole before the read": (put_hole(AT - 1, 10), NOT_ASKED),
    "long hole chunk": (reply_chunk(Chunk.OFFSET_HOLE, OFFSET_HOLE.pack(AT, PAGE) + b"x"), NO_REPLY),
    "bytes twice": (both(put_data(AT, PAGE, done=False), put_data(AT, PAGE)), TWICE),
    "a byte twice": (both(put_data(AT, 100, done=False), put_data(AT + 99, 1)), TWICE),
    "a hole over bytes": (both(put_data(AT + 50, 50, done=False), put_hole(AT, 51)), TWICE),
    "bytes over two pieces": (
        both(put_data(AT, 10, done=False), put_data(AT + 20, 10, done=False), put_data(AT + 10, 11)),
        TWICE,
    ),
    "too many pieces": (put_many_pieces, TWICE),
    "error 0": (reply_chunk(Chunk.ERROR, CHUNK_ERROR.pack(0, 0)), BAD_ERROR),
    "error too short": (reply_chunk(Chunk.ERROR, b"\0\0\0\5"), NO_REPLY),
    "error text longer than its chunk": (reply_chunk(Chunk.ERROR, CHUNK_ERROR.pack(5, 100) + b"no"), BAD_ERROR),
    "error without end": (reply_chunk(Chunk.ERROR, CHUNK_ERROR.pack(5, 2) + b"no", length=1 << 20), NO_REPLY),
}


@pytest.mark.parametrize("demand", [True, False], ids=["demand", "stream"])
@pytest.mark.parametrize("name", GARBLED)
def test_a_garbled_reply_loses_the_connection_and_nothing_else(name: str, demand: bool) -> None:
    """P1: the event says what was wrong, and the read is asked of the next with the right bytes."""
    garble, text = GARBLED[name]

    def script(peer: Peer) -> None:
        garble(peer, peer.requests(1)[0])
        peer.never_answer()

    with ScriptedServer(script, answering()) as server, channel() as c, c.dispatching(2):
        c.connect(server.connect(), demand=demand)
        asked = c.ask(AT, PAGE, demand=demand)
        (event,) = c.wait_events()
        assert (event.error, event.owed) == (errno.EPROTO, 1)
        assert text in event.text
        assert asked.is_waiting()
        c.connect(server.connect(), demand=demand)
        assert asked.data() == CONTENT[AT : AT + PAGE]


def test_structured_replies_that_nobody_agreed_on_are_garbled() -> None:
    with ScriptedServer(answering(), answering(structured=False)) as server, channel() as c:
        c.connect(server.connect(), structured=False)
        asked = c.ask(0, PAGE)
        assert NO_REPLY in c.wait_events()[0].text
        c.connect(server.connect(), structured=False)
        assert asked.data() == CONTENT[:PAGE]


@pytest.mark.parametrize("structured", [True, False])
def test_a_second_reply_to_the_same_read_is_garbled(structured: bool) -> None:
    """P1: its buffer is somebody else's by now."""

    def twice(peer: Peer, request: Request) -> bool:
        peer.answer_read(request, content_of(request))
        peer.answer_read(request, b"x" * request.length)
        return True

    with ScriptedServer(answering(twice, structured=structured)) as server, channel() as c:
        c.connect(server.connect(), structured=structured)
        asked = c.ask(0, PAGE)
        assert asked.data() == CONTENT[:PAGE]
        (event,) = c.wait_events()
        assert (event.error, event.owed) == (errno.EPROTO, 0)
        assert NOTHING in event.text
        assert asked.data() == CONTENT[:PAGE]


def test_a_reply_with_the_cookie_of_an_earlier_read_is_garbled() -> None:
    """The slot is the same, the read is another."""

    def old_cookie(peer: Peer) -> None:
        (first,) = peer.requests(1)
        peer.data_chunk(first, content_of(first))
        (second,) = peer.requests(1)
        assert second.cookie != first.cookie
        peer.send(peer.chunk_bytes(first, Chunk.OFFSET_DATA, OFFSET.pack(second.offset) + b"x" * PAGE))
        peer.never_answer()

    with ScriptedServer(old_cookie, answering()) as server, channel() as c:
        c.connect(server.connect())
        assert c.ask(0, PAGE).data() == CONTENT[:PAGE]
        asked = c.ask(PAGE, PAGE)
        assert NOTHING in c.wait_events()[0].text
        c.connect(server.connect())
        assert asked.data() == CONTENT[PAGE : 2 * PAGE]


# -- refusals


@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize(("said", "meant"), [(errno.EIO, errno.EIO), (errno.EPERM, errno.EPERM), (4711, errno.EINVAL)])
def test_a_refusal_of_the_only_server_is_the_result(structured: bool, said: int, meant: int) -> None:
    """And the connection lives on."""

    def refuse(peer: Peer, request: Request) -> bool:
        if request.offset == 0:
            peer.answer_error(request, said, "the disk is on fire")
        return request.offset == 0

    with ScriptedServer(answering(refuse, structured=structured)) as server, channel() as c:
        c.connect(server.connect(), structured=structured)
        assert c.ask(0, PAGE).result() == -meant
        assert c.ask(PAGE, PAGE).data() == CONTENT[PAGE : 2 * PAGE]
        assert not c.has_event()


def test_a_simple_error_is_taken_where_structured_replies_were_agreed_on() -> None:
    def refuse(peer: Peer, request: Request) -> bool:
        peer.simple_reply(request, error=errno.EIO)
        return True

    with ScriptedServer(answering(refuse)) as server, channel() as c:
        c.connect(server.connect())
        assert c.ask(0, PAGE).result() == -errno.EIO


def test_an_error_after_data_is_an_error() -> None:
    """P1."""

    def refuse(peer: Peer, request: Request) -> bool:
        peer.data_chunk(request, content_of(request), done=False)
        peer.error_chunk(request, errno.EIO, "all of this was wrong", offset=request.offset, done=False)
        peer.none_chunk(request)
        return True

    with ScriptedServer(answering(refuse)) as server, channel() as c:
        c.connect(server.connect())
        assert c.ask(0, PAGE).result() == -errno.EIO


def test_one_refused_part_of_a_request_fails_it_once() -> None:
    def refuse(peer: Peer, request: Request) -> bool:
        if request.offset == 3 * PAGE:
            peer.error_chunk(request, errno.EIO)
        return request.offset == 3 * PAGE

    with ScriptedServer(answering(refuse)) as server, channel(length_max=PAGE) as c:
        c.connect(server.connect())
        assert c.ask(0, 64 * PAGE).result() == -errno.EIO
        assert c.ask(4 * PAGE, PAGE).data() == CONTENT[4 * PAGE : 5 * PAGE]


def refusing(error: int) -> Script:
    def refuse(peer: Peer, request: Request) -> bool:
        peer.error_chunk(request, error, "no")
        return True

    return answering(refuse)


@pytest.mark.parametrize("demand", [True, False])
def test_what_one_of_several_servers_refuses_is_asked_of_the_next(demand: bool) -> None:
    with ScriptedServer(refusing(errno.EIO), answering()) as server, channel(server_count=2) as c, c.dispatching():
        c.connect(server.connect(), demand=demand)
        asked = c.ask(0, PAGE, demand=demand)
        (event,) = c.wait_events()
        assert (event.error, event.owed) == (errno.EIO, 0)
        assert event.text == f"the server refused to read at offset 0: {os.strerror(errno.EIO)}"
        c.connect(server.connect(), demand=demand)
        assert asked.data() == CONTENT[:PAGE]


def test_a_refusal_loses_both_connections_to_that_server() -> None:
    scripts = (answering(), refusing(errno.EIO), answering())
    with ScriptedServer(*scripts) as server, channel(server_count=2) as c, c.dispatching():
        c.connect(server.connect())
        c.connect(server.connect(), demand=True)
        asked = c.ask(0, PAGE, demand=True)
        assert {event.error for event in c.wait_events(2)} == {errno.EIO}
        c.connect(server.connect())
        assert asked.data() == CONTENT[:PAGE]


def test_what_every_server_refuses_fails() -> None:
    with ScriptedServer(refusing(errno.EIO), refusing(errno.EPERM)) as server, channel(server_count=2) as c:
        c.connect(server.connect())
        asked = c.ask(0, PAGE)
        c.wait_events()
        c.connect(server.connect())
        assert asked.result() == -errno.EPERM
        assert not c.has_event()


def test_a_server_that_shuts_down_has_refused_nothing() -> None:
    """It may say so as often as it likes: each time the connection is lost, and the supplier decides."""
    with ScriptedServer(*[refusing(errno.ESHUTDOWN)] * 5, answering()) as server, channel() as c:
        for _ in range(5):
            c.connect(server.connect())
            asked = c.ask(0, PAGE)
            (event,) = c.wait_events()
            assert (event.error, event.text) == (errno.ESHUTDOWN, "the server is shutting down")
            assert asked.is_waiting()
        c.connect(server.connect())
        assert asked.data() == CONTENT[:PAGE]


# -- giving up


def test_what_waits_for_a_connection_fails_when_the_supplier_gives_up() -> None:
    with ScriptedServer(answering()) as server, channel() as c:
        waiting = [c.ask(0, PAGE), c.ask(0, PAGE, demand=True)]
        c.supplier.give_up(errno.ETIMEDOUT)
        assert [a.results for a in waiting] == [[-errno.ETIMEDOUT]] * 2
        assert c.ask(0, PAGE).results == [-errno.ETIMEDOUT]
        c.supplier.give_up(0)
        asked = c.ask(0, PAGE)
        assert asked.is_waiting()
        c.connect(server.connect())
        assert asked.data() == CONTENT[:PAGE]


def test_a_new_connection_ends_the_giving_up() -> None:
    with ScriptedServer(hanging_up_after(1), answering()) as server, channel() as c:
        c.supplier.give_up(errno.ETIMEDOUT)
        c.connect(server.connect())
        asked = c.ask(0, PAGE)
        c.wait_events()
        assert asked.is_waiting()
        c.connect(server.connect())
        assert asked.data() == CONTENT[:PAGE]


def test_giving_up_before_the_last_connection_is_lost_holds() -> None:
    """The supplier and whoever reads from the connection may come in either order."""
    with ScriptedServer(never) as server, channel() as c:
        c.connect(server.connect())
        asked = c.ask(0, PAGE)
        c.supplier.give_up(errno.ETIMEDOUT)
        assert asked.is_waiting()
        c.supplier.disconnect(errno.ECONNABORTED, "gone")
        assert asked.result() == -errno.ETIMEDOUT


# -- ends


@pytest.mark.parametrize("supplier_first", [True, False])
def test_what_is_in_flight_at_the_end_is_cancelled_once(supplier_first: bool) -> None:
    """P7: whoever goes first."""
    before = os.listdir("/proc/self/fd")
    with ScriptedServer(never, never) as server:
        c = Channel()
        with c.dispatching(2):
            c.connect(server.connect())
            c.connect(server.connect(), demand=True)
            asked = [c.ask(i * PAGE, PAGE, demand=i % 2 == 0) for i in range(200)]
            if supplier_first:
                c.supplier.close()
                assert {a.result() for a in asked} == {-errno.ECANCELED}
                assert c.ask(0, PAGE).result() == -errno.ECANCELED
        c.free()
        assert {a.result() for a in asked} == {-errno.ECANCELED}
        if not supplier_first:
            with pytest.raises(PcshareError) as caught:
                c.connect(server.connect())
            assert caught.value.errno == errno.ESHUTDOWN
            c.supplier.disconnect(errno.EIO, "nothing is there")
            c.supplier.give_up(errno.EIO)
            assert {event.error for event in c.supplier.events()} == {errno.ESHUTDOWN}
        c.supplier.close()
        c.close()
    assert os.listdir("/proc/self/fd") == before


def test_servers_are_told_of_the_end() -> None:
    server = ScriptedServer(answering())
    with server, channel() as c:
        c.connect(server.connect())
        c.connect(server.connect(), demand=True)
        c.ask(0, PAGE).data()
        c.supplier.close()
        commands = [server.seen.get(timeout=WAIT_S).command for _ in range(3)]
    assert commands == [wire.Command.READ, wire.Command.DISC, wire.Command.DISC]


def test_a_server_that_reads_nothing_does_not_hold_up_the_end() -> None:
    hold = threading.Event()
    with ScriptedServer(lambda peer: peer.wait(hold)) as server:
        with channel() as c:
            connection = server.connect()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
            c.connect(connection)
            asked = [c.ask(0, PAGE) for _ in range(200)]
            c.supplier.close()
            assert {a.result() for a in asked} == {-errno.ECANCELED}
        hold.set()


def test_many_lost_connections_leave_no_fd() -> None:
    """P7."""
    with ScriptedServer(*[hanging_up_after(1)] * 40, answering()) as server, channel() as c:
        asked = c.ask(0, PAGE)
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(40):
            c.connect(server.connect())
            c.wait_events()
        c.connect(server.connect())
        assert asked.data() == CONTENT[:PAGE]
        assert len(os.listdir("/proc/self/fd")) == before + 1 + server.connection_count  # the servers' ends


def test_of_events_that_nobody_takes_the_last_are_kept() -> None:
    with channel() as c:
        numbers = []
        for _ in range(40):
            ours, theirs = socket.socketpair()
            with theirs:
                numbers.append(c.connect(ours))
            c.supplier.disconnect(errno.ECONNABORTED, "it goes")
        events = list(c.supplier.events())
        assert [event.connection for event in events] == numbers[-32:]
        assert not c.has_event()


def test_a_connection_that_ends_before_anything_is_asked_costs_nobody_anything() -> None:
    with ScriptedServer(lambda peer: peer.hang_up(), answering()) as server, channel() as c:
        c.connect(server.connect())
        c.wait_events()
        asked = c.ask(0, PAGE)
        c.connect(server.connect())
        assert asked.data() == CONTENT[:PAGE]


# -- servers that others wrote


@pytest.fixture
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="nbd-", dir="/tmp"))  # a socket's path is short
    yield made
    shutil.rmtree(made)


def join_server(c: Channel, server: RealServer, *, demand: bool = False) -> None:
    session = negotiate(server.connect(), "", time.monotonic() + WAIT_S)
    c.connect(session.detach(), demand=demand, structured=session.export.structured)


def pattern(offset: int, length: int) -> bytes:
    """What nbdkit's pattern plugin has there: each 8 bytes are their offset."""
    first = offset // 8 * 8
    words = b"".join(struct.pack(">Q", at) for at in range(first, offset + length, 8))
    return words[offset - first :][:length]


@pytest.mark.parametrize("arguments", [(), ("--filter=noparallel",), ("--no-sr",), ("--threads=1",)], ids=str)
def test_nbdkit_is_read_over_both_connections(arguments: tuple[str, ...], folder: Path, rng: random.Random) -> None:
    size = 16 * MIB
    with nbdkit(folder, *arguments, "pattern", size) as server, channel(size=size) as c, c.dispatching(2):
        join_server(c, server)
        join_server(c, server, demand=True)
        stream = [(i * MIB, c.ask(i * MIB, MIB)) for i in range(16)]
        places = [rng.randrange(size - PAGE) for _ in range(200)]
        demand = [(offset, c.ask(offset, PAGE, demand=True)) for offset in places]
        assert all(asked.data() == pattern(offset, PAGE) for offset, asked in demand)
        assert all(asked.data() == pattern(offset, MIB) for offset, asked in stream)


def test_nbdkit_with_large_blocks_is_read_a_page_at_a_time(folder: Path, rng: random.Random) -> None:
    """It refuses with EINVAL what is not as its policy says."""
    policy = [
        "blocksize-minimum=64k",
        "blocksize-maximum=128k",
        "blocksize-preferred=64k",
        "blocksize-error-policy=error",
    ]
    with (
        nbdkit(folder, "--filter=blocksize-policy", "pattern", MIB, *policy) as server,
        channel(alignment=64 * KIB, length_max=128 * KIB) as c,
    ):
        join_server(c, server)
        for offset in (0, MIB - PAGE, rng.randrange(MIB - PAGE)):
            assert c.ask(offset, PAGE).data() == pattern(offset, PAGE)
        assert c.ask(100, MIB - 100).data() == pattern(100, MIB - 100)


def test_nbdkit_that_is_killed_is_followed_by_another(folder: Path) -> None:
    size = 64 * MIB
    with (
        nbdkit(folder, "--filter=delay", "pattern", size, "delay-read=500ms", name="slow") as slow,
        nbdkit(folder, "pattern", size, name="other") as other,
        channel(size=size) as c,
        c.dispatching(),
    ):
        join_server(c, slow)
        join_server(c, slow, demand=True)
        stream = [(i * MIB, c.ask(i * MIB, MIB)) for i in range(64)]
        demand = [(i * PAGE, c.ask(i * PAGE, PAGE, demand=True)) for i in range(100)]
        assert demand[0][1].data() == pattern(0, PAGE)
        slow.kill()
        assert sum(event.owed for event in c.wait_events(2)) > 0
        join_server(c, other)
        assert all(asked.data() == pattern(offset, PAGE) for offset, asked in demand)
        assert all(asked.data() == pattern(offset, MIB) for offset, asked in stream)


def test_nbdkit_is_not_left_in_the_midst_of_its_answers(folder: Path) -> None:
    """It aborts, with all its clients, where one goes away while several of its threads answer."""
    size = 64 * MIB
    with nbdkit(folder, "pattern", size) as server:
        for demand_is_read in (True, False) * 3:
            with channel(size=size) as c:
                join_server(c, server)
                join_server(c, server, demand=True)
                asked = [c.ask(i * MIB, MIB) for i in range(64)]
                asked += [c.ask(i * PAGE, PAGE, demand=True) for i in range(100)]
                with c.dispatching() if demand_is_read else nullcontext():
                    c.supplier.close()
                assert all(a.result() in (0, -errno.ECANCELED) for a in asked)
        assert server.process is not None
        assert server.process.poll() is None


def test_answers_that_do_not_come_are_not_waited_for_long() -> None:
    with ScriptedServer(never) as server, channel() as c:
        c.connect(server.connect())
        asked = c.ask(0, PAGE)
        begin = time.monotonic()
        c.supplier.close()
        assert time.monotonic() - begin < 5.0  # half a second by the core's own limit
        assert asked.result() == -errno.ECANCELED


def test_nbdkit_that_fails_on_command_is_taken_at_its_word(folder: Path) -> None:
    fail = folder / "fail"
    arguments = [
        "--filter=error",
        "pattern",
        MIB,
        "error-pread=EIO",
        "error-pread-rate=100%",
        f"error-pread-file={fail}",
    ]
    with nbdkit(folder, *arguments) as server, channel() as c:
        join_server(c, server)
        assert c.ask(0, PAGE).data() == pattern(0, PAGE)
        fail.touch()
        assert c.ask(0, PAGE).result() == -errno.EIO
        fail.unlink()
        assert c.ask(0, PAGE).data() == pattern(0, PAGE)


# -- all at once


@pytest.mark.parametrize("sanitize", ["address,undefined", "thread"])
def test_everything_at_once(sanitize: str, tmp_path: Path, rng: random.Random) -> None:
    """P1, P3, P7: each request ends once, every byte is right, no fd and no memory is left."""
    program = compile_c(tmp_path / "nbd_stress", "nbd_stress.c", NBD_FILES, sanitize)
    ran = run_program(program, str(rng.randrange(1 << 31)), str(STRESS_ROUNDS))
    assert (ran.returncode, ran.stderr) == (0, "")


def test_the_cores_numbers_are_the_protocols() -> None:
    """Each side has its own copy of the few that it needs."""
    text = (CORE / "nbd_connection.c").read_text()
    found = dict(re.findall(r"^\s+NBD_(\w+) = (0x\w+),$", text, re.M))
    assert {name: int(value, 16) for name, value in found.items()} == {
        name: getattr(wire, name) for name in ("REQUEST_MAGIC", "SIMPLE_REPLY_MAGIC", "STRUCTURED_REPLY_MAGIC")
    }
    chunks = {name: int(value) for name, value in re.findall(r"^\s+NBD_CHUNK_(\w+) = (\d+),$", text, re.M)}
    assert chunks == {name: wire.Chunk[name] for name in ("NONE", "OFFSET_DATA", "OFFSET_HOLE")}
