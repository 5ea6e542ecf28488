"""The handshake with NBD servers and the synchronous session: against real servers, and against what misbehaves."""

from __future__ import annotations

import errno
import os
import random
import select
import shutil
import socket
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

from pcshare.errors import LocalProtocolError, SourceError
from pcshare.extents import HOLE_BYTES_MIN
from pcshare.nbd import client, line, session
from pcshare.nbd.client import ServerExport, Session, list_exports, negotiate
from pcshare.nbd.wire import (
    BASE_ALLOCATION,
    CHUNK,
    CHUNK_DONE,
    CONTEXT_ID,
    HELLO,
    INFO_BLOCK_SIZE,
    INFO_EXPORT,
    NBD_MAGIC,
    OLDSTYLE_MAGIC,
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
    Info,
    Option,
    OptionReply,
)
from support_nbd import (
    CONTEXT,
    Handshake,
    Instead,
    Peer,
    RealServer,
    Request,
    Script,
    ScriptedServer,
    Step,
    hang_up,
    nbdkit,
    never_answer,
    qemu_img,
    qemu_nbd,
    serve_reads,
)

KIB, MIB = 1 << 10, 1 << 20
PATIENCE_S = 20.0  # for what should come at once
SHORT_S = 0.6  # for what never comes
SLACK_S = 5.0  # how late a machine with other work may be
SMALL = 64 * KIB  # the scripted export
DATA = random.Random(3).randbytes(SMALL)


def soon() -> float:
    return time.monotonic() + PATIENCE_S


def shortly() -> float:
    return time.monotonic() + SHORT_S


@pytest.fixture
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="nbd-", dir="/tmp"))  # a socket's path is short
    yield made
    shutil.rmtree(made)


def opened(server: RealServer, name: str = "") -> Session:
    return negotiate(server.connect(), name, soon())


def refused(connection: socket.socket, name: str = "", deadline: float | None = None) -> SourceError:
    """What negotiate() raises; it has closed the connection."""
    with pytest.raises(SourceError) as caught:
        negotiate(connection, name, deadline or soon())
    assert connection.fileno() == -1
    return caught.value


def pattern(offset: int, length: int) -> bytes:
    """The bytes of nbdkit's pattern plugin: every eight tell their own offset."""
    first = offset - offset % 8
    words = b"".join(struct.pack(">Q", at) for at in range(first, offset + length, 8))
    return words[offset - first : offset - first + length]


# -- real servers


@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
def test_nbdkit_tells_what_it_has_and_gives_it(folder: Path, tcp: bool) -> None:
    with nbdkit(folder, "--readonly", "pattern", "3M", tcp=tcp) as server, opened(server) as found:
        export = found.export
        assert (export.size, export.read_only, export.multi_conn) == (3 * MIB, True, True)
        assert (export.structured, export.block_status) == (True, True)
        assert (export.block_min, export.block_preferred, export.block_max) == (1, 4096, 32 * MIB)
        for offset, length in [(0, 1), (5, 4099), (MIB - 3, 2 * MIB), (3 * MIB - 1, 1), (7, 0)]:
            assert found.read(offset, length, soon()) == pattern(offset, length)


def test_holes_of_a_memory_disk_are_no_data(folder: Path) -> None:
    data = f'@{MIB} "x"*65536 @{3 * MIB} "y"*65536'
    with nbdkit(folder, "data", data, "size=8M") as server, opened(server) as found:
        assert found.data_extents(soon(), 100) == [(MIB, MIB + 64 * KIB), (3 * MIB, 3 * MIB + 64 * KIB)]
        assert found.data_extents(soon(), 1) == [(MIB, 8 * MIB)]
        (first, *_) = found.block_status(0, 2 * MIB, soon())
        assert first == (MIB, ExtentFlag.HOLE | ExtentFlag.ZERO)
        assert found.usable


def sparse_file(path: Path) -> bytes:
    """4 MiB with 64 KiB of data at 1 MiB and a tail that is no whole page; returns its content."""
    content = bytearray(4 * MIB + 100)
    content[MIB : MIB + 64 * KIB] = DATA
    content[-100:] = b"t" * 100
    with path.open("wb") as file:
        file.truncate(len(content))
        for start, end in [(MIB, MIB + 64 * KIB), (4 * MIB, len(content))]:
            file.seek(start)
            file.write(content[start:end])
    return bytes(content)


def check_sparse(found: Session, content: bytes) -> None:
    size = found.export.size
    assert size >= len(content)
    assert found.read(0, size, soon()) == content + bytes(size - len(content))
    extents = found.data_extents(soon(), 100)
    assert extents[0] == (MIB, MIB + 64 * KIB)
    assert extents[-1][0] <= 4 * MIB
    assert sum(end - start for start, end in extents) < MIB


def test_holes_of_a_file_behind_nbdkit_are_no_data(folder: Path) -> None:
    content = sparse_file(folder / "image")
    with nbdkit(folder, "file", folder / "image") as server, opened(server) as found:
        check_sparse(found, content)


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_holes_of_an_image_behind_qemu_nbd_are_no_data(folder: Path, image_format: str) -> None:
    content = sparse_file(folder / "raw")
    if image_format != "raw":
        qemu_img("convert", "-f", "raw", "-O", image_format, folder / "raw", folder / image_format)
    with (
        qemu_nbd(folder, folder / image_format, image_format=image_format) as server,
        opened(server) as found,
    ):
        assert found.export.read_only
        assert found.export.multi_conn
        check_sparse(found, content)


def test_qemu_nbd_names_the_exports_it_has(folder: Path) -> None:
    (folder / "raw").write_bytes(DATA)
    with qemu_nbd(folder, folder / "raw", "--export-name=weights", "--description=all of them") as server:
        error = refused(server.connect(), "wieghts")
        assert error.errno == errno.ENOENT
        assert "no export 'wieghts' (there are: 'weights')" in str(error)
        with opened(server, "weights") as found:
            assert found.export.description == "all of them"


def test_nbdkit_names_the_exports_it_has(folder: Path) -> None:
    names = ["exportname-strict=true", "exportname-list=explicit", "exportname=a", "exportname=b"]
    with nbdkit(folder, "--filter=exportname", "memory", "1M", *names, "exportdesc=fixed:two words") as server:
        assert list_exports(server.connect(), soon()) == ["a", "b"]
        error = refused(server.connect(), "c")
        assert error.errno == errno.ENOENT
        assert "no export 'c' (there are: 'a', 'b')" in str(error)
        assert error.hint
        with opened(server, "b") as found:
            assert found.export.description == "two words"


