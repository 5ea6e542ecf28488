"""nbd.server: every option and command answered as the protocol says, and a bad client that harms itself alone."""

from __future__ import annotations

import errno
import os
import random
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pcshare.nbd import answers, greeting, server, stream
from pcshare.nbd.server import Exports, FileRange, Piece, Server
from pcshare.nbd.stream import Stream
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
    OPTIONS_MAX,
    PAYLOAD_MAX_DEFAULT,
    REQUEST,
    REQUEST_MAGIC,
    SIMPLE_REPLY,
    Command,
    CommandFlag,
    ExtentFlag,
    Info,
    Option,
    OptionReply,
    TransmissionFlag,
)
from support import wait_until
from support_nbd_server import (
    EINVAL,
    EIO,
    EPERM,
    HOLE,
    BytesExport,
    RawClient,
    Served,
    context_query,
    info_query,
    served,
    text,
)

CONTENT = random.Random(1).randbytes(1 << 20)
SIZE = len(CONTENT)
FLAGS = TransmissionFlag.HAS_FLAGS | TransmissionFlag.READ_ONLY | TransmissionFlag.CAN_MULTI_CONN


@pytest.fixture
def export() -> BytesExport:
    return BytesExport("data", CONTENT, hole_bytes=65536, pieces=1000)


@pytest.fixture
def here(export: BytesExport) -> Iterator[Served]:
    with served(export) as made:
        yield made


@pytest.fixture
def client(here: Served) -> RawClient:
    """One that has done its handshake."""
    client = here.client()
    client.go()
    return client


@pytest.fixture
def greeted(here: Served) -> RawClient:
    """One that haggles."""
    client = here.client()
    client.greet()
    return client


# -- handshake


def test_hello_offers_fixed_newstyle(here: Served) -> None:
    assert HELLO.unpack(here.client().receive(HELLO.size)) == (NBD_MAGIC, OPTION_MAGIC, 3)


def test_list_names_every_export_with_its_description() -> None:
    with served(BytesExport("a", b"1"), BytesExport("b", b"2")) as here:
        client = here.client()
        client.greet()
        assert client.option(Option.LIST) == [
            (OptionReply.SERVER, text("a") + b"about a"),
            (OptionReply.SERVER, text("b") + b"about b"),
            (OptionReply.ACK, b""),
        ]


@pytest.mark.parametrize("option", [Option.INFO, Option.GO])
def test_info_and_go_tell_size_flags_and_what_is_asked_for(greeted: RawClient, option: Option) -> None:
    asked = info_query("data", Info.BLOCK_SIZE, Info.NAME, Info.DESCRIPTION, 77)
    assert greeted.option(option, asked) == [
        (OptionReply.INFO, INFO_EXPORT.pack(Info.EXPORT, SIZE, FLAGS)),
        (OptionReply.INFO, b"\0\1data"),
        (OptionReply.INFO, b"\0\2about data"),
        (OptionReply.INFO, INFO_BLOCK_SIZE.pack(Info.BLOCK_SIZE, 1, 4096, PAYLOAD_MAX_DEFAULT)),
        (OptionReply.ACK, b""),
    ]


def test_empty_name_is_the_only_export(greeted: RawClient) -> None:
    assert greeted.option(Option.GO, info_query(""))[-1] == (OptionReply.ACK, b"")


def test_empty_name_means_nothing_among_several() -> None:
    with served(BytesExport("a", b"1"), BytesExport("b", b"2")) as here:
        client = here.client()
        client.greet()
        kind, said = client.refused(Option.GO, info_query(""))
        assert kind is OptionReply.ERR_UNKNOWN
        assert "a, b" in said


def test_unknown_export_is_refused_with_the_names_and_the_haggling_goes_on(greeted: RawClient) -> None:
    kind, said = greeted.refused(Option.GO, info_query("date"))
    assert kind is OptionReply.ERR_UNKNOWN
    assert "'date'" in said
    assert "data" in said
    assert greeted.option(Option.GO, info_query("data"))[-1][0] == OptionReply.ACK


