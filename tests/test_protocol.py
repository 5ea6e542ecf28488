"""The control protocol's table: what is packed comes back, and garbage gives the one protocol error."""

from __future__ import annotations

import errno
import random
import struct
from collections.abc import Callable
from typing import Any

import pytest

from pcshare import protocol, transport
from pcshare.core import ffi, lib
from pcshare.errors import LocalProtocolError, ProtocolError, RemoteProtocolError, VersionMismatch
from pcshare.protocol import AdminOp, Map, Mode

WELCOME = protocol.Welcome(
    lib.WIRE_WELCOME_ARRAY, Mode.COW, 3, 10**12 + 1, 4096, 10**12 + 4096, 1 << 40, 30000, "weights", "<f8", (7, 9), 128
)
EXAMPLES: list[tuple[bytes, int, Any]] = [
    (protocol.pack_hello("data", Mode.RW), 0, protocol.Hello(1, 1, Mode.RW, "data")),
    (protocol.pack_hello(), 0, protocol.Hello(1, 1, Mode.DEFAULT, "")),
    (protocol.pack_welcome(WELCOME), 2, WELCOME),
    (protocol.pack_welcome(WELCOME), 3, WELCOME),
    (
        protocol.pack_attach([Map(1 << 40, 0, 8192), Map(1 << 41, 8192, 4096)]),
        1,
        protocol.Attach((Map(1 << 40, 0, 8192), Map(1 << 41, 8192, 4096))),
    ),
    (protocol.pack_ack(5, 1), 0, protocol.Ack(5, 1)),
    (protocol.pack_request(1, 2, lib.WIRE_REQUEST_WAIT), 0, protocol.Request(1, 1, 2)),
    (protocol.pack_end(), 0, protocol.End()),
    (protocol.pack_leave(), 0, protocol.Leave()),
    (protocol.pack_bye(), 0, protocol.Bye()),
    (protocol.pack_error(errno.EACCES, "nö"), 0, protocol.ErrorMessage(errno.EACCES, "nö", 1)),
    (protocol.pack_admin(AdminOp.STREAM_RATE, 10**9), 0, protocol.Admin(AdminOp.STREAM_RATE, 10**9)),
]
HEADER = struct.Struct("<IHHII")
MUTATIONS = 20000


def names(example: tuple[bytes, int, Any]) -> str:
    return f"{type(example[2]).__name__}-{example[1]}"


@pytest.mark.parametrize("example", EXAMPLES, ids=names)
def test_what_is_packed_is_parsed_as_it_was(example: tuple[bytes, int, Any]) -> None:
    data, n_fds, message = example
    assert protocol.parse(data, n_fds) == message


@pytest.mark.parametrize("example", EXAMPLES, ids=names)
def test_messages_are_little_endian_and_tell_their_length(example: tuple[bytes, int, Any]) -> None:
    """The protocol is usable from any language: the header's five fields, in this order."""
    data = example[0]
    magic, version, kind, length, _ = HEADER.unpack_from(data)
    assert (magic, version, length) == (lib.WIRE_MAGIC, protocol.VERSION, len(data))
    assert data[:4] == b"PCSH"
    assert kind in protocol.MESSAGES


def test_table_has_every_type_of_the_header_once() -> None:
    others = ("WIRE_MAGIC", "WIRE_VERSION", "WIRE_FDS_MAX", "WIRE_MAPS_MAX", "WIRE_IDSTR_MAX", "WIRE_TEXT_MAX")
    plain = {
        name.removeprefix("WIRE_"): getattr(lib, name)
        for name in dir(lib)
        if name.startswith("WIRE_") and name.count("_") == 1 and name not in others
    }
    assert {row.name: kind for kind, row in protocol.MESSAGES.items()} == plain
    assert all(row.fds[0] <= row.fds[1] <= protocol.FDS_MAX for row in protocol.MESSAGES.values())


def test_transport_has_room_for_every_message() -> None:
    assert protocol.LENGTH_MAX < transport.MESSAGE_BYTES_MAX
    assert transport.FDS_MAX == protocol.FDS_MAX


def test_names_of_modes_and_orders_are_those_of_the_header() -> None:
    for kind, prefix in ((Mode, "WIRE_MODE_"), (AdminOp, "WIRE_ADMIN_")):
        found = {name.removeprefix(prefix): getattr(lib, name) for name in dir(lib) if name.startswith(prefix)}
        assert {member.name: member.value for member in kind} == found


def test_block_is_named_once_and_never_in_a_request() -> None:
    """D2: an attachment is of one block, so that a request needs no name, also not of the last one."""
    assert "idstr" in dict(ffi.typeof("struct wire_hello").fields)
    assert set(dict(ffi.typeof("struct wire_request").fields)) == {"header", "flags", "reserved", "offset", "length"}


# ---- garbage ----


@pytest.mark.parametrize("example", EXAMPLES, ids=names)
@pytest.mark.parametrize("change", [-1, 1])
def test_wrong_number_of_fds_is_the_peers_fault(example: tuple[bytes, int, Any], change: int) -> None:
    data, n_fds, message = example
    least, most = protocol.MESSAGES[HEADER.unpack_from(data)[2]].fds
    if least <= n_fds + change <= most:
        assert protocol.parse(data, n_fds + change) == message
        return
    with pytest.raises(RemoteProtocolError, match=f"with {n_fds + change} fds: it takes") as caught:
        protocol.parse(data, n_fds + change)
    assert caught.value.errno == errno.EPROTO


