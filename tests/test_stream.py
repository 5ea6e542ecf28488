"""The stream: what brings the pages that nobody waits for, steered at run time, demand always first."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pcshare.errors import PcshareError
from pcshare.protocol import AdminOp
from pcshare.trace import Record, read_trace
from support import wait_until
from support_serving import EAGER, HUGE_PAGE, LAZY, PAGE, PAUSED, RATE, Serving, make_file, serving

N_PAGES = 1000
LENGTH = N_PAGES * PAGE - 1234


def requests(trace: Path, block_index: int = 0) -> list[Record]:
    """What the stream asked the source for."""
    return [one for one in read_trace(str(trace)) if one.event == "stream_request" and one.block_index == block_index]


def whole(served: Serving, idstr: str = "data") -> bytes:
    """The bytes of a complete block."""
    ram = served.ram(idstr)
    return os.pread(ram.helper_memfd(writing=False), ram.used_length, 0)


# ---- modes ----


def test_eager_stream_brings_all_in_large_pieces_each_page_once(
    runtime_dir: Path, data_file: Path, tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    with serving(f"data={data_file}", stream_mode=EAGER, trace=str(trace)) as served:
        block = served.wait_for_state("END")
        assert whole(served) == data_file.read_bytes()
    assert (block.received_pages, block.stream_pages, block.demand_pages) == (N_PAGES, N_PAGES, 0)
    asked = requests(trace)
    assert [one.page for one in asked] == [0, 256, 512, 768]
    assert sum(one.detail for one in asked) == N_PAGES


def test_lazy_stream_brings_nothing(runtime_dir: Path, data_file: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    with serving(f"data={data_file}", stream_mode=LAZY, trace=str(trace)) as served:
        helper = served.helper()
        helper.do("b = attach(); read(b, 0)")
        assert served.status().stream == "lazy"
        assert (served.block().received_pages, served.block().stream_pages) == (1, 0)
    assert not requests(trace)


def times_asleep(thread_name: str) -> int:
    """How often the thread of that name in this process has gone to sleep."""
    (folder,) = (
        folder for folder in Path("/proc/self/task").iterdir() if (folder / "comm").read_text().strip() == thread_name
    )
    (line,) = (line for line in (folder / "status").read_text().splitlines() if line.startswith("voluntary_ctxt"))
    return int(line.split()[1])


def test_faults_do_not_wake_a_stream_that_has_nothing_to_do(runtime_dir: Path, data_file: Path) -> None:
    n_faults = 200
    with serving(f"data={data_file}#delay=1us", stream_mode=LAZY, read_ahead=0) as served:
        helper = served.helper()
        helper.do("b = attach(); read(b, 0)")
        before = times_asleep("pcshare-stream")
        helper.do(f"for page in range(1, {n_faults}): read(b, page * {PAGE})")
        assert times_asleep("pcshare-stream") - before < n_faults // 10
        assert served.block().demand_pages == n_faults


def test_paused_stream_goes_on_as_before_when_it_is_resumed(runtime_dir: Path, data_file: Path) -> None:
    with serving(f"data={data_file}", stream_mode=PAUSED) as served:
        assert served.status().stream == "paused"
        assert served.block().received_pages == 0
        served.order(AdminOp.STREAM_RESUME)
        assert served.status().stream == "eager"
        served.wait_for_state("END")


def test_stream_is_paused_and_resumed_at_run_time(runtime_dir: Path, data_file: Path) -> None:
    """With what had been set: a rate stays that rate."""
    with serving(f"data={data_file}", stream_mode=RATE, stream_rate=256 << 10) as served:
        wait_until(lambda: served.block().received_pages > 0, "the first pages")
        served.order(AdminOp.STREAM_PAUSE)
        assert (served.status().stream, served.block().state) == ("paused", "RUNNING")
        helper = served.helper()
        helper.do(f"b = attach(); read(b, {LENGTH - 1})")  # faults are answered all the same
        assert served.block().received_pages < N_PAGES
        served.order(AdminOp.STREAM_RESUME)
        status = served.status()
        assert (status.stream, status.stream_rate) == ("rate", 256 << 10)
        served.order(AdminOp.STREAM_EAGER)
        served.wait_for_state("END")


def test_rate_limits_the_stream(runtime_dir: Path, data_file: Path) -> None:
    """In bytes a second: 4 MB at 8 MiB/s take half a second, and not much more."""
    started = time.monotonic()
    with serving(f"data={data_file}", stream_mode=RATE, stream_rate=8 << 20) as served:
        served.wait_for_state("END")
        took_s = time.monotonic() - started
    assert 0.4 < took_s < 20.0


def test_rate_is_changed_at_run_time(runtime_dir: Path, data_file: Path) -> None:
    """Who waits under the old rate waits no longer."""
    with serving(f"data={data_file}", stream_mode=RATE, stream_rate=1) as served:
        wait_until(lambda: served.block().received_pages == 1, "the first page")
        served.order(AdminOp.STREAM_RATE, 1 << 30)
        assert served.status().stream_rate == 1 << 30
        served.wait_for_state("END")


def test_lazy_becomes_eager_at_run_time_and_back(runtime_dir: Path, data_file: Path) -> None:
    with serving(f"data={data_file}#delay=20ms", stream_mode=LAZY) as served:
        served.order(AdminOp.STREAM_EAGER)
        served.order(AdminOp.STREAM_LAZY)
        assert served.status().stream == "lazy"
        served.order(AdminOp.STREAM_RESUME)  # nothing was paused: it stays as it was
        assert served.status().stream == "lazy"
        served.order(AdminOp.STREAM_EAGER)
        served.wait_for_state("END")


def test_rate_of_nothing_is_refused(runtime_dir: Path, data_file: Path) -> None:
    with serving(f"data={data_file}", stream_mode=LAZY) as served:
        with pytest.raises(PcshareError, match="at least 1 byte a second"):
            served.order(AdminOp.STREAM_RATE, 0)
        assert served.status().stream == "lazy"


# ---- order ----


def test_stream_goes_on_after_the_page_that_was_last_demanded(
    runtime_dir: Path, data_file: Path, tmp_path: Path
) -> None:
    """D5: and comes back to what lies before it."""
    trace = tmp_path / "trace"
    with serving(f"data={data_file}", stream_mode=LAZY, trace=str(trace)) as served:
        helper = served.helper()
        helper.do("b = attach(); read(b, 700 * 4096)")
        served.order(AdminOp.STREAM_EAGER)
        served.wait_for_state("END")
        assert whole(served) == data_file.read_bytes()
    assert [(one.page, one.detail) for one in requests(trace)] == [
        (701, 256), (957, 43), (0, 256), (256, 256), (512, 188)
    ]  # fmt: skip


def test_page_that_is_under_way_is_not_asked_for_by_the_stream(
    runtime_dir: Path, data_file: Path, tmp_path: Path
) -> None:
    """D5, D3: it goes on behind the page whose reader still waits."""
    trace = tmp_path / "trace"
    with serving(f"data={data_file}#delay=60s", stream_mode=LAZY, trace=str(trace)) as served:
        helper = served.helper()
        helper.do("b = attach()")
        pending = helper.start("read(b, 700 * 4096)")
        served.wait_for_waiting(1)
        served.order(AdminOp.STREAM_EAGER)
        wait_until(lambda: bool(requests(trace)), "the stream's first request")
        assert requests(trace)[0].page == 701
        assert not pending.is_done()


def test_stream_goes_on_in_the_block_that_was_last_demanded(runtime_dir: Path, data_file: Path, tmp_path: Path) -> None:
    """D5: with several blocks; then it brings the others."""
    trace = tmp_path / "trace"
    with serving(f"a={data_file}", f"b={data_file}", f"c={data_file}", stream_mode=LAZY, trace=str(trace)) as served:
        helper = served.helper()
        helper.do("b = attach('b'); read(b, 500 * 4096)")
        served.order(AdminOp.STREAM_EAGER)
        for idstr in "abc":
            served.wait_for_state("END", idstr)
            assert whole(served, idstr) == data_file.read_bytes()
    asked = [(one.block_index, one.page) for one in read_trace(str(trace)) if one.event == "stream_request"]
    assert asked[0] == (1, 501)
    assert [block for i, (block, _) in enumerate(asked) if i == 0 or asked[i - 1][0] != block] == [1, 2, 0]


def test_demand_does_not_wait_behind_a_slow_stream(runtime_dir: Path, tmp_path: Path, rng: random.Random) -> None:
    """D4: 200 random pages are there while the stream, at 1 MB/s, has brought a part of 16 MB."""
    n_pages = 4000
    path = make_file(tmp_path, rng, n_pages * PAGE)
    with serving(f"data={path}#rate=1M", stream_mode=PAUSED) as served:
        helper = served.helper()
        helper.do(f"b = attach(); content = open({str(path)!r}, 'rb').read()")
        served.order(AdminOp.STREAM_EAGER)
        pages = sorted(rng.sample(range(n_pages // 2, n_pages), 50), reverse=True)
        assert helper.do(f"[p for p in {pages} if read(b, p * 4096) != content[p * 4096:p * 4096 + 1]]") == []
        assert served.block().stream_pages < n_pages // 2
        assert served.block().state == "RUNNING"
        helper.do("b.close()")


# ---- ranges ----


@pytest.mark.parametrize("mode", [EAGER, LAZY, RATE, PAUSED])
def test_ensured_range_comes_in_every_mode(runtime_dir: Path, data_file: Path, mode: int) -> None:
    with serving(f"data={data_file}", stream_mode=mode, stream_rate=1) as served:
        helper = served.helper()
        helper.do("b = attach(); b.ensure(slice(100 * 4096 + 5, 200 * 4096 + 1))")
        assert helper.do("b.is_received(slice(100 * 4096, 201 * 4096))")
        if mode != EAGER:
            assert not helper.do("b.is_received(slice(99 * 4096, 201 * 4096))")
            wait_until(lambda: served.helpers(helper.pid)[0].demand_pages == 101, "the pages to be counted")
            assert served.block().demand_pages == 101


def test_one_range_is_one_request(runtime_dir: Path, data_file: Path, tmp_path: Path) -> None:
    """And asks for nothing that is here already."""
    trace = tmp_path / "trace"
    with serving(f"data={data_file}", stream_mode=LAZY, trace=str(trace)) as served:
        helper = served.helper()
        helper.do("b = attach(); read(b, 150 * 4096); b.ensure(slice(100 * 4096, 200 * 4096))")
        helper.do("b.ensure(slice(100 * 4096, 200 * 4096)); b.ensure(slice(0, 0))")
        assert helper.do("read(b, 100 * 4096, 100 * 4096)") == data_file.read_bytes()[100 * PAGE : 200 * PAGE]
        assert served.status().faults == 1
    assert [(one.page, one.detail) for one in requests(trace)] == [(100, 50), (151, 49)]


def test_prefetched_range_comes_without_anybody_waiting(runtime_dir: Path, data_file: Path) -> None:
    with serving(f"data={data_file}#delay=50ms", stream_mode=LAZY) as served:
        helper = served.helper()
        helper.do("b = attach(); b.prefetch(slice(0, 40960))")
        wait_until(lambda: bool(helper.do("b.is_received(slice(0, 40960))")), "the prefetched range")
        assert served.status().faults == 0
        served.wait_for_counts(stream_pages=10, demand_pages=0)


def test_ranges_that_overlap_are_all_answered(runtime_dir: Path, data_file: Path, rng: random.Random) -> None:
    """P3: from many threads of several helpers at once."""
    with serving(f"data={data_file}#delay=2ms", stream_mode=LAZY) as served:
        helpers = [served.helper() for _ in range(2)]
        pending = []
        for helper in helpers:
            helper.do("b = attach()")
            for _ in range(30):
                start = rng.randrange(LENGTH)
                stop = rng.randrange(start, LENGTH)
                pending.append(helper.start(f"b.ensure(slice({start}, {stop})), b.is_received(slice({start}, {stop}))"))
        assert [one.result() for one in pending] == [(None, True)] * 60


def test_waiting_for_more_than_will_come_ends_when_the_stream_is_made_lazy(runtime_dir: Path, data_file: Path) -> None:
    with serving(f"data={data_file}", stream_mode=PAUSED) as served:
        helper = served.helper()
        helper.do("b = attach()")
        pending = helper.start("b.wait(0.5)")
        served.order(AdminOp.STREAM_LAZY)
        with pytest.raises(PcshareError, match="nothing streams"):
            pending.result()


# ---- sizes ----


@pytest.mark.parametrize("length", [1, PAGE - 1, PAGE, PAGE + 1, 3 * (1 << 20) + 1])
def test_sizes_that_are_no_multiple_of_a_page_come_whole_with_zeros_behind(
    runtime_dir: Path, tmp_path: Path, rng: random.Random, length: int
) -> None:
    path = make_file(tmp_path, rng, length)
    with serving(f"data={path}") as served:
        served.wait_for_state("END")
        ram = served.ram()
        assert os.pread(ram.helper_memfd(writing=False), ram.map_length, 0) == path.read_bytes().ljust(
            ram.map_length, b"\0"
        )
        helper = served.helper()
        assert helper.do("b = attach(); len(b), len(memoryview(b)), bytes(b)") == (length, length, path.read_bytes())


def test_holes_of_a_sparse_file_are_neither_asked_for_nor_placed(
    runtime_dir: Path, tmp_path: Path, rng: random.Random
) -> None:
    path, trace = tmp_path / "sparse.bin", tmp_path / "trace"
    with path.open("wb") as file:
        file.truncate(400 * PAGE)
        for page in (100, 101, 300):
            file.seek(page * PAGE)
            file.write(rng.randbytes(PAGE))
    with serving(f"data={path}", trace=str(trace)) as served:
        block = served.wait_for_state("END")
        assert (block.received_pages, block.hole_pages, block.page_count) == (3, 397, 400)
        assert os.fstat(served.ram().helper_memfd(writing=False)).st_blocks * 512 == 3 * PAGE
        assert whole(served) == path.read_bytes()
    assert [(one.page, one.detail) for one in requests(trace)] == [(100, 2), (300, 1)]


def test_touched_hole_of_a_sparse_file_is_zeros(runtime_dir: Path, tmp_path: Path) -> None:
    """E2: by ZEROPAGE, counted as a zero page, and the block is complete without it."""
    path = tmp_path / "sparse.bin"
    with path.open("wb") as file:
        file.write(b"x" * PAGE)
        file.truncate(10 * PAGE)
    with serving(f"data={path}", stream_mode=LAZY) as served:
        helper = served.helper()
        assert helper.do("b = attach(); read(b, 5 * 4096, 10)") == bytes(10)
        block = served.block()
        assert (block.zero_pages, block.received_pages, block.hole_pages) == (1, 1, 8)
        helper.do("read(b, 0)")
        served.wait_for_state("END")


def test_huge_pages_are_served_and_streamed(
    runtime_dir: Path, tmp_path: Path, rng: random.Random, huge_pages: Callable[[int], None]
) -> None:
    huge_pages(6)
    path = make_file(tmp_path, rng, 5 * HUGE_PAGE + 77)
    content = path.read_bytes()
    with serving(f"data={path}#delay=1ms", stream_mode=LAZY, page_size=HUGE_PAGE) as served:
        helper = served.helper()
        offset = 3 * HUGE_PAGE + 5
        assert helper.do("b = attach(); b.page_size") == HUGE_PAGE
        assert helper.do(f"read(b, {offset}, 8)") == content[offset : offset + 8]
        assert (served.block().received_pages, served.block().page_count) == (1, 6)
        served.order(AdminOp.STREAM_EAGER)
        served.wait_for_state("END")
        assert helper.do("b.wait(); bytes(b)") == content