@pytest.mark.parametrize("option", [Option.STARTTLS, 4, 11, 99, 1 << 31])
def test_option_that_is_not_known_is_unsupported(greeted: RawClient, option: int) -> None:
    assert greeted.refused(option, b"whatever")[0] is OptionReply.ERR_UNSUP


def test_abort_is_acknowledged_and_hung_up_on(greeted: RawClient) -> None:
    assert greeted.option(Option.ABORT) == [(OptionReply.ACK, b"")]
    assert greeted.is_hung_up_on()


@pytest.mark.parametrize(
    ("option", "data"),
    [
        (Option.LIST, b"x"),
        (Option.STRUCTURED_REPLY, b"x"),
        (Option.GO, b""),
        (Option.GO, text("data")),
        (Option.GO, info_query("data") + b"x"),
        (Option.GO, b"\0\0\0\5data\0\0"),
        (Option.GO, text("data") + b"\0\2\0\1"),
        (Option.GO, b"\0\0\0\1\xff\0\0"),
        (Option.SET_META_CONTEXT, context_query("data", "x")[:-1]),
        (Option.SET_META_CONTEXT, text("data") + b"\xff\xff\xff\xff"),
    ],
)
def test_option_whose_data_is_wrong_is_invalid(greeted: RawClient, option: Option, data: bytes) -> None:
    if option is Option.SET_META_CONTEXT:
        greeted.use_structured()
    assert greeted.refused(option, data)[0] is OptionReply.ERR_INVALID
    assert greeted.option(Option.GO, info_query(""))[-1][0] == OptionReply.ACK


def test_name_that_is_too_long_is_too_big(greeted: RawClient) -> None:
    name = "x" * (NAME_LENGTH_MAX + 1)
    assert greeted.refused(Option.GO, info_query(name))[0] is OptionReply.ERR_TOO_BIG


def test_df_is_offered_with_structured_replies_alone(greeted: RawClient) -> None:
    greeted.use_structured()
    (told, *_) = greeted.option(Option.INFO, info_query(""))
    assert told == (OptionReply.INFO, INFO_EXPORT.pack(Info.EXPORT, SIZE, FLAGS | TransmissionFlag.SEND_DF))


@pytest.mark.parametrize("option", [Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT])
def test_contexts_need_structured_replies(greeted: RawClient, option: Option) -> None:
    assert greeted.refused(option, context_query("data", BASE_ALLOCATION))[0] is OptionReply.ERR_INVALID


@pytest.mark.parametrize(
    ("option", "queries", "is_told"),
    [
        (Option.LIST_META_CONTEXT, (), True),
        (Option.LIST_META_CONTEXT, ("base:",), True),
        (Option.LIST_META_CONTEXT, ("qemu:",), False),
        (Option.SET_META_CONTEXT, (BASE_ALLOCATION,), True),
        (Option.SET_META_CONTEXT, ("qemu:dirty", BASE_ALLOCATION), True),
        (Option.SET_META_CONTEXT, ("base:",), False),
        (Option.SET_META_CONTEXT, (), False),
    ],
)
def test_base_allocation_is_the_only_context(
    greeted: RawClient, option: Option, queries: tuple[str, ...], is_told: bool
) -> None:
    greeted.use_structured()
    *told, last = greeted.option(option, context_query("data", *queries))
    assert last == (OptionReply.ACK, b"")
    number = greeting.CONTEXT if option is Option.SET_META_CONTEXT else 0
    about = CONTEXT_ID.pack(number) + BASE_ALLOCATION.encode()
    assert told == ([(OptionReply.META_CONTEXT, about)] if is_told else [])


