"""What helpers ask for, and hand over, in numbers and orders that do not come by themselves: many hints, many threads,
one page by two ways, faults that are older than ATTACH, fds that nobody wants, and slots of the dead.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest

from pcshare.errors import SourceLost
from pcshare.protocol import AdminOp
from support import suspended, wait_until
from support_coordinator import coordinator
from support_serving import HUGE_PAGE, LAZY, PAGE, HelperProcess, make_file, page_of, serving

N_PAGES = 2048
HINTS = 100  # more than FAULT_REQUESTS_IN_FLIGHT_MAX
THREADS = 160
WATCHED_S = 1.0
CPU_S_MAX = 0.3  # of WATCHED_S, for a coordinator that has nothing to do; one that spins takes all
MEANWHILE_S = 8.0  # others are served within, while one misbehaves
LINGER_S = 20
HUGE_PAGES_MIN = 4
HUGE_FREE = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")


@pytest.fixture
def data_file(tmp_path: Path, rng: random.Random) -> Path:
    return make_file(tmp_path, rng, N_PAGES * PAGE)


# ---- hints and ranges ----


def test_hints_do_not_count_against_who_ensures(
    runtime_dir: Path, data_file: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """D4, P4: a helper that prefetches more than is under way at a time is not cut off when it asks for a range."""
    with serving(f"data={data_file}#delay=200ms", stream_mode=LAZY) as served:
        helper = served.helper()
        helper.do("b = attach()")
        last = N_PAGES - 1  # the hints are for all before it, so none of them is over when the first has been read
        helper.do(f"for i in range({HINTS}): b.prefetch(slice(0, {last * PAGE}))")
        helper.do(f"b.ensure(slice({last * PAGE}, {N_PAGES * PAGE}))")
        assert helper.do(f"read(b, {last * PAGE}, {PAGE})") == page_of(content, last)
        helper.do(f"b.ensure(slice(0, {PAGE}))")
    assert "cut off" not in caplog.text


ENSURE_IN_THREADS = """
import threading
failures = []

def ensure(first):
    try:
        for page in range(first, {pages}, {threads}):
            b.ensure(slice(page * 4096, page * 4096 + 1))
    except BaseException as error:
        failures.append(repr(error))

