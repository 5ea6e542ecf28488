"""pcshare.migration: bytes as the format has them, whole streams into a receiver of the plainest kind, garbage."""

from __future__ import annotations

import contextlib
import errno
import json
import random
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pcshare.errors import MigrationError
from pcshare.migration import reader, return_path, wire
from pcshare.migration.wire import BytesStream, ConnectionKind, SectionType, connection_kind, take
from support_migration import HUGE_PAGE, HungUp, LinkBroken, Preempt, Refused, Source, SourceBlock, playing
from support_migration_bytes import (
    DESCRIPTION,
    DEVICE_STATE,
    ILLEGAL,
    PLACES,
    TARGET_PAGE,
    Illegal,
    after,
    before,
    capabilities,
    command,
    configuration,
    device_section,
    footer,
    instead_of,
    name,
    section,
    subsection,
)
from support_migration_link import ReturnPath, bitmap_length
from support_qemu import (
    COMPLETED,
    POSTCOPY,
    PREEMPT,
    UNLIMITED,
    Guest,
    Qemu,
    assert_same_memory,
)

MIB = 1 << 20
HEADER = b"QEVM\0\0\0\x03"


def parse(data: bytes, parser: wire.Parser[Any], offset: int = 0) -> Any:
    """What a parser makes of exactly these bytes."""
    stream = BytesStream(data, offset)
    result = take(stream, parser)
    assert stream.left == 0, f"{stream.left} bytes were not read"
    return result


def refused(data: bytes, parser: wire.Parser[Any], *words: str) -> MigrationError:
    with pytest.raises(MigrationError) as caught:
        take(BytesStream(data), parser)
    for word in words:
        assert word in str(caught.value)
    return caught.value


# -- the receiver that whole streams go to


class _Ended(Exception):
    """The connection is at its end."""


