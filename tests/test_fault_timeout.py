"""--fault-timeout: a page that somebody waits for and the source does not bring in time; and all that poison reaches.

Sources that are late on command: a delay, a server that is stopped, a migration that holds pages back.
"""

from __future__ import annotations

import contextlib
import signal
import tempfile
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import pcshare
from pcshare.errors import AttachTimeout, SourceLost
from pcshare.protocol import AdminOp
from support import suspend, wait_until
from support_coordinator import coordinator
from support_nbd import ScriptedServer, Withheld, nbdkit
from support_serving import EAGER, LAZY, PAGE, HelperProcess, Serving, serving
from test_incoming_coordinator import play, scene_of

N_PAGES = 600
LENGTH = N_PAGES * PAGE - 99
TIMEOUT_S = 0.2
PATIENT_S = 2.0  # one that other pages never reach
LATE_S = 2.0  # of a source that brings every page long after the fault timeout


@pytest.fixture
def folder(runtime_dir: Path) -> Iterator[Path]:
    """Short enough for sockets, which servers leave behind."""
    with tempfile.TemporaryDirectory(prefix="pcs-", dir="/tmp") as made:
        yield Path(made)


@pytest.fixture
def late(data_file: Path) -> str:
    return f"data={data_file}#delay={LATE_S:g}s"


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """While this file exists the source fails."""
    path = tmp_path / "broken"
    path.touch()
    return path


def attached(served: Serving, mode: str | None = None) -> HelperProcess:
    helper = served.helper()
    helper.do(f"b = attach(mode={mode!r}); import errno; fd = os.memfd_create('copy')")
    return helper


def page_in(content: bytes, page: int) -> bytes:
    return content[page * PAGE : (page + 1) * PAGE]


def touch_is_sigbus(helper: HelperProcess, page: int) -> bool:
    helper.start(f"read(b, {page * PAGE})")
    return -helper.wait_for_end() == signal.SIGBUS


def write_ends_with(helper: HelperProcess, page: int) -> str:
    """A system call that reads from the page: what it is told, without a signal to anybody."""
    return str(
        helper.do(
            "def copy():\n"
            f"    try: return os.write(fd, memoryview(b)[{page * PAGE}:{(page + 1) * PAGE}])\n"
            "    except OSError as error: return errno.errorcode[error.errno]\n"
            "copy()"
        )
    )


# As write_ends_with, in many threads at once: writes to one file wait for each other.
COPY = f"""
def copy(page):
    own_fd = os.memfd_create('copy')
    try: return os.write(own_fd, memoryview(b)[page * {PAGE}:(page + 1) * {PAGE}])
    except OSError as error: return errno.errorcode[error.errno]
    finally: os.close(own_fd)
"""


# ---- pause ----


def test_late_page_pauses_the_block_which_goes_on_by_itself_when_it_comes(folder: Path, content: bytes) -> None:
    """P3: visibly, with the page, the source and the cure; what was asked for comes and nobody has to resume."""
    with withholding(folder, content, [(5 * PAGE, PAGE)], fault_timeout_s=TIMEOUT_S) as (withheld, served):
        helper = attached(served)
        pending = helper.start(f"read(b, 5 * {PAGE}, {PAGE})")
        block = served.wait_for_state("PAUSED")
        assert f"s.sock#timeout=600s has not brought offset {5 * PAGE} within {TIMEOUT_S:g} s" in block.reason
        assert f"pcshare resume {served.name}" in block.reason
        assert (served.waiting(helper.pid), pending.is_done()) == (1, False)
        withheld.answer_late()
        assert pending.result() == page_in(content, 5)
        block = served.wait_for_state("RUNNING")
        assert (block.reason, block.lost_pages, block.received_pages) == ("", 0, 1)


def test_page_in_time_pauses_nothing_and_never_is_for_ever(runtime_dir: Path, data_file: Path) -> None:
    """A time limit that is not reached, and none."""
    for timeout_s in (30.0, 0.0):
        with serving(f"data={data_file}#delay=300ms", stream_mode=LAZY, fault_timeout_s=timeout_s) as served:
            pending = attached(served).start("read(b, 0)")
            seen = [served.block().state]
            while not pending.is_done():
                time.sleep(0.01)
                seen.append(served.block().state)
            assert set(seen) == {"RUNNING"}
            pending.result()


