"""bench.scale, bench.after: what their jobs are, in small forms, and the crowd of helpers that they need.

How fast anything is here is no test's business.
"""

from __future__ import annotations

import os
import signal
import subprocess
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest

from pcshare.bench import after, scale, working_set
from pcshare.bench.contest import OURS, Contest, Played, Row
from pcshare.bench.crowd import idle_helpers, stride, touch_together
from pcshare.bench.lab import ANY_CPU, EXECUTABLES, HUGE_PAGE, MIB, ONLY_DEMAND, PAGE, Lab
from pcshare.errors import EXIT_USAGE, PcshareError
from support import needs, wait_until

SHRINK = 32
PROGRAM_TIMEOUT_S = 60.0
N = 20  # helpers


@pytest.fixture
def lab(tmp_path: Path, runtime_dir: Path) -> Iterator[Lab]:
    with Lab(tmp_path, shrink=SHRINK) as made:
        yield made


@pytest.fixture
def source(lab: Lab) -> Path:
    return lab.file(2 * HUGE_PAGE)


# -- the crowd


def test_idle_helpers_are_attached_for_as_long_as_they_are_wanted(source: Path, lab: Lab) -> None:
    with lab.coordinator(source, **ONLY_DEMAND) as serving:
        with idle_helpers(lab, N, f"pcshare:{serving.socket}"):
            status = serving.status()
            assert len({helper.pid for helper in status.helpers}) == N
            assert status.faults == 0
        wait_until(lambda: not serving.status().helpers, "them to leave")


def test_crowd_touches_each_page_once(source: Path, lab: Lab) -> None:
    pages = 2 * HUGE_PAGE // PAGE
    with lab.coordinator(source, **ONLY_DEMAND) as serving:
        told = touch_together(lab, N, pages, f"pcshare:{serving.socket}#data")
        wait_until(lambda: serving.status().blocks[0].demand_pages == pages, "all of them to be counted")
        status = serving.status()
    assert told["touches"] == pages
    assert told["faults_per_s"] == pytest.approx(pages / told["seconds"])
    assert status.blocks[0].received_pages == pages
    assert status.helpers_joined == N


@pytest.mark.parametrize("n", [1, 2, N])
def test_smallest_server_answers_a_crowd(source: Path, lab: Lab, n: int) -> None:
    pages = 2 * HUGE_PAGE // PAGE
    told = touch_together(lab, n, pages, f"server:{source}")
    assert told["touches"] == pages
    assert told["faults_per_s"] == pytest.approx(pages / told["seconds"])


def test_crowd_of_the_smallest_server_that_cannot_begin_is_told(lab: Lab, tmp_path: Path, source: Path) -> None:
    with pytest.raises(PcshareError, match="No such file"):
        touch_together(lab, 2, 10, f"server:{tmp_path / 'nothing.bin'}")
    with pytest.raises(PcshareError, match="too many helpers"):
        touch_together(lab, 1000, 10, f"server:{source}")


def test_helper_of_the_smallest_server_that_fails_ends_them_all(tmp_path: Path) -> None:
    """Each is one too many for the memory that it may have."""
    path = tmp_path / "large.bin"
    with path.open("wb") as file:
        file.truncate(4 << 30)
    done = subprocess.run(
        ["bash", "-c", f"ulimit -v {1 << 20}; exec {EXECUTABLES / 'bench-crowd'} touch 3 10 server:{path}"],
        capture_output=True, text=True, timeout=PROGRAM_TIMEOUT_S,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "")
    assert "mmap: Cannot allocate memory" in done.stderr


def test_crowd_that_cannot_attach_is_told_and_ends(lab: Lab, tmp_path: Path) -> None:
    nobody = f"pcshare:{tmp_path / 'nobody.sock'}"
    with pytest.raises(PcshareError, match="bench-crowd touch 2 10"):
        touch_together(lab, 2, 10, nobody)
    with pytest.raises(PcshareError, match="not all of 2 helpers"), idle_helpers(lab, 2, nobody):
        pytest.fail("they are attached")