def test_a_server_that_keeps_its_list_to_itself_still_refuses_clearly(folder: Path) -> None:
    names = ["exportname-strict=true", "exportname-list=error", "exportname=a"]
    with nbdkit(folder, "--filter=exportname", "memory", "1M", *names) as server:
        error = refused(server.connect(), "c")
        assert error.errno == errno.ENOENT
        assert "there are" not in str(error)
        with pytest.raises(SourceError, match="refuses to list its exports"):
            list_exports(server.connect(), soon())


def test_block_sizes_of_the_server_are_kept(folder: Path) -> None:
    sizes = ["blocksize-minimum=4096", "blocksize-preferred=64K", "blocksize-maximum=128K"]
    arguments = ["--filter=blocksize-policy", "pattern", "1M", *sizes, "blocksize-error-policy=error"]
    with nbdkit(folder, *arguments) as server, opened(server) as found:
        export = found.export
        assert (export.block_min, export.block_preferred, export.block_max) == (4096, 64 * KIB, 128 * KIB)
        for offset, length in [(1, 1), (4095, 2), (100, 500 * KIB), (MIB - 1, 1), (0, MIB)]:
            assert found.read(offset, length, soon()) == pattern(offset, length)


def test_without_extents_everything_is_data(folder: Path) -> None:
    with nbdkit(folder, "--filter=noextents", "memory", "1M") as server, opened(server) as found:
        assert found.data_extents(soon(), 100) == [(0, MIB)]


def test_simple_replies_are_read(folder: Path) -> None:
    with nbdkit(folder, "--no-sr", "pattern", "1M") as server, opened(server) as found:
        assert (found.export.structured, found.export.block_status) == (False, False)
        assert found.read(3, 100_000, soon()) == pattern(3, 100_000)
        assert found.data_extents(soon(), 100) == [(0, MIB)]
        with pytest.raises(SourceError) as caught:
            found.block_status(0, 4096, soon())
        assert caught.value.errno == errno.ENOTSUP
        assert found.usable


@pytest.mark.parametrize("mask", range(4), ids=["neither", "fixed", "no zeroes", "both"])
def test_every_kind_of_newstyle_is_spoken(folder: Path, mask: int) -> None:
    with nbdkit(folder, f"--mask-handshake={mask}", "pattern", "1M") as server, opened(server) as found:
        assert found.export.size == MIB
        assert found.export.structured == bool(mask & 1)
        assert found.read(5, 1000, soon()) == pattern(5, 1000)


def test_a_server_that_is_slow_to_tell_its_holes_has_none(folder: Path) -> None:
    with nbdkit(folder, "--filter=delay", "memory", "1M", "delay-extents=60") as server, opened(server) as found:
        before = time.monotonic()
        assert found.data_extents(shortly(), 100) == [(0, MIB)]
        assert SHORT_S <= time.monotonic() - before < SHORT_S + SLACK_S
        assert not found.usable
        with pytest.raises(LocalProtocolError):
            found.detach()


def test_an_error_of_the_server_leaves_the_session_usable(folder: Path) -> None:
    trigger = folder / "fail"
    arguments = ["--filter=error", "pattern", "1M", "error-pread=EIO", "error-pread-rate=1", f"error-file={trigger}"]
    with nbdkit(folder, *arguments) as server, opened(server) as found:
        trigger.touch()
        with pytest.raises(SourceError) as caught:
            found.read(8192, 4096, soon())
        assert caught.value.errno == errno.EIO
        assert "READ of 4096 bytes at 8192" in str(caught.value)
        assert found.usable
        trigger.unlink()
        assert found.read(8192, 4096, soon()) == pattern(8192, 4096)


def test_holes_that_the_server_fails_to_tell_are_data(folder: Path) -> None:
    arguments = ["--filter=error", "memory", "1M", "error-extents=EIO", "error-extents-rate=1"]
    with nbdkit(folder, *arguments) as server, opened(server) as found:
        assert found.data_extents(soon(), 100) == [(0, MIB)]
        assert found.usable


def test_oldstyle_is_refused_with_a_hint(folder: Path) -> None:
    with nbdkit(folder, "--oldstyle", "memory", "1M") as server:
        error = refused(server.connect())
        assert error.errno == errno.EPROTONOSUPPORT
        assert "oldstyle" in error.message
        assert "newstyle" in (error.hint or "")


def test_required_tls_is_refused_with_a_hint(folder: Path) -> None:
    keys = folder / "keys"
    keys.write_text("user:" + "a1" * 32 + "\n")
    with nbdkit(folder, "--tls=require", f"--tls-psk={keys}", "memory", "1M") as server:
        for attempt in (
            lambda: negotiate(server.connect(), "", soon()),
            lambda: list_exports(server.connect(), soon()),
        ):
            with pytest.raises(SourceError) as caught:
                attempt()
            assert caught.value.errno == errno.EPROTONOSUPPORT
            assert "requires TLS" in caught.value.message
            assert "ssh" in (caught.value.hint or "")


@pytest.mark.parametrize(("size", "number"), [("0", errno.ENODATA), (f"{(1 << 46) + 1}", errno.EFBIG)])
def test_an_export_of_impossible_size_is_refused_with_a_hint(folder: Path, size: str, number: int) -> None:
    with nbdkit(folder, "null", f"size={size}") as server:
        error = refused(server.connect())
        assert error.errno == number
        assert error.hint


def test_a_server_that_is_killed_has_hung_up(folder: Path) -> None:
    with nbdkit(folder, "memory", "1M") as server, opened(server) as found:
        server.kill()
        with pytest.raises(SourceError) as caught:
            found.read(0, 4096, soon())
        assert caught.value.errno == errno.ECONNRESET
        assert not found.usable


def test_a_detached_socket_is_in_its_transmission_phase(folder: Path) -> None:
    with nbdkit(folder, "--no-sr", "pattern", "1M") as server:
        found = opened(server)
        found.read(0, 4096, soon())
        with found.detach() as connection:
            found.close()
            assert connection.gettimeout() is None
            connection.sendall(REQUEST.pack(REQUEST_MAGIC, 0, Command.READ, 77, 16, 8))
            reply = connection.recv(SIMPLE_REPLY.size + 8, socket.MSG_WAITALL)
            assert reply == SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, 77) + pattern(16, 8)