def test_resume_asks_for_a_late_page_again_and_the_clock_starts_anew(
    runtime_dir: Path, data_file: Path, content: bytes
) -> None:
    """P3: the answer that comes last overwrites nothing, and is no foreign page."""
    with serving(f"data={data_file}#delay=8s", stream_mode=LAZY, fault_timeout_s=TIMEOUT_S) as served:
        helper = attached(served)
        pending = helper.start(f"read(b, 0, {PAGE})")
        for _ in range(2):
            served.wait_for_state("PAUSED")
            served.order(AdminOp.RESUME)  # it runs, and is paused again
        served.wait_for_state("PAUSED")
        assert pending.result() == page_in(content, 0)
        served.wait_for_state("RUNNING")
        helper.do(f"read(b, {PAGE})")  # behind the last answer to what was asked again
        assert (served.block().foreign_pages, served.block().demand_pages) == (0, 2)


def test_range_that_takes_too_long_pauses_too(runtime_dir: Path, data_file: Path, content: bytes) -> None:
    """P3: for who waits in ensure(), also where the stream has asked for all that the source takes at once."""
    for order in (AdminOp.STREAM_LAZY, AdminOp.STREAM_EAGER):
        with serving(f"data={data_file}#delay=5s", stream_mode=LAZY, fault_timeout_s=TIMEOUT_S) as served:
            helper = attached(served)
            served.order(order)
            with pytest.raises(AttachTimeout):
                helper.do("b.ensure(slice(0, 9), timeout_s=0.01)")
            ensured = helper.start(f"b.ensure(slice({300 * PAGE}, None))")
            assert "has not brought" in served.wait_for_state("PAUSED").reason
            ensured.result()
            assert helper.do(f"read(b, {300 * PAGE}, {PAGE})") == page_in(content, 300)


def test_stream_that_nobody_waits_for_may_take_its_time(runtime_dir: Path, late: str) -> None:
    with serving(late, stream_mode=EAGER, fault_timeout_s=TIMEOUT_S) as served:
        while (block := served.block()).state != "END":
            assert block.state == "RUNNING"
            time.sleep(0.02)


# ---- poison ----


def test_late_page_is_lost_at_exactly_that_page_until_it_comes_after_all(folder: Path, content: bytes) -> None:
    """P3, T10: for who waited, who was there and who comes; nobody resumes, and in the end everybody reads it."""
    with withholding(folder, content, [(5 * PAGE, PAGE)], poison=True, fault_timeout_s=PATIENT_S) as (withheld, served):
        victim, other = attached(served), attached(served)
        assert touch_is_sigbus(victim, 5)
        block = served.block()
        assert (block.lost_pages, block.state) == (1, "RUNNING")
        wait_until(lambda: f"brought offset {5 * PAGE} within" in served.block().reason, "the reason")
        assert "touching it is SIGBUS until it comes" in served.block().reason
        newcomer = attached(served)
        assert [write_ends_with(helper, 5) for helper in (other, newcomer)] == ["EFAULT"] * 2
        with pytest.raises(SourceLost) as caught:
            newcomer.do(f"b.ensure(slice({4 * PAGE}, {7 * PAGE}))")
        assert (caught.value.offset, caught.value.length) == (5 * PAGE, PAGE)
        withheld.answer_late()
        wait_until(lambda: served.block().lost_pages == 0, "the late page")
        for helper in (other, newcomer, attached(served)):
            assert helper.do(f"read(b, {5 * PAGE}, {PAGE})") == page_in(content, 5)
        wait_until(lambda: served.block().reason == "", "an end of the reason")


def test_many_threads_that_wait_are_all_told(runtime_dir: Path, data_file: Path) -> None:
    """P3: also those whose pages wait in the helper's own queue."""
    with serving(f"data={data_file}#delay=60s", stream_mode=LAZY, poison=True, fault_timeout_s=TIMEOUT_S) as served:
        helper = attached(served)
        helper.do(COPY)
        answers = [helper.start(f"copy({page})") for page in range(300)]
        assert [answer.result() for answer in answers] == ["EFAULT"] * 300
        assert served.waiting() == 0


