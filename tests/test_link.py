"""The link of a source: servers that go, come back, answer wrongly or not at all, and what helpers see of it.

Promises P1, P3 and P6: no wrong byte, every fault ends or waits visibly, and only what is missing is asked for again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest

from pcshare.errors import PcshareError
from pcshare.nbd.wire import Command
from pcshare.page_channel import NbdChannel, free_channel
from pcshare.protocol import AdminOp
from pcshare.sources import child, link, parse_argument
from pcshare.sources.link import BACKOFF_MAX_S, BACKOFF_S
from pcshare.status import read_status
from support import wait_until
from support_coordinator import die_with_parent
from support_nbd import Handshake, Peer, Request, Script, ScriptedServer, nbdkit, serve_reads
from support_serving import EAGER, LAZY, PAGE, WAIT_S, HelperProcess, Serving, make_file, serving

MIB = 1 << 20
N_PAGES = 600
LENGTH = N_PAGES * PAGE - 99
PROBE_BYTES_MAX = 512  # a link asks a server that comes back for as little as it may


@pytest.fixture
def folder(runtime_dir: Path) -> Iterator[Path]:
    """Short enough for sockets, which some servers leave behind."""
    with tempfile.TemporaryDirectory(prefix="pcs-", dir="/tmp") as made:
        yield Path(made)


@pytest.fixture
def slow_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """After one attempt at once the next is not to be expected within the test."""
    monkeypatch.setattr(link, "BACKOFF_S", 10 * WAIT_S)
    monkeypatch.setattr(link, "BACKOFF_MAX_S", 10 * WAIT_S)


def attached(served: Serving) -> HelperProcess:
    helper = served.helper()
    helper.do("b = attach()")
    return helper


def check_all(served: Serving, helper: HelperProcess, content: bytes) -> None:
    """Everything comes, and is right."""
    helper.do("b.ensure()")
    assert helper.do("bytes(b)") == content
    served.wait_for_state("END")


def wait_for_reason(served: Serving, pattern: str) -> None:
    wait_until(
        lambda: served.block().state == "PAUSED" and bool(re.search(pattern, served.block().reason)),
        f"the reason {pattern!r}",
        WAIT_S,
    )


def reads_of(log: Path) -> list[tuple[int, int]]:
    """Offset and length of every read in a log of nbdkit's log filter."""
    found = re.findall(r" Read id=\d+ offset=(0x[0-9a-f]+) count=(0x[0-9a-f]+)", log.read_text())
    return [(int(offset, 16), int(length, 16)) for offset, length in found]


# -- a server that goes and comes back


def test_helpers_wait_visibly_while_a_server_is_away_and_go_on_when_it_is_back(
    folder: Path, data_file: Path, content: bytes
) -> None:
    with nbdkit(folder, "file", data_file) as server, serving(f"data={server.uri()}", stream_mode=LAZY) as served:
        helpers = [attached(served) for _ in range(2)]
        for helper in helpers:
            helper.do(f"read(b, 0, {100 * PAGE})")
        server.kill()
        wait_for_reason(served, r"nbd\+unix:\S+ is away: .*; trying again")
        assert served.status().state == "PAUSED"
        # Far behind what was read ahead.
        pending = [helper.start(f"read(b, {400 * PAGE}, {50 * PAGE})") for helper in helpers]
        served.wait_for_waiting(2)
        assert helpers[0].do(f"read(b, {50 * PAGE}, 9)") == content[50 * PAGE :][:9]
        server.start()
        assert [one.result() for one in pending] == [content[400 * PAGE : 450 * PAGE]] * 2
        assert served.wait_for_state("RUNNING").reason == ""
        check_all(served, helpers[1], content)


