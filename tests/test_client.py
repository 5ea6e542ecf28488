"""The helper's side for Python: attach, use as memory, ask for ranges, share, fork, leave."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pcshare
from pcshare import runtime
from pcshare.client import Handle
from pcshare.errors import (
    AttachTimeout,
    CoordinatorGone,
    NoSuchBlock,
    NoSuchCoordinator,
    NotWritable,
    PcshareError,
    UsageError,
)
from pcshare.protocol import AdminOp
from pcshare.trace import read_trace
from pcshare.transport import Listener
from support import suspended, wait_until
from support_coordinator import coordinator
from support_serving import (
    EAGER,
    LAZY,
    NOBODY,
    PAGE,
    PAUSED,
    WAIT_S,
    HelperProcess,
    Serving,
    is_readable,
    serving,
)

N_PAGES = 100
LENGTH = N_PAGES * PAGE - 321


@pytest.fixture
def served(runtime_dir: Path, data_file: Path) -> Iterator[Serving]:
    """A read-only block and a writable one, lazy."""
    with serving(f"data={data_file}", "scratch=zero:1M", stream_mode=LAZY) as made:
        yield made


def attach(served: Serving, block: str | None = "data", mode: str | None = None) -> pcshare.Block:
    """In the coordinator's own process, where a touch of a missing page holds the GIL and is answered all the same."""
    return pcshare.attach(served.name, block, mode)


# ---- attaching ----


def test_mode_is_by_default_what_the_block_is(served: Serving) -> None:
    with attach(served) as data, attach(served, "scratch") as scratch:
        assert (data.mode, scratch.mode) == ("ro", "rw")
        assert (data.idstr, scratch.idstr) == ("data", "scratch")


@pytest.mark.parametrize(
    ("block", "mode", "readonly"),
    [("data", "ro", True), ("data", "cow", False), ("scratch", "ro", True), ("scratch", "rw", False),
     ("scratch", "cow", False)],
)  # fmt: skip
def test_memory_is_as_writable_as_the_mode(served: Serving, block: str, mode: str, readonly: bool) -> None:
    with attach(served, block, mode) as attached:
        assert attached.mode == mode
        assert memoryview(attached).readonly is readonly
        assert attached.asarray().flags.writeable is not readonly
        if not readonly:
            attached[5:8] = b"new"
            assert attached[4:9] == attached[4:5] + b"new" + attached[8:9]


def test_read_only_block_is_not_attached_for_writing(served: Serving) -> None:
    """P8."""
    with pytest.raises(NotWritable, match="block data is read-only") as caught:
        attach(served, "data", "rw")
    assert caught.value.errno == 30  # EROFS
    assert "--writable data" in str(caught.value)


def test_what_one_writes_the_others_read(served: Serving) -> None:
    with attach(served, "scratch") as one, attach(served, "scratch") as other, attach(served, "scratch", "ro") as third:
        one[10000:10005] = b"hello"
        assert other[10000:10005] == third[10000:10005] == b"hello"


def test_copy_on_write_keeps_what_is_written_here(served: Serving, content: bytes) -> None:
    with attach(served, "data", "cow") as private, attach(served) as plain:
        private[0:3] = b"own"
        assert private[0:5] == b"own" + content[3:5]
        assert plain[0:5] == content[:5]


def test_only_block_needs_no_name_and_several_do(served: Serving, runtime_dir: Path, data_file: Path) -> None:
    with pytest.raises(NoSuchBlock, match=r"several blocks: name one .*data, scratch"):
        attach(served, None)
    with serving(f"single={data_file}") as other, attach(other, None) as block:
        assert block.idstr == "single"


def test_block_that_is_not_there_is_named_with_those_that_are(served: Serving) -> None:
    with pytest.raises(NoSuchBlock, match=r"no block 'other' here \(there are: data, scratch\)") as caught:
        attach(served, "other")
    assert caught.value.errno == 19  # ENODEV


def test_mode_that_does_not_exist_is_wrong_usage() -> None:
    with pytest.raises(UsageError, match="mode 'wr': it is 'ro', 'rw' or 'cow'"):
        pcshare.attach("name", mode="wr")


