"""A source that fails: by the policy pause who waits waits on, visibly; by poison a touch is SIGBUS at that page."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from pcshare.core import ffi, lib
from pcshare.errors import AttachTimeout, SourceLost
from pcshare.protocol import AdminOp
from pcshare.trace import read_trace
from support import wait_until
from support_serving import EAGER, LAZY, PAGE, HelperProcess, Serving, read_own_page, serving

N_PAGES = 600
LENGTH = N_PAGES * PAGE - 99
KEPT_PAGES = 400  # of a file that was cut short


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """While this file exists the source fails."""
    path = tmp_path / "broken"
    path.touch()
    return path


@pytest.fixture(params=["", "delay=3ms&"], ids=["at once", "late"])
def source(request: pytest.FixtureRequest, data_file: Path, broken: Path) -> str:
    return f"data={data_file}#{request.param}error=EIO@{broken}"


def touch_ends_with(helper: HelperProcess, offset: int) -> int:
    """The signal that a touch kills the process by."""
    helper.start(f"read(b, {offset})")
    return -helper.wait_for_end()


def attached(served: Serving) -> HelperProcess:
    helper = served.helper()
    helper.do("b = attach()")
    return helper


# ---- pause ----


def test_helper_waits_while_status_says_paused_and_why_and_resume_ends_it(
    runtime_dir: Path, source: str, broken: Path, content: bytes
) -> None:
    """P3."""
    with serving(source, stream_mode=LAZY) as served:
        helper = attached(served)
        pending = helper.start(f"read(b, 5 * {PAGE})")
        block = served.wait_for_state("PAUSED")
        assert "Input/output error" in block.reason
        assert f"offset {5 * PAGE}" in block.reason
        assert f"pcshare resume {served.name}" in block.reason
        assert served.status().state == "PAUSED"
        assert served.waiting(helper.pid) == 1
        broken.unlink()
        served.order(AdminOp.RESUME)
        assert pending.result() == content[5 * PAGE : 5 * PAGE + 1]
        assert (served.block().state, served.block().reason) == ("RUNNING", "")
        assert served.waiting() == 0


def test_all_who_wait_are_served_after_resume(runtime_dir: Path, source: str, broken: Path, content: bytes) -> None:
    """P3, D3: outstanding requests are asked again, of every page and of every helper."""
    with serving(source, stream_mode=LAZY) as served:
        helpers = [attached(served) for _ in range(3)]
        touches = [(helper, number, helper.start(f"read(b, {7 * number} * 4096)"))
                   for number in range(20) for helper in helpers]  # fmt: skip
        served.wait_for_waiting(60)
        broken.unlink()
        served.order(AdminOp.RESUME)
        served.resume_until(lambda: all(pending.is_done() for _, _, pending in touches), "their pages")
        for _, number, pending in touches:
            assert pending.result() == content[7 * number * PAGE : 7 * number * PAGE + 1]
        wait_until(lambda: served.block().demand_pages == 20, "the pages to be counted once each")


def test_resume_of_a_source_that_still_fails_pauses_again(runtime_dir: Path, source: str, broken: Path) -> None:
    """P3: nobody is answered with anything."""
    with serving(source, stream_mode=LAZY) as served:
        helper = attached(served)
        pending = helper.start("read(b, 0)")
        for _ in range(3):
            served.wait_for_state("PAUSED")
            served.order(AdminOp.RESUME)
        served.wait_for_state("PAUSED")
        assert not pending.is_done()
        assert served.block().received_pages == 0
        broken.unlink()
        served.order(AdminOp.RESUME)
        pending.result()


def test_stream_and_ranges_go_on_after_resume(runtime_dir: Path, source: str, broken: Path, content: bytes) -> None:
    with serving(source, stream_mode=EAGER) as served:
        served.wait_for_state("PAUSED")
        helper = attached(served)
        ensured = helper.start(f"b.ensure(slice(0, {300 * PAGE}))")
        with pytest.raises(AttachTimeout, match=r"did not arrive within 0\.05 s"):
            helper.do("b.ensure(slice(0, 4096), timeout_s=0.05)")
        with pytest.raises(AttachTimeout, match=r"0\.0%"):
            helper.do("b.wait(1.0, timeout_s=0.05)")
        waited = helper.start("b.wait()")
        broken.unlink()
        served.order(AdminOp.RESUME)
        served.resume_until(lambda: ensured.is_done() and waited.is_done(), "all that they wait for")
        ensured.result()
        waited.result()
        served.wait_for_state("END")
        assert helper.do("bytes(b)") == content


def test_other_blocks_do_not_look_paused(runtime_dir: Path, source: str, data_file: Path, content: bytes) -> None:
    with serving(source, f"other={data_file}", stream_mode=EAGER) as served:
        served.wait_for_state("PAUSED")
        served.wait_for_state("END", "other")
        assert served.status().state == "PAUSED"
        assert served.status().reason.startswith("data: reading ")
        helper = served.helper()
        assert helper.do("c = attach('other'); bytes(c)") == content


def test_what_is_here_stays_readable_while_the_block_is_paused(
    runtime_dir: Path, source: str, broken: Path, content: bytes
) -> None:
    broken.unlink()
    with serving(source, stream_mode=LAZY) as served:
        helper = attached(served)
        helper.do("read(b, 0)")
        broken.touch()
        pending = helper.start("read(b, 4096)")
        served.wait_for_state("PAUSED")
        late = attached(served)
        assert late.do("read(b, 0)") == content[:1]
        assert not pending.is_done()
        broken.unlink()
        served.order(AdminOp.RESUME)
        pending.result()


def test_own_wait_goes_on_after_resume(runtime_dir: Path, source: str, broken: Path, content: bytes) -> None:
    """P3: the coordinator's own mapping waits like any other."""
    with serving(source, stream_mode=LAZY) as served:
        ram = served.ram()
        found: list[bytes] = []
        thread = threading.Thread(target=lambda: found.append(read_own_page(ram, 3)))
        thread.start()
        served.wait_for_state("PAUSED")
        broken.unlink()
        served.order(AdminOp.RESUME)
        thread.join()
        assert found == [content[3 * PAGE : 4 * PAGE]]