# -- the handshake with a server that misbehaves


def serving(handshake: Handshake | None = None) -> Script:
    def script(peer: Peer) -> None:
        (handshake or Handshake(size=SMALL)).run(peer)
        serve_reads(peer, DATA)

    return script


def refused_by(handshake: Handshake, name: str = "x", deadline: float | None = None) -> SourceError:
    with ScriptedServer(serving(handshake)) as server:
        return refused(server.connect(), name, deadline)


def test_the_scripted_server_is_right_unless_told_otherwise() -> None:
    with ScriptedServer(serving(Handshake(size=SMALL, description="about", names=("x", "")))) as server:
        with negotiate(server.connect(), "x", soon()) as found:
            assert found.export == ServerExport(SMALL, True, True, True, True, 1, 4096, 32 * MIB, "about")
            assert found.read(1, SMALL - 1, soon()) == DATA[1:]
            assert found.data_extents(soon(), 4) == [(0, SMALL)]
        assert list_exports(server.connect(), soon()) == ["x", ""]
    seen = [server.seen.get_nowait().command for _ in range(3)]
    assert seen == [Command.READ, Command.BLOCK_STATUS, Command.DISC]


@pytest.mark.parametrize(
    "handshake",
    [
        Handshake(size=SMALL, go=False),
        Handshake(size=SMALL, go=False, structured=False),
        Handshake(size=SMALL, go=False, handshake_flags=1),
        Handshake(size=SMALL, handshake_flags=0),
        Handshake(size=SMALL, structured=False, block_sizes=None),
        Handshake(size=SMALL, block_status=False),
        Handshake(size=SMALL, flags=0),
    ],
    ids=["no GO", "no GO, simple", "no GO, zeroes", "not fixed", "simple", "no status", "no flags"],
)
def test_a_server_that_can_less_is_used_with_less(handshake: Handshake) -> None:
    with ScriptedServer(serving(handshake)) as server, negotiate(server.connect(), "x", soon()) as found:
        assert found.export.structured == (handshake.structured and handshake.handshake_flags & 1 == 1)
        assert found.export.block_status == (found.export.structured and handshake.block_status)
        assert found.export.read_only == (handshake.flags != 0)
        assert found.read(7, 5000, soon()) == DATA[7:5007]


STEPS: list[tuple[Step, str]] = [
    ("hello", "its greeting"),
    (Option.STRUCTURED_REPLY, "its reply to STRUCTURED_REPLY"),
    (Option.SET_META_CONTEXT, "its reply to SET_META_CONTEXT"),
    (Option.GO, "its reply to GO"),
    (Option.EXPORT_NAME, "its reply to EXPORT_NAME"),
]


@pytest.mark.parametrize(("step", "name"), STEPS)
def test_a_server_that_hangs_up_in_the_handshake_is_told_with_the_step(step: Step, name: str) -> None:
    error = refused_by(Handshake(go=step != Option.EXPORT_NAME, instead={step: hang_up}))
    assert error.errno == errno.ECONNRESET
    assert f"hung up: waited for {name}" in str(error)


@pytest.mark.parametrize(("step", "name"), STEPS)
def test_a_server_that_never_answers_costs_no_more_than_the_deadline(step: Step, name: str) -> None:
    before = time.monotonic()
    error = refused_by(Handshake(go=step != Option.EXPORT_NAME, instead={step: never_answer}), deadline=shortly())
    assert time.monotonic() - before < SHORT_S + SLACK_S
    assert error.errno == errno.ETIMEDOUT
    assert f"waited for {name}" in str(error)


def test_a_server_that_dribbles_costs_no_more_than_the_deadline() -> None:
    def dribble(peer: Peer, _data: bytes) -> None:
        peer.send(OPTION_REPLY.pack(OPTION_REPLY_MAGIC, Option.GO, OptionReply.INFO, 60_000))
        while not select.select([peer.connection], [], [], SHORT_S / 20)[0]:  # readable: the client has hung up
            peer.send(b"\0")

    before = time.monotonic()
    error = refused_by(Handshake(instead={Option.GO: dribble}), deadline=shortly())
    assert time.monotonic() - before < SHORT_S + SLACK_S
    assert error.errno == errno.ETIMEDOUT
    assert "waited for its reply to GO (of 60000 bytes" in str(error)


def test_a_deadline_that_has_passed_asks_nothing() -> None:
    with ScriptedServer(serving()) as server:
        assert refused(server.connect(), "x", time.monotonic() - 1).errno == errno.ETIMEDOUT


def says(kind: int, data: bytes = b"", **bent: int) -> Instead:
    """Answers GO with this reply, then with the ACK."""

    def instead(peer: Peer, _data: bytes) -> None:
        peer.reply(Option.GO, kind, data, **bent)
        peer.reply(Option.GO, OptionReply.ACK)

    return instead


def exactly(data: bytes) -> Instead:
    return lambda peer, _data: peer.send(data)


def answers(option: Option, kind: int, data: bytes = b"") -> Instead:
    return lambda peer, _data: peer.reply(option, kind, data)


def endless(option: Option, kind: int, data: bytes) -> Instead:
    def instead(peer: Peer, _data: bytes) -> None:
        while True:
            peer.reply(option, kind, data)

    return instead


def infos(*answers: bytes) -> Instead:
    def instead(peer: Peer, _data: bytes) -> None:
        for answer in answers:
            peer.reply(Option.GO, OptionReply.INFO, answer)
        peer.reply(Option.GO, OptionReply.ACK)

    return instead


EXPORT = INFO_EXPORT.pack(Info.EXPORT, SMALL, 3)
CONTEXT_REPLY = CONTEXT_ID.pack(CONTEXT) + BASE_ALLOCATION.encode()


def sizes(least: int, preferred: int, most: int) -> bytes:
    return INFO_BLOCK_SIZE.pack(Info.BLOCK_SIZE, least, preferred, most)


