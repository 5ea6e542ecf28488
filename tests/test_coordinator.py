"""The coordinator: its start and end in any order, the life of its blocks, who attaches and who is turned away."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import resource
import select
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pcshare import fds, probe, protocol, status, transport
from pcshare.coordinator import Options, Server, door, handshake, server
from pcshare.coordinator.blocks import Blocks
from pcshare.coordinator.door import Door
from pcshare.coordinator.options import PAGE_SIZE_AUTO
from pcshare.coordinator.parent import ParentLink
from pcshare.core import lib
from pcshare.errors import CoordinatorGone, LimitReached, PcshareError, Vetoed
from pcshare.fault_thread import FaultThreads
from pcshare.fds import OwnedFd
from pcshare.keeper import Keeper
from pcshare.notifier import Change, Notice
from pcshare.protocol import AdminOp, Map, Mode
from pcshare.sources import parse_arguments
from pcshare.trace import TraceFile
from pcshare.uffd import Uffd
from serving_child import HandOver
from support import wait_until
from support_serving import EAGER, HUGE_PAGE, LAZY, PAGE, WAIT_S, HelperProcess, Serving, make_file, serving

N_PAGES = 50
LENGTH = N_PAGES * PAGE - 5


@pytest.fixture
def served(runtime_dir: Path, data_file: Path) -> Iterator[Serving]:
    with serving(f"data={data_file}", stream_mode=LAZY) as made:
        yield made


def options(*sources: str, **given: Any) -> Options:
    return Options(name=f"own-{os.getpid()}", sources=parse_arguments(sources), **given)


# ---- the life of blocks ----


def test_notifiers_hear_each_change_of_each_block_in_order(runtime_dir: Path, data_file: Path) -> None:
    """G2, A7: PROBE of all before anything is made; the end when every page is in and nobody is in its path."""
    heard: list[Notice] = []
    with serving(f"a={data_file}", f"b={data_file}", stream_mode=EAGER, notifiers=(heard.append,)) as served:
        for idstr in "ab":
            served.wait_for_state("END", idstr)
        wait_until(lambda: heard[-1].change is Change.INBOUND_END, "INBOUND_END")
    assert heard == [
        Notice(Change.PROBE, "a"),
        Notice(Change.PROBE, "b"),
        Notice(Change.INBOUND_ADVISE, "a"),
        Notice(Change.INBOUND_LISTEN, "a"),
        Notice(Change.INBOUND_ADVISE, "b"),
        Notice(Change.INBOUND_LISTEN, "b"),
        Notice(Change.INBOUND_END, None),
    ]


@pytest.mark.parametrize("change", [Change.PROBE, Change.INBOUND_ADVISE, Change.INBOUND_LISTEN])
def test_what_a_notifier_raises_reaches_the_caller_and_ends_the_start(
    runtime_dir: Path, data_file: Path, change: Change
) -> None:
    """A7, G2, G3: with its reason, and nothing stays behind."""

    def veto(notice: Notice) -> None:
        if notice == Notice(change, "b"):
            raise Vetoed("no room for b")

    with (
        pytest.raises(Vetoed, match="no room for b"),
        serving(f"a={data_file}", f"b={data_file}", notifiers=(veto,)),
    ):
        raise AssertionError("it started")


def test_block_goes_through_its_states(runtime_dir: Path, data_file: Path, tmp_path: Path) -> None:
    """G1, B1, B4: as its creator hears it."""
    broken = tmp_path / "broken"
    broken.touch()
    ours, theirs = socket.socketpair()
    heard: list[dict[str, Any]] = []

    def listen() -> None:
        with ours.makefile("r") as lines:
            for line in lines:
                heard.append(json.loads(line))
                if heard[-1]["event"] == "PROBE":
                    ours.sendall(json.dumps({"id": heard[-1]["id"], "ok": True}).encode() + b"\n")

    listener = threading.Thread(target=listen)
    listener.start()
    chosen = options(f"data={data_file}#error=EIO@{broken}")
    link = ParentLink(theirs.detach(), 5.0)
    made = Serving(Server(chosen, Keeper.spawn(), link))
    with contextlib.closing(link), contextlib.closing(made):
        made.start()
        made.wait_for_state("PAUSED")
        broken.unlink()
        made.order(AdminOp.RESUME)
        made.wait_for_state("END")
    listener.join()
    ours.close()
    states = [one["state"] for one in heard if one["event"] == "state"]
    assert states == ["ADVISE", "DISCARD", "LISTENING", "RUNNING", "PAUSED", "RUNNING", "END"]
    assert [one["event"] for one in heard if one["event"] != "state"] == [
        "PROBE", "INBOUND_ADVISE", "INBOUND_LISTEN", "ready", "INBOUND_END"
    ]  # fmt: skip


def test_creator_is_told_all_that_happens_before_it_serves_however_much(runtime_dir: Path) -> None:
    """A thousand blocks say more than a socket holds, and the creator answers all of it."""
    ours, theirs = socket.socketpair()
    events = [*({"event": "state", "block": f"b{number}"} for number in range(3000)), {"event": "ready"}]

    def tell() -> None:
        for event in events[:-1]:
            link.send(**event)
        link.tell_ready()
        while link.drain():  # what the loop does from then on
            select.select([link], [], [])

    with contextlib.closing(ParentLink(theirs.detach(), 60.0)) as link:
        teller = threading.Thread(target=tell)
        teller.start()
        with ours, ours.makefile("r") as lines:
            heard = []
            for _ in events:
                heard.append(json.loads(next(lines)))
                ours.sendall(b'{"id": 1, "ok": true, "reason": ""}\n')
        teller.join()
    assert heard == events


def test_creator_that_does_not_read_holds_up_nobody_and_loses_whole_lines(runtime_dir: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours, contextlib.closing(ParentLink(theirs.detach(), 60.0)) as link, ours.makefile("r") as lines:
        link.tell_ready()
        for number in range(1000):
            link.send(number=number, text="x" * 100_000)
        numbers = []
        for line in lines:
            told = json.loads(line)
            numbers.append(told.get("number"))
            if len(numbers) == 2:
                link.send(event="last")  # the rest of the line that broke off goes before
            if told.get("event") == "last":
                break
    assert numbers[1:-1] == list(range(len(numbers) - 2))
    assert len(numbers) < 1000


def test_end_of_the_creator_ends_it(runtime_dir: Path, data_file: Path) -> None:
    """P7."""
    ours, theirs = socket.socketpair()
    link = ParentLink(theirs.detach(), 5.0)
    made = Serving(Server(options(f"data={data_file}", stream_mode=LAZY), Keeper.spawn(), link))
    made.server.notifiers.remove(link.notify)  # nobody would answer PROBE
    with contextlib.closing(link), contextlib.closing(made):
        made.start()
        ours.close()
        made.join()
    assert made.error is None


def test_several_blocks_are_served_side_by_side(runtime_dir: Path, tmp_path: Path, rng: random.Random) -> None:
    files = [make_file(tmp_path, rng, 1 + 3000 * number, f"{number}.bin") for number in range(20)]
    sources = [f"b{number}={path}" for number, path in enumerate(files)]
    with serving(*sources, "scratch=zero:1M", stream_mode=LAZY) as served:
        helper = served.helper()
        helper.do("blocks = [attach(f'b{number}') for number in range(20)]; s = attach('scratch'); s[0:3] = b'new'")
        assert helper.do("[bytes(block) for block in blocks]") == [path.read_bytes() for path in files]
        wait_until(lambda: served.status().state == "END", "the end of them all")
        assert [block.idstr for block in served.status().blocks] == [*(f"b{n}" for n in range(20)), "scratch"]
        assert served.block("scratch").writable


# ---- start and end ----


def test_page_size_auto_takes_huge_pages_if_all_blocks_have_them(
    runtime_dir: Path, data_file: Path, huge_pages: Callable[[int], None]
) -> None:
    huge_pages(2)
    with serving(f"a={data_file}", "b=zero:4K", page_size=PAGE_SIZE_AUTO) as served:
        assert [served.block(name).page_size for name in "ab"] == [HUGE_PAGE, HUGE_PAGE]
    with serving(f"a={data_file}", "b=zero:1T", page_size=PAGE_SIZE_AUTO) as served:
        assert [served.block(name).page_size for name in "ab"] == [PAGE, PAGE]


def test_close_before_start_and_twice(runtime_dir: Path, data_file: Path) -> None:
    """G3: at any state."""
    made = Server(options(f"data={data_file}"), Keeper.spawn())
    made.close()
    made.close()
    made.stop()


def test_close_after_start_without_a_loop_and_twice(runtime_dir: Path, data_file: Path) -> None:
    """G3."""
    made = Server(options(f"data={data_file}"), Keeper.spawn())
    made.start()
    made.close()
    made.close()


@pytest.mark.parametrize("mode", [EAGER, LAZY])
@pytest.mark.parametrize("filters", ["", "#delay=60s", "#rate=1K"])
def test_close_in_the_middle_leaves_nothing(runtime_dir: Path, data_file: Path, mode: int, filters: str) -> None:
    """G3, C7, P7: with a helper that waits, whatever the source is doing; it meets SIGBUS, not zeros (P1)."""
    with serving(f"data={data_file}{filters}", stream_mode=mode) as served:
        helper = HelperProcess(served.socket)
        helper.do("b = attach()")
        if filters:
            helper.start(f"read(b, {LENGTH - 1})")
            served.wait_for_waiting(1)
    with helper:
        if filters:
            assert helper.wait_for_end() == -signal.SIGBUS


@pytest.mark.parametrize(
    ("where", "name"),
    [
        (probe, "require_host"),
        (status, "SegmentWriter"),
        (TraceFile, "start"),
        (Blocks, "open_sources"),
        (FaultThreads, "start"),
        (server, "Helpers"),
        (Blocks, "_discard_all"),
        (fds, "open_uffd_device"),
        (server, "Listener"),
        (Door, "open"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_failure_half_way_leaves_nothing(
    runtime_dir: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: Any, name: str
) -> None:
    """G3, P7: whichever step of the start fails; close() once more is fine; the name is free again."""
    chosen = options(f"a={data_file}", f"b={data_file}", trace=str(tmp_path / "trace"))

    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError(name)

    made = Server(chosen, Keeper.spawn())
    with monkeypatch.context() as patched:
        patched.setattr(where, name, fail)
        with pytest.raises(MemoryError, match=name):
            made.start()
    made.close()
    again = Server(chosen, Keeper.spawn())
    again.start()
    again.close()


def test_keepers_death_ends_it_with_the_reason(runtime_dir: Path, data_file: Path) -> None:
    """P3: no page can be placed any more, so helpers are told and not left waiting."""
    made = Serving(Server(options(f"data={data_file}", stream_mode=LAZY), Keeper.spawn()))
    with contextlib.closing(made):
        made.start()
        with HelperProcess(made.socket) as helper:
            helper.do("b = attach()")
            os.kill(made.server._keeper.pid, signal.SIGKILL)
            made.join()
            assert isinstance(made.error, PcshareError)
            assert made.error.errno == errno.EPIPE
            assert "the keeper is gone" in str(made.error)


def test_stop_order_ends_it(served: Serving) -> None:
    served.order(AdminOp.STOP)
    served.join()


def test_status_names_the_process_that_serves_and_its_keeper(served: Serving) -> None:
    status = served.status()
    assert (status.pid, status.keeper_pid) == (os.getpid(), served.server._keeper.pid)
    assert status.alive


# ---- limits ----


def hung_up(connection: transport.Connection) -> bool:
    """Whether the next thing that comes is its end."""
    with pytest.raises(CoordinatorGone):
        connection.receive(WAIT_S)
    return True


def test_helper_above_the_limit_is_told_and_one_that_leaves_makes_room(runtime_dir: Path, data_file: Path) -> None:
    with serving(f"data={data_file}", stream_mode=LAZY, helpers_max=2) as served:
        helper = served.helper()
        helper.do("blocks = [attach(), attach()]")
        with pytest.raises(LimitReached, match="2 helpers are attached") as caught:
            helper.do("attach()")
        assert caught.value.errno == errno.EUSERS
        assert "--helpers-max" in str(caught.value)
        assert helper.do("read(blocks[1], 0)") == data_file.read_bytes()[:1]
        helper.do("blocks.pop().close()")
        wait_until(lambda: len(served.status().helpers) == 1, "one to have left")
        helper.do("blocks.append(attach())")


def test_limit_does_not_keep_anybody_from_a_complete_block(runtime_dir: Path, data_file: Path) -> None:
    """It needs no place in the table."""
    with serving(f"data={data_file}", f"other={data_file}", stream_mode=LAZY, helpers_max=1) as served:
        helper = served.helper()
        helper.do("b = attach('data'); b.ensure()")
        served.wait_for_state("END")
        wait_until(lambda: not served.status().helpers, "the helper to have heard, and left its place")
        helper.do("o = attach('other'); c = attach('data')")
        assert helper.do("c.state, bytes(c)") == ("complete", data_file.read_bytes())


def test_coordinator_without_fds_left_goes_on_and_accepts_when_there_are_some(
    served: Serving, data_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """P4."""
    first, second, content = served.helper(), served.helper(), data_file.read_bytes()
    first.do("b = attach()")
    wait_until(
        lambda: all(thread.name != "closing" for thread in threading.enumerate()), "its first connection to be closed"
    )
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))), before[1]))
    filled = []
    with contextlib.suppress(OSError):
        while True:
            filled.append(os.dup(0))
    try:
        pending = second.start("b = attach(); read(b, 0)")
        wait_until(lambda: "cannot accept a helper" in caplog.text, "the warning")
        assert first.do(f"read(b, {PAGE})") == content[PAGE : PAGE + 1]
    finally:
        for fd in filled:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert pending.result() == content[:1]


def test_connection_that_says_nothing_is_hung_up_on_in_time(
    served: Serving, monkeypatch: pytest.MonkeyPatch, data_file: Path
) -> None:
    """P4: with the reason."""
    monkeypatch.setattr(handshake, "HANDSHAKE_TIMEOUT_S", 0.1)
    with transport.connect(served.socket, WAIT_S) as silent:
        data, _ = silent.receive(WAIT_S)
        answer = protocol.parse(data, 0)
        assert isinstance(answer, protocol.ErrorMessage)
        assert (answer.error, "nothing came for 0.1 s" in answer.text) == (errno.ETIMEDOUT, True)
        assert hung_up(silent)


def test_idle_connections_keep_nobody_out(served: Serving, monkeypatch: pytest.MonkeyPatch, data_file: Path) -> None:
    """P4: more of them than are kept at once."""
    monkeypatch.setattr(door, "HANDSHAKES_MAX", 8)
    idle = [transport.connect(served.socket, WAIT_S) for _ in range(30)]
    helper = served.helper()
    assert helper.do("b = attach(); read(b, 0)") == data_file.read_bytes()[:1]
    for connection in idle:
        connection.close()
    wait_until(lambda: not served.server.door.handshakes, "the idle ones to be forgotten")


def test_connection_that_is_given_up_while_it_speaks_disturbs_nobody(
    runtime_dir: Path, data_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P4: found readable in the same turn of the loop in which another took its place."""
    monkeypatch.setattr(door, "HANDSHAKES_MAX", 1)
    made = Server(options(f"data={data_file}", stream_mode=LAZY), Keeper.spawn())
    made.start()
    path = str(made._listener.path)
    with contextlib.closing(made), transport.connect(path, WAIT_S) as first:
        made._turn()
        with transport.connect(path, WAIT_S) as second:  # before the first speaks, so that it is accepted first
            first.send(b"hello")
            made._turn()
            assert list(made.door.handshakes) == [one.connection.fileno() for one in made.door.handshakes.values()]
            second.send(protocol.pack_hello("data"))
            made._turn()
            data, fds = second.receive(WAIT_S)
            assert isinstance(protocol.parse(data, len(fds)), protocol.Welcome)
            for fd in fds:
                fd.close()