class SocketStream:
    """A connection as a stream."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.offset = 0

    def some(self, count: int) -> bytes:
        try:
            return self._connection.recv(count)
        except OSError:
            return b""

    def read(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece = self.some(count - len(data))
            if not piece:
                raise _Ended
            data += piece
        self.offset += count
        return data


@dataclass
class Received:
    """A block as it arrives."""

    announced: wire.Announcement
    memory: bytearray
    pages: bytearray  # a byte for each target page
    asked: set[int] = field(default_factory=set)  # host pages

    @property
    def page_size(self) -> int:
        return self.announced.page_size or TARGET_PAGE

    def bitmap(self) -> bytes:
        bits = bytearray((len(self.pages) + 63) // 64 * 8)
        for page, is_there in enumerate(self.pages):
            bits[page // 8] |= is_there << page % 8
        return bytes(bits)


class _Records:
    """The page records of one connection."""

    def __init__(self, receiver: Receiver, stream: SocketStream) -> None:
        self._receiver = receiver
        self._stream = stream
        self._block: Received | None = None
        self._half: dict[int, bytes] = {}  # target pages of the host page that is on its way

    def read(self) -> None:
        """Up to an end of payload."""
        while True:
            number = int.from_bytes(self._stream.read(8), "big")
            if number == 0x10:
                return
            self._read_one(number & ~0xFFF, number & 0xFFF)

    def _read_one(self, offset: int, flags: int) -> None:
        for flag, capability in ((0x40, "xbzrle"), (0x80, "rdma"), (0x100, "compress"), (0x200, "multifd")):
            if flags & flag:
                raise MigrationError(capability, errno=errno.EPROTONOSUPPORT)
        if flags & ~0x20 not in (0x02, 0x08):
            raise MigrationError(f"flags {flags:#x}")
        if not flags & 0x20:
            idstr = self._stream.read(self._stream.read(1)[0]).decode()
            self._block = self._receiver.blocks.get(idstr)
            if self._block is None:
                raise MigrationError(f"block {idstr}")
        block = self._block
        if block is None or offset + TARGET_PAGE > len(block.memory):
            raise MigrationError(f"offset {offset:#x} of {block and block.announced.idstr}")
        content = self._stream.read(TARGET_PAGE) if flags & 0x08 else self._stream.read(1) * TARGET_PAGE
        with self._receiver.lock:
            self._store(block, offset // TARGET_PAGE, content)

    def _store(self, block: Received, page: int, content: bytes) -> None:
        step = block.page_size // TARGET_PAGE
        if not self._receiver.listening:
            self._half = {}
            block.memory[page * TARGET_PAGE : (page + 1) * TARGET_PAGE] = content
            block.pages[page] = 1
            return
        assert not block.pages[page], "sent twice after LISTEN"
        assert not self._half or page // step == next(iter(self._half)) // step, "a host page is not sent consecutively"
        self._half[page] = content
        if len(self._half) == step:
            for target, data in self._half.items():
                block.memory[target * TARGET_PAGE : (target + 1) * TARGET_PAGE] = data
                block.pages[target] = 1
            self._half = {}
            self._receiver.page_came(step)


class Receiver:
    """Takes a migration: pages in bytearrays, requests at random, every connection in a thread of its own."""

    def __init__(self, seed: int = 0, ask: float = 0.5, shut_status: int = 0) -> None:
        self.blocks: dict[str, Received] = {}
        self.lock = threading.Condition()  # of the pages; notified when one has come
        self.listening = False
        self.section_id = -1  # of RAM; a recovery does not say it again
        self.header: wire.Header | None = None
        self.advise: wire.PostcopyAdvise | None = None
        self.commands: list[wire.Command] = []
        self.device_state: bytes | None = None
        self.description: bytes | None = None
        self.error: MigrationError | None = None
        self.kinds: list[ConnectionKind] = []
        self._shut_status = shut_status
        self._ask = ask
        self._rng = random.Random(seed)
        self._failures: list[BaseException] = []
        self._threads: list[threading.Thread] = []
        self._sockets: list[socket.socket] = []
        self._last_asked: str | None = None
        self._arrived = 0  # target pages after LISTEN

    def connect(self) -> socket.socket:
        """For a Source."""
        ours, theirs = socket.socketpair()
        self.take(ours)
        return theirs

    def wait_for_pages(self, n: int) -> None:
        """Until so many target pages more have come after LISTEN."""
        with self.lock:
            wanted = self._arrived + n
            assert self.lock.wait_for(lambda: self._arrived >= wanted, 20), f"waited in vain for {n} pages"

    def take(self, connection: socket.socket) -> None:
        """A connection that somebody made."""
        self._sockets.append(connection)
        thread = threading.Thread(target=self._run, args=(connection,), daemon=True)
        self._threads.append(thread)
        thread.start()

    def close(self) -> None:
        """When the source has closed its connections."""
        for thread in self._threads:
            thread.join(20)
            assert not thread.is_alive(), "the receiver does not see the end of a connection"
        for connection in self._sockets:
            connection.close()
        if self._failures:
            raise self._failures[0]

    def _run(self, connection: socket.socket) -> None:
        try:
            first = connection.recv(1, socket.MSG_PEEK)
            if first:
                self._serve(connection, connection_kind(first[0]))
        except _Ended:
            pass
        except MigrationError as error:
            self.error = error
            self._say(connection, return_path.shut(1))
        except BaseException as failure:
            self._failures.append(failure)
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)

    def page_came(self, n: int) -> None:
        """With the lock held."""
        self._arrived += n
        self.lock.notify_all()

    def _serve(self, connection: socket.socket, kind: ConnectionKind | None) -> None:
        if kind is not None:
            self.kinds.append(kind)
        stream = SocketStream(connection)
        if kind is ConnectionKind.PREEMPT:
            _Records(self, stream).read()
            return
        section_type = None
        if kind is ConnectionKind.RECOVERY:
            self.wait_for_earlier_connections()
        else:
            self.header = take(stream, reader.read_header())
            section_type = self.header.section_type
        self._last_asked = None
        self._read_sections(connection, stream, section_type)

    def wait_for_earlier_connections(self) -> None:
        """A recovery can be here before all that the old connections brought was read: bitmaps would lack it.

        In a thread of a test's: waits for all connections to end."""
        threads, own = list(self._threads), threading.current_thread()
        for thread in threads[: threads.index(own)] if own in threads else threads:
            thread.join(20)
            assert not thread.is_alive(), "an old connection does not end"

    def _read_sections(self, connection: socket.socket, stream: SocketStream, known: SectionType | None) -> None:
        records = _Records(self, stream)
        while True:
            section_type, known = known or take(stream, reader.read_section_type()), None
            if section_type is SectionType.COMMAND:
                self._obey(connection, stream, take(stream, reader.read_command()))
            elif section_type is SectionType.START and self.section_id < 0:
                self.section_id = take(stream, reader.read_ram_section_start()).section_id
                self._announce(take(stream, reader.read_ram_blocks()))
                take(stream, reader.read_footer(self.section_id))
            elif section_type in (SectionType.PART, SectionType.END):
                take(stream, reader.read_section_id(self.section_id))
                records.read()
                take(stream, reader.read_footer(self.section_id))
                if self.listening and section_type is SectionType.PART:
                    self._ask_some(connection)
            elif section_type is SectionType.FULL:
                self._take_device_state(connection, stream)
                return
            elif section_type is SectionType.EOF and self.listening:
                self._end_postcopy(connection)
                return
            else:
                raise MigrationError(f"section {section_type.name} at this moment")

    def _announce(self, blocks: tuple[wire.Announcement, ...]) -> None:
        for block in blocks:
            memory = bytearray(b"\xee") * block.used_length
            self.blocks[block.idstr] = Received(block, memory, bytearray(block.used_length // TARGET_PAGE))

    def _obey(self, connection: socket.socket, stream: SocketStream, order: wire.Command) -> None:
        self.commands.append(order)
        if isinstance(order, wire.Ping):
            self._say(connection, return_path.pong(order.value))
        elif isinstance(order, wire.PostcopyAdvise):
            self.advise = order
        elif isinstance(order, wire.RamDiscard):
            self._discard(order)
        elif isinstance(order, wire.Packaged):
            offset = stream.offset
            package = reader.split_package(stream.read(order.length), offset)
            self.device_state, self.listening = package.device_state, True
            self._say(connection, return_path.pong(package.ping))
            self._ask_some(connection)
        elif isinstance(order, wire.RecvBitmapWanted):
            with self.lock:
                self._say(connection, return_path.recv_bitmap(order.idstr, self.blocks[order.idstr].bitmap()))
        elif isinstance(order, wire.PostcopyResume):
            self._say(connection, return_path.resume_ack())
            self._ask_again(connection)

    def _say(self, connection: socket.socket, data: bytes) -> None:
        """What the source does not want, or is no more there for, is lost."""
        if wire.OpenReturnPath() not in self.commands:
            return
        with contextlib.suppress(OSError):
            connection.sendall(data)

    def _discard(self, order: wire.RamDiscard) -> None:
        block = self.blocks.get(order.idstr)
        for start, length in order.ranges:
            if block is None or start + length > len(block.memory) or (start | length) % block.page_size:
                raise MigrationError(f"discard of {order.idstr}: {start}, {length}")
            block.memory[start : start + length] = b"\xdd" * length
            block.pages[start // TARGET_PAGE : (start + length) // TARGET_PAGE] = bytes(length // TARGET_PAGE)

    def _request(self, connection: socket.socket, block: Received, host_page: int) -> None:
        idstr = block.announced.idstr
        block.asked.add(host_page)
        named = None if self._last_asked == idstr else idstr
        self._say(connection, return_path.req_pages(host_page * block.page_size, block.page_size, named))
        self._last_asked = idstr

    def _missing(self, block: Received) -> set[int]:
        step = block.page_size // TARGET_PAGE
        return {page // step for page in range(0, len(block.pages), step) if not block.pages[page]}

    def _ask_some(self, connection: socket.socket) -> None:
        for block in self.blocks.values():
            with self.lock:
                missing = sorted(self._missing(block) - block.asked)
            for host_page in self._rng.sample(missing, min(3, len(missing))):
                if self._rng.random() < self._ask:
                    self._request(connection, block, host_page)

    def _ask_again(self, connection: socket.socket) -> None:
        for block in self.blocks.values():
            with self.lock:
                again = sorted(self._missing(block) & block.asked)
            for host_page in again:
                self._request(connection, block, host_page)

    def _take_device_state(self, connection: socket.socket, stream: SocketStream) -> None:
        data = b"\x04"
        while (end := reader.split_precopy_end(data)) is None:
            more = stream.some(1 << 16)
            if not more:
                end = reader.split_precopy_end(data, hung_up=True)
                assert end is not None, "a precopy stream without an end"
                break
            data += more
        self.device_state, self.description = end.device_state, end.description
        self._say(connection, return_path.shut(self._shut_status))

    def _end_postcopy(self, connection: socket.socket) -> None:
        """Pages may still be on their way on the preempt channel."""

        def is_complete() -> bool:
            return not any(self._missing(block) for block in self.blocks.values())

        with self.lock:
            assert self.lock.wait_for(is_complete, 20), "the end comes, and pages are missing"
        self._say(connection, return_path.shut(self._shut_status))


@contextlib.contextmanager
def receiving(**options: Any) -> Iterator[Receiver]:
    receiver = Receiver(**options)
    try:
        yield receiver
    finally:
        receiver.close()


def blocks_of_a_machine(seed: int, *, huge: bool = False) -> list[SourceBlock]:
    """A big one, one with an odd name, a ROM of one page; huge: a big one of large pages, too."""
    blocks = [
        SourceBlock("pc.ram", MIB, seed=seed),
        SourceBlock("0000:00:02.0/vga.vram", 256 << 10, seed=seed, zero_share=0.9),
        SourceBlock("/rom@etc/table-loader", TARGET_PAGE, seed=seed, zero_share=0),
    ]
    if huge:
        blocks.insert(0, SourceBlock("ram-node0", 3 * HUGE_PAGE, HUGE_PAGE, seed=seed))
    return blocks


def assert_same(receiver: Receiver, source: Source) -> None:
    assert list(receiver.blocks) == list(source.blocks)
    for idstr, block in receiver.blocks.items():
        assert block.memory == source.memory(idstr), idstr
        assert all(block.pages), idstr


# -- whole streams


# With a return path and without a description such a stream has no end that a receiver can see.
@pytest.mark.parametrize(("with_return_path", "with_description"), [(True, True), (False, True), (False, False)])
def test_a_precopy_stream_is_read_to_its_end(with_return_path: bool, with_description: bool) -> None:
    with receiving() as receiver:
        source = Source(
            receiver.connect,
            blocks_of_a_machine(1),
            with_postcopy=False,
            with_return_path=with_return_path,
            with_description=with_description,
            with_switchover_start=True,
        )
        with playing(source, lambda source: source.migrate(precopy_share=0.7)):
            pass
    assert_same(receiver, source)
    assert receiver.device_state == DEVICE_STATE
    assert receiver.description == (DESCRIPTION if with_description else None)
    assert wire.SwitchoverStart() in receiver.commands
    first = SectionType.COMMAND if with_return_path else SectionType.START
    assert receiver.header == wire.Header("pc-i440fx-7.2", None, None, None, first)


@pytest.mark.parametrize("huge", [False, True], ids=["4K", "2M"])
@pytest.mark.parametrize("preempt", Preempt)
@pytest.mark.parametrize("passes", [0, 2])
def test_a_postcopy_stream_brings_every_page_once(preempt: Preempt, huge: bool, passes: int) -> None:
    def script(source: Source) -> None:
        source.connect()
        for _ in range(passes):
            source.precopy(0.6)
        source.enter_postcopy()
        source.postcopy()
        source.finish()

    with receiving(seed=passes) as receiver:
        source = Source(receiver.connect, blocks_of_a_machine(2, huge=huge), preempt=preempt, seed=passes)
        with playing(source, script):
            pass
    assert_same(receiver, source)
    assert receiver.device_state == DEVICE_STATE
    assert {pong.value for pong in source.return_path.messages(return_path.Pong)} == {1, 2, 3, 4}
    assert receiver.advise == wire.PostcopyAdvise(TARGET_PAGE | (HUGE_PAGE if huge else 0), TARGET_PAGE)
    assert receiver.blocks["pc.ram"].announced.page_size is None
    if huge:
        assert receiver.blocks["ram-node0"].announced.page_size == HUGE_PAGE
    assert source.return_path.messages(return_path.PagesWanted)


@pytest.mark.parametrize("preempt", Preempt)
def test_only_requested_pages_come_until_the_source_is_released(preempt: Preempt) -> None:
    with receiving(ask=1.0) as receiver:
        blocks = [SourceBlock("pc.ram", MIB)]
        source = Source(receiver.connect, blocks, preempt=preempt, only_requested=True, section_pages=1)
        with playing(source) as play:
            source.return_path.wait_for(return_path.PagesWanted, 3)
            source.release()
            play.join()
    assert_same(receiver, source)
    assert source.requested_pages >= 3


def test_a_limited_stream_still_serves_requests_on_the_preempt_channel() -> None:
    with receiving(ask=1.0) as receiver:
        blocks = [SourceBlock("pc.ram", MIB, zero_share=0)]
        source = Source(receiver.connect, blocks, preempt=Preempt.V8_0, rate_bytes_s=8 * MIB, section_pages=8)
        with playing(source):
            pass
    assert_same(receiver, source)
    assert source.places["preempt-record"] > 0
    assert ConnectionKind.PREEMPT in receiver.kinds


@pytest.mark.parametrize("preempt", Preempt)
@pytest.mark.parametrize("huge", [False, True], ids=["4K", "2M"])
def test_a_broken_migration_is_recovered_several_times(preempt: Preempt, huge: bool) -> None:
    breaks = random.Random(5)

    def break_soon(source: Source) -> None:
        source.main.break_at = source.main.written + breaks.randrange(1, 300_000)
        source.postcopy()
        source.main.break_at = source.main.written + 1  # nothing was left to send
        source.finish()

    def script(source: Source) -> None:
        source.connect()
        source.precopy(0.3)
        source.enter_postcopy()
        for _ in range(4):
            with pytest.raises(LinkBroken):
                break_soon(source)
            source.recover()
        source.postcopy()
        source.finish()

    with receiving(seed=7) as receiver:
        source = Source(receiver.connect, blocks_of_a_machine(3, huge=huge), preempt=preempt, seed=7)
        with playing(source, script):
            pass
    assert_same(receiver, source)
    assert receiver.kinds.count(ConnectionKind.RECOVERY) == 4


def test_a_break_in_the_middle_of_a_recovery_is_recovered() -> None:
    def script(source: Source) -> None:
        source.connect()
        source.enter_postcopy()
        source.main.break_at = source.main.written + 50_000
        with pytest.raises(LinkBroken):
            source.postcopy()
        for length in (1, 7, 15):
            source.begin_recovery()
            source.main.break_at = length
            with pytest.raises(LinkBroken):
                source.ask_bitmaps()
        source.recover()
        source.postcopy()
        source.finish()

    with receiving() as receiver:
        source = Source(receiver.connect, blocks_of_a_machine(4))
        with playing(source, script):
            pass
    assert_same(receiver, source)


# -- the source itself: a receiver that does wrong fails the test


def test_a_receiver_that_ends_with_an_error_fails_the_script() -> None:
    with receiving(shut_status=1) as receiver:
        source = Source(receiver.connect, blocks_of_a_machine(1))
        with pytest.raises(Refused), playing(source):
            pass


def test_a_receiver_that_hangs_up_fails_the_script() -> None:
    ours, theirs = socket.socketpair()
    with ours, pytest.raises(HungUp), playing(Source(lambda: theirs, blocks_of_a_machine(1))):
        ours.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (return_path.req_pages(0, TARGET_PAGE), "names no block"),
        (return_path.req_pages(0, 2048, "pc.ram"), "of pages of 4096"),
        (return_path.req_pages(MIB, TARGET_PAGE, "pc.ram"), "1048576 bytes"),
        (return_path.req_pages(0, TARGET_PAGE, "pc.ram")[:-1], "within a message"),
        (b"\0\x63\0\0", "message 99"),
    ],
)
def test_a_receiver_that_breaks_the_return_path_fails_the_test(answer: bytes, complaint: str) -> None:
    ours, theirs = socket.socketpair()
    path = ReturnPath({"pc.ram": SourceBlock("pc.ram", MIB)})
    path.is_open = True
    path.begin(theirs)
    with ours:
        ours.sendall(answer)
    path.wait_for_hang_up()
    path.join()
    theirs.close()
    (error,) = path.errors
    assert complaint in str(error)


def test_every_place_is_written_to_by_some_migration() -> None:
    seen: set[str] = set()
    for options in ({"with_postcopy": False, "with_switchover_start": True}, {"preempt": Preempt.V7_2}):
        with receiving(ask=1.0) as receiver:
            source = Source(receiver.connect, blocks_of_a_machine(1), section_pages=4, **options)
            with playing(source, lambda source: source.migrate(precopy_share=0.5)):
                pass
        seen |= set(source.places)
    assert set(PLACES) - seen == {"bitmap-wanted", "resume"}


# -- illegal streams


def _illegal(postcopy: bool) -> list[str]:
    return [text for text, illegal in ILLEGAL.items() if (illegal.postcopy if postcopy else illegal.precopy)]


def _is_refused(illegal: Illegal, with_postcopy: bool) -> MigrationError:
    with receiving() as receiver:
        source = Source(
            receiver.connect,
            blocks_of_a_machine(1),
            with_postcopy=with_postcopy,
            in_order=True,
            tamper={illegal.place: illegal.tamper},
        )
        with playing(source, lambda source: source.is_refused(lambda: source.migrate(precopy_share=0.5))):
            pass
    assert receiver.error is not None
    assert illegal.words in str(receiver.error).lower()
    return receiver.error


@pytest.mark.parametrize("what", _illegal(postcopy=True))
def test_an_illegal_postcopy_stream_is_refused(what: str) -> None:
    error = _is_refused(ILLEGAL[what], with_postcopy=True)
    assert error.errno in (errno.EPROTO, errno.EPROTONOSUPPORT)


@pytest.mark.parametrize("what", _illegal(postcopy=False))
def test_an_illegal_precopy_stream_is_refused(what: str) -> None:
    _is_refused(ILLEGAL[what], with_postcopy=False)


# -- header, as bytes


def test_a_header_is_read_up_to_the_first_section() -> None:
    header = parse(HEADER + b"\x07\0\0\0\x02pc\x08", reader.read_header())
    assert header == wire.Header("pc", None, None, None, SectionType.COMMAND)


def test_a_headers_subsections_are_read_in_any_order() -> None:
    data = configuration(
        "pc-q35-8.0",
        subsection("configuration/target-page-bits", b"\0\0\0\x0c"),
        b"\x05\x1aconfiguration/capabilities\0\0\0\x01\0\0\0\x02\x0cpostcopy-ram\x06events",
        subsection("configuration/uuid", bytes(range(16))),
    )
    header = parse(HEADER + data + b"\x01", reader.read_header())
    assert header == wire.Header("pc-q35-8.0", ("postcopy-ram", "events"), bytes(range(16)), 12, SectionType.START)


def test_an_announced_capability_is_refused_by_its_name_and_with_the_cure() -> None:
    data = HEADER + configuration("pc", capabilities(["postcopy-ram", "mapped-ram"]))
    error = refused(data, reader.read_header(), "mapped-ram")
    assert error.errno == errno.EPROTONOSUPPORT
    assert error.hint is not None
    assert "migrate_set_capability mapped-ram off" in error.hint


@pytest.mark.parametrize(
    ("first", "kind"),
    [
        (0x51, ConnectionKind.MIGRATION),
        (0x08, ConnectionKind.RECOVERY),
        (0, ConnectionKind.PREEMPT),
        (0x11, ConnectionKind.MULTIFD),
        (0x47, None),
    ],
)
def test_the_first_byte_tells_what_a_connection_is(first: int, kind: ConnectionKind | None) -> None:
    assert connection_kind(first) is kind


def test_an_error_names_the_byte_where_the_wrong_piece_begins() -> None:
    error = refused(HEADER + configuration("pc") + b"\x99", reader.read_header(), "byte 15", "0x99")
    assert error.offset == 15
    with pytest.raises(MigrationError, match="byte 1001:") as caught:
        take(BytesStream(b"\x7e\0\0\0", 1000 - 3), reader.read_footer(3))
    assert caught.value.offset == 1001


# -- RAM START, as bytes


def announced(*blocks: bytes, total: int) -> bytes:
    return struct.pack(">Q", total | 4) + b"".join(blocks) + struct.pack(">Q", 0x10)


def block_bytes(idstr: str, length: int, page_size: int | None = None) -> bytes:
    return name(idstr) + struct.pack(">Q", length) + (b"" if page_size is None else struct.pack(">Q", page_size))


@pytest.mark.parametrize("sizes", [(None, None), (HUGE_PAGE, None), (None, HUGE_PAGE), (HUGE_PAGE, 1 << 30)])
def test_a_page_size_that_may_be_there_is_found(sizes: tuple[int | None, int | None]) -> None:
    data = announced(block_bytes("a", 2 << 30, sizes[0]), block_bytes("b", 1 << 30, sizes[1]), total=3 << 30)
    assert parse(data, reader.read_ram_blocks()) == (
        wire.Announcement("a", 2 << 30, sizes[0]),
        wire.Announcement("b", 1 << 30, sizes[1]),
    )


def test_a_block_that_is_no_multiple_of_its_page_size_is_refused_with_all_three_numbers() -> None:
    data = announced(block_bytes("pc.ram", 3 << 20, HUGE_PAGE), total=3 << 20)
    refused(data, reader.read_ram_blocks(), "pc.ram", str(3 << 20), str(HUGE_PAGE))


def test_more_blocks_than_the_limit_are_refused() -> None:
    names = [block_bytes(f"block-{number}", 4096) for number in range(wire.BLOCKS_MAX + 1)]
    refused(announced(*names, total=len(names) * 4096), reader.read_ram_blocks(), str(wire.BLOCKS_MAX))


@given(
    st.lists(
        st.tuples(st.text("abc./@", min_size=1, max_size=9), st.integers(1, 9), st.sampled_from([None, 4096, 1 << 21])),
        min_size=1,
        unique_by=lambda block: block[0],
    )
)
def test_any_list_of_blocks_is_read(blocks: list[tuple[str, int, int | None]]) -> None:
    data = announced(*(block_bytes(n, u << 21, p) for n, u, p in blocks), total=sum(u << 21 for _, u, _ in blocks))
    assert parse(data, reader.read_ram_blocks()) == tuple(wire.Announcement(n, u << 21, p) for n, u, p in blocks)


# -- commands, as bytes


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"\0\x01\0\0", wire.OpenReturnPath()),
        (b"\0\x02\0\x04\0\0\0\x07", wire.Ping(7)),
        (b"\0\x03\0\x10" + b"\0\0\0\0\0\x20\x10\0" + b"\0\0\0\0\0\0\x10\0", wire.PostcopyAdvise(0x201000, 4096)),
        (b"\0\x04\0\0", wire.PostcopyListen()),
        (b"\0\x05\0\0", wire.PostcopyRun()),
        (b"\0\x07\0\x04\0\0\x10\0", wire.Packaged(4096)),
        (b"\0\x09\0\0", wire.PostcopyResume()),
        (b"\0\x0a\0\x07\x06pc.ram", wire.RecvBitmapWanted("pc.ram")),
        (b"\0\x0b\0\0", wire.SwitchoverStart()),
        (
            b"\0\x06\0\x14\0\x01a\0" + b"\0\0\0\0\0\0\x20\0" + b"\0\0\0\0\0\0\x10\0",
            wire.RamDiscard("a", ((8192, 4096),)),
        ),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, bytes) else "",
)
def test_a_command_is_read(data: bytes, expected: wire.Command) -> None:
    assert parse(data, reader.read_command()) == expected