def test_own_page_waits_on_where_helpers_are_told(runtime_dir: Path, data_file: Path, content: bytes) -> None:
    """P3: the coordinator's own mapping is never poisoned."""
    source = f"data={data_file}#delay=700ms"
    with serving(source, stream_mode=LAZY, poison=True, fault_timeout_s=TIMEOUT_S) as served:
        assert bytes(served.ram().own_bytes(3 * PAGE, 9)) == content[3 * PAGE : 3 * PAGE + 9]
        wait_until(lambda: served.block().lost_pages == 0, "the page that came after all")


@pytest.mark.parametrize("mode", ["ro", "cow", "rw"])
def test_poison_reaches_every_kind_of_helper_and_its_children(
    runtime_dir: Path, data_file: Path, broken: Path, content: bytes, mode: str
) -> None:
    """P3, T10: who attached before and after, and children of fork; a touch is SIGBUS, a system call is told EFAULT; at
    that page only; and all read it when it has come."""
    writable = ("data",) if mode == "rw" else ()
    child = (
        "import signal\n"
        "def in_child(page):\n"
        "    pid = os.fork()\n"
        "    if pid == 0:\n"
        "        got = read(b, page * 4096, 4096)\n"
        f"        os._exit(0 if got == open({str(data_file)!r}, 'rb').read()[page * 4096:(page + 1) * 4096] else 1)\n"
        "    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])\n"
    )
    broken.unlink()
    source = f"data={data_file}#error=EIO@{broken}"
    with serving(source, stream_mode=LAZY, poison=True, writable=writable) as served:
        before = attached(served, mode)
        before.do(f"read(b, {4 * PAGE}); read(b, {6 * PAGE})")
        broken.touch()
        assert touch_is_sigbus(attached(served, mode), 5)
        broken.unlink()
        after = attached(served, mode)
        for helper in (before, after):
            helper.do(child)
            assert write_ends_with(helper, 5) == "EFAULT"
            assert helper.do("in_child(5)") == -signal.SIGBUS
            assert helper.do("in_child(4)") == helper.do("in_child(6)") == 0
        assert touch_is_sigbus(attached(served, mode), 5)
        assert served.block().lost_pages == 1
        served.order(AdminOp.RESUME)
        wait_until(lambda: served.block().lost_pages == 0, "the lost page")
        for helper in (before, after, attached(served, mode)):
            wait_until(partial(helper.can_be_read, 5), "the mark to be lifted")
            helper.do(child)
            assert helper.do(f"read(b, {5 * PAGE}, {PAGE})") == page_in(content, 5)
            assert helper.do("in_child(5)") == 0


def test_child_that_inherited_a_mark_reads_the_page_that_came_before_it_was_known(
    runtime_dir: Path, data_file: Path, broken: Path, content: bytes
) -> None:
    """P3, T10: a copy-on-write mapping is inherited with its marks; the page came before the child's uffd was handed
    over, so nobody could lift the mark then."""
    with serving(f"data={data_file}#error=EIO@{broken}", stream_mode=LAZY, poison=True) as served:
        helper = attached(served, "cow")
        assert write_ends_with(helper, 5) == "EFAULT"
        served.server.door.shut(float("inf"))  # the child's uffd comes when this is over
        helper.do(
            "gate, go = os.pipe()\n"
            "answer, say = os.pipe()\n"
            "pid = os.fork()\n"
            "if pid == 0:\n"
            "    os.read(gate, 1)\n"
            "    os.write(say, read(b, 5 * 4096, 64))\n"
            "    os._exit(0)"
        )
        broken.unlink()
        served.server.fault_threads.resume_block(0)
        wait_until(lambda: served.block().received_pages == 1, "the lost page")
        assert len(served.status().helpers) == 1
        served.server.door.shut(0.0)
        served.server._stop_write.send(b"\0")  # its loop looks again
        pid = helper.do("pid")
        wait_until(lambda: [one.state for one in served.helpers(pid)] == ["attached"], "the child")
        helper.do("os.write(go, b'x')")
        assert helper.do("os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])") == 0
        assert helper.do("os.read(answer, 64)") == content[5 * PAGE : 5 * PAGE + 64]