threads = [threading.Thread(target=ensure, args=(number,)) for number in range({threads})]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
failures
"""


def test_many_threads_that_ensure_at_once_all_get_their_range(
    runtime_dir: Path, data_file: Path, content: bytes
) -> None:
    """D4: an answer leaves room for the next request at the moment it is read, not some time after."""
    with serving(f"data={data_file}#delay=300us", stream_mode=LAZY) as served:
        helper = served.helper()
        helper.do("b = attach()")
        for _ in range(2):  # the second time everything is here, and answers come at once
            assert helper.do(ENSURE_IN_THREADS.format(pages=N_PAGES, threads=THREADS)) == []
        served.wait_for_counts(received_pages=N_PAGES)
        assert helper.do("bytes(b)") == content


# ---- one page by two ways ----

WANTED, BESIDE, LAST = 5, 50, 500  # pages


@pytest.mark.parametrize("poison", [False, True], ids=["pause", "poison"])
@pytest.mark.parametrize("touch_first", [True, False], ids=["touch first", "ensure first"])
def test_read_that_fails_for_a_page_that_has_come_is_nobodys_loss(
    runtime_dir: Path, data_file: Path, content: bytes, tmp_path: Path, poison: bool, touch_first: bool
) -> None:
    """P3: both a touch and a range have asked for one page. The rate puts two seconds between the two reads."""
    broken = tmp_path / "broken"
    with serving(f"data={data_file}#rate=2K&error=EIO@{broken}", stream_mode=LAZY, poison=poison) as served:
        helper, late = served.helper(), served.helper()
        for one in (helper, late):
            one.do("b = attach()")
        here = _ask_twice(helper, served.wait_for_waiting, touch_first)
        failed = late.start(f"b.ensure(slice({LAST * PAGE}, {(LAST + 1) * PAGE}))")  # read last of all
        wait_until(lambda: served.block().received_pages == here, "the first read of the page")
        broken.touch()
        if poison:
            with pytest.raises(SourceLost) as lost:
                failed.result()
            assert (lost.value.offset, served.block().lost_pages) == (LAST * PAGE, 1)
        else:
            assert f"offset {LAST * PAGE}: " in served.wait_for_state("PAUSED").reason
        newcomer = served.helper()
        newcomer.do("b = attach()")
        for one in (helper, newcomer):
            assert one.do(f"read(b, {WANTED * PAGE}, {PAGE})") == page_of(content, WANTED)
        broken.unlink()
        served.order(AdminOp.RESUME)
        if not poison:
            failed.result()
        newcomer.do(f"b.ensure(slice({LAST * PAGE}, {(LAST + 1) * PAGE}))")
        assert served.block().lost_pages == 0


def _ask_twice(helper: HelperProcess, wait_for_waiting: Callable[[int], None], touch_first: bool) -> int:
    """Two reads of WANTED, the second well behind the first; how many pages are here when the first is through."""
    ensure, touch = f"b.ensure(slice({WANTED * PAGE}, {(WANTED + 1) * PAGE}))", f"read(b, {WANTED * PAGE})"
    if touch_first:
        helper.start(touch)
        wait_for_waiting(1)
        helper.start(ensure)
        return 1
    helper.start(ensure)
    helper.start(f"read(b, {BESIDE * PAGE})")  # what is touched overtakes what is ensured, but not what is touched
    wait_for_waiting(1)
    helper.start(touch)
    wait_for_waiting(2)
    return 2


# ---- faults that are older than ATTACH ----

QUEUED_FAULTS = 40  # more than one read of a uffd brings


def test_helper_that_is_cut_off_while_it_is_added_leaves_nobody_spinning(runtime_dir: Path, data_file: Path) -> None:
    """P4: its uffd is readable for ever, and nobody reads it."""
    with coordinator(f"data={data_file}#delay=1ms", options=["--stream=lazy", "--fault-threads=16"]) as served:
        helpers = [HelperProcess(served.socket) for _ in range(4)]
        try:
            for helper in helpers:
                _attach_with_faults_outside(helper)
            wait_until(lambda: [one.state for one in served.status().helpers] == ["disabled"] * 4, "the cuts")
            before = psutil.Process(served.pid).cpu_times()
            time.sleep(WATCHED_S)
            after = psutil.Process(served.pid).cpu_times()
            assert after.user + after.system - before.user - before.system < CPU_S_MAX
        finally:
            for helper in helpers:
                helper.kill()
                helper.close()


def _attach_with_faults_outside(helper: HelperProcess) -> None:
    helper.do("from pcshare import protocol; h = hand_over('register')")
    for page in range(QUEUED_FAULTS):
        helper.start(f"read(h.memory, {(N_PAGES - 1 - page) * PAGE})")
    pending = "int(open(f'/proc/self/fdinfo/{h.uffd.fileno()}').read().split('pending:')[1].split()[0])"
    wait_until(lambda: bool(helper.do(pending) == QUEUED_FAULTS), "the faults to wait")
    helper.do(f"h.connection.send(protocol.pack_attach([protocol.Map(h.addr, 0, {PAGE})]), [h.uffd.fileno()])")


# ---- slots ----


@pytest.mark.parametrize("addr", [1 << 46, (1 << 47) - N_PAGES * PAGE, 1 << 50], ids=["free", "highest", "beyond"])
def test_slot_of_a_dead_helper_is_free_again_whatever_it_said_of_its_addresses(
    runtime_dir: Path, data_file: Path, addr: int
) -> None:
    """P4, P7."""
    with serving(f"data={data_file}", stream_mode=LAZY, helpers_max=2) as served:
        for _ in range(5):
            helper = served.helper()
            helper.do("from pcshare import protocol; h = hand_over('register')")
            maps = f"[protocol.Map({addr}, 0, {N_PAGES * PAGE})]"
            helper.do(f"h.connection.send(protocol.pack_attach({maps}), [h.uffd.fileno()])")
            helper.do("h.connection.receive(20.0)")  # granted or refused
            helper.kill()
            wait_until(lambda: not served.status().helpers, "the slot of the dead to be free")
        assert len(served.helper().do("b = attach(); read(b, 0)")) == 1


# ---- fds that nobody wants ----

LINGERING = f"""
import socket, struct
from pcshare import protocol

def lingering():
    '''A socket whose last close takes long: its peer, which is kept, reads nothing.'''
    global far
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far = listener.accept()[0]
    near.setblocking(False)
    try:
        while True:
            near.send(bytes(1 << 16))
    except BlockingIOError:
        pass
    near.setblocking(True)
    near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, {LINGER_S}))
    return near

def send(message, *fds):
    '''The errno, 0 if it was sent: this kernel may refuse fds to the sender.'''
    try:
        h.connection.send(message, fds)
    except OSError as error:
        return error.errno
    return 0

