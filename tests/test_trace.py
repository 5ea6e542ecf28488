"""Trace points: every step of a page's life and of a block's is there, and reading it back is safe."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest

from pcshare.core import ffi, lib
from pcshare.errors import PcshareError
from pcshare.protocol import AdminOp
from pcshare.trace import EVENT_NAMES, TraceFile, read_trace, steps_of
from support import wait_until
from support_serving import LAZY, PAGE, make_file, serving

N_PAGES = 300


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return tmp_path / "trace"


def point(event: str, *numbers: int) -> None:
    lib.trace_point(getattr(lib, f"TRACE_{event.upper()}"), *numbers)


def test_what_is_traced_is_read_back_in_order(trace: Path) -> None:
    """G5."""
    ring = TraceFile.start(str(trace))
    point("fault", 1, 2, 3, 4)
    point("wake", 5, 6, 7, 8)
    ring.close()
    first, second = read_trace(str(trace))
    assert (first.event, first.block_index, first.subject, first.page, first.detail) == ("fault", 1, 2, 3, 4)
    assert (second.event, second.block_index, second.subject, second.page, second.detail) == ("wake", 5, 6, 7, 8)
    assert first.time_ns <= second.time_ns
    assert first.tid == second.tid


def test_after_close_nothing_is_traced(trace: Path) -> None:
    ring = TraceFile.start(str(trace))
    ring.close()
    point("fault", 1, 2, 3, 4)
    assert not list(read_trace(str(trace)))


def test_full_ring_keeps_the_newest(trace: Path) -> None:
    ring = TraceFile.start(str(trace))
    for number in range(lib.TRACE_RECORDS + 10):
        lib.trace_point(lib.TRACE_FAULT, 0, 0, number, 0)
    ring.close()
    records = list(read_trace(str(trace)))
    assert [record.page for record in records] == list(range(10, lib.TRACE_RECORDS + 10))


def test_new_trace_empties_the_file(trace: Path) -> None:
    for _ in range(2):
        ring = TraceFile.start(str(trace))
        point("fault", 1, 2, 3, 4)
        ring.close()
    assert len(list(read_trace(str(trace)))) == 1


def test_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(PcshareError, match=f"cannot trace to {tmp_path}") as caught:
        TraceFile.start(str(tmp_path))
    assert caught.value.errno is not None


@pytest.mark.parametrize("content", [b"", b"x" * 100, b"x" * (4 << 20)], ids=["empty", "short", "noise"])
def test_what_is_no_trace_is_refused(trace: Path, content: bytes) -> None:
    trace.write_bytes(content)
    with pytest.raises(PcshareError, match=r"too short for a trace|is no trace of this version"):
        list(read_trace(str(trace)))


def test_record_of_an_event_that_is_not_known_keeps_its_number(trace: Path) -> None:
    ring = TraceFile.start(str(trace))
    lib.trace_point(999, 0, 0, 0, 0)
    ring.close()
    assert [record.event for record in read_trace(str(trace))] == ["999"]


def test_every_event_of_the_header_has_a_name() -> None:
    """G5."""
    assert len(EVENT_NAMES) >= 19
    assert {"fault", "request_shared", "place", "place_zero", "foreign", "wake", "poison"} <= set(EVENT_NAMES.values())
    assert ffi.sizeof("struct trace_record") == 40


def test_every_step_leaves_its_mark(runtime_dir: Path, tmp_path: Path, trace: Path, rng: random.Random) -> None:
    """G5: one life of a block with everything that can happen to its pages."""
    path, broken = make_file(tmp_path, rng, N_PAGES * PAGE), tmp_path / "broken"
    with path.open("r+b") as file:
        file.truncate((N_PAGES + 50) * PAGE)
    source = f"data={path}#error=EIO@{broken}"
    with serving(source, stream_mode=LAZY, poison=True, trace=str(trace), writable=("data",)) as served:
        helper, planter, victim, offender = (served.helper() for _ in range(4))
        for one in (helper, victim):
            one.do("b = attach()")
        planter.do("h = hand_over('welcome'); os.posix_fallocate(h.fds[0].fileno(), 9 * 4096, 4096)")
        helper.do(f"read(b, 4096); b.ensure(slice(0, 20 * 4096)); read(b, {(N_PAGES + 9) * PAGE})")
        helper.do("b.madvise(mmap.MADV_REMOVE, 5 * 4096, 4096)")
        broken.touch()
        victim.start(f"read(b, 100 * {PAGE})")
        assert victim.wait_for_end() == -signal.SIGBUS
        offender.do("h = hand_over('ack'); h.connection.send(b'garbage')")
        wait_until(lambda: any(h.state == "disabled" for h in served.status().helpers), "the offender to be cut off")
        broken.unlink()
        served.order(AdminOp.RESUME)
        served.order(AdminOp.STREAM_EAGER)
        served.wait_for_state("END")
    steps = {record.event for record in read_trace(str(trace))}
    others = {"block_discard"}  # a new block has nothing to discard
    others |= {
        "taking_over",
        "blocks_taken",
        "helpers_taken",
        "helpers_told",
        "makes_way",
    }  # after a coordinator before it
    others |= {step for party in ("helper", "source") for step in steps_of(party)}  # of processes that trace nothing
    assert steps == set(EVENT_NAMES.values()) - others