# ---- which part was lost ----


def test_first_of_several_lost_parts_is_named(runtime_dir: Path, data_file: Path, broken: Path) -> None:
    """By ensure() within its range, by wait() of the whole block; with its whole length."""
    broken.unlink()
    with serving(f"data={data_file}#error=EIO@{broken}", stream_mode=LAZY, poison=True) as served:
        helper = attached(served)
        broken.touch()
        for page in (40, 22, 21, 20, 300):
            assert write_ends_with(helper, page) == "EFAULT"
        broken.unlink()
        for wanted, (offset, length) in {
            "slice(0, None)": (20 * PAGE, 3 * PAGE),
            f"slice({21 * PAGE + 7}, None)": (21 * PAGE, 2 * PAGE),
            f"slice({23 * PAGE}, None)": (40 * PAGE, PAGE),
        }.items():
            with pytest.raises(SourceLost) as caught:
                helper.do(f"b.ensure({wanted})")
            assert (caught.value.offset, caught.value.length) == (offset, length)
        with pytest.raises(SourceLost, match="lost 5 pages of block data") as caught:
            helper.do("b.wait()")
        assert (caught.value.offset, caught.value.length) == (20 * PAGE, 3 * PAGE)


# ---- pages that hang, and those behind them ----

HANGING = range(16)  # of one helper at once: at a near server 4, NBD_DEMANDS_OF_ONE_NEAR, at a far one 16
HANGING_READS = [(page * PAGE, PAGE) for page in HANGING]
NBD_SHARE = 4  # before it is known how far the server is
BEHIND = range(100, 108)
HANG_TIMEOUT_S = 2.0


@contextlib.contextmanager
def withholding(
    folder: Path, content: bytes, reads: Iterable[tuple[int, int]], preferred: int = PAGE, **options: Any
) -> Iterator[tuple[Withheld, Serving]]:
    """A lazy coordinator of a server that leaves those reads unanswered, and is not given up for that."""
    withheld = Withheld(content, reads, preferred)
    with ScriptedServer(withheld.script) as server:
        path, _ = server.listen(folder / "s.sock")
        source = f"data=nbd+unix:///?socket={path}#timeout=600s"
        with serving(source, stream_mode=LAZY, **options) as served:
            yield withheld, served


def test_pages_that_hang_keep_no_other_page_of_their_helper_from_coming(folder: Path, content: bytes) -> None:
    """P3: once they are late. A resume asks for them again; then the first answers come too, and places are counted
    right."""
    with withholding(folder, content, HANGING_READS, fault_timeout_s=HANG_TIMEOUT_S) as (
        withheld,
        served,
    ):
        helper = attached(served)
        hanging = [helper.start(f"read(b, {page * PAGE}, {PAGE})") for page in HANGING]
        served.wait_for_waiting(len(HANGING), helper.pid)
        behind = [helper.start(f"read(b, {page * PAGE}, {PAGE})") for page in BEHIND]
        assert [one.result() for one in behind] == [page_in(content, page) for page in BEHIND]
        wait_until(lambda: withheld.owed_count == len(HANGING), "all questions")
        assert served.waiting(helper.pid) == len(HANGING)
        served.wait_for_state("PAUSED")
        served.resume_until(lambda: all(one.is_done() for one in hanging), "the pages that hang")
        assert [one.result() for one in hanging] == [page_in(content, page) for page in HANGING]
        withheld.answer_late()
        many = range(200, 500)
        found = [helper.start(f"read(b, {page * PAGE}, {PAGE})") for page in many]
        assert [one.result() for one in found] == [page_in(content, page) for page in many]
        assert (served.waiting(), served.block().foreign_pages) == (0, 0)