def test_a_discard_has_at_most_twelve_ranges() -> None:
    def discard(count: int) -> bytes:
        return command(6, b"\0" + name("x" * 255) + b"\0" + struct.pack(">QQ", 0, 4096) * count)[1:]

    assert len(parse(discard(12), reader.read_command()).ranges) == 12
    refused(discard(13), reader.read_command(), "RAM_DISCARD")


# -- packages and the end of precopy

LISTEN, PING_3, RUN = command(4), command(2, b"\0\0\0\x03"), command(5)


def test_a_packages_bytes_are_those_of_the_format() -> None:
    state = device_section(1, "cpu", bytes(5))
    data = bytes.fromhex("0800040000") + state + bytes.fromhex("08000200040000000308000500" + "00")
    assert reader.split_package(data) == wire.Package(state, 3)


@pytest.mark.parametrize("front", [LISTEN, command(11) + LISTEN, LISTEN + command(11)])
@pytest.mark.parametrize("state", [b"", DEVICE_STATE, LISTEN, RUN])
def test_a_package_gives_its_device_state(front: bytes, state: bytes) -> None:
    package = reader.split_package(front + state + PING_3 + RUN)
    assert package.device_state == state
    assert package.ping == 3


@pytest.mark.parametrize(
    "data",
    [b"", LISTEN, LISTEN + RUN, LISTEN + PING_3, LISTEN + RUN + PING_3, PING_3 + RUN, b"\x04" + LISTEN + PING_3 + RUN],
)
def test_a_package_without_its_ends_is_refused(data: bytes) -> None:
    with pytest.raises(MigrationError):
        reader.split_package(data)