# ---- poison ----


def test_touch_of_a_lost_page_is_sigbus_and_of_no_other(
    runtime_dir: Path, source: str, broken: Path, content: bytes
) -> None:
    """P3: at exactly that page; who has it already reads on, and so does a helper that comes later, elsewhere."""
    broken.unlink()
    with serving(source, stream_mode=LAZY, poison=True) as served:
        reader, victim, late = (attached(served) for _ in range(3))
        assert reader.do(f"read(b, 4 * {PAGE}, {PAGE}) + read(b, 6 * {PAGE}, {PAGE})")
        broken.touch()
        assert touch_ends_with(victim, 5 * PAGE) == signal.SIGBUS
        assert served.block().lost_pages == 1
        wait_until(lambda: "touching what it lost is SIGBUS" in served.block().reason, "the reason")
        assert served.block().state == "RUNNING"
        broken.unlink()
        for helper in (reader, late):
            for page in (4, 6):
                assert helper.do(f"read(b, {page * PAGE}, {PAGE})") == content[page * PAGE : (page + 1) * PAGE]
        assert touch_ends_with(reader, 6 * PAGE - 1) == signal.SIGBUS
        newcomer = attached(served)
        assert touch_ends_with(newcomer, 5 * PAGE) == signal.SIGBUS
        assert late.do(f"read(b, 7 * {PAGE})") == content[7 * PAGE : 7 * PAGE + 1]
        assert served.block().lost_pages == 1