def test_page_that_stands_in_the_queue_behind_lost_ones_is_not_lost(folder: Path, content: bytes) -> None:
    """P3: exactly what the source does not bring."""
    with withholding(folder, content, HANGING_READS, poison=True, fault_timeout_s=HANG_TIMEOUT_S) as (withheld, served):
        helper = attached(served)
        helper.do(COPY)
        hanging = [helper.start(f"copy({page})") for page in HANGING]
        wait_until(lambda: withheld.owed_count >= NBD_SHARE, "the first questions")
        behind = [helper.start(f"copy({page})") for page in BEHIND]
        assert [one.result() for one in behind] == [PAGE for _ in BEHIND]
        assert [one.result() for one in hanging] == ["EFAULT" for _ in HANGING]
        assert served.block().lost_pages == len(HANGING)
        withheld.answer_late()
        wait_until(lambda: served.block().lost_pages == 0, "the late pages")
        assert helper.do("copy(0)") == PAGE


def test_of_a_hint_that_hangs_is_lost_what_somebody_waits_for_and_no_more(folder: Path, content: bytes) -> None:
    """P3: not because somebody waits for something else of the block; and once somebody does, that too."""
    with withholding(
        folder, content, [(0, 64 * PAGE), (300 * PAGE, 2 * PAGE)], poison=True, fault_timeout_s=PATIENT_S
    ) as (withheld, served):
        helper = attached(served)
        helper.do(f"b.prefetch(slice(0, {64 * PAGE}))")
        wait_until(lambda: withheld.owed_count == 1, "the hint")
        for first, end, n_lost in ((300, 302, 2), (10, 12, 4), (20, 25, 9)):
            with pytest.raises(SourceLost) as caught:
                helper.do(f"b.ensure(slice({first * PAGE}, {end * PAGE}))")
            assert caught.value.offset == first * PAGE
            wait_until(lambda: served.block().lost_pages == n_lost, "the loss of the others")  # noqa: B023
            time.sleep(PATIENT_S / 2)  # looks for what is late come several times meanwhile
            assert served.block().lost_pages == n_lost
        assert helper.do(f"read(b, 5, {PAGE})") == content[5 : 5 + PAGE]
        withheld.answer_late()
        wait_until(lambda: served.block().lost_pages == 0, "the late pages")


def test_pages_around_one_that_hangs_come_for_who_waits_for_them(folder: Path, content: bytes) -> None:
    """P3: they were asked for along with it, and nobody else could ask."""
    around = 64 << 10
    with withholding(folder, content, [(0, around)], preferred=around, poison=True, fault_timeout_s=PATIENT_S) as (
        withheld,
        served,
    ):
        victim, helper = attached(served), attached(served)
        victim.start(f"read(b, {5 * PAGE})")
        wait_until(lambda: withheld.owed_count == 1, "the question")
        beside = [helper.start(f"b.ensure(slice({first * PAGE}, {end * PAGE}))") for first, end in ((1, 4), (6, 9))]
        for one in beside:
            one.result()
        assert -victim.wait_for_end() == signal.SIGBUS
        assert served.block().lost_pages == 1
        withheld.answer_late()
        wait_until(lambda: served.block().lost_pages == 0, "the late page")
        assert helper.do(f"read(b, 0, {around})") == content[:around]


def test_hint_that_hangs_keeps_no_range_from_being_asked_for(folder: Path, content: bytes) -> None:
    """P3: not either where a touch hangs too, beside which the stream asks for little at a time."""
    with withholding(folder, content, [(0, 64 * PAGE), (500 * PAGE, PAGE)], poison=True, fault_timeout_s=PATIENT_S) as (
        withheld,
        served,
    ):
        victim, helper = attached(served), attached(served)
        helper.do(f"b.prefetch(slice(0, {64 * PAGE}))")
        wait_until(lambda: withheld.owed_count == 1, "the hint")
        victim.start(f"read(b, {500 * PAGE})")
        wait_until(lambda: withheld.owed_count == 2, "the touch")
        for first in (300, 310, 320):
            helper.do(f"b.ensure(slice({first * PAGE}, {(first + 2) * PAGE}))")
        assert -victim.wait_for_end() == signal.SIGBUS
        assert served.block().lost_pages == 1