# ---- who is turned away ----


def refusal(served: Serving, *messages: bytes, fds: tuple[int, ...] = ()) -> protocol.ErrorMessage:
    """What it answers to the last of these; it hangs up then. The fds go with the last."""
    with transport.connect(served.socket, WAIT_S) as connection:
        for number, message in enumerate(messages):
            connection.send(message, fds if number == len(messages) - 1 else ())
            data, received = connection.receive(WAIT_S)
            answer = protocol.parse(data, len(received))
            for fd in received:
                fd.close()
        assert isinstance(answer, protocol.ErrorMessage), answer
        assert hung_up(connection)
    return answer


HELLO = protocol.pack_hello("data")
ONE_MAP = protocol.pack_attach([Map(1 << 40, 0, PAGE)])


@pytest.mark.parametrize(
    ("messages", "error", "text"),
    [
        ((b"GET / HTTP/1.1\r\n\r\n",), errno.EPROTO, "magic"),
        ((b"x",), errno.EPROTO, "1 bytes"),
        ((HELLO[:-1],), errno.EPROTO, "HELLO of 87 bytes that says 88"),
        ((b"\0" * 5000,), errno.EPROTO, "cut off"),
        ((HELLO[:4] + b"\x09\0" + HELLO[6:],), errno.EPROTONOSUPPORT, "speaks version 9"),
        ((HELLO[:16] + b"\x05\0\x09\0" + HELLO[20:],), errno.EPROTONOSUPPORT, "versions 5 to 9, this coordinator 1"),
        ((protocol.pack_hello("other"),), errno.ENODEV, "no block 'other' here (there are: data)"),
        ((protocol.pack_hello("data", Mode.RW),), errno.EROFS, "block data is read-only"),
        ((ONE_MAP,), errno.EPROTO, "ATTACH with 0 fds"),
        ((HELLO, HELLO), errno.EPROTO, "Hello out of turn"),
        ((protocol.pack_leave(),), errno.EPROTO, "Leave out of turn"),
        ((protocol.pack_request(0, 1, 1),), errno.EPROTO, "Request out of turn"),
        ((protocol.pack_bye(),), errno.EPROTO, "Bye out of turn"),
        ((HELLO, protocol.pack_admin(AdminOp.STOP)), errno.EPROTO, "Admin out of turn"),
        ((HELLO, ONE_MAP), errno.EPROTO, "ATTACH with 0 fds"),
        ((protocol.pack_admin(AdminOp.STREAM_RATE, 0),), errno.EINVAL, "at least 1 byte"),
    ],
)
def test_what_is_wrong_is_refused_with_its_reason_and_others_are_served(
    served: Serving, data_file: Path, messages: tuple[bytes, ...], error: int, text: str
) -> None:
    """P4, P7, P8."""
    helper = served.helper()
    helper.do("b = attach()")
    fds = len(os.listdir("/proc/self/fd"))
    answer = refusal(served, *messages)
    assert (answer.error, answer.version_max) == (error, protocol.VERSION)
    assert text in answer.text
    # Fewer where the attach's first connection was still being closed when they were counted.
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= fds, "the connection's fds to be closed")
    assert helper.do("read(b, 0)") == data_file.read_bytes()[:1]
    assert len(served.status().helpers) == 1