def test_a_packages_error_names_the_byte_of_the_stream() -> None:
    with pytest.raises(MigrationError, match="byte 107:"):
        reader.split_package(LISTEN + b"ab" + RUN + PING_3, 100)


def test_the_end_of_precopy_is_found_when_the_last_byte_is_there_and_not_before() -> None:
    data = DEVICE_STATE + b"\0\x06" + struct.pack(">I", len(DESCRIPTION)) + DESCRIPTION
    for length in range(len(data)):
        assert reader.split_precopy_end(data[:length]) is None, length
    assert reader.split_precopy_end(data) == reader.PrecopyEnd(DEVICE_STATE, DESCRIPTION)


def test_without_a_description_only_the_end_of_the_connection_is_the_end() -> None:
    data = DEVICE_STATE + b"\0"
    assert reader.split_precopy_end(data) is None
    assert reader.split_precopy_end(data, hung_up=True) == reader.PrecopyEnd(DEVICE_STATE, None)
    assert reader.split_precopy_end(DEVICE_STATE, hung_up=True) is None
    assert reader.split_precopy_end(data + b"\x06\0\0\0\x02{", hung_up=True) is None


def test_a_description_that_is_nested_without_end_is_no_end() -> None:
    text = b'{"a":' + b"[" * 200_000
    assert reader.split_precopy_end(b"\0\x06" + struct.pack(">I", len(text)) + text) is None


