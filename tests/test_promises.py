"""The promises, each with who tries to break it: P1, P2, P4, P7, P8 and P9. P3 has test_source_loss.py."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import random
import re
import signal
import tempfile
import threading
import time
from pathlib import Path

import pytest

import pcshare
from pcshare.protocol import AdminOp
from serving_child import HandOver
from support import suspended, wait_until
from support_coordinator import coordinator
from support_nbd import ScriptedServer, Withheld
from support_serving import EAGER, LAZY, NOBODY, PAGE, HelperProcess, Serving, make_file, serving

N_PAGES = 400
LENGTH = N_PAGES * PAGE - 7
UFFD = "anon_inode:[userfaultfd]"
GIL_HELD_S = 2
PROGRESS_LEAST = 20  # faults in that time, at 1 ms each; on a machine that stands still now and then


def attached(served: Serving, arguments: str = "", *, uid: int | None = None) -> HelperProcess:
    helper = served.helper(uid=uid)
    helper.do(f"b = attach({arguments})")
    return helper


def core_threads(pid: int | str = "self") -> set[str]:
    """Names, as far as the kernel keeps them, of the threads that run no Python."""
    names = set()
    for tid in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            names.add(Path(f"/proc/{pid}/task/{tid}/comm").read_text().strip())
    return {name for name in names if name.startswith("pcshare-")}


# ---- P9: no fault waits for Python ----


def test_helpers_are_served_while_the_coordinators_python_is_stopped(
    runtime_dir: Path, tmp_path: Path, rng: random.Random
) -> None:
    """P9: for two seconds one thread holds the GIL of the coordinator's process; faults and ranges are answered."""
    n_pages = 16000
    path = make_file(tmp_path, rng, n_pages * PAGE)
    with serving(f"data={path}#delay=1ms", stream_mode=LAZY, read_ahead=0) as served:
        toucher, ensurer = attached(served), attached(served)
        for helper in (toucher, ensurer):
            helper.do(f"content, stop = open({str(path)!r}, 'rb').read(), False")
        touching = toucher.start(
            "for page in range(8000):\n"
            "    assert read(b, page * 4096, 16) == content[page * 4096:page * 4096 + 16]\n"
            "    if stop: break"
        )
        ensuring = ensurer.start(
            "for page in range(8000, 16000, 2):\n"
            "    b.ensure(slice(page * 4096, page * 4096 + 5000))\n"
            "    assert b[page * 4096] == content[page * 4096]\n"
            "    if stop: break"
        )
        wait_until(lambda: served.status().faults > 10 and served.block().demand_pages > 30, "both to be under way")
        slots = [served.server._segment.helper_slot(slot) for slot in (0, 1)]
        before = [slot.demand_pages for slot in slots]
        started = time.monotonic()
        ctypes.PyDLL(None).sleep(GIL_HELD_S)  # PyDLL keeps the GIL
        after, took_s = [slot.demand_pages for slot in slots], time.monotonic() - started
        assert took_s >= GIL_HELD_S
        assert [now - then > PROGRESS_LEAST for now, then in zip(after, before, strict=True)] == [True, True]
        for helper, pending in ((toucher, touching), (ensurer, ensuring)):
            helper.do("stop = True")
            pending.result()


def test_python_thread_of_the_coordinator_gets_the_page_it_touches(
    runtime_dir: Path, data_file: Path, content: bytes
) -> None:
    """P9, C1, C2: it waits in the kernel with the GIL held, so that nothing of Python moves meanwhile."""
    with serving(f"data={data_file}#delay=20ms", stream_mode=LAZY) as served:
        view = memoryview(served.ram().own_bytes(0, LENGTH))
        assert [view[offset] for offset in (0, 100 * PAGE + 3, LENGTH - 1)] == [
            content[offset] for offset in (0, 100 * PAGE + 3, LENGTH - 1)
        ]
        assert served.block().received_pages == 3
        assert served.status().faults == 0  # those of helpers


def test_program_that_serves_and_uses_a_block_at_once_gets_its_pages(
    runtime_dir: Path, data_file: Path, content: bytes
) -> None:
    """P9: a helper inside the coordinator's own process touches missing pages, the GIL in its hand."""
    with (
        serving(f"data={data_file}#delay=5ms", stream_mode=LAZY) as served,
        pcshare.attach(socket=served.socket) as block,
    ):
        for page in range(20):
            assert block[page * PAGE] == content[page * PAGE]
        assert block[-1] == content[-1]


