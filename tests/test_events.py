"""What a writable helper does to its mapping (madvise, mremap, munmap): followed, and nobody waits for ever (T8)."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from core_support import child
from helper_c_support import build
from pcshare import admin
from pcshare.core import ffi, lib
from pcshare.fault_thread import EventKind
from pcshare.protocol import AdminOp
from pcshare.status import StatusReader, read_status, remove_leftovers
from support import suspended, wait_until
from support_coordinator import Serving as Running
from support_coordinator import coordinator, die_with_parent
from support_rig import Rig
from support_serving import EAGER, LAZY, PAGE, PAUSED, WAIT_S, HelperProcess, Serving, serving

N_PAGES = 256
LENGTH = N_PAGES * PAGE
HAMMERED_BYTES = 128 << 20  # the stream takes a fifth of a second for it
ROUNDS = 3
EVENTS = (
    lib.UFFD_FEATURE_BIT_THREAD_ID
    | lib.UFFD_FEATURE_BIT_EVENT_REMOVE
    | lib.UFFD_FEATURE_BIT_EVENT_UNMAP
    | lib.UFFD_FEATURE_BIT_EVENT_REMAP
)


@pytest.fixture
def served(runtime_dir: Path, data_file: Path) -> Iterator[Serving]:
    with serving(f"data={data_file}", stream_mode=LAZY, writable=("data",)) as made:
        yield made


def attached(served: Serving, mode: str = "rw") -> HelperProcess:
    helper = served.helper()
    helper.do(f"b = attach(mode={mode!r})")
    helper.do(ADDRESSES)
    return helper


# What the pieces of code below use in the helper.
ADDRESSES = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
for call in (libc.mremap, libc.mmap):
    call.restype = ctypes.c_void_p
libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
def at(page):
    return int(ffi.cast("uintptr_t", ffi.from_buffer(b))) + page * 4096
def peek(addr, length=4096):
    here = ctypes.create_string_buffer(length)
    libc.memcpy(here, ctypes.c_void_p(addr), ctypes.c_size_t(length))
    return here.raw
def room(pages):
    return libc.mmap(None, pages * 4096, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
def move(page, pages, to, flags=3):
    return libc.mremap(at(page), pages * 4096, pages * 4096, flags, to) == to
"""


