"""--strict: each page is looked at before a helper reads it, so that no helper ever reads a planted one (P1, T3)."""

from __future__ import annotations

import dataclasses
import errno
import random
import subprocess
from pathlib import Path

import pytest

import pcshare
from helper_c_support import build
from pcshare import probe
from pcshare.errors import HostError
from pcshare.protocol import AdminOp
from pcshare_helpers import expected
from support import wait_until
from support_coordinator import Helper, coordinator, die_with_parent
from support_serving import EAGER, LAZY, PAGE, PAUSED, WAIT_S, HelperProcess, Serving, make_file, serving

N_PAGES = 400
LENGTH = N_PAGES * PAGE - 7
PLANTED = [5, 6, 7, 100, N_PAGES - 1]
REMOVED_PAGES = 4096
PAGES_A_FAULT = 16  # what a fault of a strict helper maps at most


def attached(served: Serving, arguments: str = "") -> HelperProcess:
    helper = served.helper()
    helper.do(f"b = attach({arguments})")
    return helper


def planter(served: Serving) -> HelperProcess:
    """A process that maps the block's memory and registers nothing."""
    helper = served.helper()
    helper.do("m = hand_over('welcome').unregistered()")
    return helper


@pytest.mark.parametrize("mode", ["ro", "cow"])
def test_page_that_was_planted_before_is_never_read(
    runtime_dir: Path, data_file: Path, content: bytes, caplog: pytest.LogCaptureFixture, mode: str
) -> None:
    with serving(f"data={data_file}", stream_mode=LAZY, strict=True) as served:
        helper = attached(served, f"mode={mode!r}")
        assert planter(served).do(f"[m[page * 4096] for page in {PLANTED}]") == [0] * len(PLANTED)
        for page in PLANTED:
            assert helper.do(f"read(b, {page} * 4096, 1000)") == content[page * PAGE :][:1000]
        assert served.block().foreign_pages == len(PLANTED)
        wait_until(lambda: f"{len(PLANTED)} foreign pages so far" in caplog.text, "the report")
        assert "replaced by the source's bytes" in caplog.text


def test_without_strict_it_is_read(runtime_dir: Path, data_file: Path) -> None:
    """The price of the default, and the proof that the others test something."""
    with serving(f"data={data_file}", stream_mode=LAZY) as served:
        helper = attached(served)
        planter(served).do("m[5 * 4096]")
        assert helper.do("read(b, 5 * 4096, 1000)") == bytes(1000)


@pytest.mark.parametrize("stream", [AdminOp.STREAM_LAZY, AdminOp.STREAM_EAGER])
def test_nobody_reads_a_planted_page_while_others_are_planted_and_placed(
    runtime_dir: Path, data_file: Path, content: bytes, stream: AdminOp
) -> None:
    with serving(f"data={data_file}#rate=4M", stream_mode=PAUSED, strict=True) as served:
        helpers, plants = [attached(served) for _ in range(3)], planter(served)
        plants.do(f"m[{(N_PAGES - 1) * PAGE}]")  # one at least is planted before it is placed
        served.order(stream)
        planting = plants.start(f"sum(m[page * 4096] for page in range({N_PAGES - 1}, -1, -1)) and None")
        reading = [
            helper.start(f"import random\npages = list(range({N_PAGES}))\nrandom.Random({i}).shuffle(pages)\n"
                         f"{{page: read(b, page * 4096, min(4096, {LENGTH} - page * 4096)) for page in pages}}")
            for i, helper in enumerate(helpers)
        ]  # fmt: skip
        planting.result()
        for one in reading:
            assert one.result() == {page: content[page * PAGE : (page + 1) * PAGE] for page in range(N_PAGES)}
        assert served.block().foreign_pages > 0
        served.order(AdminOp.STREAM_EAGER)
        served.wait_for_state("END")
        assert helpers[0].do("b.wait(); bytes(b)") == content


@pytest.mark.parametrize("name", ["maps-unregistered", "populate-read", "forks-carelessly", "fallocates", "mremaps"])
def test_hostile_helper_that_plants_harms_nobody_who_reads_without_asking(
    runtime_dir: Path, data_file: Path, seed: int, name: str
) -> None:
    """P1, P4."""
    with coordinator(f"data={data_file}#delay=1ms", options=["--stream=lazy", "--strict"]) as served:
        count = 2000  # of 400 pages: some are read before they are planted, most after
        hostile = Helper(served, "hostile", "--block=data", f"--source={data_file}", f"--seed={seed}", name)
        beside = Helper(served, "touch", "--block=data", "--pattern=random", f"--count={count}", f"--seed={seed}")
        finished, answered = hostile.finish(), beside.finish()
        assert finished.returncode in (0, 2), finished  # 2: all pages were here already
        assert answered.report["result"] == expected.expected_touch(data_file, "random", seed, count), answered


def test_pages_are_mapped_sixteen_at_a_fault(runtime_dir: Path, data_file: Path, content: bytes) -> None:
    """The price: a fault for pages that are here, too, but not one a page where they follow each other."""
    with serving(f"data={data_file}", stream_mode=LAZY, strict=True) as served:
        first, second = attached(served), attached(served)
        first.do(f"b.ensure(slice(0, {LENGTH - PAGE}))")
        assert second.do(f"read(b, 0, {LENGTH - PAGE})") == content[: LENGTH - PAGE]
        (told,) = served.helpers(second.pid)
        assert N_PAGES // PAGES_A_FAULT <= told.faults < N_PAGES / 4  # memcpy may be ahead of what is being mapped
        assert served.block().state == "RUNNING"