def attach_maps(served: Serving, make_maps: Callable[[int, int], list[Map]]) -> protocol.ErrorMessage:
    """A hand-over that is right but for its maps."""
    with made_hand_over(served, "register") as helper:
        maps = make_maps(helper.addr, helper.described.map_length)
        helper.connection.send(protocol.pack_attach(maps), [helper.uffd.fileno()])
        return answer_of(helper.connection)


@contextlib.contextmanager
def made_hand_over(served: Serving, until: str) -> Iterator[HandOver]:
    """In this process, which touches nothing of it."""
    helper = HandOver(served.socket, until)
    try:
        yield helper
    finally:
        helper.connection.close()
        for fd in getattr(helper, "fds", []):
            fd.close()
        if hasattr(helper, "memory"):
            helper.memory.close()
            helper.uffd.close()


def answer_of(connection: transport.Connection) -> protocol.ErrorMessage:
    data, _ = connection.receive(WAIT_S)
    answer = protocol.parse(data, 0)
    assert isinstance(answer, protocol.ErrorMessage), answer
    return answer


@pytest.mark.parametrize(
    ("make_maps", "error"),
    [
        (lambda addr, length: [Map(addr, 0, 0)], errno.EINVAL),
        (lambda addr, length: [Map(addr + 1, 0, PAGE)], errno.EINVAL),
        (lambda addr, length: [Map(addr, 1, PAGE)], errno.EINVAL),
        (lambda addr, length: [Map(addr, 0, PAGE - 1)], errno.EINVAL),
        (lambda addr, length: [Map(addr, PAGE, length)], errno.ERANGE),
        (lambda addr, length: [Map(addr, 0, length + PAGE)], errno.ERANGE),
        (lambda addr, length: [Map(addr, 2**63, PAGE)], errno.ERANGE),
        (lambda addr, length: [Map(2**64 - PAGE, 0, PAGE)], errno.ERANGE),
        (lambda addr, length: [Map(addr, 0, 2 * PAGE), Map(addr + PAGE, 2 * PAGE, PAGE)], errno.EINVAL),
        (lambda addr, length: [Map(0, 0, PAGE)], errno.EINVAL),
    ],
)
def test_maps_that_cannot_be_are_refused(
    served: Serving, make_maps: Callable[[int, int], list[Map]], error: int
) -> None:
    """P4."""
    assert attach_maps(served, make_maps).error == error
    assert not served.status().helpers