@pytest.mark.parametrize(
    ("step", "instead", "complaint"),
    [
        ("hello", exactly(b"SSH-2.0-OpenSSH_9.2p1\r\n"), "garbled its greeting: it begins with b'SSH-2.0-'"),
        ("hello", exactly(HELLO.pack(NBD_MAGIC, 17, 3)), "garbled its greeting: wrong magic"),
        (Option.GO, says(OptionReply.INFO, EXPORT, magic=5), "garbled its reply to GO: wrong magic"),
        (Option.GO, answers(Option.LIST, OptionReply.ACK), "it is for option 3"),
        (Option.GO, says(OptionReply.INFO, EXPORT, length=1 << 20), "claims 1048576 bytes"),
        (Option.GO, says(OptionReply.INFO, EXPORT, length=(1 << 32) - 1), "claims 4294967295 bytes"),
        (Option.GO, says(OptionReply.INFO, EXPORT + b"!"), "13 bytes instead of 12"),
        (Option.GO, says(OptionReply.INFO, b"\0"), "a reply of type 3 and 1 bytes"),
        (Option.GO, says(OptionReply.SERVER, EXPORT), "a reply of type 2"),
        (Option.GO, says(0x77, EXPORT), "a reply of type 119"),
        (Option.GO, answers(Option.GO, OptionReply.ACK, b"yes"), "an acknowledgement with 3 bytes"),
        (Option.GO, infos(), "does not say how large"),
        (Option.GO, infos(EXPORT, EXPORT), "information 0 comes twice"),
        (Option.GO, infos(EXPORT, sizes(0, 4096, 1 << 20)), "impossible block sizes"),
        (Option.GO, infos(EXPORT, sizes(3, 4096, 1 << 20)), "impossible block sizes"),
        (Option.GO, infos(EXPORT, sizes(1 << 17, 1 << 17, 1 << 20)), "impossible block sizes"),
        (Option.GO, infos(EXPORT, sizes(4096, 4096, 512)), "impossible block sizes"),
        (Option.GO, infos(EXPORT, sizes(1, 1, 1)[:-1]), "13 bytes instead of 14"),
        (Option.GO, infos(*(struct.pack(">H", 100 + n) for n in range(70))), "more than 64 replies"),
        (Option.STRUCTURED_REPLY, answers(Option.STRUCTURED_REPLY, OptionReply.INFO), "a reply of type 3"),
        (
            Option.SET_META_CONTEXT,
            endless(Option.SET_META_CONTEXT, OptionReply.META_CONTEXT, CONTEXT_REPLY),
            "garbled its reply to SET_META_CONTEXT: a reply of type 4",
        ),
        (
            Option.SET_META_CONTEXT,
            answers(Option.SET_META_CONTEXT, OptionReply.META_CONTEXT, b"\0\0\0\1x:y"),
            "a reply of type 4 and 7 bytes",
        ),
        (
            Option.SET_META_CONTEXT,
            answers(Option.SET_META_CONTEXT, OptionReply.META_CONTEXT, b"\0"),
            "a reply of type 4 and 1 bytes",
        ),
    ],
)
def test_garbage_in_the_handshake_is_told(step: Step, instead: Instead, complaint: str) -> None:
    error = refused_by(Handshake(instead={step: instead}))
    assert error.errno == errno.EPROTO
    assert complaint in str(error)


def test_an_oldstyle_server_that_is_not_nbdkit_is_refused_too() -> None:
    hello = struct.pack(">QQQI124x", NBD_MAGIC, OLDSTYLE_MAGIC, SMALL, 3)
    assert refused_by(Handshake(instead={"hello": exactly(hello)})).errno == errno.EPROTONOSUPPORT


def test_half_a_reply_is_told_with_how_much_came() -> None:
    def half(peer: Peer, _data: bytes) -> None:
        peer.send(OPTION_REPLY.pack(OPTION_REPLY_MAGIC, Option.GO, OptionReply.ACK, 0)[:7])
        peer.hang_up()

    error = refused_by(Handshake(instead={Option.GO: half}))
    assert error.errno == errno.ECONNRESET
    assert "waited for its reply to GO (of 20 bytes 7 came)" in str(error)


@pytest.mark.parametrize(
    ("kind", "number"),
    [
        (OptionReply.ERR_POLICY, errno.EACCES),
        (OptionReply.ERR_SHUTDOWN, errno.ESHUTDOWN),
        (OptionReply.ERR_INVALID, errno.EINVAL),
        (OptionReply.ERR_TOO_BIG, errno.EMSGSIZE),
        (0x80000063, errno.EIO),
    ],
)
def test_a_refusal_has_an_errno_and_the_words_of_the_server(kind: int, number: int) -> None:
    words = b"not \x1b[31mtoday\xff" + b"!" * 5000
    error = refused_by(Handshake(instead={Option.GO: answers(Option.GO, kind, words)}))
    assert error.errno == number
    assert "the export 'x'" in str(error)
    assert "not \N{REPLACEMENT CHARACTER}[31mtoday" in str(error)
    assert len(str(error)) < line.TEXT_SHOWN_MAX + 100


@pytest.mark.parametrize("lists", [hang_up, exactly(b"garbage" * 9), answers(Option.LIST, OptionReply.ERR_POLICY)])
def test_an_unknown_export_is_told_whatever_comes_of_the_list(lists: Instead) -> None:
    error = refused_by(Handshake(names=("a",), instead={Option.LIST: lists}))
    assert error.errno == errno.ENOENT
    assert "no export 'x': no such export" in str(error)


def test_of_many_exports_a_few_are_told() -> None:
    error = refused_by(Handshake(names=tuple(f"n{number}" for number in range(30))))
    assert "'n0', 'n1'" in str(error)
    assert "'n9' and 20 more" in str(error)


def test_an_endless_list_of_exports_ends() -> None:
    name = struct.pack(">I", 1) + b"n"
    with ScriptedServer(serving(Handshake(instead={Option.LIST: endless(Option.LIST, 2, name)}))) as server:
        assert list_exports(server.connect(), soon()) == ["n"] * client.EXPORTS_LISTED_MAX
        assert "and 990 more" in str(
            refused_by(
                Handshake(
                    instead={
                        Option.LIST: endless(Option.LIST, 2, name),
                        Option.GO: answers(Option.GO, OptionReply.ERR_UNKNOWN),
                    }
                )
            )
        )