@given(st.binary(max_size=200), st.dictionaries(st.text(max_size=5), st.integers(), max_size=3))
def test_any_device_state_comes_out_as_it_went_in(state: bytes, described: dict[str, int]) -> None:
    text = json.dumps(described).encode()
    data = state + footer(1) + b"\0\x06" + struct.pack(">I", len(text)) + text
    found = reader.split_precopy_end(data)
    assert found is not None
    assert found.description == text
    assert found.device_state == state + footer(1)


# -- the return path, as bytes


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (return_path.shut(0), bytes.fromhex("0001 0004 00000000")),
        (return_path.shut(1), bytes.fromhex("0001 0004 00000001")),
        (return_path.pong(3), bytes.fromhex("0002 0004 00000003")),
        (return_path.req_pages(0x200000, 4096, "a"), bytes.fromhex("0003 000e 0000000000200000 00001000 01 61")),
        (return_path.req_pages(0x200000, 4096), bytes.fromhex("0004 000c 0000000000200000 00001000")),
        (
            return_path.recv_bitmap("ab", b"\x03" + bytes(7)),
            bytes.fromhex("0005 0003 02 6162 0000000000000008 03 00000000000000 0123456789abcdef"),
        ),
        (return_path.resume_ack(), bytes.fromhex("0006 0004 00000001")),
    ],
)
def test_a_return_message_has_the_formats_bytes(data: bytes, expected: bytes) -> None:
    assert data == expected


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (return_path.shut(5), return_path.Shut(5)),
        (return_path.pong(9), return_path.Pong(9)),
        (return_path.resume_ack(), return_path.ResumeAck(1)),
        (return_path.req_pages(1 << 40, 1 << 21, "pc.ram"), return_path.PagesWanted(1 << 40, 1 << 21, "pc.ram")),
        (return_path.req_pages(0, 4096), return_path.PagesWanted(0, 4096, None)),
        (return_path.recv_bitmap("pc.ram", bytes(16)), return_path.ReceivedBitmap("pc.ram", bytes(16))),
    ],
)
def test_a_return_message_is_read(data: bytes, expected: return_path.ReturnMessage) -> None:
    assert parse(data, return_path.read_return_message(16)) == expected


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (bytes.fromhex("0001 0003 000000"), "message 1"),
        (bytes.fromhex("0004 000d 0000000000200000 00001000 00"), "message 4"),
        (bytes.fromhex("0003 000e 0000000000200000 00001000 02 61"), "a name of 2"),
        (bytes.fromhex("0005 0002 01 61 0000000000000018"), "24 bytes"),
        (bytes.fromhex("0005 0002 01 61 0000000000000007"), "7 bytes"),
        (bytes.fromhex("0005 0002 01 61 0000000000000008 0000000000000000 0123456789abcdee"), "ends with"),
    ],
)
def test_a_return_message_that_is_wrong_is_refused(data: bytes, words: str) -> None:
    assert refused(data, return_path.read_return_message(16), words).errno == errno.EPROTO