def test_range_that_was_ensured_is_mapped(runtime_dir: Path, data_file: Path, content: bytes) -> None:
    """So that touching it asks nobody, and system calls take it."""
    with serving(f"data={data_file}", stream_mode=LAZY, strict=True) as served:
        first, second = attached(served), attached(served)
        first.do("read(b, 20 * 4096)")
        for helper in (first, second):
            helper.do("b.ensure(slice(10 * 4096 + 5, 40 * 4096)); b.ensure(slice(0, 0))")
            before = served.helpers(helper.pid)[0].faults
            assert helper.do("read(b, 10 * 4096, 30 * 4096)") == content[10 * PAGE : 40 * PAGE]
            assert served.helpers(helper.pid)[0].faults == before


def test_after_the_end_nothing_of_it_is_left(runtime_dir: Path, data_file: Path, content: bytes) -> None:
    with serving(f"data={data_file}", stream_mode=EAGER, strict=True) as served:
        helper = attached(served)
        helper.do("b.wait()")
        assert helper.do("bytes(b)") == content
        wait_until(lambda: not served.status().helpers, "it to have left")
        assert attached(served).do("bytes(b)") == content


def test_writers_and_removers_are_served(runtime_dir: Path, data_file: Path, content: bytes) -> None:
    with serving(f"data={data_file}", stream_mode=LAZY, writable=("data",), strict=True) as served:
        writer, other = attached(served), attached(served)
        writer.do("write(b, 3 * 4096, b'new')")
        assert other.do("read(b, 3 * 4096, 6)") == b"new" + content[3 * PAGE + 3 : 3 * PAGE + 6]
        writer.do("b.madvise(mmap.MADV_REMOVE, 3 * 4096, 2 * 4096)")
        assert other.do("read(b, 3 * 4096, 2 * 4096)") == bytes(2 * PAGE)
        assert writer.do("read(b, 2 * 4096, 3 * 4096)") == content[2 * PAGE : 3 * PAGE] + bytes(2 * PAGE)
        writer.do("write(b, 4 * 4096, b'again')")
        assert other.do("read(b, 4 * 4096, 5)") == b"again"


def test_removals_are_heard_however_many_threads_fault(runtime_dir: Path, tmp_path: Path, rng: random.Random) -> None:
    """T8: while an event is unread no page can be mapped, and the kernel hands out faults before events."""
    path = make_file(tmp_path, rng, REMOVED_PAGES * PAGE)
    program = build(tmp_path, "strict_remover", "plain")
    with serving(f"data={path}", stream_mode=LAZY, writable=("data",), strict=True) as served:
        attached(served).do(f"b.ensure(slice(0, {(REMOVED_PAGES - 1) * PAGE}))")  # the last keeps it from its end
        done = subprocess.run(
            [program, served.socket], capture_output=True, text=True, timeout=2 * WAIT_S, preexec_fn=die_with_parent
        )
        assert done.returncode == 0, done
        assert served.block().state == "RUNNING"


def test_child_of_fork_reads_no_planted_page(runtime_dir: Path, data_file: Path, content: bytes) -> None:
    with serving(f"data={data_file}", stream_mode=LAZY, strict=True) as served:
        helper = attached(served)
        assert planter(served).do("m[5 * 4096] + m[6 * 4096]") == 0
        helper.do("r, w = os.pipe()")
        code = "pid = os.fork()\nif pid == 0:\n    os.write(w, read(b, 5 * 4096, 2 * 4096))\n    os._exit(0)\n"
        helper.do(f"{code}os.waitpid(pid, 0)")
        assert helper.do("os.read(r, 2 * 4096)") == content[5 * PAGE : 7 * PAGE]


def test_lost_page_that_comes_after_all_is_read(runtime_dir: Path, data_file: Path, content: bytes) -> None:
    """T10: a poison mark is lifted by the same verb that serves a MINOR fault."""
    broken = data_file.with_name("broken")
    broken.touch()
    source = f"data={data_file}#error=EIO@{broken}"
    with serving(source, stream_mode=LAZY, poison=True, strict=True) as served:
        helper = attached(served)
        told = "try: os.write(w, memoryview(b)[5 * 4096 : 6 * 4096])\nexcept OSError as error: failed = error.errno"
        helper.do("r, w = os.pipe()")
        helper.do(told)  # inside a system call SIGBUS is EFAULT
        assert helper.do("failed") == errno.EFAULT
        broken.unlink()
        served.order(AdminOp.RESUME)
        helper.do("b.ensure(slice(5 * 4096, 6 * 4096))")  # it is here, and its mark has gone
        assert helper.do("read(b, 5 * 4096, 4096)") == content[5 * PAGE : 6 * PAGE]


def test_program_and_command_line_ask_for_it(runtime_dir: Path, data_file: Path, content: bytes) -> None:
    with pcshare.Coordinator(blocks={"data": f"{data_file}#delay=1ms"}, stream="lazy", strict=True) as made:
        with made.attach() as block, made.attach() as other:
            block.ensure()
            assert bytes(other) == content
        wait_until(lambda: made.status().state == "END", "the end of the block", WAIT_S)


def test_kernel_that_cannot_tell_is_refused() -> None:
    report = probe.examine_host()
    without = tuple(name for name in report.features if not name.startswith("MINOR_"))
    probe.check_strict(report.page_size, report)
    for page_size, name in ((report.page_size, "MINOR_SHMEM"), (2 << 20, "MINOR_HUGETLBFS")):
        with pytest.raises(HostError, match=f"--strict needs the userfaultfd feature {name}") as caught:
            probe.check_strict(page_size, dataclasses.replace(report, features=without))
        assert "boot Linux 5.1" in (caught.value.hint or "")