def test_crowd_does_not_outlive_its_program(source: Path, lab: Lab) -> None:
    with lab.coordinator(source, **ONLY_DEMAND) as serving:
        command = [str(EXECUTABLES / "bench-crowd"), "idle", str(N), f"pcshare:{serving.socket}"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as crowd:
            assert crowd.stdout is not None
            crowd.stdout.readline()
            crowd.kill()
        wait_until(lambda: not serving.status().helpers, "the end of them all")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["idle", "0", "pcshare:x"],
        ["idle", "1", "file:x"],
        ["idle", "1", "server:x"],
        ["touch", "1", "pcshare:x"],
        ["touch", "1", "0", "pcshare:x"],
        ["nap", "1", "x"],
    ],
)
def test_wrong_usage_of_the_crowd_ends_with_2_and_one_line(arguments: list[str]) -> None:
    command = [str(EXECUTABLES / "bench-crowd"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PROGRAM_TIMEOUT_S)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (EXIT_USAGE, "", 1)


# -- the jobs


def test_list_is_touched_page_by_page(source: Path, lab: Lab, tmp_path: Path) -> None:
    pages = tmp_path / "pages.list"
    pages.write_bytes(array("Q", [5, 900, 17]).tobytes())
    with lab.coordinator(source, **ONLY_DEMAND) as serving:
        told = lab.touch("list", ANY_CPU, pages, f"pcshare:{serving.socket}")
        with serving.attach() as block:
            received = [
                page for page in range(2 * HUGE_PAGE // PAGE) if block.is_received(slice(page * PAGE, page * PAGE + 1))
            ]
    assert (told["touches"], told["timed"]) == (3, 3)
    assert received == [5, 17, 900]


def test_large_block_is_touched_where_its_data_is(lab: Lab) -> None:
    """The same data in the same order, in a block that is mostly hole."""
    small, large = 2 * HUGE_PAGE, 64 * HUGE_PAGE
    path = scale._spread_out(lab, large, small)
    walks = [array("Q", scale._walk_of_data(lab, length, small).read_bytes()) for length in (small, large)]
    pages = small // PAGE
    assert list(walks[0]) == [i * stride(pages) % pages for i in range(min(lab.count(scale.TOUCHES), pages))]
    assert path.stat().st_size == large
    assert path.stat().st_blocks * 512 == small
    with lab.file(small).open("rb") as data, path.open("rb") as sparse:
        for page, far_page in zip(*walks, strict=True):
            assert os.pread(data.fileno(), PAGE, page * PAGE) == os.pread(sparse.fileno(), PAGE, far_page * PAGE)


def test_stride_reaches_every_page(lab: Lab) -> None:
    for pages in (1, 2, 7, 1000, 1024, 16384):
        assert {i * stride(pages) % pages for i in range(pages)} == set(range(pages))


# -- what has no rival


def test_row_without_a_rival_holds_the_figure_itself_to_its_bound() -> None:
    row = Row("CPU time", "cpu_ms", "", at_most=1)
    played = Played(Contest("after, x", "lazy", "none", {}, [row]), {OURS: [{"cpu_ms": 0.5}, {"cpu_ms": 3.0}]})
    (found,) = played.results()
    assert found.ratios == [0.5, 3.0]
    assert (found.is_met, found.is_beyond, found.name) == (False, False, "after, x: CPU time")


def test_private_memory_leaves_out_that_of_the_block(lab: Lab) -> None:
    needs(None if os.geteuid() == 0 else "root's right to look into other processes")
    length = 32 * MIB
    with lab.coordinator(lab.file(length), "eager") as serving:
        wait_until(lambda: serving.status().state == "END", "the whole block", 30.0)
        mapped = sum(
            size for pid in after._pids(serving) for name, size in after._mappings(pid) if "pcshare-data" in name
        )
        own = [after.private_bytes(pid) for pid in after._pids(serving)]
    assert mapped >= length  # the keeper's pages, which nobody else has mapped
    assert all(size > 0 for size in own)
    assert sum(own) < length + 60 * MIB


@pytest.mark.parametrize("number", [0, 1, 2])
def test_second_start_demands_less_by_the_recorded_set(lab: Lab, number: int) -> None:
    contest = working_set.starts(lab)[number]
    first, second = (contest.rivals[name](0) for name in (working_set.FIRST, working_set.SECOND))
    assert first["touches"] == second["touches"]
    if contest.stream == "lazy":
        assert second["demanded"] < first["demanded"]
