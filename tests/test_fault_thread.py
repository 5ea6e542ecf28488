"""Fault threads at the core's level and under load: who is served, who is cut off, what goes while they run."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import random
import re
import select
import struct
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from core_support import child, compile_c
from pcshare import fault_thread
from pcshare.core import ffi, lib
from pcshare.errors import PcshareError
from pcshare.fault_thread import EventKind
from pcshare.ramblock import RAMBlock
from pcshare.status import read_status
from pcshare.trace import TraceFile, read_trace
from support import needs, wait_until
from support_nbd import nbdkit
from support_rig import Rig
from support_serving import (
    CROWD_CPUS_MAX,
    EAGER,
    LAZY,
    PAGE,
    WAIT_S,
    HelperProcess,
    Pending,
    Serving,
    is_readable,
    make_file,
    page_of,
    read_own_page,
    serving,
)

N_PAGES = 64
LENGTH = N_PAGES * PAGE - 100
MANY_PAGES = 1 << 15
PART_PAGES = MANY_PAGES // 8  # of which a crowd touches four parts, one after the other
POLL_UFFD, POLL_CHANNEL = 1, 3  # of fault_internal.h
STEADY, CROWD = 0, 1  # of Neighbours
MOVES_PART = 0.03
DRAIN_S = 0.001  # of fault_crowd.c, for each thread of a crowd: then its events are read
SYS_SCHED_GETATTR, SCHED_ATTR_BYTES = 315, 48  # of x86-64; of the structure's first version
THREAD_ID = lib.UFFD_FEATURE_BIT_THREAD_ID


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig(f"rig-{os.getpid()}")
    yield made
    made.close()


def core_threads(name: str = "pcshare-fault") -> list[int]:
    found = []
    for tid in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):
            if Path(f"/proc/self/task/{tid}/comm").read_text().strip() == name:
                found.append(int(tid))
    return found


# ---- threads ----


@pytest.mark.parametrize("n", [1, 2, 4])
def test_all_threads_run_when_start_returns(rig: Rig, n: int) -> None:
    """B4: known to run before anything is registered; each has taken its CPU."""
    rig.threads.start([0, *[-1] * (n - 1)])
    tids = core_threads()
    assert len(tids) == n
    assert sorted(len(os.sched_getaffinity(tid)) for tid in tids)[0] == 1
    assert len(core_threads("pcshare-stream")) == 1


@pytest.mark.parametrize(
    ("n_cpus", "own_ns", "other_ns", "n_threads"),
    [(1, 0, 0, 1), (2, 0, 0, 2), (4, 0, 0, 4), (8, 2000, 9000, 4), (8, 2000, 40000, 8), (64, 2000, 40000, 16)],
)
def test_default_is_a_thread_for_more_cpus_where_waking_another_one_is_dear(
    monkeypatch: pytest.MonkeyPatch, n_cpus: int, own_ns: int, other_ns: int, n_threads: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(n_cpus)))
    monkeypatch.setattr(fault_thread, "wake_cost_ns", lambda a, b: own_ns if a == b else other_ns)
    assert fault_thread.default_cpus() == list(range(n_threads))


def test_cost_of_a_wake_up_is_measured_between_cpus_that_are_ours() -> None:
    cpus = sorted(os.sched_getaffinity(0))
    before = os.sched_getaffinity(0)
    assert 0 < fault_thread.wake_cost_ns(cpus[0], cpus[0]) < 1e9
    assert 0 < fault_thread.wake_cost_ns(cpus[0], cpus[-1]) < 1e9
    assert os.sched_getaffinity(0) == before
    for cpu, rounds in ((-1, 1), (100_000, 1), (cpus[0], 0), (cpus[0], 1 << 20)):
        with pytest.raises(PcshareError, match="measuring a wake-up") as caught:
            fault_thread.wake_cost_ns(cpus[0], cpu, rounds)
        assert caught.value.errno == errno.EINVAL


def pollers_of(kind: int) -> Counter[int]:
    """By remote fd's id or block's index: how many fault threads poll it, by what the kernel says of their epolls."""
    found: Counter[int] = Counter()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[eventpoll]":
                text = Path(f"/proc/self/fdinfo/{fd}").read_text()
                for events, data in re.findall(r"events:\s+([0-9a-f]+) data:\s+([0-9a-f]+)", text):
                    if int(data, 16) >> 32 == kind:
                        found[int(data, 16) & 0xFFFFFFFF] += int(events, 16) & select.EPOLLIN
    return found


@pytest.mark.parametrize(("n", "pollers"), [(1, 1), (3, 3), (4, 4), (16, 4), (6, 3)])
def test_few_of_many_threads_poll_for_a_helper_without_a_home(
    runtime_dir: Path, data_file: Path, n: int, pollers: int
) -> None:
    """Each that polls is woken by each fault."""
    with serving(f"data={data_file}", stream_mode=LAZY, fault_threads=n) as served:
        helper = served.helper()
        helper.do("b = attach()")
        assert set(pollers_of(POLL_UFFD).values()) == {pollers}
        assert len(pollers_of(POLL_UFFD)) == 2  # the coordinator's own, and the helper's
        assert helper.do("read(b, 4096)") == data_file.read_bytes()[PAGE : PAGE + 1]


class Neighbours:
    """Two helpers of one coordinator with two fault threads: one that touches pages of the first half now and then, on
    one CPU, and a crowd for the second half."""

    def __init__(self, served: Serving, crowds_mode: str = "ro") -> None:
        self.steady, self.crowd = served.helper(), served.helper()
        self._ids = self._attach(self.steady, "ro"), self._attach(self.crowd, crowds_mode)

    def _attach(self, helper: HelperProcess, mode: str) -> int:
        before = set(pollers_of(POLL_UFFD))
        helper.do(f"b = attach(mode={mode!r})")
        (added,) = set(pollers_of(POLL_UFFD)) - before
        return added

    def pollers(self) -> tuple[int, int]:
        """How many fault threads poll for STEADY, and for CROWD."""
        found = pollers_of(POLL_UFFD)
        assert set(self._ids) <= set(found)
        return found[self._ids[STEADY]], found[self._ids[CROWD]]

    def pollers_until(self, touched: Pending) -> list[tuple[int, int]]:
        found, deadline = [], time.monotonic() + WAIT_S
        while not touched.is_done():
            assert time.monotonic() < deadline, "the crowd hangs"
            found.append(self.pollers())
        return found

    def begin_steady(self) -> None:
        self.steady.start(
            f"import os, time; os.sched_setaffinity(0, {{{min(os.sched_getaffinity(0))}}})\n"
            f"for page in range({MANY_PAGES // 2}): read(b, page * {PAGE}); time.sleep(0.0005)"
        )

    def flood(self) -> tuple[list[tuple[int, int]], bytes]:
        """The crowd comes and ends, part by part: it may be over before anybody looks. What was seen of it, and the
        bytes that it found."""
        found, content = [], b""
        for first in range(MANY_PAGES // 2, MANY_PAGES, PART_PAGES):
            touched = self.begin_crowd(pages=range(first, first + PART_PAGES))
            found += self.pollers_until(touched)
            content += touched.result()
        return found, content

    def begin_crowd(
        self, threads_a_cpu: int = 3, meanwhile: str = "", pages: range = range(MANY_PAGES // 2, MANY_PAGES)
    ) -> Pending:
        """More threads than the CPUs run, which do nothing but fault; ends with the bytes of the pages."""
        n = threads_a_cpu * len(os.sched_getaffinity(0))
        return self.crowd.start(
            "import threading, numpy as np\n"
            f"half = np.frombuffer(b, np.uint8)[{pages.start * PAGE}:{pages.stop * PAGE}]\n"
            f"def touch(first): np.bitwise_or.reduce(half[first * {PAGE} :: {n} * {PAGE}])\n"
            f"threads = [threading.Thread(target=touch, args=(i,), daemon=True) for i in range({n})]\n"
            f"for thread in threads: thread.start()\n{meanwhile}"
            "for thread in threads: thread.join()\n"
            "half.tobytes()"
        )


def rests(found: list[tuple[int, int]], who: int) -> bool:
    """Whether nobody polls for it, more often than can be: fault threads are looked at one after the other, and between
    two looks a home may move from one to the other."""
    return sum(pollers[who] == 0 for pollers in found) > len(found) * MOVES_PART


@pytest.fixture
def many_pages(tmp_path: Path, rng: random.Random) -> Path:
    """A source, on a machine where a helper can be a crowd and others need not be in its way."""
    needs(None if 1 < len(os.sched_getaffinity(0)) < CROWD_CPUS_MAX else f"2 to {CROWD_CPUS_MAX - 1} CPUs")
    return make_file(tmp_path, rng, MANY_PAGES * PAGE)


def touch_on(helper: HelperProcess, cpu: int, first: int, last: int) -> Pending:
    """One page after the other on that CPU, with pauses."""
    return helper.start(
        f"import os, time; os.sched_setaffinity(0, {{{cpu}}})\n"
        f"for page in range({first}, {last}): read(b, page * {PAGE}); time.sleep(0.0005)"
    )


def test_fault_thread_that_asks_alone_takes_the_answers(runtime_dir: Path, tmp_path: Path, rng: random.Random) -> None:
    """Others would only be woken by them. Whoever else asks takes some again."""
    cpus = sorted(os.sched_getaffinity(0))
    needs(None if len(cpus) > 1 else "two CPUs")
    n, n_others = 8192, 4096
    data_file = make_file(tmp_path, rng, n * PAGE)
    with (
        nbdkit(tmp_path, "file", data_file) as server,
        serving(f"data={server.uri()}", stream_mode=LAZY, fault_threads=2, read_ahead=0) as served,
    ):
        one, other = served.helper(), served.helper()
        for helper in (one, other):
            helper.do("b = attach()")
        assert list(pollers_of(POLL_CHANNEL).values()) == [2]
        touched = [touch_on(one, cpus[0], 0, n - n_others)]
        wait_until(lambda: list(pollers_of(POLL_CHANNEL).values()) == [1], "one to ask for all")
        touched.append(touch_on(other, cpus[1], n - n_others, n))
        wait_until(lambda: list(pollers_of(POLL_CHANNEL).values()) == [2], "both to take answers")
        for each in touched:
            each.result()
        assert one.do(f"read(b, 0, {n * PAGE})") == data_file.read_bytes()


def test_helper_has_a_home_but_not_beside_a_crowd(runtime_dir: Path, many_pages: Path) -> None:
    """That fills the run queues, and a fault thread that comes too late must not be the only one."""
    with serving(f"data={many_pages}", stream_mode=LAZY, fault_threads=2, read_ahead=0) as served:
        both = Neighbours(served)
        both.begin_steady()
        wait_until(lambda: both.pollers()[STEADY] == 1, "a home")
        found, _ = both.flood()
        assert 2 in [pollers[STEADY] for pollers in found], "a home beside the crowd"
        wait_until(lambda: both.pollers()[STEADY] == 1, "a home again")


def test_crowd_rests_beside_others_and_loses_nothing(runtime_dir: Path, many_pages: Path) -> None:
    """P4: what a fault thread does not poll for a while it polls again, and nobody else's."""
    content = many_pages.read_bytes()[MANY_PAGES // 2 * PAGE :]
    with serving(f"data={many_pages}", stream_mode=LAZY, fault_threads=2, read_ahead=0) as served:
        both = Neighbours(served)
        both.begin_steady()
        found, touched = both.flood()
        assert touched == content
        assert rests(found, CROWD)
        assert not rests(found, STEADY)
        wait_until(lambda: both.pollers()[CROWD] > 0, "the end of its rest")


def test_crowd_does_not_rest_alone(runtime_dir: Path, many_pages: Path) -> None:
    content = many_pages.read_bytes()[MANY_PAGES // 2 * PAGE :]
    with serving(f"data={many_pages}", stream_mode=LAZY, fault_threads=2, read_ahead=0) as served:
        both = Neighbours(served)
        found, touched = both.flood()
        assert touched == content
        assert not rests(found, CROWD)


def test_events_of_a_crowd_are_read_while_it_floods(runtime_dir: Path, many_pages: Path) -> None:
    """The kernel hands out faults first, and of a crowd that rests there are always some."""
    content = many_pages.read_bytes()
    with serving(f"data={many_pages}", stream_mode=LAZY, fault_threads=2, read_ahead=0, writable=["data"]) as served:
        both = Neighbours(served, "rw")
        both.begin_steady()
        touched = both.begin_crowd(
            8,
            "import ctypes, time\n"
            "begin, removed, remove = time.monotonic(), 0, ctypes.CDLL(None).madvise\n"
            "while any(thread.is_alive() for thread in threads):\n"
            f"    assert remove(ctypes.c_void_p(half.ctypes.data), ctypes.c_size_t({PAGE}), 4) == 0\n"
            "    removed += any(thread.is_alive() for thread in threads)\n"
            "took_s = time.monotonic() - begin\n",
        )
        assert touched.result() == content[MANY_PAGES // 2 * PAGE :]
        removed, took_s, n_threads = both.crowd.do("removed, took_s, len(threads)")
        assert removed > min(took_s / (n_threads * DRAIN_S) / 4, 5)  # of a flood that stands still are read none


@pytest.fixture(scope="module", params=[None, "address,undefined"], ids=["plain", "asan"])
def wait_program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_c(
        tmp_path_factory.mktemp("c") / "wait",
        "fault_wait_test.c",
        ["fault_wait.c", "fault_crowd.c", "fault_home.c"],
        request.param,
    )


@pytest.mark.parametrize(
    "case",
    [
        "near_answer_is_met_awake",
        "who_has_asked_for_nothing_sleeps_at_once",
        "source_whose_answers_are_not_polled_for_is_not_looked_for",
        "rest_of_an_answer_is_met_awake_too",
        "who_asks_alone_takes_the_answers",
        "nobody_takes_answers_alone_beside_others",
        "nobody_takes_answers_from_who_is_changing_that",
        "nobody_looks_for_answers_of_a_source_that_pushes",
        "far_answers_are_hardly_ever_looked_for",
        "answers_that_come_soon_again_are_found_out",
        "other_events_teach_nothing",
        "crowd_rests_after_its_turn",
        "few_threads_never_rest",
        "threads_that_fault_seldom_are_no_crowd",
        "many_cpus_run_many_threads",
        "crowd_that_leaves_time_to_wait_does_not_rest",
        "rest_ends_with_others_events_coming",
        "more_crowds_than_are_kept_go_on",
        "who_goes_while_it_rests_is_forgotten",
        "crowds_do_not_rest_among_themselves",
        "what_others_take_is_not_a_crowds_turn",
        "who_has_another_home_meanwhile_is_not_polled_again",
        "nobody_looks_for_an_answer_while_a_crowd_rests",
        "crowd_is_drained_now_and_then",
        "who_was_woken_on_another_cpu_is_followed",
        "who_is_still_here_is_not_followed",
        "other_threads_of_it_are_not_followed",
        "who_has_nowhere_to_go_is_not_waited_for",
        "nobody_is_followed_beside_others",
        "who_moves_meanwhile_or_is_gone_is_not_followed",
        "reason_to_stay_awake_may_go",
        "who_does_not_stay_is_followed_more_and_more_seldom",
    ],
)
def test_waiting(wait_program: Path, case: str) -> None:
    """How long a thread looks for an answer before it sleeps, and whom it lets rest, by a clock of its own."""
    done = subprocess.run([str(wait_program), case], capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("n", [0, 65])
def test_number_of_threads_that_cannot_be_is_refused(rig: Rig, n: int) -> None:
    with pytest.raises(PcshareError, match="starting the fault threads") as caught:
        rig.threads.start([-1] * n)
    assert caught.value.errno == errno.EINVAL
    assert not core_threads()


def test_second_start_is_refused_and_the_first_goes_on(rig: Rig, data_file: Path) -> None:
    rig.threads.start([-1])
    with pytest.raises(PcshareError):
        rig.threads.start([-1])
    ram = rig.add_block(f"data={data_file}")
    assert read_own_page(ram, 3) == page_of(data_file.read_bytes(), 3)


def test_quit_is_joined_and_may_be_told_twice(rig: Rig, data_file: Path) -> None:
    """C7: by flag and eventfd; when stop returns no thread of the core is left, whatever the source is doing."""
    rig.threads.start([-1, -1])
    rig.add_block(f"data={data_file}#delay=60s&rate=1K")
    rig.threads.set_stream(EAGER)
    rig.threads.stop()
    names = [f"pcshare-{name}" for name in ("fault", "stream", "read", "filter")]
    # A thread that was joined may be listed for a moment.
    wait_until(lambda: not any(core_threads(name) for name in names), "an end of the threads")
    rig.threads.stop()
    rig.threads.close()
    rig.threads.close()


def test_threads_that_never_started_are_freed(rig: Rig, data_file: Path) -> None:
    """G3."""
    rig.add_block(f"data={data_file}")


def test_threads_of_the_core_take_no_signals(rig: Rig) -> None:
    rig.threads.start([-1])
    for tid in core_threads() + core_threads("pcshare-stream"):
        text = Path(f"/proc/self/task/{tid}/status").read_text()
        blocked = re.search(r"SigBlk:\s+([0-9a-f]+)", text)
        assert blocked is not None
        assert int(blocked[1], 16) & 0x7FFFFFFF == 0x7FFFFFFF & ~(1 << 8 | 1 << 18)  # all but KILL and STOP


def slice_ns(tid: int) -> int:
    """What sched_getattr(2) says of a thread's slice; 0 before Linux 6.12."""
    attributes = ctypes.create_string_buffer(SCHED_ATTR_BYTES)
    assert ctypes.CDLL(None).syscall(SYS_SCHED_GETATTR, tid, attributes, SCHED_ATTR_BYTES, 0) == 0
    return int(struct.unpack_from("=IIQiIQ", attributes.raw)[5])


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="knows the system call's number on x86-64 only")
def test_fault_threads_go_before_the_stream(rig: Rig) -> None:
    """Whoever waits in a fault must not wait for the end of the stream's turn on its CPU."""
    ours = os.getpriority(os.PRIO_PROCESS, 0)
    rig.threads.start([0, -1])
    (stream,) = core_threads("pcshare-stream")
    wait_until(lambda: os.getpriority(os.PRIO_PROCESS, stream) == min(ours + 5, 19), "the stream to step back")
    for tid in core_threads():
        assert os.getpriority(os.PRIO_PROCESS, tid) == ours
        if slice_ns(threading.get_native_id()):
            assert slice_ns(tid) == 100_000 < slice_ns(threading.get_native_id())


# ---- faults ----


def test_own_fault_is_answered_although_the_gil_is_held(rig: Rig, data_file: Path) -> None:
    """P9, C1, C2: a Python thread that touches a missing page here stops with the GIL in its hand."""
    rig.threads.start([-1])
    ram = rig.add_block(f"data={data_file}#delay=1ms")
    content = data_file.read_bytes()
    view = memoryview(ram.own_bytes(0, LENGTH))
    for offset in (0, 5 * PAGE + 17, LENGTH - 1):
        assert view[offset] == content[offset]
    assert [page for page in range(N_PAGES) if ram.is_received(page)] == [0, 5, N_PAGES - 1]


def test_own_bytes_outside_the_block_are_refused(rig: Rig, data_file: Path) -> None:
    """C2."""
    ram = rig.add_block(f"data={data_file}")
    for offset, length in ((-1, 1), (0, N_PAGES * PAGE + 1), (N_PAGES * PAGE, 1), (0, -1)):
        with pytest.raises(ValueError, match="outside block data"):
            ram.own_bytes(offset, length)


def test_helpers_fault_is_answered(rig: Rig, data_file: Path) -> None:
    """C3: client_addr to block and offset; the page is aligned down to the block's page size."""
    rig.threads.start([-1, -1])
    ram = rig.add_block(f"data={data_file}")
    content = data_file.read_bytes()
    with child(ram.helper_memfd(writing=False), ram.map_length, features=THREAD_ID) as helper:
        number, control = rig.add_remote(ram, helper)
        for offset in (2 * PAGE + 5, 2 * PAGE + 6, LENGTH - 1, LENGTH):
            helper.tell(f"touch {offset}")
            assert helper.answer() == (content[offset : offset + 1] or b"\0")
        assert rig.segment.helper_slot(0).faults == rig.segment.helper_slot(0).demand_pages == 2
        rig.threads.remove_remote(number)
        control.close()


def test_helper_shows_a_part_of_the_block_where_its_map_says(rig: Rig, data_file: Path) -> None:
    """C3: also in two maps that lie the other way round."""
    rig.threads.start([-1])
    ram = rig.add_block(f"data={data_file}")
    half = N_PAGES // 2 * PAGE
    with child(ram.helper_memfd(writing=False), ram.map_length, features=THREAD_ID) as helper:
        maps = [(helper.addr + half, half, half), (helper.addr, 0, half)]
        number, control = rig.add_remote(ram, helper, maps)
        helper.tell(f"touch {half}")
        assert helper.answer() == data_file.read_bytes()[half : half + 1]
        assert ram.is_received(N_PAGES // 2)
        rig.threads.remove_remote(number)
        control.close()


def touch_in_threads(ram: RAMBlock, pages: list[int]) -> tuple[list[threading.Thread], dict[int, bytes]]:
    found: dict[int, bytes] = {}
    threads = [threading.Thread(target=lambda p=page: found.__setitem__(p, read_own_page(ram, p))) for page in pages]
    for thread in threads:
        thread.start()
    return threads, found


def test_many_messages_are_read_at_once_and_all_answered(rig: Rig, data_file: Path) -> None:
    """C6: also those that waited before the threads ran."""
    ram = rig.add_block(f"data={data_file}")
    pages = list(range(40))
    threads, found = touch_in_threads(ram, pages)
    fdinfo = Path(f"/proc/self/fdinfo/{ram.pointer.own_uffd}")
    wait_until(lambda: "pending:\t40" in fdinfo.read_text(), "40 threads to wait")
    messages = ffi.new("struct uffd_message[]", lib.UFFD_READ_MAX)
    assert lib.uffd_read(ram.pointer.own_uffd, messages, lib.UFFD_READ_MAX) == lib.UFFD_READ_MAX
    assert lib.uffd_wake_all(ram.pointer.own_uffd) == 0  # what was read here comes again
    rig.threads.start([-1, -1])
    for thread in threads:
        thread.join(WAIT_S)
    assert found == {page: page_of(data_file.read_bytes(), page) for page in pages}


def test_received_page_is_woken_not_requested(rig: Rig, data_file: Path, tmp_path: Path) -> None:
    """D1: the fault was queued before the page came."""
    rig.threads.start([-1])
    ram = rig.add_block(f"data={data_file}")
    with child(ram.helper_memfd(writing=False), ram.map_length, features=THREAD_ID) as helper:
        helper.tell("touch 4096")
        assert is_readable(helper.uffd, WAIT_S)
        read_own_page(ram, 1)
        ring = TraceFile.start(str(tmp_path / "trace"))
        number, control = rig.add_remote(ram, helper)
        assert helper.answer() == data_file.read_bytes()[PAGE : PAGE + 1]
        ring.close()
        rig.threads.remove_remote(number)
        control.close()
    steps = [(one.event, one.detail) for one in read_trace(str(tmp_path / "trace"))]
    assert ("request_shared", 1) in steps
    assert not [event for event, _ in steps if event.startswith("place")]
    assert ("wake", 0) in steps


# ---- who is cut off ----


OFFENCES = [
    ("dontneed 0 4096", lib.UFFD_FEATURE_BIT_EVENT_REMOVE | THREAD_ID, errno.EBADMSG),
    ("unmap", lib.UFFD_FEATURE_BIT_EVENT_UNMAP | THREAD_ID, errno.EBADMSG),
    ("fork", lib.UFFD_FEATURE_BIT_EVENT_FORK | THREAD_ID, errno.EBADMSG),
    ("blocking", THREAD_ID, errno.EBADFD),
    (f"touch {N_PAGES // 2 * PAGE}", THREAD_ID, errno.EFAULT),
]


@pytest.mark.parametrize(("command", "features", "error"), OFFENCES, ids=[row[0].split()[0] for row in OFFENCES])
def test_offender_is_disabled_with_its_errno_and_the_others_go_on(
    rig: Rig, data_file: Path, command: str, features: int, error: int
) -> None:
    """C4, P4, T5, T8."""
    rig.threads.start([-1, -1])
    ram = rig.add_block(f"data={data_file}")
    memfd = ram.helper_memfd(writing=False)
    with (
        child(memfd, ram.map_length, features=features) as offender,
        child(memfd, ram.map_length, features=THREAD_ID) as honest,
    ):
        half = [(offender.addr, 0, N_PAGES // 2 * PAGE)]
        number, control = rig.add_remote(ram, offender, half)
        honest_number, honest_control = rig.add_remote(ram, honest)
        fds = len(os.listdir("/proc/self/fd"))
        offender.tell(command)
        if command == "blocking":  # seen when it faults next
            assert offender.answer() == b"done"
            offender.tell("touch 0")
        event = rig.wait_for_event(EventKind.REMOTE_DISABLED)
        assert (event.remote_id, event.error) == (number, error)
        if error == errno.EFAULT:
            assert event.offset == offender.addr + N_PAGES // 2 * PAGE
        honest.tell(f"touch {7 * PAGE}")
        assert honest.answer() == data_file.read_bytes()[7 * PAGE : 7 * PAGE + 1]
        wait_until(lambda: len(os.listdir("/proc/self/fd")) == fds, "no fd that a fork event brought")
        for one, end in ((number, control), (honest_number, honest_control)):
            rig.threads.remove_remote(one)
            end.close()
        assert not rig.events()


def test_remote_fd_that_is_cut_off_is_polled_no_more(rig: Rig, data_file: Path) -> None:
    """C4: and its uffd stays open, or the kernel would answer it with zero pages."""
    rig.threads.start([-1])
    ram = rig.add_block(f"data={data_file}")
    with child(ram.helper_memfd(writing=False), ram.map_length, features=THREAD_ID) as helper:
        number, control = rig.add_remote(ram, helper)
        rig.threads.disable_remote(number, errno.EPROTO)
        rig.threads.disable_remote(number, errno.EPROTO)
        helper.tell("touch 0")
        assert is_readable(helper.uffd, WAIT_S)
        read_own_page(ram, 1)  # a fault that came later has been answered
        assert not helper.has_answered(0)
        assert [event.kind for event in rig.events()] == [EventKind.REMOTE_DISABLED]
        rig.threads.remove_remote(number)
        control.close()


def test_hang_up_and_leave_are_told(rig: Rig, data_file: Path) -> None:
    rig.threads.start([-1])
    ram = rig.add_block(f"data={data_file}")
    with child(ram.helper_memfd(writing=False), ram.map_length, features=THREAD_ID) as helper:
        number, control = rig.add_remote(ram, helper)
        control.close()
        assert rig.wait_for_event(EventKind.REMOTE_HUNG_UP).remote_id == number
        rig.threads.remove_remote(number)
        number, control = rig.add_remote(ram, helper)
        header = ffi.new("struct wire_plain *", {"header": (lib.WIRE_MAGIC, lib.WIRE_VERSION, lib.WIRE_LEAVE, 16, 0)})
        control.send(bytes(ffi.buffer(header)))
        assert rig.wait_for_event(EventKind.REMOTE_LEFT).remote_id == number
        rig.threads.remove_remote(number)
        control.close()


def test_address_space_that_has_ended_is_seen(rig: Rig, data_file: Path) -> None:
    """T17: a uffd says nothing of that by itself, neither of exit nor of exec."""
    rig.threads.start([-1])
    ram = rig.add_block(f"data={data_file}")
    with child(ram.helper_memfd(writing=False), ram.map_length, features=THREAD_ID) as helper:
        number, control = rig.add_remote(ram, helper)
        assert not rig.threads.is_gone(number)
        helper.tell("exec")
        wait_until(lambda: rig.threads.is_gone(number), "the end of an address space by exec")
        rig.threads.remove_remote(number)
        control.close()
        helper.process.kill()


def test_name_of_a_remote_fd_is_never_used_again(rig: Rig, data_file: Path) -> None:
    """C5: an event that comes late names nobody else."""
    rig.threads.start([-1])
    ram = rig.add_block(f"data={data_file}")
    with child(ram.helper_memfd(writing=False), ram.map_length, features=THREAD_ID) as helper:
        seen = set()
        for _ in range(5):
            number, control = rig.add_remote(ram, helper)
            rig.threads.remove_remote(number)
            control.close()
            assert number not in seen
            seen.add(number)
            for call in (rig.threads.remove_remote, lambda n: rig.threads.disable_remote(n, 1)):
                with pytest.raises(PcshareError) as caught:
                    call(number)
                assert caught.value.errno == errno.ENOENT


# ---- blocks that come and go ----


def test_block_with_helpers_is_not_removed(rig: Rig, data_file: Path) -> None:
    """C5."""
    rig.threads.start([-1])
    ram = rig.add_block(f"data={data_file}")
    with child(ram.helper_memfd(writing=False), ram.map_length, features=THREAD_ID) as helper:
        number, control = rig.add_remote(ram, helper)
        with pytest.raises(PcshareError, match="removing a block") as caught:
            rig.threads.remove_block(0)
        assert caught.value.errno == errno.EBUSY
        rig.threads.remove_remote(number)
        control.close()
    rig.remove_block(0)
    with pytest.raises(PcshareError) as caught:
        rig.threads.remove_block(0)
    assert caught.value.errno == errno.ENOENT


@pytest.mark.parametrize("poison", [False, True])
def test_blocks_come_and_go_while_another_is_served_and_streamed(
    rig: Rig, data_file: Path, tmp_path: Path, poison: bool
) -> None:
    """C5: whatever their source is doing at that moment: slow, failing, delayed or done."""
    rig.threads.start([-1, -1])
    rig.threads.set_stream(EAGER)
    ram = rig.add_block(f"data={data_file}#delay=1ms", poison=poison)
    failing = tmp_path / "failing"
    failing.touch()
    content = data_file.read_bytes()
    fds = len(os.listdir("/proc/self/fd"))
    filters = ("", "#delay=1ms", "#delay=60s", "#rate=100K", f"#error=EIO@{failing}", f"#delay=1ms&error=EIO@{failing}")
    for number in range(10):
        for index, text in enumerate(filters, start=1):
            rig.add_block(f"b{index}={data_file}{text}", index, poison=poison)
        assert read_own_page(ram, number) == page_of(content, number)
        for index in range(1, len(filters) + 1):
            rig.remove_block(index)
    assert {event.block_index for event in rig.events()} <= {0}
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= fds, "their fds to be closed")


def test_complete_block_is_told_once_and_only_then_ended(rig: Rig, data_file: Path) -> None:
    rig.threads.start([-1])
    ram = rig.add_block(f"data={data_file}")
    with pytest.raises(PcshareError, match="ending a block") as caught:
        rig.threads.complete_block(0)
    assert caught.value.errno == errno.EBUSY
    rig.threads.set_stream(EAGER)
    assert rig.wait_for_event(EventKind.BLOCK_COMPLETE).block_index == 0
    assert b"".join(read_own_page(ram, page) for page in range(N_PAGES))[:LENGTH] == data_file.read_bytes()
    rig.threads.complete_block(0)
    assert not rig.events()


def test_block_of_holes_only_is_complete_at_once(rig: Rig) -> None:
    rig.threads.start([-1])
    rig.add_block("scratch=zero:1M", writable=True)
    assert rig.wait_for_event(EventKind.BLOCK_COMPLETE).block_index == 0


def test_second_block_of_one_number_is_refused_and_freed(rig: Rig, data_file: Path) -> None:
    """G3."""
    rig.add_block(f"data={data_file}")
    with pytest.raises(PcshareError, match="serving block other") as caught:
        rig.add_block(f"other={data_file}")
    assert caught.value.errno == errno.EINVAL
    assert "pcshare-other" not in Path("/proc/self/maps").read_text()


# ---- with a coordinator around them ----


def test_one_request_a_page_however_many_wait(runtime_dir: Path, data_file: Path, tmp_path: Path) -> None:
    """D3, E4: and all who wait are woken, one call a helper."""
    trace = tmp_path / "trace"
    with serving(f"data={data_file}#delay=6s", stream_mode=LAZY, trace=str(trace)) as served:
        helpers = [served.helper() for _ in range(3)]
        for helper in helpers:
            helper.do("b = attach()")
        pending = [helper.start("read(b, 5 * 4096)") for helper in helpers for _ in range(4)]
        served.wait_for_waiting(12)
        assert [one.result() for one in pending] == [data_file.read_bytes()[5 * PAGE : 5 * PAGE + 1]] * 12
        block = served.block()
        assert (block.demand_pages, block.received_pages) == (1, 1)
        assert served.status().faults == 12
    steps = [(one.event, one.detail) for one in read_trace(str(trace)) if one.page == 5]
    assert steps.count(("request_shared", 0)) == 1
    assert steps.count(("request_shared", 2)) == 11
    assert [event for event, _ in steps].count("wake") == 3
    assert [event for event, _ in steps].count("place") == 1


def test_nobody_who_does_not_wait_is_woken(runtime_dir: Path, data_file: Path, tmp_path: Path) -> None:
    """E4, E6: also not the coordinator's own mapping."""
    trace = tmp_path / "trace"
    with serving(f"data={data_file}#delay=1ms", stream_mode=LAZY, trace=str(trace)) as served:
        helpers = [served.helper() for _ in range(3)]
        for helper in helpers:
            helper.do("b = attach()")
        helpers[1].do("read(b, 0)")
        helpers[1].do("b.ensure(slice(4096, 8192))")
    records = list(read_trace(str(trace)))
    faulted = {one.subject for one in records if one.event == "fault"}
    assert len(faulted) == 1
    assert {one.subject for one in records if one.event == "wake"} == faulted
    assert len([one for one in records if one.event == "wake"]) == 1


def test_own_wait_is_woken_like_any_other(runtime_dir: Path, data_file: Path) -> None:
    """E6: when a helper's request brings the page."""
    with serving(f"data={data_file}#delay=1s", stream_mode=LAZY) as served:
        helper = served.helper()
        helper.do("b = attach()")
        pending = helper.start("read(b, 3 * 4096)")
        wait_until(lambda: served.status().faults == 1, "the fault")
        assert read_own_page(served.ram(), 3) == page_of(data_file.read_bytes(), 3)
        pending.result()


def test_waker_that_fails_keeps_no_other_from_being_woken(runtime_dir: Path, data_file: Path) -> None:
    """E4: a helper was killed while it waited for the same page."""
    with serving(f"data={data_file}#delay=6s", stream_mode=LAZY) as served:
        victim, other = served.helper(), served.helper()
        for helper in (victim, other):
            helper.do("b = attach()")
        victim.start("b[0]")
        served.wait_for_waiting(1)
        pending = other.start("read(b, 0)")
        served.wait_for_waiting(2)
        victim.kill()
        assert pending.result() == data_file.read_bytes()[:1]
        wait_until(lambda: not served.helpers(victim.pid), "the dead helper to be let go")
        assert len(served.status().helpers) == 1


INTERRUPT_READER = """
import ctypes, signal, threading, time
libc, b = ctypes.CDLL(None), attach()
libc.signal(signal.SIGALRM, libc.getpid)
def read_first():
    global reader
    reader = threading.get_native_id()
    return read(b, 0)
def interrupt():
    while libc.tgkill(os.getpid(), reader, signal.SIGALRM) == 0:
        time.sleep(0.001)
"""


def test_waiting_thread_that_gets_signals_is_one_waiter(runtime_dir: Path, data_file: Path) -> None:
    """T13, G6: profiled at 1 kHz it faults again and again; it is not cut off and its wait counts once."""
    with serving(f"data={data_file}#delay=6s", stream_mode=LAZY) as served:
        helper = served.helper()
        helper.do(INTERRUPT_READER)
        pending = helper.start("read_first()")
        served.wait_for_waiting(1)
        interrupting = helper.start("interrupt()")
        wait_until(lambda: served.status().faults > 50, "many faults of the same page")
        assert served.waiting() == 1
        assert pending.result() == data_file.read_bytes()[:1]
        interrupting.result()
        wait_until(lambda: served.helpers(helper.pid)[0].blocktime.max >= 6_000_000, "the wait to be recorded")
        served.wait_for_waiting(0)
        (status,) = served.helpers(helper.pid)
        assert status.state == "attached"
        assert status.demand_pages == 1
        assert sum(status.blocktime.buckets) <= 2  # one, and one more if a message was still on its way


LOAD = """
import random, threading
def scan(seed):
    rng, pages = random.Random(seed), list(range(N_PAGES))
    rng.shuffle(pages)
    for page in pages:
        bad.extend([page] if read(b, page * 4096, 16) != content[page * 4096:page * 4096 + 16] else [])
bad = []
threads = [threading.Thread(target=scan, args=(SEED + i,)) for i in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
bad
"""


@pytest.mark.parametrize("n", [1, 2, 4, 16])
@pytest.mark.parametrize("filters", ["", "#delay=1ms"], ids=["at hand", "asked for"])
def test_several_fault_threads_serve_all_helpers_right(
    runtime_dir: Path, tmp_path: Path, rng: random.Random, seed: int, n: int, filters: str
) -> None:
    """T12, T7, P1: random touches by many threads of several processes, none lost, none wrong, no false alarm."""
    n_pages = 1500
    path = make_file(tmp_path, rng, n_pages * PAGE)
    with serving(f"data={path}{filters}", stream_mode=LAZY, fault_threads=n, read_ahead=0) as served:
        helpers = [served.helper() for _ in range(3)]
        for number, helper in enumerate(helpers):
            helper.do(f"b = attach(); content = open({str(path)!r}, 'rb').read()")
            helper.do(f"N_PAGES, SEED = {n_pages}, {seed + number}")
        assert len(core_threads()) == n
        pending = [helper.start(LOAD) for helper in helpers]
        assert [one.result() for one in pending] == [[]] * 3
        served.wait_for_state("END")
        served.wait_for_counts(received_pages=n_pages, demand_pages=n_pages, foreign_pages=0)
        status = served.status()
        assert status.faults >= n_pages
        wait_until(lambda: sum((now := served.status()).blocktime.buckets) == now.faults, "the last ones to be counted")


def test_helpers_come_and_go_while_faults_run(runtime_dir: Path, tmp_path: Path, rng: random.Random) -> None:
    """C5: one that stays sees every byte right while others attach, touch and leave or are killed."""
    n_pages = 3000
    path = make_file(tmp_path, rng, n_pages * PAGE)
    with serving(f"data={path}#delay=200us", stream_mode=LAZY, fault_threads=2) as served:
        stays = served.helper()
        stays.do(f"b = attach(); content = open({str(path)!r}, 'rb').read()")
        pending = stays.start("[p for p in range(3000) if read(b, p * 4096) != content[p * 4096:p * 4096 + 1]]")
        comer, killed = served.helper(), [served.helper() for _ in range(3)]
        rounds = 0
        while not pending.is_done() or rounds < 10:
            comer.do(f"c = attach(); read(c, {rng.randrange(n_pages)} * 4096); c.close()")
            if rounds < len(killed):
                killed[rounds].do("b = attach()")
                killed[rounds].start("[b[p] for p in range(0, 3000 * 4096, 4096)]")
                wait_until(
                    lambda: all(helper.faults for helper in served.helpers(killed[rounds].pid)),  # noqa: B023
                    "a fault of the next victim, if the block was not complete before it came",
                )
                killed[rounds].kill()
            rounds += 1
        assert pending.result() == []
        served.wait_for_state("END")
        wait_until(lambda: not served.status().helpers, "an end of all attachments")
        assert served.block().foreign_pages == 0


def test_blocktimes_are_those_of_the_source(runtime_dir: Path, data_file: Path) -> None:
    """G6: for shared faults, per helper and over all; they stay in the sum when the helper has left."""
    with serving(f"data={data_file}#delay=5ms", stream_mode=LAZY) as served:
        helper = served.helper()
        helper.do("b = attach()")
        for page in range(20):
            helper.do(f"read(b, {page} * 4096)")
        # Who waits is woken before that is counted.
        wait_until(lambda: sum(served.helpers(helper.pid)[0].blocktime.buckets) == 20, "the last one to be counted")
        (status,) = served.helpers(helper.pid)
        assert status.faults == status.demand_pages == 20, status
        assert 4096 <= status.blocktime.p50 <= status.blocktime.p99 <= status.blocktime.max
        assert status.blocktime.max >= 5000
        assert status.blocktime.total >= 20 * 5000
        helper.do("b.close()")
        wait_until(lambda: not served.status().helpers, "the helper to have left")
        assert sum(read_status(served.name).blocktime.buckets) == 20