def other_fd(kind: str, features: int) -> OwnedFd:
    if kind == "no uffd":
        return OwnedFd(os.open("/dev/null", os.O_RDONLY))
    uffd = Uffd.open()
    if kind == "more features":
        uffd.api(features | lib.UFFD_FEATURE_BIT_EVENT_FORK)
    return uffd


@pytest.mark.parametrize(
    ("kind", "error"), [("no uffd", errno.EBADF), ("no handshake", errno.EINVAL), ("more features", errno.EPERM)]
)
def test_fd_that_is_not_the_uffd_that_was_asked_for_is_refused(served: Serving, kind: str, error: int) -> None:
    """P4, A1."""
    with made_hand_over(served, "register") as helper, other_fd(kind, helper.described.features) as fd:
        message = protocol.pack_attach([Map(helper.addr, 0, helper.described.map_length)])
        helper.connection.send(message, [fd.fileno()])
        answer = answer_of(helper.connection)
        assert answer.error == error
        assert "not the userfaultfd that was asked for" in answer.text


def test_uffd_before_its_handshake_polls_as_an_error() -> None:
    """T16: one more reason to take none before; after it nothing is there to be seen."""
    poll = select.poll()
    with Uffd.open() as uffd:
        poll.register(uffd.fileno(), select.POLLIN)
        assert poll.poll(0) == [(uffd.fileno(), select.POLLERR)]
        uffd.api(0)
        assert poll.poll(0) == []