@pytest.mark.parametrize("words", [("run",), ("coordinator",)])
def test_a_loss_is_told_in_one_line_and_the_return_in_another(
    folder: Path, data_file: Path, words: tuple[str, ...]
) -> None:
    """However often it is tried meanwhile, and whatever the reasons."""
    name, job = f"told-{os.getpid()}", ["--", "cat"] if words == ("run",) else []
    with nbdkit(folder, "file", data_file) as server:
        command = [sys.executable, "-m", "pcshare", *words, f"--name={name}", "--stream=lazy", f"data={server.uri()}"]
        process = subprocess.Popen(
            [*command, *job], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=die_with_parent
        )
        try:
            wait_until(lambda: _state_of(name) == "RUNNING", "the coordinator", WAIT_S)
            server.kill()
            wait_until(lambda: "Connection refused" in read_status(name).reason, "a second reason", WAIT_S)
            server.start()
            wait_until(lambda: _state_of(name) == "RUNNING", "the server to be taken again", WAIT_S)
        finally:
            if not job:
                process.terminate()
            _, said = process.communicate(timeout=WAIT_S)
        assert process.returncode == 0
    lost, back = said.splitlines()
    assert re.fullmatch(r"pcshare: block data is paused: nbd\+unix:\S+ is away: .+; trying again", lost)
    assert back == f"pcshare: block data goes on with {server.uri()}"


def _state_of(name: str) -> str:
    """Empty while it is not there, or not whole yet."""
    with contextlib.suppress(PcshareError):
        return read_status(name).state
    return ""