def test_without_a_name_the_coordinator_of_run_is_meant(
    served: Serving, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    with pytest.raises(UsageError, match="attach\\(\\) without a name") as caught:
        pcshare.attach(block="data")
    assert "PCSHARE_SOCKET" in str(caught.value)
    monkeypatch.setenv("PCSHARE_SOCKET", served.socket)
    with pcshare.attach(block="data") as block:
        assert block[:9] == content[:9]


@pytest.mark.parametrize("name", ["", "a/b", "..", "x" * 100])
def test_name_that_cannot_be_is_wrong_usage(name: str) -> None:
    with pytest.raises(UsageError, match="not a name for a coordinator"):
        pcshare.attach(name)


def test_nobody_there_is_told_after_the_time_given(runtime_dir: Path) -> None:
    started = time.monotonic()
    with pytest.raises(NoSuchCoordinator, match=r"coordinator 'nobody': nobody serves there within 0\.1 s"):
        pcshare.attach("nobody", timeout_s=0.1)
    assert 0.1 <= time.monotonic() - started < 5.0


@pytest.mark.parametrize("by", ["name", "socket"])
def test_attach_waits_for_the_coordinator_to_appear(
    runtime_dir: Path, data_file: Path, content: bytes, by: str
) -> None:
    name = f"late-{os.getpid()}"
    path = runtime.socket_path(name, create_dir=True)
    with HelperProcess(str(path)) as helper:
        pending = helper.start("b = attach(); b[0]" if by == "socket" else f"b = pcshare.attach({name!r}); b[0]")
        with serving(f"data={data_file}", name=name):
            assert pending.result() == content[0]
            helper.do("b.close()")


def test_attach_waits_through_a_restart(runtime_dir: Path, data_file: Path, content: bytes) -> None:
    """One that hangs up in the middle is on its way out; the next takes its place."""
    name = f"restarted-{os.getpid()}"
    path = runtime.socket_path(name, create_dir=True)
    leaving = Listener(str(path), 0o600)
    with HelperProcess(str(path)) as helper:
        pending = helper.start("b = attach(); b[0]")
        assert is_readable(leaving.fileno(), WAIT_S)
        connection = leaving.accept()
        assert connection is not None
        connection.close()
        leaving.close()
        with serving(f"data={data_file}", name=name):
            assert pending.result() == content[0]
            helper.do("b.close()")


def test_coordinator_that_does_not_answer_is_a_timeout(runtime_dir: Path, data_file: Path) -> None:
    """P3: here it is stopped."""
    with coordinator(f"data={data_file}", options=["--stream=lazy"]) as served, suspended(served.pid):
        with pytest.raises(AttachTimeout) as caught:
            pcshare.attach(socket=served.socket, timeout_s=0.2)
        assert caught.value.errno == 110  # ETIMEDOUT
        assert isinstance(caught.value, TimeoutError)


def test_many_attachments_of_one_process_are_many_helpers(served: Serving, content: bytes) -> None:
    """C5: a pid is no key."""
    blocks = [attach(served, "data", mode) for mode in ("ro", "cow") * 5]
    assert len(served.helpers(os.getpid())) == 10
    assert {block[5 * PAGE] for block in blocks} == {content[5 * PAGE]}
    for block in blocks[:9]:
        block.close()
    wait_until(lambda: len(served.status().helpers) == 1, "nine to have left")
    assert blocks[9][6 * PAGE] == content[6 * PAGE]
    blocks[9].close()


# ---- using it ----


def test_bytes_are_those_of_the_source_exactly(served: Serving, content: bytes) -> None:
    """The tail of the last page is not part of it."""
    with attach(served) as block:
        assert len(block) == LENGTH
        assert block[-1] == content[-1]
        assert block[10:20] == content[10:20]
        with memoryview(block) as view:
            assert (view.nbytes, view.ndim, view.format) == (LENGTH, 1, "B")
            assert bytes(view) == content
        assert block.page_size == PAGE
        assert block.shape == (LENGTH,)
        array = block.asarray()
        assert (array.dtype, array.shape) == (np.uint8, (LENGTH,))
        assert int(array[100:200].sum()) == sum(content[100:200])
        del array


def test_nothing_is_read_before_it_is_touched(served: Serving) -> None:
    with attach(served) as block:
        array, view = block.asarray(), memoryview(block)
        assert served.status().faults == 0
        assert view[PAGE] == array[PAGE]
        assert served.status().faults == 1
        del array
        view.release()


ARRAYS: dict[str, Callable[[], np.ndarray[Any, Any]]] = {
    "floats": lambda: np.arange(60000, dtype="<f8").reshape(200, 300),
    "fortran": lambda: np.asfortranarray(np.arange(60000, dtype="<f4").reshape(200, 300)),
    "big-endian": lambda: np.arange(5000, dtype=">i4"),
    "complex": lambda: (np.arange(12) * 1j).reshape(2, 3, 2),
    "structured": lambda: np.array([(1, 2.5, b"ab"), (3, 4.5, b"cd")], dtype=[("a", "<i4"), ("b", "<f8"), ("c", "S2")]),
    "subarrays": lambda: np.zeros(7, dtype=[("m", "<u2", (3, 4)), ("n", [("x", "<i8"), ("y", "u1")])]),
    "aligned": lambda: np.zeros(5, dtype=np.dtype([("a", "u1"), ("b", "<f8")], align=True)),
    "scalar": lambda: np.array(42.5),
    "empty": lambda: np.zeros((0, 3)),
    "text": lambda: np.array(["fünf", "sechs"]),
    "dates": lambda: np.array(["2020-01-01", "2021-02-03"], dtype="datetime64[D]"),
    "booleans": lambda: np.arange(100) % 3 == 0,
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_array_of_an_npy_file_is_that_array(runtime_dir: Path, tmp_path: Path, kind: str) -> None:
    """dtype, shape and order are carried to the helper; the block itself is the file, header included."""
    wanted, path = ARRAYS[kind](), tmp_path / "array.npy"
    np.save(path, wanted)
    with serving(f"data={path}", stream_mode=LAZY) as served, attach(served) as block:
        array = block.asarray()
        assert (array.dtype, array.shape, block.shape) == (wanted.dtype, wanted.shape, wanted.shape)
        if wanted.size:
            assert array.flags.f_contiguous == wanted.flags.f_contiguous
            assert array.flags.c_contiguous == wanted.flags.c_contiguous
        assert np.array_equal(array, wanted)
        assert not array.flags.writeable
        assert bytes(block) == path.read_bytes()
        del array


def test_array_touches_only_the_pages_of_what_is_used(runtime_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "array.npy"
    np.save(path, np.arange(1 << 20, dtype="<i8"))
    with serving(f"data={path}", stream_mode=LAZY) as served, attach(served) as block:
        array = block.asarray()
        assert array[1 << 19] == 1 << 19
        assert served.block().received_pages == 1
        assert list(array[:: 1 << 18]) == [0, 1 << 18, 1 << 19, 3 << 18]
        assert served.block().received_pages == 4
        del array


# ---- ranges and progress ----


def test_ensure_takes_byte_slices_as_sequences_do(served: Serving) -> None:
    with attach(served) as block:
        block.ensure(slice(-1, None))
        assert block.is_received(slice(LENGTH - 1, LENGTH))
        block.ensure(slice(10 * PAGE, 12 * PAGE + 1))
        assert block.is_received(slice(10 * PAGE, 13 * PAGE))
        assert not block.is_received(slice(9 * PAGE, 13 * PAGE))
        block.ensure(slice(10**9, 10**10))  # beyond the end: nothing
        block.ensure(slice(7, 3))
        assert block.progress.received_pages == 4
        block.ensure()
        assert block.is_received()
        assert block.progress.fraction == 1.0


def test_range_with_steps_is_wrong_usage(served: Serving) -> None:
    with attach(served) as block:
        for call in (block.ensure, block.prefetch, block.is_received):
            with pytest.raises(UsageError, match="without steps"):
                call(slice(0, 10, 2))


@pytest.mark.parametrize("call", ["b.ensure()", "b.wait(timeout_s=20)"])
def test_other_threads_run_while_one_waits_for_a_range(
    runtime_dir: Path, data_file: Path, tmp_path: Path, call: str
) -> None:
    """The GIL is free meanwhile."""
    broken = tmp_path / "broken"
    broken.touch()
    with serving(f"data={data_file}#error=EIO@{broken}", stream_mode=EAGER) as served:
        served.wait_for_state("PAUSED")
        helper = served.helper()
        helper.do("b = attach()")
        pending = helper.start(call)
        assert helper.do("sum(range(1000))") == 499500
        assert not pending.is_done()
        broken.unlink()
        served.order(AdminOp.RESUME)
        pending.result()


def test_progress_is_read_without_asking_the_coordinator(runtime_dir: Path, data_file: Path) -> None:
    with coordinator(f"data={data_file}", options=["--stream=lazy"]) as served, HelperProcess(served.socket) as helper:
        helper.do("b = attach(); b[0]")
        with suspended(served.pid):
            progress = helper.do("b.progress")
        assert (progress.received_pages, progress.page_count, progress.hole_pages) == (1, N_PAGES, 0)
        assert (progress.state, progress.stream) == ("RUNNING", "lazy")
        assert float(progress) == progress.fraction == 0.01


def test_wait_returns_when_so_much_is_here(runtime_dir: Path, data_file: Path) -> None:
    with serving(f"data={data_file}", stream_mode=PAUSED) as served:
        helper = served.helper()
        helper.do("b = attach(); b.wait(0.0)")
        half, whole = helper.start("b.wait(0.5); b.progress.fraction"), helper.start("b.wait(); b.progress.fraction")
        helper.do(f"b.ensure(slice(0, {60 * PAGE}))")
        assert half.result() == 0.6
        assert not whole.is_done()
        served.order(AdminOp.STREAM_EAGER)
        assert whole.result() == 1.0


def test_wait_without_a_stream_raises_instead_of_waiting_for_ever(served: Serving) -> None:
    with attach(served) as block:
        with pytest.raises(PcshareError, match="nothing streams"):
            block.wait()
        block.wait(0.0)
    with attach(served, "scratch") as holes:
        holes.wait()  # nothing of it is missing


def test_wait_and_ensure_give_up_after_their_time(runtime_dir: Path, data_file: Path) -> None:
    with serving(f"data={data_file}#delay=60s", stream_mode=EAGER) as served, attach(served) as block:
        calls: list[Callable[[], None]] = [
            lambda: block.wait(timeout_s=0.05),
            lambda: block.ensure(slice(0, 1), timeout_s=0.05),
        ]
        for call in calls:
            with pytest.raises(AttachTimeout) as caught:
                call()
            assert caught.value.errno == 110  # ETIMEDOUT
            assert "pcshare status" in str(caught.value)


def test_signal_handler_runs_while_a_thread_waits(runtime_dir: Path, data_file: Path, tmp_path: Path) -> None:
    """And the wait goes on after it, unless the handler raises."""
    trace, heard = tmp_path / "trace", []
    source = f"data={data_file}#delay=60s"
    with serving(source, stream_mode=LAZY, trace=str(trace)) as served, attach(served) as block:

        def stop(*_: object) -> None:
            heard.append("signal")
            if len(heard) == 3:
                raise InterruptedError("enough")

        main = threading.main_thread()
        wchan = Path(f"/proc/self/task/{main.native_id}/wchan")

        def waits(n: int) -> bool:
            """For the n-th time: a signal that comes just before it interrupts nothing."""
            asked = sum(one.event == "range_request" for one in read_trace(str(trace)))
            return asked >= n and wchan.read_text().startswith("futex")

        def interrupt() -> None:
            for n in (1, 2, 3):
                wait_until(lambda: waits(n), "the wait for what was asked for")  # noqa: B023
                signal.pthread_kill(main.ident or 0, signal.SIGUSR1)
                wait_until(lambda: len(heard) == n, "the handler to have run")  # noqa: B023

        before = signal.signal(signal.SIGUSR1, stop)
        poker = threading.Thread(target=interrupt)
        try:
            poker.start()
            with pytest.raises(InterruptedError, match="enough"):
                block.ensure()
        finally:
            signal.signal(signal.SIGUSR1, before)
            poker.join()


# ---- ending it ----


def test_closed_block_is_refused_and_may_be_closed_again(served: Serving) -> None:
    block = attach(served)
    block.close()
    block.close()
    assert block.closed
    assert repr(block) == "<pcshare.Block 'data' closed>"
    for use in (lambda: block.state, lambda: block.progress, block.asarray, block.ensure, lambda: block[0]):
        with pytest.raises(ValueError, match="closed"):
            use()
    wait_until(lambda: not served.status().helpers, "the helper to have left")


def mappings_of_blocks() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:pcshare-data")


def test_array_keeps_its_mapping_after_close(served: Serving, content: bytes) -> None:
    """And is served on: pages that it touches later still come; with the last view everything goes."""
    before = mappings_of_blocks()
    block = attach(served)
    array, view = block.asarray(), memoryview(block)[10 * PAGE :]
    part = array[50 * PAGE :]
    block.close()
    assert array[20 * PAGE] == content[20 * PAGE]
    del array, block
    gc.collect()
    assert (part[0], view[5]) == (content[50 * PAGE], content[10 * PAGE + 5])
    assert len(served.status().helpers) == 1
    del part
    view.release()
    del view
    gc.collect()
    wait_until(lambda: not served.status().helpers, "the helper to have left")
    assert mappings_of_blocks() == before


def test_block_that_nobody_holds_is_let_go(served: Serving) -> None:
    """P7: without close()."""
    block = attach(served)
    assert len(served.status().helpers) == 1
    del block
    gc.collect()
    wait_until(lambda: not served.status().helpers, "the helper to have left")


def test_context_manager_closes_whatever_happens(served: Serving) -> None:
    with pytest.raises(KeyError), attach(served) as block:
        raise KeyError("x")
    assert block.closed


def test_what_makes_no_sense_for_a_block_is_refused(served: Serving) -> None:
    with attach(served) as block:
        with pytest.raises(TypeError, match="has the size of its source"):
            block.resize(10)
        with pytest.raises(TypeError, match=r"pass block\.handle\(\)"):
            pickle.dumps(block)
        assert repr(block) == f"<pcshare.Block 'data' ro, {LENGTH} bytes, 0.0% here>"


def test_coordinator_that_ends_leaves_what_is_here_and_says_so(
    runtime_dir: Path, data_file: Path, content: bytes
) -> None:
    """P3: BYE: what is missing is SIGBUS, what waits for a range is told, close() works."""
    with serving(f"data={data_file}", stream_mode=PAUSED) as served:
        helpers = [HelperProcess(served.socket) for _ in range(2)]
        for helper in helpers:
            helper.do("b = attach(); read(b, 0)")
        pending = [helpers[0].start("b.wait()"), helpers[1].start("b.wait(0.5)")]
    for helper, waiting in zip(helpers, pending, strict=True):
        with helper:
            with pytest.raises(CoordinatorGone):
                waiting.result()
            assert helper.do("b.state") == "lost"
            assert helper.do(f"read(b, 0, {PAGE})") == content[:PAGE]
            with pytest.raises(CoordinatorGone) as caught:
                helper.do("b.ensure()")
            assert caught.value.errno == 104  # ECONNRESET
            if helper is helpers[0]:
                helper.do("b.close()")
                continue
            helper.start(f"read(b, {PAGE})")
            assert helper.wait_for_end() == -signal.SIGBUS


def test_attachments_come_and_go_without_a_trace(served: Serving) -> None:
    """P7."""
    attach(served).close()
    fds, maps = len(os.listdir("/proc/self/fd")), len(Path("/proc/self/maps").read_text().splitlines())
    for number in range(50):
        with attach(served, "data", ("ro", "cow")[number % 2]) as block:
            assert block[number * PAGE] is not None
    wait_until(lambda: not served.status().helpers, "all to have left")
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= fds, "their fds to be closed")
    assert len(Path("/proc/self/maps").read_text().splitlines()) < maps + 50  # threads that close fds have stacks


# ---- other processes ----


def first_bytes(handle: Handle, offset: int) -> tuple[int, bytes]:
    with handle.attach() as block:
        return os.getpid(), block[offset : offset + 10]


@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
def test_handle_attaches_in_the_processes_of_a_pool(
    runtime_dir: Path, data_file: Path, content: bytes, method: str
) -> None:
    with coordinator(f"data={data_file}", options=["--stream=lazy"]) as served, pcshare.attach(served.name) as block:
        handle = block.handle()
        with multiprocessing.get_context(method).Pool(2) as pool:
            offsets = [page * PAGE for page in range(0, 90, 10)]
            found = pool.starmap(first_bytes, [(handle, offset) for offset in offsets])
            pool.close()
            pool.join()
        assert [data for _, data in found] == [content[offset : offset + 10] for offset in offsets]
        assert os.getpid() not in {pid for pid, _ in found}


def test_handle_is_small_and_keeps_block_and_mode(served: Serving) -> None:
    with attach(served, "data", "cow") as block:
        handle = block.handle()
        assert handle == Handle(served.socket, "data", "cow")
        pickled = pickle.dumps(handle)
        assert len(pickled) < 500
        with pickle.loads(pickled).attach() as again:
            assert (again.idstr, again.mode) == ("data", "cow")


FORK = """
def in_child(call):
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(write_end, repr(call()).encode())
        finally:
            os._exit(0)
    os.close(write_end)
    said = b''
    while piece := os.read(read_end, 65536):
        said += piece
    os.close(read_end)
    return said.decode(), os.waitpid(pid, 0)[1]
"""


@pytest.mark.parametrize("uid", [None, NOBODY], ids=["root", "nobody"])
@pytest.mark.parametrize("offered", [True, False], ids=["device", "no device"])
@pytest.mark.parametrize("mode", ["ro", "rw", "cow"])
def test_child_of_fork_has_its_parents_memory(
    runtime_dir: Path, data_file: Path, content: bytes, monkeypatch: pytest.MonkeyPatch,
    mode: str, offered: bool, uid: int | None,
) -> None:  # fmt: skip
    """P1: at the same addresses, missing pages included, without privileges, with the device offered and without."""
    if not offered:
        monkeypatch.setattr("pcshare.fds.open_uffd_device", lambda: None)
    allow = () if uid is None else (uid,)
    writable = ("data",) if mode == "rw" else ()
    with serving(f"data={data_file}#delay=1ms", stream_mode=LAZY, writable=writable, allow_uids=allow) as served:
        helper = served.helper(uid=uid)
        helper.do(FORK + f"b = attach(mode={mode!r}); read(b, 0)")
        for page in (0, 5, N_PAGES - 1):
            said, status = helper.do(f"in_child(lambda: read(b, {page * PAGE}, 100))")
            assert (said, status) == (repr(content[page * PAGE : page * PAGE + 100]), 0)
        if mode != "ro":
            helper.do("write(b, 7 * 4096, b'parent')")
            said, status = helper.do(
                "in_child(lambda: (read(b, 7 * 4096, 6), write(b, 7 * 4096, b'CHILD!'), read(b, 7 * 4096, 6)))"
            )
            assert (said, status) == ("(b'parent', None, b'CHILD!')", 0)
            assert helper.do("read(b, 7 * 4096, 6)") == (b"CHILD!" if mode == "rw" else b"parent")
        said, status = helper.do("in_child(lambda: (b.ensure(), in_child(lambda: read(b, 50 * 4096, 9))))")
        assert said == f"(None, ({repr(content[50 * PAGE : 50 * PAGE + 9])!r}, 0))"
        assert helper.do("read(b, 60 * 4096, 9)") == content[60 * PAGE : 60 * PAGE + 9]
        assert served.block().foreign_pages == 0


def test_forked_children_are_helpers_of_their_own(served: Serving) -> None:
    """P4: seen in status, and let go when they end."""
    helper = served.helper()
    helper.do("b = attach('data'); r, w = os.pipe(); pid = os.fork()\nif pid == 0: os.read(r, 1); os._exit(0)")
    wait_until(lambda: len(served.status().helpers) == 2, "parent and child")
    assert len({h.pid for h in served.status().helpers}) == 2
    helper.do("os.write(w, b'x'); os.waitpid(pid, 0)")
    wait_until(lambda: len(served.status().helpers) == 1, "the child to be let go")
    helper.do("read(b, 4096)")


def test_user_who_is_not_allowed_is_refused_and_one_who_is_attaches(
    runtime_dir: Path, data_file: Path, content: bytes
) -> None:
    """P8: SO_PEERCRED decides; the socket can be reached by both."""
    other = NOBODY - 1
    with serving(f"data={data_file}", stream_mode=LAZY, allow_uids=(NOBODY,)) as served:
        assert served.socket.startswith("/run/pcshare/")
        allowed, refused = served.helper(uid=NOBODY), served.helper(uid=other)
        assert allowed.do("b = attach(); read(b, 0, 9)") == content[:9]
        with pytest.raises(pcshare.errors.AccessRefused, match=f"user {other} ") as caught:
            refused.do("attach()")
        assert caught.value.errno == 13  # EACCES
        assert f"--allow-uid {other} or --allow-gid {other}" in str(caught.value)
        assert isinstance(caught.value, PermissionError)
    with serving(f"data={data_file}", stream_mode=LAZY, allow_gids=(other,)) as served:
        assert served.helper(uid=other).do("b = attach(); read(b, 0, 9)") == content[:9]


def test_user_who_may_attach_may_not_give_orders(runtime_dir: Path, data_file: Path) -> None:
    """P8."""
    with serving(f"data={data_file}", stream_mode=LAZY, allow_uids=(NOBODY,)) as served:
        helper = served.helper(uid=NOBODY)
        helper.do("from pcshare import admin; from pcshare.protocol import AdminOp")
        with pytest.raises(pcshare.errors.AccessRefused, match="may give it orders"):
            helper.do("admin.send(SOCKET, AdminOp.STOP)")
        assert served.status().alive