def test_poison_is_lifted_by_resume(runtime_dir: Path, source: str, broken: Path, content: bytes) -> None:
    """T10: for those who have the mark and those who come later, also in a lazy stream: such a page faults no more."""
    with serving(source, stream_mode=LAZY, poison=True) as served:
        marked, victim = attached(served), attached(served)
        # A mark that hurts nobody: a system call that reads from the page is told EFAULT.
        marked.do("import errno; fd = os.memfd_create('copy')")
        assert touch_ends_with(victim, 5 * PAGE) == signal.SIGBUS
        with pytest.raises(OSError, match="Bad address"):
            marked.do(f"os.write(fd, memoryview(b)[5 * {PAGE}:6 * {PAGE}])")
        broken.unlink()
        served.order(AdminOp.RESUME)
        wait_until(lambda: served.block().lost_pages == 0, "the lost page to be here")
        wait_until(lambda: served.block().received_pages == 1, "the lost page to be here")
        wait_until(lambda: marked.can_be_read(5), "the mark to be lifted")
        assert marked.do(f"read(b, 5 * {PAGE}, {PAGE})") == content[5 * PAGE : 6 * PAGE]
        assert attached(served).do(f"read(b, 5 * {PAGE}, {PAGE})") == content[5 * PAGE : 6 * PAGE]
        assert (served.block().state, served.block().reason) == ("RUNNING", "")


def test_page_that_was_ensured_has_no_mark_although_who_placed_it_has_not_come_to_that(
    runtime_dir: Path, data_file: Path, tmp_path: Path, content: bytes
) -> None:
    """P3, T10: the received bit comes first, and the thread that sets it may sleep before it lifts the marks."""
    broken = tmp_path / "broken"
    broken.touch()
    source = f"data={data_file}#error=EIO@{broken}&delay=5s"
    with serving(source, stream_mode=LAZY, poison=True) as served:
        helper = attached(served)
        assert not helper.can_be_read(5)
        broken.unlink()
        served.order(AdminOp.RESUME)  # the page comes in five seconds
        placed, ram = ffi.new("uint64_t *"), served.ram()
        assert lib.ramblock_place(ram.pointer, 5, 1, content[5 * PAGE : 6 * PAGE], placed) == lib.RAMBLOCK_PLACED
        helper.do("b.ensure(slice(0, 0))")
        helper.do(f"b.ensure(slice({5 * PAGE}, {6 * PAGE}))")
        assert helper.do(f"read(b, {5 * PAGE}, {PAGE})") == content[5 * PAGE : 6 * PAGE]


def test_ensure_and_wait_say_what_was_lost(runtime_dir: Path, source: str, broken: Path, content: bytes) -> None:
    with serving(source, stream_mode=LAZY, poison=True) as served:
        helper = attached(served)
        with pytest.raises(SourceLost, match="the source lost") as caught:
            helper.do(f"b.ensure(slice({10 * PAGE}, {11 * PAGE}))")
        lost = caught.value
        assert (lost.block, lost.offset, lost.length) == ("data", 10 * PAGE, PAGE)
        assert f"`pcshare resume {served.name}`" in str(lost)
        assert f"`pcshare status {served.name}`" in str(lost)
        with pytest.raises(SourceLost):  # known to be lost by now
            helper.do(f"b.ensure(slice({9 * PAGE}, {12 * PAGE}))")
        with pytest.raises(SourceLost, match="1 pages of"):
            helper.do("b.wait()")
        broken.unlink()
        helper.do(f"b.ensure(slice({20 * PAGE}, {30 * PAGE}))")
        served.order(AdminOp.RESUME)
        helper.do(f"b.ensure(slice({9 * PAGE}, {12 * PAGE}))")
        assert helper.do(f"read(b, {10 * PAGE}, 9)") == content[10 * PAGE : 10 * PAGE + 9]


def test_who_waits_for_a_range_is_told_when_a_part_of_it_is_lost(
    runtime_dir: Path, data_file: Path, broken: Path
) -> None:
    """P3: one that had begun to wait before."""
    with serving(f"data={data_file}#delay=5ms&error=EIO@{broken}", stream_mode=LAZY, poison=True) as served:
        helper = attached(served)
        pending = [helper.start("b.ensure()"), helper.start(f"b.ensure(slice({LENGTH // 2}, {LENGTH}))")]
        for one in pending:
            with pytest.raises(SourceLost):
                one.result()


# ---- a file that shrinks ----