def test_a_bitmap_of_odd_size_cannot_be_sent() -> None:
    with pytest.raises(ValueError, match="7 bytes"):
        return_path.recv_bitmap("a", bytes(7))


def test_a_bitmap_covers_blocks_of_any_number_of_pages() -> None:
    assert [bitmap_length(SourceBlock("a", count << 12)) for count in (1, 64, 65)] == [8, 8, 16]


# -- garbage

PARSERS: list[Callable[[], wire.Parser[Any]]] = [
    reader.read_header,
    reader.read_section_type,
    reader.read_section_start,
    reader.read_ram_section_start,
    lambda: reader.read_section_id(3),
    lambda: reader.read_footer(3),
    reader.read_ram_blocks,
    reader.read_command,
    lambda: return_path.read_return_message(1 << 10),
]
LONGEST_PIECE = 65535  # a command's payload has at most what its kind allows; nothing else is longer


class WatchfulStream(BytesStream):
    """One that lets no parser ask for nothing, or for more than the format can hold."""

    def read(self, count: int) -> bytes:
        assert 0 < count <= LONGEST_PIECE
        return super().read(count)


def parse_or_refuse(data: bytes, parser: wire.Parser[Any]) -> None:
    with contextlib.suppress(MigrationError):
        take(WatchfulStream(data), parser)