@pytest.mark.parametrize("entry", [b"", b"\0\0", struct.pack(">I", 5) + b"four", struct.pack(">I", 1 << 31)])
def test_a_garbled_list_of_exports_is_told(entry: bytes) -> None:
    with (
        ScriptedServer(serving(Handshake(instead={Option.LIST: endless(Option.LIST, 2, entry)}))) as server,
        pytest.raises(SourceError, match="garbled its reply to LIST"),
    ):
        list_exports(server.connect(), soon())


@pytest.mark.parametrize(
    ("name", "number"), [("a\0b", errno.EINVAL), ("\udc80", errno.EINVAL), ("x" * 4097, errno.ENAMETOOLONG)]
)
def test_a_name_that_no_server_can_have_is_not_sent(name: str, number: int) -> None:
    with ScriptedServer(serving()) as server:
        assert refused(server.connect(), name).errno == number


def test_a_maximum_that_the_minimum_does_not_divide_is_rounded_down() -> None:
    handshake = Handshake(size=SMALL, block_sizes=(512, 100, 4000))
    with ScriptedServer(serving(handshake)) as server, negotiate(server.connect(), "x", soon()) as found:
        export = found.export
        assert (export.block_min, export.block_preferred, export.block_max) == (512, 512, 3584)
        assert found.read(1, 9000, soon()) == DATA[1:9001]


# -- replies of a server that misbehaves


def session_with(answer: Callable[[Peer, Request], None], *, structured: bool = True) -> ScriptedServer:
    """A server that answers each request so, after a right handshake."""

    def script(peer: Peer) -> None:
        Handshake(size=SMALL, structured=structured).run(peer)
        while (request := peer.request()) is not None:
            answer(peer, request)

    return ScriptedServer(script)


def read_through(answer: Callable[[Peer, Request], None], *, structured: bool = True) -> bytes:
    with (
        session_with(answer, structured=structured) as server,
        negotiate(server.connect(), "x", soon()) as found,
    ):
        return found.read(4096, 4096, soon())


def test_chunks_come_in_any_order_and_holes_are_zeros() -> None:
    def answer(peer: Peer, request: Request) -> None:
        peer.data_chunk(request, b"c" * 1096, offset=4096 + 3000, done=False)
        peer.hole_chunk(request, 4096 + 1000, 2000, done=False)
        peer.data_chunk(request, b"a" * 1000, done=False)
        peer.none_chunk(request)

    assert read_through(answer) == b"a" * 1000 + bytes(2000) + b"c" * 1096


def test_a_reply_that_comes_byte_by_byte_is_read() -> None:
    def answer(peer: Peer, request: Request) -> None:
        for byte in peer.chunk_bytes(request, Chunk.OFFSET_DATA, struct.pack(">Q", request.offset) + DATA[:4096]):
            peer.send(bytes([byte]))

    assert read_through(answer) == DATA[:4096]


def chunk(kind: int, data: bytes = b"", **bent: int) -> Callable[[Peer, Request], None]:
    return lambda peer, request: peer.send(peer.chunk_bytes(request, kind, data, **bent))  # type: ignore[arg-type]


def data_at(*places: tuple[int, int]) -> Callable[[Peer, Request], None]:
    """Chunks of data at (offset, length) and an end."""

    def answer(peer: Peer, request: Request) -> None:
        for offset, length in places:
            peer.data_chunk(request, b"d" * length, offset=offset, done=False)
        peer.none_chunk(request)

    return answer


def never_done(peer: Peer, request: Request) -> None:
    while True:
        peer.error_chunk(request, errno.EIO, "again", done=False)


def nothing_but_holes(peer: Peer, request: Request) -> None:
    peer.hole_chunk(request, 4096, 2048, done=False)
    peer.hole_chunk(request, 6143, 2048, done=False)


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (lambda peer, request: peer.send(bytes(64)), "wrong magic 0x00000000"),
        (chunk(Chunk.OFFSET_DATA, bytes(4104), magic=7), "wrong magic 0x00000007"),
        (chunk(Chunk.OFFSET_DATA, bytes(4104), cookie=99), "it is for request 99"),
        (lambda peer, request: peer.simple_reply(request, DATA[:4096]), "a simple reply"),
        (lambda peer, request: peer.simple_reply(request, error=5, cookie=0), "it is for request 0"),
        (data_at(), "of 4096 bytes 4096 are missing"),
        (data_at((4096, 4095)), "of 4096 bytes 1 are missing"),
        (data_at((4096, 100), (4195, 100)), "bytes at 4195 came twice"),
        (data_at((5000, 10), (6000, 10), (5009, 1000)), "bytes at 5009 came twice"),
        (data_at((4096, 4096), (4096, 4096)), "bytes at 4096 came twice"),
        (data_at((4095, 4096)), "4096 bytes at 4095, which were not asked for"),
        (data_at((4097, 4096)), "4096 bytes at 4097, which were not asked for"),
        (data_at((0, 4096)), "4096 bytes at 0, which were not asked for"),
        (data_at((4096, 0)), "0 bytes at 4096"),
        (nothing_but_holes, "bytes at 6143 came twice"),
        (chunk(Chunk.OFFSET_HOLE, struct.pack(">QI", 4096, (1 << 32) - 1)), "4294967295 bytes at 4096"),
        (chunk(Chunk.OFFSET_HOLE, bytes(13)), "a chunk of type 2 and 13 bytes"),
        (chunk(Chunk.OFFSET_DATA, bytes(7)), "a chunk of type 1 and 7 bytes"),
        (chunk(Chunk.OFFSET_DATA, struct.pack(">Q", 4096), length=(1 << 32) - 1), "4294967287 bytes at 4096"),
        (chunk(Chunk.BLOCK_STATUS, bytes(12)), "a chunk of type 5"),
        (chunk(Chunk.NONE, b"x"), "a chunk of type 0 and 1 bytes"),
        (chunk(Chunk.NONE, done=False), "a chunk of type 0 and 0 bytes"),
        (chunk(99, b""), "a chunk of type 99"),
        (chunk(Chunk.ERROR, b"\0\0\0\5\0"), "an error of 5 bytes"),
        (chunk(Chunk.ERROR, bytes(6)), "error 0"),
        (chunk(Chunk.ERROR, b"\0\0\0\5\0\x09short"), "a text of 9 bytes"),
        (chunk(Chunk.ERROR, b"\0\0\0\5\0\2longer"), "a text of 2 bytes"),
        (chunk(Chunk.ERROR_OFFSET, b"\0\0\0\5\0\0" + bytes(7)), "error 5"),
        (chunk(Chunk.ERROR, b"\0\0\0\5\xff\xff" + bytes(65535)), "an error of 65541 bytes"),
        (never_done, "more than 64 errors"),
    ],
)
def test_a_garbled_reply_is_told(answer: Callable[[Peer, Request], None], complaint: str) -> None:
    with session_with(answer) as server, negotiate(server.connect(), "x", soon()) as found:
        with pytest.raises(SourceError) as caught:
            found.read(4096, 4096, soon())
        assert caught.value.errno == errno.EPROTO
        assert "garbled its reply to READ of 4096 bytes at 4096" in str(caught.value)
        assert complaint in str(caught.value)
        assert not found.usable
        with pytest.raises(LocalProtocolError):
            found.read(0, 1, soon())