# ---- P1: no wrong byte, and the alarm ----


def planted(served: Serving, pages: list[int]) -> None:
    """Another process maps the block's memory, registers nothing, and reads."""
    planter = served.helper()
    planter.do("m = hand_over('welcome').unregistered()")
    assert planter.do(f"[m[page * 4096] for page in {pages}]") == [0] * len(pages)


@pytest.mark.parametrize("how", ["stream", "one range", "page by page"])
def test_planted_page_is_found_reported_and_repaired_when_it_is_placed(
    runtime_dir: Path, data_file: Path, content: bytes, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    """P1, T3: in a read-only block; from then on everybody reads the source's bytes."""
    with serving(f"data={data_file}", stream_mode=LAZY) as served:
        helper = attached(served)
        planted(served, [5, 6, 100])
        assert served.block().foreign_pages == 0
        if how == "one range":
            helper.do("b.ensure()")
        elif how == "page by page":
            helper.do("for page in (5, 6, 100): b.ensure(slice(page * 4096, page * 4096 + 1))")
        served.order(AdminOp.STREAM_EAGER)
        served.wait_for_state("END")
        assert helper.do("bytes(b)") == content
        assert (served.block().received_pages, served.block().foreign_pages) == (N_PAGES, 3)
        wait_until(lambda: "3 foreign pages so far" in caplog.text, "the report")
        assert "replaced by the source's bytes" in caplog.text
        assert next(record.levelno for record in caplog.records if "foreign" in record.message) == logging.ERROR


def wait_for_pending_fault(pid: int) -> None:
    """Until a fault of this process is queued that nobody reads."""
    folder = Path(f"/proc/{pid}/fd")
    number = next(fd.name for fd in folder.iterdir() if os.readlink(fd) == UFFD)
    fdinfo = Path(f"/proc/{pid}/fdinfo/{number}")
    wait_until(lambda: "pending:\t1" in fdinfo.read_text(), "the fault to be queued")


def test_planted_page_is_found_by_the_fault_that_was_there_first(
    runtime_dir: Path, data_file: Path, content: bytes
) -> None:
    """P1, P3: planted between the fault and its answer; the report and the end of the block do not get lost with it."""
    with (
        coordinator(f"data={data_file}", options=["--stream=lazy"]) as served,
        HelperProcess(served.socket) as helper,
        HelperProcess(served.socket) as planter,
    ):
        helper.do("b = attach(); b.ensure(slice(4096, None))")
        planter.do("m = hand_over('welcome').unregistered()")
        with suspended(served.pid):
            pending = helper.start("read(b, 0, 4096)")
            wait_for_pending_fault(helper.pid)
            assert planter.do("m[0]") == 0
        assert pending.result() == content[:PAGE]
        assert served.wait_for_state("END").foreign_pages == 1


def test_planted_page_of_a_writable_block_is_reported_and_left(
    runtime_dir: Path, data_file: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """P1, P2, T2: by fallocate; it could be a write, so nobody overwrites it."""
    with serving(f"data={data_file}", stream_mode=LAZY, writable=("data",)) as served:
        planter, helper = served.helper(), attached(served)
        planter.do("h = hand_over('welcome'); os.posix_fallocate(h.fds[0].fileno(), 3 * 4096, 2 * 4096)")
        helper.do("b.ensure()")
        assert helper.do("read(b, 3 * 4096, 2 * 4096)") == bytes(2 * PAGE)
        found = helper.do("bytes(b)")
        assert found[: 3 * PAGE] + found[5 * PAGE :] == content[: 3 * PAGE] + content[5 * PAGE :]
        wait_until(lambda: served.block().foreign_pages == 2, "two foreign pages")
        wait_until(lambda: "left as it is, since it may be a write" in caplog.text, "the report")


def test_fallocate_of_a_read_only_block_is_repaired(runtime_dir: Path, data_file: Path, content: bytes) -> None:
    """P1, T2: root opens the memfd for writing; the seal does not keep it from making pages of zeros."""
    with serving(f"data={data_file}", stream_mode=LAZY) as served:
        planter, helper = served.helper(), attached(served)
        planter.do("h = hand_over('welcome'); fd = os.open(f'/proc/self/fd/{h.fds[0].fileno()}', os.O_RDWR)")
        planter.do("os.posix_fallocate(fd, 0, 10 * 4096)")
        helper.do("b.ensure()")
        assert helper.do("bytes(b)") == content
        assert served.block().foreign_pages == 10


def test_hole_that_one_helper_fills_and_another_one_waits_for_raises_no_alarm_in_a_complete_block(
    runtime_dir: Path, tmp_path: Path
) -> None:
    """P1: the one has been told that the block is complete and has a plain mapping, the other one not yet."""
    path = tmp_path / "sparse"
    path.write_bytes(b"data")
    os.truncate(path, 10 * PAGE)
    with (
        coordinator(f"data={path}", options=["--stream=lazy"]) as served,
        HelperProcess(served.socket) as told,
        HelperProcess(served.socket) as other,
    ):
        other.do("h = hand_over('ack')")
        told.do("b = attach(); b.ensure()")
        wait_until(lambda: told.do("b.state") == "complete", "it to be told")
        with suspended(served.pid):
            pending = other.start("read(h.memory, 7 * 4096)")
            wait_for_pending_fault(other.pid)
            assert told.do("read(b, 7 * 4096)") == b"\0"
        assert pending.result() == b"\0"
        assert served.block("data").foreign_pages == 0


def test_nobody_reads_a_wrong_byte_while_pages_arrive(
    runtime_dir: Path, data_file: Path, content: bytes, seed: int
) -> None:
    """P1: pages appear whole: every helper checks every byte of every page at the moment it gets it."""
    script = f"""
import random
pages = list(range({N_PAGES}))
random.Random(SEED).shuffle(pages)
content = open({str(data_file)!r}, 'rb').read()
[p for p in pages if read(b, p * 4096, min(4096, len(b) - p * 4096)) != content[p * 4096:(p + 1) * 4096]]
"""
    with serving(f"data={data_file}#delay=1ms", stream_mode=EAGER, stream_rate=0) as served:
        helpers = [attached(served, f"mode={mode!r}") for mode in ("ro", "cow", "ro")]
        pending = [helper.start(f"SEED = {seed + i}\n{script}") for i, helper in enumerate(helpers)]
        assert [one.result() for one in pending] == [[]] * 3
        assert served.block().foreign_pages == 0


# ---- P2: no lost write ----


def test_late_duplicate_never_overwrites_a_write(
    runtime_dir: Path, tmp_path: Path, data_file: Path, content: bytes
) -> None:
    """P2: the page was asked for twice; after the first answer a helper wrote, then came the second."""
    withheld = Withheld(content, [(0, 20 * PAGE)])
    with tempfile.TemporaryDirectory(prefix="pcs-", dir="/tmp") as folder, ScriptedServer(withheld.script) as server:
        path, _ = server.listen(Path(folder) / "s.sock")
        source = f"data=nbd+unix:///?socket={path}#timeout=600s"
        with serving(source, stream_mode=LAZY, writable=("data",)) as served:
            writer, other = attached(served), attached(served)
            ensuring = other.start("b.ensure(slice(0, 20 * 4096))")
            wait_until(lambda: withheld.owed_count == 1, "the range to be asked for")
            assert writer.do("read(b, 8 * 4096, 4)") == content[8 * PAGE : 8 * PAGE + 4]
            writer.do("write(b, 8 * 4096, b'written')")
            assert not ensuring.is_done()
            withheld.answer_late()
            ensuring.result()
            wanted = b"written" + content[8 * PAGE + 7 : 9 * PAGE]
            for helper in (writer, other):
                assert helper.do(f"read(b, 8 * {PAGE}, {PAGE})") == wanted
            assert other.do(f"read(b, 7 * {PAGE}, {PAGE})") == content[7 * PAGE : 8 * PAGE]
            assert served.block().foreign_pages == 0


def test_writes_of_many_helpers_survive_all_that_arrives(runtime_dir: Path, data_file: Path, content: bytes) -> None:
    """P2: each writes a byte into every page, as soon as it gets the page, while the stream brings them too."""
    with serving(f"data={data_file}#delay=1ms", stream_mode=EAGER, writable=("data",)) as served:
        helpers = [attached(served) for _ in range(3)]
        pending = [
            helper.start(f"for page in range({N_PAGES - 1}): write(b, page * 4096 + {number + 1}, b'{number}')")
            for number, helper in enumerate(helpers)
        ]
        for one in pending:
            one.result()
        served.wait_for_state("END")
        wanted = bytearray(content)
        for page in range(N_PAGES - 1):
            wanted[page * PAGE + 1 : page * PAGE + 4] = b"012"
        for helper in helpers:
            assert helper.do("bytes(b)") == bytes(wanted)


def test_copy_on_write_keeps_what_is_written_to_itself(runtime_dir: Path, data_file: Path, content: bytes) -> None:
    """P2, P8."""
    with serving(f"data={data_file}#delay=1ms", stream_mode=LAZY) as served:
        private, other = attached(served, "mode='cow'"), attached(served)
        private.do("write(b, 3 * 4096 + 5, b'mine'); write(b, 4 * 4096, b'm' * 4096)")
        private.do("b.ensure()")
        served.wait_for_state("END")
        wanted = bytearray(content)
        wanted[3 * PAGE + 5 : 3 * PAGE + 9] = b"mine"
        wanted[4 * PAGE : 5 * PAGE] = b"m" * PAGE
        assert private.do("b.wait(); bytes(b)") == bytes(wanted)
        assert other.do("bytes(b)") == content


def test_removed_page_of_a_writable_block_comes_back_as_zeros_and_the_others_stay(
    runtime_dir: Path, data_file: Path, content: bytes
) -> None:
    """B5: MADV_REMOVE by a helper, of pages that had been received."""
    with serving(f"data={data_file}", stream_mode=LAZY, writable=("data",)) as served:
        remover, other = attached(served), attached(served)
        other.do("b.ensure(slice(0, 20 * 4096))")
        remover.do("read(b, 5 * 4096); b.madvise(mmap.MADV_REMOVE, 5 * 4096, 2 * 4096)")
        for helper in (remover, other):
            assert helper.do("read(b, 0, 5 * 4096)") == content[: 5 * PAGE]
            assert helper.do("read(b, 5 * 4096, 2 * 4096)") == bytes(2 * PAGE)
            assert helper.do("read(b, 7 * 4096, 3 * 4096)") == content[7 * PAGE : 10 * PAGE]
        remover.do("write(b, 5 * 4096, b'new')")
        assert other.do("read(b, 5 * 4096, 5)") == b"new\0\0"
        served.order(AdminOp.STREAM_EAGER)
        served.wait_for_state("END")
        assert other.do("read(b, 5 * 4096, 5)") == b"new\0\0"
        assert served.block().foreign_pages == 0


# ---- P4, P8: one helper's fault is its own ----


def test_write_to_a_read_only_block_ends_that_helper_only(runtime_dir: Path, data_file: Path, content: bytes) -> None:
    """P8: SIGSEGV, whether the page is here or not, and nobody sees anything of it."""
    with serving(f"data={data_file}", stream_mode=LAZY) as served:
        other = attached(served)
        other.do("read(b, 0)")
        for offset in (0, 9 * PAGE):
            writer = attached(served)
            writer.start(f"write(b, {offset}, b'x')")
            assert writer.wait_for_end() == -signal.SIGSEGV
        assert other.do("b.ensure(); bytes(b)") == content
        wait_until(lambda: not [h for h in served.status().helpers if h.pid != other.pid], "the others to be let go")


def test_python_is_refused_a_write_to_a_read_only_block(runtime_dir: Path, data_file: Path) -> None:
    """P8: with an exception."""
    with serving(f"data={data_file}") as served:
        helper = attached(served)
        with pytest.raises(TypeError):
            helper.do("b[0] = 1")
        with pytest.raises(TypeError):
            helper.do("memoryview(b)[0] = 1")
        with pytest.raises(ValueError, match="read-only"):
            helper.do("b.asarray()[0] = 1")


@pytest.mark.parametrize("step", [*HandOver.STEPS, "while it waits"])
def test_helper_that_is_killed_in_its_hand_over_harms_nobody(
    runtime_dir: Path, data_file: Path, content: bytes, step: str
) -> None:
    """P1, P4, P7: at each step of it."""
    with serving(f"data={data_file}#delay=1ms", stream_mode=LAZY) as served:
        other = attached(served)
        assert other.do("read(b, 0)") == content[:1]
        victim = served.helper()
        fds_with_victim = len(os.listdir("/proc/self/fd"))  # the pipe that it is told things through
        if step == "while it waits":
            os.kill(served.server._keeper.pid, signal.SIGCONT)
            victim.do("h = hand_over('ack')")
            victim.start("h.memory[100 * 4096]")
            wait_until(lambda: any(h.faults for h in served.helpers(victim.pid)), "the victim's fault")
        else:
            victim.do(f"h = hand_over({step!r})")
        victim.kill()
        wait_until(lambda: len(os.listdir("/proc/self/fd")) == fds_with_victim, "an end of the victim's fds")
        wait_until(lambda: [h.pid for h in served.status().helpers] == [other.pid], "only the other to be left")
        assert other.do("b.ensure(); bytes(b)") == content
        assert attached(served).do("bytes(b)") == content
        assert served.block().foreign_pages == 0


def test_helper_that_is_stopped_holds_up_nobody(runtime_dir: Path, data_file: Path, content: bytes) -> None:
    """P4: also not the end of the block, which it learns of later."""
    with serving(f"data={data_file}#delay=1ms", stream_mode=LAZY) as served:
        stopped, other = attached(served), attached(served)
        with suspended(stopped.pid):
            assert other.do("b.ensure(); bytes(b)") == content
            served.wait_for_state("END")
        assert stopped.do("b.wait(); bytes(b)") == content
        wait_until(lambda: stopped.do("b.state") == "complete", "it to be told")


@pytest.mark.parametrize("uid", [None, NOBODY])
def test_helpers_without_privileges_are_served_inside_system_calls(
    runtime_dir: Path, tmp_path: Path, rng: random.Random, uid: int | None
) -> None:
    """P3, P8: with the device that a privileged coordinator offers."""
    path = make_file(tmp_path, rng, LENGTH)
    allow = () if uid is None else (uid,)
    with serving(f"data={path}#delay=1ms", stream_mode=LAZY, allow_uids=allow) as served:
        helper = attached(served, uid=uid)
        helper.do("fd = os.memfd_create('copy'); os.write(fd, memoryview(b)[8192:8292])")
        assert helper.do("os.pread(fd, 100, 0)") == path.read_bytes()[8192:8292]
        assert served.helpers(helper.pid)[0].uid == (uid or 0)


# ---- P7: nothing stays behind ----


def mapping_flags(pid: int, memfd: str = "pcshare-data") -> set[str]:
    """VmFlags of the process's mappings of a block, all together."""
    flags: set[str] = set()
    inside = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = memfd in line
        elif inside and line.startswith("VmFlags:"):
            flags |= set(line.split()[1:])
    return flags


def uffds(pid: int | str) -> list[str]:
    """A process may close one while we look."""
    found = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            found.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
        except FileNotFoundError:
            continue
    return [target for target in found if target == UFFD]


def test_after_the_end_what_is_left_is_plain_memory_with_nobody_in_its_path(
    runtime_dir: Path, data_file: Path, content: bytes
) -> None:
    """P7, C7, B2, G3: in this order: unregistered, huge pages allowed, uffds closed, helpers gone, threads joined."""
    ended = threading.Event()
    notifier = lambda notice: ended.set() if notice.change.name == "INBOUND_END" else None  # noqa: E731
    with serving(f"data={data_file}", stream_mode=LAZY, notifiers=(notifier,)) as served:
        helpers = [attached(served, f"mode={mode!r}") for mode in ("ro", "cow")]
        for helper in helpers:
            assert {"um", "nh", "dd"} <= mapping_flags(helper.pid)
            assert len(uffds(helper.pid)) == 1
            wait_until(lambda: "pcshare-sentine" in core_threads(helper.pid), "the sentinel's name")  # noqa: B023
        assert {"pcshare-fault", "pcshare-stream"} <= core_threads()
        assert not ended.is_set()
        served.order(AdminOp.STREAM_EAGER)
        for helper in helpers:
            helper.do("b.wait()")
            wait_until(lambda: helper.do("b.state") == "complete", "the end to be told")  # noqa: B023
            assert not {"um", "nh"} & mapping_flags(helper.pid)
            assert not uffds(helper.pid)
            wait_until(lambda: not core_threads(helper.pid), "the sentinel's end")  # noqa: B023
        wait_until(ended.is_set, "INBOUND_END")
        wait_until(lambda: not core_threads(), "the last to be listed no more")
        assert not served.status().helpers
        assert "um" not in mapping_flags(os.getpid()) | mapping_flags(served.server._keeper.pid)
        for helper in helpers:
            assert helper.do("bytes(b)") == content
        late = attached(served)
        assert late.do("b.state, bytes(b)") == ("complete", content)
        assert not uffds(late.pid)
        assert not served.status().helpers
        faults = served.status().faults
    for helper in (*helpers, late):
        assert helper.process.poll() is not None  # ended with the context; their memory outlived the coordinator's work
    assert faults == 0


def test_memory_outlives_the_coordinator_once_it_is_complete(
    runtime_dir: Path, data_file: Path, content: bytes
) -> None:
    """P7."""
    with serving(f"data={data_file}") as served:
        served.wait_for_state("END")
        socket_path = served.socket
        helper = HelperProcess(socket_path)
        helper.do("b = attach()")
    with helper:
        assert helper.do("bytes(b)") == content
        assert not Path(socket_path).exists()


def test_status_answers_and_helpers_wait_while_the_coordinator_is_stopped(
    runtime_dir: Path, data_file: Path, content: bytes
) -> None:
    """P3, P7: SIGSTOP stops its fault threads too; nobody is answered wrongly, and SIGCONT ends all waits."""
    with coordinator(f"data={data_file}", options=["--stream=lazy"]) as served, HelperProcess(served.socket) as helper:
        helper.do("b = attach(); read(b, 0)")
        with suspended(served.pid):
            pending = [helper.start("read(b, 4096)"), helper.start("b.ensure(slice(8192, 12288))")]
            status = served.status()
            assert (status.alive, status.stopped, status.blocks[0].received_pages) == (True, True, 1)
            assert not any(one.is_done() for one in pending)
        assert [one.result() for one in pending] == [content[PAGE : PAGE + 1], None]
        assert not served.status().stopped


@pytest.fixture
def gaps(tmp_path: Path, rng: random.Random) -> tuple[Path, dict[int, bytes]]:
    """A sparse file of 1 TiB with a few pages of data: the path, and what lies where."""
    path, pieces = tmp_path / "sparse.bin", {}
    with path.open("wb") as file:
        file.truncate((1 << 40) - 5)
        for offset in (0, 1 << 30, (1 << 39) + 4096 * 7, (1 << 40) - 4096):
            pieces[offset] = rng.randbytes(4096 if offset + 4096 < 1 << 40 else 4091)
            file.seek(offset)
            file.write(pieces[offset])
    return path, pieces


def test_sparse_tebibyte_is_cheap_and_complete(runtime_dir: Path, gaps: tuple[Path, dict[int, bytes]]) -> None:
    """P1: holes cost nothing, in time and memory, here and in the helpers."""
    path, pieces = gaps
    started = time.monotonic()
    with serving(f"data={path}", stream_mode=LAZY) as served:
        helper = attached(served)
        for offset, piece in pieces.items():
            assert helper.do(f"read(b, {offset}, {len(piece)})") == piece
        assert helper.do(f"read(b, {1 << 35}, 8192)") == bytes(8192)
        assert helper.do("len(b)") == (1 << 40) - 5
        block = served.wait_for_state("END")
        assert block.received_pages + block.hole_pages == block.page_count == 1 << 28
        assert os.fstat(served.ram().helper_memfd(writing=False)).st_blocks * 512 < 1 << 20
        segment = Path(f"/dev/shm/pcshare-{served.name}").stat()
        assert segment.st_blocks * 512 < 4 << 20
        helper.do("b.wait()")
    assert time.monotonic() - started < 30.0


def test_eager_stream_of_a_sparse_tebibyte_is_done_at_once(
    runtime_dir: Path, gaps: tuple[Path, dict[int, bytes]]
) -> None:
    path, pieces = gaps
    with serving(f"data={path}") as served:
        block = served.wait_for_state("END")
        assert block.received_pages == len(pieces)
        helper = attached(served)
        for offset, piece in pieces.items():
            assert helper.do(f"read(b, {offset}, {len(piece)})") == piece
