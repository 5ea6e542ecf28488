"""An incoming migration and the coordinator around it: what may come when, who may connect, and what becomes of it."""

from __future__ import annotations

import contextlib
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pcshare.coordinator import incoming, reception
from pcshare.coordinator.blocks import Blocks
from pcshare.coordinator.device_state import DeviceStateFile
from pcshare.errors import AttachTimeout, PcshareError, SourceLost, UsageError, Vetoed
from pcshare.incoming import IncomingStream
from pcshare.migration.reader import split_precopy_end
from pcshare.migration.return_path import Pong, Shut
from pcshare.notifier import Change, Notice
from pcshare.protocol import AdminOp
from pcshare.sources import open_source, parse_argument
from support import wait_until
from support_migration import (
    HUGE_PAGE,
    HungUp,
    LinkBroken,
    Preempt,
    Refused,
    Source,
    SourceBlock,
    playing,
    to_unix,
)
from support_migration_bytes import DEVICE_STATE, instead_of
from support_scene import N_PAGES, RAM, RAM_BYTES, ROM, ROM_BYTES, each_preempt
from support_scene import Scene as AnyScene
from support_serving import LAZY, PAGE, WAIT_S, Serving, serving

MIB = 1 << 20
MIDDLE = 100_000  # bytes into what is sent: somewhere in a record
SHORT_S = 0.3  # of a time limit that a test reaches
ANSWERED_S = 5.0  # of one that is reached, too, but not before the coordinator has answered

Scene = AnyScene[Serving]


@contextlib.contextmanager
def scene_of(folder: Path, seed: int, **options: Any) -> Iterator[Scene]:
    path = folder / "migration.sock"
    with serving(f"qemu+unix:{path}", **options) as served:
        yield Scene(served, path, seed)


@pytest.fixture
def scene(runtime_dir: Path, seed: int) -> Iterator[Scene]:
    with scene_of(runtime_dir, seed) as made:
        yield made


def play(source: Source, script: Callable[[Source], object] | None = None) -> Source:
    with playing(source, script):
        pass
    return source


def break_in_postcopy(source: Source, after_bytes: int = MIDDLE) -> None:
    source.main.break_at = source.main.written + after_bytes
    with pytest.raises(LinkBroken):
        source.postcopy()


# ---- before a source comes, and before LISTEN ----


def test_who_attaches_waits_and_is_told_for_what(scene: Scene) -> None:
    """B4: before LISTEN nobody has the memory."""
    helper = scene.served.helper()
    assert scene.served.status().reason == f"waiting for a source at qemu+unix:{scene.path}"
    assert scene.served.status().state == "NONE"
    with pytest.raises(AttachTimeout, match="waiting for a source at"):
        helper.do(f"attach({RAM!r}, timeout_s={ANSWERED_S})")

    def script(source: Source) -> None:
        source.connect()
        source.precopy(share=0.5)
        scene.wait_for_reason("waiting for LISTEN: precopy, ")
        scene.wait_for_reason("MiB received")
        assert {block.idstr: block.state for block in scene.served.status().blocks} == {RAM: "ADVISE", ROM: "ADVISE"}
        with pytest.raises(AttachTimeout, match=r"pc\.ram is not there yet: waiting for LISTEN"):
            helper.do(f"attach({RAM!r}, timeout_s={ANSWERED_S})")
        source.finish_precopy()

    source = play(scene.source(), script)
    scene.assert_whole(source)
    wait_until(lambda: scene.served.status().reason == "", "an end of the reason")


def test_helper_that_came_first_gets_what_comes(scene: Scene) -> None:
    helper, attached = scene.attaching()
    source = scene.source()

    def script(source: Source) -> None:
        source.connect()
        source.precopy()
        assert not attached.is_done()
        source.finish_precopy()

    play(source, script)
    attached.result()
    assert helper.do("bytes(b)") == source.memory(RAM)


def test_source_that_breaks_before_listen_is_forgotten(scene: Scene) -> None:
    """B1: nothing of what it sent survives; the next one may have other blocks."""
    source = scene.source()

    def script(source: Source) -> None:
        source.connect()
        source.main.break_at = source.main.written + MIDDLE
        with pytest.raises(LinkBroken):
            source.precopy()
        source.close()

    play(source, script)
    reason = scene.wait_for_reason("(the last one: at byte ")
    assert reason.startswith("waiting for a source at ")
    assert scene.served.status().blocks == ()
    assert scene.served.status().source is None
    other = play(scene.source([SourceBlock("other", MIB, seed=7), SourceBlock(RAM, MIB, seed=8)]))
    scene.assert_whole(other)