def test_uffd_that_is_registered_already_is_refused(served: Serving) -> None:
    """P4."""
    with made_hand_over(served, "ack") as first, made_hand_over(served, "welcome") as second:
        message = protocol.pack_attach([Map(first.addr, 0, first.described.map_length)])
        second.connection.send(message, [first.uffd.fileno()])
        answer = answer_of(second.connection)
        assert (answer.error, "registered already" in answer.text) == (errno.EEXIST, True)
        assert len(served.status().helpers) == 1
        first.memory.close()


def test_uffd_of_a_helper_that_was_cut_off_is_refused_as_that(served: Serving) -> None:
    """P4: who tries again reads why it is in vain."""
    with made_hand_over(served, "ack") as first, made_hand_over(served, "welcome") as second:
        first.connection.send(b"nonsense" * 8)
        wait_until(lambda: [helper.state for helper in served.status().helpers] == ["disabled"], "it to be cut off")
        message = protocol.pack_attach([Map(first.addr, 0, first.described.map_length)])
        second.connection.send(message, [first.uffd.fileno()])
        answer = answer_of(second.connection)
        assert (answer.error, "was cut off" in answer.text) == (errno.EEXIST, True)
        first.memory.close()


def test_block_that_ends_during_a_hand_over_is_acknowledged_as_complete(served: Serving, data_file: Path) -> None:
    """P3: no uffd is kept, and none is needed."""
    other = served.helper()
    other.do("b = attach()")
    with made_hand_over(served, "register") as late:
        other.do("b.ensure()")
        served.wait_for_state("END")
        late.attach()
        data, _ = late.connection.receive(WAIT_S)
        assert protocol.parse(data, 0) == protocol.Ack(0, lib.WIRE_WELCOME_COMPLETE)
        late.uffd.unregister(late.addr, late.described.map_length)
        assert late.memory[0] == data_file.read_bytes()[0]


