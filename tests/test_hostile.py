"""Every hostile helper against a real coordinator, beside an honest one: no harm (P1, P4, P8), nothing left (P7).

The traps of the kernel that a helper can spring (T2 to T6, T13, T15, T17) are rows of `hostile --list` too.
"""

from __future__ import annotations

import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from pcshare_helpers import expected
from support import needs
from support_coordinator import EXECUTABLES, Helper, Serving, coordinator, run_helper

DATA_BYTES = 4 << 20
HONEST_TOUCHES = 200
HOSTILE_LIMIT_S = 40
LARGE_BYTES = 64 << 20
SLOW_SOURCE = "delay=2s"  # longer than a helper takes to touch FAULT_DEMANDS_IN_FLIGHT_MAX pages
FOR_LARGE = "floods-waits"  # has a block of its own
SLOW = ("never-speaks", "never-attaches")  # until the time limit of the hand-over


class Row(NamedTuple):
    name: str
    writable: bool
    plants: bool
    description: str


def rows() -> list[Row]:
    listed = subprocess.run([EXECUTABLES / "hostile", "--list"], capture_output=True, text=True, check=True)
    fields = [line.split("\t") for line in listed.stdout.splitlines()]
    return [Row(name, mode == "rw", plants == "plants", text) for name, mode, plants, text in fields]


ROWS = rows()


@pytest.fixture
def data_file(tmp_path: Path, rng: random.Random) -> Path:
    path = tmp_path / "data.bin"
    path.write_bytes(rng.randbytes(DATA_BYTES))
    return path


@pytest.fixture
def served(runtime_dir: Path, data_file: Path) -> Iterator[Serving]:
    """Three blocks of the same bytes, lazy: somebody else's, the hostile helper's, and a writable one."""
    source = f"{data_file}#delay=1ms"
    blocks = (f"other={source}", f"data={source}", f"scratch={source}")
    with coordinator(*blocks, options=["--stream=lazy", "--writable=scratch"]) as serving:
        yield serving


def honest(served: Serving, block: str, seed: int) -> Helper:
    arguments = ("--pattern=random", f"--count={HONEST_TOUCHES}", f"--seed={seed}")
    return Helper(served, "touch", f"--block={block}", *arguments)


def test_table_has_every_kind() -> None:
    names = [row.name for row in ROWS]
    assert len(names) == len(set(names))
    assert {row.writable for row in ROWS} == {row.plants for row in ROWS} == {False, True}
    assert all(row.description for row in ROWS)


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=row.name, marks=[pytest.mark.slow] if row.name in SLOW else [])
        for row in ROWS
        if row.name != FOR_LARGE
    ],
)
def test_hostile_helper_harms_nobody(served: Serving, data_file: Path, row: Row, seed: int) -> None:
    own = "scratch" if row.writable else "data"
    block = (
        "other" if row.plants or row.writable else own
    )  # who reads beside a planter without asking may see its zeros
    assert honest(served, block, seed + 1).finish().returncode == 0
    served.wait_until_alone(before := served.held())

    beside = honest(served, block, seed)
    hostile = Helper(served, "hostile", f"--block={own}", f"--source={data_file}", f"--seed={seed}", row.name)
    finished = hostile.finish(HOSTILE_LIMIT_S)
    answered = beside.finish()

    if "mlockall: " in finished.report.get("detail", ""):
        needs("the right to lock memory: run as root")
    assert finished.returncode == 0, finished
    assert finished.report["hostile"] == row.name
    assert answered.report["result"] == expected.expected_touch(data_file, "random", seed, HONEST_TOUCHES), answered
    assert served.process.poll() is None
    served.wait_until_alone(before)
    assert served.block(own).foreign_pages == finished.report["planted_pages"]
    if not row.writable:
        asked = run_helper(served, "scan", f"--block={own}", "--ensure")
        assert asked.report["result"] == expected.expected_scan(data_file), asked


def test_helper_that_waits_for_more_pages_than_it_has_threads_is_cut_off(
    runtime_dir: Path, tmp_path: Path, rng: random.Random, seed: int
) -> None:
    """P4: what it left behind is read, and the other's pages behind that."""
    path = tmp_path / "large.bin"
    path.write_bytes(rng.randbytes(LARGE_BYTES))
    with coordinator(f"data={path}#{SLOW_SOURCE}", options=["--stream=lazy"]) as served:
        hostile = Helper(served, "hostile", "--block=data", f"--source={path}", f"--seed={seed}", FOR_LARGE)
        finished = hostile.finish(HOSTILE_LIMIT_S)
        assert finished.returncode == 0, finished
        assert "waits for more pages" in finished.report["detail"]
        assert served.block("data").received_pages < LARGE_BYTES // 4096


def test_hostile_helpers_all_at_once_harm_nobody(served: Serving, data_file: Path, seed: int) -> None:
    """A few of each kind that need no quiet to tell what they did."""
    names = (
        "garbage",
        "not-a-uffd",
        "dies-while-waiting",
        "dies-after-attach",
        "floods-requests",
        "floods-faults",
        "reconnects",
    )
    running = [
        Helper(served, "hostile", "--block=data", f"--source={data_file}", f"--seed={seed + i}", name)
        for i, name in enumerate(names)
    ]
    beside = honest(served, "data", seed)
    assert [helper.finish(HOSTILE_LIMIT_S).returncode for helper in running] == [0] * len(names)
    assert beside.finish().report["result"] == expected.expected_touch(data_file, "random", seed, HONEST_TOUCHES)
    assert served.block("data").foreign_pages == 0


@pytest.mark.parametrize("name", ["truncates", "writes-readonly", "floods-faults"])
def test_a_trial_that_cannot_be_made_is_no_success(runtime_dir: Path, data_file: Path, name: str) -> None:
    """So that a row never passes because there was nothing to try."""
    done = subprocess.run(
        [EXECUTABLES / "hostile", f"--socket={runtime_dir}/nobody.sock", name],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 2
    assert '"outcome": "cannot"' in done.stdout