def test_last_try_does_not_lose_what_was_waited_for(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """A coordinator that answered once, and has no time to answer again before the time is over."""
    has_answered, may_answer = threading.Event(), threading.Event()
    find = Blocks.find

    def find_late(blocks: Blocks, idstr: str) -> Any:
        if has_answered.is_set():
            may_answer.wait(WAIT_S)
        has_answered.set()
        return find(blocks, idstr)

    monkeypatch.setattr(Blocks, "find", find_late)
    helper = scene.served.helper()
    try:
        with pytest.raises(AttachTimeout, match="waiting for a source at"):
            helper.do(f"attach({RAM!r}, timeout_s={ANSWERED_S})")
    finally:
        may_answer.set()


# ---- precopy alone ----


@pytest.mark.parametrize(
    "given",
    [
        {"with_postcopy": False, "with_return_path": False},
        {"with_postcopy": False, "with_return_path": False, "with_description": False},
        {"with_postcopy": False},
        {},
        {"with_switchover_start": True},
    ],
    ids=["bare", "without description", "return path", "post-copy not begun", "10.0"],
)
def test_precopy_alone(runtime_dir: Path, seed: int, tmp_path: Path, given: dict[str, Any]) -> None:
    """The last of a page's copies counts; device state is kept as it came."""
    kept = tmp_path / "device-state"
    heard: list[Notice] = []
    with scene_of(runtime_dir, seed, device_state=str(kept), notifiers=(heard.append,)) as scene:
        source = scene.source(**given)

        def script(source: Source) -> None:
            source.connect()
            source.precopy(rewrite_share=0.3)
            source.precopy(share=0.5)
            source.finish_precopy()

        play(source, script)
        scene.assert_whole(source)
        assert kept.read_bytes() == DEVICE_STATE
        wait_until(lambda: not scene.path.exists(), "an end of listening")
        shut = source.return_path.messages(Shut)
        assert [answer.status for answer in shut] == ([0] if source.with_return_path else [])
        wait_until(lambda: heard[-1].change is Change.INBOUND_END, "INBOUND_END")
    assert [notice.change for notice in heard if notice.block in (RAM, None)] == list(Change)


def test_device_state_in_small_pieces_is_not_searched_at_each(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """P4: that would be a second of ours for each of its megabytes, and more and more."""
    looked_at: list[int] = []
    split = split_precopy_end

    def look(data: bytes, *, hung_up: bool) -> Any:
        looked_at.append(len(data))
        return split(data, hung_up=hung_up)

    monkeypatch.setattr(reception, "split_precopy_end", look)
    monkeypatch.setattr(reception, "DEVICE_STATE_READ_BYTES", 16)
    source = play(scene.source(with_postcopy=False, device_state=DEVICE_STATE * (64 * 1024 // len(DEVICE_STATE))))
    scene.assert_whole(source)
    assert looked_at[-1] > 60 * 1024
    assert len(looked_at) < looked_at[-1] / 16 / 8


def test_pages_that_never_came_are_no_good_end(scene: Scene) -> None:
    source = scene.source(with_postcopy=False)

    def script(source: Source) -> None:
        source.connect()
        source.precopy(share=0.5)
        source.blocks[RAM].unsent[:] = bytes(N_PAGES)
        with pytest.raises(Refused):
            source.finish_precopy()

    play(source, script)
    scene.wait_for_reason("pages never came")
    assert scene.served.status().blocks == ()


# ---- post-copy ----


@each_preempt
@pytest.mark.parametrize("share", [0.0, 0.6], ids=["at once", "after a pass"])
def test_postcopy(runtime_dir: Path, seed: int, tmp_path: Path, preempt: Preempt, share: float) -> None:
    """G1, G2, D1-D3, E1-E3: discards, requests, zeros, whatever order pages come in; SHUT 0 at the end."""
    kept = tmp_path / "device-state"
    heard: list[Notice] = []
    with scene_of(runtime_dir, seed, device_state=str(kept), notifiers=(heard.append,)) as scene:
        attaching = [scene.attaching() for _ in range(2)]
        source = scene.source(preempt=preempt, rate_bytes_s=8 * MIB)
        with playing(source, lambda source: source.migrate(share)):
            for helper, attached in attaching:
                attached.result()
                assert helper.do("bytes(b)") == source.memory(RAM)
        scene.assert_whole(source)
        assert kept.read_bytes() == DEVICE_STATE
        assert [answer.status for answer in source.return_path.messages(Shut)] == [0]
        assert [answer.value for answer in source.return_path.messages(Pong)] == [1, 2, 3, 4]
        told = scene.served.status().to_json()["source"]
        assert told == {"machine": source.machine, "target_page_size": PAGE, "page_sizes": [PAGE]}
    assert [notice.change for notice in heard if notice.block == ROM] == list(Change)[:3]


@each_preempt
def test_page_that_is_wanted_comes_first(scene: Scene, preempt: Preempt) -> None:
    """D4: and the rest not before it is let go."""
    source = scene.source(preempt=preempt, **scene.lazily)
    with playing(source, lambda source: source.migrate()):
        helper = scene.attached()
        for page in (N_PAGES - 1, 3, N_PAGES // 2):
            assert helper.do(f"read(b, {page * PAGE}, {PAGE})") == source.blocks[RAM].page(page)
        assert scene.block().received_pages + scene.block().hole_pages < N_PAGES // 2
        helper.do(f"b.ensure(slice(0, {20 * PAGE}))")
        source.release()
    scene.assert_whole(source)
    assert scene.block().demand_pages > 0


def test_preempt_channel_that_closes_between_records_breaks_nothing(scene: Scene) -> None:
    """A source that is done with it closes it, while pages are still on their way on the main connection."""
    source = scene.source(preempt=Preempt.V8_0, **scene.lazily)

    def script(source: Source) -> None:
        source.connect()
        source.enter_postcopy()
        helper = scene.attached()
        read = helper.start(f"read(b, {PAGE}, {PAGE})")
        with playing_rest(source):
            assert read.result() == source.blocks[RAM].page(1)
            source.links.pop().close()
            helper.do(f"b.ensure(slice(0, {2 * PAGE}))")
            source.release()

    play(source, script)
    scene.assert_whole(source)
    assert [answer.status for answer in source.return_path.messages(Shut)] == [0]


@each_preempt
def test_huge_pages(scene: Scene, huge_pages: Callable[[int], None], preempt: Preempt) -> None:
    """A5, E1, E2: host pages of 2 MiB are assembled; holes are filled."""
    huge_pages(4)
    blocks = [SourceBlock(RAM, 4 * HUGE_PAGE, HUGE_PAGE, seed=3), SourceBlock(ROM, ROM_BYTES, seed=4)]
    blocks[0].memory[:HUGE_PAGE] = bytes(HUGE_PAGE)
    source = scene.source(blocks, preempt=preempt)
    with playing(source, lambda source: source.migrate(0.5)):
        helper = scene.attached()
        assert helper.do("bytes(b)") == source.memory(RAM)
    scene.assert_whole(source)
    assert scene.served.status().to_json()["source"]["page_sizes"] == [PAGE, HUGE_PAGE]


def test_end_before_every_page_is_no_good_end(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """SHUT 0 only when every byte is placed; who waits for what never came waits, visibly."""
    monkeypatch.setattr(reception, "LAST_PAGES_TIMEOUT_S", SHORT_S)
    source = scene.source(**scene.lazily)

    def script(source: Source) -> None:
        source.connect()
        source.enter_postcopy()
        with pytest.raises(Refused):
            source.finish()

    play(source, script)
    scene.wait_for_state("PAUSED")
    assert f"the source has ended, and {N_PAGES + ROM_BYTES // PAGE} pages never came" in scene.served.status().reason
    helper = scene.attached()
    helper.start("read(b, 0)")
    scene.served.wait_for_waiting(1, helper.pid)


def test_writable_block_and_orders_that_make_no_sense(runtime_dir: Path, seed: int) -> None:
    with scene_of(runtime_dir, seed, writable=[RAM]) as scene:
        source = play(scene.source())
        assert scene.block().writable
        assert not scene.block(ROM).writable
        assert scene.attached().do("b.mode") == "rw"
        with pytest.raises(PcshareError, match="as fast as it likes"):
            scene.served.order(AdminOp.STREAM_LAZY)
        scene.assert_whole(source)


# ---- recovery ----


@each_preempt
def test_link_that_breaks_again_and_again(scene: Scene, preempt: Preempt) -> None:
    """G4, D3, P6: at any byte; who waits goes on waiting and gets the right page."""
    helper, attached = scene.attaching()
    source = scene.source(preempt=preempt)

    def script(source: Source) -> None:
        source.connect()
        source.precopy(share=0.3)
        source.enter_postcopy()
        for after_bytes in (MIDDLE, 1, MIDDLE + 4097, PAGE):
            break_in_postcopy(source, after_bytes)
            scene.wait_for_state("PAUSED")
            assert "waiting for it at qemu+unix:" in scene.served.status().reason
            source.recover()
            scene.wait_for_state("RUNNING")
        source.postcopy()
        source.finish()

    with playing(source, script):
        attached.result()
        assert helper.do("bytes(b)") == source.memory(RAM)
    scene.assert_whole(source)


@each_preempt
def test_request_that_was_outstanding_is_repeated(scene: Scene, preempt: Preempt) -> None:
    source = scene.source(preempt=preempt, **scene.lazily)
    last = N_PAGES - 1

    def script(source: Source) -> None:
        source.connect()
        source.enter_postcopy()
        helper, _ = waiting = scene.attached(), None
        read = helper.start(f"read(b, {last * PAGE}, {PAGE})")
        wait_until(lambda: bool(source.return_path.requests), "a request", WAIT_S)
        source.main.hang_up()
        scene.wait_for_state("PAUSED")
        assert not read.is_done()
        assert waiting[1] is None
        source.recover()
        with playing_rest(source):
            assert read.result() == source.blocks[RAM].page(last)
            source.release()

    play(source, script)
    scene.assert_whole(source)


@contextlib.contextmanager
def playing_rest(source: Source) -> Iterator[None]:
    """postcopy() and finish() beside the script."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            source.postcopy()
            source.finish()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        thread.join(WAIT_S)
    assert not failed, failed


@pytest.mark.parametrize("step", ["silent", "bitmaps", "resume"])
def test_break_during_recovery(scene: Scene, step: str) -> None:
    source = scene.source()

    def script(source: Source) -> None:
        source.connect()
        source.enter_postcopy()
        break_in_postcopy(source)
        for _ in range(2):
            scene.wait_for_state("PAUSED")
            source.begin_recovery()
            if step != "silent":
                source.ask_bitmaps()
            if step == "resume":
                source.resume()
            source.main.hang_up()
        scene.wait_for_state("PAUSED")
        source.recover()
        source.postcopy()
        source.finish()

    play(source, script)
    scene.assert_whole(source)


def header_of_another(connection: socket.socket) -> None:
    connection.sendall(struct.pack(">IIBI", 0x5145564D, 3, 7, 2) + b"pc")


def wrong_block(connection: socket.socket) -> None:
    connection.sendall(struct.pack(">BHH", 8, 10, 6) + b"\5other")


def silence(connection: socket.socket) -> None:
    """Says nothing."""


def garbage(connection: socket.socket) -> None:
    connection.sendall(b"GET / HTTP/1.1\r\n\r\n")


def pages(connection: socket.socket) -> None:
    connection.sendall(struct.pack(">QB", 8, 6) + b"pc.ram" + bytes(PAGE))


def part_of_section(connection: socket.socket) -> None:
    connection.sendall(struct.pack(">BHHBI", 8, 2, 0, 2, 3))


@pytest.mark.parametrize("say", [header_of_another, wrong_block, garbage, pages, part_of_section])
def test_wrong_peer_is_hung_up_on_and_the_waiting_goes_on(scene: Scene, say: Callable[[socket.socket], None]) -> None:
    source = scene.source()

    def script(source: Source) -> None:
        source.connect()
        source.enter_postcopy()
        break_in_postcopy(source)
        scene.wait_for_state("PAUSED")
        with contextlib.closing(to_unix(scene.path)()) as stranger, contextlib.closing(to_unix(scene.path)()):
            say(stranger)  # and another one says nothing at all
            stranger.settimeout(WAIT_S)
            with contextlib.suppress(ConnectionResetError):
                assert stranger.recv(100) == b""
            assert scene.served.status().state == "PAUSED"
            source.recover()
            source.postcopy()
            source.finish()

    play(source, script)
    scene.assert_whole(source)


def test_stranger_beside_a_migration_disturbs_nobody(scene: Scene) -> None:
    """P4: neither one that talks nonsense, nor those that fill the room. Who sends pages of a block is believed:
    nothing tells a preempt channel from a stranger."""
    source = scene.source(preempt=Preempt.V8_0)

    def script(source: Source) -> None:
        with contextlib.ExitStack() as strangers:
            source.connect()
            source.precopy(share=0.3)
            for say in (header_of_another, garbage, wrong_block, *[silence] * 10):
                say(strangers.enter_context(contextlib.closing(to_unix(scene.path)())))
            source.enter_postcopy()
            source.postcopy()
            source.finish()

    play(source, script)
    scene.assert_whole(source)


def test_source_that_never_returns_is_given_up(runtime_dir: Path, seed: int) -> None:
    """P3: by the policy poison a touch of what is missing is SIGBUS; and if it does return, it completes after all."""
    with scene_of(runtime_dir, seed, poison=True, source_timeout_s=SHORT_S) as scene:
        source = scene.source(**scene.lazily)
        last = N_PAGES - 1

        def script(source: Source) -> None:
            source.connect()
            source.enter_postcopy()
            waiting = scene.attached()
            waiting.start(f"read(b, {last * PAGE})")
            scene.served.wait_for_waiting(1, waiting.pid)
            source.main.hang_up()
            assert -waiting.wait_for_end() == signal.SIGBUS
            scene.wait_for_reason("no source has come back within")
            helper = scene.attached()
            with pytest.raises(SourceLost):
                helper.do("b.ensure()")
            source.release()
            source.recover()
            scene.wait_for_state("RUNNING")
            source.postcopy()
            source.finish()
            assert helper.do("bytes(b)") == source.memory(RAM)

        play(source, script)
        scene.assert_whole(source)


# ---- connections that cannot be taken ----


@pytest.mark.parametrize("what", ["Inbound", "IncomingStream"])
def test_source_that_cannot_be_taken_is_hung_up_on(scene: Scene, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """P4: no fds are left, or no memory: the next one may have more luck."""
    real, failures = getattr(incoming, what), [PcshareError("no fds are left")]

    def take(*given: Any) -> Any:
        if failures:
            raise failures.pop()
        return real(*given)

    monkeypatch.setattr(incoming, what, take)
    play(scene.source(), lambda source: source.is_refused(lambda: source.migrate()))
    assert not failures
    scene.assert_whole(play(scene.source()))


def test_recovery_that_cannot_be_taken_leaves_it_paused(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """P6: who waits goes on waiting."""
    helper, attached = scene.attaching()
    source = scene.source()
    real, failures = IncomingStream, [PcshareError("no memory")]

    def take(*given: Any) -> Any:
        if failures:
            raise failures.pop()
        return real(*given)

    def script(source: Source) -> None:
        source.connect()
        source.enter_postcopy()
        break_in_postcopy(source)
        scene.wait_for_state("PAUSED")
        monkeypatch.setattr(incoming, "IncomingStream", take)
        with contextlib.closing(to_unix(scene.path)()) as other:
            part_of_section(other)
            other.settimeout(WAIT_S)
            with contextlib.suppress(ConnectionResetError):
                assert other.recv(1) == b""
        assert not failures
        source.recover()
        source.postcopy()
        source.finish()

    with playing(source, script):
        attached.result()
        assert helper.do("bytes(b)") == source.memory(RAM)
    scene.assert_whole(source)


MULTIFD_HELLO = struct.pack(">II16sB7x32x", 0x11223344, 1, bytes(16), 0)


@contextlib.contextmanager
def multifd(scene: Scene, n: int = 2) -> Iterator[None]:
    """Connections as multifd opens them besides its first; they are hung up on."""
    with contextlib.ExitStack() as closing:
        links = [closing.enter_context(contextlib.closing(to_unix(scene.path)())) for _ in range(n)]
        for link in links:
            link.sendall(MULTIFD_HELLO)
        yield
        for link in links:
            link.settimeout(WAIT_S)
            with contextlib.suppress(ConnectionResetError):
                assert link.recv(1) == b""


def test_multifd_is_refused_by_its_name(scene: Scene) -> None:
    """A7: its other connections say what its first one does not; the source hears that its machine goes on there."""
    source = scene.source(with_postcopy=False)

    def script(source: Source) -> None:
        source.connect()
        wait_until(lambda: bool(source.return_path.messages(Pong)), "the return path", WAIT_S)
        with multifd(scene):
            source.return_path.wait_for_hang_up()

    play(source, lambda source: source.is_refused(lambda: script(source)))
    assert "migrate_set_capability multifd off" in scene.wait_for_reason("(the last one: ")
    assert [answer.status for answer in source.return_path.messages(Shut)] == [1]
    scene.assert_whole(play(scene.source()))


def test_multifd_that_speaks_before_its_main_connection(scene: Scene) -> None:
    """Its threads do not wait for each other."""
    with contextlib.closing(to_unix(scene.path)()) as main:
        with multifd(scene):
            scene.wait_for_reason("migrate_set_capability multifd off")
        header_of_another(main)
        main.settimeout(WAIT_S)
        with contextlib.suppress(ConnectionResetError):
            assert main.recv(1) == b""
    scene.assert_whole(play(scene.source()))


def test_multifd_beside_a_postcopy_disturbs_nobody(scene: Scene) -> None:
    source = scene.source()

    def script(source: Source) -> None:
        source.connect()
        source.enter_postcopy()
        scene.wait_for_state("RUNNING")
        with multifd(scene):
            source.postcopy()
        source.finish()

    play(source, script)
    scene.assert_whole(source)


def test_source_that_fell_silent_makes_room_for_another(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before LISTEN, and not at once: who is there has the place."""
    silent = scene.source()

    def script(source: Source) -> None:
        source.connect()
        source.precopy(share=0.2)
        early = scene.source()
        play(early, lambda early: early.is_refused(lambda: early.migrate()))
        monkeypatch.setattr(incoming, "SILENT_SOURCE_S", SHORT_S)
        wait_until(lambda: is_taken_and_whole(scene), "a source that is taken", WAIT_S)
        source.return_path.wait_for_hang_up()
        assert [answer.status for answer in source.return_path.messages(Shut)] == [1]
        source.close()

    play(silent, script)


def is_taken_and_whole(scene: Scene) -> bool:
    source = scene.source()
    try:
        play(source)
    except HungUp:
        return False
    scene.assert_whole(source)
    return True


# ---- refusals ----


def refused(scene: Scene, source: Source, script: Callable[[Source], object]) -> str:
    """What `pcshare status` then says of it; the source goes on by itself."""
    play(source, lambda source: source.is_refused(lambda: script(source)))
    return scene.wait_for_reason("(the last one: ")


def test_veto_reaches_status_and_source(runtime_dir: Path, seed: int) -> None:
    """A7: per block, with its reason; what comes next is another matter."""
    vetoes = ["not on my host"]

    def veto(notice: Notice) -> None:
        if notice == Notice(Change.PROBE, ROM) and vetoes:
            raise Vetoed(vetoes.pop())

    with scene_of(runtime_dir, seed, notifiers=(veto,)) as scene:
        source = scene.source()
        assert "not on my host" in refused(scene, source, lambda source: source.connect())
        assert [answer.status for answer in source.return_path.messages(Shut)] == [1]
        assert scene.served.status().blocks == ()
        scene.assert_whole(play(scene.source()))


@pytest.mark.parametrize("change", [Change.INBOUND_ADVISE, Change.INBOUND_LISTEN])
def test_notifier_that_fails_ends_the_migration(runtime_dir: Path, seed: int, change: Change) -> None:
    """G2, G3: half-way, and nothing of it is left."""
    failures = [PcshareError("out of order")]

    def fail(notice: Notice) -> None:
        if notice == Notice(change, ROM) and failures:
            raise failures.pop()

    with scene_of(runtime_dir, seed, notifiers=(fail,)) as scene:
        source = scene.source()
        assert "out of order" in refused(scene, source, lambda source: source.migrate(0.5))
        assert scene.served.status().blocks == ()
        scene.assert_whole(play(scene.source()))


@pytest.mark.parametrize(
    ("tamper", "text"),
    [
        ({"configuration": instead_of(b"\7\0\0\0\0")}, "machine's name has 0 bytes"),
        ({"ram-start": instead_of(b"\2\0\0\0\3")}, "a section PART before RAM is announced"),
        ({"advise": instead_of(b"")}, "no POSTCOPY_ADVISE"),
        ({"footer:1": instead_of(b"\x7e\0\0\0\4")}, "footer of section 4"),
        ({"listen": instead_of(b"")}, "package"),
        ({"record:5": instead_of(struct.pack(">Q", RAM_BYTES | 8 | 0x20) + bytes(PAGE))}, "at byte "),
        ({"record:5": instead_of(struct.pack(">Q", 0x40 | 0x20))}, "xbzrle"),
    ],
)
def test_what_a_source_must_not_say(scene: Scene, tamper: dict[str, Any], text: str) -> None:
    source = scene.source(tamper=tamper)
    assert text in refused(scene, source, lambda source: source.migrate(0.5))
    assert scene.served.status().blocks == ()
    scene.assert_whole(play(scene.source()))


def test_device_state_that_cannot_be_kept_ends_the_migration(runtime_dir: Path, seed: int, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with scene_of(runtime_dir, seed, device_state=str(folder / "state")) as scene:
        folder.rmdir()
        source = scene.source()
        assert "cannot keep the device state" in refused(scene, source, lambda source: source.migrate())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"stream_mode": LAZY}, "--stream"),
        ({"page_size": HUGE_PAGE}, "--page-size"),
        ({"device_state": "/no/such/folder/file"}, "--device-state"),
    ],
)
def test_options_that_do_not_go_with_a_migration(runtime_dir: Path, options: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text), scene_of(runtime_dir, 0, **options):
        raise AssertionError("it started")


def test_device_state_without_a_migration_is_refused(runtime_dir: Path) -> None:
    with pytest.raises(UsageError, match="--device-state"), serving("zero:4K", device_state="/tmp/x"):
        raise AssertionError("it started")


def test_device_state_file_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.write_bytes(b"before")
    file = DeviceStateFile(str(path))
    file.write(b"x" * 100_000)
    assert path.read_bytes() == b"x" * 100_000
    assert path.stat().st_mode & 0o777 == 0o600
    assert [child.name for child in tmp_path.iterdir()] == ["state"]


# ---- ending at any moment ----


@pytest.mark.parametrize("moment", ["connected", "announced", "precopy", "postcopy", "paused", "recovering"])
def test_coordinator_ends_at_any_moment(
    runtime_dir: Path, seed: int, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G3, P7: it does not wait for a source that is silent, and the source sees it go."""
    monkeypatch.setattr(reception, "LAST_WORDS_TIMEOUT_S", WAIT_S)
    with scene_of(runtime_dir, seed) as scene, contextlib.ExitStack() as closing:
        source = scene.source(preempt=Preempt.V7_2, **scene.lazily)
        closing.callback(source.close)
        if moment == "connected":
            closing.enter_context(contextlib.closing(to_unix(scene.path)())).sendall(b"QEVM")
            scene.wait_for_reason("waiting for LISTEN")
        else:
            source.connect()
            scene.wait_for_reason("waiting for LISTEN")
        if moment == "precopy":
            source.precopy(share=0.5)
        if moment in ("postcopy", "paused", "recovering"):
            source.enter_postcopy()
            scene.wait_for_state("RUNNING")
        if moment in ("paused", "recovering"):
            source.main.hang_up()
            scene.wait_for_state("PAUSED")
        if moment == "recovering":
            source.begin_recovery()
            source.ask_bitmaps()
        before_s = time.monotonic()
        scene.served.close()
        assert time.monotonic() - before_s < reception.LAST_WORDS_TIMEOUT_S
        if moment not in ("connected", "paused"):
            source.return_path.wait_for_hang_up()


def test_source_that_breaks_before_it_hears_of_the_end(scene: Scene) -> None:
    """Every page is here; it has to be told all the same, or it waits for ever."""
    source = scene.source()

    def script(source: Source) -> None:
        source.connect()
        source.enter_postcopy()
        source.postcopy()
        scene.wait_for_state("END")
        source.main.hang_up()
        scene.wait_for_reason("every page is here, but the source does not know")
        source.recover()
        source.postcopy()
        source.finish()

    play(source, script)
    scene.assert_whole(source)
    wait_until(lambda: scene.served.status().reason == "", "an end of the reason")


def test_blocks_that_came_are_exported(runtime_dir: Path, seed: int) -> None:
    """From LISTEN on, under their names."""
    place = runtime_dir / "nbd.sock"
    with scene_of(runtime_dir, seed, exports=(str(place),)) as scene:
        source = play(scene.source())
        with open_source(parse_argument(f"copy=nbd+unix:///{RAM}?socket={place}")) as copy:
            assert copy.used_length == RAM_BYTES
        scene.assert_whole(source)