def received(served: Serving) -> set[int]:
    with StatusReader(served.name) as reader:
        bits = reader.bitmap(reader.report().blocks[0])
    return {page for page in range(N_PAGES) if bits[page // 8] >> page % 8 & 1}


# ---- removed pages ----


@pytest.fixture(scope="module")
def remover(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("c"), "remover", "plain")


@pytest.mark.parametrize("number", range(ROUNDS))
def test_no_old_page_comes_to_where_a_helper_removed_it_while_it_was_placed(
    runtime_dir: Path, tmp_path: Path, remover: Path, seed: int, number: int
) -> None:
    """P1, P2: beside a stream at full speed, just where it is."""
    path = tmp_path / "large.bin"
    path.write_bytes(random.Random(seed + number).randbytes(HAMMERED_BYTES))
    with coordinator(f"data={path}", options=["--stream=paused", "--writable=data"]) as served:
        helper = subprocess.Popen(
            [remover, served.socket, str(path), str(seed + number)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=die_with_parent,
        )  # fmt: skip
        assert helper.stdout is not None
        assert helper.stdout.readline() == "attached\n"
        admin.send(served.socket, AdminOp.STREAM_EAGER, 0)
        out, err = helper.communicate(timeout=2 * WAIT_S)
        assert helper.returncode == 0, (out, err)
        removed, missing, wrong = map(int, out.split())
        assert wrong == 0, err
        block = served.wait_for_state("END")
        assert 100 < missing <= removed  # a slow machine may have no page there before it is removed
        assert block.received_pages == HAMMERED_BYTES // PAGE
        assert 100 < block.removed_pages <= removed
        assert block.foreign_pages == 0


def test_page_that_is_removed_before_it_came_is_zeros_for_everybody(served: Serving, content: bytes) -> None:
    remover, other, reader = attached(served), attached(served), attached(served, "ro")
    remover.do("b.madvise(mmap.MADV_REMOVE, 5 * 4096, 3 * 4096)")
    wait_until(lambda: received(served) == {5, 6, 7}, "the marks")
    other.do("write(b, 6 * 4096, b'new')")
    served.order(AdminOp.STREAM_EAGER)
    served.wait_for_state("END")
    wanted = bytearray(content)
    wanted[5 * PAGE : 8 * PAGE] = bytes(3 * PAGE)
    wanted[6 * PAGE : 6 * PAGE + 3] = b"new"
    for helper in (remover, other, reader):
        assert helper.do("b.wait(); bytes(b)") == bytes(wanted)
    block = served.block()
    assert (block.removed_pages, block.received_pages, block.foreign_pages) == (3, N_PAGES, 0)


def test_block_of_which_everything_is_removed_is_complete(served: Serving) -> None:
    helper = attached(served)
    helper.do(f"b.madvise(mmap.MADV_REMOVE, 0, {LENGTH})")
    assert served.wait_for_state("END").removed_pages == N_PAGES
    assert helper.do("b.wait(); bytes(b)") == bytes(LENGTH)


def test_holes_of_the_source_stay_holes_when_they_are_removed(runtime_dir: Path) -> None:
    with serving(f"data=zero:{LENGTH}", stream_mode=LAZY) as served:
        helper = attached(served)
        assert helper.do("b.madvise(mmap.MADV_REMOVE, 0, 8 * 4096); read(b, 4096, 4096)") == bytes(PAGE)
        assert served.wait_for_state("END").removed_pages == 0


def test_who_waits_for_a_page_is_woken_when_it_is_removed(runtime_dir: Path, data_file: Path, content: bytes) -> None:
    """P3: the source is asked and does not answer."""
    with serving(f"data={data_file}#delay=60s", stream_mode=LAZY, writable=("data",)) as served:
        remover, other = attached(served), attached(served)
        touching = other.start("read(b, 9 * 4096, 4096)")
        asking = other.start("b.ensure(slice(9 * 4096, 10 * 4096))")
        served.wait_for_waiting(1)
        remover.do("b.madvise(mmap.MADV_REMOVE, 9 * 4096, 4096)")
        assert touching.result() == bytes(PAGE)
        asking.result()


def test_page_that_was_lost_and_is_removed_is_zeros_again(runtime_dir: Path, data_file: Path, tmp_path: Path) -> None:
    """T10: the poison mark goes with it."""
    broken = tmp_path / "broken"
    broken.touch()
    with serving(f"data={data_file}#error=EIO@{broken}", stream_mode=LAZY, writable=("data",), poison=True) as served:
        helper = attached(served)
        helper.do("r, w = os.pipe()")
        touch = "try: os.write(w, memoryview(b)[5 * 4096 : 6 * 4096])\nexcept OSError as error: failed = error.errno"
        helper.do(touch)  # in a system call, where SIGBUS is EFAULT
        assert helper.do("failed") == errno.EFAULT
        assert served.block().lost_pages == 1
        helper.do("b.madvise(mmap.MADV_REMOVE, 5 * 4096, 4096)")
        assert helper.do("read(b, 5 * 4096, 4096)") == bytes(PAGE)
        wait_until(lambda: served.block().lost_pages == 0, "the loss to be forgotten")


# ---- what is unmapped and moved ----


def test_moved_pages_are_served_where_they_lie_now(served: Serving, content: bytes) -> None:
    helper = attached(served)
    helper.do("to = room(64)")
    assert helper.do("move(10, 4, to)")
    assert helper.do("peek(to + 4096)") == content[11 * PAGE : 12 * PAGE]
    assert helper.do("peek(at(14))") == content[14 * PAGE : 15 * PAGE]  # behind them, where it lay before
    assert helper.do("libc.mremap(to + 4096, 4096, 4096, 3, to + 9 * 4096) == to + 9 * 4096")  # and again
    assert helper.do("libc.mremap(to + 2 * 4096, 4096, 4096, 3, to + 10 * 4096) == to + 10 * 4096")
    assert helper.do("peek(to + 10 * 4096)") == content[12 * PAGE : 13 * PAGE]
    assert helper.do("peek(to + 3 * 4096)") == content[13 * PAGE : 14 * PAGE]
    assert not [one for one in served.helpers(helper.pid) if one.state != "attached"]


def test_pages_that_are_moved_and_stay_are_served_at_both_places(served: Serving, content: bytes) -> None:
    """MREMAP_DONTUNMAP: no UNMAP comes."""
    helper = attached(served)
    assert helper.do("to = room(4); move(20, 2, to, 7)")
    assert helper.do("peek(to)") == content[20 * PAGE : 21 * PAGE]
    assert helper.do("peek(at(21))") == content[21 * PAGE : 22 * PAGE]


def waiting_in_faults(pid: int) -> int:
    """Threads of a process whose faults nobody has read yet."""
    found = 0
    for link in Path(f"/proc/{pid}/fd").iterdir():
        if os.readlink(link) == "anon_inode:[userfaultfd]":
            text = Path(f"/proc/{pid}/fdinfo/{link.name}").read_text()
            found += int(text.partition("pending:")[2].split()[0])
    return found


def test_fault_where_pages_were_moved_is_explained_by_the_event_behind_it_also_beside_others(
    runtime_dir: Path, data_file: Path, content: bytes
) -> None:
    """Faults are handed out first, and beside others one by one: the address means nothing until the event is read."""
    with (
        coordinator(f"data={data_file}", options=["--stream=lazy", "--writable=data"]) as served,
        contextlib.closing(HelperProcess(served.socket)) as mover,
        contextlib.closing(HelperProcess(served.socket)) as other,
    ):
        for helper in (mover, other):
            helper.do("b = attach(mode='rw')")
        mover.do(ADDRESSES)
        mover.do("to = libc.mmap(None, 4096, 1, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)")
        other.do("read(b, 0)")  # it was the last one
        with suspended(served.pid):
            moved = mover.start("move(30, 1, to)")
            touched = mover.start("while not any(found := peek(to)): pass\nfound")
            wait_until(lambda: waiting_in_faults(mover.process.pid) == 1, "a fault at the new place")
            beside = other.start(f"read(b, {8 * PAGE}, {PAGE})")
            wait_until(lambda: waiting_in_faults(other.process.pid) == 1, "a fault of the other helper")
            assert not moved.is_done()
        assert moved.result()
        assert touched.result() == content[30 * PAGE : 31 * PAGE]
        assert beside.result() == content[8 * PAGE : 9 * PAGE]
        assert {helper.state for helper in served.status().helpers} == {"attached"}


def test_thread_that_waits_for_a_page_gets_it_although_others_were_moved(
    runtime_dir: Path, data_file: Path, content: bytes
) -> None:
    with serving(f"data={data_file}#delay=5s", stream_mode=LAZY, writable=("data",)) as served:
        helper = attached(served)
        helper.do("to = room(8); move(30, 1, to)")
        waiting = [helper.start("peek(to)"), helper.start("peek(at(31))")]
        served.wait_for_waiting(2)
        helper.do("move(40, 2, to + 4 * 4096)")
        assert [one.result() for one in waiting] == [content[page * PAGE : (page + 1) * PAGE] for page in (30, 31)]


def test_unmapped_pages_are_forgotten_and_the_rest_is_served(served: Serving, content: bytes) -> None:
    helper = attached(served)
    assert helper.do("libc.munmap(at(50), 2 * 4096)") == 0
    assert helper.do("libc.mmap(at(60), 4096, 3, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 16, -1, 0) == at(60)")
    assert helper.do("peek(at(60))") == bytes(PAGE)  # its own memory by now
    assert helper.do("peek(at(49))") == content[49 * PAGE : 50 * PAGE]
    assert helper.do("peek(at(61))") == content[61 * PAGE : 62 * PAGE]
    assert not received(served) & {50, 51, 60}
    helper.do("del b")
    helper.do("import gc; gc.collect()")
    wait_until(lambda: not served.helpers(helper.pid), "it to have left")


def test_thread_that_waits_where_another_unmaps_ends_its_own_process(runtime_dir: Path, data_file: Path) -> None:
    """P3: SIGSEGV, and not a wait for a page that will never be there."""
    with serving(f"data={data_file}#delay=60s", stream_mode=LAZY, writable=("data",)) as served:
        helper = attached(served)
        helper.start("peek(at(70))")
        served.wait_for_waiting(1)
        helper.start("libc.munmap(at(70), 4096)")
        assert helper.wait_for_end() == -signal.SIGSEGV


def test_mapping_in_too_many_pieces_is_cut_off_alone(
    served: Serving, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """P4: with a reason; and it still does not hang."""
    helper, other = attached(served), attached(served)
    helper.do("to = room(200)")
    assert helper.do("[move(100 + 2 * i, 1, to + 3 * i * 4096) for i in range(12)]") == [True] * 12
    wait_until(lambda: "more pieces than are followed" in caplog.text, "the report")
    assert other.do("read(b, 0, 4096)") == content[:PAGE]
    helper.do("b.madvise(mmap.MADV_REMOVE, 0, 4096)")


# ---- somebody reads in every state ----


def remove_and_read(helper: HelperProcess, page: int) -> bytes:
    found: bytes = helper.do(f"b.madvise(mmap.MADV_REMOVE, {page} * 4096, 4096); read(b, {page} * 4096, 4096)")
    return found


def test_events_are_read_while_a_block_is_paused(runtime_dir: Path, tmp_path: Path, data_file: Path) -> None:
    broken = tmp_path / "broken"
    broken.touch()
    with serving(f"data={data_file}#error=EIO@{broken}", stream_mode=PAUSED, writable=("data",)) as served:
        helper = attached(served)
        helper.start("read(b, 0)")
        served.wait_for_state("PAUSED")
        assert remove_and_read(helper, 3) == bytes(PAGE)


def test_events_are_read_until_the_helper_has_left(runtime_dir: Path, data_file: Path) -> None:
    """Between END and its LEAVE too: threads that go on removing never hang."""
    for _ in range(5):
        with serving(f"data={data_file}", stream_mode=EAGER, writable=("data",)) as served:
            helper = served.helper()
            helper.do("b = attach()")
            removing = helper.start("for i in range(2000): b.madvise(mmap.MADV_REMOVE, i % 256 * 4096, 4096)")
            served.wait_for_state("END")
            removing.result()
            wait_until(lambda: helper.do("b.state") == "complete", "it to be told")  # noqa: B023


def test_child_of_fork_that_removes_at_once_is_heard_by_the_coordinator(
    runtime_dir: Path, data_file: Path, content: bytes
) -> None:
    """Before its uffd is handed over nobody takes the event: the page would come back."""
    with serving(f"data={data_file}", stream_mode=LAZY, writable=("data",)) as served:
        helper = attached(served)
        for page in range(20):
            code = f"""
pid = os.fork()
if pid == 0:
    b.madvise(mmap.MADV_REMOVE, {page} * 4096, 4096)
    os._exit(0)
os.waitpid(pid, 0)[1]
"""
            assert helper.do(code) == 0
        wait_until(lambda: received(served) == set(range(20)), "the marks")
        assert helper.do("b.ensure(); bytes(b)") == bytes(20 * PAGE) + content[20 * PAGE :]


def test_events_are_read_when_the_coordinator_was_killed(runtime_dir: Path, data_file: Path, content: bytes) -> None:
    """T8: while the helper waits for another one, and when it has given up."""
    command = [sys.executable, "-m", "pcshare", "coordinator", f"--name=killed-{os.getpid()}", "--json", "--no-keeper",
               "--stream=lazy", "--writable=data", "--orphan-timeout=10s", f"data={data_file}"]  # fmt: skip
    with contextlib.ExitStack() as stack:
        keeper = subprocess.Popen(command, stdout=subprocess.PIPE, preexec_fn=die_with_parent)
        stack.callback(keeper.wait)
        stack.callback(keeper.kill)
        assert keeper.stdout is not None
        stack.callback(keeper.stdout.close)
        ready = json.loads(keeper.stdout.readline())
        stack.callback(remove_leftovers, ready["name"])
        helper = stack.enter_context(HelperProcess(read_status(ready["name"]).socket))
        helper.do("b = attach(mode='rw'); read(b, 0, 2 * 4096)")
        os.kill(ready["pid"], signal.SIGKILL)
        wait_until(lambda: helper.do("b.state") == "orphaned", "it to be orphaned")
        helper.do("b.madvise(mmap.MADV_REMOVE, 0, 4096)")
        assert helper.do("b.state") == "orphaned"
        wait_until(lambda: helper.do("b.state") == "lost", "it to be lost")
        helper.do("b.madvise(mmap.MADV_REMOVE, 3 * 4096, 4096)")
        assert helper.do("read(b, 0, 2 * 4096)") == bytes(PAGE) + content[PAGE : 2 * PAGE]
        helper.do("b.close(); del b")


def test_who_attaches_again_says_where_its_pages_are(runtime_dir: Path, data_file: Path, content: bytes) -> None:
    """P5: the maps go over as they are by then."""
    with serving(f"data={data_file}", stream_mode=LAZY, writable=("data",)) as served:
        helper = attached(served)
        assert helper.do("to = room(8); move(10, 2, to)")
        helper.do("libc.munmap(at(20), 4096)")
        (slot,) = served.helpers(helper.pid)
        served.server.helpers.remove(next(iter(served.server.helpers)))  # as if the coordinator had come anew
        wait_until(lambda: [one.slot for one in served.helpers(helper.pid)] not in ([], [slot.slot]), "it to be back")
        assert helper.do("peek(to + 4096)") == content[11 * PAGE : 12 * PAGE]
        assert helper.do("peek(at(21))") == content[21 * PAGE : 22 * PAGE]
        assert helper.do("b.madvise(mmap.MADV_REMOVE, 0, 4096); read(b, 0, 4096)") == bytes(PAGE)


def wait_for_another(served: Running, before: int) -> None:
    """A coordinator that serves in place of the one with that pid."""

    def serves() -> bool:
        now = served.status()
        return now.alive and now.pid != before

    wait_until(serves, "another coordinator", WAIT_S)


def wait_for_removed(served: Running, count: int) -> None:
    wait_until(lambda: served.block("data").removed_pages == count, f"{count} pages to be marked as removed")


def test_coordinator_that_is_started_again_knows_what_was_removed_and_moved(
    runtime_dir: Path, data_file: Path, content: bytes
) -> None:
    """P5: before it was killed, and while there was none."""
    with (
        coordinator(f"data={data_file}", options=["--stream=lazy", "--writable=data"]) as served,
        HelperProcess(served.socket) as helper,
    ):
        helper.do("b = attach(mode='rw')")
        helper.do(ADDRESSES)
        helper.do("to = room(64)")
        for turn in range(3):
            first = 20 * turn
            assert helper.do(f"move({first}, 2, to + {turn} * 8 * 4096)")
            helper.do(f"b.madvise(mmap.MADV_REMOVE, {first + 10} * 4096, 4096)")
            wait_for_removed(served, 2 * turn + 1)  # what was read and not noted yet dies with it
            before = served.status().pid
            os.kill(before, signal.SIGKILL)
            assert helper.do(f"move({first + 4}, 2, to + ({turn} * 8 + 4) * 4096)")
            helper.do(f"libc.munmap(at({first + 8}), 4096)")
            helper.do(f"b.madvise(mmap.MADV_REMOVE, {first + 11} * 4096, 4096)")
            wait_for_another(served, before)
            for page, lies in ((0, 0), (1, 1), (4, 4), (5, 5)):
                wanted = content[(first + page) * PAGE : (first + page + 1) * PAGE]
                assert helper.do(f"peek(to + ({turn} * 8 + {lies}) * 4096)") == wanted
            assert (
                helper.do(f"peek(at({first + 10}), 3 * 4096)")
                == bytes(2 * PAGE) + content[(first + 12) * PAGE :][:PAGE]
            )
        assert helper.do("b.state") == "attached"
        assert served.block("data").removed_pages == 6
        assert [one.state for one in served.status().helpers] == ["attached"]


# ---- what somebody else has read ----


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig(f"rig-{os.getpid()}")
    yield made
    made.close()


def message(event: int, fault_addr: int, length: int, to_addr: int = 0) -> Any:
    fields = {"event": event, "fault_addr": fault_addr, "length": length, "to_addr": to_addr, "fork_fd": -1}
    return ffi.new("struct uffd_message *", fields)


def test_event_that_was_read_by_another_is_applied(rig: Rig, data_file: Path, content: bytes) -> None:
    """P5: in the order in which they came, before anything is served; once more does no harm."""
    ram = rig.add_block(f"data={data_file}", writable=True)
    with child(ram.helper_memfd(writing=True), ram.map_length, features=EVENTS) as helper:
        number, control = rig.add_remote(ram, helper, [(helper.addr + (1 << 30), 0, LENGTH)], has_events=True)
        logged = [
            message(lib.UFFD_MESSAGE_REMAP, helper.addr + (1 << 30), LENGTH, helper.addr),
            message(lib.UFFD_MESSAGE_UNMAP, helper.addr + (1 << 30), LENGTH),
            message(lib.UFFD_MESSAGE_REMOVE, helper.addr + 5 * PAGE, 2 * PAGE),
            message(lib.UFFD_MESSAGE_PAGEFAULT, helper.addr, 0),
        ]
        for one in logged + logged:
            lib.fault_threads_apply_event(rig.threads.pointer, number, one)
        assert [page for page in range(N_PAGES) if ram.is_received(page)] == [5, 6]
        assert rig.segment.block_slot(0).removed_pages == 2
        rig.threads.start([-1, -1])
        for page, first in ((4, content[4 * PAGE]), (5, 0), (6, 0), (7, content[7 * PAGE])):
            helper.tell(f"touch {page * PAGE}")
            assert helper.answer() == bytes([first])
        helper.tell(f"dontneed {8 * PAGE} {PAGE}")  # told as if it had been removed
        assert helper.answer() == b"done"
        wait_until(lambda: ram.is_received(8), "the mark, which is made behind the gate")
        assert not rig.events()
        assert lib.uffd_unregister(helper.uffd, helper.addr, helper.length) == 0  # or it would wait in its last munmap
        rig.threads.remove_remote(number)
        control.close()


def test_event_of_who_may_not_write_is_not_applied(rig: Rig, data_file: Path) -> None:
    ram = rig.add_block(f"data={data_file}", writable=True)
    with child(ram.helper_memfd(writing=False), ram.map_length, features=lib.UFFD_FEATURE_BIT_THREAD_ID) as helper:
        number, control = rig.add_remote(ram, helper)
        lib.fault_threads_apply_event(rig.threads.pointer, number, message(lib.UFFD_MESSAGE_REMOVE, helper.addr, PAGE))
        assert not ram.is_received(0)
        rig.threads.remove_remote(number)
        control.close()


def test_fork_event_is_an_offence_of_writers_too(rig: Rig, data_file: Path) -> None:
    """T8: it is not asked for, and its fd is closed."""
    rig.threads.start([-1])
    ram = rig.add_block(f"data={data_file}", writable=True)
    features = EVENTS | lib.UFFD_FEATURE_BIT_EVENT_FORK
    with child(ram.helper_memfd(writing=True), ram.map_length, features=features) as helper:
        number, control = rig.add_remote(ram, helper, has_events=True)
        helper.tell("fork")
        event = rig.wait_for_event(EventKind.REMOTE_DISABLED)
        assert (event.remote_id, event.error) == (number, errno.EBADMSG)
        assert lib.uffd_unregister(helper.uffd, helper.addr, helper.length) == 0
        rig.threads.remove_remote(number)
        control.close()