def test_context_of_another_name_is_not_in_effect(greeted: RawClient) -> None:
    greeted.use_structured()
    greeted.option(Option.SET_META_CONTEXT, context_query("data", BASE_ALLOCATION))
    greeted.option(Option.GO, info_query(""))
    assert greeted.request(Command.BLOCK_STATUS, 0, 4096).error == EINVAL


def test_later_choice_of_contexts_replaces_the_earlier(greeted: RawClient) -> None:
    greeted.use_structured()
    greeted.option(Option.SET_META_CONTEXT, context_query("data", BASE_ALLOCATION))
    greeted.option(Option.SET_META_CONTEXT, context_query("data", "qemu:dirty"))
    greeted.option(Option.GO, info_query("data"))
    assert greeted.request(Command.BLOCK_STATUS, 0, 4096).error == EINVAL


@pytest.mark.parametrize(("flags", "zeroes"), [(1, EXPORT_NAME_ZEROES), (3, 0), (0, EXPORT_NAME_ZEROES)])
def test_export_name_of_old_leads_to_the_transmission(here: Served, flags: int, zeroes: int) -> None:
    client = here.client()
    client.greet(flags)
    client.send(OPTION.pack(OPTION_MAGIC, Option.EXPORT_NAME, 4) + b"data")
    assert EXPORT_NAME_REPLY.unpack(client.receive(EXPORT_NAME_REPLY.size)) == (SIZE, FLAGS)
    assert client.receive(zeroes) == bytes(zeroes)
    assert client.read(5, 100) == CONTENT[5:105]


@pytest.mark.parametrize("name", [b"date", b"\xff\xfe"])
def test_export_name_that_is_unknown_is_hung_up_on(greeted: RawClient, name: bytes) -> None:
    greeted.send(OPTION.pack(OPTION_MAGIC, Option.EXPORT_NAME, len(name)) + name)
    assert greeted.is_hung_up_on()


@pytest.mark.parametrize(
    "sent",
    [
        CLIENT_FLAGS.pack(4),
        CLIENT_FLAGS.pack(3) + OPTION.pack(OPTION_MAGIC + 1, Option.LIST, 0),
        CLIENT_FLAGS.pack(3) + OPTION.pack(OPTION_MAGIC, Option.LIST, OPTION_LENGTH_MAX + 1),
        CLIENT_FLAGS.pack(3) + OPTION.pack(OPTION_MAGIC, 77, 0) * OPTIONS_MAX,
        b"GET / HTTP/1.1\r\n\r\n",
    ],
    ids=["flags", "magic", "length", "options without end", "another protocol"],
)
def test_what_breaks_the_handshake_is_hung_up_on(here: Served, sent: bytes) -> None:
    client = here.client()
    client.send(sent)
    assert client.is_hung_up_on()