def test_only_what_is_missing_is_asked_for_again(folder: Path, data_file: Path, content: bytes) -> None:
    """P6, by what the server has logged."""
    log = folder / "requests"
    filters = ["--filter=log", "file", data_file, f"logfile={log}", "logappend=true"]
    with nbdkit(folder, *filters) as server, serving(f"data={server.uri()}", stream_mode=LAZY) as served:
        helper = attached(served)
        opening = len(reads_of(log))
        helper.do(f"b.ensure(slice(0, {300 * PAGE}))")
        server.kill()
        wait_for_reason(served, "is away")
        ensured = helper.start("b.ensure()")
        server.start()
        ensured.result()
        assert helper.do("bytes(b)") == content
        served.wait_for_state("END")
    asked = [(offset, length) for offset, length in reads_of(log)[opening:] if length > PROBE_BYTES_MAX]
    assert sorted(
        page for offset, length in asked for page in range(offset // PAGE, -(-(offset + length) // PAGE))
    ) == [*range(N_PAGES)]


def test_server_is_killed_again_and_again_while_the_stream_runs(
    folder: Path, tmp_path: Path, rng: random.Random
) -> None:
    data, limit = make_file(tmp_path, rng, 48 << 20), folder / "limit"
    limits = ["connection-rate=20M", f"connection-rate-file={limit}"]  # bits a second, after a burst of two seconds
    arguments = ["--filter=rate", "file", data, *limits]
    with nbdkit(folder, *arguments) as server, serving(f"data={server.uri()}", stream_mode=EAGER) as served:
        helper = attached(served)
        for _ in range(3):
            before = served.block()
            assert before.state != "END"
            wait_until(partial(_has_more_than, served, before.received_pages), "more pages", WAIT_S)
            server.kill()
            server.start()
        limit.write_text("100G\n")
        served.wait_for_state("END")
        assert helper.do("import hashlib; hashlib.sha256(b).digest()") == _sha256(data.read_bytes())


def _has_more_than(served: Serving, n: int) -> bool:
    return served.block().received_pages > n


def _sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def test_demand_comes_first_after_reconnecting(folder: Path, rng: random.Random) -> None:
    data = rng.randbytes(64 << 20)
    lost, asked = threading.Event(), threading.Event()
    again: list[Request] = []

    def script(peer: Peer) -> None:
        Handshake(size=len(data)).run(peer)
        if not lost.is_set():
            serve_reads(peer, data, hold)
        serve_reads(peer, data, note)

    def hold(peer: Peer, request: Request) -> bool:
        """Nothing is answered of what the channel asks for; a page alone is a demand."""
        if request.command != Command.READ or (request.offset == 0 and request.length < 4 * PAGE):
            return False
        if request.length == PAGE:
            asked.set()
        return True

    def note(peer: Peer, request: Request) -> bool:
        if request.command == Command.READ and request.length > PROBE_BYTES_MAX:
            again.append(request)
        return False

    with ScriptedServer(script) as server:
        path, _ = server.listen(folder / "s.sock")
        with serving(f"data=nbd+unix:///?socket={path}", stream_mode=EAGER) as served:
            wait_until(lambda: server.connection_count == 2, "a demand connection", WAIT_S)
            helper = attached(served)
            pending = helper.start(f"read(b, {10_000 * PAGE})")
            assert asked.wait(WAIT_S)
            lost.set()
            server.hang_up_all()
            assert pending.result() == data[10_000 * PAGE :][:1]
            served.wait_for_state("END")
    assert (again[0].offset, again[0].length) == (10_000 * PAGE, PAGE)


def test_a_server_of_another_size_is_refused_until_the_right_one_is_back(
    folder: Path, data_file: Path, content: bytes
) -> None:
    """P1."""
    kept = data_file.with_suffix(".kept")
    with nbdkit(folder, "file", data_file) as server, serving(f"data={server.uri()}", stream_mode=LAZY) as served:
        helper = attached(served)
        helper.do("read(b, 0)")
        server.kill()
        data_file.rename(kept)
        data_file.write_bytes(bytes(2 * LENGTH))
        server.start()
        wait_for_reason(served, f"comes back with another size: {2 * LENGTH} bytes, and it had {LENGTH}")
        pending = helper.start(f"read(b, {5 * PAGE})")
        served.wait_for_waiting(1)
        server.kill()
        kept.rename(data_file)
        server.start()
        assert pending.result() == content[5 * PAGE :][:1]
        check_all(served, helper, content)


def _wait_until_it_knows_that_nobody_listens(served: Serving) -> None:
    """The first try may have met the one that was dying."""
    wait_for_reason(served, "is away")
    served.order(AdminOp.RESUME)
    wait_for_reason(served, "Connection refused|No such file")


def test_resume_tries_at_once(slow_retries: None, folder: Path, data_file: Path, content: bytes) -> None:
    with nbdkit(folder, "file", data_file) as server, serving(f"data={server.uri()}", stream_mode=LAZY) as served:
        helper = attached(served)
        server.kill()
        _wait_until_it_knows_that_nobody_listens(served)
        server.start()
        pending = helper.start("read(b, 0)")
        served.wait_for_waiting(1)
        assert served.block().state == "PAUSED"
        served.order(AdminOp.RESUME)
        assert pending.result() == content[:1]
        served.wait_for_state("RUNNING")


def test_resume_does_not_hide_that_a_server_is_away(slow_retries: None, folder: Path, data_file: Path) -> None:
    with nbdkit(folder, "file", data_file) as server, serving(f"data={server.uri()}", stream_mode=LAZY) as served:
        server.kill()
        _wait_until_it_knows_that_nobody_listens(served)
        served.order(AdminOp.RESUME)
        assert served.block().state == "PAUSED"
        assert "is away" in served.block().reason


def test_other_blocks_do_not_look_paused(folder: Path, data_file: Path) -> None:
    with (
        nbdkit(folder, "file", data_file) as server,
        serving(f"data={server.uri()}", f"other={data_file}", stream_mode=LAZY) as served,
    ):
        server.kill()
        wait_for_reason(served, "is away")
        assert served.block("other").state == "RUNNING"


def test_coordinator_ends_at_once_while_its_server_is_away(folder: Path, data_file: Path) -> None:
    """P7."""
    with nbdkit(folder, "file", data_file) as server, serving(f"data={server.uri()}", stream_mode=LAZY) as served:
        helper = attached(served)
        helper.start("read(b, 0, 4096)").result()
        server.kill()
        wait_for_reason(served, "is away")
        started_s = time.monotonic()
        served.close()
        assert time.monotonic() - started_s < BACKOFF_MAX_S


# -- a process as a server


def kill_nbdkit() -> None:
    """That of the command which the coordinator in this process has started; it may be replaced at any moment."""

    def kill() -> bool:
        for pid in sorted(_running("nbdkit"))[:1]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                return True
        return False

    wait_until(kill, "a running nbdkit", WAIT_S)


def test_a_command_that_dies_is_run_again(runtime_dir: Path, data_file: Path, content: bytes) -> None:
    source = f"data=exec:nbdkit -s --filter=delay file '{data_file}' rdelay=1ms"
    with serving(source, stream_mode=LAZY) as served:
        helper = attached(served)
        for page in range(0, 100, 10):
            if page % 30 == 0:
                kill_nbdkit()
            assert helper.do(f"read(b, {page * PAGE})") == content[page * PAGE :][:1]
        check_all(served, helper, content)


def test_the_reason_tells_how_a_command_ended(slow_retries: None, folder: Path, data_file: Path) -> None:
    once = folder / "once"
    one_connection = "--filter=multi-conn multi-conn-mode=disable"
    script = f"test -e {once} && exit 7; touch {once}; exec nbdkit -s file {data_file} {one_connection}"
    with serving(f'data=exec:sh -c "{script}"', stream_mode=LAZY) as served:
        kill_nbdkit()
        wait_for_reason(served, r"exit code 7; trying again")


def test_a_block_looks_paused_before_its_process_has_ended(
    slow_retries: None, runtime_dir: Path, data_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P3: a process may take its time after its connection was lost."""
    monkeypatch.setattr(child, "LINGER_S", 6.0)
    script = f"nbdkit -s --filter=multi-conn file {data_file} multi-conn-mode=disable; exec sleep 1000 <&- >&-"
    with serving(f'data=exec:sh -c "{script}"', stream_mode=LAZY) as served:
        started_s = time.monotonic()
        kill_nbdkit()
        wait_for_reason(served, "is away: the server hung up; trying again")
        assert time.monotonic() - started_s < child.LINGER_S


def test_processes_of_several_blocks_are_ended_side_by_side(
    runtime_dir: Path, data_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P7: those that want no end take their time, and a coordinator has as little for ten blocks as for one."""
    monkeypatch.setattr(child, "LINGER_S", 0.5)
    monkeypatch.setattr(child, "TERMINATE_S", 0.5)
    script = f"trap : TERM; nbdkit -s file {data_file}; while :; do sleep 1000; done"
    n_blocks, n_connections = 5, 2
    with serving(*(f'b{i}=exec:sh -c "{script}"' for i in range(n_blocks)), stream_mode=LAZY) as served:
        wait_until(
            lambda: len(_running("nbdkit")) == n_blocks * n_connections, "a demand connection of each block", WAIT_S
        )
        started_s = time.monotonic()
        served.close()
        one_after_the_other_s = n_blocks * n_connections * (child.LINGER_S + child.TERMINATE_S)
        assert time.monotonic() - started_s < one_after_the_other_s / 2


def test_a_connection_that_the_channel_does_not_take_is_ended(runtime_dir: Path, data_file: Path) -> None:
    """P7: it has a primary one already; the link comes again and again, and no process stays behind."""
    starts = data_file.with_suffix(".starts")
    starts.touch()
    script = f"echo >> {starts}; exec nbdkit -s file {data_file}"
    made = link.Link(parse_argument(f'data=exec:sh -c "{script}"').equivalents, lambda session: session.export, WAIT_S)
    ours, theirs = socket.socketpair()
    with ours, contextlib.closing(made):
        made.open()
        channel = NbdChannel(size=LENGTH, alignment=PAGE, length_max=MIB, reply_timeout_ms=30_000, server_count=1)
        channel.connect(theirs.detach(), demand=False, structured=True)
        made.serve(channel, link.Need(LENGTH, PAGE, MIB))
        wait_until(lambda: starts.read_text().count("\n") >= 4, "several attempts", WAIT_S)
        wait_until(lambda: not _running("nbdkit"), "an end of the processes that were not taken", WAIT_S)
    free_channel(channel.pointer)


def _running(name: str) -> list[int]:
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.name() == name and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


# -- several servers


def test_failover_and_back(folder: Path, data_file: Path, content: bytes) -> None:
    with (
        nbdkit(folder, "file", data_file, name="a") as a,
        nbdkit(folder, "file", data_file, name="b") as b,
        serving(f"data={a.uri('x')},{b.uri('x')}", stream_mode=LAZY) as served,
    ):
        helper = attached(served)
        for turn, (ends, comes) in enumerate(((a, b), (b, a), (a, b))):
            page = 100 * turn
            assert helper.do(f"read(b, {page * PAGE})") == content[page * PAGE :][:1]
            if comes.process is None:
                comes.start()
            ends.kill()
            page += 50
            assert helper.do(f"read(b, {page * PAGE})") == content[page * PAGE :][:1]
        b.kill()
        wait_for_reason(served, r"a\.sock.*b\.sock.* is away: .*; trying again")
        a.start()
        check_all(served, helper, content)


def test_what_one_server_refuses_another_is_asked_for(folder: Path, data_file: Path, content: bytes) -> None:
    fails = folder / "fails"
    error = ["--filter=error", "file", data_file, "error=EIO", "error-pread-rate=100%", f"error-file={fails}"]
    with (
        nbdkit(folder, *error, name="a") as a,
        nbdkit(folder, "file", data_file, name="b") as b,
        serving(f"data={a.uri()},{b.uri()}", stream_mode=LAZY) as served,
    ):
        fails.touch()
        helper = attached(served)
        assert helper.do(f"read(b, {7 * PAGE})") == content[7 * PAGE :][:1]
        check_all(served, helper, content)


def test_what_all_servers_refuse_is_an_error_of_the_source(folder: Path, data_file: Path, content: bytes) -> None:
    fails = folder / "fails"
    error = ["--filter=error", "file", data_file, "error=EIO", "error-pread-rate=100%", f"error-file={fails}"]
    with (
        nbdkit(folder, *error, name="a") as a,
        nbdkit(folder, *error, name="b") as b,
        serving(f"data={a.uri()},{b.uri()}", stream_mode=LAZY) as served,
    ):
        fails.touch()
        helper = attached(served)
        pending = helper.start("read(b, 0)")
        wait_for_reason(served, "Input/output error; mend it, then: pcshare resume")
        fails.unlink()
        served.order(AdminOp.RESUME)
        assert pending.result() == content[:1]
        check_all(served, helper, content)


# -- a server that refuses


def test_a_refused_read_pauses_the_block_until_resume(folder: Path, data_file: Path, content: bytes) -> None:
    """P3: the policy pause."""
    fails = folder / "fails"
    error = ["--filter=error", "file", data_file, "error=EIO", "error-pread-rate=100%", f"error-file={fails}"]
    with nbdkit(folder, *error) as server, serving(f"data={server.uri()}", stream_mode=LAZY) as served:
        fails.touch()
        helper = attached(served)
        pending = helper.start(f"read(b, {3 * PAGE})")
        wait_for_reason(served, rf"offset {3 * PAGE}: Input/output error; mend it")
        server.kill()
        server.start()  # that the link is back does not mend what the core has paused
        wait_until(lambda: served.waiting() == 1, "the helper to wait", WAIT_S)
        assert "mend it" in served.block().reason
        fails.unlink()
        served.order(AdminOp.RESUME)
        assert pending.result() == content[3 * PAGE :][:1]
        check_all(served, helper, content)


def test_a_refused_read_is_sigbus_where_that_is_the_policy(folder: Path, data_file: Path, content: bytes) -> None:
    """P3: the policy poison."""
    fails = folder / "fails"
    error = ["--filter=error", "file", data_file, "error=EIO", "error-pread-rate=100%", f"error-file={fails}"]
    with nbdkit(folder, *error) as server, serving(f"data={server.uri()}", stream_mode=LAZY, poison=True) as served:
        helper, other = attached(served), attached(served)
        fails.touch()
        helper.start("read(b, 0)")
        assert -helper.wait_for_end() == signal.SIGBUS
        fails.unlink()
        assert other.do(f"read(b, {9 * PAGE})") == content[9 * PAGE :][:1]


# -- a server that does not answer


def silent_after(n_connections: int, data: bytes) -> Script:
    """The first connections answer nothing but what is asked at the opening; those that follow are right."""

    def only_the_head(peer: Peer, request: Request) -> bool:
        return not (request.command == Command.READ and request.offset == 0 and request.length > PAGE)

    def script(peer: Peer) -> None:
        Handshake(size=len(data), flags=3, block_status=False).run(peer)
        serve_reads(peer, data, only_the_head if peer.number < n_connections else None)

    return script


def test_a_server_that_stops_answering_is_left_after_the_timeout(folder: Path, content: bytes) -> None:
    with ScriptedServer(silent_after(1, content)) as server:
        path, _ = server.listen(folder / "s.sock")
        with serving(f"data=nbd+unix:///?socket={path}#timeout=2s", stream_mode=LAZY) as served:
            helper = attached(served)
            assert helper.do(f"read(b, {5 * PAGE})") == content[5 * PAGE :][:1]
            check_all(served, helper, content)


def test_a_server_that_accepts_and_never_answers_is_away(folder: Path, content: bytes) -> None:
    """P3: it does not look as if it served."""
    with ScriptedServer(silent_after(4, content)) as server:
        path, _ = server.listen(folder / "s.sock")
        with serving(f"data=nbd+unix:///?socket={path}#timeout=1s", stream_mode=LAZY) as served:
            helper = attached(served)
            pending = helper.start("read(b, 0)")
            wait_for_reason(served, "is away: the NBD server did not answer in time")
            assert pending.result() == content[:1]
            check_all(served, helper, content)


def test_a_server_that_never_answers_is_sigbus_in_time_where_that_is_the_policy(folder: Path, content: bytes) -> None:
    """P3: every fault ends."""
    with ScriptedServer(silent_after(1000, content)) as server:
        path, _ = server.listen(folder / "s.sock")
        source = f"data=nbd+unix:///?socket={path}#timeout=1s"
        with serving(source, stream_mode=LAZY, poison=True, source_timeout_s=0.5) as served:
            helper = attached(served)
            helper.start("read(b, 0)")
            assert -helper.wait_for_end() == signal.SIGBUS
            wait_for_reason(served, "touching what is missing is SIGBUS")


def test_a_server_that_is_lost_again_and_again_is_given_up_too(folder: Path, content: bytes) -> None:
    """P3: it answers what the link asks, and hangs up at the first page."""

    def hangs_up(peer: Peer, request: Request) -> bool:
        if request.command == Command.READ and not (request.offset == 0 and request.length != PAGE):
            peer.hang_up()
        return False

    def script(peer: Peer) -> None:
        Handshake(size=len(content)).run(peer)
        serve_reads(peer, content, hangs_up)

    with ScriptedServer(script) as server:
        path, _ = server.listen(folder / "s.sock")
        source = f"data=nbd+unix:///?socket={path}"
        with serving(source, stream_mode=LAZY, poison=True, source_timeout_s=0.5) as served:
            helper = attached(served)
            helper.start(f"read(b, {PAGE})")
            assert -helper.wait_for_end() == signal.SIGBUS


# -- the policy poison


def test_what_a_source_lost_for_too_long_holds_is_sigbus_and_comes_when_it_is_back(
    folder: Path, data_file: Path, content: bytes
) -> None:
    with (
        nbdkit(folder, "file", data_file) as server,
        serving(f"data={server.uri()}", stream_mode=LAZY, poison=True, source_timeout_s=0.3) as served,
    ):
        helper, other = attached(served), attached(served)
        assert other.do("read(b, 0)") == content[:1]
        server.kill()
        helper.start(f"read(b, {5 * PAGE})")
        assert -helper.wait_for_end() == signal.SIGBUS
        wait_for_reason(served, "is away, touching what is missing is SIGBUS: .*; trying again")
        assert other.do("read(b, 0)") == content[:1]
        server.start()
        served.wait_for_state("RUNNING")
        assert other.do(f"read(b, {5 * PAGE})") == content[5 * PAGE :][:1]
        check_all(served, other, content)


def test_a_process_that_does_not_begin_to_answer_is_given_up_in_time(runtime_dir: Path, data_file: Path) -> None:
    """P3: its start may take longer than the handshake of a server that runs, but not longer than the policy says."""
    once = data_file.with_suffix(".once")
    script = f"test -e {once} && exec sleep 1000; touch {once}; exec nbdkit -s --filter=multi-conn file {data_file}"
    source = f'data=exec:sh -c "{script} multi-conn-mode=disable"'
    with serving(source, stream_mode=LAZY, poison=True, source_timeout_s=0.5) as served:
        helper = attached(served)
        started_s = time.monotonic()
        kill_nbdkit()
        helper.start(f"read(b, {5 * PAGE})")
        assert -helper.wait_for_end() == signal.SIGBUS
        assert time.monotonic() - started_s < link.HANDSHAKE_TIMEOUT_S


def test_all_that_is_lost_at_once_is_said_once(
    folder: Path, tmp_path: Path, rng: random.Random, caplog: pytest.LogCaptureFixture
) -> None:
    """A block has more pages than a log has room for lines."""
    rate = ["--filter=rate", "file", make_file(tmp_path, rng, 64 * MIB), "rate=100K"]
    with nbdkit(folder, *rate) as server:
        source = f"data={server.uri()}"
        with serving(source, stream_mode=EAGER, poison=True, source_timeout_s=0.1) as served:
            server.kill()
            wait_for_reason(served, "it lost [0-9]+ pages")
            assert served.block().lost_pages > 1
            assert sum("touching what it lost is SIGBUS" in record.message for record in caplog.records) == 1
            server.start()


def test_a_source_that_is_back_in_time_loses_nothing(folder: Path, data_file: Path, content: bytes) -> None:
    with (
        nbdkit(folder, "file", data_file) as server,
        serving(f"data={server.uri()}", stream_mode=LAZY, poison=True, source_timeout_s=WAIT_S) as served,
    ):
        helper = attached(served)
        server.kill()
        wait_for_reason(served, "is away")
        pending = helper.start(f"read(b, {5 * PAGE})")
        served.wait_for_waiting(1)
        server.start()
        assert pending.result() == content[5 * PAGE :][:1]
        check_all(served, helper, content)


# -- the demand connection


@pytest.mark.parametrize(("mode", "count"), [("disable", 1), ("auto", 2)])
def test_demand_has_a_connection_of_its_own_where_the_server_allows_several(
    folder: Path, data_file: Path, mode: str, count: int
) -> None:
    log = folder / "requests"
    arguments = ["--filter=multi-conn", "--filter=log", "file", data_file, f"multi-conn-mode={mode}", f"logfile={log}"]
    with nbdkit(folder, *arguments) as server, serving(f"data={server.uri()}", stream_mode=LAZY) as served:
        wait_until(lambda: log.read_text().count(" Connect ") == count, f"{count} connections", WAIT_S)
        helper = attached(served)
        others = iter(range(20, N_PAGES))

        def demands() -> list[str]:
            return re.findall(r"connection=(\d+) Read \S+ offset=\S+ count=0x1000 ", log.read_text())

        def goes_over_the_last() -> bool:
            helper.do(f"read(b, {next(others) * PAGE})")
            return demands()[-1] == str(count)

        wait_until(goes_over_the_last, "the connection to be taken", WAIT_S)
        before = len(demands())
        for page in range(20):
            helper.do(f"read(b, {page * PAGE})")
        assert demands()[before:] == [str(count)] * 20
        assert log.read_text().count(" Connect ") == count


def test_a_server_that_lets_the_second_connection_wait_serves_over_the_first(
    folder: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "DEMAND_TIMEOUT_S", 0.2)

    def script(peer: Peer) -> None:
        if peer.number:
            peer.never_answer()
        Handshake(size=len(content)).run(peer)
        serve_reads(peer, content)

    with ScriptedServer(script) as server:
        path, _ = server.listen(folder / "s.sock")
        with serving(f"data=nbd+unix:///?socket={path}", stream_mode=LAZY) as served:
            wait_until(lambda: server.connection_count >= 3, "the link to try again", WAIT_S)
            helper = attached(served)
            assert helper.do(f"read(b, {5 * PAGE})") == content[5 * PAGE :][:1]
            assert served.block().state == "RUNNING"
            check_all(served, helper, content)


def test_the_demand_connection_alone_can_be_lost(folder: Path, content: bytes) -> None:
    """Demands go over the primary then, until there is another one."""
    lost = threading.Event()

    def hang_up_once(peer: Peer, request: Request) -> bool:
        if peer.number == 1 and request.command == Command.READ:
            lost.set()
            peer.hang_up()
        return False

    def script(peer: Peer) -> None:
        Handshake(size=len(content)).run(peer)
        serve_reads(peer, content, hang_up_once)

    with ScriptedServer(script) as server:
        path, _ = server.listen(folder / "s.sock")
        with serving(f"data=nbd+unix:///?socket={path}", stream_mode=LAZY) as served:
            wait_until(lambda: server.connection_count == 2, "a demand connection", WAIT_S)
            helper = attached(served)
            wait_until(lambda: _touches_until(helper, lost), "a demand over the second connection", WAIT_S)
            wait_until(lambda: server.connection_count == 3, "another demand connection", WAIT_S)
            assert served.block().state == "RUNNING"
            check_all(served, helper, content)


def _touches_until(helper: HelperProcess, event: threading.Event) -> bool:
    """The channel may not have the connection yet when the server does."""
    helper.do("n = globals().get('n', 0) + 1; read(b, n * 4096)")
    return event.is_set()


# -- its decisions


def test_attempts_are_farther_apart_each_time_up_to_a_limit() -> None:
    backoff = link._BackOff(BACKOFF_MAX_S)
    waits = [backoff.next_s() for _ in range(12)]
    assert waits[:4] == [0.0, BACKOFF_S, 2 * BACKOFF_S, 4 * BACKOFF_S]
    assert waits[-1] == BACKOFF_MAX_S
    backoff.reset()
    assert backoff.next_s() == 0.0