@pytest.mark.parametrize("at", [KEPT_PAGES * PAGE, KEPT_PAGES * PAGE + 100], ids=["at a page", "within a page"])
def test_shrunk_file_is_a_source_error_at_those_pages_and_never_zeros(
    runtime_dir: Path, data_file: Path, content: bytes, at: int
) -> None:
    """P1, P3: paused with what happened; put back and resumed, everything is right."""
    with serving(f"data={data_file}", stream_mode=LAZY) as served:
        helper = attached(served)
        os.truncate(data_file, at)
        assert helper.do(f"read(b, {(KEPT_PAGES - 1) * PAGE}, {PAGE})") == content[: KEPT_PAGES * PAGE][-PAGE:]
        pending = [helper.start(f"read(b, {page * PAGE}, 1)") for page in (KEPT_PAGES, N_PAGES - 1)]
        block = served.wait_for_state("PAUSED")
        assert "is shorter than it was" in block.reason
        served.wait_for_waiting(2)
        data_file.write_bytes(content)
        served.order(AdminOp.RESUME)
        assert [one.result() for one in pending] == [
            content[page * PAGE : page * PAGE + 1] for page in (KEPT_PAGES, N_PAGES - 1)
        ]
        served.order(AdminOp.STREAM_EAGER)
        served.wait_for_state("END")
        assert helper.do("bytes(b)") == content


def test_stream_brings_all_that_a_shrunk_file_still_has_and_names_the_rest(
    runtime_dir: Path, data_file: Path, content: bytes
) -> None:
    """P3: pieces that fail are halved until the lost pages are known one by one."""
    with serving(f"data={data_file}", stream_mode=LAZY, poison=True) as served:
        os.truncate(data_file, KEPT_PAGES * PAGE + 100)
        served.order(AdminOp.STREAM_EAGER)
        block = served.wait_for_state("PAUSED")
        assert (block.received_pages, block.lost_pages) == (KEPT_PAGES, N_PAGES - KEPT_PAGES)
        assert f"it lost {N_PAGES - KEPT_PAGES} pages" in block.reason
        helper = attached(served)
        assert helper.do(f"read(b, 0, {KEPT_PAGES * PAGE})") == content[: KEPT_PAGES * PAGE]
        with pytest.raises(SourceLost):
            helper.do("b.wait()")
        helper.do(f"b.wait({(KEPT_PAGES - 1) / N_PAGES})")
        assert touch_ends_with(helper, KEPT_PAGES * PAGE) == signal.SIGBUS
        data_file.write_bytes(content)
        served.order(AdminOp.RESUME)
        block = served.wait_for_state("END")
        assert (block.lost_pages, block.reason) == (0, "")
        assert attached(served).do("bytes(b)") == content


def test_lost_pages_are_asked_for_once_each(runtime_dir: Path, data_file: Path, tmp_path: Path) -> None:
    """And not again and again by a stream that has nothing else to do."""
    trace = tmp_path / "trace"
    with serving(f"data={data_file}", stream_mode=LAZY, poison=True, trace=str(trace)) as served:
        os.truncate(data_file, KEPT_PAGES * PAGE)
        served.order(AdminOp.STREAM_EAGER)
        served.wait_for_state("PAUSED")
        asked = [one for one in read_trace(str(trace)) if one.event == "stream_request"]
        single = [one.page for one in asked if one.detail == 1 and one.page >= KEPT_PAGES]
        assert len(single) == len(set(single)) == N_PAGES - KEPT_PAGES
        assert len(asked) < 3 * N_PAGES


def test_error_at_one_page_does_not_hide_behind_the_end(
    runtime_dir: Path, data_file: Path, broken: Path, content: bytes
) -> None:
    """A block that became complete after all has no reason left standing."""
    with serving(f"data={data_file}#error=EIO@{broken}", stream_mode=EAGER, poison=True) as served:
        served.wait_for_state("PAUSED")
        broken.unlink()
        served.order(AdminOp.RESUME)
        assert served.wait_for_state("END").reason == ""
        assert served.status().reason == ""