near = lingering()
"""
ATTACH = "protocol.pack_attach([protocol.Map(h.addr, 0, h.described.map_length)])"
BESIDE_WHAT = {  # the last step that is as it should be, and what is sent then
    "nothing": ("connect", "send(b'x', near.fileno())"),
    "hello": ("connect", "send(protocol.pack_hello('data'), near.fileno())"),
    "attach": ("register", f"send({ATTACH}, near.fileno())"),
    "attach twice": ("register", f"send({ATTACH}, near.fileno()), send({ATTACH}, near.fileno())"),
    "too many": ("register", f"send({ATTACH}, *[near.fileno()] * 5)"),
    "behind attach": ("register", f"send({ATTACH}, h.uffd.fileno()), send({ATTACH}, near.fileno())"),
    "after ack": ("ack", f"send({ATTACH}, near.fileno())"),
}


@pytest.mark.parametrize("beside", BESIDE_WHAT)
def test_fd_that_takes_long_to_close_holds_up_nobody(
    runtime_dir: Path, data_file: Path, content: bytes, beside: str
) -> None:
    """P4: nor does it where it lies unread in a socket that is closed. The coordinator is stopped while the helper
    sends, so that the last copies are in its hands."""
    step, sends = BESIDE_WHAT[beside]
    with contextlib.ExitStack() as stack:
        served = stack.enter_context(coordinator(f"data={data_file}#delay=1ms", options=["--stream=lazy"]))
        helper, honest = (stack.enter_context(HelperProcess(served.socket)) for _ in range(2))
        honest.do("first = attach()")
        helper.do(LINGERING)
        helper.do(f"h = hand_over({step!r})")
        with suspended(served.pid):
            if helper.do(f"errors = [{sends}]; 0 in errors"):
                helper.do("near.close()")
        began = time.monotonic()
        honest.do(f"b = attach(timeout_s={MEANWHILE_S}); b.ensure(slice(0, {PAGE}), timeout_s={MEANWHILE_S})")
        assert honest.do(f"read(first, {9 * PAGE}, {PAGE})") == page_of(content, 9)
        assert time.monotonic() - began < MEANWHILE_S
        helper.kill()  # which is the end of all lingering


# ---- holes of huge pages ----


def test_hole_of_a_huge_block_is_zeros_when_no_huge_page_is_left(
    runtime_dir: Path, tmp_path: Path, rng: random.Random, huge_pages: Callable[[int], None]
) -> None:
    """P1: as many huge pages as the block needs, and END reached before anybody touched the hole."""
    huge_pages(HUGE_PAGES_MIN)
    n_pages = int((HUGE_FREE / "free_hugepages").read_text()) - int((HUGE_FREE / "resv_hugepages").read_text())
    path = tmp_path / "holes.bin"
    with path.open("wb") as file:
        file.truncate(n_pages * HUGE_PAGE)
        file.seek(HUGE_PAGE)
        file.write(rng.randbytes(HUGE_PAGE))
    with serving(f"data={path}", page_size=HUGE_PAGE) as served:
        served.wait_for_state("END")
        helper = served.helper()
        helper.do("b = attach()")
        for page in range(n_pages):
            with path.open("rb") as file:
                file.seek(page * HUGE_PAGE)
                assert helper.do(f"read(b, {page * HUGE_PAGE}, {HUGE_PAGE})") == file.read(HUGE_PAGE)


# ---- arrays ----


@pytest.mark.parametrize("dtype", ["<f8", [("a", "<i4"), ("b", "<f8"), ("c", "S3")]], ids=["plain", "structured"])
def test_array_of_an_npy_source_outlives_its_block(
    runtime_dir: Path, tmp_path: Path, dtype: str | list[tuple[str, str]]
) -> None:
    """In a helper of its own: what would be wrong here ends a process."""
    path = tmp_path / "array.npy"
    wanted = np.zeros(5000, dtype=dtype)
    wanted["a" if isinstance(dtype, list) else ...] = np.arange(5000)
    np.save(path, wanted)
    with serving(f"data={path}", stream_mode=LAZY) as served:
        helper = served.helper()
        helper.do("import gc; b = attach(); a = b.asarray(); first = a[:10].copy(); part = a[4990:]; b.close(); del b")
        helper.do("gc.collect()")
        assert helper.do("a.copy()").tobytes() == wanted.tobytes()
        helper.do("del a; gc.collect()")
        assert helper.do("part.copy()").tobytes() == wanted[4990:].tobytes()
        helper.do("del part; gc.collect()")
        wait_until(lambda: not served.status().helpers, "the helper to have left")