def test_page_that_hangs_comes_for_another_when_who_touched_it_has_died(folder: Path, content: bytes) -> None:
    """P3: it was asked for with those around it, and nobody waited for it any more."""
    around = 64 << 10
    with withholding(folder, content, [(0, around)], preferred=around, fault_timeout_s=TIMEOUT_S) as (withheld, served):
        victim, helper = attached(served), attached(served)
        victim.start(f"read(b, {5 * PAGE})")
        wait_until(lambda: withheld.owed_count == 1, "the question")
        victim.process.kill()
        victim.wait_for_end()
        helper.do(f"b.ensure(slice({4 * PAGE}, {7 * PAGE}))")
        assert helper.do(f"read(b, {5 * PAGE}, {PAGE})") == page_in(content, 5)


# ---- servers and migrations ----


@pytest.mark.parametrize("poison", [False, True], ids=["pause", "poison"])
def test_server_that_does_not_answer(folder: Path, data_file: Path, content: bytes, poison: bool) -> None:
    """P3: long before the link gives it up; it answers after all."""
    with (
        nbdkit(folder, "file", data_file) as server,
        serving(f"data={server.uri()}", stream_mode=LAZY, poison=poison, fault_timeout_s=PATIENT_S) as served,
    ):
        helper = attached(served)
        helper.do("read(b, 0)")
        assert server.process is not None
        suspend(server.process.pid)
        pending = helper.start(f"read(b, {5 * PAGE}, {PAGE})")
        if poison:
            assert -helper.wait_for_end() == signal.SIGBUS
            helper = attached(served)
            assert write_ends_with(helper, 5) == "EFAULT"
        else:
            assert "has not brought" in served.wait_for_state("PAUSED").reason
            assert not pending.is_done()
        server.process.send_signal(signal.SIGCONT)
        if poison:
            wait_until(lambda: served.block().lost_pages == 0, "the late page")
            pending = helper.start(f"read(b, {5 * PAGE}, {PAGE})")
        assert pending.result() == page_in(content, 5)
        wait_until(lambda: (served.block().state, served.block().reason) == ("RUNNING", ""), "an end of the reason")


@pytest.mark.parametrize("poison", [False, True], ids=["pause", "poison"])
def test_migration_that_holds_a_page_back(runtime_dir: Path, seed: int, poison: bool) -> None:
    """P3: its link is well, only the page does not come; when it comes everybody has it."""
    with scene_of(runtime_dir, seed, poison=poison, fault_timeout_s=TIMEOUT_S) as scene:
        source = scene.source(**scene.lazily)

        def script(source: Any) -> None:
            source.connect()
            source.enter_postcopy()
            helper = scene.attached()
            pending = helper.start(f"read(b, {7 * PAGE})")
            if poison:
                assert -helper.wait_for_end() == signal.SIGBUS
                assert scene.block().lost_pages == 1
            else:
                scene.wait_for_state("PAUSED")
            scene.wait_for_reason(f"has not brought offset {7 * PAGE} within")
            source.release()
            source.postcopy()
            source.finish()
            if not poison:
                pending.result()

        play(source, script)
        scene.assert_whole(source)


# ---- who sets it ----


def test_option_reaches_the_core_by_every_way(runtime_dir: Path, data_file: Path) -> None:
    """The command, `pcshare run` by way of the launcher, and the launcher."""
    never = f"data={data_file}#delay=60s"
    with (
        coordinator(never, options=["--stream=lazy", "--fault-timeout=100ms"]) as served,
        HelperProcess(served.socket) as helper,
    ):
        helper.do("b = attach()")
        helper.start("read(b, 0)")
        wait_until(lambda: "within 0.1 s" in served.block("data").reason, "the pause")
    with (
        pcshare.Coordinator(blocks=never, stream="lazy", fault_timeout_s=0.1) as launched,
        HelperProcess(str(launched.socket)) as helper,
    ):
        helper.do("b = attach()")
        helper.start("read(b, 0)")
        wait_until(lambda: "within 0.1 s" in launched.status().blocks[0].reason, "the pause")