def test_a_structured_reply_that_was_not_negotiated_is_garbage() -> None:
    with pytest.raises(SourceError, match="wrong magic 0x668e33ef"):
        read_through(lambda peer, request: peer.data_chunk(request, DATA[:4096]), structured=False)


def test_every_text_of_an_error_is_told() -> None:
    def answer(peer: Peer, request: Request) -> None:
        peer.data_chunk(request, b"d" * 100, done=False)
        peer.error_chunk(request, errno.EIO, "bad sector", offset=5000, done=False)
        peer.error_chunk(request, errno.ENOMEM, "and \x07 no memory", done=True)

    with session_with(answer) as server, negotiate(server.connect(), "x", soon()) as found:
        for _ in range(2):
            with pytest.raises(SourceError) as caught:
                found.read(4096, 4096, soon())
            assert caught.value.errno == errno.EIO
            assert "(bad sector; and \N{REPLACEMENT CHARACTER} no memory)" in str(caught.value)
            assert found.usable


@pytest.mark.parametrize(
    ("sent", "number"), [(5, errno.EIO), (22, errno.EINVAL), (108, errno.ESHUTDOWN), (4711, errno.EINVAL)]
)
@pytest.mark.parametrize("structured", [False, True])
def test_a_simple_error_is_read_in_either_mode(sent: int, number: int, structured: bool) -> None:
    with pytest.raises(SourceError) as caught:
        read_through(lambda peer, request: peer.simple_reply(request, error=sent), structured=structured)
    assert caught.value.errno == number


def test_an_error_of_a_kind_that_is_not_known_is_an_error() -> None:
    with pytest.raises(SourceError, match="newer than you") as caught:
        read_through(chunk(0x8123, struct.pack(">IH", errno.EIO, 14) + b"newer than you" + bytes(3)))
    assert caught.value.errno == errno.EIO


def test_half_a_read_is_told_with_how_much_came() -> None:
    def answer(peer: Peer, request: Request) -> None:
        peer.send(peer.chunk_bytes(request, Chunk.OFFSET_DATA, bytes(8) + DATA[:4096])[: CHUNK.size + 3])
        peer.hang_up()

    with pytest.raises(SourceError, match=r"hung up: .* READ of 4096 bytes at 4096 \(of 8 bytes 3 came\)") as caught:
        read_through(answer)
    assert caught.value.errno == errno.ECONNRESET


def test_a_read_that_is_never_answered_ends_at_its_deadline() -> None:
    with (
        session_with(lambda peer, _: peer.never_answer()) as server,
        negotiate(server.connect(), "x", soon()) as found,
    ):
        before = time.monotonic()
        with pytest.raises(SourceError) as caught:
            found.read(0, 4096, shortly())
        assert time.monotonic() - before < SHORT_S + SLACK_S
        assert caught.value.errno == errno.ETIMEDOUT
        assert not found.usable


def test_what_lies_beyond_the_export_is_not_asked_for() -> None:
    with ScriptedServer(serving()) as server, negotiate(server.connect(), "x", soon()) as found:
        for offset, length in [(0, SMALL + 1), (SMALL, 1), (-1, 1), (0, -1)]:
            with pytest.raises(LocalProtocolError):
                found.read(offset, length, soon())
        assert found.usable
    assert server.seen.get_nowait().command == Command.DISC


# -- block status


def status(*extents: tuple[int, int]) -> Callable[[Peer, Request], None]:
    return lambda peer, request: peer.status_chunk(request, extents)


def extents_through(answer: Callable[[Peer, Request], None], extents_max: int = 100) -> list[tuple[int, int]]:
    with session_with(answer) as server, negotiate(server.connect(), "x", soon()) as found:
        return found.data_extents(soon(), extents_max)


def test_only_what_is_zero_is_no_data_and_extents_may_come_in_pieces() -> None:
    """Flag HOLE alone does not say what reads as."""
    flags = {0: 3, 8192: 1, 16384: 2, 24576: 0x104, 32768: 2, 40960: 0, 49152: 3, 57344: 0}

    def answer(peer: Peer, request: Request) -> None:
        peer.status_chunk(request, [(8192, flags[request.offset])])

    assert extents_through(answer) == [(8192, 16384), (24576, 32768), (40960, 49152), (57344, 65536)]
    assert extents_through(answer, 2) == [(8192, 16384), (24576, 65536)]


def test_a_hole_smaller_than_a_page_joins_its_neighbours() -> None:
    size = HOLE_BYTES_MIN
    assert extents_through(status((100, 0), (size - 1, 3), (100, 0), (size, 2), (SMALL, 0))) == [
        (0, 199 + size),
        (199 + 2 * size, SMALL),
    ]


def test_an_extent_may_reach_beyond_what_was_asked() -> None:
    with (
        session_with(status((8192, 0), ((1 << 32) - 1, 3))) as server,
        negotiate(server.connect(), "x", soon()) as found,
    ):
        assert found.block_status(0, 16384, soon()) == [
            (8192, ExtentFlag(0)),
            (8192, ExtentFlag.HOLE | ExtentFlag.ZERO),
        ]


def test_holes_that_are_refused_in_the_middle_leave_the_rest_data() -> None:
    def answer(peer: Peer, request: Request) -> None:
        if request.offset:
            peer.error_chunk(request, errno.EINVAL, "enough")
        else:
            peer.status_chunk(request, [(8192, 3)])

    assert extents_through(answer) == [(8192, SMALL)]