@given(st.sampled_from(PARSERS), st.binary(max_size=300))
def test_garbage_means_something_or_is_the_one_error(make: Callable[[], wire.Parser[Any]], data: bytes) -> None:
    parse_or_refuse(data, make())


RIGHT: list[tuple[Callable[[], wire.Parser[Any]], bytes]] = [
    (
        reader.read_header,
        HEADER
        + configuration("pc", capabilities(["postcopy-ram"]), subsection("configuration/uuid", bytes(16)))
        + b"\x08",
    ),
    (reader.read_ram_section_start, section(1, 3, "ram", 0, 4)[1:]),
    (reader.read_ram_blocks, announced(block_bytes("a", 1 << 21, 1 << 21), block_bytes("b", 4096), total=0x201000)),
    (reader.read_command, command(6, b"\0" + name("pc.ram") + b"\0" + struct.pack(">QQ", 0, 4096) * 3)[1:]),
    (reader.read_command, command(10, name("pc.ram"))[1:]),
    (reader.read_command, command(3, struct.pack(">QQ", 0x201000, 4096))[1:]),
    (lambda: return_path.read_return_message(1 << 10), return_path.recv_bitmap("pc.ram", bytes(64))),
    (lambda: return_path.read_return_message(1 << 10), return_path.req_pages(0, 4096, "pc.ram")),
]