@pytest.mark.parametrize("example", EXAMPLES, ids=names)
def test_message_of_another_length_is_the_peers_fault(example: tuple[bytes, int, Any]) -> None:
    data, n_fds, _ = example
    for cut in (b"", data[:3], data[:15], data[:-1], data + b"\0"):
        with pytest.raises(RemoteProtocolError):
            protocol.parse(cut, n_fds)


def with_header(data: bytes, **fields: int) -> bytes:
    header = dict(zip(("magic", "version", "type", "length", "cookie"), HEADER.unpack_from(data), strict=True))
    return HEADER.pack(*{**header, **fields}.values()) + data[HEADER.size :]


def test_wrong_magic_unknown_type_and_lying_length_are_refused_and_named() -> None:
    hello = protocol.pack_hello()
    for data, text in (
        (with_header(hello, magic=0), "magic"),
        (with_header(hello, type=99), "unknown message type 99"),
        (with_header(hello, length=7), "that says 7"),
        (with_header(hello, type=lib.WIRE_ACK), "ACK of"),
    ):
        with pytest.raises(RemoteProtocolError, match=text) as caught:
            protocol.parse(data, 0)
        assert caught.value.errno == errno.EPROTO


def test_other_version_is_told_with_both_numbers_and_the_cure() -> None:
    with pytest.raises(VersionMismatch, match="speaks version 9, this side version 1") as caught:
        protocol.parse(with_header(protocol.pack_hello(), version=9), 0)
    assert caught.value.errno == errno.EPROTONOSUPPORT
    assert caught.value.hint == "install the same pcshare on both sides"


def filled(ctype: str, kind: int, **fields: Any) -> bytes:
    header = {"magic": lib.WIRE_MAGIC, "version": protocol.VERSION, "type": kind, "length": ffi.sizeof(ctype)}
    return bytes(ffi.buffer(ffi.new(f"{ctype} *", {"header": header, **fields})))


@pytest.mark.parametrize(
    ("data", "n_fds", "text"),
    [
        (filled("struct wire_hello", lib.WIRE_HELLO, mode=9), 0, "9 is no Mode"),
        (filled("struct wire_hello", lib.WIRE_HELLO, idstr=b"x" * 64), 0, "name does not end"),
        (filled("struct wire_hello", lib.WIRE_HELLO, idstr=b"\xff\xfe"), 0, "no UTF-8"),
        (filled("struct wire_welcome", lib.WIRE_WELCOME, ndim=33), 2, "33 dimensions"),
        (filled("struct wire_welcome", lib.WIRE_WELCOME, dtype=b"f" * 1024), 2, "dtype does not end"),
        (filled("struct wire_attach", lib.WIRE_ATTACH, n_maps=0), 1, "0 maps"),
        (filled("struct wire_attach", lib.WIRE_ATTACH, n_maps=17), 1, "17 maps"),
        (filled("struct wire_error", lib.WIRE_ERROR, text=b"e" * 256), 0, "text does not end"),
        (filled("struct wire_admin", lib.WIRE_ADMIN, op=0), 0, "0 is no AdminOp"),
    ],
)
def test_content_that_cannot_be_is_refused_and_named(data: bytes, n_fds: int, text: str) -> None:
    with pytest.raises(RemoteProtocolError, match=text) as caught:
        protocol.parse(data, n_fds)
    assert caught.value.errno == errno.EPROTO


def mutated(data: bytes, rng: random.Random) -> bytes:
    """A message that something has happened to, from one bit to all of it."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 50))):
        what = rng.randrange(5)
        if what == 0:
            changed = changed[: rng.randrange(len(changed) + 1)]
        elif what == 1:
            changed += rng.randbytes(rng.randrange(20))
        elif changed:
            changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def test_garbage_gives_a_message_or_the_one_protocol_error(rng: random.Random) -> None:
    """Never anything else, whatever the bytes."""
    kinds: set[type] = set()
    for _ in range(MUTATIONS):
        data, n_fds, _ = rng.choice(EXAMPLES)
        try:
            kinds.add(type(protocol.parse(mutated(data, rng), rng.choice((n_fds, rng.randrange(5))))))
        except (RemoteProtocolError, VersionMismatch):
            kinds.add(ProtocolError)
    assert kinds >= {protocol.Hello, protocol.Welcome, protocol.Attach, ProtocolError}


def test_noise_gives_the_one_protocol_error(rng: random.Random) -> None:
    for _ in range(2000):
        with pytest.raises((RemoteProtocolError, VersionMismatch)):
            protocol.parse(rng.randbytes(rng.randrange(2500)), rng.randrange(5))


# ---- our own mistakes ----


def test_what_does_not_fit_is_our_own_fault() -> None:
    many = [Map(4096 * i, 0, 4096) for i in range(17)]
    wrongs: list[Callable[[], bytes]] = [
        lambda: protocol.pack_hello("x" * 64),
        lambda: protocol.pack_attach([]),
        lambda: protocol.pack_attach(many),
        lambda: protocol.pack_welcome(protocol.Welcome(0, Mode.RO, 0, 1, 1, 1, 0, 0, "x", "", (1,) * 33)),
        lambda: protocol.pack_welcome(protocol.Welcome(0, Mode.RO, 0, 1, 1, 1, 0, 0, "x", "f" * 1024)),
    ]
    for wrong in wrongs:
        with pytest.raises(LocalProtocolError):
            wrong()


def test_longest_names_fit() -> None:
    assert protocol.parse(protocol.pack_hello("x" * 63), 0) == protocol.Hello(1, 1, Mode.DEFAULT, "x" * 63)


def test_text_for_people_is_cut_at_a_whole_character() -> None:
    message = protocol.parse(protocol.pack_error(1, "ü" * 200), 0)
    assert isinstance(message, protocol.ErrorMessage)
    assert message.text == "ü" * 127