def two_of_them(peer: Peer, request: Request) -> None:
    peer.status_chunk(request, [(8192, 0)], done=False)
    peer.status_chunk(request, [(8192, 0)])


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (status(), "extents of 4 bytes"),
        (status((0, 0)), "an extent of 0 bytes"),
        (lambda peer, request: peer.status_chunk(request, [(SMALL, 0)], context=CONTEXT + 1), "context 8"),
        (lambda peer, request: peer.none_chunk(request), "no extents"),
        (lambda peer, request: peer.simple_reply(request), "a simple reply"),
        (two_of_them, "a chunk of type 5"),
        (chunk(Chunk.BLOCK_STATUS, bytes(13)), "extents of 13 bytes"),
        (chunk(Chunk.BLOCK_STATUS, b"", length=4 + 8 * (session.STATUS_EXTENTS_MAX + 1)), "extents of 8388620 bytes"),
        (chunk(Chunk.OFFSET_DATA, bytes(4104)), "a chunk of type 1"),
    ],
)
def test_garbled_block_status_is_told(answer: Callable[[Peer, Request], None], complaint: str) -> None:
    with pytest.raises(SourceError) as caught:
        extents_through(answer)
    assert caught.value.errno == errno.EPROTO
    assert "garbled its reply to BLOCK_STATUS of 65536 bytes at 0" in str(caught.value)
    assert complaint in str(caught.value)


def test_extents_keep_to_the_minimum_block() -> None:
    def script(peer: Peer) -> None:
        Handshake(size=SMALL + 100, block_sizes=(4096, 4096, 1 << 20)).run(peer)
        peer.status_chunk(peer.requests(1)[0], [(8192, 3), (SMALL - 8192 + 100, 0)])
        peer.status_chunk(peer.requests(1)[0], [(100, 3), (SMALL, 0)])

    with ScriptedServer(script) as server, negotiate(server.connect(), "x", soon()) as found:
        assert found.data_extents(soon(), 9) == [(8192, SMALL + 100)]
        for offset, length in [(100, 4096), (0, 100), (0, 0)]:
            with pytest.raises(LocalProtocolError):
                found.block_status(offset, length, soon())
        with pytest.raises(SourceError, match="an extent of 100 bytes"):
            found.data_extents(soon(), 9)


def test_a_server_that_hangs_up_instead_of_telling_holes_is_lost() -> None:
    with pytest.raises(SourceError) as caught:
        extents_through(lambda peer, _: peer.hang_up())
    assert caught.value.errno == errno.ECONNRESET


def test_holes_of_a_large_export_are_asked_in_ranges_that_fit_the_field() -> None:
    size = 5 << 30

    def script(peer: Peer) -> None:
        Handshake(size=size).run(peer)
        while (request := peer.request()) is not None:
            peer.status_chunk(request, [(request.length, 3 if request.offset else 0)])

    with ScriptedServer(script) as server, negotiate(server.connect(), "x", soon()) as found:
        assert found.data_extents(soon(), 9) == [(0, session.BLOCK_STATUS_LENGTH_MAX)]
    seen = [server.seen.get_nowait() for _ in range(5)]
    assert [request.offset for request in seen] == [n << 30 for n in range(5)]


# -- the end


def test_closing_says_goodbye_once() -> None:
    with ScriptedServer(serving()) as server:
        found = negotiate(server.connect(), "x", soon())
        found.close()
        found.close()
    assert server.seen.get_nowait().command == Command.DISC
    assert server.seen.empty()


def test_closing_never_waits_for_a_server_that_is_silent() -> None:
    with session_with(lambda peer, _: peer.never_answer()) as server:
        found = negotiate(server.connect(), "x", soon())
        with pytest.raises(SourceError):
            found.read(0, 1, shortly())
        found.close()
    assert server.seen.get_nowait().command == Command.READ
    assert server.seen.empty()


# -- any bytes at all

FUZZ_DEADLINE_S = 0.03
FUZZ_EXAMPLES = 300
FUZZ = settings(
    max_examples=FUZZ_EXAMPLES,
    deadline=None,
    database=None,  # the run's seed repeats it
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
from_the_seed = seeded(int(os.environ["PCSHARE_TEST_SEED"]))

option_types = st.sampled_from([*OptionReply, 0, 99]).map(int)
option_data = st.one_of(
    st.binary(max_size=40),
    st.just(CONTEXT_REPLY),
    st.tuples(st.integers(0, (1 << 64) - 1), st.integers(0, 1023)).map(lambda t: INFO_EXPORT.pack(Info.EXPORT, *t)),
    st.tuples(*[st.sampled_from([0, 1, 3, 512, 4096, 1 << 20, (1 << 32) - 1])] * 3).map(lambda t: sizes(*t)),
)


def option_reply(option: int, kind: int, data: bytes, lie: int) -> bytes:
    return OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, kind, max(0, len(data) + lie)) + data


option_replies = st.builds(
    option_reply,
    st.sampled_from([Option.STRUCTURED_REPLY, Option.SET_META_CONTEXT, Option.GO, Option.LIST]),
    option_types,
    option_data,
    st.sampled_from([0] * 12 + [1, -1, 1 << 20]),
)
likely_replies = st.tuples(
    *[
        st.lists(st.builds(option_reply, st.just(option), option_types, option_data, st.just(0)), max_size=4).map(
            b"".join
        )
        for option in (Option.STRUCTURED_REPLY, Option.SET_META_CONTEXT, Option.GO, Option.LIST)
    ]
).map(b"".join)
greetings = st.one_of(
    st.sampled_from(range(4)).map(lambda flags: HELLO.pack(NBD_MAGIC, OPTION_MAGIC, flags)), st.binary(max_size=20)
)
RIGHT_HANDSHAKE = HELLO.pack(NBD_MAGIC, OPTION_MAGIC, 3) + b"".join(
    option_reply(option, kind, data, 0)
    for option, kind, data in [
        (Option.STRUCTURED_REPLY, OptionReply.ACK, b""),
        (Option.SET_META_CONTEXT, OptionReply.META_CONTEXT, CONTEXT_REPLY),
        (Option.SET_META_CONTEXT, OptionReply.ACK, b""),
        (Option.GO, OptionReply.INFO, EXPORT),
        (Option.GO, OptionReply.ACK, b""),
    ]
)