def test_helper_that_is_cut_off_is_told_why_and_kept_until_its_process_ends(
    served: Serving, data_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """P1, P4: were its uffd closed here while it lives, the kernel could answer it with zero pages."""
    offender, other = served.helper(), served.helper()
    other.do("b = attach()")
    offender.do("h = hand_over('ack'); h.connection.send(b'garbage')")
    wait_until(lambda: any(h.state == "disabled" for h in served.status().helpers), "the offender to be cut off")
    assert f"helper {offender.pid} on block data is cut off: it sent what is no message" in caplog.text
    offender.do("data, _ = h.connection.receive(20.0)")
    error, text = offender.do("from pcshare import protocol; m = protocol.parse(data, 0); m.error, m.text")
    assert error == errno.EPROTO
    assert text
    assert len(served.status().helpers) == 2
    assert other.do("read(b, 0)") == data_file.read_bytes()[:1]
    offender.kill()
    wait_until(lambda: [h.pid for h in served.status().helpers] == [other.pid], "the offender to be let go")


def test_helper_that_closed_its_socket_is_served_until_its_process_ends(served: Serving, data_file: Path) -> None:
    """P1, P3."""
    orphan = served.helper()
    orphan.do("h = hand_over('ack'); h.connection.close()")
    wait_until(lambda: [h.state for h in served.status().helpers] == ["orphaned"], "it to be without a socket")
    assert orphan.do("h.memory[4096]") == data_file.read_bytes()[PAGE]
    orphan.do("os.closerange(3, 3)")
    orphan.kill()
    wait_until(lambda: not served.status().helpers, "it to be let go")


def test_socket_is_for_this_user_alone_unless_others_are_allowed(runtime_dir: Path, data_file: Path) -> None:
    """P8."""
    with serving(f"data={data_file}") as served:
        path = Path(served.socket)
        assert path == runtime_dir / "pcshare" / f"{served.name}.sock"
        assert path.stat().st_mode & 0o777 == 0o600
        assert path.parent.stat().st_mode & 0o777 == 0o700
    assert not path.exists()
    with serving(f"data={data_file}", allow_uids=(1,)) as served:
        path = Path(served.socket)
        assert path.stat().st_mode & 0o777 == 0o666
    assert not path.exists()