def test_handshake_has_a_time_limit_also_for_one_that_trickles(here: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(greeting, "GREETING_TIMEOUT_S", 2.0)
    silent, trickling = here.client(), here.client()
    option = OPTION.pack(OPTION_MAGIC, Option.LIST, OPTION_LENGTH_MAX)
    trickling.send(CLIENT_FLAGS.pack(3) + option)
    wait_until(lambda: not _takes_one_more(trickling), "an end of the one that sends a byte now and then")
    assert silent.is_hung_up_on()


def _takes_one_more(client: RawClient) -> bool:
    try:
        client.send(b"\0")
    except ConnectionError:
        return False
    return True


# -- requests


def test_structured_read_comes_in_pieces(client: RawClient) -> None:
    reply = client.request(Command.READ, 500, 4500)
    assert (reply.data, reply.chunks) == (CONTENT[500:5000], 5)


def test_read_with_df_comes_in_one_chunk(client: RawClient) -> None:
    reply = client.request(Command.READ, 500, 4500, flags=CommandFlag.DF)
    assert (reply.data, reply.chunks) == (CONTENT[500:5000], 1)


def test_simple_replies_where_nothing_else_was_agreed(here: Served) -> None:
    client = here.client()
    client.go(structured=False)
    assert client.read(0, SIZE) == CONTENT
    client.ask(Command.READ, SIZE, 1)
    assert client.next_answer()[1].error == EINVAL
    assert client.read(SIZE - 1, 1) == CONTENT[-1:]


@pytest.mark.parametrize(
    ("command", "offset", "length", "flags", "error"),
    [
        (Command.READ, SIZE - 10, 11, 0, EINVAL),
        (Command.READ, SIZE, 1, 0, EINVAL),
        (Command.READ, 1 << 63, 1, 0, EINVAL),
        (Command.READ, (1 << 64) - 1, 2, 0, EINVAL),
        (Command.READ, 0, 0, 0, EINVAL),
        (Command.READ, 0, 1, CommandFlag.REQ_ONE, EINVAL),
        (Command.READ, 0, 1, CommandFlag.FUA, EINVAL),
        (Command.READ, 0, 1, 1 << 15, EINVAL),
        (Command.BLOCK_STATUS, SIZE, 1, 0, EINVAL),
        (Command.BLOCK_STATUS, 0, 0, 0, EINVAL),
        (Command.BLOCK_STATUS, 0, 1, CommandFlag.DF, EINVAL),
        (Command.TRIM, 0, 4096, 0, EPERM),
        (Command.WRITE_ZEROES, 0, 4096, 0, EPERM),
        (Command.FLUSH, 0, 0, 0, EINVAL),
        (Command.CACHE, 0, 4096, 0, EINVAL),
        (99, 0, 4096, 0, EINVAL),
    ],
)
@pytest.mark.parametrize("structured", [True, False], ids=["structured", "simple"])
def test_request_that_is_wrong_gets_its_error_and_the_next_is_answered(
    here: Served, command: int, offset: int, length: int, flags: int, error: int, structured: bool
) -> None:
    client = here.client()
    client.go(structured=structured)
    cookie = client.ask(command, offset, length, flags=flags)
    found, reply = client.next_answer()
    assert (found, reply.error, reply.data) == (cookie, error, b"")
    assert client.read(7, 9) == CONTENT[7:16]


def test_write_is_refused_and_its_bytes_are_not_taken_for_requests(client: RawClient) -> None:
    looks_like_one = REQUEST.pack(REQUEST_MAGIC, 0, Command.READ, 999, 0, 16)
    payload = looks_like_one * 9000
    assert client.request(Command.WRITE, 0, len(payload), payload=payload).error == EPERM
    assert client.read(0, 4) == CONTENT[:4]


def test_read_longer_than_the_largest_is_refused() -> None:
    export = BytesExport("data", CONTENT)
    export.block_max = 4096
    with served(export) as here:
        client = here.client()
        client.go()
        assert client.request(Command.READ, 0, 4097).error == EINVAL
        assert client.read(0, 4096) == CONTENT[:4096]
        assert client.request(Command.BLOCK_STATUS, 0, SIZE).extents == ((SIZE, 0),)


def test_block_size_of_an_export_is_insisted_on_except_at_its_end() -> None:
    export = BytesExport("data", CONTENT[:1000])
    export.block_min = 512
    with served(export) as here:
        client = here.client()
        client.go()
        assert client.request(Command.READ, 1, 511).error == EINVAL
        assert client.request(Command.READ, 0, 511).error == EINVAL
        assert client.read(512, 488) == CONTENT[512:1000]


def test_block_status_tells_holes_and_with_req_one_the_first_alone(client: RawClient) -> None:
    assert client.request(Command.BLOCK_STATUS, 4096, 100000).extents == ((61440, HOLE), (38560, 0))
    first = client.request(Command.BLOCK_STATUS, 4096, 100000, flags=CommandFlag.REQ_ONE)
    assert first.extents == ((61440, HOLE),)


def test_block_status_that_was_not_agreed_is_refused(here: Served) -> None:
    client = here.client()
    client.go(block_status=False)
    assert client.request(Command.BLOCK_STATUS, 0, 4096).error == EINVAL


def test_many_extents_are_told_in_part() -> None:
    class Fragments(BytesExport):
        def extents(self, offset: int, length: int) -> list[tuple[int, ExtentFlag]]:
            return [(8, HOLE if i % 2 else ExtentFlag.ZERO) for i in range(length // 8)]

    with served(Fragments("data", CONTENT)) as here:
        client = here.client()
        client.go()
        told = client.request(Command.BLOCK_STATUS, 0, SIZE).extents
        assert len(told) == answers.EXTENTS_MAX < SIZE // 8


@pytest.mark.parametrize("magic", [0, REQUEST_MAGIC + 1])
def test_wrong_magic_of_a_request_is_hung_up_on(client: RawClient, magic: int) -> None:
    client.send(REQUEST.pack(magic, 0, Command.READ, 1, 0, 1))
    assert client.is_hung_up_on()


def test_write_of_more_than_anybody_may_send_is_hung_up_on(client: RawClient) -> None:
    client.ask(Command.WRITE, 0, PAYLOAD_MAX_DEFAULT + 1)
    assert client.is_hung_up_on()


def test_disc_is_hung_up_on_after_what_was_asked_for(here: Served, export: BytesExport) -> None:
    export.gates[100] = threading.Event()
    client = here.client()
    client.go()
    client.ask(Command.READ, 100, 50)
    client.ask(Command.DISC, 0, 0)
    wait_until(lambda: export.waiting > 0, "the read to wait")
    export.gates[100].set()
    assert client.next_answer()[1].data == CONTENT[100:150]
    assert client.is_hung_up_on()


# -- what an export answers


@pytest.mark.parametrize(
    ("failure", "error"), [(errno.EIO, EIO), (errno.ENOENT, EIO), (errno.ENOMEM, errno.ENOMEM), (errno.ESTALE, EIO)]
)
def test_error_of_an_export_is_the_answer_to_that_read_alone(
    here: Served, export: BytesExport, failure: int, error: int
) -> None:
    export.failures[2000] = failure
    for structured in (True, False):
        client = here.client()
        client.go(structured=structured)
        client.ask(Command.READ, 2000, 10)
        reply = client.next_answer()[1]
        assert reply.error == error
        assert not structured or "no byte at 2000" in reply.text
        assert client.read(2001, 100) == CONTENT[2001:2101]


def test_error_in_the_middle_follows_what_was_there(client: RawClient, export: BytesExport) -> None:
    export.failures[3000] = errno.EIO
    reply = client.request(Command.READ, 0, 5000)
    assert (reply.data, reply.error) == (CONTENT[:3000], EIO)
    whole = client.request(Command.READ, 0, 5000, flags=CommandFlag.DF)
    assert (whole.data, whole.error) == (b"", EIO)


@pytest.mark.parametrize("given_bytes", [0, 99, 101], ids=["none", "too few", "too many"])
@pytest.mark.parametrize("structured", [True, False], ids=["structured", "simple"])
def test_export_that_gives_another_length_is_an_error(given_bytes: int, structured: bool) -> None:
    class Wrong(BytesExport):
        def read(self, offset: int, length: int) -> Iterator[Piece]:
            yield CONTENT[:given_bytes] if length == 100 else CONTENT[offset : offset + length]

    with served(Wrong("data", CONTENT)) as here:
        client = here.client()
        client.go(structured=structured)
        client.ask(Command.READ, 0, 100)
        assert client.next_answer()[1].error == EIO
        assert client.read(0, 10) == CONTENT[:10]


def test_export_that_raises_what_nobody_expects_costs_one_read(here: Served, export: BytesExport) -> None:
    class Broken(BytesExport):
        def read(self, offset: int, length: int) -> Iterator[Piece]:
            raise ZeroDivisionError("broken")

    with served(Broken("data", CONTENT)) as broken:
        client = broken.client()
        client.go()
        reply = client.request(Command.READ, 0, 1)
        assert (reply.error, "ZeroDivisionError" in reply.text) == (EIO, True)
        assert client.request(Command.BLOCK_STATUS, 0, 10).extents == ((10, 0),)


class FileRanges(BytesExport):
    """Alternates bytes and ranges of a file, short and long."""

    def __init__(self, fd: int, size: int) -> None:
        super().__init__("data", bytes(size))
        self._fd = fd

    def read(self, offset: int, length: int) -> Iterator[Piece]:
        at, step = offset, 1000
        while at < offset + length:
            part = min(step, offset + length - at)
            yield os.pread(self._fd, part, at) if step % 2 else FileRange(self._fd, at, part)
            at, step = at + part, step * 3 + 1


@pytest.mark.parametrize("structured", [True, False], ids=["structured", "simple"])
@pytest.mark.parametrize("tcp", [True, False], ids=["tcp", "unix"])
def test_ranges_of_files_and_bytes_arrive_in_order(structured: bool, tcp: bool) -> None:
    fd = os.memfd_create("data")
    try:
        os.write(fd, CONTENT)
        with served(FileRanges(fd, SIZE)) as here:
            client = here.tcp_client() if tcp else here.client()
            client.go(structured=structured)
            assert client.read(3, SIZE - 3) == CONTENT[3:]
            assert client.read(3, 5) == CONTENT[3:8]
    finally:
        os.close(fd)


def test_range_of_a_file_that_became_shorter_is_no_wrong_byte() -> None:
    """A short one is an error; one whose length was announced ends the connection."""
    fd = os.memfd_create("data")
    try:
        os.ftruncate(fd, 100)
        with served(FileRanges(fd, SIZE)) as here:
            client = here.client()
            client.go()
            assert client.request(Command.READ, 200, 10).error == EIO
            client.ask(Command.READ, 0, SIZE, flags=CommandFlag.DF)
            with pytest.raises((EOFError, ConnectionError, AssertionError)):
                assert client.next_answer()[1].error == 0
    finally:
        os.close(fd)


# -- many at once


def test_read_that_waits_holds_up_no_other(client: RawClient, export: BytesExport) -> None:
    export.gates[0] = threading.Event()
    export.gates[1] = threading.Event()
    slow, slower = client.ask(Command.READ, 1, 5), client.ask(Command.READ, 0, 5)
    assert client.read(2, 5) == CONTENT[2:7]
    export.gates[0].set()
    assert client.answer(slower).data == CONTENT[:5]
    export.gates[1].set()
    assert client.answer(slow).data == CONTENT[1:6]


def test_client_that_asks_for_too_much_is_read_from_when_something_is_answered(
    client: RawClient, export: BytesExport
) -> None:
    count = answers.REQUESTS_MAX + 20
    for offset in range(count):
        export.gates[offset] = threading.Event()
    asked = {client.ask(Command.READ, offset, 4): offset for offset in range(count)}
    wait_until(lambda: export.waiting >= answers.WORKERS_MAX - 1, "its threads to wait")
    late = client.ask(Command.READ, 5000, 4)
    client.connection.settimeout(0.3)
    with pytest.raises(TimeoutError):
        client.receive(1)
    client.connection.settimeout(20)
    for gate in export.gates.values():
        gate.set()
    found = dict(client.next_answer() for _ in range(count + 1))
    assert found[late].data == CONTENT[5000:5004]
    assert all(found[cookie].data == CONTENT[offset : offset + 4] for cookie, offset in asked.items())


@pytest.mark.parametrize("count", [1, answers.REQUESTS_MAX + 20], ids=["one", "more than are taken"])
def test_client_that_hangs_up_on_reads_that_wait_leaves_nothing(
    here: Served, client: RawClient, export: BytesExport, count: int
) -> None:
    for offset in range(count):
        export.gates[offset] = threading.Event()
        client.ask(Command.READ, offset, 4)
    wait_until(lambda: export.waiting > 0, "a read to wait")
    client.close()
    wait_until(lambda: here.server.connection_count() == 0, "an end of its threads")


def test_client_that_does_not_read_is_hung_up_on_and_others_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "SEND_TIMEOUT_S", 3)
    with served(BytesExport("data", CONTENT, quick=False)) as here:
        deaf, other = here.client(), here.client()
        deaf.go()
        other.go()
        for _ in range(10):
            deaf.ask(Command.READ, 0, SIZE)
        assert other.read(0, SIZE) == CONTENT
        wait_until(lambda: here.server.connection_count() == 1, "an end of the one that does not read")
        assert other.read(0, SIZE) == CONTENT


def test_connections_have_a_limit(here: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "CONNECTIONS_MAX", 2)
    first, second = here.tcp_client(), here.tcp_client()
    first.go()
    second.go()
    assert here.tcp_client().is_hung_up_on()
    first.close()
    wait_until(lambda: here.server.connection_count() == 1, "an end of the first")
    third = here.tcp_client()
    third.go()
    assert third.read(0, 10) == CONTENT[:10]


def test_clients_read_at_once_what_they_ask_for(here: Served) -> None:
    wrong: list[int] = []

    def work(number: int, client: RawClient) -> None:
        rng = random.Random(number)
        for _ in range(200):
            offset = rng.randrange(SIZE)
            length = rng.randint(1, min(20000, SIZE - offset))
            if client.read(offset, length) != CONTENT[offset : offset + length]:
                wrong.append(number)

    clients = [here.tcp_client() if i % 2 else here.client() for i in range(6)]
    for client in clients:
        client.go(structured=bool(clients.index(client) % 3))
    threads = [threading.Thread(target=work, args=each) for each in enumerate(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_stop_ends_whatever_its_clients_do(here: Served, export: BytesExport) -> None:
    export.gates[0] = threading.Event()
    haggling, idle, waiting = here.client(), here.client(), here.client()
    haggling.greet()
    idle.go()
    waiting.go()
    waiting.ask(Command.READ, 0, 10)
    wait_until(lambda: export.waiting > 0, "a read to wait")
    here.stop()
    assert haggling.is_hung_up_on()
    assert idle.is_hung_up_on()
    assert here.server.connection_count() == 0


def test_two_pipes_are_a_connection_and_a_server_without_listeners_ends_with_it() -> None:
    their_in, our_out = os.pipe()
    our_in, their_out = os.pipe()
    with Server(Exports([BytesExport("data", CONTENT)])) as made:
        made.adopt(Stream.of_pipes(their_in, their_out))
        thread = threading.Thread(target=made.run)
        thread.start()
        with open(our_in, "rb", buffering=0) as reading, open(our_out, "wb", buffering=0) as writing:
            reading.read(HELLO.size)
            name = OPTION.pack(OPTION_MAGIC, Option.EXPORT_NAME, 0)
            request = REQUEST.pack(REQUEST_MAGIC, 0, Command.READ, 5, 3, 60000)
            writing.write(CLIENT_FLAGS.pack(3) + name + request)
            reading.read(EXPORT_NAME_REPLY.size)
            got = b""
            while len(got) < 16 + 60000:
                got += reading.read(16 + 60000 - len(got))
            assert got[16:] == CONTENT[3:60003]
        thread.join(20)
        assert not thread.is_alive()


def test_stop_ends_a_connection_over_pipes_at_once() -> None:
    their_in, our_out = os.pipe()
    our_in, their_out = os.pipe()
    with Server(Exports([BytesExport("data", CONTENT)])) as made:
        made.adopt(Stream.of_pipes(their_in, their_out))
        thread = threading.Thread(target=made.run)
        thread.start()
        os.read(our_in, HELLO.size)
        started_s = time.monotonic()
        made.stop()
        thread.join(20)
        assert not thread.is_alive()
        assert time.monotonic() - started_s < server.STOP_TIMEOUT_S
    os.close(our_in)
    os.close(our_out)


# -- garbage


SLOW_IS_FINE = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def send_and_hang_up(connection: socket.socket, data: bytes) -> None:
    """Sends, reads what comes until the server hangs up or has nothing to say."""
    with connection:
        connection.settimeout(0.05)
        try:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(1 << 16):
                pass
        except (TimeoutError, ConnectionError):
            pass


def still_serves(here: Served) -> bool:
    client = here.client()
    client.go()
    served_right = client.read(100, 100) == CONTENT[100:200]
    client.close()
    return served_right


@SLOW_IS_FINE
@given(
    st.lists(
        st.one_of(
            st.binary(max_size=200),
            st.builds(
                lambda option, data: OPTION.pack(OPTION_MAGIC, option, len(data)) + data,
                st.integers(0, 12),
                st.one_of(st.binary(max_size=100), st.just(info_query("data")), st.just(context_query("", "base:"))),
            ),
        ),
        max_size=12,
    )
)
def test_garbage_in_the_handshake_harms_nobody(here: Served, parts: list[bytes]) -> None:
    ours, theirs = socket.socketpair()
    here.server.adopt(Stream.of_socket(theirs))
    send_and_hang_up(ours, CLIENT_FLAGS.pack(3) + b"".join(parts))
    assert still_serves(here)


@SLOW_IS_FINE
@given(
    st.lists(
        st.one_of(
            st.binary(max_size=100),
            st.builds(
                REQUEST.pack,
                st.sampled_from([REQUEST_MAGIC, REQUEST_MAGIC, REQUEST_MAGIC, 7]),
                st.integers(0, 0xFFFF),
                st.integers(0, 9),
                st.integers(0, (1 << 64) - 1),
                st.integers(0, (1 << 64) - 1),
                st.integers(0, (1 << 32) - 1),
            ),
        ),
        max_size=20,
    )
)
def test_garbage_after_the_handshake_harms_nobody(here: Served, parts: list[bytes]) -> None:
    ours, theirs = socket.socketpair()
    here.server.adopt(Stream.of_socket(theirs))
    client = RawClient(ours)
    client.go()
    send_and_hang_up(ours, b"".join(parts))
    assert still_serves(here)


@SLOW_IS_FINE
@given(
    structured=st.booleans(),
    requests=st.lists(
        st.tuples(st.integers(0, SIZE + 10), st.integers(0, 5000), st.sampled_from([0, 0, CommandFlag.DF])),
        min_size=1,
        max_size=20,
    ),
)
def test_any_reads_in_flight_bring_their_bytes_or_einval(
    here: Served, structured: bool, requests: list[tuple[int, int, int]]
) -> None:
    client = here.client()
    client.go(structured=structured)
    asked = {client.ask(Command.READ, at, length, flags=flags): (at, length, flags) for at, length, flags in requests}
    for _ in asked:
        if structured:
            cookie, reply = client.next_answer()
        else:
            cookie, error = _simple_head(client)
            reply_length = 0 if error else asked[cookie][1]
            assert (error, client.receive(reply_length)) == _expected(*asked[cookie], structured)
            continue
        assert (reply.error, reply.data) == _expected(*asked[cookie], structured)
    client.close()


def _simple_head(client: RawClient) -> tuple[int, int]:
    _, error, cookie = SIMPLE_REPLY.unpack(client.receive(SIMPLE_REPLY.size))
    return cookie, error


def _expected(offset: int, length: int, flags: int, structured: bool) -> tuple[int, bytes]:
    if not length or offset + length > SIZE or (flags and not structured):
        return EINVAL, b""
    return 0, CONTENT[offset : offset + length]