def bent(right: bytes) -> st.SearchStrategy[bytes]:
    """The right bytes with up to three places where some are replaced by others."""

    def bend(places: list[tuple[int, int, bytes]]) -> bytes:
        bytes_now = right
        for at, length, instead in places:
            bytes_now = bytes_now[:at] + instead + bytes_now[at + length :]
        return bytes_now

    place = st.tuples(st.integers(0, len(right)), st.integers(0, 8), st.binary(max_size=8))
    same_length = st.tuples(st.integers(0, len(right)), st.just(1), st.binary(min_size=1, max_size=1))
    return st.lists(st.one_of(place, same_length), max_size=3).map(bend)


handshakes = st.one_of(
    st.binary(max_size=200),
    st.tuples(greetings, st.lists(st.one_of(option_replies, st.binary(max_size=30)), max_size=8).map(b"".join)).map(
        b"".join
    ),
    st.tuples(st.just(HELLO.pack(NBD_MAGIC, OPTION_MAGIC, 3)), likely_replies).map(b"".join),
    bent(RIGHT_HANDSHAKE),
)


def fuzz_chunk(flags: int, kind: int, cookie: int, data: bytes, lie: int) -> bytes:
    return CHUNK.pack(STRUCTURED_REPLY_MAGIC, flags, kind, cookie, max(0, len(data) + lie)) + data


offsets = st.sampled_from([0, 1, 15, 16, 32, 63, 64, 1 << 63]).map(lambda at: struct.pack(">Q", at))
chunk_data = st.one_of(
    st.binary(max_size=30),
    st.tuples(offsets, st.binary(max_size=70)).map(b"".join),
    st.tuples(offsets, st.sampled_from([0, 1, 16, 64]).map(lambda n: struct.pack(">I", n))).map(b"".join),
    st.lists(st.tuples(st.integers(0, 100), st.integers(0, 5)), max_size=4).map(
        lambda all: CONTEXT_ID.pack(CONTEXT) + b"".join(struct.pack(">II", *one) for one in all)
    ),
    st.text(max_size=9).map(lambda text: struct.pack(">IH", 5, len(text.encode())) + text.encode()),
)
lists_of_chunks = st.lists(
    st.one_of(
        st.builds(
            fuzz_chunk,
            st.sampled_from([0, CHUNK_DONE, 0xFFFF]),
            st.sampled_from([*Chunk, 7, 0xFFFF]).map(int),
            st.sampled_from([1, 1, 1, 1, 2, 0]),
            chunk_data,
            st.sampled_from([0] * 12 + [1, -1, 1 << 31]),
        ),
        st.builds(
            SIMPLE_REPLY.pack, st.just(SIMPLE_REPLY_MAGIC), st.sampled_from([0, 5, 999]), st.sampled_from([1, 2])
        ),
        st.binary(max_size=24),
    ),
    max_size=6,
).map(b"".join)
RIGHT_READ = (
    fuzz_chunk(0, Chunk.OFFSET_DATA, 1, struct.pack(">Q", 32) + DATA[32:64], 0)
    + fuzz_chunk(0, Chunk.OFFSET_HOLE, 1, struct.pack(">QI", 0, 32), 0)
    + fuzz_chunk(CHUNK_DONE, Chunk.NONE, 1, b"", 0)
)
RIGHT_STATUS = fuzz_chunk(
    CHUNK_DONE, Chunk.BLOCK_STATUS, 1, struct.pack(">IIIII", CONTEXT, 8192, 3, SMALL - 8192, 0), 0
)
replies = st.one_of(lists_of_chunks, bent(RIGHT_READ), bent(RIGHT_STATUS))


def against(sent: bytes, goes: bool) -> tuple[socket.socket, socket.socket]:
    """Both ends of a connection on which the server has said all that it will ever say; goes: and has hung up."""
    ours, theirs = socket.socketpair()
    theirs.sendall(sent)
    if goes:
        theirs.shutdown(socket.SHUT_WR)
    return ours, theirs


@from_the_seed
@FUZZ
@given(sent=handshakes, goes=st.booleans())
def test_any_bytes_in_the_handshake_give_a_session_or_the_one_error(sent: bytes, goes: bool) -> None:
    ours, theirs = against(sent, goes)
    with theirs:
        before = time.monotonic()
        try:
            with negotiate(ours, "x", before + FUZZ_DEADLINE_S) as found:
                assert 0 < found.export.size <= client.EXPORT_SIZE_MAX
                assert found.export.block_max % found.export.block_min == 0
        except SourceError as error:
            assert error.errno  # noqa: PT017  (either outcome is right)
        assert time.monotonic() - before < SLACK_S
        assert ours.fileno() == -1


@from_the_seed
@FUZZ
@given(sent=replies, goes=st.booleans(), asks_status=st.booleans())
def test_any_bytes_as_a_reply_give_an_answer_or_the_one_error(sent: bytes, goes: bool, asks_status: bool) -> None:
    ours, theirs = against(RIGHT_HANDSHAKE + sent, goes)
    with theirs, negotiate(ours, "x", soon()) as found:
        deadline = time.monotonic() + FUZZ_DEADLINE_S
        try:
            if asks_status:
                extents = found.data_extents(deadline, 3)
                assert 0 <= len(extents) <= 3
                assert all(0 <= start < end <= SMALL for start, end in extents)
            else:
                assert len(found.read(0, 64, deadline)) == 64
        except SourceError as error:
            assert error.errno  # noqa: PT017  (either outcome is right)
        assert time.monotonic() - deadline < SLACK_S


def test_what_the_fuzz_bends_was_right() -> None:
    ours, theirs = against(RIGHT_HANDSHAKE + RIGHT_READ, goes=True)
    with theirs, negotiate(ours, "x", soon()) as found:
        assert found.read(0, 64, soon()) == bytes(32) + DATA[32:64]
    ours, theirs = against(RIGHT_HANDSHAKE + RIGHT_STATUS, goes=True)
    with theirs, negotiate(ours, "x", soon()) as found:
        assert found.data_extents(soon(), 3) == [(8192, SMALL)]


def test_no_fd_is_lost_when_the_handshake_fails() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        assert refused_by(Handshake(instead={Option.GO: hang_up})).errno == errno.ECONNRESET
    assert len(os.listdir("/proc/self/fd")) == before