@pytest.mark.parametrize(("make", "data"), RIGHT)
def test_a_right_message_is_read_and_every_shorter_one_ends_too_early(
    make: Callable[[], wire.Parser[Any]], data: bytes
) -> None:
    parse(data, make())
    for length in range(len(data)):
        refused(data[:length], make(), "too early")


@given(
    st.sampled_from(RIGHT),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=4),
)
def test_a_mutated_message_means_something_or_is_the_one_error(
    right: tuple[Callable[[], wire.Parser[Any]], bytes], changes: list[tuple[int, int]]
) -> None:
    make, data = right
    mutated = bytearray(data)
    for where, value in changes:
        mutated[where % len(mutated)] = value
    parse_or_refuse(bytes(mutated), make())


@given(st.binary(max_size=60), st.integers(0, 40), st.integers(0, 255))
def test_a_mutated_package_means_something_or_is_the_one_error(state: bytes, where: int, value: int) -> None:
    data = bytearray(LISTEN + state + PING_3 + RUN)
    data[where % len(data)] = value
    with contextlib.suppress(MigrationError):
        reader.split_package(bytes(data))


# -- what this file leans on


def test_a_parsers_complaint_never_leaves_without_its_byte() -> None:
    with pytest.raises(MigrationError) as caught:
        take(BytesStream(b"", 7), reader.read_section_type())
    assert caught.value.offset == 7


def test_tampering_counts_the_times_that_a_place_was_written() -> None:
    source = Source(socket.socket, [SourceBlock("a", 4096)], tamper={"footer:1": instead_of(b"x"), "ping": after(b"y")})
    assert [source.tampered("footer", b"f") for _ in range(3)] == [b"f", b"x", b"f"]
    assert [source.tampered("ping", b"p") for _ in range(2)] == [b"py", b"py"]
    assert before(b"a")(b"b") == b"ab"


# -- a real QEMU, to the receiver above


@contextlib.contextmanager
def listening_at(path: Path, receiver: Receiver) -> Iterator[str]:
    """The receiver takes whoever connects there; yields the URI for QEMU."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    receiver.take(listener.accept()[0])

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        try:
            yield f"unix:{path}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(20)
        assert not thread.is_alive()


GUEST = Guest(ram_mib=32, with_display=True)


def assert_is_what_qemu_has(receiver: Receiver, content: bytes) -> None:
    assert_same_memory(bytes(receiver.blocks["pc.ram"].memory), content)
    assert {"pc.ram", "vga.vram", "pc.bios"} <= {idstr.rpartition("/")[2] for idstr in receiver.blocks}
    assert receiver.device_state is not None
    assert receiver.device_state.startswith(b"\x04")
    assert receiver.device_state[-5:-4] == b"\x7e"
    assert receiver.header is not None
    assert receiver.header.machine.startswith("pc-i440fx-")


@pytest.mark.slow
@pytest.mark.parametrize("with_return_path", [False, True])
def test_a_real_qemus_precopy_is_read(tmp_path: Path, with_return_path: bool) -> None:
    with (
        receiving() as receiver,
        listening_at(tmp_path / "m.sock", receiver) as uri,
        Qemu(GUEST, tmp_path) as source,
    ):
        source.set_capabilities(*(["return-path"] if with_return_path else []))
        source.set_parameters(max_bandwidth=UNLIMITED, downtime_limit=2000)
        source.migrate(uri)
        source.wait_for_migration(COMPLETED)
        content = source.memory()
    assert_is_what_qemu_has(receiver, content)
    assert receiver.description is not None
    assert json.loads(receiver.description)["page_size"] == TARGET_PAGE


@pytest.mark.slow
@pytest.mark.parametrize("preempt", [False, True])
def test_a_real_qemus_postcopy_is_read_over_three_breaks(tmp_path: Path, preempt: bool) -> None:
    with (
        receiving(ask=1.0) as receiver,
        listening_at(tmp_path / "m.sock", receiver) as uri,
        Qemu(GUEST, tmp_path) as source,
    ):
        source.set_capabilities(POSTCOPY, *([PREEMPT] if preempt else []))
        source.set_parameters(max_postcopy_bandwidth=4 * MIB)
        source.migrate(uri)
        source.start_postcopy()
        for _ in range(3):
            receiver.wait_for_pages(64)
            source.pause_migration()
            receiver.wait_for_earlier_connections()
            source.resume_migration(uri)
        source.set_parameters(max_postcopy_bandwidth=UNLIMITED)
        source.wait_for_migration(COMPLETED)
        content = source.memory()
    assert_is_what_qemu_has(receiver, content)
    assert receiver.kinds.count(ConnectionKind.RECOVERY) == 3
    assert (ConnectionKind.PREEMPT in receiver.kinds) == preempt
